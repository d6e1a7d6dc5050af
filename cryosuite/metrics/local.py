"""FSC with the truth in small windows: what a moving domain does to a map is lost in one global curve."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from cryosuite.errors import InputError
from cryosuite.metrics.shape import FRACTION

WINDOW = 25.0  # A, diameter at half height
SMALLEST = 4  # px: below this a window holds too few shells
VOXELS = 1 << 22  # cut out at a time


@dataclass
class LocalScores:
    """FSC of a map with its truth around points of the truth.

    Attributes:
        centres: (n, 3) int64 z, y, x of the windows.
        curves: (n, B/2) signed FSC, shells 1 .. B/2 of the cut-out boxes of B voxels.
        box_size: B. pixel_size: A. window: diameter, A.
    """

    centres: np.ndarray
    curves: np.ndarray
    box_size: int
    pixel_size: float
    window: float

    def auc(self) -> np.ndarray:
        """Area under each curve as a share of its maximum, (n,)."""
        return np.trapezoid(self.curves, axis=1) / (self.curves.shape[1] - 1)

    def resolution(self, threshold: float = 0.5) -> np.ndarray:
        """First crossing of the threshold per window, linearly interpolated, A, (n,); Nyquist where it never falls."""
        below = self.curves < threshold
        first = np.where(below.any(1), below.argmax(1), self.curves.shape[1])
        each = np.arange(len(first))
        high = self.curves[each, np.maximum(first - 1, 0)]
        low = self.curves[each, np.minimum(first, below.shape[1] - 1)]
        shell = first + np.where(first > 0, (high - threshold) / np.maximum(high - low, 1e-12), 1.0)
        shell = np.where(below.any(1), shell, self.curves.shape[1])
        return self.box_size * self.pixel_size / np.maximum(shell, 1.0)

    def summary(self) -> dict[str, float]:
        """Median and 10th percentile of the local AUC, median and 90th percentile of the resolution at 0.5 (A)."""
        auc, resolution = self.auc(), self.resolution()
        return {
            "local_auc_median": float(np.median(auc)),
            "local_auc_p10": float(np.percentile(auc, 10)),
            "local_resolution_median_A": float(np.median(resolution)),
            "local_resolution_p90_A": float(np.percentile(resolution, 90)),
        }


def local_fsc(
    volume: torch.Tensor,  # (z, y, x)
    truth: torch.Tensor,  # (z, y, x)
    pixel_size: float,
    window: float = WINDOW,
    centres: np.ndarray | None = None,  # (n, 3) int64 z, y, x
) -> LocalScores:
    """FSC in soft spheres of ``window`` A about ``centres``, or half a window apart wherever the truth has density.

    Density: above a tenth of the truth's 99.9th percentile. A window weighs 1 inside, falls as a cosine and is 1/2 at
    its radius; it is cut out with a margin (twice the diameter), which samples its curve more finely.

    Raises:
        InputError: the boxes differ, or the truth is empty.
    """
    if volume.shape != truth.shape:
        raise InputError(f"a map of {tuple(volume.shape)} cannot be compared with a truth of {tuple(truth.shape)}")
    pixels = max(window / pixel_size, SMALLEST)
    box = min(2 * int(np.ceil(pixels)), min(truth.shape) // 2 * 2)
    if centres is None:
        centres = _centres(truth, max(1, int(round(pixels / 2))))
    if not len(centres):
        raise InputError("the true map is empty: there is nothing to compare with")
    weight, shells = _window(box, pixels), _shells(box)
    curves = []
    for part in torch.from_numpy(centres).split(max(1, VOXELS // box**3)):
        a, b = (torch.fft.rfftn(cut * weight, dim=(1, 2, 3)) for cut in _cut((volume, truth), part, box))
        curves.append(_curves(a.flatten(1), b.flatten(1), *shells))
    return LocalScores(centres, torch.cat(curves).numpy(), box, float(pixel_size), pixels * pixel_size)


def _centres(truth: torch.Tensor, step: int) -> np.ndarray:
    """Points of a grid of ``step`` voxels that lie in the truth's density: (n, 3) z, y, x."""
    volume = truth.numpy()
    start = [(n // 2) % step for n in volume.shape]
    grid = volume[tuple(slice(first, None, step) for first in start)]
    return np.argwhere(grid > FRACTION * max(np.percentile(volume, 99.9), 1e-30)) * step + start


def _window(box: int, pixels: float) -> torch.Tensor:
    """Soft sphere (B, B, B) about voxel B//2: 1/2 at half ``pixels``, cosine edge half a radius wide each way."""
    axis = (torch.arange(box) - box // 2).float()
    radius = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt() / (pixels / 2)
    return 0.5 + 0.5 * torch.cos(torch.pi * (radius - 0.5).clamp(0, 1))


def _cut(volumes: tuple[torch.Tensor, ...], centres: torch.Tensor, box: int) -> Iterator[torch.Tensor]:
    """Boxes (b, B, B, B) about the centres of each volume; beyond an edge the other side comes in."""
    size = torch.tensor(volumes[0].shape).view(3, 1)
    at = (centres[:, :, None] + torch.arange(box) - box // 2) % size  # (b, 3, B)
    for volume in volumes:
        yield volume[at[:, 0, :, None, None], at[:, 1, None, :, None], at[:, 2, None, None, :]]


def _shells(box: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each point of the half transform (B * B * (B//2 + 1),): its shell, those beyond B/2 as B/2 + 1, and weight."""
    full, half = torch.fft.fftfreq(box, 1 / box), torch.arange(box // 2 + 1)
    radius = (full[:, None, None] ** 2 + full[:, None] ** 2 + half**2).sqrt().round().long()
    weight = torch.full((box // 2 + 1,), 2.0, dtype=torch.float64)
    weight[0] = weight[-1] = 1.0
    return radius.clamp_(max=box // 2 + 1).reshape(-1), weight.expand(radius.shape).reshape(-1)


def _curves(a: torch.Tensor, b: torch.Tensor, shell: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """FSC (b, B//2) float64 of half transforms (b, P), with the shell and weight of each point (P,)."""
    last = int(shell.max())

    def summed(values: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(len(values), last + 1, dtype=torch.float64)
        return sums.index_add_(1, shell, values.double() * weight)[:, 1:last]

    cross, own, other = (summed(x) for x in ((a * b.conj()).real, a.abs() ** 2, b.abs() ** 2))
    norm = (own * other).sqrt()
    return torch.where(norm > 0, cross / norm.clamp_min(1e-300), torch.zeros_like(cross))


def grid_centres(where: np.ndarray, step: int, most: int = 4000) -> np.ndarray:
    """Points (n, 3) z y x of a grid of ``step`` voxels inside a bool mask; the step grows until they are few enough."""
    while True:
        start = [(n // 2) % step for n in where.shape]
        found = np.argwhere(where[tuple(slice(first, None, step) for first in start)]) * step + start
        if len(found) <= most:
            return found
        step += 1


def spread(scores: LocalScores, values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Values (n,) at the windows' centres carried to every voxel of a bool mask, (z, y, x) float32, 0 elsewhere.

    Each voxel takes the mean of its four nearest centres, weighted by one over the squared distance.
    """
    from scipy.spatial import cKDTree

    k = min(4, len(values))
    out = np.zeros(where.shape, np.float32)
    voxels = np.argwhere(where)
    distance, index = cKDTree(scores.centres).query(voxels, k=k)
    weight = 1.0 / np.maximum(distance.reshape(len(voxels), k), 0.5) ** 2
    out[where] = (weight * values[index.reshape(len(voxels), k)]).sum(1) / weight.sum(1)
    return out
