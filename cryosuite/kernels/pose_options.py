"""What a pose search is told and what it gives back."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import so3_grid

__all__ = ["SearchOptions", "Candidates", "CARRY_LEVEL"]

# periods of the highest frequency between two shifts; the published search has 14 over 40 of 128 pixels at radius 12
_SHIFT_STEP = 0.27
CARRY_LEVEL = 2  # the level at which poses of an earlier search join


@dataclass(frozen=True)
class SearchOptions:
    """How a search proceeds. Radii are in Fourier pixels and clipped to the box, so D does not change the search.

    Args:
        r_min, r_max: radius of the base level and of the last; levels in between rise linearly.
        levels: refinements after the base level; each halves the angular and the shift step.
        base_order: order of the Hopf grid of the base level (2: 15 degrees, 4,608 rotations).
        keep: poses kept per image.
        shift_extent: half width of the shifts searched, as a fraction of the box.
        shift_grid: shifts per axis of the base level over that width (cell-centred), at most: no more are tried than
            the base radius can tell apart (0.27 periods of its highest frequency).
        diversity: distance in grid steps at which kept poses count as different (`pose_levels.select`); 0: best only.
        fit_scale: score at the best positive scale of the volume instead of its own.
        base: "gemm", "polar" (for a volume per image), "exact" (plain, for tests) or "none" (carried poses only).
        refine: Gauss-Newton steps on rotation and shift at the end.
    """

    r_min: int = 12
    r_max: int = 32
    levels: int = 4
    base_order: int = 2
    keep: int = 8
    shift_extent: float = 20 / 128
    shift_grid: int = 14
    diversity: float = 1.5
    fit_scale: bool = False
    base: str = "gemm"
    refine: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.r_min <= self.r_max:
            raise ValueError(f"radii must satisfy 1 <= r_min <= r_max, not {self.r_min} and {self.r_max}")
        if self.levels < 0 or self.keep < 1 or self.shift_grid < 1 or self.refine < 0:
            raise ValueError("levels and refine must be at least 0, keep and shift_grid at least 1")
        if self.base not in ("gemm", "polar", "exact", "none"):
            raise ValueError(f'base must be "gemm", "polar", "exact" or "none", not "{self.base}"')
        so3_grid.n_directions(self.base_order + self.levels)

    def clipped(self, box_size: int) -> SearchOptions:
        """The same with radii that fit a box."""
        return replace(self, r_min=min(self.r_min, box_size // 2), r_max=min(self.r_max, box_size // 2))

    @property
    def shifts_per_axis(self) -> int:
        """Shifts per axis of the base level."""
        return min(self.shift_grid, max(1, math.ceil(2 * self.shift_extent * self.r_min / _SHIFT_STEP)))

    def radius(self, level: int) -> int:
        """Radius of a level, 0 being the base."""
        if self.levels == 0:
            return self.r_max
        return int(self.r_min + (self.r_max - self.r_min) * level / self.levels)


@dataclass
class Candidates:
    """Poses found, best first: rotation (b, keep, 3, 3), shift (b, keep, 2) px, score (b, keep).

    The shift is what is added to the content to centre it; the score is the gain in log-likelihood over an empty image.
    """

    rotation: Tensor
    shift: Tensor
    score: Tensor

    def __len__(self) -> int:
        return self.score.shape[0]

    def take(self, place: Tensor) -> Candidates:
        """Candidates number `place` (b, k) of every image."""
        rows = torch.arange(place.shape[0], device=place.device)[:, None]
        return Candidates(self.rotation[rows, place], self.shift[rows, place], self.score[rows, place])

    def put(self, place: Tensor, other: Candidates) -> Candidates:
        """With candidates number `place` (b, k) of every image replaced by the k of `other`."""
        rows = torch.arange(place.shape[0], device=place.device)[:, None]
        pairs = [(getattr(self, name).clone(), getattr(other, name)) for name in ("rotation", "shift", "score")]
        for mine, theirs in pairs:
            mine[rows, place] = theirs.to(mine.dtype)
        return Candidates(*(mine for mine, _ in pairs))

    def rows(self, index: Tensor | slice) -> Candidates:
        """The candidates of some images."""
        return Candidates(self.rotation[index], self.shift[index], self.score[index])
