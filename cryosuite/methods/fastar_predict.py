"""What a pose network answers for a batch of particles: poses, rival poses, and how sure it is."""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from cryosuite.errors import InputError
from cryosuite.kernels import so3_grid
from cryosuite.kernels.memory import Portions
from cryosuite.kernels.planar import local_mean
from cryosuite.methods.fastar_images import Window
from cryosuite.methods.fastar_reference import Reference, Views, template_views
from cryosuite.nets.multiview import Multiview, MultiviewSpec

ORDER = 2  # of the grid whose cells are scored: 4,608 rotations 15 degrees apart
TOP = 8  # cells that are looked at one level finer
WIDE = 128  # cells among which rivals are looked for
BANK = 512  # projections encoded at a time
NEAR = 20.0  # degrees within which a cell and the regression say the same
RIVALS = 4  # poses handed on to a refinement


@dataclass
class Answer:
    """Poses of a batch.

    rotation (b, 3, 3), shift (b, 2) fraction of the NETWORK's field, rivals (b, K, 3, 3) poses worth trying, the answer
    first. score (b,): probability that the truth is within 20 degrees as the network sees it. margin (b,): logarithm of
    the odds against the best cell farther away.
    """

    rotation: Tensor
    shift: Tensor
    rivals: Tensor
    score: Tensor
    margin: Tensor


class Predictor(Protocol):
    """Anything that poses images (b, C, s, s); ``rows`` (b,) are their places in the set."""

    spec: MultiviewSpec

    def __call__(self, images: Tensor, rows: Tensor) -> Answer: ...


class Clock:
    """Seconds per stage. On a GPU by events, so that nothing waits for it until the totals are asked for."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._all: str | None = None

    @contextlib.contextmanager
    def everything(self, stage: str) -> Iterator[None]:
        """Count all stages that are named inside as this one."""
        self._all = stage
        yield
        self._all = None

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count what is done inside to a stage."""
        stage = self._all or stage
        if self.cuda:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((stage, first, last))
            return
        began = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - began

    def totals(self) -> dict[str, float]:
        """Seconds of each stage so far."""
        if self._events:
            torch.cuda.synchronize()
            for stage, first, last in self._events:
                self.seconds[stage] += first.elapsed_time(last) / 1000
            self._events.clear()
        return dict(self.seconds)


def autocast(precision: str, device: torch.device | str) -> Callable[[], contextlib.AbstractContextManager]:
    """What a network is run inside: bfloat16 products ("bf16") or nothing ("32")."""
    kind = torch.device(device).type
    if precision == "bf16":
        return lambda: torch.autocast(kind, torch.bfloat16)
    return contextlib.nullcontext


class _Portions(ABC):
    """A predictor that answers in smaller portions where memory runs out; ``answer`` is that of one portion."""

    portions: Portions

    @torch.inference_mode()
    def __call__(self, images: Tensor, rows: Tensor) -> Answer:
        """Answers for images (b, C, s, s)."""
        parts = [found for _, found in self.portions.over(lambda some: self.answer(images[some]), len(images))]
        if len(parts) == 1:
            return parts[0]
        return Answer(*(torch.cat([getattr(part, one.name) for part in parts]) for one in fields(Answer)))

    @abstractmethod
    def answer(self, images: Tensor) -> Answer:
        """Answers for images that fit the memory together."""


class TargetPredictor(_Portions):
    """Poses against templates of a known map, each image by itself.

    Args:
        model: in target mode. reference, window: of the particles. templates: how many views are shown.
    """

    def __init__(
        self,
        model: Multiview,
        reference: Reference,
        window: Window,
        templates: int = 12,
        device: torch.device | str = "cpu",
        precision: str = "32",
        clock: Clock | None = None,
    ) -> None:
        self.model, self.spec, self.device = model.to(device).eval(), model.spec, torch.device(device)
        self.clock, self.portions = clock or Clock(device), Portions("images")
        self.within = autocast(precision, device)
        images, rotation = template_views(reference.volume, window, templates, self.spec.in_channels)
        with torch.inference_mode(), self.within(), self.clock("templates"):
            maps = self.model.maps_of(rotation.to(device))
            self.cache = self.model.templates(images[None].to(device), maps[None])
            self.cells = Cells(self.model, self.device) if self.spec.grid_head else None

    def answer(self, images: Tensor) -> Answer:
        """Answers for images (b, C, s, s)."""
        with self.within(), self.clock("encode"):
            tokens = self.model.encode(images.to(self.device))
        with self.within(), self.clock("decode"):
            heads = self.model.heads(self.model.against(self.cache, tokens[None]))
        with self.clock("Kabsch"):
            found = self.model.poses(heads)
            rotation, shift = found.rotation[0], found.shift[0]
        if self.cells is None:
            score = found.confidence[0]
            return Answer(rotation, shift, rotation[:, None], score, torch.zeros_like(score))
        with self.clock("grid"):
            return self.cells.answer(heads.pooled[0], rotation, shift)


class MatchPredictor(_Portions):
    """Poses by looking: an image's vector is compared with those of the map's projections at all cells of a grid.

    Args: as TargetPredictor; ``order`` of the grid: 2 has 4,608 projections, 15 degrees apart. turns: 1, 2 or 4 quarter
    turns in which each image is looked at; a turned image has its pose in a cell on the same fibre of the grid.
    """

    def __init__(
        self,
        model: Multiview,
        reference: Reference,
        window: Window,
        order: int = ORDER,
        turns: int = 1,
        device: torch.device | str = "cpu",
        precision: str = "32",
        clock: Clock | None = None,
    ) -> None:
        self.model, self.spec, self.device = model.to(device).eval(), model.spec, torch.device(device)
        self.clock, self.within = clock or Clock(device), autocast(precision, device)
        self.portions = Portions("images")
        self.turns, self.around = range(0, 4, 4 // turns), so3_grid.n_in_plane(order)
        self.cells = so3_grid.grid_rotations(order, device=device)
        views = Views(reference.volume, window, self.spec.in_channels, device)
        with torch.inference_mode(), self.within(), self.clock("templates"):
            parts = self.cells.split(BANK)
            self.bank = torch.cat([self.model.match(self.model.encode(views(part))).vector.float() for part in parts])

    def answer(self, images: Tensor) -> Answer:
        """Answers for images (b, C, s, s): the mean of the cells near the best one, by their chances."""
        images = images.to(self.device)
        with self.within(), self.clock("encode"):
            matches = [self.model.match(self.model.encode(quarter_turns(images, k))) for k in self.turns]
        with self.clock("grid"):
            scores, shift = 0.0, 0.0
            for k, match in zip(self.turns, matches, strict=True):
                said = self.model.match_scores(match.vector, self.bank).unflatten(1, (-1, self.around))
                scores = scores + said.roll(k * self.around // 4, 2).flatten(1)
                shift = shift + match.shift.float() @ _quarter(k, self.device)
            scores, shift = scores / len(self.turns), shift / len(self.turns)
            rotation, mass = local_mean(scores, self.cells, NEAR)
            best = scores.topk(WIDE, 1)
            rivals = _apart(rotation[:, None], self.cells[best.indices], best.values)
            near = _traces(rotation, self.cells) > 1 + 2 * math.cos(math.radians(NEAR))
            other = torch.where(near, -torch.inf, scores).amax(1)
            return Answer(rotation, shift, rivals, mass, best.values[:, 0] - other)


def quarter_turns(images: Tensor, count: int) -> Tensor:
    """Images (..., D, D) whose content is turned by ``count`` quarter turns about pixel D // 2, from x towards y."""
    for _ in range(count):
        images = images.transpose(-1, -2).flip(-1).roll(1, -1)
    return images


def _quarter(count: int, device: torch.device) -> Tensor:
    """(2, 2) matrix that turns row vectors of the turned image back."""
    c, s = ((1, 0), (0, 1), (-1, 0), (0, -1))[count % 4]
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float32, device=device)


class Cells:
    """The grid head: scores of the cells of SO(3), and what they and the regression come to together."""

    def __init__(self, model: Multiview, device: torch.device) -> None:
        self.model = model
        self.coarse = so3_grid.grid_rotations(ORDER, device=device)
        self.codes = model.cell_codes(self.coarse)
        self.fine_codes = model.cell_codes(so3_grid.grid_rotations(ORDER + 1, device=device))

    def answer(self, pooled: Tensor, regression: Tensor, shift: Tensor) -> Answer:
        """The regression where it lies within 20 degrees of the best cell, else that cell, one level finer."""
        logits = self.model.grid_scores(pooled, codes=self.codes).float()  # (b, G)
        best = logits.topk(WIDE, 1)
        child = so3_grid.children_at(best.indices[:, :TOP], ORDER)  # (b, TOP, 8)
        scores = (self.fine_codes[child] @ pooled.float()[:, None, :, None]).flatten(1)
        finest = child.flatten(1).gather(1, scores.argmax(1, keepdim=True))[:, 0]
        first = so3_grid.rotations_at(finest, ORDER + 1, regression.dtype)
        rotation = torch.where(_close(regression, first)[:, None, None], regression, first)
        near = _traces(rotation, self.coarse) > 1 + 2 * math.cos(math.radians(NEAR))
        mass = (logits.softmax(1) * near).sum(1)
        inside = torch.where(near, logits, -torch.inf).amax(1)
        outside = torch.where(near, -torch.inf, logits).amax(1)
        rivals = _apart(torch.stack([rotation, regression], 1), self.coarse[best.indices], best.values)
        return Answer(rotation, shift, rivals, mass, inside - outside)


def _traces(a: Tensor, b: Tensor) -> Tensor:
    """trace(a^T b) of rotations (n, 3, 3) with (G, 3, 3): (n, G)."""
    return a.flatten(1) @ b.flatten(1).T


def _close(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-1, -2)) > 1 + 2 * math.cos(math.radians(NEAR))


def _apart(first: Tensor, cells: Tensor, value: Tensor) -> Tensor:
    """RIVALS poses (b, RIVALS, 3, 3): the ``first`` (b, k, 3, 3), then the best cells 20 degrees from those taken.

    cells (b, n, 3, 3) with their scores (b, n). Where there are not enough poses apart the best of the others fill up.
    """
    flat = torch.cat([first, cells], 1).flatten(2)
    near = flat @ flat.transpose(1, 2) > 1 + 2 * math.cos(math.radians(NEAR))
    k = first.shape[1]
    blocked = near[:, :k].any(1)[:, k:]
    taken = torch.zeros_like(blocked)
    chosen = list(first.unbind(1))
    rows = torch.arange(len(cells), device=cells.device)
    for _ in range(RIVALS - k):
        pick = (value - 1e6 * taken - 1e3 * blocked).argmax(1)
        chosen.append(cells[rows, pick])
        taken[rows, pick] = True
        blocked = blocked | near[rows, k + pick][:, k:]
    return torch.stack(chosen, 1)


class StarPredictor:
    """Poses of a set of images relative to the first of them (ab initio), ours or the released network's."""

    def __init__(
        self, model: Multiview, device: torch.device | str = "cpu", precision: str = "32", clock: Clock | None = None
    ) -> None:
        self.model, self.spec, self.device = model.to(device).eval(), model.spec, torch.device(device)
        self.clock, self.within = clock or Clock(device), autocast(precision, device)
        self.images, self.sets = Portions("images"), Portions("sets of images")

    @torch.inference_mode()
    def encode(self, images: Tensor, rows: Tensor) -> Tensor:
        """Tokens (b, T, d) of images (b, C, s, s), each by itself."""

        def tokens(some: slice) -> Tensor:
            with self.within(), self.clock("encode"):
                return self.model.encode(images[some].to(self.device))

        return torch.cat([found for _, found in self.images.over(tokens, len(images))])

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotations (..., N, 3, 3) in the frame of view 0, shifts (..., N, 2), confidence (..., N) of sets of tokens
        (..., N, T, d); at most one leading dimension."""
        sets = tokens if tokens.ndim == 4 else tokens[None]
        parts = [found for _, found in self.sets.over(lambda some: self._posed(sets[some]), len(sets))]
        values = tuple(torch.cat(part) for part in zip(*parts, strict=True))
        return values if tokens.ndim == 4 else tuple(value[0] for value in values)

    def _posed(self, sets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of sets (S, N, T, d) that fit the memory together."""
        with self.within(), self.clock("decode"):
            heads = self.model.heads(self.model.star(sets))
        with self.clock("Kabsch"):
            found = self.model.poses(heads)
        return found.rotation, found.shift, found.confidence


def require_spec(spec: MultiviewSpec, mode: str, source: str) -> None:
    """InputError where a network cannot do what is asked of it."""
    if mode == "target" and (spec.head != "affine" or spec.role != "two"):
        raise InputError(
            f"{source}: the published network knows no reference map: leave --map and --model out and add "
            "--experimental, or take weights of `cryosuite train-fastar --mode target`"
        )
