"""Correlation of a map with a model, in real space over voxels and in Fourier space over shells.

Grids may have any shape and voxel sizes. Afonine et al., Acta Cryst. D 74, 814 (2018) for the names.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cryosuite.errors import InputError
from cryosuite.metrics.model_map import frequency_squared

D_MIN = np.concatenate([np.arange(17, 30), np.arange(30, 60), np.arange(60, 106), np.arange(115, 205, 10)]) / 10.0
B_RANGE = np.arange(-500.0, 501.0, 10.0)  # A^2
BINS = 4096  # of spatial frequency, for curves that are cut anywhere
SAME = 0.99  # correlation of a map with itself, cut at d99


def correlation(a: np.ndarray, b: np.ndarray, where: np.ndarray | None = None) -> float:
    """Pearson correlation of two maps, over all voxels or those of a bool mask; NaN when one is constant there."""
    if where is not None:
        a, b = a[where], b[where]
    a, b = (x.ravel().astype(np.float64) for x in (a, b))
    for x in (a, b) if len(a) else ():
        x -= x.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else float("nan")


@dataclass(frozen=True)
class RealSpace:
    """Correlations of a map with a calculated one.

    Attributes:
        box: over all voxels: zeroing the solvent alone raises it, so never read it without ``mask``.
        mask: over the ``voxels`` of the model's mask.
        volume: over as many voxels, those of highest calculated density.
        peaks: over the union of as many highest voxels of each of the two maps.
    """

    box: float
    mask: float
    volume: float
    peaks: float
    voxels: int


def real_space(observed: np.ndarray, calculated: np.ndarray, mask: np.ndarray) -> RealSpace:
    """CC_box, CC_mask, CC_volume and CC_peaks of maps (z, y, x), with the bool mask that says where the model is.

    Raises:
        InputError: the mask is empty.
    """
    n = int(mask.sum())
    if not n:
        raise InputError("no voxel of the map lies in the model's mask: the voxels are larger than the model")
    strong, high = highest(calculated, n), highest(observed, n)
    return RealSpace(
        correlation(observed, calculated),
        correlation(observed, calculated, mask),
        correlation(observed, calculated, strong),
        correlation(observed, calculated, strong | high),
        n,
    )


def highest(values: np.ndarray, n: int) -> np.ndarray:
    """Bool mask of the n highest values; fewer where several equal the last of them, such as a solvent of zeros."""
    n = min(max(n, 1), values.size)
    level = np.partition(values, values.size - n, axis=None)[values.size - n]
    chosen = values >= level
    return chosen if int(chosen.sum()) <= n else values > level


@dataclass(frozen=True)
class Shells:
    """An FSC curve: shell i (1 ..) has the spatial frequency i / ``length`` (1/A); ``nyquist`` is the limit in A."""

    fsc: np.ndarray
    length: float
    nyquist: float

    @property
    def frequency(self) -> np.ndarray:
        """Spatial frequency of each shell, 1/A."""
        return np.arange(1, len(self.fsc) + 1) / self.length

    def resolution(self, threshold: float) -> float:
        """A at the first crossing, linearly interpolated in frequency.

        Nyquist where it never falls below, the length of the box where it starts below.
        """
        below = np.flatnonzero(~(self.fsc >= threshold))
        if not len(below):
            return self.nyquist
        at = int(below[0])
        if at == 0:
            return self.length
        high, low = self.fsc[at - 1], self.fsc[at]
        return float(self.length / (at + (high - threshold) / (high - low)))


def shell_correlation(a: np.ndarray, b: np.ndarray, voxel: tuple[float, float, float]) -> Shells:
    """FSC of two maps (z, y, x) of any shape with voxels (x, y, z) in A: signed, full sphere, up to Nyquist.

    Shells have the width of the finest sampled frequency (1 / longest side) and are centred on its multiples; on a
    cubic map they are those of ``kernels.shells.fsc``.
    """
    length = max(n * size for n, size in zip(a.shape, voxel[::-1], strict=True))
    nyquist = 2.0 * max(voxel)
    n = int(length / nyquist + 1e-6)
    shell = (frequency_squared(a.shape, voxel).double().sqrt() * length).round().long().clamp_(max=n + 1)
    cross, power_a, power_b = _sums(a, b, shell, n + 2)
    norm = np.sqrt(power_a * power_b)
    fsc = np.where(norm > 0, cross / np.maximum(norm, 1e-300), 0.0)
    return Shells(fsc[1 : n + 1], length, nyquist)


def d_model(observed: np.ndarray, calculated: np.ndarray, voxel: tuple[float, float, float]) -> tuple[float, float]:
    """The resolution and B factor (A, A^2) at which a model's map is most like the observed one.

    The correlation of the whole observed map with the calculated one (atoms with B = 0) times exp(-B s^2 / 4), cut at
    d_min, is maximal; over d_min the curve of best correlations is smoothed by three points.
    """
    square, cross, _, power = _binned(observed, calculated, voxel)
    damped = np.exp(-B_RANGE[:, None] * square / 4.0)
    damped /= damped.max(1, keepdims=True)  # the correlation knows no scale: keep negative B from overflowing
    nyquist = 2.0 * max(voxel)
    limits = np.unique(np.maximum(D_MIN, nyquist))  # nothing lies beyond Nyquist
    last = np.searchsorted(np.sqrt(square), 1.0 / limits, side="right") - 1
    above = np.cumsum(cross * damped, 1)[:, last]
    below = np.cumsum(power * damped**2, 1)[:, last]
    score = np.where(below > 0, above / np.sqrt(np.maximum(below, 1e-300)), -np.inf)  # (B, d)
    best = score.max(0)
    smooth = np.convolve(np.pad(best, 1, mode="edge"), np.full(3, 1 / 3), "valid")
    at = int(smooth.argmax())
    return float(limits[at]), float(B_RANGE[score[:, at].argmax()])


def d99(observed: np.ndarray, voxel: tuple[float, float, float]) -> float:
    """The resolution (A) at which a map may be cut and still correlate by .99 with itself: finer detail is weak."""
    square, _, power, _ = _binned(observed, observed, voxel)
    kept = np.sqrt(np.cumsum(power) / max(power.sum(), 1e-300))
    at = int(np.searchsorted(kept, SAME))
    return float(1.0 / np.sqrt(square[min(at, len(square) - 1)]))


def _binned(
    a: np.ndarray, b: np.ndarray, voxel: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """1/d^2 at the end of fine bins of frequency (without 0), and sums over them: cross, power of a, power of b."""
    frequency = frequency_squared(a.shape, voxel).double().sqrt()
    width = float(frequency.max()) / BINS
    bins = (frequency / width).ceil().long().clamp_(max=BINS)
    sums = _sums(a, b, bins, BINS + 1)
    edge = np.arange(1, BINS + 1) * width
    return edge**2, *(one[1:] for one in sums)


def _sums(a: np.ndarray, b: np.ndarray, index: torch.Tensor, n: int) -> list[np.ndarray]:
    """Sums over the full transforms of a and b by the index of the half transform: Re A B*, |A|^2, |B|^2 (n,)."""
    A, B = (torch.fft.rfftn(torch.from_numpy(np.ascontiguousarray(x))) for x in (a, b))
    columns = A.shape[-1]
    weight = torch.full((columns,), 2.0, dtype=torch.float64)
    weight[0] = 1.0
    if a.shape[-1] % 2 == 0:
        weight[-1] = 1.0
    flat = index.reshape(-1)
    pairs = ((A, B), (A, A), (B, B))
    return [
        torch.bincount(flat, ((p * q.conj()).real.double() * weight).reshape(-1), minlength=n)[:n].numpy()
        for p, q in pairs
    ]
