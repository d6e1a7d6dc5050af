"""Images of Gaussian blobs with known poses, projected by formula: nothing here uses the slices under test."""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from cryosuite.data.particles import ParticleSet
from cryosuite.kernels.ctf import CtfParams, ctf

PIXEL = 5.0
CENTRES = np.array([[5.0, 0, 0], [-3, 4, 1], [0, -5, 3], [1, 2, -6], [-4, -2, -3]])  # px (x, y, z), no symmetry
SIGMAS = np.array([1.6, 2.0, 1.8, 2.2, 1.5])
HEIGHTS = np.array([1.0, 0.8, 1.2, 0.9, 1.1])


def volume(box: int, centres: np.ndarray = CENTRES) -> torch.Tensor:
    """The true map (D, D, D)."""
    axis = np.arange(box) - box // 2
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    out = np.zeros((box,) * 3)
    for centre, sigma, height in zip(centres, SIGMAS, HEIGHTS, strict=True):
        square = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2
        out += height * np.exp(-square / (2 * sigma**2))
    return torch.from_numpy(out.astype(np.float32))


def particles(
    n: int = 400,
    box: int = 32,
    noise: float = 0.0,
    seed: int = 0,
    shifts: float = 2.0,
    with_ctf: bool = True,
    centres: np.ndarray = CENTRES,
) -> ParticleSet:
    """n white particles: CTF x projection + white noise of a standard deviation relative to the images'."""
    generator = np.random.default_rng(seed)
    rotation = Rotation.random(n, random_state=seed).as_matrix()
    shift = generator.uniform(-shifts, shifts, (n, 2)) / box
    axis = np.arange(box) - box // 2
    # the stored shift is what must be ADDED to centre the particle
    place = np.einsum("nij,kj->nki", rotation, centres)[..., :2] - shift[:, None] * box
    images = np.zeros((n, box, box))
    for k, (sigma, height) in enumerate(zip(SIGMAS, HEIGHTS, strict=True)):
        gx = np.exp(-((axis - place[:, k, :1]) ** 2) / (2 * sigma**2))
        gy = np.exp(-((axis - place[:, k, 1:]) ** 2) / (2 * sigma**2))
        images += height * sigma * np.sqrt(2 * np.pi) * gy[:, :, None] * gx[:, None, :]
    table = np.zeros((n, 9), np.float32)
    table[:] = [box, PIXEL, 15000, 14500, 0, 300, 2.7, 0.1, 0]
    table[:, 2] = generator.uniform(8000, 25000, n)
    table[:, 3] = table[:, 2] - generator.uniform(0, 500, n)
    table[:, 4] = generator.uniform(0, 180, n)
    if with_ctf:
        f = torch.fft.fftfreq(box, dtype=torch.float64)
        grid = torch.stack(torch.meshgrid(f, f, indexing="xy"), -1).reshape(-1, 2)
        transfer = ctf(grid, CtfParams.from_table(torch.from_numpy(table))).reshape(n, box, box)
        images = torch.fft.ifft2(torch.fft.fft2(torch.from_numpy(images)) * transfer).real.numpy()
    images = images + noise * images.std() * generator.standard_normal(images.shape)
    return ParticleSet.from_array(
        images.astype(np.float32), PIXEL, rotation=rotation.astype(np.float32), shift=shift.astype(np.float32),
        ctf=table if with_ctf else None,
    )  # fmt: skip
