"""Where training batches of pose prediction come from: the endless simulator as the training loop takes it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryosuite.errors import InputError
from cryosuite.simulate.view_sets import FastarBatch, ViewOptions, ViewSets

if TYPE_CHECKING:
    from cryosuite.data.processes import Processes
    from cryosuite.methods.fastar_target import TargetViews
    from cryosuite.simulate.beads import Beads


class Molecules:
    """What is simulated, as the training loop sees a particle set: ``epoch_images`` images per epoch, without end.

    Args:
        views: what batches hold (``images`` is set by the loader).
        library: molecules in Angstrom beside (or instead of) phantoms, or None; names: theirs.
        epoch_images: between two validations.
        target: a known molecule that is imaged instead, or None.
    """

    pixel_size = np.ones(1, np.float32)

    def __init__(
        self,
        views: ViewOptions,
        epoch_images: int,
        library: Beads | None = None,
        names: list[str] | None = None,
        target: TargetViews | None = None,
    ) -> None:
        self.views, self.library, self.names, self.target = views, library, names or [], target
        self.epoch_images, self.box_size = int(epoch_images), views.size
        self.index = np.array([zlib.crc32(" ".join(self.names).encode())], np.int64)  # for the checkpoint's fingerprint

    def __len__(self) -> int:
        return self.epoch_images

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Numbers that tell sets of molecules apart, in the shape of images, for the checkpoint's fingerprint."""
        first = np.zeros(4, np.float32)
        if self.library is not None:
            first[:2] = len(self.library), float(self.library.xyz.abs().sum())
        if self.target is not None:
            first[2] = self.target.key
        return np.broadcast_to(first.reshape(2, 2), (len(rows), 2, 2))

    def describe(self, rows: np.ndarray) -> str:
        """A sentence for the message of a training that diverged."""
        return f"It happened at molecule {int(rows.min())} of the simulated stream."


class SetLoader:
    """Batches of molecules as the training loop takes them; of several processes each makes some of the molecules.

    Batch k of epoch n is batch n * len(self) + k of the stream, a pure function of the seed and that number.
    """

    def __init__(
        self,
        molecules: Molecules,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        most = molecules.views.views[1]
        if batch_size % world_size or batch_size // world_size < most:
            raise InputError(
                f"--batch-size {batch_size}: expected a multiple of the number of processes ({world_size}) and at "
                f"least {most} images, the views of one molecule, for each"
            )
        if molecules.epoch_images < batch_size:
            raise InputError(
                f"--batch-size {batch_size}: more than the {molecules.epoch_images} images between two validations"
            )
        self.molecules, self.batch_size, self.rank, self.world_size = molecules, batch_size, rank, world_size
        self.device = torch.device(device)
        options = molecules.views.with_images(batch_size // world_size)
        if molecules.target is not None:
            self.stream = molecules.target.stream(options, seed, self.device, world_size)
        else:
            self.stream = ViewSets(options, molecules.library, seed, self.device, world_size)
        self.part = 1 / world_size  # of the batch, this process's

    def __len__(self) -> int:
        return self.molecules.epoch_images // self.batch_size

    def global_size(self, batch: int) -> int:
        """Images of a batch over all processes."""
        return self.batch_size

    def weight(self, batch: int) -> float:
        """How many of a batch's images count for this process: by its molecules; asked after the batch was given."""
        return self.batch_size * self.part

    def share_broken(self, processes: Processes) -> None:
        """Let the first process tell the broken images of --finetune that all have met; all call it."""
        read = getattr(self.stream, "loader", None)  # simulated streams read no images
        if read is not None:
            read.share_broken(processes)

    def epoch(self, n: int, start: int = 0) -> Iterator[FastarBatch]:
        """The batches of epoch ``n`` from batch ``start`` on."""
        for batch in range(start, len(self)):
            number = n * len(self) + batch
            found = self.stream.batch(number, number * self.batch_size, self.rank)
            sets, views = found.images.shape[:2]
            self.part = sets / (self.batch_size // views)
            yield found
