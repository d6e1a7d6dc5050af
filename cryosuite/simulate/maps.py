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
from cryosuite.kernels.fourier import fft3c, ifft3c
from cryosuite.simulate.states import State

MAX_BOX = 512
KEEP = 0.005  # voxels whose |density| is below this share of the 99.9 percentile are left out
SOLVENT = 0.02  # share of the squared density whose loss is worth a notice


def map_state(path: Path, render_pixel: float) -> State:
    """A map as a state, in the frame of its box (origin at voxel n//2 of each axis).

    Args:
        path: .mrc or .map, may be gzipped; density positive.
        render_pixel: A; the map is resampled in Fourier space to this pixel size or a little less.

    Raises:
        InputError: no pixel size, an empty map, a map far larger than the images.
    """
    source = read_map(path)
    if not source.pixel_size:
        raise InputError(f"{path}: the map has no pixel size (header cella); set it, e.g. in ChimeraX, and try again.")
    data, pixel = _even_cube(source.data), float(source.pixel_size)
    size = data.shape[0]
    wanted = 2 * int(np.ceil(size * pixel / render_pixel / 2))
    if wanted > MAX_BOX:
        raise InputError(f"{path}: {size * pixel:.0f} A wide: would need a box of {wanted} at {render_pixel:g} A.")
    data, pixel = _resize(torch.from_numpy(data), wanted), pixel * size / wanted
    volume = data.numpy()
    strong = np.abs(volume) > KEEP * np.percentile(np.abs(volume), 99.9)
    if not strong.any():
        raise InputError(f"{path}: the map is empty.")
    lost = 1.0 - float((volume[strong].astype(np.float64) ** 2).sum() / (volume.astype(np.float64) ** 2).sum())
    if lost > SOLVENT:
        notice(f"{path}: weak voxels with {lost:.0%} of the squared density are left out.")
    zyx = np.argwhere(strong) - volume.shape[0] // 2
    return State(path.name.split(".")[0], zyx[:, ::-1] * pixel, volume[strong])


def _even_cube(data: np.ndarray) -> np.ndarray:
    """A map padded with zeros to an even cube, its origin kept at the middle: float32."""
    size = max(data.shape) + max(data.shape) % 2
    pad = [(size // 2 - n // 2, size - n - (size // 2 - n // 2)) for n in data.shape]
    return np.pad(np.asarray(data, np.float32), pad)


def _resize(volume: torch.Tensor, size: int) -> torch.Tensor:
    """The same map on a grid of another even size, by cropping or padding its transform; the sum is kept."""
    old = volume.shape[0]
    half, common = size // 2, min(old, size)
    spectrum = fft3c(volume)
    part = (slice(old // 2 - common // 2, old // 2 + common // 2),) * 3
    out = torch.zeros((size,) * 3, dtype=spectrum.dtype)
    out[(slice(half - common // 2, half + common // 2),) * 3] = spectrum[part]
    return ifft3c(out).real
