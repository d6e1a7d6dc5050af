"""Hand-made map networks whose results are known, and maps to run them on."""

from __future__ import annotations

import numpy as np
import torch
from map_toy import toy_atoms
from torch import nn
from torch.nn import functional as F

from cryosuite.data.map_grid import MapGrid
from cryosuite.data.map_weights import VOXELS, MapWeights
from cryosuite.formats.mrc import Map
from cryosuite.kernels.density import molmap


class Same(nn.Module):
    """The identity."""

    def forward(self, x):
        return x


class Nothing(nn.Module):
    """A map of zeros."""

    def forward(self, x):
        return torch.zeros_like(x)


class Blur(nn.Module):
    """A convolution: equal along all axes, or with random numbers that no rotation leaves alone."""

    def __init__(self, even: bool = True) -> None:
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = line[:, None, None] * line[:, None] * line
        if not even:
            kernel = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(0))
            kernel = kernel / kernel.sum()
        self.register_buffer("kernel", kernel[None, None])

    def forward(self, x):
        return F.conv3d(F.pad(x, (1,) * 6, mode="replicate"), self.kernel)


def weights(
    net: nn.Module, task: str = "sharpen", norm: str = "robust", voxel: float | None = None, spectrum: str = "as-is"
) -> MapWeights:
    return MapWeights(net.eval(), task, voxel or VOXELS[task], norm, {}, spectrum)


def toy_map(
    shape=(60, 52, 66), voxel=(1.0, 1.0, 1.0), noise: float = 0.02, resolution: float = 4.0, seed: int = 0
) -> MapGrid:
    """A map of the toy protein in the middle of a box, z y x voxels of x y z A, in noise relative to its maximum."""
    atoms = toy_atoms(200)
    origin = tuple(float(c - n * v / 2) for c, n, v in zip(atoms.xyz.mean(0), shape[::-1], voxel, strict=True))
    points = torch.from_numpy(atoms.xyz).float()
    number = torch.from_numpy(atoms.atomic_number).float()
    data = molmap(points, number, shape, origin, voxel, 0.225 * resolution).numpy()
    data = data + noise * data.max() * np.random.default_rng(seed).normal(size=shape)
    data = data.astype(np.float32)
    return MapGrid(data, voxel, origin, Map(data, voxel[0], path="toy.mrc"))


def correlation(a, b) -> float:
    return float(np.corrcoef(np.asarray(a).ravel(), np.asarray(b).ravel())[0, 1])


def apply_wedge(volumes: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Volumes (..., z, y, x) with their coefficients multiplied by a mask of the half grid."""
    dims = (-3, -2, -1)
    return torch.fft.irfftn(torch.fft.rfftn(volumes, dim=dims) * mask, s=volumes.shape[-3:], dim=dims)
