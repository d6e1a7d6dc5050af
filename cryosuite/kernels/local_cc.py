"""Correlation of two maps in small windows: where one still follows the other, and where it goes its own way."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["local_correlation"]

SLAB = 1 << 23  # voxels at a time
FLAT = 1e-4  # windows whose standard deviation is below this share of the map's are flat


def local_correlation(
    a: Tensor,  # (z, y, x)
    b: Tensor,  # (z, y, x)
    width: int | tuple[int, int, int],  # voxels, one or z y x
) -> Tensor:  # (z, y, x) float32
    """Pearson correlation in a box about every voxel, -1 to 1; 0 where either map is flat.

    Args:
        width: edge of the box, made odd; boxes are cut off at the faces of the maps.

    Raises ValueError for maps of different shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"maps of {tuple(a.shape)} and {tuple(b.shape)} cannot be compared")
    reach = [w // 2 for w in ((width,) * 3 if isinstance(width, int) else width)]
    # sums of squares lose digits where the mean is large; windows' means are taken off what is centred already
    middle = [float(x.mean(dtype=torch.float64)) for x in (a, b)]
    floor = [(FLAT * float(x.std())) ** 2 for x in (a, b)]
    out = torch.empty(a.shape, device=a.device)
    step = max(1, SLAB // max(1, a[0].numel()))
    for start in range(0, len(a), step):
        end = min(len(a), start + step)
        low, high = max(0, start - reach[0]), min(len(a), end + reach[0])
        x, y = (one[low:high].float() - mean for one, mean in zip((a, b), middle, strict=True))
        mx, my = _mean(x, reach), _mean(y, reach)
        vx, vy = _mean(x * x, reach).sub_(mx * mx), _mean(y * y, reach).sub_(my * my)
        found = _mean(x * y, reach).sub_(mx * my)
        flat = (vx <= floor[0]) | (vy <= floor[1])
        found = found / (vx.clamp(min=floor[0]) * vy.clamp(min=floor[1])).sqrt().clamp(min=1e-30)
        out[start:end] = found.clamp(-1, 1).masked_fill(flat, 0)[start - low : end - low]
    return out


def _mean(x: Tensor, reach: list[int]) -> Tensor:
    """Mean over a box of 2 reach + 1 voxels per axis, of those inside the map: differences of running sums."""
    for dim, r in enumerate(reach):
        n = x.shape[dim]
        place = torch.arange(n, device=x.device)
        first, end = (place - r).clamp(min=0), (place + r + 1).clamp(max=n)
        running = F.pad(x.double().cumsum(dim), [0, 0] * (2 - dim) + [1, 0])
        count = (end - first).view([-1 if i == dim else 1 for i in range(3)])
        x = ((running.index_select(dim, end) - running.index_select(dim, first)) / count).float()
    return x
