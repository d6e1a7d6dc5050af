"""Bytes <-> arrays: mrc, star, cs, pickles, yaml and atomic models."""
