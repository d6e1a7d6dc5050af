"""The levels of a pose search: the whole grid at low radius, then children of the poses kept, and how poses are kept.

A pose kept is a point of the Hopf grid in a frame, R = grid[node] @ frame: grid poses share one frame,
and a pose carried over from an earlier search brings a frame of its own, so that both have the same kind of children.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import so3_grid
from .fourier import half_disc
from .pose_scores import base_power, best_base, gain, local_shifts, score_shifts, shift_grid, shift_phases
from .pose_sources import SliceSource

__all__ = ["SearchOptions", "Candidates", "Prepared", "State", "base_level", "next_level", "select", "CARRY_LEVEL"]

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
        shift_grid: shifts per axis of the base level over that width (cell-centred).
        diversity: smallest distance of kept poses in grid steps of the level; 0 switches it off.
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
    refine: int = 2

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


@dataclass
class Prepared:
    """Base slices, computed once and used by many batches: slices (G, H, P) complex of half of the grid."""

    slices: Tensor
    groups: Tensor | None  # (G,) ascending, None for one shared volume
    frame: Tensor  # (3, 3), grid rotations are multiplied by it from the right

    def slot(self, groups: Tensor | None) -> Tensor | None:
        """Which of the G sets of slices each image takes."""
        if self.groups is None or groups is None:
            return None
        return torch.searchsorted(self.groups, groups)


@dataclass
class State:
    """Poses kept at a level with the grid point `node` (b, k) int64 and the `frame` (b, k, 3, 3) of each."""

    poses: Candidates
    node: Tensor
    frame: Tensor

    def take(self, place: Tensor) -> State:
        """Poses number `place` (b, k) of every image."""
        rows = torch.arange(place.shape[0], device=place.device)[:, None]
        return State(self.poses.take(place), self.node[rows, place], self.frame[rows, place])


def base_level(
    source: SliceSource,
    g: Tensor,  # (b, P) complex, CTF folded in
    w: Tensor,  # (b, P)
    index: Tensor,  # (b,)
    options: SearchOptions,
    prepared: Prepared,
) -> State:
    """The best poses of the whole grid at every shift."""
    disc = half_disc(source.box_size, options.radius(0), g.device)
    g, w = g[:, : len(disc)], w[:, : len(disc)]
    shifts = shift_grid(options.shift_extent * source.box_size, options.shift_grid, g.device).to(w.dtype)
    slot = prepared.slot(source.groups(index))
    corr, which = best_base(prepared.slices, g, shift_phases(shifts, disc), slot)
    power = base_power(prepared.slices, w, slot)
    score = gain(corr, power[:, None], options.fit_scale)
    # from (turned, direction, half angle) to the order of the grid
    n_half = so3_grid.n_in_plane(options.base_order) // 2
    score, which = (v.unflatten(2, (-1, n_half)).transpose(1, 2).flatten(1) for v in (score, which))
    score, node = score.topk(min(8 * options.keep, score.shape[1]), 1)
    rotation = so3_grid.rotations_at(node, options.base_order, w.dtype) @ prepared.frame
    poses = Candidates(rotation, shifts[which.gather(1, node)], score)
    state = State(poses, node, prepared.frame.expand_as(rotation))
    return state.take(select(poses, options, options.base_order))


def next_level(
    source: SliceSource,
    g: Tensor,  # (b, P) complex
    w: Tensor,  # (b, P)
    index: Tensor,  # (b,)
    options: SearchOptions,
    level: int,
    state: State | None,
    carried: Candidates | None,
) -> State:
    """Children of the poses kept, and carried poses as they are, scored at this level's radius; the best are kept."""
    order, radius = options.base_order + level, options.radius(level)
    spacing = 2 * options.shift_extent * source.box_size / options.shift_grid / 2**level
    local = local_shifts(spacing, 5 if level == 1 else 3, w)
    pool = []
    if state is not None:
        node = so3_grid.children_at(state.node, order - 1).flatten(1)
        frame = state.frame.repeat_interleave(8, 1)
        rotation = so3_grid.rotations_at(node, order, w.dtype) @ frame
        pool.append(
            State(_score(source, g, w, index, radius, rotation, state.poses.shift, local, options), node, frame)
        )
    if carried is not None:
        pool.append(_adopt(source, g, w, index, radius, carried, local, options, order))
    whole = pool[0] if len(pool) == 1 else _join(*pool)
    return whole.take(select(whole.poses, options, order))


def _score(
    source: SliceSource,
    g: Tensor,
    w: Tensor,
    index: Tensor,
    radius: int,
    rotation: Tensor,  # (b, q, 3, 3)
    shift: Tensor,  # (b, k, 2), q / k rotations for each
    local: Tensor,  # (T, 2)
    options: SearchOptions,
) -> Candidates:
    """Score rotations at small shifts around those of their parents and take the best shift of each."""
    corr, power, best = score_shifts(source, g, w, index, radius, rotation, shift, local)
    shift = shift.repeat_interleave(rotation.shape[1] // shift.shape[1], 1) + local[best]
    return Candidates(rotation, shift, gain(corr, power, options.fit_scale))


def _adopt(
    source: SliceSource,
    g: Tensor,
    w: Tensor,
    index: Tensor,
    radius: int,
    carried: Candidates,
    local: Tensor,
    options: SearchOptions,
    order: int,
) -> State:
    """Carried poses as members of a level: each is grid point `anchor` in a frame of its own."""
    anchor = so3_grid.n_rotations(order) // 2  # on the equator, where cells are regular
    rotation, shift = carried.rotation.to(w.dtype), carried.shift.to(w.dtype)
    node = torch.full(rotation.shape[:2], anchor, device=g.device)
    frame = so3_grid.rotations_at(node, order, w.dtype).transpose(-1, -2) @ rotation
    return State(_score(source, g, w, index, radius, rotation, shift, local, options), node, frame)


def _join(a: State, b: State) -> State:
    poses = [torch.cat([getattr(s.poses, name) for s in (a, b)], 1) for name in ("rotation", "shift", "score")]
    return State(Candidates(*poses), torch.cat([a.node, b.node], 1), torch.cat([a.frame, b.frame], 1))


def select(poses: Candidates, options: SearchOptions, order: int) -> Tensor:  # (b, keep) int64
    """Numbers of the poses to keep: half are basins, half are whatever else scores best.

    A basin is the best pose, then again and again the best pose far enough from the basins so far. Keeping basins alone
    would lose the true pose where it lies in the cell beside the best one; keeping the best alone loses basins.
    """
    keep = min(options.keep, poses.score.shape[1])
    if options.diversity <= 0:
        return poses.score.topk(keep, 1).indices
    near = options.diversity * so3_grid.spacing_deg(order)
    flat = poses.rotation.flatten(2)
    # trace of R_i^T R_j = 1 + 2 cos(angle)
    close = flat @ flat.transpose(1, 2) > 1 + 2 * math.cos(math.radians(near))
    score = poses.score
    free = torch.ones_like(score, dtype=torch.bool)
    taken = torch.zeros_like(free)
    chosen = []
    for number in range(keep):
        basins = free.any(1, keepdim=True) & (number < (keep + 1) // 2)
        allowed = torch.where(basins, free, ~taken)
        best = torch.where(allowed, score, -torch.inf).argmax(1, keepdim=True)
        chosen.append(best)
        taken = taken.scatter(1, best, True)
        free = free & ~close.gather(1, best[..., None].expand(-1, 1, close.shape[2]))[:, 0] & ~taken
    return torch.cat(chosen, 1)
