"""Stages of a CryoDECO training without poses, and pose search with the network as the source of slices."""

from __future__ import annotations

import math
from dataclasses import replace
from enum import Enum

import torch
from torch import Tensor

from cryosuite.data.loader import Batch
from cryosuite.data.spectra import Target, placed
from cryosuite.kernels import pose_search
from cryosuite.kernels.ctf import CtfParams
from cryosuite.kernels.pose_search import Candidates, MagnifiedSource, PointSource, SearchOptions, SliceSource
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
    """Finds poses of the images of a batch with the current network and writes them into the model's table.

    ``pixel_size``: of the volumes, Angstrom, where images have others or are magnified; None: all are at their scale.
    """

    def __init__(self, model: DecoModel, options: DecoOptions, pixel_size: float | None = None) -> None:
        self.model, self.options, self.pixel_size = model, options, pixel_size
        D = model.box_size
        self.search_options = SearchOptions(
            r_min=min(12, max(4, D // 4)), r_max=min(32, D // 2), shift_extent=options.shift_extent, base="polar",
            keep=CARRIED,
        )  # fmt: skip

    @torch.no_grad()
    def search(self, batch: Batch, z: Tensor) -> None:
        """Search for the poses of all images of a batch, whose latents are z (b, zdim); of several processes one may
        have none, but all of them call this."""
        model, D = self.model, self.model.box_size
        training = model.training
        model.eval()
        if model.cached is not None:
            self.note(batch.index, z)
        found = Candidates(z.new_zeros(0, 1, 3, 3), z.new_zeros(0, 1, 2), z.new_zeros(0, 1))
        if len(batch):
            target = model.target(replace(batch, shift=None))
            place = None if self.pixel_size is None else places(batch.ctf, self.pixel_size)
            source = at_scale(PointSource(lambda q, index: self._values(q, z[index]), D), place)
            index = torch.arange(len(batch), device=z.device)
            if model.cached is None:
                found = pose_search.search(source, target.values, target.ctf, index, self.search_options)
            else:
                found = self._in_cached(source, target, index, z, place)
        model.train(training)
        self._keep(batch.index, found)

    def note(self, index: Tensor, z: Tensor) -> None:
        """Show the cached volumes the latents z (b, zdim) of the particles of a batch, of all processes."""
        everyone = of_all(index, z)[1]
        self.model.cached.note(everyone, len(self.model.table.margin), self.model.volumes)

    def _in_cached(
        self, source: SliceSource, target: Target, index: Tensor, z: Tensor, place: Tensor | None = None
    ) -> Candidates:
        """Search in the volumes of the nearest centres, then score exactly; the exact way for what lies far off."""
        cached, options = self.model.cached, self.search_options
        which, far = cached.nearest(z)
        parts = []
        for rows, exact in ((index[~far], False), (index[far], True)):
            if not len(rows):
                continue
            images, transfer = target.values[rows], target.ctf[rows]
            if exact:
                parts.append((rows, pose_search.search(source, images, transfer, rows, options)))
                continue
            volumes = at_scale(cached.source().of(which), place)
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


def places(ctf: CtfParams, pixel_size: float) -> Tensor:  # (b, 2, 2)
    """Where points of images lie in a volume of ``pixel_size`` Angstrom (see MagnifiedSource)."""
    same = torch.eye(3, device=ctf.pixel_size.device).expand(len(ctf.pixel_size), 3, 3)
    with torch.autocast(same.device.type, enabled=False):
        return placed(same, ctf, pixel_size)[:, :2, :2]


def at_scale(source: SliceSource, place: Tensor | None) -> SliceSource:
    """The source for images that lie at these places; None: at the volumes' own scale."""
    return source if place is None else MagnifiedSource(source, place)


def worst(misfit: Tensor, index: Tensor, share: float) -> Tensor:
    """Places (n,) in a batch of the images that fit worst, of the whole batch where several processes share it.

    Args:
        misfit: (N,) of all particles, the same in every process. index: (b,) of the particles of the batch.
        share: of the images of the whole batch that are chosen, rounded up; this process may have none of them.
    """
    (everyone,) = of_all(index)
    count = math.ceil(share * len(everyone))
    chosen = everyone[misfit[everyone].argsort(descending=True, stable=True)[:count]]
    return torch.nonzero(torch.isin(index, chosen)).flatten()


def of_all(index: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Particle numbers (b,) and what belongs to them of all processes, in the order of the numbers, each once.

    So what is made of them does not depend on how a batch is shared out.
    """
    joined = [torch.cat(parts) for parts in zip(*everywhere((index, *values)), strict=True)]
    order = joined[0].argsort(stable=True)
    number = joined[0][order]
    order = order[torch.cat([number.new_ones(1, dtype=torch.bool), number[1:] != number[:-1]])[: len(order)]]
    return tuple(one[order] for one in joined)


def everywhere(values: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """The tensors of every process, on the device of one's own."""
    processes = world()[1]
    if processes == 1:
        return [values]
    parts: list = [None] * processes
    torch.distributed.all_gather_object(parts, [value.cpu() for value in values])
    return [tuple(value.to(values[0].device) for value in part) for part in parts]
