"""The levels of a pose search: the whole grid at low radius, then children of the poses kept, and how poses are kept.

A pose kept is a point of the Hopf grid in a frame, R = grid[node] @ frame: grid poses share one frame,
and a pose carried over from an earlier search brings a frame of its own, so that both have the same kind of children.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import so3_grid
from .pose_base import Prepared, base_scores
from .pose_options import Candidates, SearchOptions
from .pose_scores import gain, local_shifts, score_shifts, shift_grid
from .pose_sources import SliceSource

__all__ = ["State", "base_level", "next_level", "select"]


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
    prepared: Prepared | None,
) -> State:
    """The best poses of the whole grid at every shift."""
    shifts = shift_grid(options.shift_extent * source.box_size, options.shifts_per_axis, g.device).to(w.dtype)
    corr, power, which = base_scores(source, g, w, index, options, shifts, prepared)
    score = gain(corr, power, options.fit_scale)
    score, node = score.topk(min(8 * options.keep, score.shape[1]), 1)
    rotation = so3_grid.rotations_at(node, options.base_order, w.dtype)
    poses = Candidates(rotation, shifts[which.gather(1, node)], score)
    frame = torch.eye(3, dtype=w.dtype, device=w.device)
    state = State(poses, node, frame.expand_as(rotation))
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
    spacing = 2 * options.shift_extent * source.box_size / options.shifts_per_axis / 2**level
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
    """Numbers of the poses to keep: rivals, then basins, then whatever else scores best.

    First the best pose and the best one far from it, by the distance of the base level: a second view that explains the
    image nearly as well lives on until it is decided. Then, up to half of all, poses apart by the distance of this
    level. Keeping only poses apart would lose the true one where it lies in the cell beside the best one; keeping only
    the best would lose the rivals.
    """
    keep = min(options.keep, poses.score.shape[1])
    if options.diversity <= 0:
        return poses.score.topk(keep, 1).indices
    flat = poses.rotation.flatten(2)
    trace = flat @ flat.transpose(1, 2)  # 1 + 2 cos(angle)
    near = [trace > 1 + 2 * math.cos(math.radians(_apart(options, r))) for r in (options.base_order, order)]
    rivals, basins = max(2, keep // 4), (keep + 1) // 2
    taken = torch.zeros_like(poses.score, dtype=torch.bool)
    blocked = [taken.clone(), taken.clone()]
    chosen = []
    for number in range(keep):
        allowed = ~taken
        if number < max(rivals, basins):
            free = ~blocked[0 if number < rivals else 1]
            allowed = torch.where(free.any(1, keepdim=True), free, allowed)
        best = torch.where(allowed, poses.score, -torch.inf).argmax(1, keepdim=True)
        chosen.append(best)
        taken = taken.scatter(1, best, True)
        rows = best[..., None].expand(-1, 1, trace.shape[2])
        blocked = [b | n.gather(1, rows)[:, 0] | taken for b, n in zip(blocked, near, strict=True)]
    return torch.cat(chosen, 1)


def _apart(options: SearchOptions, order: int) -> float:
    """Distance in degrees that makes two poses different at the step of an order."""
    return min(options.diversity * so3_grid.spacing_deg(order), 90.0)
