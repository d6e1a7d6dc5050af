"""The half ball of frequencies on which a network is evaluated for a volume, and the volume made of its values."""

from __future__ import annotations

import torch
from torch import Tensor

from .fourier import ifft3c

__all__ = ["half_ball", "volume_of_half_ball", "zero_background"]


def half_ball(box_size: int) -> Tensor:
    """Integer frequencies (n, 3) = (kx, ky, kz), 0 < |k| <= D/2, one of each Friedel pair."""
    r = box_size // 2
    axis = torch.arange(-r, r + 1)
    z, y, x = torch.meshgrid(torch.arange(0, r + 1), axis, axis, indexing="ij")
    keep = (x * x + y * y + z * z <= r * r) & ((z > 0) | (y > 0) | ((y == 0) & (x > 0)))
    return torch.stack([x[keep], y[keep], z[keep]], dim=1)


def volume_of_half_ball(
    values: Tensor,  # (n,) complex, at the frequencies `xyz`
    xyz: Tensor,  # (n, 3) of `half_ball`
    box_size: int,
) -> Tensor:  # (D, D, D) real
    """The real volume with these coefficients, its background at zero."""
    D = box_size
    grid = torch.zeros(D, D, D, dtype=values.dtype, device=values.device)
    for sign, part in ((-1, values.conj()), (1, values)):
        x, y, z = torch.remainder(sign * xyz + D // 2, D).unbind(1)
        grid[z, y, x] = part
    return zero_background(ifft3c(grid).real)


def zero_background(volume: Tensor) -> Tensor:  # (D, D, D) -> (D, D, D)
    """Shift the grey values so that the corners of the box (outside the inscribed sphere) have mean zero."""
    D = volume.shape[-1]
    axis = (torch.arange(D, device=volume.device) - D // 2).float().square()
    outside = (axis[:, None, None] + axis[None, :, None] + axis) > (D / 2) ** 2
    return volume - volume[outside].mean()
