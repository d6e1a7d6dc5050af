"""Crops that processes make for each other: all get the same, and a map that one cannot read ends all of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import each

from cryosuite.data.processes import Processes
from cryosuite.errors import FileError
from cryosuite.methods.lvm_loader import CropBatch, CropLoader


def crops(bad: bool = False) -> SimpleNamespace:
    """Three crops of 4^3 voxels per draw, random but for their index."""

    def draw(generator: torch.Generator, device: torch.device) -> CropBatch:
        if bad:
            raise FileError("a.mrc: the file is gone")
        values = torch.rand(3, 3, 1, 4, 4, 4, generator=generator)
        return CropBatch(*values, torch.full((3,), 6.0), torch.arange(3))

    pairs = SimpleNamespace(draw=draw)
    return SimpleNamespace(pairs=pairs, epoch_images=24, mix=2, per_volume=3, box_size=4)


def test_processes_exchange_the_crops_of_one(tmp_path: Path) -> None:
    alone = [batch.input for batch in CropLoader(crops(), 6, seed=3).epoch(1)]

    def work(processes: Processes) -> None:
        mine = [batch.input for batch in CropLoader(crops(), 6, processes.rank, 2, seed=3).epoch(1)]
        assert all(torch.equal(part, whole[processes.rank :: 2]) for part, whole in zip(mine, alone, strict=True))

    each(tmp_path, work, 2)


def test_a_map_that_one_process_cannot_read_ends_all(tmp_path: Path) -> None:
    def work(processes: Processes) -> None:
        with pytest.raises(FileError, match=r"a\.mrc: the file is gone"):
            CropLoader(crops(bad=processes.rank == 1), 6, processes.rank, 2).batch(0)

    each(tmp_path, work, 2)
