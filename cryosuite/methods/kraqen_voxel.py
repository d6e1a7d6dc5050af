"""The voxel field of train-kraqen: K maps and soft assignments by expectation maximisation, poses and CTF known.

A code is a map in the cluster box. The E-step scores every image against all K slices in one gather
(kernels.class_slices), the M-step is a pooled Wiener filter of the weighted sums (kraqen_maps). Both happen in one pass
over the images of an iteration. Images come in fresh random subsets that grow, the last iterations take all of them;
the radius grows over the first half; codes that nobody uses become copies of the busiest.

`kraqen_cross` has the same engine with held-out scores, the default.

Memory: coefficients of all images in the cluster box where they fit 4 GiB (19 KB each at D = 64), else they are read
again in every iteration; grids of 20 bytes per voxel and code (23 MB at D = 64). Where the grids exceed ``memory_gib``
the codes are taken in groups: one pass per group for the scores, one for the sums, and the scores wait in memory.

Several processes share the images (`reconstruct.class_work`): all call the same functions and get the same results,
the first one writes. What is drawn at random is drawn for the whole set, in each of them.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryosuite.console import Progress
from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, notice
from cryosuite.kernels import assignment
from cryosuite.kernels import class_slices as kernel
from cryosuite.methods import kraqen_state
from cryosuite.methods.kraqen_expectation import Expectation
from cryosuite.methods.kraqen_maps import Wiener, code_maps, split_dead
from cryosuite.methods.kraqen_options import KraqenOptions
from cryosuite.methods.kraqen_state import State, VoxelResult
from cryosuite.reconstruct.class_images import CACHE_GIB, ClusterImages
from cryosuite.reconstruct.class_work import MEMORY_GIB, ClassWork
from cryosuite.reconstruct.weights import ClassWeights
from cryosuite.training import checkpoint
from cryosuite.training.guard import describe_images
from cryosuite.training.options import plain
from cryosuite.training.schedule import march
from cryosuite.training.signals import StopNow, StopSignals

LAST_ON_ALL = 4  # iterations
GROWTH = 4.0  # of the subset, from the first to the last one that is not the whole set
DEAD = 0.2  # of 1/K: share of the images below which a code is dead
NO_SPLIT_LAST = 3  # iterations
SETTLED = 1e-3  # share of the images whose best code changed, below which the EM ends


class VoxelEM:
    """Expectation maximisation of K maps.

    Args:
        particles: with rotations. device: of the grids; "cpu" uses compiled loops in as many threads as torch has.
        memory_gib: of grids, cache_gib: of coefficients kept in memory. processes: that share the images.
    """

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
        self.particles, self.options, self.seed, self.processes = particles, options, seed, processes
        self.images = processes.each(lambda: ClusterImages(particles, options.cluster_box, cache_gib))
        self.work = ClassWork(self.images, device, memory_gib, processes)
        self.device = self.work.device
        self.box, self.count = self.images.box, len(particles)
        self.codes = options.codes
        if self.codes > self.count:
            notice(f"{self.codes} codes for {self.count} images: {self.count} codes are used (see --n-codes)")
            self.codes = self.count
        self._wiener: dict[int, Wiener] = {}
        # (N, 2) shifts that came with the particles, and those they were moved to
        self.given_shift, self.refined_shift = particles.shift, None

    # --- the run -----------------------------------------------------------------------------------------------------

    def run(
        self,
        start: ClassWeights | None = None,
        run: RunDir | None = None,
        resume: bool = False,
        progress: bool = True,
        on_iteration: Any = None,
        max_minutes: float | None = None,
        label: str = "train kraqen",
    ) -> VoxelResult:
        """All iterations, from a random partition or from given shares.

        With ``start`` every iteration takes all images at full radius and no code is split (`finish`). With ``run`` a
        checkpoint and a line of metrics.jsonl are written after each iteration; ``resume`` goes on exactly after the
        last of them. SIGTERM, SIGUSR1 and Ctrl-C end it at the next chunk of images; the interrupted iteration is
        done again on resume. ``max_minutes`` ends it after the iteration in which they have passed.
        """
        total = self.options.em_finish if start is not None else self.options.iterations
        if total < 1:
            raise InputError(f"{total} iterations: at least one is needed")
        state, history = (None, [])
        if resume and run is not None:
            state, history = self.processes.each(lambda: kraqen_state.load(run, self._identity()))
        records = kraqen_state.Records(run, state.iteration if state else 0, self.processes)
        stopped, began = "", time.monotonic()
        display = self._display(state, total, start, label) if progress else nullcontext()
        with self.threads_of_torch(), StopSignals() as signals, display as bar:
            if state is None:
                state = State(0, self._first(start), np.full(self.codes, 1 / self.codes), shift=self.refined_shift)
            elif state.shift is not None:
                self.move(state.shift)
            while state.iteration < total and not stopped and not state.settled:
                try:
                    state, record = self._iterate(state, total, start is not None, signals, bar)
                except StopNow as stop:
                    stopped = str(stop)
                    break
                history.append(record)
                records.keep(state, history, self._identity)
                if on_iteration is not None:
                    on_iteration(state, record)
                minutes = self.processes.first_does(lambda: (time.monotonic() - began) / 60)
                if max_minutes is not None and minutes > max_minutes and state.iteration < total and not state.settled:
                    stopped = "max_minutes"
            if not stopped:  # while the maps of the last iteration were made; much may come after it
                stopped = next(filter(None, self.processes.everyone(lambda: signals.received)), "")
        if self.images.bad.any():
            rows = np.flatnonzero(self.images.bad)
            notice(f"{len(rows)} of {self.count} images were left out. {describe_images(self.particles, rows[:100])}")
        records.end(state.iteration, stopped)
        p = state.p if state.p is not None else ClassWeights.from_labels(np.full(self.count, -1), self.codes)
        return VoxelResult(self.joint(state.volumes), p, p.usage(), self, history, stopped)

    def _display(
        self, state: State | None, total: int, start: ClassWeights | None, label: str
    ) -> AbstractContextManager[Progress | None]:
        """The progress display of the first process: of its own images."""
        if not self.processes.first:
            return nullcontext()
        sizes = [len(self.processes.mine(self.rows(i, total, start is not None))) for i in range(total)]
        return Progress(sum(sizes), label, "images", sum(sizes[: state.iteration]) if state else 0)

    def rows(self, iteration: int, total: int, everything: bool) -> np.ndarray:
        """Rows of an iteration (counted from 0): a fresh random subset, all of them in the last ones."""
        early = total - LAST_ON_ALL
        if everything or iteration >= early:
            return np.arange(self.count)
        size = self.options.images_per_code * self.codes * GROWTH ** (iteration / max(early - 1, 1))
        if size >= self.count:
            return np.arange(self.count)
        return np.sort(np.random.default_rng([self.seed, 1, iteration]).choice(self.count, round(size), replace=False))

    def _first(self, start: ClassWeights | None) -> Tensor:
        """The first maps: of given shares, or of a random partition of some images."""
        half = self.box // 2
        if start is not None:
            self.check(start)
            return self.maps(start, half)
        generator = np.random.default_rng([self.seed, 0])
        rows = generator.permutation(self.count)[: max(self.options.start_images, self.codes)]
        labels = np.full(self.count, -1)
        labels[rows] = np.arange(len(rows)) % self.codes
        return self.maps(ClassWeights.from_labels(labels, self.codes), self.radius(0.0))

    def check(self, start: ClassWeights) -> None:
        """Refuse shares of other particles or of another number of codes."""
        if len(start) != self.count or start.n_classes != self.codes:
            raise InputError(
                f"shares of {len(start)} particles in {start.n_classes} classes do not fit {self.count} "
                f"particles and {self.codes} codes"
            )

    def balance(self, fraction: float, everything: bool) -> float:
        """How strongly busy codes are held back (`assignment.balance`) after a fraction of the run."""
        return 0.0 if everything else assignment.balance_strength(fraction, self.options.balance)

    def align(self, p: ClassWeights | None = None) -> bool:
        """Refine shifts, where maps are held out (`kraqen_cross`); whether any were moved."""
        return False

    def move(self, shift: np.ndarray) -> None:
        """Give the particles other shifts (N, 2), fraction of the box."""
        self.images.move(shift)
        self.particles, self.refined_shift = self.images.particles, shift

    def joint(self, volumes: Tensor) -> Tensor:
        """One map (K, d, d, d) of each code."""
        return volumes

    def split(self, volumes: Tensor, counts: np.ndarray, threshold: float, seed: int) -> list[tuple[int, int]]:
        """Put busy codes in the place of dead ones; volumes are changed in place. (dead, parent) pairs."""
        return split_dead(volumes, counts, threshold, torch.Generator().manual_seed(seed))

    def radius(self, fraction: float) -> int:
        """r_max in pixels of the cluster box after a fraction of the run; whole rings."""
        half = self.box // 2
        return max(2, math.ceil(march(fraction, self.options.march_from * half, half, self.options.march_over)))

    def schedule(self, iteration: int, total: int, everything: bool) -> tuple[float, float, int]:
        """(temperature, strength of the balance, r_max) of an iteration, counted from 0; from given shares the last."""
        o, fraction = self.options, iteration / max(total - 1, 1)
        if everything:
            return o.t_min, self.balance(fraction, True), self.box // 2
        temperature = assignment.annealed(fraction, o.t_max, o.t_min, o.anneal_over, o.anneal)
        return temperature, self.balance(fraction, False), self.radius(iteration / total)

    # --- one iteration -----------------------------------------------------------------------------------------------

    def _iterate(self, state: State, total: int, everything: bool, signals: StopSignals, bar: Progress | None):
        """(new state, its line of metrics); raises StopNow in all processes when a signal asked one of them to stop."""
        began, o, done = time.monotonic(), self.options, state.iteration
        temperature, strength, r_max = now = self.schedule(done, total, everything)
        step = Expectation(o, self.work, state.usage, temperature, strength, r_max)
        rows = self.rows(done, total, everything)
        volumes = self._pass(state.volumes, rows, step, signals, bar)
        p = step.whole
        counts = np.bincount(p.labels()[p.labels() >= 0], minlength=self.codes).astype(float)
        usage = p.usage() / max(p.usage().sum(), 1e-30)
        pairs = []
        if o.split and not everything and done % 2 == 1 and done + 1 <= total - NO_SPLIT_LAST:
            seed = np.random.SeedSequence([self.seed, 2, done]).generate_state(1)[0]
            pairs = self.split(volumes, counts, DEAD / self.codes, int(seed))
            for dead, parent in pairs:
                usage[dead] = usage[parent] = usage[parent] / 2
            usage /= usage.sum()
        seconds = time.monotonic() - began
        positive = usage[usage > 0]
        record = {
            "step": done + 1,
            "iteration": done + 1,
            "epoch": done + 1,
            "images": len(rows),
            "loss": -step.log_likelihood / max(len(rows), 1),
            "log_likelihood": step.log_likelihood / max(len(rows), 1),
            "usage_entropy": float(-(positive * np.log(positive)).sum()),
            "live": int((counts >= DEAD / self.codes * max(counts.sum(), 1)).sum()),
            "split": len(pairs),
            "entropy": float(p.entropy().mean()) if len(p) else 0.0,
            "temperature": float(temperature),
            "r_max": int(r_max),
            "images_per_s": len(rows) / max(seconds, 1e-9),
            "seconds": state.seconds + seconds,
        }
        whole = p if len(rows) == self.count else None
        settled = False
        if (
            whole is not None
            and state.p is not None
            and not pairs
            and now == self.schedule(total - 1, total, everything)
        ):
            settled = bool((state.p.labels() != whole.labels()).mean() < SETTLED)
        seconds += state.seconds
        return State(done + 1, volumes, usage, whole, seconds, settled, state.shift), record

    def _pass(self, volumes: Tensor, rows: np.ndarray, step: Expectation, signals: StopSignals, bar: Progress | None):
        """E-step and sums of some images; the new maps. Raises StopNow when a signal asked to stop."""
        sums = self._expect([(volumes, self.processes.mine(rows))], step, signals, bar)
        if sums is not None:
            return self._joint_maps(sums)
        maps = self.maps(step.spread(rows, self.count), step.r_max, signals)
        _heed(self.processes.everyone(lambda: signals.received))
        return maps

    def _expect(
        self, pairs: list[tuple[Tensor, np.ndarray]], step: Expectation, signals: StopSignals, bar: Progress | None
    ) -> list[kernel.ClassAccumulator] | None:
        """E-step of all processes' images: each pair is maps (K, d, d, d) and the own rows that they judge.

        Returns the sums of each pair's images, complete in the first process; None where grids do not fit together.
        """
        found = None
        while found is None:
            groups, kept = self._groups(step.r_max, len(pairs)), []
            found = self._expect_once(pairs, step, groups, kept, signals, bar)
        _heed(found)
        order = np.argsort(np.concatenate([rows for _, rows in pairs]), kind="stable")
        step.share(order)
        for acc in kept:
            self.work.add_up(acc)
        return kept or None

    def _expect_once(self, pairs, step, groups, kept, signals, bar) -> list[str] | None:
        """The signal that each process got, None where memory ran out; sums in ``kept`` if there is one group."""

        def expect() -> str:
            kept.clear()
            step.restart()
            for volumes, rows in pairs:
                if len(groups) == 1:
                    kept.append(self.work.accumulator(self.codes, step.r_max))
                self._score(volumes, rows, step, groups, kept[-1] if kept else None, signals, bar)
            return signals.received

        return self.work.once(expect)

    def _score(self, volumes, rows, step, groups, acc, signals, bar) -> None:
        """Scores of the images of a pair, inserted at once where there is an accumulator; left out after a signal."""
        work, disc = self.work, self.work.disc(step.r_max)
        parts: list[list] = []
        for number, group in enumerate(groups):
            transforms = work.transforms(volumes[group], step.r_max)
            for at, chunk in enumerate(work.chunks(rows, step.r_max)):
                found = work.sums(transforms, chunk, disc)
                if acc is None:
                    parts.append([]) if number == 0 else None
                    parts[at].append([value.float() for value in found])
                else:
                    step.score(chunk, [found])
                    work.insert(acc, chunk, step.parts[-1], disc)
                if number == 0 and bar is not None:
                    bar.advance(len(chunk.rows))
                if signals.received:
                    return
            del transforms
        for at, chunk in enumerate(work.chunks(rows, step.r_max)) if acc is None else ():
            step.score(chunk, parts[at])

    def _groups(self, r_max: int, sets: int = 1) -> list[np.ndarray]:
        """Codes whose grids fit the memory together."""
        return self.work.groups(self.codes, r_max, sets)

    # --- maps of given shares ----------------------------------------------------------------------------------------

    def maps(self, p: ClassWeights, r_max: int | None = None, signals: StopSignals | None = None) -> Tensor:
        """(K, d, d, d) maps of given shares: one pass over the images for each group of codes."""
        r_max = self.box // 2 if r_max is None else r_max
        done, parts = 0, []
        while done < p.n_classes:
            fit = len(self.work.groups(p.n_classes, r_max)[0])
            made = self._maps_of(p.columns(np.arange(done, min(done + fit, p.n_classes))), r_max, signals)
            if made is not None:
                parts.append(made)
                done += fit
        return torch.cat(parts)

    def _maps_of(self, p: ClassWeights, r_max: int, signals: StopSignals | None) -> Tensor | None:
        """Maps of codes whose grids fit the memory; None where they did not."""
        rows, stop = np.flatnonzero(np.diff(p.indptr)), lambda: signals is not None and bool(signals.received)
        sums = self.work.accumulated(p, [rows], r_max, stop)
        return None if sums is None else self._joint_maps(sums)

    def _joint_maps(self, sums: list[kernel.ClassAccumulator]) -> Tensor:
        """Maps of the sums of all images, which the first process makes."""
        (acc,) = sums
        return self.work.first_makes(lambda: self._maps(acc), (acc.n_classes, *[self.box] * 3))

    def halves(self, p: ClassWeights, r_max: int) -> tuple[Tensor, Tensor]:
        """Maps (K, d, d, d) of each half set, up to radius r_max."""
        half = self.particles.half_sets()
        tables = []
        for h in (0, 1):
            keep = np.repeat(half == h, np.diff(p.indptr))
            starts = np.concatenate([[0], np.cumsum(np.diff(p.indptr) * (half == h))]).astype(np.int64)
            tables.append(ClassWeights(p.data[keep], p.indices[keep], starts, p.n_classes))
        with self.threads_of_torch():
            return self.maps(tables[0], r_max), self.maps(tables[1], r_max)

    def scores(self, maps: Tensor, rows: np.ndarray, r_max: int) -> np.ndarray:
        """Log-likelihoods (n, K) of some images under maps (K, d, d, d), up to a constant of the image."""
        return self.work.likelihoods(maps, rows, r_max)

    def _maps(self, acc: kernel.ClassAccumulator) -> Tensor:
        if acc.r_max not in self._wiener:
            wiener = Wiener(self.box, acc.r_max, self.images.power, self.options.prior)
            self._wiener = {acc.r_max: wiener.to(self.device)}
        return code_maps(acc, self._wiener[acc.r_max], self.work.pool)

    def threads_of_torch(self) -> AbstractContextManager[None]:
        """Compiled loops in as many threads as torch had, torch itself in one (`ClassWork.threads_of_torch`)."""
        return self.work.threads_of_torch()

    def _identity(self) -> dict[str, Any]:
        return {
            "options": {"seed": self.seed},
            "method": {"name": "kraqen", "options": plain(self.options)},
            "particles": checkpoint.fingerprint(self.particles),
        }


def _heed(received: list[str]) -> None:
    """Raise StopNow, in all processes, where one of them got a signal."""
    for name in received:
        if name:
            raise StopNow(name)
