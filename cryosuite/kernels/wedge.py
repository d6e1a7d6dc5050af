"""The missing wedge of tomograms: which Fourier coefficients a tilt series measures, and keeping those.

The beam runs along z. With the tilt axis y a coefficient is measured iff the angle of (kx, kz), atan(kz / kx), lies in
the tilt range, whatever ky; with kx = 0 only at kz = 0. Frequencies are physical (cycles per A), so that boxes need
not be cubes nor voxels. Masks lie on the half grid of ``torch.fft.rfftn`` and are Friedel symmetric. A range of -60 to
60 degrees misses one third of a ball.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["wedge_mask", "data_consistency"]

DIMS = (-3, -2, -1)


def wedge_mask(
    shape: tuple[int, int, int],
    tilt_range: tuple[float | Tensor, float | Tensor] = (-60.0, 60.0),
    tilt_axis: str = "y",
    voxel_size: float | tuple[float, float, float] = 1.0,
    soft: float = 1.5,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # (..., z, y, x//2 + 1)
    """Weights in 0..1: 1 where the tilt series measures, 0 in the wedge, a cosine of ``soft`` degrees between.

    Args:
        shape: of the volume, z, y, x.
        tilt_range: smallest and largest tilt in degrees, -90 <= low < high <= 90; numbers, or tensors (...) for one
            mask per series.
        tilt_axis: "y", or "x" for the same with y in the place of x.
        voxel_size: A; one number or z, y, x.
        soft: width of the edge, degrees, centred on it; 0 for a sharp one (which includes the limits).

    Raises:
        ValueError: an unknown axis, or numbers that are no tilt range.
    """
    if tilt_axis not in ("x", "y"):
        raise ValueError(f"the tilt axis must be x or y, not {tilt_axis}")
    if not any(isinstance(t, Tensor) for t in tilt_range) and not -90 <= tilt_range[0] < tilt_range[1] <= 90:
        raise ValueError(f"a tilt range goes from -90 at least up to 90 at most, not {tilt_range}")
    low, high = (torch.as_tensor(t, dtype=torch.float64, device=device)[..., None, None] for t in tilt_range)
    voxels = (voxel_size,) * 3 if isinstance(voxel_size, (int, float)) else voxel_size
    kz = _axis(shape[0], voxels[0], False, device)
    across = _axis(shape[1], voxels[1], False, device) if tilt_axis == "x" else _axis(shape[2], voxels[2], True, device)
    # the Nyquist coefficient of an even axis stands for both signs: the mean of both keeps the mask Friedel symmetric
    flips = [
        (z, a) for z in _both_signs(kz, shape[0]) for a in _both_signs(across, shape[1 if tilt_axis == "x" else 2])
    ]
    plane = sum(_plane(z[:, None], a[None, :], low, high, soft) for z, a in flips) / len(flips)
    plane = plane.to(dtype)
    mask = plane[..., :, None] if tilt_axis == "x" else plane[..., :, None, :]
    return mask.expand(*mask.shape[:-3], shape[0], shape[1], shape[2] // 2 + 1)


def _axis(n: int, voxel: float, half: bool, device: torch.device | str) -> Tensor:
    make = torch.fft.rfftfreq if half else torch.fft.fftfreq
    return make(n, voxel, dtype=torch.float64, device=device)


def _both_signs(k: Tensor, n: int) -> list[Tensor]:
    if n % 2:
        return [k]
    flipped = k.clone()
    flipped[n // 2] *= -1
    return [k, flipped]


def _plane(kz: Tensor, across: Tensor, low: Tensor, high: Tensor, soft: float) -> Tensor:
    """The mask in the plane across the tilt axis, (..., z, across) float64."""
    angle = torch.rad2deg(torch.atan2(kz, across))
    middle, half = (low + high) / 2, (high - low) / 2
    # degrees inside the range; a line has no sign, so that angles repeat after 180
    inside = half - (torch.remainder(angle - middle + 90, 180) - 90).abs()
    inside = torch.where(half >= 90, torch.full_like(inside, 180), inside)
    if soft > 0:
        weight = 0.5 - 0.5 * torch.cos(math.pi * (inside / soft + 0.5).clamp(0, 1))
    else:
        weight = (inside >= -1e-9).to(inside.dtype)
    return torch.where((kz == 0) & (across == 0), torch.ones_like(weight), weight)


def data_consistency(
    measured: Tensor,  # (..., z, y, x)
    predicted: Tensor,  # (..., z, y, x)
    mask: Tensor,  # (..., z, y, x//2 + 1)
) -> Tensor:  # (..., z, y, x)
    """The prediction with what was measured put back: W F_measured + (1 - W) F_predicted."""
    kept, made = torch.fft.rfftn(measured, dim=DIMS), torch.fft.rfftn(predicted, dim=DIMS)
    return torch.fft.irfftn(made + (kept - made) * mask, s=measured.shape[-3:], dim=DIMS)
