"""Masks that users give: maps between 0 and 1 on the grid of the maps they are for."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cryosuite.errors import InputError, notice
from cryosuite.formats.mrc import read_map

ROUNDING = 0.01  # masks of other programs overshoot 0 and 1 a little


def read_mask(path: Path, box_size: int | None = None, pixel_size: float | None = None) -> np.ndarray:
    """A mask (D, D, D) float32; ``box_size`` pixels and ``pixel_size`` (A) are those of the maps it is for.

    Raises InputError for another box, values that are not finite or not between 0 and 1, and a mask of nothing; a
    pixel size that differs is told, as many programs write none that is right.
    """
    found = read_map(path)
    mask = np.asarray(found.data, np.float32)
    if len(set(mask.shape)) != 1 or box_size not in (None, mask.shape[0]):
        expected = "a cube" if box_size is None else f"{box_size} x {box_size} x {box_size}"
        raise InputError(f"{path}: this mask has {' x '.join(map(str, mask.shape[::-1]))} voxels, expected {expected}")
    low, high = float(mask.min()), float(mask.max())
    if not np.isfinite(mask).all():
        raise InputError(f"{path}: this mask holds values that are not finite (NaN or infinite)")
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise InputError(f"{path}: holds values from {low:.3g} to {high:.3g}; a mask lies between 0 and 1")
    if high <= 0.5:
        raise InputError(f"{path}: no voxel of this mask is above 0.5 (the highest is {high:.3g}): it hides everything")
    if pixel_size and found.pixel_size and abs(found.pixel_size / pixel_size - 1) > 0.01:
        notice(
            f"{path}: says {found.pixel_size:.4g} A per pixel, the maps have {pixel_size:.4g}: taken voxel by voxel; "
            "is it the right mask?"
        )
    return mask
