"""RELION particle sets: the tables of a STAR file and their columns in the units of the rest of the program."""

from __future__ import annotations

from cryosuite.formats.relion import ParticleTables, particle_tables
from cryosuite.formats.relion_columns import (
    box_sizes_from_star,
    ctf_from_star,
    half_from_star,
    images_from_star,
    pixel_sizes_from_star,
    poses_from_star,
    read_stack_list,
    tubes_from_star,
)
from cryosuite.formats.star_text import read_star, write_star

__all__ = [
    "ParticleTables",
    "box_sizes_from_star",
    "ctf_from_star",
    "half_from_star",
    "images_from_star",
    "particle_tables",
    "pixel_sizes_from_star",
    "poses_from_star",
    "read_stack_list",
    "read_star",
    "tubes_from_star",
    "write_star",
]
