"""The work on images and the maps of many classes: shared among processes, in what memory there is.

Every process scores and inserts its own run of neighbouring images. Sums are added up in the first process, which alone
makes maps of them and hands the maps to all; scores and shares are put together in the order of the images. So each
process knows the same maps and shares, and decides the same.

Where memory runs out in one process all of them begin the piece of work again, with half as many maps at a time where
the grids did not fit, else with half as many images at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cryosuite.data.processes import ALONE, Processes
from cryosuite.kernels import assignment, fourier
from cryosuite.kernels import class_slices as kernel
from cryosuite.kernels.memory import halved, out_of_memory
from cryosuite.reconstruct.class_images import Chunk, ClusterImages
from cryosuite.reconstruct.weights import ClassWeights

T = TypeVar("T")
MEMORY_GIB = 8.0  # of grids held at a time
FEWEST = 8  # images at a time, below which maps must be what does not fit


class ClassWork:
    """What the scores and the sums of many classes are made with.

    Attributes:
        images: the particles' coefficients; all processes have the whole set, and read what is theirs.
        device: of the grids; "cpu" uses compiled loops in ``threads`` threads of ``pool`` (within `threads_of_torch`).
        memory: bytes of grids held at a time. processes: that share the images.
    """

    def __init__(
        self,
        images: ClusterImages,
        device: torch.device | str = "cpu",
        memory_gib: float = MEMORY_GIB,
        processes: Processes = ALONE,
    ) -> None:
        self.images, self.device, self.processes = images, torch.device(device), processes
        self.memory = memory_gib * 2**30
        self.threads, self.pool = 1, None
        # of the piece of work at hand: maps at a time and their bytes, what is being made, images at a time so far
        self._fit, self._bytes, self._making, self._most = 1, 1, "maps", 0

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

    # --- parts -------------------------------------------------------------------------------------------------------

    def groups(self, count: int, r_max: int, sets: int = 1) -> list[np.ndarray]:
        """0 .. count in groups of classes whose grids fit the memory together, ``sets`` of them for each class."""
        self._bytes = sets * kernel.grid_bytes(r_max)
        fit = max(1, int(self.memory // self._bytes))
        self._fit = min(fit, count)
        return np.array_split(np.arange(count), -(-count // fit))

    def transforms(self, volumes: Tensor, r_max: int) -> kernel.ClassTransforms:
        """`class_slices.class_transforms` on the device."""
        self._making = "maps"
        return kernel.class_transforms(volumes.to(self.device), r_max)

    def accumulator(self, count: int, r_max: int) -> kernel.ClassAccumulator:
        """`class_slices.new_class_accumulator` on the device."""
        self._making = "maps"
        return kernel.new_class_accumulator(count, r_max, device=self.device)

    def disc(self, r_max: int) -> fourier.HalfDisc:
        """The half disc of the images up to a radius, on the device."""
        return fourier.half_disc(self.images.box, r_max, self.device)

    def chunks(self, rows: np.ndarray, r_max: int) -> Iterator[Chunk]:
        """Coefficients of some rows, on the device."""
        for chunk in self.images.chunks(rows, r_max):
            self._making, self._most = "images", max(self._most, len(chunk.rows))
            yield chunk if self.device.type == "cpu" else Chunk(chunk.rows, *(v.to(self.device) for v in chunk[1:]))

    def sums(self, transforms: kernel.ClassTransforms, chunk: Chunk, disc: fourier.HalfDisc) -> tuple[Tensor, Tensor]:
        """`class_slices.class_sums` of a chunk: h and g (b, K)."""
        return kernel.class_sums(transforms, *chunk[1:], disc, self.pool, self.threads)

    def insert(self, acc: kernel.ClassAccumulator, chunk: Chunk, table: ClassWeights, disc: fourier.HalfDisc) -> None:
        """Add a chunk to the classes its rows have shares in."""
        rows = tuple(torch.from_numpy(part) for part in (table.data, table.indices, table.indptr))
        values, weights, rotation = chunk[1:]
        kernel.insert_classes(acc, values, weights, rows, rotation, disc, self.pool, self.threads)

    # --- together ----------------------------------------------------------------------------------------------------

    def attempt(self, work: Callable[[], T]) -> list[T]:
        """What ``work()`` gives in each process (a few numbers), in all of them; where memory runs out, begun again.

        ``work`` must not speak to other processes and must not count on what an attempt before it left; it asks for
        its `groups` itself.

        Raises:
            InputError: in all processes, when it is raised in one of them, or where one map and image are too much.
        """
        found = None
        while found is None:
            self._fit = 1
            found = self.once(work)
        return found

    def once(self, work: Callable[[], T]) -> list[T] | None:
        """As `attempt`, for work on `groups` that the caller has asked for just before: None where memory ran out,
        after which he asks for them again."""

        def tried() -> tuple[T | None, str, int]:
            try:
                return work(), "", self._most
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            return None, self._making, self._most

        self._making, self._most = "maps", 0
        found = self.processes.everyone(tried)
        short = {what for _, what, _ in found if what}
        if short:
            self._take_less("maps" in short, max(most for _, _, most in found))
            return None
        self.images.share_bad(self.processes)
        return [result for result, _, _ in found]

    def _take_less(self, maps: bool, most: int) -> None:
        """Half as many maps, or images, at a time from now on, in all processes alike; ``most``: images until now."""
        if maps or (self._fit > 1 and most <= FEWEST):
            self.memory = halved(self._fit, "maps") * self._bytes
        else:
            self.images.chunk = halved(most, "images")

    def add_up(self, acc: kernel.ClassAccumulator) -> None:
        """Make the sums of the first process those of all; the others' are worth nothing afterwards."""
        if self.processes.count == 1:
            return
        for data in acc.data:
            part = data.cpu()
            self.processes.add_up(part)
            if self.processes.first and data.is_cuda:
                data.copy_(part)

    def first_makes(self, make: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        """A float32 tensor that the first process makes, in all of them, on the CPU; errors end all of them."""
        made: list[Tensor] = []
        self.processes.first_does(lambda: made.append(make().cpu().contiguous()))
        out = made[0] if made else torch.empty(shape)
        self.processes.hand_out(out)
        return out

    def table(self, own: ClassWeights) -> ClassWeights:
        """The shares of all processes' rows, in their order."""
        joined = self.processes.joined
        lengths = joined(np.diff(own.indptr))
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return ClassWeights(joined(own.data), joined(own.indices), starts, own.n_classes)

    # --- whole passes over the images --------------------------------------------------------------------------------

    def accumulated(
        self, p: ClassWeights, sets: list[np.ndarray], r_max: int, stop: Callable[[], bool] = bool
    ) -> list[kernel.ClassAccumulator] | None:
        """Sums of each set of rows in all classes by the shares of all N particles; complete in the first process.

        stop: asked after each chunk whether to leave the rest out. None: as `once`.
        """
        own, disc, kept = [self.processes.mine(rows) for rows in sets], self.disc(r_max), []

        def insert() -> None:
            kept.clear()
            for rows in own:
                kept.append(self.accumulator(p.n_classes, r_max))
                for chunk in self.chunks(rows, r_max):
                    self.insert(kept[-1], chunk, p.rows(chunk.rows), disc)
                    if stop():
                        break

        if self.once(insert) is None:
            return None
        for acc in kept:
            self.add_up(acc)
        return kept

    def likelihoods(self, maps: Tensor, rows: np.ndarray, r_max: int | None = None) -> np.ndarray:
        """Log-likelihoods (n, K) float64 of some images under maps (K, d, d, d), up to a constant of the image."""
        r_max = self.images.box // 2 if r_max is None else r_max
        own, disc = self.processes.mine(rows), self.disc(r_max)
        out = np.zeros((len(own), len(maps)))

        def score() -> None:
            for group in self.groups(len(maps), r_max):
                transforms, at = self.transforms(maps[group], r_max), 0
                for chunk in self.chunks(own, r_max):
                    part = assignment.likelihood_from_sums(*self.sums(transforms, chunk, disc)).cpu().numpy()
                    out[at : at + len(part), group] = part
                    at += len(part)
                del transforms

        self.attempt(score)
        return self.processes.joined(out)
