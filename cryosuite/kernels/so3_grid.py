"""Nested grids of SO(3): HEALPix directions times in-plane angles along the Hopf fibration, and their children.

Order r has 12 * 4^r directions n (HEALPix, nested; Gorski et al. 2005) and 6 * 2^r in-plane angles psi, cell-centred,
spaced 60 / 2^r degrees: 4,608 rotations 15 degrees apart at r = 2 (Yershova et al. 2010). Grid point
`s * n_psi + m` is `R = Rz(psi_m) @ R0(n_s)`, with R0 the smallest rotation whose viewing axis (third row) is n_s. The
in-plane angle acts on the image side, so psi + 180 degrees conjugates the slice: half of the grid gives all slices.

Every point has 8 children on the next order: the 4 nested sub-pixels of its direction, and on each fibre the two
angles nearest to it. The closest psi moves along with the pixel by a fixed angle, so children are integer arithmetic
and no point is left without a parent or has two (the usual rule, "the 8 nearest of 16", loses points near n = -z,
where the fibration turns fast).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .rotations import euler_to_matrix

__all__ = [
    "n_directions",
    "n_in_plane",
    "n_rotations",
    "spacing_deg",
    "view_frames",
    "grid_rotations",
    "rotations_at",
    "children",
    "children_at",
    "MAX_ORDER",
]

MAX_ORDER = 8  # 786,432 directions, 0.23 degrees; the tables of higher orders would not be small
_TABLE_ORDER = 4  # the largest order whose rotations or children are handed out as one tensor


def n_directions(order: int) -> int:
    """Viewing directions of an order: 12 * 4^order. Raises ValueError outside 0 .. MAX_ORDER."""
    if not 0 <= order <= MAX_ORDER:
        raise ValueError(f"the order of the rotation grid must lie between 0 and {MAX_ORDER}, not {order}")
    return 12 * 4**order


def n_in_plane(order: int) -> int:
    """In-plane angles of an order: 6 * 2^order."""
    return 6 * 2**order


def n_rotations(order: int) -> int:
    """Points of the grid: 576, 4608, 36864, 294912 at order 1 .. 4 (72 at order 0)."""
    return n_directions(order) * n_in_plane(order)


def spacing_deg(order: int) -> float:
    """Angular step of an order in degrees: 60 / 2^order (15 at order 2, 0.94 at order 6)."""
    n_directions(order)
    return 60.0 / 2**order


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def view_frames(
    order: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:  # (n_directions, 3, 3)
    """R0(n) of every direction, nested order. Cached and shared: do not write to it."""
    return _frames(order).to(dtype=dtype, device=device)


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)
def _frames(order: int) -> Tensor:
    import healpy
    import numpy as np

    tilt, rot = healpy.pix2ang(2**order, np.arange(n_directions(order)), nest=True)
    tilt, rot = torch.from_numpy(np.rad2deg(tilt)), torch.from_numpy(np.rad2deg(rot))
    return euler_to_matrix(torch.stack([rot, tilt, -rot], -1))  # turning back by rot leaves no twist


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def grid_rotations(
    order: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:  # (n_rotations, 3, 3)
    """All rotations of an order up to 4, directions slowest. Cached and shared: do not write to it.

    Raises ValueError above order 4 (2.4 million matrices): use `rotations_at`.
    """
    if order > _TABLE_ORDER:
        raise ValueError(f"order {order} has {n_rotations(order)} rotations: ask for some of them by rotations_at")
    return rotations_at(torch.arange(n_rotations(order), device=device), order, dtype)


def rotations_at(
    index: Tensor,  # (...) int64, points of the grid
    order: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # (..., 3, 3)
    """Rotations of given grid points, on the device of `index`."""
    n_psi = n_in_plane(order)
    direction = torch.div(index, n_psi, rounding_mode="floor")
    psi = (index - direction * n_psi).to(dtype).add_(0.5).mul_(2 * math.pi / n_psi)
    frame = view_frames(order, dtype, index.device)[direction]
    c, s = torch.cos(psi)[..., None], torch.sin(psi)[..., None]
    x, y, z = frame.unbind(-2)
    return torch.stack([c * x + s * y, c * y - s * x, z], -2)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def fibre_offsets(order: int, device: torch.device | str = "cpu") -> Tensor:  # (n_directions,) int64
    """Where the children on each fibre of `order` begin: child angles of parent m are 2m + offset and the next one.

    With psi* = psi_parent + delta the point of the child's fibre nearest to the parent (delta depends on the two
    directions only), the two child angles nearest to psi* are the ones within one child step of it.
    """
    if order < 1:
        raise ValueError("the coarsest grid is nobody's child")
    child = _frames(order)
    parent = _frames(order - 1)[torch.arange(child.shape[0]) // 4]
    M = child @ parent.transpose(-1, -2)
    delta = torch.atan2(M[:, 1, 0] - M[:, 0, 1], M[:, 0, 0] + M[:, 1, 1])  # maximises trace(Rz(delta) M)
    steps = delta / (2 * math.pi / n_in_plane(order))
    return torch.ceil(steps - 0.5 - 1e-9).long().to(device)


def children_at(
    index: Tensor,  # (...) int64, points of `order`
    order: int,
) -> Tensor:  # (..., 8) int64, points of order + 1
    """Children of given grid points, computed on their device; together the children of all points are all points."""
    n_psi = n_in_plane(order)
    direction = torch.div(index, n_psi, rounding_mode="floor")
    m = index - direction * n_psi
    four = torch.arange(4, device=index.device)
    child = direction[..., None] * 4 + four  # (..., 4)
    first = 2 * m[..., None] + fibre_offsets(order + 1, index.device)[child]
    angles = torch.stack([first, first + 1], -1) % (2 * n_psi)
    return (child[..., None] * (2 * n_psi) + angles).flatten(-2)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def children(order: int, device: torch.device | str = "cpu") -> Tensor:  # (n_rotations, 8) int64
    """Table of the children of every point of an order up to 4. Cached and shared: do not write to it."""
    if order > _TABLE_ORDER:
        raise ValueError(f"order {order} has {n_rotations(order)} points: ask for some children by children_at")
    return children_at(torch.arange(n_rotations(order), device=device), order)
