"""Maps as sources of images: every voxel becomes a point with the voxel's density as its weight.

The images are then made like those of atoms, by the exact transform of these points. Nothing is interpolated, in
contrast to slices of a padded transform, so the images share no operator with the reconstruction that is judged.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from cryosuite.errors import InputError, notice
from cryosuite.formats.mrc import read_map
from cryosuite.kernels.fourier import fourier_crop_volume
from cryosuite.simulate.states import State

KEEP = 0.005  # voxels whose |density| is below this share of the 99.9 percentile are left out
SOLVENT = 0.02  # share of the squared density whose loss is worth a notice


def map_state(path: Path, render_pixel: float) -> State:
    """A map as a state, in the frame of its box (origin at voxel D//2); it must be a cube with a pixel size.

    Args:
        path: .mrc or .map, may be gzipped; density positive.
        render_pixel: A; a finer map is cropped in Fourier space to about this pixel size.

    Raises:
        InputError: no cube, no pixel size, an empty map.
    """
    source = read_map(path)
    data = torch.from_numpy(np.ascontiguousarray(source.data, np.float32))
    if len(set(data.shape)) != 1 or data.shape[0] % 2:
        raise InputError(f"{path}: expected a cube of even size, found {' x '.join(map(str, data.shape))}.")
    if not source.pixel_size:
        raise InputError(f"{path}: the map has no pixel size (header cella); set it, e.g. in ChimeraX, and try again.")
    pixel, size = float(source.pixel_size), data.shape[0]
    smaller = 2 * int(np.ceil(size * pixel / render_pixel / 2))
    if smaller < size:
        data, pixel = fourier_crop_volume(data, smaller), pixel * size / smaller
    volume = data.numpy()
    strong = np.abs(volume) > KEEP * np.percentile(np.abs(volume), 99.9)
    if not strong.any():
        raise InputError(f"{path}: the map is empty.")
    lost = 1.0 - float((volume[strong].astype(np.float64) ** 2).sum() / (volume.astype(np.float64) ** 2).sum())
    if lost > SOLVENT:
        notice(f"{path}: weak voxels with {lost:.0%} of the squared density are left out.")
    zyx = np.argwhere(strong) - volume.shape[0] // 2
    return State(path.name.split(".")[0], zyx[:, ::-1] * pixel, volume[strong])
