"""Grey values of a map on the scale that the map networks see: 0 is solvent, 1 the densest per cent of the molecule.

Quantiles of the whole box depend on how much solvent is around the molecule (of a small protein in a large box all of
the molecule lies above the .99 quantile), so the default measures inside a mask found in the map itself. Rules, hi and
lo: "robust": median outside the mask, .99 quantile inside; "paper" (CryoLVM): .01 and .99 quantiles of the box;
"emready" (He et al. 2023): 0 and the .99999 quantile of the positive voxels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cryosuite.kernels.degrade import soft_lowpass
from cryosuite.kernels.fourier import resize_axis

__all__ = ["NORMS", "auto_mask", "grey_range", "occupied", "quantile", "to_unit"]

NORMS = ("robust", "paper", "emready")
LOWPASS = 8.0  # A, before the threshold; never finer than 4 voxels
DILATE = 3.0  # A
COARSE = 2.0  # A per voxel of the grid that the mask is found on
FEW = 0.05  # of the box: with less than this outside the mask, solvent is the median of the box
SAMPLE = 1 << 18  # voxels that the level of the solvent is measured on
SPREAD = 3.0  # standard deviations of what is below the threshold that must lie below it
MANY = 1 << 22  # voxels are enough for the median of the solvent
WEAK = 5.0  # standard deviations of the solvent above which there is something
ALONE = 7.0  # standard deviations of the solvent that nothing but a molecule reaches
FAINT = 0.05  # of the map's range: the same where the solvent is empty
MAD = 1.4826  # standard deviation of a normal distribution over its median absolute deviation


def auto_mask(
    volume: Tensor,  # (z, y, x)
    voxel_size: float,  # A
    contour: float | None = None,
) -> Tensor:  # (z, y, x) bool
    """Where the molecule is: the map low-passed to 8 A above Otsu's threshold, grown by 3 A.

    The threshold is raised until it lies three standard deviations above what is below it, since Otsu's cuts noise in
    two where the molecule is a small part of the box. With ``contour`` the mask is the map itself above that level,
    grown by 3 A. Found on a grid of about 2 A. All False for a constant map.
    """
    if contour is not None:
        small = F.adaptive_max_pool3d(volume[None].float(), _coarse(volume, voxel_size))[0]
        return _spread(small > contour, volume, voxel_size)
    small = _lowpassed(volume, voxel_size)
    return _spread(small > _threshold(small)[0], volume, voxel_size)


def occupied(
    volume: Tensor,  # (z, y, x)
    voxel_size: float,  # A
) -> Tensor:  # (z, y, x) bool
    """Where there is anything but plain solvent: weak parts of the molecule too, that ``auto_mask`` leaves out.

    The low-passed map above the solvent's median by five of its standard deviations and by 5 % of the map's range, but
    wherever ``auto_mask`` is True. All False where nothing lies seven standard deviations above: in noise alone about
    five are reached, in maps of molecules with solvent around them, twenty and more.
    """
    small = _lowpassed(volume, voxel_size)
    cut, middle, spread = _threshold(small)
    if not _ends(small)[1] > middle + ALONE * spread:
        return torch.zeros_like(volume, dtype=torch.bool)
    weak = max(middle + WEAK * spread, middle + FAINT * (_ends(small)[1] - middle))
    return _spread(small > min(cut, weak), volume, voxel_size)


def grey_range(
    volume: Tensor,  # (z, y, x)
    voxel_size: float,  # A
    norm: str = "robust",
    contour: float | None = None,
    mask: Tensor | None = None,  # (z, y, x) bool
) -> tuple[float, float]:
    """Grey values lo and hi that become 0 and 1; see the module's text.

    Args:
        contour: level of the mask of "robust". mask: that mask itself.

    Raises:
        ValueError: unknown rule, values that are not finite, or a constant map.
    """
    if norm not in NORMS:
        raise ValueError(f"grey values are scaled by one of {', '.join(NORMS)}, not {norm!r}")
    low, high = _ends(volume)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("the map has values that are not finite")
    if not high > low:
        raise ValueError(f"all values of the map are {low:g}")
    lo, hi = _range(volume, voxel_size, norm, contour, mask)
    if not hi > lo:  # inverted contrast, or hardly any voxel that differs
        lo, hi = (quantile(volume, q) for q in (0.01, 0.99))
    return (lo, hi) if hi > lo else (low, high)


def to_unit(volume: Tensor, lo: float, hi: float) -> Tensor:
    """(...) grey values on the scale lo -> 0, hi -> 1, clipped to [0, 1]."""
    return ((volume - lo) / (hi - lo)).clamp_(0, 1)


def quantile(values: Tensor, q: float) -> float:
    """A quantile (nearest rank) of any number of values; torch.quantile refuses maps of 256^3."""
    values = values.flatten()
    rank = round(q * (values.numel() - 1))
    if values.device.type == "cpu":  # five times as fast as torch's, with a fourth of its memory
        return float(np.partition(values.float().numpy(), rank)[rank])
    return float(torch.kthvalue(values, rank + 1).values)


def _range(
    volume: Tensor, voxel_size: float, norm: str, contour: float | None, mask: Tensor | None
) -> tuple[float, float]:
    if norm == "paper":
        return quantile(volume, 0.01), quantile(volume, 0.99)
    if norm == "emready":
        positive = volume[volume > 0]
        return 0.0, quantile(positive, 0.99999) if len(positive) else 0.0
    mask = auto_mask(volume, voxel_size, contour) if mask is None else mask
    inside = int(mask.sum())
    step = max(1, volume.numel() // MANY) | 1
    flat = volume.flatten()[::step]
    solvent = flat[~mask.flatten()[::step]]
    return quantile(solvent if len(solvent) >= FEW * len(flat) else flat, 0.5), quantile(
        volume[mask] if inside else volume, 0.99
    )


def _ends(values: Tensor) -> tuple[float, float]:
    return tuple(float(v) for v in torch.aminmax(values))


def _coarse(volume: Tensor, voxel_size: float) -> tuple[int, int, int]:
    """Shape of the grid that masks are found on."""
    return tuple(max(1, round(n * voxel_size / max(COARSE, voxel_size))) for n in volume.shape)


def _lowpassed(volume: Tensor, voxel_size: float) -> Tensor:
    """The map between 0 and 1 on the coarse grid, low-passed; zeros for a constant map."""
    small = volume.float()
    for dim, n in reversed(list(enumerate(_coarse(volume, voxel_size)))):
        small = resize_axis(small, n, dim)
    low, high = _ends(small)
    if not high > low:
        return torch.zeros_like(small)
    # near 0 .. 1: transforms of maps with a large constant would lose the map
    small = (small - low) / (high - low)
    return soft_lowpass(small[None], max(COARSE, voxel_size), max(LOWPASS, 4 * voxel_size))[0]


def _spread(inside: Tensor, volume: Tensor, voxel_size: float) -> Tensor:
    """A mask of the coarse grid grown by 3 A, at the voxels of the volume."""
    inside = _grown(inside, max(DILATE, voxel_size) / max(COARSE, voxel_size))
    for dim, (n, m) in enumerate(zip(volume.shape, inside.shape, strict=True)):
        nearest = (torch.arange(n, device=volume.device) * m / n).round().long().clamp(max=m - 1)
        inside = inside if n == m else inside.index_select(dim, nearest)
    return inside


def _threshold(values: Tensor) -> tuple[float, float, float]:
    """Otsu's threshold (1979), raised as ``auto_mask`` says; median and standard deviation of what is below it."""
    low, high = _ends(values)
    if not high > low:
        return high, high, 0.0
    counts = torch.histc(values, 512, low, high).double()
    centres = low + (torch.arange(512, dtype=torch.float64, device=values.device) + 0.5) * (high - low) / 512
    weight = counts.cumsum(0) / counts.sum()
    mean = (counts * centres).cumsum(0) / counts.sum()
    between = (mean[-1] * weight - mean).square() / (weight * (1 - weight)).clamp(min=1e-12)
    cut = float(centres[int(between.argmax())])
    step = max(1, values.numel() // SAMPLE) | 1  # odd: no plane of the box is met again and again
    some = values.flatten()[::step].sort().values
    middle, spread = cut, 0.0
    for _ in range(20):
        below = some[: int(torch.searchsorted(some, cut, right=True))]
        if not len(below):
            break
        middle = float(below.median())
        spread = MAD * float((below - middle).abs().median())
        raised = middle + SPREAD * spread
        if raised <= cut or raised >= high:
            break
        cut = raised
    return cut, middle, spread


def _grown(inside: Tensor, radius: float) -> Tensor:
    """A bool volume grown by a ball of ``radius`` voxels."""
    reach = int(radius + 1e-6)
    axis = torch.arange(-reach, reach + 1, device=inside.device)
    square = axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2
    ball = (square <= radius**2 + 1e-6).float()
    return F.conv3d(inside[None, None].float(), ball[None, None], padding=reach)[0, 0] > 0.5
