"""Shells of Fourier space: radial averages, Fourier shell correlation, resolution, area under the curve.

Shells are rings of width 1 centred on integer r (round(|k|) = r), r = 1 .. D/2, over the FULL sphere, signed real part.
RELION counts the plane kx = 0 twice and so differs by up to 0.011; `fsc_cryobench` has cryoDRGN's and CryoBench's
shells.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["shell_index", "radial_mean", "fsc", "fsc_cryobench", "resolution", "auc"]

_SLAB = 1 << 21  # points handled at once in the correlation sums: bounds the float64 temporaries


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def shell_index(box_size: int, ndim: int, device: torch.device | str = "cpu") -> Tensor:
    """round(|k|) on the full centred grid, int64 (D,) * ndim; corners go beyond D//2. Cached: do not write to it."""
    axis = torch.arange(-(box_size // 2), box_size - box_size // 2, device=device)
    squared = sum((axis * axis).reshape([-1 if i == d else 1 for i in range(ndim)]) for d in range(ndim))
    return squared.to(torch.float32 if ndim * (box_size // 2) ** 2 < 1 << 24 else torch.float64).sqrt().round().long()


def radial_mean(
    values: Tensor,  # (..., *index.shape), real
    index: Tensor,  # int64 of any shape
    n: int,
) -> Tensor:  # (..., n)
    """Mean of `values` over the points of each shell 0 .. n-1 (larger indices are left out; empty shells give 0)."""
    flat = index.reshape(-1)
    clipped = flat.clamp(max=n)
    counts = torch.bincount(clipped, minlength=n + 1)[:n].clamp(min=1)
    rows = values.reshape(-1, flat.numel())
    sums = torch.zeros(rows.shape[0], n + 1, dtype=torch.float64, device=values.device)
    sums = sums.index_add(1, clipped, rows.to(torch.float64))[:, :n]
    means = (sums / counts).to(values.dtype)
    return means.reshape(*values.shape[: values.ndim - index.ndim], n)


def fsc(
    a: Tensor,  # (..., D, D, D)
    b: Tensor,  # (..., D, D, D)
    mask: Tensor | None = None,  # (D, D, D), multiplied onto both maps
) -> Tensor:  # (..., D//2) float64, shells r = 1 .. D/2
    """Fourier shell correlation, signed: Re sum(A conj B) / sqrt(sum |A|^2 sum |B|^2) per shell.

    Leading dimensions broadcast. The transforms are taken in the maps' own precision, the sums in float64.
    A shell in which a map is empty gives 0.
    """
    D = _check_maps(a, b)
    return _map_pairs(a, b, mask, lambda u, v: _correlate(u, v, _half_shells(D, False, u.device), D // 2 + 1)[1:])


def fsc_cryobench(
    a: Tensor,  # (..., D, D, D)
    b: Tensor,  # (..., D, D, D)
    mask: Tensor | None = None,
) -> Tensor:  # (..., D//2) float64, index i is frequency i/D
    """The curve of cryoDRGN and CryoBench: value i = 1 .. D/2-1 holds i-1 <= |k| < i, value 0 is set to 1.

    Shell 1 is DC alone, Nyquist is left out. Signed here; CryoBench's tables use the absolute value.
    """
    D = _check_maps(a, b)

    def curve(u: Tensor, v: Tensor) -> Tensor:
        values = _correlate(u, v, _half_shells(D, True, u.device), D // 2 + 1)[: D // 2]
        values[0] = 1
        return values

    return _map_pairs(a, b, mask, curve)


def _check_maps(a: Tensor, b: Tensor) -> int:
    D = a.shape[-1]
    if a.shape[-3:] != (D, D, D) or b.shape[-3:] != (D, D, D):
        raise ValueError(f"two cubic maps of one size are needed, not {tuple(a.shape)} and {tuple(b.shape)}")
    return D


def _map_pairs(a: Tensor, b: Tensor, mask: Tensor | None, curve) -> Tensor:
    """Apply `curve` to each pair of maps over broadcast leading dimensions."""
    if a.ndim == 3 and b.ndim == 3:
        if mask is not None:
            a, b = a * mask, b * mask
        return curve(torch.fft.rfftn(a), torch.fft.rfftn(b))
    a, b = torch.broadcast_tensors(a, b)
    pairs = zip(a.reshape(-1, *a.shape[-3:]), b.reshape(-1, *b.shape[-3:]), strict=True)
    return torch.stack([_map_pairs(u, v, mask, curve) for u, v in pairs]).reshape(*a.shape[:-3], -1)


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)
def _half_shells(box_size: int, ceiling: bool, device: torch.device) -> Tensor:
    """Shell of each point of an uncentred rfftn grid (D, D, D//2+1), int64, clipped to D//2+1 = outside.

    ceiling False: round(|k|); True: floor(|k|) + 1 (i-1 <= |k| < i).
    """
    full = torch.fft.fftfreq(box_size, 1 / box_size, device=device).round()
    half = torch.arange(box_size // 2 + 1, device=device, dtype=full.dtype)
    radius = (full[:, None, None] ** 2 + full[None, :, None] ** 2 + half**2).sqrt_()
    radius = radius.floor_().add_(1) if ceiling else radius.round_()
    return radius.clamp_(max=box_size // 2 + 1).long().reshape(-1)


def _correlate(A: Tensor, B: Tensor, shells: Tensor, n: int) -> Tensor:
    """Correlation per shell 0 .. n-1 of two rfftn half transforms, each point weighted by how often it occurs."""
    D = A.shape[0]
    columns = A.shape[-1]
    weight = torch.full((columns,), 2.0, dtype=A.real.dtype, device=A.device)
    weight[0] = 1
    if D % 2 == 0:
        weight[-1] = 1
    sums = torch.zeros(3, n + 1, dtype=torch.float64, device=A.device)
    A, B = torch.view_as_real(A), torch.view_as_real(B)
    step = max(1, _SLAB // (D * columns))
    for start in range(0, D, step):
        u, v = A[start : start + step], B[start : start + step]
        where = shells[start * D * columns : (start + u.shape[0]) * D * columns]
        for row, (p, q) in enumerate(((u, v), (u, u), (v, v))):
            terms = (p * q).sum(-1).mul_(weight).reshape(-1)
            sums[row] += torch.bincount(where, weights=terms.double(), minlength=n + 1)
    cross, power_a, power_b = sums[:, :n]
    norm = (power_a * power_b).sqrt()
    return torch.where(norm > 0, cross / norm.clamp(min=torch.finfo(torch.float64).tiny), torch.zeros_like(cross))


def resolution(
    curve: Tensor,  # (D//2,) values at shells r = 1 .. D/2
    threshold: float,
    box_size: int,
    pixel_size: float,
) -> float:
    """Resolution in Angstrom at the FIRST crossing of the threshold, linearly interpolated in frequency.

    Nyquist (2 pixels) if the curve never falls below; the box length if it starts below.
    """
    values = [float(v) for v in curve]
    crossing = next((i for i, v in enumerate(values) if not v >= threshold), None)
    if crossing is None:
        return 2.0 * pixel_size
    if crossing == 0:
        return box_size * pixel_size
    high, low = values[crossing - 1], values[crossing]
    r = crossing + (high - threshold) / (high - low) if low == low else float(crossing)
    return box_size * pixel_size / r


def auc(
    curve: Tensor,  # (..., n)
    box_size: int,
) -> Tensor:  # (...)
    """Area under an FSC curve: raw trapezoid over cycles/pixel. At most (D/2 - 1)/D; never compare across box sizes."""
    return torch.trapezoid(curve, dx=1.0 / box_size, dim=-1)
