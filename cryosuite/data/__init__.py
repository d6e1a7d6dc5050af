"""Particle sets, preprocessing and the layout of work and run folders."""
