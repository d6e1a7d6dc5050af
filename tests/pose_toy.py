"""A cloud of Gaussians whose transform is known exactly, as a source of slices and as images, for pose search."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cryosuite.kernels import fourier
from cryosuite.kernels.ctf import CtfParams, ctf
from cryosuite.kernels.pose_search import PointSource
from cryosuite.kernels.rotations import random_rotations

F64 = torch.float64


@dataclass
class Cloud:
    """Gaussians at `centres` (n, 3) px with `weights` (n,) and standard deviation `sigma` px in a box."""

    centres: Tensor
    weights: Tensor
    sigma: float
    box_size: int

    def values(self, q: Tensor) -> Tensor:
        """Transform at q (..., 3) cycles per pixel."""
        phase = torch.exp(-2j * math.pi * (q @ self.centres.to(q.dtype).T))
        envelope = torch.exp(-2 * (math.pi * self.sigma) ** 2 * q.square().sum(-1))
        return (phase * self.weights.to(q.dtype)).sum(-1) * envelope

    def source(self, shared: bool = True) -> PointSource:
        """As a source of slices; `shared`: one volume for all particles."""
        return PointSource(lambda q, index: self.values(q), self.box_size, (lambda index: None) if shared else None)

    def volume(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(D, D, D) voxels."""
        axis = torch.arange(self.box_size, dtype=F64) - self.box_size // 2
        x, y, z = (torch.exp(-((axis - c[:, None]) ** 2) / (2 * self.sigma**2)) for c in self.centres.T)
        norm = (2 * math.pi * self.sigma**2) ** 1.5
        return (torch.einsum("n,nz,ny,nx->zyx", self.weights, z, y, x) / norm).to(dtype)


def cloud(box_size: int, n: int = 14, seed: int = 0, sigma: float = 1.3, spread: float = 0.3) -> Cloud:
    """A random cloud within `spread` of the box around the origin."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(n, 3, generator=generator, dtype=F64), dim=1)
    radius = torch.rand(n, 1, generator=generator, dtype=F64) ** (1 / 3) * spread * box_size
    return Cloud(direction * radius, 0.5 + torch.rand(n, generator=generator, dtype=F64), sigma, box_size)


@dataclass
class Shots:
    """Whitened half transforms of images of a cloud with their truth."""

    images: Tensor  # (b, P) complex
    ctf: Tensor  # (b, P)
    rotation: Tensor  # (b, 3, 3)
    shift: Tensor  # (b, 2) px
    index: Tensor  # (b,)


def ctf_rows(count: int, generator: torch.Generator, astigmatism: float = 4000.0) -> CtfParams:
    """Strongly astigmatic CTFs for pixels of 4 A."""
    mean = 10000 + 8000 * torch.rand(count, generator=generator, dtype=F64)
    angle = 180 * torch.rand(count, generator=generator, dtype=F64)
    full = [torch.full((count,), value, dtype=F64) for value in (300.0, 2.7, 0.1, 0.0, 4.0)]
    return CtfParams(mean + astigmatism / 2, mean - astigmatism / 2, angle, *full)


def shoot(
    thing: Cloud, count: int, snr: float = 0.3, seed: int = 0, shift_sd: float = 0.7,
    dtype: torch.dtype = torch.float32, place: Tensor | None = None,
) -> Shots:  # fmt: skip
    """Images at random poses; `snr` is the mean power of signal over noise within the half disc.

    `place`: (count, 2, 2), where points of the images lie, as MagnifiedSource has it.
    """
    generator = torch.Generator().manual_seed(seed)
    disc = fourier.half_disc(thing.box_size)
    rotation = random_rotations(count, generator, dtype=F64)
    shift = torch.randn(count, 2, generator=generator, dtype=F64) * shift_sd
    transfer = ctf(disc.frequency_as(F64), ctf_rows(count, generator))
    rows = rotation[:, :2] if place is None else place.to(F64) @ rotation[:, :2]
    clean = transfer * thing.values(disc.frequency_as(F64) @ rows)
    # the particle lies at minus the shift that centres it
    clean = fourier.phase_shift(clean, disc, -shift / thing.box_size)
    scale = 1 / float((clean.abs().square().mean() / snr).sqrt())
    noise = torch.randn(*clean.shape, 2, generator=generator, dtype=F64) / math.sqrt(2)
    images = (clean * scale + torch.view_as_complex(noise)).to(torch.complex64 if dtype == torch.float32 else None)
    index = torch.arange(count)
    return Shots(images, (transfer * scale).to(dtype), rotation.to(dtype), shift.to(dtype), index)
