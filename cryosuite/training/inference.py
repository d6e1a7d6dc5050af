"""Latents of all particles in stack order, whatever the number of processes and however many particles there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from cryosuite.console import Progress
from cryosuite.data.broken import Broken
from cryosuite.data.loader import Batch, BatchLoader
from cryosuite.data.processes import Processes
from cryosuite.kernels.memory import Portions
from cryosuite.training.launch import resolve_precision, world
from cryosuite.training.method import Method
from cryosuite.training.shard import rows_of

if TYPE_CHECKING:
    from cryosuite.data.particles import ParticleSet


def encode_batches(
    method: Method,
    model: nn.Module,
    particles: ParticleSet,
    batch_size: int = 256,
    *,
    precision: str = "auto",
    progress: bool = True,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (rows (b,), latents (b, zdim) float32) in stack order; each process its own run of neighbouring rows.

    Nothing is kept, so memory does not grow with N: for incremental fits and latents too large to hold. The model
    runs where its parameters are, in eval mode and inference mode; precision as in TrainOptions. All processes must go
    to the end, where they tell the first which images are broken.
    """
    rank, count = world()
    processes = Processes(rank, count)
    device = next(model.parameters()).device
    mine = np.arange(len(particles) * rank // count, len(particles) * (rank + 1) // count)
    if len(mine) == 0:
        Broken(particles).share(processes)
        return
    share = particles if count == 1 else particles.subset(mine)
    loader, portions = BatchLoader(share, batch_size, shuffle=False, device=device), Portions("images")
    shown = Progress(len(mine), "encode") if progress and rank == 0 else nullcontext()
    with shown as bar, evaluating(model):
        for batch in loader.epoch(0):
            rows = mine[0] + batch.index.cpu().numpy()

            def encoded(some: slice, batch: Batch = batch) -> np.ndarray:
                with torch.inference_mode(), autocast(device, precision):
                    return method.encode(model, rows_of(batch, some)).float().cpu().numpy()

            for some, z in portions.over(encoded, len(rows)):
                z[loader.broken.rows[rows[some] - mine[0]]] = np.nan  # of an image without a meaning
                yield rows[some], z
            if bar is not None:
                bar.advance(len(rows))
    loader.broken.share_part(particles, mine, processes)


def encode_all(
    method: Method,
    model: nn.Module,
    particles: ParticleSet,
    batch_size: int = 256,
    *,
    precision: str = "auto",
    progress: bool = True,
) -> np.ndarray:
    """Latents of all particles, (N, zdim) float32 in stack order, the same array in every process."""
    found = [z for _, z in encode_batches(method, model, particles, batch_size, precision=precision, progress=progress)]
    parts = [np.concatenate(found) if found else None]
    processes = world()[1]
    if processes > 1:
        parts = parts * processes
        torch.distributed.all_gather_object(parts, parts[0])
    return np.concatenate([part for part in parts if part is not None])


def autocast(device: torch.device, precision: str) -> torch.autocast | nullcontext:
    """The autocast context of a precision option ("auto", "32", "bf16") on a device."""
    if resolve_precision(precision, device.type) == "bf16-mixed":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, the mode of before afterwards."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
