"""One round of a search from nothing: images searched for against the maps that all poses gave, and the next maps."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.data.spectra import placed
from cryosuite.kernels import pose_search
from cryosuite.kernels.pose_scores import fold_ctf, gain, score_shifts
from cryosuite.kernels.pose_search import Candidates, MagnifiedSource, SearchOptions, VolumeSource
from cryosuite.kernels.slices import new_accumulator
from cryosuite.reconstruct.abinitio_starts import AbInitioOptions
from cryosuite.reconstruct.backproject import SAME_PIXEL_SIZE, common_pixel_size
from cryosuite.reconstruct.class_sums import ClassSums, accumulate
from cryosuite.reconstruct.held_out import filtered
from cryosuite.reconstruct.weights import ClassWeights

ANYWHERE, OWN, NEAR = "anywhere", "own", "near"  # what is searched in a round: all classes, its own, near its pose


class RoundMaps:
    """The maps of a round as sources of slices, joint and of the half sets.

    Args:
        volumes: (K, d, d, d). halves: (2, K, d, d, d), None before there are poses. radius: of the round, Fourier px.
        mode: what is searched. reach: how far out in the maps the images' points lie, in radii of the image.
    """

    def __init__(
        self,
        volumes: Tensor,
        halves: Tensor | None,
        radius: int,
        mode: str,
        options: AbInitioOptions,
        device: torch.device,
        reach: float = 1.0,
    ) -> None:
        self.mode, self.device, self.options = mode, device, _search_options(options, radius, mode != NEAR)
        self.source = VolumeSource(volumes.to(device), r_max=math.ceil(reach * self.options.r_max))
        self.scale = self.source.box_size  # shifts are in its pixels
        self.judges: VolumeSource | None = None
        self.prepared: list[pose_search.Prepared] = []
        if mode == NEAR:
            return
        if halves is not None and len(volumes) > 1:
            self.judges = VolumeSource(halves.flatten(0, 1).to(device), r_max=self.options.r_max)
        for k in range(len(volumes)):
            one = torch.tensor([k], device=device)
            self.prepared.append(pose_search.prepare(self.source, self.options, one))

    def search(
        self,
        values: Tensor,  # (b, P) complex, divided by the noise
        transfer: Tensor,  # (b, P)
        label: Tensor,  # (b,) the class each image has
        half: Tensor,  # (b,) its half set
        before: Candidates,  # the poses it has, shifts in pixels of the maps
        place: Tensor | None = None,  # (b, 2, 2) where points of the images lie in the maps (`image_scales`)
    ) -> tuple[Candidates, Tensor]:
        """Poses, and classes (b,), of some images."""
        if self.mode == ANYWHERE:
            return self._best_class(values, transfer, half)
        if self.mode == OWN:
            return self._own_class(values, transfer, label), label
        here = Candidates(*(held.to(self.device) for held in vars(before).values()))
        source, index = self.source, label.to(self.device)
        if place is not None:
            source = MagnifiedSource(self.source.of(index), place.to(self.device))
            index = torch.arange(len(values), device=self.device)
        return pose_search.search(source, values, transfer, index, self.options, here), label

    def _own_class(self, values: Tensor, transfer: Tensor, label: Tensor) -> Candidates:
        """Poses anywhere in the class each image has."""
        parts, order = [], []
        for k in label.unique():
            mine = torch.nonzero(label == k).flatten()
            here = mine.to(self.device)
            index = torch.full((len(mine),), int(k), dtype=torch.int64, device=self.device)
            ready = self.prepared[int(k)]
            found = pose_search.search(self.source, values[here], transfer[here], index, self.options, prepared=ready)
            parts.append(found)
            order.append(here)
        back = torch.cat(order).argsort()
        return Candidates(*(torch.cat(part)[back] for part in zip(*(vars(p).values() for p in parts), strict=True)))

    def _best_class(self, values: Tensor, transfer: Tensor, half: Tensor) -> tuple[Candidates, Tensor]:
        """Poses in the class that explains each image best, and that class.

        Poses come from the joint maps. Which class is best is decided at these poses by the maps of the other half set.
        """
        best, label, highest = None, torch.zeros(len(values), dtype=torch.int64, device=self.device), None
        g, w = fold_ctf(values, transfer)
        nowhere, classes = torch.zeros(1, 2, device=self.device), len(self.prepared)
        other = (1 - half).to(self.device) * classes
        for k, ready in enumerate(self.prepared):
            index = torch.full((len(values),), k, dtype=torch.int64, device=self.device)
            found = pose_search.search(self.source, values, transfer, index, self.options, prepared=ready)
            score = found.score[:, 0]
            if self.judges is not None:
                where = found.rotation[:, :1], found.shift[:, :1]
                corr, power, _ = score_shifts(self.judges, g, w, index + other, self.options.r_max, *where, nowhere)
                score = gain(corr, power, self.options.fit_scale)[:, 0]
            if best is None:
                best, highest = found, score
                continue
            better = score > highest
            label, highest = torch.where(better, k, label), torch.where(better, score, highest)
            best = Candidates(*(
                torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip(vars(found).values(), vars(best).values(), strict=True)
            ))  # fmt: skip
        return best, label


def _search_options(options: AbInitioOptions, radius: int, everywhere: bool) -> SearchOptions:
    base = {"shift_extent": options.shift_extent, "keep": options.keep, "r_max": radius}
    if everywhere:
        return SearchOptions(r_min=min(8, max(4, radius - 2)), levels=2 if radius < 16 else 3, shift_grid=8, **base)
    return SearchOptions(r_min=min(radius, max(8, radius // 2)), levels=4, base="none", **base)


def image_scales(particles: ParticleSet) -> tuple[Tensor | None, float]:
    """(N, 2, 2) where points of each image lie in a volume of the common pixel size (`MagnifiedSource`), None where all
    are at its scale; and how far out they lie at most, in radii of the image (1 or more)."""
    ctf = particles.ctf_params()
    if ctf is None:
        return None, 1.0
    same = torch.eye(3).expand(len(particles), 3, 3)
    place = placed(same, ctf, common_pixel_size(particles.pixel_size))[:, :2, :2]
    if (place - torch.eye(2)).abs().max() < SAME_PIXEL_SIZE:
        return None, 1.0
    return place, max(1.0, float(torch.linalg.matrix_norm(place, 2).max()))


def class_halves(
    particles: ParticleSet,
    label: np.ndarray,  # (N,)
    half: np.ndarray,  # (N,) 0 or 1
    classes: int,
    box: int,
    r_max: int,
    processes: Processes = ALONE,
) -> Tensor:
    """Filtered half maps (2, K, d, d, d) of all classes at the particles' poses, the same in all processes.

    A half of a class is summed up by one process, in the order in which one process alone would do it: its sums do not
    depend on the number of processes, and neither does any pose that follows from them.
    """
    part = 2 * label + half
    load, owner = np.zeros(processes.count), np.zeros(2 * classes, np.int64)
    sizes = np.bincount(part, minlength=2 * classes)
    for one in np.argsort(-sizes, kind="stable"):
        owner[one] = load.argmin()
        load[owner[one]] += sizes[one]
    mine = np.where(owner[part] == processes.rank, label, -1)

    def summed() -> ClassSums | None:
        weights = ClassWeights.from_labels(mine, classes)
        return accumulate(particles, weights, half, box=box, r_max=r_max) if (mine >= 0).any() else None

    sums = processes.each(summed)
    if processes.count > 1:
        sums = _of_all(sums, sizes.reshape(classes, 2), box, processes)
    with sums or nullcontext():
        return processes.first_does(lambda: filtered(sums))


def _of_all(sums: ClassSums | None, sizes: np.ndarray, box: int, processes: Processes) -> ClassSums | None:
    """The sums of all processes, each of which has its classes and halves, in the first; None in the others."""
    kept = {}
    with sums or nullcontext():
        for k, h in np.argwhere(sizes > 0).tolist():
            acc = new_accumulator(box) if sums is None else sums.load(k, h)
            processes.add_up(acc.data)
            if processes.first:
                kept[k, h] = acc
        if processes.first:
            return ClassSums(len(sizes), box, sums.pixel_size, sizes.astype(np.float64), sums.r_max, kept)
    return None
