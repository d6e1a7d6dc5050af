"""Poses of a particle set by a trained network: against a known map, against each other, or as help to a search.

target: a map or model is given; every image is posed against its template views. ab-initio (experimental): images are
posed against one of them. search: nothing is given; poses and a map are searched for in closed form
(reconstruct.abinitio), and a network that knows targets then says what it sees against that map. All end alike: rounds
of local projection matching, a map with half maps, and checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from cryosuite.console import Progress, say
from cryosuite.data.loader import Batch, BatchLoader
from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.errors import InputError, notice
from cryosuite.kernels.planar import mirror
from cryosuite.methods.fastar_images import Preparation, ReleasedPreparation, Window
from cryosuite.methods.fastar_output import Judged, judge
from cryosuite.methods.fastar_predict import Clock, Predictor, StarPredictor
from cryosuite.methods.fastar_reference import Reference
from cryosuite.methods.fastar_star import StarOptions, StarRun
from cryosuite.metrics.align import align_map
from cryosuite.reconstruct.abinitio import AbInitio
from cryosuite.reconstruct.abinitio_starts import AbInitioOptions, options_for
from cryosuite.reconstruct.backproject import Reconstruction, reconstruct
from cryosuite.reconstruct.refine import FEWEST, RefineOptions, refine, search_everywhere

MODES = ("target", "ab-initio", "search")
CONFIDENT = 0.3  # median score of target mode below which poses are called doubtful (a dimer shares it between two)


@dataclass(frozen=True)
class InferOptions:
    """How poses are found.

    mode: see the module. star: of ab-initio mode. refine: rounds of local search. cone: degrees searched in the first
    of them. rescue: particles of a lower score than this are searched for over all orientations before the first round
    (target mode). reject: share of each cone of views, the least certain, left out of the map. use_ctf: False makes a
    map without any CTF. batch: images read and predicted at a time. seed: of what is drawn.
    """

    mode: str = "target"
    star: StarOptions = StarOptions()
    refine: int = 2
    cone: float = 20.0
    rescue: float = 0.4
    reject: float = 0.1
    use_ctf: bool = True
    batch: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"--mode {self.mode}: expected one of {', '.join(MODES)}")
        if not 0 <= self.reject < 1 or self.refine < 0 or not 0 < self.cone <= 60:
            raise InputError(
                f"--reject {self.reject:g}, --refine {self.refine}, --cone {self.cone:g}: expected a share from 0 to "
                "below 1, 0 or more rounds, and 1 to 60 degrees"
            )


@dataclass
class Predicted:
    """Poses as predicted: rotation (N, 3, 3), shift (N, 2) fraction of the box, score and margin (N,), good (N,) bool,
    rivals (N, K, 3, 3) and begin (N, 2): rotations and shifts that refinement begins with, where they are others.
    facts: what is printed."""

    rotation: np.ndarray
    shift: np.ndarray
    score: np.ndarray
    margin: np.ndarray
    good: np.ndarray
    rivals: np.ndarray | None = None
    begin: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Inferred:
    """The result: predictions, final poses (in ``posed``), who is left out, the map (None without a CTF), seconds."""

    predicted: Predicted
    posed: ParticleSet
    judged: Judged
    reconstruction: Reconstruction | None
    seconds: dict[str, float]
    history: list[dict[str, Any]] = field(default_factory=list)
    hand: str = "reference"  # or "undetermined", or "fitted" to a map that was given beside


def predict_target(
    particles: ParticleSet, predictor: Predictor, window: Window, options: InferOptions, clock: Clock,
    progress: bool = True, processes: Processes = ALONE,
) -> Predicted:  # fmt: skip
    """Poses of all particles against the predictor's target, batch after batch; memory does not grow with the images.

    Besides a few numbers per particle nothing is kept. ``processes`` share the particles and all get the same poses.
    """
    mine = processes.mine(np.arange(len(particles)), options.batch)
    n, device = len(mine), clock.device
    out = Predicted(
        np.empty((n, 3, 3), np.float32), np.empty((n, 2), np.float32), np.empty(n, np.float32), np.empty(n, np.float32),
        np.empty(n, bool),
    )  # fmt: skip
    preparation = Preparation(particles, window, predictor.spec.in_channels, device)
    chosen = replace(particles if n in (0, len(particles)) else particles.subset(mine), rotation=None, shift=None)
    loader = BatchLoader(chosen, options.batch, shuffle=False)
    batches = loader.epoch(0) if n else iter(())

    def work() -> None:
        pending: list[tuple[np.ndarray, Any, Any]] = []  # one batch behind, so that a GPU never waits for the copy back
        with Progress(n, "poses") if progress else _Silent() as bar:
            for batch in _timed(batches, clock):
                with clock("load"):
                    images, good = preparation(batch)
                pending.append((batch.index.numpy(), predictor(images, batch.index + int(mine[0])), good))
                if len(pending) > 1:
                    _store(out, *pending.pop(0), window)
                bar.advance(len(batch))
            for one in pending:
                _store(out, *one, window)

    processes.each(work)  # an image that one cannot read ends all of them
    loader.broken.share_part(particles, mine, processes)
    if processes.count > 1:
        kept = max(processes.everyone(lambda: 0 if out.rivals is None else out.rivals.shape[1]))
        out.rivals = np.empty((0, kept, 3, 3), np.float32) if out.rivals is None else out.rivals
        for name in ("rotation", "shift", "score", "margin", "good", "rivals"):
            setattr(out, name, processes.joined(getattr(out, name)))
    return out


def _timed(batches: Iterator[Batch], clock: Clock) -> Iterator[Batch]:
    """The batches; waiting for them counts as loading."""
    while True:
        with clock("load"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _store(out: Predicted, rows: np.ndarray, answer: Any, good: torch.Tensor, window: Window) -> None:
    """Copy an answer into the result."""
    values = [v.float().cpu().numpy() for v in (answer.rotation, answer.shift, answer.score, answer.margin)]
    out.rotation[rows], out.score[rows], out.margin[rows] = values[0], values[2], values[3]
    out.shift[rows] = values[1] * window.share
    out.good[rows] = good.cpu().numpy()
    rivals = answer.rivals.float().cpu().numpy()
    if out.rivals is None:
        out.rivals = np.empty((len(out.score), *rivals.shape[1:]), np.float32)
    out.rivals[rows] = rivals


def predict_star(
    particles: ParticleSet, predictor: StarPredictor, window: Window, options: InferOptions, progress: bool = True
) -> Predicted:
    """Poses of all particles relative to one of them, in the hand of the first chunk."""
    bare = replace(particles, rotation=None, shift=None)
    kind = ReleasedPreparation if predictor.spec.head == "dense" else Preparation
    preparation = kind(bare, window, predictor.spec.in_channels, predictor.device)
    with Progress(len(particles), "poses") if progress else _Silent() as bar:
        found = StarRun(bare, predictor, preparation, options.star, bar.advance).run()
    margin = np.where(found.undecided.numpy(), 0.0, 1.0).astype(np.float32)
    return Predicted(
        found.rotation.numpy(), (found.shift * window.share).numpy(), found.confidence.numpy(), margin,
        found.good.numpy(), facts=found.facts,
    )  # fmt: skip


def predict_search(
    particles: ParticleSet,
    options: InferOptions,
    clock: Clock,
    guess: Callable[[torch.Tensor, float], Predicted] | None = None,
    search: AbInitioOptions | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
) -> Predicted:
    """Poses from nothing but the images, by ``reconstruct.abinitio`` for one molecule.

    guess: what a network sees against a map (D, D, D) of a resolution in Angstrom; its poses stand beside those of the
    search as rivals in the first round of refinement, where the likelihood decides. ``processes`` share the images and
    all get the same poses.
    """
    with clock("search"):
        blind = replace(particles, rotation=None, shift=None)
        how = search or options_for(1, seed=options.seed)
        engine = AbInitio(blind, how, clock.device, processes=processes)
        with Progress(engine.total, "search for poses", "steps") if progress else _Silent() as bar:
            while not engine.done:
                before = engine.position
                engine.advance()
                bar.advance(engine.position - before)
        found = engine.found
    out = Predicted(found.rotation, found.shift, found.score, found.margin, found.good & np.isfinite(found.score))
    out.facts["joint_maps_to_A"] = particles.box_size * float(np.median(particles.pixel_size)) / engine.joint_radius
    if guess is None:
        return out
    posed = replace(particles, rotation=found.rotation, shift=found.shift)
    with clock("back-project"):
        first = reconstruct(posed, regularise="fsc", processes=processes)
        volume = processes.first_does(lambda: first.map)
    seen = guess(volume, 20.0)
    out.good = seen.good
    out.rivals = np.concatenate([found.rotation[:, None], seen.rotation[:, None]], 1)
    return out


def finish(
    particles: ParticleSet,
    predicted: Predicted,
    options: InferOptions,
    clock: Clock,
    reference: Reference | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
) -> Inferred:
    """Judge, refine, backproject.

    Rounds of refinement follow the prediction; in target mode the first matches to the reference (low-passed as the
    templates were), all others each half set to its own half map. ``processes`` share the images; only the first gets
    the map.
    """
    judged = judge(predicted.score, predicted.margin, predicted.rotation, predicted.good, options.reject)
    doubt(predicted, options.mode)
    posed = replace(
        particles, rotation=predicted.rotation, shift=predicted.shift, half=particles.half_sets(), poses_from=None
    )
    blind = particles.ctf is None and options.use_ctf
    if blind:
        notice("no map is made: the particles have no CTF (--ctf ctf.pkl; --no-ctf where they need no correction)")
        return Inferred(predicted, posed, judged, None, clock.totals(), hand=_hand(options.mode))
    if not options.use_ctf:
        posed = replace(posed, ctf=None)
    kept = np.bincount(posed.half[~judged.rejected], minlength=2)
    result, history = None, []
    if options.refine and kept.min() < FEWEST:
        notice(f"poses are not refined: half sets of {kept[0]} and {kept[1]} particles, {FEWEST} each are needed")
    elif options.refine:
        if options.mode == "target" and options.rescue > 0:
            rescue(posed, predicted, options, clock, reference, progress, processes)
        result = _refined(posed, predicted, judged, options, clock, reference, progress, processes)
        posed = replace(posed, rotation=result.rotation, shift=result.shift)
        history = result.history
    rows = np.flatnonzero(~judged.rejected)
    if not len(rows):
        notice("no map is made: no particle is left")
        return Inferred(predicted, posed, judged, None, clock.totals(), history, _hand(options.mode))
    with clock("back-project"):
        halves = bool(kept.min() > 0)
        made = reconstruct(posed, rows=rows, halves=halves, regularise="fsc" if halves else 0.1, processes=processes)
    posed = replace(posed, ctf=particles.ctf)
    return Inferred(predicted, posed, judged, made, clock.totals(), history, _hand(options.mode))


def rescue(
    posed: ParticleSet, predicted: Predicted, options: InferOptions, clock: Clock, reference: Reference, progress: bool,
    processes: Processes = ALONE,
) -> None:  # fmt: skip
    """Search against the reference, over all orientations, for particles of which the network is not sure.

    What is found takes the place of their ``rivals``, and of the shifts in ``begin``, from which poses are refined; the
    predictions themselves stay what they are.
    """
    rows = np.flatnonzero(predicted.good & (predicted.score < options.rescue))
    predicted.facts["searched_everywhere"] = len(rows)
    if not len(rows):
        return
    say(f"{len(rows):,} of {len(posed):,} particles are searched for over all orientations: the network is not sure")
    coarsest = max(reference.low_pass, 2 * float(np.median(posed.pixel_size)))
    keep = 1 if predicted.rivals is None else predicted.rivals.shape[1]
    with clock("search"), Progress(len(rows), "search") if progress else _Silent() as bar:
        found, shift, _ = search_everywhere(
            posed, rows, reference.volume, coarsest, keep, device=clock.device, advance=bar.advance,
            processes=processes,
        )  # fmt: skip
    own = predicted.rotation[:, None] if predicted.rivals is None else predicted.rivals
    predicted.rivals, predicted.begin = own.copy(), predicted.shift.copy()
    predicted.rivals[rows] = found
    predicted.begin[rows] = shift


def _hand(mode: str) -> str:
    return "reference" if mode == "target" else "undetermined"


def _refined(
    posed: ParticleSet, predicted: Predicted, judged: Judged, options: InferOptions, clock: Clock,
    reference: Reference | None, progress: bool, processes: Processes = ALONE,
) -> Any:  # fmt: skip
    """Rounds of local projection matching from the predictions and their rivals."""
    coarsest = 40.0 if reference is None else max(reference.low_pass, 2 * float(np.median(posed.pixel_size)))
    settings = RefineOptions(rounds=options.refine, cone=options.cone, coarsest=coarsest)
    start = predicted.rotation if predicted.rivals is None else predicted.rivals
    shift = predicted.shift if predicted.begin is None else predicted.begin
    weights = (~judged.rejected).astype(np.float32)
    volume = None if reference is None else reference.volume
    log = (lambda text, record: say(text)) if progress else None
    total = options.refine * len(processes.mine(np.arange(len(posed)), settings.batch))
    with clock("refine"), Progress(total, "refine") if progress else _Silent() as bar:
        how = (settings, weights, clock.device, log, bar.advance, processes)
        return refine(posed, start, shift, posed.half, volume, *how)


def doubt(predicted: Predicted, mode: str) -> None:
    """Say what is wrong with the images, and that poses are doubtful where the network itself doubts them."""
    bad = int((~predicted.good).sum())
    if bad:
        notice(f"{bad} images hold nothing (constant, or not numbers): they have no real pose and are left out")
    if mode == "target" and predicted.good.any():
        median = float(np.median(predicted.score[predicted.good]))
        if median < CONFIDENT:
            notice(
                f"the network is not sure of its poses (half of the particles below {median:.2f} of 1): refine them, "
                "and mind that bad poses look like heterogeneity"
            )


def settle_hand(result: Inferred, reference: Reference) -> Inferred:
    """Of poses found without a reference: the hand whose map fits a map that is given beside, in any orientation."""
    if result.reconstruction is None:
        return result
    alignment = align_map(result.reconstruction.map, reference.volume)
    if alignment.mirrored:
        other = mirror(torch.from_numpy(result.posed.rotation)).numpy()
        result.posed = replace(result.posed, rotation=other)
        result.reconstruction = result.reconstruction.flipped()
    result.hand = "fitted"
    return result


class _Silent:
    """A progress display that shows nothing."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Nothing."""
