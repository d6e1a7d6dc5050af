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

from .fourier import half_disc
from .pose_base import Prepared, prepare
from .pose_levels import State, base_level, next_level, select
from .pose_options import CARRY_LEVEL, Candidates, SearchOptions
from .pose_refine import gauss_newton
from .pose_scores import fold_ctf
from .pose_sources import MagnifiedSource, PointSource, SliceSource, VolumeSource, in_autocast

__all__ = [
    "SearchOptions",
    "Candidates",
    "Prepared",
    "SliceSource",
    "VolumeSource",
    "PointSource",
    "MagnifiedSource",
    "prepare",
    "search",
    "score_poses",
    "margin",
]


_REFINED = 3  # poses per image that Gauss-Newton steps improve: the best, its best rival, and the best of the others


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
    kind = images.device.type
    source = in_autocast(source, kind)
    with torch.autocast(kind, enabled=False):
        return _search(source, images, ctf_over_sigma, index, options or SearchOptions(), carried, prepared)


def _search(
    source: SliceSource,
    images: Tensor,
    ctf_over_sigma: Tensor,
    index: Tensor,
    options: SearchOptions,
    carried: Candidates | None,
    prepared: Prepared | None,
) -> Candidates:
    options = options.clipped(source.box_size)
    if options.base == "none" and (carried is None or options.levels == 0):
        raise ValueError('base="none" refines carried poses in at least one level: there are none')
    g, w = _folded(source, images, ctf_over_sigma, options)
    state: State | None = None
    if options.base != "none":
        if options.base == "gemm" and prepared is None:
            prepared = prepare(source, options, index)
        state = base_level(source, g, w, index, options, prepared)
    return _finish(source, g, w, index, options, state, carried)


def _folded(source: SliceSource, images: Tensor, transfer: Tensor, options: SearchOptions) -> tuple[Tensor, Tensor]:
    """Images with the CTF folded in, and their weights, on the disc of the last level."""
    disc = half_disc(source.box_size, options.r_max, images.device)
    if images.shape != transfer.shape or images.shape[1] < len(disc):
        raise ValueError(
            f"images {tuple(images.shape)} and CTFs {tuple(transfer.shape)} must agree and hold the"
            f" {len(disc)} points of radius {options.r_max}"
        )
    return fold_ctf(images[:, : len(disc)], transfer[:, : len(disc)])


def _finish(
    source: SliceSource,
    g: Tensor,
    w: Tensor,
    index: Tensor,
    options: SearchOptions,
    state: State | None,
    carried: Candidates | None,
) -> Candidates:
    """All levels after the base level and the steps off the grid."""
    join = min(CARRY_LEVEL, options.levels)
    for level in range(1 if state is not None else join, options.levels + 1):
        state = next_level(source, g, w, index, options, level, state, carried if level == join else None)
    found = state.poses
    if options.refine:
        few = select(found, replace(options, keep=_REFINED), options.base_order + options.levels)
        better = gauss_newton(source, g, w, index, options.r_max, found.take(few), options.refine, options.fit_scale)
        found = found.put(few, better)
    return found.take(found.score.argsort(1, descending=True))


@torch.no_grad()
def score_poses(
    source: SliceSource,
    images: Tensor,  # (b, P) complex whitened half transforms
    ctf_over_sigma: Tensor,  # (b, P)
    index: Tensor,  # (b,) int64 particle numbers
    poses: Candidates,
    options: SearchOptions | None = None,
    steps: int = 0,
) -> Candidates:
    """Poses that were found in one source, scored in another, best first, the best improved by some steps there."""
    options = (options or SearchOptions()).clipped(source.box_size)
    kind = images.device.type
    source = in_autocast(source, kind)
    with torch.autocast(kind, enabled=False):
        g, w = _folded(source, images, ctf_over_sigma, options)
        found = gauss_newton(source, g, w, index, options.r_max, poses, 0, options.fit_scale)
        found = found.take(found.score.argsort(1, descending=True))
        if not steps:
            return found
        first = torch.zeros_like(index)[:, None]
        best = gauss_newton(source, g, w, index, options.r_max, found.take(first), steps, options.fit_scale)
        return found.put(first, best)


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
