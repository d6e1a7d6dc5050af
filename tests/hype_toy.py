"""Small particle sets made from voxel volumes, for the tests of train-hype."""

from __future__ import annotations

import numpy as np
import torch

from cryosuite.data.particles import ParticleSet
from cryosuite.kernels import ctf, fourier, rotations
from cryosuite.kernels.slices import extract_slices, volume_transform


def blobs(box_size: int, seed: int, count: int = 6) -> torch.Tensor:
    """A volume of a few Gaussian blobs around the centre, (D, D, D)."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(box_size) - box_size // 2.0
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    volume = torch.zeros(box_size, box_size, box_size)
    for cx, cy, cz in ((torch.rand(count, 3, generator=generator) - 0.5) * box_size * 0.45).tolist():
        volume += torch.exp(-((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2) / (2 * (box_size / 20) ** 2))
    return volume


def blob_particles(
    volumes: list[torch.Tensor], n: int, noise: float = 0.0, seed: int = 0, shift: float = 0.05
) -> tuple[ParticleSet, np.ndarray]:
    """n CTF-filtered, shifted projections of the volumes in turn (and their labels), with white noise on top.

    Images are scaled to a mean variance of one before the noise.
    """
    D = volumes[0].shape[-1]
    generator = torch.Generator().manual_seed(seed)
    rotation = rotations.random_rotations(n, generator=generator, dtype=torch.float32)
    t = (torch.rand(n, 2, generator=generator) - 0.5) * 2 * shift
    table = torch.zeros(n, 9)
    table[:, 0], table[:, 1] = D, 6.0
    table[:, 2] = 8000 + 10000 * torch.rand(n, generator=generator)
    table[:, 3] = table[:, 2] - 300
    table[:, 5], table[:, 6], table[:, 7] = 300, 2.7, 0.1
    labels = np.arange(n) % len(volumes)
    disc = fourier.half_disc(D)
    transforms = volume_transform(torch.stack(volumes))
    slices = extract_slices(transforms, rotation, disc, volume_index=torch.from_numpy(labels))
    slices = slices * ctf.ctf(disc.frequency, ctf.CtfParams.from_table(table))
    images = fourier.from_half_disc(fourier.phase_shift(slices, disc, -t), disc)
    images = images / images.std()
    images = images + noise * torch.randn(images.shape, generator=generator)
    spectrum = np.full((1, D // 2 + 1), max(noise, 0.05) ** 2 * D * D, np.float32)
    particles = ParticleSet.from_array(
        images.numpy(), 6.0, rotation=rotation.numpy(), shift=t.numpy(), ctf=table.numpy(), noise=spectrum
    )
    return particles, labels
