"""Hierarchical search of rotation and shift over all of SO(3), for any source of slices, batched over images.

The base level scores every point of a coarse Hopf grid (15 degrees) at every shift at low radius; each of the next
levels halves the angular step around the poses kept, refines the shift on a small local grid and raises the radius; a
few Gauss-Newton steps end it off the grid. The poses kept are held apart, so that two basins both survive (CryoDECO;
Levy et al. 2022 for the search it builds on). Scores are in `pose_scores`, levels in `pose_levels`. On a GPU nothing
leaves the device inside a batch.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from . import so3_grid
from .fourier import half_disc
from .pose_levels import CARRY_LEVEL, Candidates, Prepared, SearchOptions, State, base_level, next_level, select
from .pose_refine import gauss_newton
from .pose_scores import fold_ctf
from .pose_sources import PointSource, SliceSource, VolumeSource

__all__ = [
    "SearchOptions",
    "Candidates",
    "Prepared",
    "SliceSource",
    "VolumeSource",
    "PointSource",
    "prepare",
    "search",
    "margin",
]


def prepare(
    source: SliceSource,
    options: SearchOptions,
    index: Tensor | None = None,  # (n,) int64, all particles that will be searched; not needed for one shared volume
    frame: Tensor | None = None,  # (3, 3) rotation of the whole grid
    device: torch.device | str = "cpu",
) -> Prepared:
    """Slices of every group of particles at the base level. A turn by 180 degrees conjugates: half the grid is kept."""
    options = options.clipped(source.box_size)
    index = torch.zeros(1, dtype=torch.int64, device=device) if index is None else index
    groups = source.groups(index)
    if groups is None:
        kinds, first = None, index[:1]
    else:
        kinds, back = torch.unique(groups, return_inverse=True)
        first = torch.full_like(kinds, index.numel()).scatter_reduce_(
            0, back, torch.arange(index.numel(), device=index.device), "amin"
        )
        first = index[first]
    frame = torch.eye(3, device=index.device) if frame is None else frame
    n_psi = so3_grid.n_in_plane(options.base_order)
    grid = so3_grid.grid_rotations(options.base_order, frame.dtype, index.device) @ frame
    half = grid.unflatten(0, (-1, n_psi))[:, : n_psi // 2].flatten(0, 1)
    rows = [source.slices(half[None], options.radius(0), one[None])[0] for one in first]
    return Prepared(torch.stack(rows), kinds, frame)


_REFINED = 3  # poses per image that Gauss-Newton steps improve: the best, its best rival, and the best of the others
_APART = 8.0  # grid steps that make a rival


@torch.no_grad()
def search(
    source: SliceSource,
    images: Tensor,  # (b, P) complex whitened half transforms
    ctf_over_sigma: Tensor,  # (b, P)
    index: Tensor,  # (b,) int64 particle numbers
    options: SearchOptions | None = None,
    carried: Candidates | None = None,
    prepared: Prepared | None = None,
) -> Candidates:
    """Best poses of a batch of images.

    `images` and `ctf_over_sigma` hold at least the half disc of r_max (more is left out), both divided by the noise
    sigma of each coefficient, so that E|noise|^2 = 1. `carried` poses of an earlier search join at level 2.
    `prepared` saves the base slices of a volume that many batches share.

    Raises:
        ValueError: images that do not reach r_max, or `base="none"` without carried poses.
    """
    options = (options or SearchOptions()).clipped(source.box_size)
    disc = half_disc(source.box_size, options.r_max, images.device)
    if images.shape != ctf_over_sigma.shape or images.shape[1] < len(disc):
        raise ValueError(
            f"images {tuple(images.shape)} and CTFs {tuple(ctf_over_sigma.shape)} must agree and hold the"
            f" {len(disc)} points of radius {options.r_max}"
        )
    if options.base == "none" and carried is None:
        raise ValueError('base="none" refines carried poses: there are none')
    g, w = fold_ctf(images[:, : len(disc)], ctf_over_sigma[:, : len(disc)])
    state: State | None = None
    if options.base != "none":
        prepared = prepared or prepare(source, options, index)
        state = base_level(source, g, w, index, options, prepared)
    first = 1 if state is not None else min(CARRY_LEVEL, options.levels)
    for level in range(first, options.levels + 1):
        joins = carried if level == min(CARRY_LEVEL, options.levels) else None
        state = next_level(source, g, w, index, options, level, state, joins)
    if state is None:
        raise ValueError("a search without a base level needs at least one level")
    found = state.poses
    if options.refine:
        few = select(found, replace(options, keep=_REFINED, diversity=_APART), options.base_order + options.levels)
        better = gauss_newton(source, g, w, index, options.r_max, found.take(few), options.refine, options.fit_scale)
        found = found.put(few, better)
    return found.take(found.score.argsort(1, descending=True))


def margin(candidates: Candidates, apart_deg: float = 10.0) -> Tensor:  # (b,)
    """How much the best pose is better, in log-likelihood, than the best one kept that is `apart_deg` or more away.

    Without such a pose the margin over the last one kept: a lower bound.
    """
    best = candidates.rotation[:, :1]
    cosine = ((best * candidates.rotation).sum((-1, -2)) - 1) / 2
    other = cosine <= math.cos(math.radians(apart_deg))
    rival = torch.where(other, candidates.score, -torch.inf).amax(1)
    last = candidates.score.amin(1)
    return candidates.score.amax(1) - torch.where(other.any(1), rival, last)
