"""Phantoms and atoms -> images: data sets with a known truth."""
