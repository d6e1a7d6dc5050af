"""The voxel field with held-out scores: images choose by maps of the other half set, cleaned as `polish` does.

An image that lies in the map it is scored with prefers that map by what its own noise adds to it. With 150 images per
state at SNR 0.1 this is worth some 180 log units, more than the states differ by: whatever the first partition was,
it stays (measured: expectation maximisation from true and from wrong labels both stand still). So the maps come in two
half sets and score each other's images only. Half the images give noisier maps, so the M-step is the local modal
Wiener filter of BENCHMARKS section 5 (`reconstruct.polish`), which lends a code what its relatives have in common with
it. Measured, 2,400 images of D = 64, SNR .1, ARI before and after: assembly .27 -> .94, loop .17 -> .95.

Memory: two accumulators of 12 bytes per voxel and code (3.7 MB a code at a box of 32, 28 MB at 64); where they exceed
``memory_gib`` the sums wait on disk and the images are read once more in each iteration.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from cryosuite.console import Progress
from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.errors import notice
from cryosuite.methods.kraqen_expectation import Expectation
from cryosuite.methods.kraqen_maps import split_dead
from cryosuite.methods.kraqen_options import KraqenOptions
from cryosuite.methods.kraqen_state import State
from cryosuite.methods.kraqen_voxel import VoxelEM
from cryosuite.reconstruct import half_pairs, held_out, shifts
from cryosuite.reconstruct.class_images import CACHE_GIB
from cryosuite.reconstruct.class_work import MEMORY_GIB
from cryosuite.reconstruct.weights import ClassWeights
from cryosuite.training.signals import StopSignals

FEWEST = 8  # particles, below which nothing can be held out
COARSE_BOX = 32  # of the search
FIRST_IMAGES = 100  # per code, in the first iteration: of fewer, half maps show nothing in common


def engine_for(
    particles: ParticleSet,
    options: KraqenOptions,
    seed: int = 0,
    device: torch.device | str = "cpu",
    least_box: int = 0,
    processes: Processes = ALONE,
) -> VoxelEM:
    """The engine of some options: held-out scores (``m_step`` "local"), or every image in all maps ("wiener").

    Args:
        least_box: of the cluster box, for the iterations at the end of a run (the particles' box is never exceeded).
        processes: that share the images.
    """
    if options.m_step == "wiener" or len(particles) < FEWEST:
        return VoxelEM(particles, options.changed(m_step="wiener"), seed, device, processes=processes)
    box = max(options.cluster_box or COARSE_BOX, least_box)
    options = options.changed(cluster_box=min(particles.box_size, box))
    return CrossEM(particles, options, seed, device, processes=processes)


class CrossEM(VoxelEM):
    """Expectation maximisation of K codes with two half maps each (see the module); volumes are (2, K, d, d, d)."""

    def __init__(
        self,
        particles: ParticleSet,
        options: KraqenOptions,
        seed: int = 0,
        device: torch.device | str = "cpu",
        memory_gib: float = MEMORY_GIB,
        cache_gib: float = CACHE_GIB,
        processes: Processes = ALONE,
    ) -> None:
        super().__init__(particles, options, seed, device, memory_gib, cache_gib, processes)
        self.half, self.pair_halves = np.asarray(particles.half_sets()), False
        smaller = min(int((self.half == h).sum()) for h in (0, 1))
        if smaller < min(self.codes, len(particles) // 4):
            notice(
                f"one half set holds {smaller} of {len(particles)} particles: to hold images out, the run makes random "
                "half sets of its own"
            )
            self.half = np.random.default_rng([seed, 5]).permutation(len(particles)) % 2

    # --- what differs from the plain engine ---------------------------------------------------------------------------

    def radius(self, fraction: float) -> int:
        """Always all of the (small) box: the filter itself keeps back what is noise."""
        return self.box // 2

    def rows(self, iteration: int, total: int, everything: bool) -> np.ndarray:
        """As the plain engine's, with more images per code."""
        size = FIRST_IMAGES * self.codes
        if everything or size >= self.count:
            return np.arange(self.count)
        rows = super().rows(iteration, total, everything)
        if len(rows) >= size:
            return rows
        return np.sort(np.random.default_rng([self.seed, 1, iteration]).choice(self.count, size, replace=False))

    def balance(self, fraction: float, everything: bool) -> float:
        """-1: a code counts by its share of the images (Bayes). Rare twins of a busy code then die by themselves."""
        return -1.0

    def joint(self, volumes: Tensor) -> Tensor:  # (2, K, d, d, d) -> (K, d, d, d)
        """One map of each code."""
        return volumes.mean(0)

    def split(self, volumes: Tensor, counts: np.ndarray, threshold: float, seed: int) -> list[tuple[int, int]]:
        """Split busy codes, with one pattern for both halves, so that they agree on what the new codes look like.

        The noise is measured by how far a code lies from the mean of all, not by its map: states of one molecule
        differ little.
        """
        share = torch.from_numpy(counts / max(counts.sum(), 1)).float()
        for h in (0, 1):
            offset = volumes[h] - torch.tensordot(share, volumes[h], dims=1)
            rms = offset.square().mean((1, 2, 3)).sqrt()
            pairs = split_dead(volumes[h], counts, threshold, torch.Generator().manual_seed(seed), rms)
        return pairs

    def _first(self, start: ClassWeights | None) -> Tensor:
        if start is not None:
            self.check(start)
            return self.local_maps(start)
        self.align()
        generator = np.random.default_rng([self.seed, 0])
        count = max(self.options.start_images, FIRST_IMAGES * self.codes)
        labels = np.full(self.count, -1)
        for h in (0, 1):  # every code in both halves, as far as images go
            rows = generator.permutation(np.flatnonzero(self.half == h))[: -(-count // 2)]
            labels[rows] = np.arange(len(rows)) % self.codes
        return self.local_maps(ClassWeights.from_labels(labels, self.codes))

    def _pass(self, volumes: Tensor, rows: np.ndarray, step: Expectation, signals: StopSignals, bar: Progress | None):
        """E-step and sums of some images; the new half maps. Raises StopNow when a signal asked to stop."""
        own = self.processes.mine(rows)
        pairs = [(volumes[1 - h], own[self.half[own] == h]) for h in (0, 1)]
        sums = self._expect(pairs, step, signals, bar)
        half = self.half[rows]
        if sums is None:
            whole = step.spread(rows, self.count)
            maps, order = held_out.paired_half_maps(self.work, whole, self.half, self.pair_halves)
        else:
            found = partial(held_out.class_sums, self.images, sums, step.whole, half)
            maps, order = held_out.first_filters(self.work, found, self.codes, self.pair_halves)
        if (order != np.arange(self.codes)).any():
            step.whole = half_pairs.renamed(step.whole, half == 1, order)
        return maps

    def _iterate(self, state: State, total: int, everything: bool, signals: StopSignals, bar: Progress | None):
        self.pair_halves = not everything  # shares that were given have the halves in order
        return super()._iterate(state, total, everything, signals, bar)

    # --- shifts -------------------------------------------------------------------------------------------------------

    def align(self, p: ClassWeights | None = None) -> bool:
        """Refine the particles' shifts against the half maps of their codes, or of all of them together (None).

        Whether any were moved. Nothing happens without the option, and where `reconstruct.shifts` finds no errors.
        """
        if not self.options.refine_shifts:
            return False
        one = p is None
        if one:
            p = ClassWeights.from_labels(np.where(self.images.bad, -1, 0), 1)
        before = self.refined_shift
        with self.threads_of_torch():
            found = shifts.refine_shifts(
                self.work, p, self.half, self.given_shift, shifts.ROUNDS if one else 1, progress="shifts"
            )
        self.particles, self.refined_shift = self.images.particles, None if found is None else found.shift
        if found is None:
            return before is not None
        if before is None:
            notice(found.said(float(np.mean(self.particles.pixel_size)), "the run's poses.pkl has them"))
        return True

    # --- maps ---------------------------------------------------------------------------------------------------------

    def local_maps(self, p: ClassWeights) -> Tensor:
        """(2, K, d, d, d) filtered half maps of given shares of all N particles."""
        return held_out.half_maps(self.work, p, self.half)
