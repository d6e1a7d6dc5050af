"""The voxel field of train-kraqen: K maps and soft assignments by expectation maximisation, poses and CTF known.

A code is a map in the cluster box. The E-step scores every image against all K slices in one gather
(kernels.class_slices), the M-step is a pooled Wiener filter of the weighted sums (kraqen_maps). Both happen in one pass
over the images of an iteration. Images come in fresh random subsets that grow, the last iterations take all of them;
the radius grows over the first half; codes that nobody uses become copies of the busiest.

`kraqen_cross` has the same engine with held-out scores, the default.

Memory: coefficients of all images in the cluster box where they fit 4 GiB (19 KB each at D = 64), else they are read
again in every iteration; grids of 20 bytes per voxel and code (23 MB at D = 64). Where the grids exceed ``memory_gib``
the codes are taken in groups: one pass per group for the scores, one for the sums, and the scores wait in memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryosuite import __version__
from cryosuite.console import Progress
from cryosuite.data.particles import ParticleSet
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.atomic import remove_leftovers
from cryosuite.kernels import assignment, fourier
from cryosuite.kernels import class_slices as kernel
from cryosuite.methods.kraqen_expectation import Expectation
from cryosuite.methods.kraqen_maps import Wiener, code_maps, split_dead
from cryosuite.methods.kraqen_options import KraqenOptions
from cryosuite.reconstruct.class_images import CACHE_GIB, Chunk, ClusterImages
from cryosuite.reconstruct.held_out import class_likelihoods
from cryosuite.reconstruct.weights import ClassWeights
from cryosuite.training import checkpoint
from cryosuite.training.guard import describe_images
from cryosuite.training.logs import MetricsLog, RunLog
from cryosuite.training.options import plain
from cryosuite.training.schedule import march
from cryosuite.training.signals import StopSignals, exit_code

MEMORY_GIB = 8.0  # of grids held at a time
LAST_ON_ALL = 4  # iterations
GROWTH = 4.0  # of the subset, from the first to the last one that is not the whole set
DEAD = 0.2  # of 1/K: share of the images below which a code is dead
NO_SPLIT_LAST = 3  # iterations
SETTLED = 1e-3  # share of the images whose best code changed, below which the EM ends


@dataclass
class State:
    """What an iteration leaves behind."""

    iteration: int  # iterations done
    volumes: Tensor  # (K, d, d, d) in the cluster box
    usage: np.ndarray  # (K,) share of the images, sum 1
    p: ClassWeights | None = None  # of all images, once an iteration has seen them all
    seconds: float = 0.0
    settled: bool = False  # hardly an image changed its code: more iterations would change nothing


@dataclass
class VoxelResult:
    """What the EM found.

    Attributes:
        codes: (K, d, d, d) maps in the cluster box. p: shares of N particles. usage: (K,) images per code.
        engine: what made it. history: the lines of metrics.jsonl. stopped: "" or the name of a signal.
    """

    codes: Tensor
    p: ClassWeights
    usage: np.ndarray
    engine: VoxelEM = field(repr=False)
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)
    stopped: str = ""

    @property
    def exit_code(self) -> int:
        """0, or the code that asks to be started again."""
        return exit_code(self.stopped)


class VoxelEM:
    """Expectation maximisation of K maps.

    Args:
        particles: with rotations. device: of the grids; "cpu" uses compiled loops in as many threads as torch has.
        memory_gib: of grids, cache_gib: of coefficients kept in memory.
    """

    def __init__(
        self,
        particles: ParticleSet,
        options: KraqenOptions,
        seed: int = 0,
        device: torch.device | str = "cpu",
        memory_gib: float = MEMORY_GIB,
        cache_gib: float = CACHE_GIB,
    ) -> None:
        self.particles, self.options, self.seed = particles, options, seed
        self.device, self.memory = torch.device(device), memory_gib * 2**30
        self.images = ClusterImages(particles, options.cluster_box, cache_gib)
        self.box, self.count = self.images.box, len(particles)
        self.codes = options.codes
        if self.codes > self.count:
            notice(f"{self.codes} codes for {self.count} images: {self.count} codes are used (see --n-codes)")
            self.codes = self.count
        self.threads, self.pool, self._wiener = 1, None, {}

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
        state, history = self._resume(run) if resume and run is not None else (None, [])
        metrics = MetricsLog(run.metrics, state.iteration if state else 0) if run is not None else None
        log = RunLog(run.log) if run is not None else None
        stopped, began = "", time.monotonic()
        sizes = [len(self.rows(i, total, start is not None)) for i in range(total)]
        done = sum(sizes[: state.iteration]) if state else 0
        bar = Progress(sum(sizes), label, "images", done) if progress else nullcontext()
        with self.threads_of_torch(), StopSignals() as signals, bar:
            state = state or State(0, self._first(start), np.full(self.codes, 1 / self.codes))
            while state.iteration < total and not stopped and not state.settled:
                found = self._iterate(state, total, start is not None, signals, bar if progress else None)
                if found is None:
                    stopped = signals.received
                    break
                state, record = found
                history.append(record)
                if run is not None:
                    metrics.write(record)  # before the checkpoint: a line beyond it is dropped on resume
                    self.save(run, state, history)
                if on_iteration is not None:
                    on_iteration(state, record)
                late = max_minutes is not None and time.monotonic() - began > 60 * max_minutes
                if late and state.iteration < total and not state.settled:
                    stopped = "max_minutes"
        if self.images.bad.any():
            rows = np.flatnonzero(self.images.bad)
            notice(f"{len(rows)} of {self.count} images were left out. {describe_images(self.particles, rows[:100])}")
        if log is not None:
            log.write(f"stopped by {stopped} after iteration {state.iteration}" if stopped else "finished")
        p = state.p if state.p is not None else ClassWeights.from_labels(np.full(self.count, -1), self.codes)
        return VoxelResult(self.joint(state.volumes), p, p.usage(), self, history, stopped)

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

    # --- one iteration -----------------------------------------------------------------------------------------------

    def _iterate(self, state: State, total: int, everything: bool, signals: StopSignals, bar: Progress | None):
        """(new state, its line of metrics), or None when a signal asked to stop."""
        began, o, done = time.monotonic(), self.options, state.iteration
        fraction = done / max(total - 1, 1)
        r_max = self.box // 2 if everything else self.radius(done / total)
        temperature = assignment.annealed(fraction, o.t_max, o.t_min, o.anneal_over, o.anneal)
        strength = self.balance(fraction, everything)
        step = Expectation(self, state.usage, temperature, strength, r_max)
        rows = self.rows(done, total, everything)
        sums = self._pass(state.volumes, rows, step, signals, bar)
        if sums is None:
            return None
        volumes = sums
        p = step.table()
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
        if whole is not None and state.p is not None and not pairs:
            settled = bool((state.p.labels() != whole.labels()).mean() < SETTLED)
        return State(done + 1, volumes, usage, whole, state.seconds + seconds, settled), record

    def _pass(self, volumes: Tensor, rows: np.ndarray, step: Expectation, signals: StopSignals, bar: Progress | None):
        """E-step and sums of some images; the new maps, or None when a signal asked to stop."""
        disc = fourier.half_disc(self.box, step.r_max, self.device)
        if len(self._groups(step.r_max)) == 1:
            transforms = kernel.class_transforms(volumes.to(self.device), step.r_max)
            acc = kernel.new_class_accumulator(self.codes, step.r_max, device=self.device)
            for chunk in self.chunks(rows, step.r_max):
                step.score(chunk, [self._sums(transforms, chunk, disc)])
                self._insert(acc, chunk, step.shares(-1), disc)
                if bar is not None:
                    bar.advance(len(chunk.rows))
                if signals.received:
                    return None
            del transforms
            return self._maps(acc)
        found = []
        for group in self._groups(step.r_max):
            transforms, part = kernel.class_transforms(volumes[group].to(self.device), step.r_max), []
            for chunk in self.chunks(rows, step.r_max):
                part.append([value.float() for value in self._sums(transforms, chunk, disc)])
                if signals.received:
                    return None
            found.append(part)
            del transforms
        for number, chunk in enumerate(self.chunks(rows, step.r_max)):
            step.score(chunk, [part[number] for part in found])
            if bar is not None:
                bar.advance(len(chunk.rows))
        maps = self.maps(step.table(rows, self.count), step.r_max, signals)
        return None if signals.received else maps

    def _sums(self, transforms: kernel.ClassTransforms, chunk: Chunk, disc: fourier.HalfDisc):
        return kernel.class_sums(transforms, chunk.values, chunk.weights, chunk.rotation, disc, self.pool, self.threads)

    def _insert(self, acc: kernel.ClassAccumulator, chunk: Chunk, table: ClassWeights, disc: fourier.HalfDisc) -> None:
        rows = tuple(torch.from_numpy(part) for part in (table.data, table.indices, table.indptr))
        kernel.insert_classes(acc, chunk.values, chunk.weights, rows, chunk.rotation, disc, self.pool, self.threads)

    def chunks(self, rows: np.ndarray, r_max: int) -> Iterator[Chunk]:
        """Coefficients of some rows, on the device of the grids."""
        for chunk in self.images.chunks(rows, r_max):
            yield chunk if self.device.type == "cpu" else Chunk(chunk.rows, *(v.to(self.device) for v in chunk[1:]))

    def _groups(self, r_max: int, sets: int = 1) -> list[np.ndarray]:
        """Codes whose grids fit the memory together."""
        fit = max(1, int(self.memory // (sets * kernel.grid_bytes(r_max))))
        return np.array_split(np.arange(self.codes), -(-self.codes // fit))

    # --- maps of given shares ----------------------------------------------------------------------------------------

    def maps(self, p: ClassWeights, r_max: int | None = None, signals: StopSignals | None = None) -> Tensor:
        """(K, d, d, d) maps of given shares: one pass over the images for each group of codes."""
        r_max = self.box // 2 if r_max is None else r_max
        disc = fourier.half_disc(self.box, r_max, self.device)
        parts = []
        for group in np.array_split(np.arange(p.n_classes), -(-p.n_classes * len(self._groups(r_max)) // self.codes)):
            part = p.columns(group)
            acc = kernel.new_class_accumulator(len(group), r_max, device=self.device)
            for chunk in self.chunks(np.flatnonzero(np.diff(part.indptr)), r_max):
                self._insert(acc, chunk, part.rows(chunk.rows), disc)
                if signals is not None and signals.received:
                    break
            parts.append(self._maps(acc))
        return torch.cat(parts)

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
        return class_likelihoods(
            self.images, maps, rows, r_max, device=self.device, memory_gib=self.memory / 2**30, pool=self.pool,
            threads=self.threads,
        )  # fmt: skip

    def _maps(self, acc: kernel.ClassAccumulator) -> Tensor:
        if acc.r_max not in self._wiener:
            wiener = Wiener(self.box, acc.r_max, self.images.power, self.options.prior)
            self._wiener = {acc.r_max: wiener.to(self.device)}
        return code_maps(acc, self._wiener[acc.r_max], self.pool).cpu()

    # --- threads, saving, resuming -----------------------------------------------------------------------------------

    @contextmanager
    def threads_of_torch(self) -> Iterator[None]:
        """Compiled loops in as many threads as torch had; torch itself in one, or sums would depend on their number."""
        if self.pool is not None:
            yield
            return
        before = self.threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(before) as self.pool:
                yield
        finally:
            self.pool = None
            torch.set_num_threads(before)

    def _identity(self) -> dict[str, Any]:
        return {
            "options": {"seed": self.seed},
            "method": {"name": "kraqen", "options": plain(self.options)},
            "particles": checkpoint.fingerprint(self.particles),
        }

    def save(self, run: RunDir, state: State, history: list[dict[str, Any]]) -> None:
        """Write the checkpoint of an iteration."""
        p = None if state.p is None else [torch.from_numpy(part) for part in state.p.to_arrays()]
        values = {"iteration": state.iteration, "volumes": state.volumes, "usage": torch.from_numpy(state.usage)}
        values |= {"settled": state.settled, "p": p, "seconds": state.seconds, "history": history, "field": "voxel"}
        values |= self._identity()
        checkpoint.save_state(run.checkpoint, {"format": checkpoint.FORMAT, "version": __version__, **values})

    def _resume(self, run: RunDir) -> tuple[State, list[dict[str, Any]]]:
        path = run.checkpoint
        stored = checkpoint.load_state(path, "a checkpoint")
        if stored.get("field") != "voxel":
            raise InputError(f"{path}: not a checkpoint of train-kraqen's voxel field")
        checkpoint.refuse_differences(path, stored, self._identity())
        remove_leftovers(path)
        p = None if stored["p"] is None else ClassWeights.from_arrays([v.numpy() for v in stored["p"]], str(path))
        state = State(stored["iteration"], stored["volumes"], stored["usage"].numpy(), p, stored["seconds"])
        state.settled = stored["settled"]
        return state, list(stored["history"])
