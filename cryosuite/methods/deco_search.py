"""Stages of a CryoDECO training without poses, and pose search with the network as the source of slices."""

from __future__ import annotations

import math
from dataclasses import replace
from enum import Enum

import torch
from torch import Tensor

from cryosuite.data.loader import Batch
from cryosuite.data.spectra import Target
from cryosuite.kernels import pose_search
from cryosuite.kernels.pose_search import Candidates, PointSource, SearchOptions
from cryosuite.methods.deco_model import DecoModel
from cryosuite.methods.deco_options import DecoOptions
from cryosuite.training.launch import world
from cryosuite.training.method import Step

CARRIED = 8  # poses per particle that a later search starts from
EXACT_STEPS = 2  # of Gauss-Newton in the particle's own volume, after a search in a cached one


class Stage(Enum):
    """What happens to poses in a step."""

    KNOWN = "known"
    WARMUP = "warm-up"  # random poses, encoder frozen
    SEARCH = "search"  # global search, then a gradient step of the networks
    REFINE = "refine"  # gradient steps of networks and poses


def stage_of(step: Step, epochs: int, options: DecoOptions, count: int) -> Stage:
    """The stage of a step of a training of ``epochs`` epochs over ``count`` particles."""
    if not options.table:
        return Stage.KNOWN
    if options.poses == "known" or options.start == "voxel":
        return Stage.REFINE
    per_epoch = step.total / epochs
    warmup = math.ceil(options.warmup_images / max(count, 1) * per_epoch)
    if step.index < warmup:
        return Stage.WARMUP
    return Stage.SEARCH if step.index < warmup + options.search_epochs * per_epoch else Stage.REFINE


def held(step: Step, options: DecoOptions) -> bool:
    """Whether poses that were there before the training are not refined yet."""
    return (options.poses == "known" or options.start == "voxel") and step.fraction < options.hold_poses


def searched_again(step: Step, epochs: int, options: DecoOptions) -> bool:
    """Whether this step lies in an epoch in which the worst poses are searched for again (the first never is)."""
    epoch = int(step.index * epochs / step.total)
    return options.research_every > 0 and epoch > 0 and epoch % options.research_every == 0


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """Some images of a batch."""
    return replace(
        batch,
        index=batch.index[rows],
        images=batch.images[rows],
        rotation=None,
        shift=None,
        ctf=None if batch.ctf is None else batch.ctf.rows(rows),
        group=batch.group[rows],
    )


class Searcher:
    """Finds poses of the images of a batch with the current network and writes them into the model's table."""

    def __init__(self, model: DecoModel, options: DecoOptions) -> None:
        self.model, self.options = model, options
        D = model.box_size
        self.search_options = SearchOptions(
            r_min=min(12, max(4, D // 4)), r_max=min(32, D // 2), shift_extent=options.shift_extent, base="polar",
            keep=CARRIED,
        )  # fmt: skip

    @torch.no_grad()
    def search(self, batch: Batch, z: Tensor) -> None:
        """Search for the poses of all images of a batch, whose latents are z (b, zdim)."""
        model, D = self.model, self.model.box_size
        training = model.training
        model.eval()
        target = model.target(replace(batch, shift=None))
        source = PointSource(lambda q, index: self._values(q, z[index]), D)
        index = torch.arange(len(batch), device=z.device)
        if model.cached is None:
            found = pose_search.search(source, target.values, target.ctf, index, self.search_options)
        else:
            found = self._in_cached(source, target, index, z)
        model.train(training)
        self._keep(batch.index, found)

    def _in_cached(self, source: PointSource, target: Target, index: Tensor, z: Tensor) -> Candidates:
        """Search in the volumes of the nearest centres, then score exactly; the exact way for what lies far off."""
        cached, options = self.model.cached, self.search_options
        everyone = torch.cat([rows[0] for rows in everywhere((z,))])
        cached.note(everyone, len(self.model.table.margin), self.model.volumes)
        which, far = cached.nearest(z)
        parts = []
        for rows, exact in ((index[~far], False), (index[far], True)):
            if not len(rows):
                continue
            images, transfer = target.values[rows], target.ctf[rows]
            if exact:
                parts.append((rows, pose_search.search(source, images, transfer, rows, options)))
                continue
            volumes = cached.source(options.r_max).of(which)
            found = pose_search.search(volumes, images, transfer, rows, options)
            parts.append((rows, pose_search.score_poses(source, images, transfer, rows, found, options, EXACT_STEPS)))
        order = torch.cat([rows for rows, _ in parts]).argsort()
        joined = (torch.cat([getattr(part, name) for _, part in parts]) for name in ("rotation", "shift", "score"))
        return Candidates(*joined).rows(order)

    def _values(self, q: Tensor, z: Tensor) -> Tensor:  # (b, n, 3), (b, zdim) -> (b, n) complex
        """Values of the network times the data's amplitude."""
        radius = q.norm(dim=-1) * self.model.box_size
        values = self.model.field(q, z) * self.model.amplitude(radius)[..., None]
        return torch.view_as_complex(values.float().contiguous())

    def _keep(self, index: Tensor, found: Candidates) -> None:
        """Write the best poses of a batch, of all processes where there are several."""
        rows = (index, found.rotation[:, 0], found.shift[:, 0] / self.model.box_size, pose_search.margin(found))
        for part in everywhere(rows):
            self.model.table.put(*part)


def everywhere(values: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """The tensors of every process, on the device of one's own."""
    processes = world()[1]
    if processes == 1:
        return [values]
    parts: list = [None] * processes
    torch.distributed.all_gather_object(parts, [value.cpu() for value in values])
    return [tuple(value.to(values[0].device) for value in part) for part in parts]
