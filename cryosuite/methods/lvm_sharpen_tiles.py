"""A map network over all tiles of a volume: batches as large as the memory allows, blended as they come."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cryosuite.console import Progress
from cryosuite.errors import InputError
from cryosuite.formats.atomic import reserve
from cryosuite.kernels.map_norm import to_unit
from cryosuite.kernels.memory import halved, out_of_memory
from cryosuite.kernels.tiles import Tiling, turned, turned_back

CPU_BATCH = 2  # tiles: more only fall out of the processor's caches
GPU_BATCH = 64  # at most; the memory may allow fewer
GPU_SHARE = 0.5  # of the free memory that a batch may take
MAPPED = 600**3  # voxels above which sums lie in a file


@dataclass(frozen=True)
class Runner:
    """How tiles go through a network.

    Attributes:
        net: (b, 1, e, e, e) -> the same, on ``device``, in eval mode.
        bf16: whether its products are bfloat16.
        batch: tiles at a time (each in all its rotations one after another); None: found out.
        turns: rotations of the cube that the result is the mean of.
    """

    net: nn.Module
    device: torch.device
    bf16: bool = False
    batch: int | None = None
    turns: int = 1
    sizes: list[int] = field(default_factory=list)  # of the batches that went through

    def run(
        self,
        volume: Tensor,  # (z, y, x)
        span: tuple[float, float],
        tiling: Tiling,
        corners: Tensor,  # (n, 3)
        scratch: Path | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # (z, y, x) twice
        """The network's map, 0 in tiles that are not run, and with several rotations their standard deviation.

        Args:
            volume: the map in its own grey values; ``span`` are those that the network sees as 0 and 1.
            corners: of the tiles that are run, of ``tiling``.
            scratch: folder for the sums of very large maps.

        Raises:
            InputError: one tile alone does not fit into the memory, or the network's values are not finite.
        """
        volume = self._near(volume)
        total = _sum_like(volume, scratch)
        squares = _sum_like(volume, scratch) if self.turns > 1 else None
        with Progress(len(corners), "tiles", "tiles") as bar:
            for some, mean, variance in self._batches(volume, span, tiling, corners):
                tiling.add(total, mean, some)
                if squares is not None:
                    tiling.add(squares, variance, some)
                bar.advance(len(some))
        tiling.divide(total)
        if squares is not None:
            tiling.divide(squares).clamp_(min=0).sqrt_()
        if not math.isfinite(float(total.sum(dtype=torch.float64))):
            raise InputError("the network gave values that are not finite; try --precision 32, or other weights")
        return total.cpu(), None if squares is None else squares.cpu()

    def _near(self, volume: Tensor) -> Tensor:
        """The volume on the device where it leaves room for the sums and the network."""
        if self.device.type != "cuda":
            return volume
        free, _ = torch.cuda.mem_get_info(self.device)
        room = volume.nbytes * (2 + (self.turns > 1)) < free / 4
        return volume.to(self.device) if room else volume

    def _batches(
        self, volume: Tensor, span: tuple[float, float], tiling: Tiling, corners: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Corners (b, 3), means (b, e, e, e) and variances of one batch after another; halved when memory runs out."""
        size = self.batch or (CPU_BATCH if self.device.type == "cpu" else 1)
        start = 0
        if self.device.type == "cuda":  # of the map before, in larger batches
            torch.cuda.reset_peak_memory_stats(self.device)
        while start < len(corners):
            some = corners[start : start + size]
            try:
                found = self._forward(to_unit(tiling.cut(volume, some), *span))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                found = None  # outside the except clause, whose traceback would keep the tensors
            if found is None:
                size = halved(len(some), "tiles")
                continue
            self.sizes.append(len(some))
            yield some, *found
            start += len(some)
            if self.batch is None and self.device.type == "cuda" and len(self.sizes) == 1:
                size = self._affordable()

    @torch.inference_mode()
    def _forward(self, tiles: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and variance over the rotations, (b, e, e, e) float32, of tiles that lie on any device."""
        tiles = tiles.to(self.device, non_blocking=True)[:, None]
        mean, spread = torch.zeros_like(tiles), None
        cast = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()
        with cast:
            for i in range(self.turns):
                one = turned_back(self.net(turned(tiles, i).contiguous()), i).float()
                # Welford's: the variance of values that differ little would drown in the difference of two sums
                change = one - mean
                mean += change / (i + 1)
                if self.turns > 1:
                    spread = change * (one - mean) if spread is None else spread + change * (one - mean)
        return mean[:, 0], None if spread is None else spread[:, 0] / self.turns

    def _affordable(self) -> int:
        """Tiles that fit, from what the first one took at its peak."""
        free, _ = torch.cuda.mem_get_info(self.device)
        idle = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        per_tile = max(torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device), 1 << 20)
        return int(min(GPU_BATCH, max(1, GPU_SHARE * (free + idle) // per_tile)))


def _sum_like(volume: Tensor, scratch: Path | None) -> Tensor:
    """Zeros (z, y, x) float32 where the volume lies; for very large ones in a file that vanishes with the process."""
    if volume.device.type != "cpu" or volume.numel() <= MAPPED:
        return torch.zeros(volume.shape, device=volume.device)
    with tempfile.TemporaryFile(dir=scratch) as file:
        reserve(file, 4 * volume.numel())
        return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=tuple(volume.shape)))
