"""Which tokens of a crop are shown and which are predicted: blocks as in I-JEPA, or a random partition.

Tokens are numbered z slowest on a grid (gz, gy, gx), 6^3 for a crop of 48 voxels. Masks are drawn on the CPU (their
sizes depend on the draw; a device would have to be waited for) from torch's global generator or a given one.
I-JEPA: Assran et al. 2023; in three dimensions the four target blocks hold .15 to .2 of the volume each.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Masks", "block_sizes", "multiblock_masks", "random_masks", "chosen", "token_positions"]

Grid = tuple[int, int, int]


class Masks(NamedTuple):
    """``context`` (b, n) int64: tokens that are shown; ``targets`` (b, k, m) int64: k groups that are predicted."""

    context: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> Masks:
        """The same masks on another device."""
        return Masks(*(part.to(device, non_blocking=True) for part in self))

    def rows(self, rows: slice | list[int]) -> Masks:
        """Those of some crops."""
        return Masks(*(part[rows] for part in self))


@functools.lru_cache(maxsize=64)
def block_sizes(grid: Grid, share: tuple[float, float] = (0.15, 0.2), aspect: float = 1.5) -> tuple[Grid, ...]:
    """All blocks z, y, x whose volume is a share of the grid and whose edges differ by a factor ``aspect`` at most.

    Where no whole-numbered block fits (very small grids), the ones nearest in volume.
    """
    total = math.prod(grid)
    every = [size for size in itertools.product(*(range(1, n + 1) for n in grid)) if math.prod(size) < total]
    even = [size for size in every if max(size) <= aspect * min(size) + 1e-9] or every
    fit = [size for size in even if share[0] * total <= math.prod(size) <= share[1] * total]
    if not fit:
        middle = sum(share) / 2 * total
        nearest = min((abs(math.prod(size) - middle) for size in even), default=None)
        fit = [size for size in even if abs(math.prod(size) - middle) == nearest]
    if not fit:
        raise ValueError(f"a grid of {grid} tokens is too small to hide a part of it")
    return tuple(fit)


def multiblock_masks(
    grid: Grid,
    batch: int,
    generator: torch.Generator | None = None,
    blocks: int = 4,
    share: tuple[float, float] = (0.15, 0.2),
    context: tuple[float, float] = (0.85, 1.0),
    aspect: float = 1.5,
) -> Masks:
    """Target blocks anywhere, the context a large block without them; one block size and one count per batch.

    The context is cut down at random to the smallest count in the batch.
    """
    size = _pick(block_sizes(grid, share, aspect), generator)
    large = _pick(_large(grid, context), generator)
    targets = _members(grid, size, (batch, blocks), generator)  # (b, k, T)
    shown = _members(grid, large, (batch,), generator) & ~targets.any(1)
    empty = ~shown.any(1)
    shown[empty] = ~targets.any(1)[empty]  # the targets may hide all of a small block
    count = max(1, int(shown.sum(1).min()))
    return Masks(chosen(shown, count, generator), targets.nonzero()[:, -1].view(batch, blocks, -1))


def random_masks(grid: Grid, batch: int, ratio: float = 0.6, generator: torch.Generator | None = None) -> Masks:
    """A random partition per crop: ``ratio`` of the tokens are predicted, as one group, the others are shown."""
    total = math.prod(grid)
    hidden = min(max(1, round(ratio * total)), total - 1)
    order = torch.rand(batch, total, generator=generator).argsort(1)
    return Masks(order[:, hidden:].sort(1).values, order[:, None, :hidden].sort(2).values)


def chosen(allowed: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:  # (b, T) -> (b, count)
    """Indices of ``count`` random ones of the allowed tokens of each row, ascending."""
    score = torch.rand(allowed.shape, generator=generator).masked_fill(~allowed, -1.0)
    return score.topk(count, dim=1).indices.sort(1).values


def _pick(options: tuple[Grid, ...], generator: torch.Generator | None) -> Grid:
    return options[int(torch.randint(len(options), (1,), generator=generator))]


@functools.lru_cache(maxsize=64)
def _large(grid: Grid, share: tuple[float, float]) -> tuple[Grid, ...]:
    """Blocks whose volume is a share of the grid; of 6^3 only the whole is .85 or more."""
    total = math.prod(grid)
    every = itertools.product(*(range(1, n + 1) for n in grid))
    return tuple(size for size in every if share[0] * total <= math.prod(size) <= share[1] * total) or (grid,)


def _members(grid: Grid, size: Grid, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Blocks of one size at random places: (*shape, T) bool, the same number of tokens in each."""
    inside = []
    for n, edge in zip(grid, size, strict=True):
        first = torch.randint(n - edge + 1, shape, generator=generator)[..., None]
        place = torch.arange(n)
        inside.append((place >= first) & (place < first + edge))
    z, y, x = inside
    return (z[..., :, None, None] & y[..., None, :, None] & x[..., None, None, :]).flatten(-3)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def token_positions(grid: Grid, dim: int, device: torch.device | str = "cpu") -> Tensor:  # (T, dim) float32
    """Fixed sine and cosine code of the places of tokens, a third of the channels per axis; what is left over is 0."""
    quarter = dim // 6
    omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / max(1, quarter))
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in axes]
    code = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.nn.functional.pad(code, (0, dim - code.shape[1])).float().to(device)
