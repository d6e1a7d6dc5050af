"""cryoSPARC particle sets: the table of a .cs file and its columns in the units of the rest of the program."""

from __future__ import annotations

from cryosuite.formats.cs_columns import (
    box_sizes_from_cs,
    ctf_from_cs,
    field,
    half_from_cs,
    images_from_cs,
    pixel_sizes_from_cs,
    poses_from_cs,
    sign_from_cs,
    tubes_from_cs,
)
from cryosuite.formats.cs_table import read_cs, write_cs

__all__ = [
    "box_sizes_from_cs",
    "ctf_from_cs",
    "field",
    "half_from_cs",
    "images_from_cs",
    "pixel_sizes_from_cs",
    "poses_from_cs",
    "read_cs",
    "sign_from_cs",
    "tubes_from_cs",
    "write_cs",
]
