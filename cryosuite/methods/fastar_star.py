"""Poses without a reference map, of any number of particles: chunks that share one reference image and a few anchors.

A network poses the images of a set relative to the first of them. Of a few candidates the image is made the reference
under which the network is surest of all others; every chunk holds it, the same anchors, and new particles. Chunks are
then tied by their anchors (fastar_chunks). Each image is encoded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cryosuite.data.loader import BatchLoader
from cryosuite.data.particles import ParticleSet
from cryosuite.errors import InputError, notice
from cryosuite.methods import fastar_chunks as chunks
from cryosuite.methods.fastar_images import Preparation, ReleasedPreparation
from cryosuite.methods.fastar_predict import StarPredictor

TOGETHER = 1024  # images in the chunks that are decoded at once
LEAST = 3  # views: two images of an unknown molecule share one line only


@dataclass(frozen=True)
class StarOptions:
    """views: of a chunk, the reference among them. anchors: shared by all chunks. candidates: for the reference.
    references: whose predictions are combined. seed: of what is drawn."""

    views: int = 128
    anchors: int = 8
    candidates: int = 16
    references: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        fit = self.views > LEAST and 1 <= self.anchors <= self.views - 2
        if not fit or min(self.candidates, self.references) < 1:
            raise InputError(
                f"--views {self.views}, --anchors {self.anchors}: at least {LEAST + 1} views, and fewer anchors than "
                "views less 1, are needed; --ref-candidates and --references from 1 on"
            )


@dataclass
class StarPoses:
    """Rotations (N, 3, 3) in the reference's frame, shifts (N, 2) fraction of the network's field, confidence (N,),
    good (N,) bool, undecided (N,) bool: rows of chunks whose hand is not known. facts: what is printed."""

    rotation: Tensor
    shift: Tensor
    confidence: Tensor
    good: Tensor
    undecided: Tensor
    facts: dict[str, object] = field(default_factory=dict)


class StarRun:
    """Poses of a particle set; ``run`` does everything."""

    def __init__(
        self,
        particles: ParticleSet,
        predictor: StarPredictor,
        preparation: Preparation,
        options: StarOptions,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        if len(particles) < LEAST:
            raise InputError(
                f"{particles.path}: {len(particles)} particles: at least {LEAST} are needed to pose them by each other"
            )
        self.count, self.options = len(particles), options
        self.predictor, self.preparation = predictor, preparation
        self.advance = advance or (lambda count: None)
        self.loader = BatchLoader(particles, TOGETHER, shuffle=False, prefetch=0)
        self.good = torch.ones(self.count, dtype=torch.bool)

    def tokens(self, rows: np.ndarray) -> Tensor:
        """Encoded images (n, T, d) of some rows."""
        with self.predictor.clock("load"):
            images, good = self.preparation(self.loader.batch(rows))
        self.good[torch.from_numpy(rows)] = good.cpu()
        return self.predictor.encode(images, torch.from_numpy(rows))

    def run(self) -> StarPoses:
        """Choose references, pose everything against each, and combine."""
        with self.predictor.clock.everything("select"):
            released = isinstance(self.preparation, ReleasedPreparation)
            references, ranked = self._contrast() if released else self._select()[:2]
        found = [self._against(row, ranked[ranked != row][: self.options.anchors]) for row in references]
        self.loader.broken.finish()
        if len(found) == 1:
            return found[0]
        stack = torch.stack([one.rotation for one in found])
        weight = torch.stack([one.confidence for one in found])
        placed, rotation = chunks.together(stack, weight)
        spread = chunks.fit_frame(placed[1], placed[0], weight[1])
        facts = found[0].facts | {"references": len(found), "between_references_deg": float(spread.degrees)}
        shift = torch.stack([one.shift for one in found]).mean(0)
        undecided = torch.stack([one.undecided for one in found]).all(0)
        return StarPoses(rotation, shift, weight.mean(0), self.good, undecided, facts)

    def _contrast(self) -> tuple[list[int], np.ndarray]:
        """The selection with the contrast under which the network is surer: nobody knows which it was trained on."""
        tried = {}
        for sign in (1.0, -1.0):
            self.preparation.sign = sign
            tried[sign] = self._select()
        best = max(tried, key=lambda sign: tried[sign][2])
        self.preparation.sign = best
        notice(f"the network is surer of the images {'as they are' if best > 0 else 'with their contrast inverted'}")
        return tried[best][:2]

    def _select(self) -> tuple[list[int], np.ndarray, float]:
        """The best candidates for a reference, rows of the selection in order of confidence under the first, and that
        confidence."""
        o = self.options
        generator = np.random.default_rng([o.seed, 11])
        rows = np.sort(generator.permutation(self.count)[: min(o.views, self.count)])
        tokens = self.tokens(rows)
        good = np.flatnonzero(self.good.numpy()[rows])
        if len(good) < LEAST:
            raise InputError("the images hold nothing: nearly all of them are constant or not numbers")
        tried = generator.permutation(good)[: o.candidates]
        scores, sure = [], []
        for place in tried.tolist():
            order = np.concatenate([[place], np.setdiff1d(good, [place])])
            confidence = self.predictor.decode(tokens[order])[2].float().cpu()
            scores.append(float(confidence[1:].mean()))
            sure.append(rows[order[1:]][np.argsort(-confidence[1:].numpy(), kind="stable")])
        best = np.argsort(scores)[::-1][: o.references]
        return [int(rows[tried[k]]) for k in best], sure[int(best[0])], scores[int(best[0])]

    # --- one reference -----------------------------------------------------------------------------------------------

    def _against(self, reference: int, anchors: np.ndarray) -> StarPoses:
        """Poses of all particles relative to one of them."""
        fixed = np.concatenate([[reference], anchors]).astype(np.int64)
        rest = np.setdiff1d(np.arange(self.count), fixed)
        if len(rest) <= self.options.views - len(fixed):  # one chunk: anchors are particles like the others
            fixed, rest = fixed[:1], np.setdiff1d(np.arange(self.count), fixed[:1])
        shared = self.tokens(fixed)
        size = max(1, self.options.views - len(fixed))
        parts = [rest[start : start + size] for start in range(0, len(rest), size)]
        state = _State(self.count, fixed)
        self._decode(state, shared, parts)
        tied = state.tie()
        if tied is not None and bool(tied.fit.undecided.any()):
            again = np.concatenate([state.rows[c] for c in torch.nonzero(tied.fit.undecided).flatten().tolist()])
            again = np.random.default_rng([self.options.seed, 12]).permutation(again)
            state.forget(tied.fit.undecided)
            self._decode(state, shared, [again[start : start + size] for start in range(0, len(again), size)])
            tied = state.tie()
        return state.poses(tied, self.good)

    def _decode(self, state: _State, shared: Tensor, parts: list[np.ndarray]) -> None:
        """Pose chunks, several of one size at a time."""
        group = max(1, TOGETHER // self.options.views)
        start = 0
        while start < len(parts):
            end = start + 1
            while end < len(parts) and end - start < group and len(parts[end]) == len(parts[start]):
                end += 1
            own = parts[start:end]
            tokens = self.tokens(np.concatenate(own)).unflatten(0, (len(own), -1))
            sets = torch.cat([shared.expand(len(own), *shared.shape), tokens], 1)
            rotation, shift, confidence = (value.float().cpu() for value in self.predictor.decode(sets))
            for k, rows in enumerate(own):
                state.add(rows, rotation[k], shift[k], confidence[k])
            self.advance(sum(map(len, own)))
            start = end


class _State:
    """Answers of all chunks against one reference, each in its own frame."""

    def __init__(self, count: int, fixed: np.ndarray) -> None:
        self.count, self.fixed = count, fixed
        self.rows: list[np.ndarray] = []
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, rows: np.ndarray, rotation: Tensor, shift: Tensor, confidence: Tensor) -> None:
        """One chunk: the fixed views, then those of ``rows``."""
        self.rows.append(rows)
        self.found.append((rotation, shift, confidence))

    def forget(self, chunk: Tensor) -> None:
        """Drop chunks (C,) bool."""
        kept = torch.nonzero(~chunk).flatten().tolist()
        self.rows, self.found = [self.rows[c] for c in kept], [self.found[c] for c in kept]

    def tie(self) -> chunks.Tied | None:
        """All chunks in one frame by their anchors; None where there is but one."""
        if len(self.found) < 2:
            return None
        n = len(self.fixed)
        return chunks.tie(
            torch.stack([r[1:n] for r, _, _ in self.found]), torch.stack([c[1:n] for _, _, c in self.found])
        )

    def poses(self, tied: chunks.Tied | None, good: Tensor) -> StarPoses:
        """Every particle in the frame of the first chunk."""
        out = StarPoses(
            torch.eye(3).repeat(self.count, 1, 1), torch.zeros(self.count, 2), torch.zeros(self.count), good,
            torch.zeros(self.count, dtype=torch.bool),
        )  # fmt: skip
        n = len(self.fixed)
        for c, (rows, (rotation, shift, confidence)) in enumerate(zip(self.rows, self.found, strict=True)):
            at = torch.from_numpy(rows)
            own = rotation[n:]
            if tied is not None:
                own = chunks.moved(own, tied.fit.frame[c], tied.fit.flipped[c])
                out.undecided[at] = tied.fit.undecided[c]
            out.rotation[at], out.shift[at], out.confidence[at] = own, shift[n:], confidence[n:]
        at = torch.from_numpy(self.fixed)
        out.shift[at] = torch.stack([s[:n] for _, s, _ in self.found]).mean(0)
        out.confidence[at] = torch.stack([c[:n] for _, _, c in self.found]).mean(0)
        if tied is not None:
            out.rotation[at[1:]] = tied.anchors
            out.rotation[at[0]] = _reference(self.found, tied)
            out.facts = dict(chunks.agreement(tied))
            if out.facts["undecided"]:
                notice(f"{int(out.undecided.sum())} particles are in chunks whose hand their anchors do not tell")
        else:
            out.rotation[at] = self.found[0][0][:n]
            out.facts = {"chunks": len(self.found), "flips": 0, "undecided": 0}
        return out


def _reference(found: list[tuple[Tensor, Tensor, Tensor]], tied: chunks.Tied) -> Tensor:
    """The reference's own rotation: what each chunk says of it, in the common frame."""
    said = torch.stack([rotation[0] for rotation, _, _ in found])
    return chunks.chordal_mean(chunks.moved(said, tied.fit.frame, tied.fit.flipped), torch.ones(len(said)))
