"""Tiles of a large volume: where they lie, how they are cut out and blended again, and the rotations of a cube.

Tiles of ``edge`` voxels stand ``stride`` apart, the first a quarter of an edge before the volume; beyond its faces the
volume is mirrored. Each tile is weighted by w(z) w(y) w(x) with w(i) = sin^2(pi (i + 1/2) / edge) + 1e-3, so that what
a network makes of voxels near a tile's faces counts for little. The sum of the weights is a product of three vectors.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Tiling", "blend_weight", "mirrored", "TURNS", "turned", "turned_back"]

FLOOR = 1e-3  # of the weight at the faces of a tile

Size = tuple[int, int, int]


def blend_weight(edge: int, device: torch.device | str = "cpu") -> Tensor:  # (edge,) float32
    """Weight of a tile's voxels along one axis: sin^2, never quite 0."""
    place = (torch.arange(edge, device=device, dtype=torch.float32) + 0.5) / edge
    return torch.sin(math.pi * place).square() + FLOOR


def mirrored(index: Tensor, n: int) -> Tensor:
    """Any whole numbers as places 0 .. n - 1 of an axis that is mirrored at its first and last voxel."""
    if n == 1:
        return torch.zeros_like(index)
    index = torch.remainder(index, 2 * n - 2)
    return torch.minimum(index, 2 * n - 2 - index)


@dataclass(frozen=True)
class Tiling:
    """Tiles over a volume.

    Args:
        shape: of the volume, z, y, x.
        edge: voxels of a tile; stride: from one to the next, at most half an edge.
        offset: voxels by which all tiles lie before their usual place, 0 to stride - 1.

    Raises ValueError for numbers that leave gaps.
    """

    shape: Size
    edge: int = 48
    stride: int = 24
    offset: int = 0

    def __post_init__(self) -> None:
        if self.edge < 4 or not 1 <= self.stride <= self.edge // 2 or not 0 <= self.offset < self.stride:
            raise ValueError(
                f"tiles of {self.edge} voxels need a stride from 1 to {self.edge // 2} and an offset below it, "
                f"not {self.stride} and {self.offset}"
            )

    @cached_property
    def starts(self) -> tuple[list[int], list[int], list[int]]:
        """First voxel of the tiles along z, y and x; the first ones are negative."""
        margin = self.edge // 4
        out = []
        for n in self.shape:
            # the last tile ends as far behind the volume as the first begins before it, or farther
            count = max(1, math.ceil((n + 2 * margin + self.offset - self.edge) / self.stride) + 1)
            out.append([i * self.stride - margin - self.offset for i in range(count)])
        return tuple(out)

    def __len__(self) -> int:
        return math.prod(len(axis) for axis in self.starts)

    def corners(self) -> Tensor:  # (n, 3) int64
        """First voxel z, y, x of every tile, z slowest."""
        return torch.tensor(list(itertools.product(*self.starts)))

    def occupied(self, mask: Tensor) -> Tensor:  # (z, y, x) bool -> (n,) bool
        """Which of the tiles hold a voxel of the mask."""
        found = mask
        for dim, (starts, n) in enumerate(zip(self.starts, self.shape, strict=True)):
            parts = [found.narrow(dim, max(0, a), min(n, a + self.edge) - max(0, a)).any(dim) for a in starts]
            found = torch.stack(parts, dim)
        return found.reshape(-1)

    def cut(self, volume: Tensor, corners: Tensor) -> Tensor:  # (z, y, x), (b, 3) -> (b, edge, edge, edge)
        """Tiles of a volume, mirrored where they reach beyond it."""
        place = torch.arange(self.edge, device=volume.device)
        z, y, x = (mirrored(corners[:, i, None].to(volume.device) + place, n) for i, n in enumerate(self.shape))
        return volume[z[:, :, None, None], y[:, None, :, None], x[:, None, None, :]]

    def add(self, total: Tensor, tiles: Tensor, corners: Tensor) -> None:
        """Add weighted tiles (b, edge, edge, edge) to a running sum (z, y, x) in place."""
        w = blend_weight(self.edge, tiles.device)
        weighted = tiles * (w[:, None, None] * w[:, None] * w)
        for tile, corner in zip(weighted, corners.tolist(), strict=True):
            inside, there = [], []
            for a, n in zip(corner, self.shape, strict=True):
                first, end = max(0, a), min(n, a + self.edge)
                there.append(slice(first, end))
                inside.append(slice(first - a, end - a))
            total[tuple(there)] += tile[tuple(inside)].to(total)

    def divide(self, total: Tensor) -> Tensor:
        """Divide a running sum (z, y, x) of all tiles, skipped ones counted as 0, by the weights; in place."""
        w = blend_weight(self.edge, total.device)
        for dim, (starts, n) in enumerate(zip(self.starts, self.shape, strict=True)):
            line = torch.zeros(n, device=total.device)
            for a in starts:
                first, end = max(0, a), min(n, a + self.edge)
                line[first:end] += w[first - a : end - a]
            total.div_(line.view([-1 if i == dim else 1 for i in range(3)]))
        return total


def _turns() -> tuple[tuple[Size, tuple[int, ...]], ...]:
    """The 24 rotations: order of the axes, then axes to be flipped.

    The first 4 are half turns, the first 12 the rotations of a tetrahedron: every beginning of 1, 4, 12 or 24 is a
    group, and the first 8 have all three axes along two others.
    """
    even, odd = ((0, 1, 2), (1, 2, 0), (2, 0, 1)), ((0, 2, 1), (2, 1, 0), (1, 0, 2))
    pairs, lone = ((), (0, 1), (0, 2), (1, 2)), ((0, 1, 2), (0,), (1,), (2,))
    return tuple((axes, f) for axes in even for f in pairs) + tuple((axes, f) for axes in odd for f in lone)


TURNS = _turns()


def turned(x: Tensor, turn: int) -> Tensor:  # (..., z, y, x)
    """A volume in the rotation ``turn`` of ``TURNS``; 0 is none."""
    axes, flips = TURNS[turn]
    lead = x.ndim - 3
    x = x.permute(*range(lead), *(lead + a for a in axes))
    return x.flip([lead + f for f in flips]) if flips else x


def turned_back(x: Tensor, turn: int) -> Tensor:  # (..., z, y, x)
    """The inverse of ``turned``."""
    axes, flips = TURNS[turn]
    lead = x.ndim - 3
    x = x.flip([lead + f for f in flips]) if flips else x
    return x.permute(*range(lead), *(lead + axes.index(a) for a in range(3)))
