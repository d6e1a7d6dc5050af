"""Backprojection sums of many classes and both half sets from one pass over the images.

For class k and half set h, on the 2x padded half grid of `kernels.slices` (BENCHMARKS, section 5):

    B_k^h(q) = sum_{i in h} p_ik C_i X_i / sigma^2,    W_k^h(q) = sum_{i in h} p_ik C_i^2 / sigma^2

with the shares p_ik of `weights.ClassWeights`. One accumulator takes 12 (D + 1)^3 bytes (14 MB at D = 64, 104 MB at
D = 128). As many classes as fit the memory are summed at a time; the sums of finished classes go to a scratch folder
when all of them together would not fit. A particle is read once for each group of classes it has a share in: once,
where classes fit the memory or shares are nearly hard.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from cryosuite.console import Progress
from cryosuite.data.loader import read_ahead
from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.errors import FileError, InputError
from cryosuite.formats.atomic import free_space
from cryosuite.formats.scratch import claim_scratch, drop_scratch, remove_dead_scratch
from cryosuite.kernels import slices
from cryosuite.reconstruct.backproject import POINTS_PER_CHUNK, Accumulator
from cryosuite.reconstruct.weights import ClassWeights

SCRATCH = "cryosuite-sums-"  # starts the name of a scratch folder
MEMORY_GIB = 4.0  # accumulators held at a time
STRETCH_BYTES = 1 << 29  # of images within which they are taken in the order of classes


@dataclass
class ClassSums:
    """Sums of K classes and two half sets; ``load`` gives them one at a time.

    Attributes:
        n_classes: K; box_size: D of the maps; pixel_size: Angstrom per voxel of the maps.
        counts: (K, 2) sum of the shares in each half set, i.e. how many particles each map rests on.
        r_max: largest radius that was inserted, Fourier pixels.
    """

    n_classes: int
    box_size: int
    pixel_size: float
    counts: np.ndarray
    r_max: int
    kept: dict[tuple[int, int], slices.Accumulator] = field(default_factory=dict, repr=False)
    scratch: Path | None = None
    lock: int | None = None  # held until the scratch folder is deleted

    def load(self, k: int, h: int) -> slices.Accumulator:
        """The accumulator of class k and half set h (empty where the class has no particle there)."""
        if (k, h) in self.kept:
            return self.kept[k, h]
        path = self._file(k, h)
        if path is not None and path.exists():
            return slices.Accumulator(torch.from_numpy(np.load(path)), self.box_size, 2)
        return slices.new_accumulator(self.box_size)

    def joint(self, k: int) -> slices.Accumulator:
        """Both halves of class k together."""
        return self.load(k, 0) + self.load(k, 1)

    def take(self, group: np.ndarray, found: dict[tuple[int, int], slices.Accumulator], spill: bool) -> None:
        """Keep the sums of a group of classes, emptying ``found``, so that the next group has its memory."""
        for k, h in list(found):
            self.store(int(group[k]), h, found.pop((k, h)), spill)

    def store(self, k: int, h: int, sums: slices.Accumulator, spill: bool) -> None:
        """Keep a finished accumulator, in memory or in the scratch folder."""
        path = self._file(k, h)
        if not spill or path is None:
            self.kept[k, h] = sums
            return
        try:
            np.save(path, sums.data.numpy())
        except OSError as error:
            need, free = sums.data.numel() * 4 * 2 * self.n_classes / 2**30, free_space(path)
            room = "" if free is None else f"; {free / 2**30:.2g} GiB are free"
            raise FileError(
                f"{path.parent}: cannot write the sums of {self.n_classes} classes: it needs about {need:.2g} GiB in "
                f"all{room} ({error.strerror or error}): make room there, or write to a folder on another disk (-o)"
            ) from None

    def exchange(self, order: np.ndarray, h: int) -> None:
        """Give class k the sums of half set h that class order[k] had."""
        moved = {(k, h): self.kept.pop((other, h)) for k, other in enumerate(order.tolist()) if (other, h) in self.kept}
        self.kept.update(moved)
        files = [self._file(k, h) for k in range(self.n_classes)]
        aside = {k: path.rename(path.with_suffix(".old")) for k, path in enumerate(files) if path and path.exists()}
        for k, other in enumerate(order.tolist()):
            if other in aside:
                aside[other].rename(files[k])
        self.counts[:, h] = self.counts[order, h]

    def close(self) -> None:
        """Forget the sums and delete what lies in the scratch folder."""
        self.kept.clear()
        if self.lock is not None:
            drop_scratch(self.scratch, self.lock)
            self.lock = None

    def __enter__(self) -> ClassSums:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _file(self, k: int, h: int) -> Path | None:
        return None if self.scratch is None else self.scratch / f"sums_{k}_{h}.npy"


def accumulator_bytes(box_size: int, pad: int = 2) -> int:
    """Bytes of one accumulator of `kernels.slices`."""
    n = pad * box_size // 2 + 1
    return (2 * n + 1) ** 2 * (n + 1) * 3 * 4


def class_groups(count: int, box_size: int, memory_gib: float = MEMORY_GIB) -> list[np.ndarray]:
    """Classes 0 .. count - 1 in as few groups as the memory for the sums of both half sets allows."""
    fit = max(1, int(memory_gib * 2**30) // (2 * accumulator_bytes(box_size)))
    return np.array_split(np.arange(count), -(-count // fit))


def accumulate(
    particles: ParticleSet,
    weights: ClassWeights,
    half: np.ndarray | None = None,
    *,
    box: int | None = None,
    r_max: int | None = None,
    memory_gib: float = MEMORY_GIB,
    scratch: Path | None = None,
    progress: str | None = None,
    processes: Processes = ALONE,
) -> ClassSums:
    """Backprojection sums of all classes and both half sets.

    Args:
        particles: N particles with rotations.
        weights: shares of the N particles in K classes.
        half: (N,) 0 or 1, the half set of each particle; default that of the set (`ParticleSet.half_sets`).
        box: of the maps when smaller than that of the particles (even).
        r_max: largest radius inserted, Fourier pixels, default D/2.
        memory_gib: of sums held at a time. scratch: folder for sums beyond it (default: the system's temporary one).
        progress: label of a progress display.
        processes: that share the images; the sums are complete in the first one only.

    Raises:
        InputError: sizes that do not fit, no rotations, no particles; its FileError for a full scratch disk.
    """
    if len(weights) != len(particles):
        raise InputError(f"{len(weights)} rows of class shares for {len(particles)} particles: one each is needed")
    half = particles.half_sets() if half is None else np.asarray(half).astype(np.int8)
    engine = Accumulator(particles, None, r_max, box, processes)
    size, count = engine.map_box, weights.n_classes
    groups = class_groups(count, size, memory_gib)
    spill = len(groups) > 1
    pixel_size = engine.pixel_size * particles.box_size / size
    counts = np.stack([weights.rows(np.nonzero(half == h)[0]).usage() for h in (0, 1)], 1)
    if not counts.sum() > 0:
        raise InputError("no particle has a share in any class: check the labels and --ind")
    sums = ClassSums(count, size, pixel_size, counts, engine.disc.r_max)

    def make_room() -> None:
        remove_dead_scratch(SCRATCH, scratch)  # of many GB, which a killed run has left
        if spill:
            sums.scratch, sums.lock = claim_scratch(SCRATCH, scratch)

    processes.first_does(make_room)
    parts = [weights.columns(group) for group in groups]
    images = sum(int((np.diff(part.indptr) > 0).sum()) for part in parts) // processes.count
    bar = Progress(images, progress, "images") if progress and processes.first else None
    try:
        if bar is not None:
            bar.__enter__()
        for group, part in zip(groups, parts, strict=True):
            found = _run(engine, part, half, bar)
            processes.first_does(lambda group=group, found=found: sums.take(group, found, spill))
    except BaseException:
        sums.close()
        raise
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)
    return sums


def class_order(weights: ClassWeights, box_size: int) -> np.ndarray:
    """Rows with a share, in an order in which neighbours belong to the same class as far as reading allows.

    Insertion is bound by memory: an accumulator stays in the processor's cache while image after image goes into it.
    Rows are sorted by class within stretches of the stack, so that a disk is still read from front to back.
    """
    rows = np.nonzero(np.diff(weights.indptr) > 0)[0]
    stretch = max(1, STRETCH_BYTES // (4 * box_size**2))
    return rows[np.lexsort((rows, weights.labels()[rows], np.arange(len(rows)) // stretch))]


def _run(
    engine: Accumulator, weights: ClassWeights, half: np.ndarray, bar: Progress | None
) -> dict[tuple[int, int], slices.Accumulator]:
    """Sums of one group of classes, those of all processes added up in the first."""
    processes = engine.processes
    rows = processes.mine(class_order(weights, engine.particles.box_size))
    sums = processes.each(lambda: _inserted(engine, weights, rows, half, bar))
    engine.broken.share(processes)
    if processes.count > 1:
        for k, h in _present(weights, half):
            if (k, h) not in sums:
                sums[k, h] = slices.new_accumulator(engine.map_box)
            processes.add_up(sums[k, h].data)
            if not processes.first:
                del sums[k, h]
    return sums


def _inserted(
    engine: Accumulator, weights: ClassWeights, rows: np.ndarray, half: np.ndarray, bar: Progress | None
) -> dict[tuple[int, int], slices.Accumulator]:
    """Sums of some rows: reading, coefficients and the insertion into each half in threads of their own.

    Every half set is inserted in the same order, so the sums do not depend on timing.
    """
    step = max(1, POINTS_PER_CHUNK // len(engine.disc))
    sums: dict[tuple[int, int], slices.Accumulator] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(2) as pool:
            for part, coefficients in read_ahead(engine.prepared(rows, step), 2):
                table = weights.rows(part).matrix.tocsc()
                for h in (0, 1):
                    for k in np.nonzero(np.diff(table.indptr))[0].tolist():
                        if (k, h) not in sums and (half[part[_members(table, k)[0]]] == h).any():
                            sums[k, h] = slices.new_accumulator(engine.map_box)
                tasks = [pool.submit(_insert, engine, table, half[part], h, coefficients, sums) for h in (0, 1)]
                for task in tasks:
                    task.result()
                if bar is not None:
                    bar.advance(len(part))
    finally:
        torch.set_num_threads(threads)
    return sums


def _present(weights: ClassWeights, half: np.ndarray) -> list[tuple[int, int]]:
    """Classes and half sets that any particle has a share in, in one order for all processes."""
    used = [np.diff(weights.rows(np.flatnonzero(half == h)).matrix.tocsc().indptr) > 0 for h in (0, 1)]
    return [(k, h) for k in range(weights.n_classes) for h in (0, 1) if used[h][k]]


def _members(table: object, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a chunk that share in class k, and their shares."""
    where = slice(table.indptr[k], table.indptr[k + 1])
    return table.indices[where], table.data[where]


def _insert(engine: Accumulator, table: object, half: np.ndarray, h: int, coefficients: tuple, sums: dict) -> None:
    """Insert the rows of one half set of a chunk into all classes they share in."""
    for k in np.nonzero(np.diff(table.indptr))[0].tolist():
        rows, shares = _members(table, k)
        mine = half[rows] == h
        if not mine.any():
            continue
        pick, share = torch.from_numpy(rows[mine]).long(), torch.from_numpy(shares[mine])[:, None]
        values, weight, rotation = (value[pick] for value in coefficients)
        if bool((share != 1).any()):
            values, weight = values * share, weight * share
        slices.insert_slices(sums[k, h], values, weight, rotation, engine.map_disc)
