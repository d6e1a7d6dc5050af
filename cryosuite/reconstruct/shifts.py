"""Errors of the particles' shifts, measured against half maps of their classes and taken back.

Shifts of real sets are wrong by half a pixel and more, and every method that takes poses as given suffers: maps are
blurred, and a search for states finds shifted copies of one state (measured, an assembly of 16 at SNR 0.01, shifts off
by .5 px in 64: the codes of train-kraqen told 65 % of the variance of the shift errors, and hardly any state).

A particle's log-likelihood under the map of its class, as a function of a further shift d, is close to a parabola with
the score g and the Fisher information H = 2 sum |S|^2 w f f^T, f = -2 pi (kx, ky). With the prior N(0, s^2) on the
error of each coordinate the most probable shift is (H + 1/s^2)^-1 (g + H d0) from where it was measured, d0; s is what
makes the images most probable (EM for a variance component). Where shifts are right s falls to some hundredths of a
pixel, also if a third of the particles are in wrong classes, and nothing moves.

A search takes the map of the other half set, which the particle is not part of. Half maps that are to be compared
afterwards must stay apart: there each half set is measured against its own (to which a particle adds a little of
itself, at the old place: that holds it back, no more). Both found the same where it was tried, to .005 pixel.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryosuite.console import Progress
from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.kernels import slices
from cryosuite.reconstruct import held_out
from cryosuite.reconstruct.class_images import ClusterImages
from cryosuite.reconstruct.class_work import ClassWork
from cryosuite.reconstruct.held_out import COARSE_BOX, FINE_BOX
from cryosuite.reconstruct.weights import ClassWeights

ROUNDS = 3  # against one map of all particles: the third moves nothing by more than .01 pixel
FEW = 40  # classes: so many are looked at in the fine box too, where shifts are wrong
CACHE_GIB, MEMORY_GIB = 1.0, 2.0  # of images and of maps held at a time for `refined_within_classes`
START = 1.0  # pixel: s at the beginning
# pixel: an s below which shifts stay as they are. The first takes 5 % of the amplitude at Nyquist; one map of all
# particles must show more, as states that differ from it look like shifts (.2 for a loop in 128 pixels).
LEAST, LEAST_OF_ONE = 0.1, 0.25
# One map of all particles says where they lie if it explains that share of the signal once they are moved (.78 to .92
# for assemblies and molecules that bend, .6 for two unlike molecules, .2 for 16), and if the errors do not seem to grow
# by that factor from round to round: unlike molecules are pulled farther off their centres each time (1.04 to 1.4; else
# .95 to 1.0).
EXPLAINED, GROWTH = 0.7, 1.03
# Maps of classes that mix molecules explain less as well, and pull right shifts off (by .1, .16 and .27 pixel where
# classes hold 2, 4 and 16 of a mixture), but tell wrong ones still, unless they explain next to nothing: where they
# explain less than EXPLAINED errors must be as large as those of one map and must not grow; below MIXED (.2: classes by
# chance) nothing moves.
MIXED = 0.3
# Standard deviations by which the maps must be seen in images that are not part of them; the filter of half maps, which
# keeps what both halves have in common by chance, makes 10 to 44 of pure noise (boxes of 24 to 64).
SEEN = 60.0


@dataclass
class ShiftFit:
    """What was found.

    Attributes:
        shift: (N, 2) float32, fraction of the box, to be added to centre the particle.
        error: s, the standard deviation of the errors that the shifts had per coordinate, in pixels of the particles.
        explained: share of the signal's power that the maps explain.
        seen: correlation of all images with the maps, in standard deviations of what noise alone would give.
    """

    shift: np.ndarray
    error: float
    explained: float
    seen: float

    def said(self, pixel_size: float, what: str) -> str:
        """A sentence for the user: how wrong the shifts were (``pixel_size`` in A), and ``what`` came of it."""
        size = f"{self.error:.2g} pixels ({self.error * pixel_size:.2g} A)"
        return (
            f"the shifts of the particles were off by {size} in each direction; they were refined: {what} "
            "(--no-refine-shifts leaves them as they are)"
        )


def refine_shifts(
    work: ClassWork,
    p: ClassWeights,
    half: np.ndarray,
    given: np.ndarray | None,
    rounds: int = 1,
    own: bool = False,
    progress: str | None = None,
) -> ShiftFit | None:
    """Move the particles of ``work`` to where the maps of their classes want them.

    Args:
        p: shares of all N particles in K classes; each is measured against its largest. half: (N,) 0 or 1.
        given: (N, 2) the shifts that came with the particles, around which the errors lie; fraction of the box; None:
            centred. rounds: of maps and shifts.
        own: measure against the map of the particle's own half set, not the other. progress: label of a display.

    Returns:
        What was found; None where nothing is to be gained: then the particles lie where they were given.
    """
    errors, one, rows = [], p.n_classes == 1, np.flatnonzero(p.labels() >= 0)
    if not len(rows):
        return None
    shown = progress and work.processes.first
    with Progress(rounds * len(work.processes.mine(rows)), progress, "images") if shown else nullcontext() as bar:
        while len(errors) < rounds:
            maps = held_out.half_maps(work, p, half)
            found = measure(work, maps.flip(0) if own else maps, p.labels(), half, given, bar)
            errors.append(found.error)
            if found.error < (LEAST_OF_ONE if one else LEAST) or found.seen < SEEN:
                break
            work.images.move(found.shift)
            if found.explained < EXPLAINED:
                rounds = max(rounds, 2)  # whether the errors grow
    mixed = found.explained < EXPLAINED
    unlike = errors[-1] > GROWTH * errors[0] if one or mixed else False
    unlike |= found.explained < (EXPLAINED if one else MIXED)
    least = LEAST_OF_ONE if one or mixed else LEAST
    if found.error < least or found.seen < SEEN or unlike:
        work.images.move(given)
        return None
    return found


def refined_within_classes(
    particles: ParticleSet, p: ClassWeights, processes: Processes = ALONE
) -> tuple[ParticleSet, ShiftFit | None]:
    """The particles with shifts refined against the maps of their classes, each half set by itself; and what was found,
    None where the shifts are right or cannot be told."""
    given, half, found = particles.shift, particles.half_sets(), None
    fine = p.n_classes <= FEW and particles.box_size > COARSE_BOX
    for box, rounds in ((COARSE_BOX, 1), (FINE_BOX, 1)) if fine else ((COARSE_BOX, 2),):
        images = processes.each(lambda box=box, now=particles: ClusterImages(now, box, CACHE_GIB))
        work = ClassWork(images, memory_gib=MEMORY_GIB, processes=processes)
        with work.threads_of_torch():
            better = refine_shifts(work, p, half, given, rounds, True, "shifts")
        if better is None:
            break
        particles, found = images.particles, better
    return particles, found


def errors_of_shifts(particles: ParticleSet, processes: Processes = ALONE) -> ShiftFit | None:
    """What one map of all particles tells of their shifts; None where they are right or it tells nothing."""
    images = processes.each(lambda: ClusterImages(particles, COARSE_BOX, CACHE_GIB))
    work = ClassWork(images, memory_gib=MEMORY_GIB, processes=processes)
    one = ClassWeights.from_labels(np.zeros(len(particles), np.int64), 1)
    with work.threads_of_torch():
        return refine_shifts(work, one, particles.half_sets(), particles.shift, ROUNDS, progress="shifts")


def measure(
    work: ClassWork,
    maps: Tensor,
    labels: np.ndarray,
    half: np.ndarray,
    given: np.ndarray | None,
    bar: Progress | None = None,
) -> ShiftFit:
    """One step: shifts of all particles from the half maps (2, K, d, d, d) of the other half set; particles without a
    class keep theirs."""
    images = work.images
    box = images.particles.box_size
    rows = np.flatnonzero(labels >= 0)
    now, given = (
        np.zeros((len(labels), 2)) if shift is None else shift.astype(np.float64)
        for shift in (images.particles.shift, given)
    )
    sums = _sums(work, maps, rows, labels, half, bar)
    score, information, cross, square = sums[:, :2], sums[:, [2, 3, 3, 4]].reshape(-1, 2, 2), sums[:, 5], sums[:, 6]
    scale = cross.sum() / max(square.sum(), 1e-300)  # filtered maps are a little too weak
    score, information = scale * score, scale**2 * information
    offset = now[rows] - given[rows]
    target = score + np.einsum("nij,nj->ni", information, offset)
    moved, error = _most_probable(target, information, START / box)
    shift = now.copy()
    shift[rows] = given[rows] + moved
    signal = 2.0 * len(images.disc) * max(len(rows), 1) * images.signal
    seen = float(cross.sum() / math.sqrt(max(square.sum(), 1e-300)))
    return ShiftFit(shift.astype(np.float32), error * box, float(scale * cross.sum() / signal), seen)


def _most_probable(target: np.ndarray, information: np.ndarray, start: float) -> tuple[np.ndarray, float]:
    """(n, 2) most probable errors with the prior of the most probable width, and that width."""
    variance, eye = start**2, np.eye(2)
    moved = np.zeros_like(target)
    for _ in range(200):
        covariance = np.linalg.inv(information + eye / variance)
        moved = np.einsum("nij,nj->ni", covariance, target)
        wanted = float((np.square(moved).sum(1) + np.trace(covariance, axis1=1, axis2=2)).mean() / 2)
        settled = abs(wanted / variance - 1) < 1e-3
        variance = wanted
        if settled:
            break
    return moved, math.sqrt(variance)


def _sums(
    work: ClassWork, maps: Tensor, rows: np.ndarray, labels: np.ndarray, half: np.ndarray, bar: Progress | None = None
) -> np.ndarray:
    """(n, 7) of some rows: score (2), information (xx, xy, yy), 2 Re sum conj(S) v, 2 sum |S|^2 w, in box fractions."""
    own, r_max = work.processes.mine(rows), work.images.box // 2
    out = np.zeros((len(own), 7))

    def add_up() -> None:
        disc = work.disc(r_max)
        f = -2 * math.pi * disc.xy.double().T
        products = torch.stack([f[0] ** 2, f[0] * f[1], f[1] ** 2])
        for k in np.unique(labels[own]):
            for h in (0, 1):
                at = np.flatnonzero((labels[own] == k) & (half[own] == h))
                if not len(at):
                    continue
                transform = slices.volume_transform(maps[1 - h, k].to(work.device), correct_gridding=True)
                for chunk in work.chunks(own[at], r_max):
                    S = slices.extract_slices(transform, chunk.rotation, disc)
                    # real numbers, row by row: else last digits depend on how many images are taken at a time
                    (a, b), (x, y) = (torch.view_as_real(value).double().unbind(-1) for value in (S, chunk.values))
                    power, along, across = (a * a + b * b) * chunk.weights, a * x + b * y, a * y - b * x
                    parts = [-(across[:, None] * f).sum(2), (power[:, None] * products).sum(2)]
                    parts += [along.sum(1)[:, None], power.sum(1)[:, None]]
                    count = len(chunk.rows)
                    out[at[:count]] = 2 * torch.cat(parts, 1).cpu().numpy()
                    at = at[count:]
                    if bar is not None:
                        bar.advance(count)

    work.attempt(add_up)
    return work.processes.joined(out)
