"""Global batches shared out over processes: the same images in the same step however many processes there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from cryosuite.data.loader import Batch, BatchLoader
from cryosuite.data.particles import ParticleSet


class GlobalBatches(BatchLoader):
    """A BatchLoader whose ``batch_size`` is global: process r of w gets the rows r, r + w, ... of every batch.

    So two processes train on the batches one process would train on. A process for which the last, short batch has
    no row gets one row again; ``weight`` is then 0.
    """

    def __init__(self, particles: ParticleSet, batch_size: int, rank: int, world_size: int, **options: Any) -> None:
        super().__init__(particles, batch_size, **options)
        self.part, self.parts = rank, world_size

    def order(self, epoch: int, start: int = 0) -> Iterator[list[np.ndarray]]:
        """Per window this process's rows of its batches, from batch ``start`` on."""
        for batches in super().order(epoch, start):
            yield [rows[self.part :: self.parts] if len(rows) > self.part else rows[:1] for rows in batches]

    def global_size(self, batch: int) -> int:
        """Images of batch number ``batch`` of an epoch over all processes."""
        return min(self.batch_size, len(self.particles) - batch * self.batch_size)

    def weight(self, batch: int) -> int:
        """Images of that batch that count for this process."""
        return len(range(self.part, self.global_size(batch), self.parts))


def pieces(batch: Batch, count: int) -> list[Batch]:
    """A batch cut into at most ``count`` pieces of nearly equal size."""
    size = len(batch.index)
    if count <= 1 or size <= 1:
        return [batch]
    edges = np.linspace(0, size, min(count, size) + 1).round().astype(int)
    return [_cut(batch, slice(start, stop), size) for start, stop in zip(edges[:-1], edges[1:], strict=True)]


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some neighbouring rows of a batch."""
    size = len(batch.index)
    return batch if rows == slice(0, size) else _cut(batch, rows, size)


def _cut(value: Any, rows: slice, size: int) -> Any:
    """The rows of every tensor with ``size`` rows inside a (nested) dataclass."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == size else value
    if dataclasses.is_dataclass(value):
        changed = {f.name: _cut(getattr(value, f.name), rows, size) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **changed)
    return value
