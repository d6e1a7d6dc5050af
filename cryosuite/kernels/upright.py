"""Particle images turned upright by their known in-plane angle, so that an encoder need not learn it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["turn"]


def turn(image: Tensor, rotation: Tensor) -> Tensor:  # (b, S, S), (b, 3, 3) -> (b, S, S)
    """Images as they would look at psi = 0 and from the upper hemisphere: bilinear, about pixel S//2.

    With RELION's ZYZ angles R = Rz(psi) Ry(tilt) Rz(rot), psi = atan2(R[1, 2], -R[0, 2]). Seen from the opposite
    direction a particle gives the mirror image (y -> -y at psi = 0), so views with R[2, 2] < 0 are mirrored: the
    encoder has half of the directions and no in-plane angle to learn.
    """
    size = image.shape[-1]
    psi = torch.atan2(rotation[:, 1, 2], -rotation[:, 0, 2])
    cos, sin = psi.cos()[:, None, None], psi.sin()[:, None, None]
    mirror = torch.where(rotation[:, 2, 2] < 0, -1.0, 1.0)[:, None, None]
    axis = torch.arange(size, device=image.device, dtype=image.dtype) - size // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    y = y * mirror
    grid = torch.stack([cos * x + sin * y, cos * y - sin * x], dim=-1) + size // 2
    grid = (grid + 0.5) * (2 / size) - 1
    return F.grid_sample(image[:, None], grid, align_corners=False)[:, 0]
