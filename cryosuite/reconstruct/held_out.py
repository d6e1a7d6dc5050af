"""Classes settled by images that had no part in the maps they are judged with: expectation maximisation in two halves.

An image that lies in the map it is scored with prefers that map by what its own noise adds to it. With 150 images per
class at SNR 0.1 this is worth some 180 log units, more than related states differ by: whatever the first partition was,
it stays. So every class has two half maps, cleaned by the filter of `polish`, and an image is scored with those of the
other half set. Poses are known and stay as they are.

Used by the voxel field of train-kraqen for its maps and, by way of `cutting`, by deco-classify for the classes of a
latent space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cryosuite.console import Progress
from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.errors import InputError
from cryosuite.kernels import class_slices as kernel
from cryosuite.kernels import slices
from cryosuite.reconstruct.class_images import ClusterImages
from cryosuite.reconstruct.class_sums import ClassSums, accumulate
from cryosuite.reconstruct.class_work import ClassWork
from cryosuite.reconstruct.half_pairs import pairing
from cryosuite.reconstruct.joining import JOIN_AT, JOIN_ITERATIONS, joined_groups, together
from cryosuite.reconstruct.polish import polish
from cryosuite.reconstruct.weights import ClassWeights

COARSE_BOX, FINE_BOX = 32, 64  # pixels: where the classes are sorted first, and where they are settled
COARSE_ITERATIONS, AGAIN, FINE_ITERATIONS = 12, 4, 3  # at most: before twins are joined, after it, in the fine box
SETTLED = 2e-3  # share of the images that change their class, below which an iteration is the last
FEWEST = 4.0  # particles in a half set, below which a class says nothing and is given up


@dataclass
class Settled:
    """Shares of N particles in the classes that are left.

    groups: (K,) int64, which of them each class of the start has gone into; -1: given up.
    likelihood: mean held-out log-likelihood per image after each iteration, comparable within one box.
    """

    p: ClassWeights
    groups: np.ndarray
    likelihood: list[float]


def settle(
    particles: ParticleSet,
    start: ClassWeights,
    half: np.ndarray | None = None,
    *,
    join: bool = True,
    count: int = 0,
    box: int = FINE_BOX,
    device: torch.device | str = "cpu",
    progress: str | None = None,
    processes: Processes = ALONE,
) -> Settled:
    """Let all particles choose their classes anew, join classes that are one, and settle in a finer box.

    Args:
        particles: N with poses and CTF. start: shares of the N particles in K classes, better too many than too few.
        half: (N,) 0 or 1; default the half sets of the particles.
        join: make one class of twins (`joining`). count: join until so many are left, alike or not.
        box: of the last iterations, pixels. progress: label of a progress display, None for silence.
        processes: that share the images; all get the same.

    Raises:
        InputError: no class has particles in both half sets; sizes that do not fit.
    """
    if len(start) != len(particles):
        raise InputError(f"{len(start)} rows of class shares for {len(particles)} particles: one each is needed")
    half = np.asarray(particles.half_sets() if half is None else half)
    coarse, fine = (min(size, box, particles.box_size) for size in (COARSE_BOX, FINE_BOX))
    twice = 1 if count else 2  # temperatures at which twins are looked for
    total = COARSE_ITERATIONS + (twice * (JOIN_ITERATIONS + AGAIN) if join else 0)
    total += FINE_ITERATIONS if fine > coarse else 0
    progress_bar = Progress(total, progress, "iterations") if progress and processes.first else nullcontext()
    work = ClassWork(processes.each(lambda: ClusterImages(particles, coarse)), device, processes=processes)
    with progress_bar as bar, work.threads_of_torch():
        engine = _Settling(work, half, bar)
        p, groups = engine.run(start, COARSE_ITERATIONS), np.arange(start.n_classes)
        if join:
            warm = engine.warmed(p, JOIN_AT)
            done = len(engine.likelihood)
            groups = joined_groups(warm, engine.warmed, count)
            if bar is not None and not count and len(engine.likelihood) == done:  # no pair was tried again
                bar.advance(JOIN_ITERATIONS)
            p = engine.run(warm.merged(groups), AGAIN)
            if not count:
                onto = together(p, engine.scored)
                groups = onto[groups]
                if onto.max() + 1 < len(onto):
                    p = engine.run(p.merged(onto), AGAIN)
                elif bar is not None:
                    bar.advance(AGAIN)
        if fine > coarse:
            work.images = processes.each(lambda: ClusterImages(particles, fine))
            p = engine.run(p, FINE_ITERATIONS)
    kept = np.flatnonzero(p.usage() > 0.5)
    place = np.full(p.n_classes, -1, np.int64)
    place[kept] = np.arange(len(kept))
    return Settled(p.columns(kept), place[groups], engine.likelihood)


class _Settling:
    """Iterations on one set of images; ``likelihood`` grows by one entry in each."""

    def __init__(self, work: ClassWork, half: np.ndarray, bar: Progress | None) -> None:
        self.work, self.half, self.bar = work, half, bar
        self.likelihood: list[float] = []

    def run(
        self, p: ClassWeights, iterations: int, temperature: float = 1.0, until_settled: bool = True
    ) -> ClassWeights:
        """Shares after some iterations, or after the first in which hardly an image changed its class."""
        for done in range(iterations):
            before, p = p.labels(), self._iteration(p, temperature)
            settled = until_settled and (p.labels() != before).mean() < SETTLED
            if self.bar is not None:
                self.bar.advance(iterations - done if settled else 1)
            if settled:
                break
        return p

    def warmed(self, p: ClassWeights, temperature: float) -> ClassWeights:
        """Shares after `JOIN_ITERATIONS` at a raised temperature."""
        return self.run(p, JOIN_ITERATIONS, temperature, until_settled=False)

    def scored(self, p: ClassWeights) -> tuple[np.ndarray, np.ndarray]:
        """Held-out log-likelihood (N,) of each image under all classes, (K, K) mean of a class' images under each."""
        labels, k = p.labels(), p.n_classes
        own, sums = np.zeros(len(labels)), np.zeros((k, k))
        for rows, used, logits in self._logits(p):
            own[rows] = np.logaddexp.reduce(logits, 1)
            for j in np.unique(labels[rows]).tolist():
                if j >= 0:
                    sums[j, used] += logits[labels[rows] == j].sum(0)
        own[self.work.images.bad] = 0
        count = np.bincount(labels[labels >= 0], minlength=k)
        idle = np.setdiff1d(np.arange(k), self._used(p))
        sums[idle], sums[:, idle] = np.nan, np.nan
        return own, sums / np.maximum(count, 1)[:, None]

    def _used(self, p: ClassWeights) -> np.ndarray:
        """Classes that have maps."""
        return usable(np.stack([p.rows(np.flatnonzero(self.half == h)).usage() for h in (0, 1)], 1))

    def _logits(self, p: ClassWeights) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of both half sets: rows, the classes with maps, log of likelihood times prior (rows, those classes)."""
        used = self._used(p)
        if not len(used):
            raise InputError("no class has particles in both half sets: nothing can be settled (see rlnRandomSubset)")
        part = p.columns(used)
        volumes = half_maps(self.work, part, self.half)
        prior = np.log(np.maximum(part.usage(), 0.5) / max(part.usage().sum(), 0.5))
        for h in (0, 1):
            rows = np.flatnonzero(self.half == h)
            yield rows, used, self.work.likelihoods(volumes[1 - h], rows) + prior

    def _iteration(self, p: ClassWeights, temperature: float) -> ClassWeights:
        """New shares: of Bayes at temperature 1."""
        images = self.work.images
        dense, total = np.zeros((len(images), p.n_classes), np.float32), 0.0
        for rows, used, logits in self._logits(p):
            logits /= temperature
            peak = logits.max(1, keepdims=True)
            shares = np.exp(logits - peak)
            sums = shares.sum(1, keepdims=True)
            total += float((peak + np.log(sums)).sum()) * temperature
            dense[np.ix_(rows, used)] = shares / sums
        dense[images.bad] = 0
        self.likelihood.append(total / max(len(images), 1))
        return ClassWeights.from_dense(dense)


def usable(counts: np.ndarray) -> np.ndarray:  # (K, 2) -> classes
    """The classes with enough particles in both half sets, or with any where none has enough."""
    enough = np.flatnonzero((counts >= FEWEST).all(1))
    return enough if len(enough) else np.flatnonzero((counts > 0).all(1))


# --- maps and scores, shared with train-kraqen -----------------------------------------------------------------------


def half_maps(work: ClassWork, p: ClassWeights, half: np.ndarray) -> Tensor:
    """(2, K, d, d, d) filtered half maps of the classes, of given shares of all N particles.

    Where the grids exceed the memory the sums wait on disk and the images are read once more.
    """
    return paired_half_maps(work, p, half, False)[0]


def paired_half_maps(
    work: ClassWork, p: ClassWeights, half: np.ndarray, pair: bool = True
) -> tuple[Tensor, np.ndarray]:
    """`half_maps` once the classes of the half sets are paired, and their `half_pairs.pairing` (K,)."""
    images = work.images
    r_max, used = images.box // 2, np.flatnonzero(np.diff(p.indptr))
    while len(work.groups(p.n_classes, r_max, 2)) == 1:
        found = work.accumulated(p, [used[half[used] == h] for h in (0, 1)], r_max)
        if found is not None:
            return first_filters(work, partial(class_sums, images, found, p, half), p.n_classes, pair)
    how = {"box": images.box, "memory_gib": work.memory / 2**30, "processes": work.processes}
    with accumulate(images.particles, p, half.astype(np.int8), **how) as sums:
        return first_filters(work, lambda: sums, p.n_classes, pair)


def first_filters(
    work: ClassWork, sums: Callable[[], ClassSums], n_classes: int, pair: bool = False
) -> tuple[Tensor, np.ndarray]:
    """`filtered` half maps (2, K, d, d, d) of sums that the first process has, and the (K,) order in which the classes
    of half set 1 were put before (with ``pair``, else as they are); in all processes."""
    made: list[ClassSums] = []

    def put_in_order() -> np.ndarray:
        made.append(sums())
        if not pair:
            return np.arange(n_classes)
        order = pairing(made[0])
        made[0].exchange(order, 1)
        return order

    order = work.processes.first_does(put_in_order)
    return work.first_makes(lambda: filtered(made[0], work.threads), (2, n_classes, *[work.images.box] * 3)), order


def class_sums(
    images: ClusterImages, found: list[kernel.ClassAccumulator], p: ClassWeights, half: np.ndarray
) -> ClassSums:
    """The accumulators of both half sets as `polish` takes them; p: shares of the images, half: (n,) of each."""
    counts = np.stack([p.rows(np.flatnonzero(half == h)).usage() for h in (0, 1)], 1)
    kept = {
        (k, h): slices.Accumulator(acc.data[k].cpu(), images.box, acc.pad)
        for h, acc in enumerate(found)
        for k in range(p.n_classes)
    }
    pixel_size = images.pixel_size * images.particles.box_size / images.box
    return ClassSums(p.n_classes, images.box, pixel_size, counts, images.box // 2, kept)


def filtered(sums: ClassSums, threads: int = 0) -> Tensor:
    """Half maps (2, K, d, d, d) of all classes, in some threads; those without images in one half get the mean of the
    others."""
    size = sums.box_size
    used = np.flatnonzero((sums.counts > 0).all(1))
    if not len(used):
        return torch.zeros(2, sums.n_classes, size, size, size)
    part = sums if len(used) == sums.n_classes else _columns(sums, used)
    found = polish(part, threads=threads)
    halves = torch.stack([found.half_a, found.half_b])
    if part is sums:
        return halves
    share = torch.from_numpy(sums.counts.sum(1)[used]).float()
    mean = torch.einsum("k,hkxyz->hxyz", share / share.sum(), halves)
    out = mean[:, None].repeat(1, sums.n_classes, 1, 1, 1)
    out[:, used] = halves
    return out


def _columns(sums: ClassSums, used: np.ndarray) -> ClassSums:
    """The sums of some classes."""
    kept = {(at, h): sums.load(int(k), h) for at, k in enumerate(used) for h in (0, 1)}
    return ClassSums(len(used), sums.box_size, sums.pixel_size, sums.counts[used], sums.r_max, kept)
