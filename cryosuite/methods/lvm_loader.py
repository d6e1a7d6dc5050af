"""Where training crops of map networks come from: the endless simulator as the training loop takes it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryosuite.data.processes import Processes
from cryosuite.errors import InputError
from cryosuite.training.launch import world

if TYPE_CHECKING:
    from cryosuite.simulate.map_options import MapBatch
    from cryosuite.simulate.map_pairs import MapPairs


@dataclass(frozen=True)
class CropBatch:
    """Crops as the training loop takes them, all float32 (b, 1, e, e, e) but the last two.

    Attributes:
        input, target: grey values in 0..1. mask: where either of them is above solvent.
        resolution: (b,) A. index: (b,) int64, the structure.
    """

    input: Tensor
    target: Tensor
    mask: Tensor
    resolution: Tensor
    index: Tensor

    @staticmethod
    def of(batches: Sequence[MapBatch | CropBatch]) -> CropBatch:
        """All crops of some draws."""
        names = ("input", "target", "mask", "resolution", "index")
        return CropBatch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in names))

    def rows(self, rows: Tensor) -> CropBatch:
        """Some of the crops."""
        parts = (self.input, self.target, self.mask, self.resolution, self.index)
        return CropBatch(*(part[rows] for part in parts))


class Crops:
    """The endless stream, as the training loop sees a particle set: ``epoch_images`` crops per epoch.

    Args:
        pairs: what is drawn from. crop: voxels per edge. per_volume: crops of one draw. mix: draws that are shuffled
            together, at least. epoch_images: crops between two validations.

    Raises InputError where nothing is held out: every epoch ends with a test.
    """

    pixel_size = np.ones(1, np.float32)

    def __init__(self, pairs: MapPairs, crop: int, per_volume: int, mix: int, epoch_images: int) -> None:
        if not pairs.testing:
            raise InputError(
                "no structure is kept out to test on: give two or more (both:FOLDER adds made-up ones), and "
                "--hold-out 1 or more"
            )
        self.pairs, self.box_size, self.per_volume, self.mix = pairs, crop, per_volume, mix
        self.epoch_images = int(epoch_images)
        self.key = zlib.crc32(" ".join(pairs.names).encode())
        self.index = np.array([self.key], np.int64)  # for the checkpoint's fingerprint

    def __len__(self) -> int:
        return self.epoch_images

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Numbers that tell sets of structures apart, in the shape of images, for the checkpoint's fingerprint."""
        first = np.array([self.key % 65_521, len(self.pairs.names), self.box_size, self.per_volume], np.float32)
        return np.broadcast_to(first.reshape(2, 2), (len(rows), 2, 2))

    def describe(self, rows: np.ndarray) -> str:
        """A sentence for the message of a training that diverged."""
        names, numbers = self.pairs.names, sorted({int(row) for row in rows})
        known = [names[number] for number in numbers if 0 <= number < len(names)]
        shown = ", ".join(known[:8]) + (" ..." if len(known) > 8 else "")
        return f"The batch held crops of {shown}." if known else "The batch held simulated crops."


class CropLoader:
    """Batches of crops of several volumes, shuffled; process r of w gets the rows r, r + w, ... of each batch.

    Batch k of epoch n is a pure function of the seed and its number, so that a training can be taken up anywhere, by
    any number of processes: volumes are drawn in groups, each group a whole number of batches. Every process makes
    some volumes of a group and they exchange the crops.
    """

    def __init__(
        self,
        crops: Crops,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size % world_size:
            raise InputError(
                f"--batch-size {batch_size}: expected a multiple of the number of processes ({world_size})"
            )
        if crops.epoch_images < batch_size:
            raise InputError(f"--batch-size {batch_size}: more than the {crops.epoch_images} crops of --every")
        self.crops, self.batch_size, self.rank, self.world_size = crops, batch_size, rank, world_size
        self.seed, self.device = seed, torch.device(device)
        self.share = batch_size // world_size
        self.batches = math.ceil(crops.mix * crops.per_volume / batch_size)  # of one group
        self.volumes = math.ceil(self.batches * batch_size / crops.per_volume)
        self.held: tuple[int, CropBatch] | None = None

    def __len__(self) -> int:
        return self.crops.epoch_images // self.batch_size

    def global_size(self, batch: int) -> int:
        """Crops of a batch over all processes."""
        return self.batch_size

    def weight(self, batch: int) -> int:
        """Crops of a batch that count for this process."""
        return self.share

    def epoch(self, n: int, start: int = 0) -> Iterator[CropBatch]:
        """The batches of epoch ``n`` from batch ``start`` on."""
        for batch in range(start, len(self)):
            yield self.batch(n * len(self) + batch)

    def batch(self, number: int) -> CropBatch:
        """Batch ``number`` of the whole training."""
        group, place = divmod(number, self.batches)
        if self.held is None or self.held[0] != group:
            self.held = (group, self._group(group))
        first = place * self.batch_size
        rows = torch.arange(first + self.rank, first + self.batch_size, self.world_size, device=self.device)
        return self.held[1].rows(rows)

    def _group(self, group: int) -> CropBatch:
        """All crops of some volumes in random order."""
        together = world()[1] == self.world_size > 1  # else (nobody to exchange with) all of them are made here
        if together:
            mine = range(self.rank, self.volumes, self.world_size)
            # a map that one process cannot read ends all of them: the others would wait for its crops
            drawn = Processes(self.rank, self.world_size).each(lambda: self._drawn(group, mine))
            drawn = self._exchanged(drawn)
        else:
            drawn = self._drawn(group, range(self.volumes))
        every = CropBatch.of([drawn[volume] for volume in range(self.volumes)])
        order = np.random.default_rng(self._seed(group, self.volumes)).permutation(len(every.index))
        return every.rows(torch.from_numpy(order).to(self.device))

    def _drawn(self, group: int, volumes: range) -> dict[int, CropBatch]:
        """The crops of some volumes of a group."""
        drawn = {}
        for volume in volumes:
            generator = torch.Generator(self.device).manual_seed(self._seed(group, volume))
            drawn[volume] = CropBatch.of([self.crops.pairs.draw(generator, self.device)])
        return drawn

    def _exchanged(self, drawn: dict[int, CropBatch]) -> dict[int, CropBatch]:
        """The crops of all volumes, each sent by the process that made them."""
        edge, count = self.crops.box_size, self.crops.per_volume
        every = {}
        for volume in range(self.volumes):
            one = drawn.get(volume)
            if one is None:
                grid = [torch.empty(count, 1, edge, edge, edge, device=self.device) for _ in range(3)]
                index = torch.empty(count, dtype=torch.int64, device=self.device)
                one = CropBatch(*grid, torch.empty(count, device=self.device), index)
            for values in (one.input, one.target, one.mask, one.resolution, one.index):
                torch.distributed.broadcast(values, volume % self.world_size)
            every[volume] = one
        return every

    def _seed(self, group: int, volume: int) -> int:
        words = np.random.SeedSequence((self.seed, 0, group, volume)).generate_state(1, np.uint64)
        return int(words[0] >> np.uint64(1))
