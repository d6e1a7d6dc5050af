"""Batches for training and inference: a deterministic order, contiguous reads, a prefetch thread.

Order: the rows are cut into blocks of neighbours (about 0.5 MB), the blocks are shuffled, and the rows of several
blocks (a window, at most 64 MB) are shuffled together. So a disk sees long runs, memory stays flat (three windows),
and a set smaller than one window is shuffled fully. The order depends on (seed, epoch, N, D, world size) alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryosuite.data.broken import Broken
from cryosuite.data.buffers import Buffers
from cryosuite.data.particles import ParticleSet
from cryosuite.errors import InputError

if TYPE_CHECKING:
    from cryosuite.data.processes import Processes
    from cryosuite.kernels.ctf import CtfParams

BLOCK_BYTES = 1 << 19
WINDOW_BYTES = 64 << 20


@dataclass
class Batch:
    """b particles as tensors; fields that the set does not know are None."""

    index: torch.Tensor  # (b,) int64 rows in the set
    images: torch.Tensor  # (b, D, D) float32
    rotation: torch.Tensor | None  # (b, 3, 3)
    shift: torch.Tensor | None  # (b, 2) fraction of the box
    ctf: CtfParams | None
    group: torch.Tensor  # (b,) int64 optics group

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""

        def move(value: torch.Tensor | None) -> torch.Tensor | None:
            return None if value is None else value.to(device, non_blocking=non_blocking)

        return replace(
            self,
            index=move(self.index),
            images=move(self.images),
            rotation=move(self.rotation),
            shift=move(self.shift),
            ctf=None if self.ctf is None else self.ctf.to(device),
            group=move(self.group),
        )

    def pin(self) -> Batch:
        """The same batch in page-locked memory, so that copies to the GPU overlap with work."""
        return replace(self, images=self.images.pin_memory())


class BatchLoader:
    """Batches of a particle set, the same for the same (seed, epoch), from any start.

    Args:
        particles: the set.
        batch_size: images per batch and process.
        shuffle: False gives the rows in order (inference).
        seed: of the order.
        drop_last: leave out the last batch when it is not full.
        rank, world_size: this process and their number; every process gets the same number of batches. When the
            rows do not divide evenly some are given twice (or left out with drop_last).
        device: where the batches go; pinned memory and overlapping copies on CUDA.
        prefetch: batches read ahead by a thread; 0 reads in the caller's thread.

    Images with NaN or infinite pixels are told (``broken``) and taken out: when shuffled another row of the batch
    stands in the place of one, in order it is empty.
    """

    def __init__(
        self,
        particles: ParticleSet,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        prefetch: int = 2,
    ) -> None:
        self.particles, self.batch_size, self.shuffle, self.seed = particles, batch_size, shuffle, seed
        self.drop_last, self.rank, self.world_size = drop_last, rank, world_size
        self.device, self.prefetch = torch.device(device), prefetch
        self.broken = Broken(particles)
        bytes_per_image = 4 * particles.box_size**2
        self.block = max(1, BLOCK_BYTES // bytes_per_image)
        # whole batches per window, so that a batch never spans two and `start` falls on a window's grid
        self.window = max(1, WINDOW_BYTES // bytes_per_image // batch_size) * batch_size
        self._buffers = Buffers(3)

    @property
    def _rows_per_rank(self) -> int:
        whole = len(self.particles) // self.world_size
        return whole if self.drop_last or len(self.particles) % self.world_size == 0 else whole + 1

    def __len__(self) -> int:
        """Batches per epoch and process."""
        rows = self._rows_per_rank
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def _share(self, epoch: int) -> np.ndarray:
        """The rows of this process in reading order, before the windows are shuffled."""
        n = len(self.particles)
        if self.shuffle:
            blocks = np.random.default_rng([self.seed, epoch]).permutation(-(-n // self.block)).astype(np.int64)
            order = (blocks[:, None] * self.block + np.arange(self.block)).ravel()
            order = order[order < n]
        else:
            order = np.arange(n)
        count = self._rows_per_rank
        return order.take(np.arange(self.rank * count, (self.rank + 1) * count), mode="wrap")

    def order(self, epoch: int, start: int = 0) -> Iterator[list[np.ndarray]]:
        """Per window the rows of its batches, from batch ``start`` on."""
        share = self._share(epoch)[: len(self) * self.batch_size]
        for window, begin in enumerate(range(0, len(share), self.window)):
            rows = share[begin : begin + self.window]
            if self.shuffle:
                rows = np.random.default_rng([self.seed, epoch, self.rank, window, 1]).permutation(rows)
            rows = rows[max(0, start * self.batch_size - begin) :]
            if len(rows):
                yield [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]

    def epoch(self, n: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``n``; the first ``start`` are skipped without being read."""
        windows = self._windows(n, start) if self.shuffle else ((rows, None) for rows in self.order(n, start))
        if self.prefetch > 0 and self.shuffle:
            windows = read_ahead(windows, 1)
        batches = self._batches(windows)
        if self.prefetch > 0:
            batches = read_ahead(batches, self.prefetch)
        cuda = self.device.type == "cuda"
        for batch in batches:
            yield batch.to(self.device, non_blocking=cuda)

    def _windows(self, epoch: int, start: int) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        """Per window the rows of its batches and their images (n, D, D), read in the order in which they are stored.

        The images go from the file to their places in the batches: shuffled reading is one copy, as from memory.
        """
        step = max(self.batch_size, 4 * self.block)
        D = self.particles.box_size
        for batches in self.order(epoch, start):
            rows = np.concatenate(batches)
            stored = np.argsort(rows, kind="stable")
            images = self._buffers.take((len(rows), D, D))
            for begin in range(0, len(rows), step):
                part = stored[begin : begin + step]
                self.particles.read_into(images, rows[part], part)
            yield batches, images

    def _batches(self, windows: Iterator[tuple]) -> Iterator[Batch]:
        pin = self.device.type == "cuda"
        for batches, images in windows:
            at = 0
            for rows in batches:
                batch = self.batch(rows, None if images is None else images[at : at + len(rows)])
                at += len(rows)
                yield batch.pin() if pin else batch

    def batch(self, rows: np.ndarray, images: np.ndarray | None = None) -> Batch:
        """The batch of given rows (read now unless given)."""
        particles = self.particles
        images = particles.read(rows) if images is None else images
        rows = self._mended(np.asarray(rows), images)
        return Batch(
            index=torch.from_numpy(np.asarray(rows, np.int64)),
            images=torch.from_numpy(images),
            rotation=None if particles.rotation is None else torch.from_numpy(particles.rotation[rows]),
            shift=None if particles.shift is None else torch.from_numpy(particles.shift[rows]),
            ctf=particles.ctf_params(rows),
            group=torch.from_numpy(particles.optics_group[rows].astype(np.int64)),
        )

    def share_broken(self, processes: Processes) -> None:
        """Let the first process tell the broken images that all have met; all call it."""
        self.broken.share(processes)

    def _mended(self, rows: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Take broken images out of a batch; the rows that the images are of now."""
        bad = self.broken.find(rows, images)
        if not bad.any():
            return rows
        if not self.shuffle:
            images[bad] = 0
            return rows
        good = np.flatnonzero(~bad)
        others, theirs = (rows[good], images[good]) if len(good) else self._next_good(int(rows[-1]), len(rows))
        stand_in = np.resize(np.arange(len(others)), int(bad.sum()))
        rows = rows.copy()
        rows[bad], images[bad] = others[stand_in], theirs[stand_in]
        return rows

    def _next_good(self, row: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and images, at least one, that come after a row of the set, for a batch of ``count`` broken ones."""
        n = len(self.particles)
        for begin in range(1, n, count):
            others = (row + np.arange(begin, min(begin + count, n))) % n
            images = self.particles.read(others)
            good = ~self.broken.find(others, images)
            if good.any():
                return others[good], images[good]
        raise InputError(f"{self.particles.path or 'the particles'}: every image has NaN or infinite pixels")


class _End:
    """Marks the end of the queue; carries the exception that ended it, if any."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def read_ahead(batches: Iterator, depth: int) -> Iterator:
    """Yield from ``batches``, produced by a thread up to ``depth`` items ahead; its errors are raised here."""
    queue: Queue = Queue(maxsize=depth)
    stop = Event()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                queue.put(item, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in batches:
                if not put(item):
                    return
            put(_End(None))
        except BaseException as error:  # handed to the consumer, who raises it
            put(_End(error))
        finally:
            if hasattr(batches, "close"):
                batches.close()  # a reader behind this one ends now, not when the garbage is collected

    thread = Thread(target=produce, daemon=True, name="cryosuite-read-ahead")
    thread.start()
    try:
        while True:
            try:
                item = queue.get(timeout=5.0)
            except Empty:
                if thread.is_alive() or not queue.empty():  # it may have put its last just now
                    continue
                raise RuntimeError("the reading thread ended without a word") from None
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stop.set()
        thread.join(timeout=10.0)
