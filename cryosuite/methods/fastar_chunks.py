"""Chunks of particles, each posed in a frame and hand of its own, brought into one frame by particles they share.

Projections do not tell the frame of a map nor its hand: chunk c has R_i up to R_i -> J^s R_i J^s Q, J = diag(1, 1, -1).
Every chunk holds the same few anchor particles; a chunk's (s, Q) is the one that brings its anchors nearest to the
consensus of all chunks,

    min over s, Q of sum_a w_a |J^s R_a^c J^s Q - R_a*|^2,

by Kabsch's algorithm for either hand. Where the two hands fit nearly alike, or neither does, nothing is decided and the
chunk says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryosuite.kernels.planar import best_rotation, mirror
from cryosuite.kernels.rotations import geodesic_deg

UNDECIDED = 0.8  # residual of the better hand over that of the other one
HOPELESS = 2.0  # mean |R - R'|^2 of rotations 60 degrees apart: with either hand nothing fits
TRIM = 0.2  # worst share left out when whole sets are brought together
STEPS = 20  # of Weiszfeld's algorithm


@dataclass
class Fit:
    """Frame change of sets of rotations: Q (..., 3, 3), flipped (...) bool, the mean squared distances that are left
    with this hand and with the other one (...)."""

    frame: Tensor
    flipped: Tensor
    residual: Tensor
    other: Tensor

    @property
    def undecided(self) -> Tensor:
        """Where the hands fit nearly alike, or neither fits."""
        return (self.residual > UNDECIDED * self.other) | (self.residual > HOPELESS)

    @property
    def degrees(self) -> Tensor:
        """Root mean square angle in degrees that is left of each set (|R - R'|^2 = 8 sin^2(angle / 2))."""
        return 2 * torch.rad2deg(torch.asin((self.residual / 8).clamp(0, 1).sqrt()))


@dataclass
class Tied:
    """All chunks in one frame: the fit of each (C), and the anchors' consensus (A, 3, 3)."""

    fit: Fit
    anchors: Tensor

    def apply(self, rotation: Tensor, chunk: Tensor) -> Tensor:
        """Rotations (n, 3, 3) of chunks (n,) in the common frame."""
        return moved(rotation, self.fit.frame[chunk], self.fit.flipped[chunk])


def moved(rotation: Tensor, frame: Tensor, flipped: Tensor) -> Tensor:
    """J^s R J^s Q for rotations (..., 3, 3), frames Q (..., 3, 3) and flips s (...)."""
    return torch.where(flipped[..., None, None], mirror(rotation), rotation) @ frame


def fit_frame(
    rotation: Tensor,  # (..., n, 3, 3)
    target: Tensor,  # (..., n, 3, 3)
    weight: Tensor,  # (..., n)
) -> Fit:
    """The frame and hand in which rotations are nearest to others, particle by particle, with weights."""
    found = []
    total = weight.sum(-1).clamp(min=1e-12)
    for one in (rotation, mirror(rotation)):
        frame = best_rotation((weight[..., None, None] * (one.transpose(-1, -2) @ target)).sum(-3))
        square = (one @ frame[..., None, :, :] - target).square().sum((-1, -2))
        found.append((frame, (weight * square).sum(-1) / total))
    (same, left), (other, left_other) = found
    flipped = left_other < left
    frame = torch.where(flipped[..., None, None], other, same)
    return Fit(frame, flipped, torch.minimum(left, left_other), torch.maximum(left, left_other))


def chordal_mean(rotation: Tensor, weight: Tensor) -> Tensor:
    """The rotation with the least weighted squared Frobenius distance: (n, ..., 3, 3), (n, ...) -> (..., 3, 3)."""
    return best_rotation((weight[..., None, None] * rotation).sum(0))


def chordal_median(rotation: Tensor) -> Tensor:
    """The rotation with the least sum of Frobenius distances: (n, ..., 3, 3) -> (..., 3, 3) (Weiszfeld)."""
    weight = torch.ones(rotation.shape[:-2], dtype=rotation.dtype, device=rotation.device)
    middle = chordal_mean(rotation, weight)
    for _ in range(STEPS):
        distance = (rotation - middle).square().sum((-1, -2)).sqrt()
        middle = chordal_mean(rotation, 1 / distance.clamp(min=1e-4))
    return middle


def tie(
    anchors: Tensor,  # (C, A, 3, 3), the anchors' rotations as each chunk has them
    weight: Tensor,  # (C, A)
) -> Tied:
    """Bring all chunks into the frame of the first: one by one to the running consensus, then all to the final one."""
    C = len(anchors)
    placed, used = [anchors[0]], [weight[0]]
    for c in range(1, C):
        consensus = chordal_mean(torch.stack(placed), torch.stack(used))
        fit = fit_frame(anchors[c], consensus, weight[c] * torch.stack(used).mean(0))
        placed.append(moved(anchors[c], fit.frame, fit.flipped))
        used.append(torch.where(fit.undecided, 0.0, 1.0) * weight[c])
    first = torch.stack(placed)
    fit = None
    consensus = chordal_mean(first, torch.stack(used))
    for _ in range(2):
        fit = fit_frame(anchors, consensus.expand_as(anchors), weight)
        everyone = moved(anchors, fit.frame[:, None], fit.flipped[:, None])
        share = weight * torch.where(fit.undecided, 1e-3, 1.0)[:, None]
        consensus = chordal_mean(everyone, share)
    # the first chunk's hand stands for all: what is called flipped is relative to it
    return _as_first(Tied(fit, consensus))


def _as_first(tied: Tied) -> Tied:
    """The same in the hand of the first chunk, which may have joined the consensus as flipped."""
    if not bool(tied.fit.flipped[0]):
        return tied
    fit = tied.fit
    return Tied(Fit(mirror(fit.frame), ~fit.flipped, fit.residual, fit.other), mirror(tied.anchors))


def together(runs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Several predictions of all particles (r, n, 3, 3) in the frame of the first, and their chordal median (n, 3, 3).

    weight: (r, n). A run is brought over by two fits, the second without the fifth of the particles that fit worst.
    """
    placed = [runs[0]]
    for run, own in zip(runs[1:], weight[1:], strict=True):
        fit = fit_frame(run, runs[0], own)
        for _ in range(2):
            distance = (moved(run, fit.frame, fit.flipped) - runs[0]).square().sum((-1, -2))
            kept = distance <= torch.quantile(distance[:: max(1, len(distance) // 100_000)], 1 - TRIM)
            fit = fit_frame(run, runs[0], own * kept)
        placed.append(moved(run, fit.frame, fit.flipped))
    stack = torch.stack(placed)
    return stack, chordal_median(stack)


def agreement(tied: Tied) -> dict[str, float | int]:
    """What is printed of chunks: their number, flips, undecided ones, median |Q| in degrees, anchors' spread."""
    eye = torch.eye(3, dtype=tied.fit.frame.dtype, device=tied.fit.frame.device)
    return {
        "chunks": len(tied.fit.flipped),
        "flips": int(tied.fit.flipped.sum()),
        "undecided": int(tied.fit.undecided.sum()),
        "median_turn_deg": float(geodesic_deg(tied.fit.frame, eye).median()),
        "anchor_spread_deg": float(tied.fit.degrees.median()),
    }
