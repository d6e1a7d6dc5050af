"""A run of fastar-infer from its options to its files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryosuite import __version__
from cryosuite.console import say
from cryosuite.data.multiview_weights import load_multiview, shipped_multiview
from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.data.results import PosesDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.json_text import write_json
from cryosuite.formats.pickles import read_poses
from cryosuite.methods import fastar_output as output
from cryosuite.methods.fastar_images import choose_window
from cryosuite.methods.fastar_infer import (
    InferOptions,
    Inferred,
    Predicted,
    finish,
    predict_search,
    predict_star,
    predict_target,
    settle_hand,
)
from cryosuite.methods.fastar_predict import (
    Clock,
    MatchPredictor,
    Predictor,
    StarPredictor,
    TargetPredictor,
    require_spec,
)
from cryosuite.methods.fastar_reference import Reference, gyration, load_reference, low_passed
from cryosuite.methods.fastar_star import StarOptions
from cryosuite.metrics.poses import pose_report
from cryosuite.nets.multiview import SPECS, Multiview, spec_name
from cryosuite.nets.multiview_spec import VIEW_TABLE
from cryosuite.training.launch import fast_bf16, resolve_accelerator

SHIPPED = "micro"
SHOWN = ("mode", "images", "images_seen", "seed")  # of a network's notes, in the summary


@dataclass
class Request:
    """What the command line asks for; ``options`` and ``star`` are fields of InferOptions and StarOptions."""

    outdir: Path
    overwrite: bool = False
    map: Path | None = None
    model: Path | None = None
    low_pass: float = 20.0
    weights: Path | None = None
    preset: str | None = None
    templates: int = 12
    turns: int = 4
    mode: str = "auto"
    experimental: bool = False
    truth: Path | None = None
    precision: str = "auto"
    accelerator: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    star: dict[str, Any] = field(default_factory=dict)

    def chosen_mode(self) -> str:
        """target with a map or model; without: ab-initio where that is allowed, else search."""
        if self.mode != "auto":
            return self.mode
        if self.map is not None or self.model is not None:
            return "target"
        return "ab-initio" if self.experimental else "search"


def run(particles: ParticleSet, request: Request, processes: Processes = ALONE) -> dict[str, Any] | None:
    """Pose the particles, write the folder, and return what infer.yaml says (and the errors against a truth).

    ``processes`` share the particles (in ab-initio mode poses are predicted by the first alone); the first one writes,
    the others return None. Raises InputError for whatever is wrong with what was given; then nothing was
    written.
    """
    out, mode = PosesDir(request.outdir), request.chosen_mode()
    device = resolve_accelerator(request.accelerator)
    precision = resolve_precision(request.precision, device)
    options = InferOptions(mode=mode, star=StarOptions(**request.star), **request.options)
    truth = None if request.truth is None else _truth(request.truth, particles)
    output.require_free(out, request.overwrite, clear=False)
    clock = Clock(device)
    reference = _reference(particles, request)
    network = _network(request, mode)
    if mode == "target":
        predicted = _target(particles, network[0], reference, request, options, clock, precision, processes)
    elif mode == "ab-initio":
        predicted = processes.first_does(lambda: _star(particles, network[0], options, clock, precision))
    else:
        predicted = _search(particles, network, request, options, clock, precision, processes)
    target = reference if mode == "target" else None
    result = finish(particles, predicted, options, clock, target, processes=processes)
    if not processes.first:
        return None
    if mode != "target" and reference is not None:
        result = settle_hand(result, reference)
    return _write(out, result, request, options, network, reference, truth)


def resolve_precision(name: str, device: str) -> str:
    """ "auto": bfloat16 where the GPU or the processor multiplies it fast."""
    if name != "auto":
        return name
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "32"
    return "bf16" if fast_bf16() else "32"


def make_target(
    model: Multiview, reference: Reference, window: Any, request: Request, device: str, precision: str, clock: Clock
) -> Predictor:  # fmt: skip
    """The predictor of target mode: by looking where the network can, else by regression against templates."""
    if model.matcher is not None:
        return MatchPredictor(model, reference, window, 2, request.turns, device, precision, clock)
    return TargetPredictor(model, reference, window, request.templates, device, precision, clock)


def make_star(model: Multiview, device: str, precision: str, clock: Clock) -> StarPredictor:
    """The predictor of ab-initio mode."""
    return StarPredictor(model, device, precision, clock)


# --- what is given ---------------------------------------------------------------------------------------------------


def _reference(particles: ParticleSet, request: Request) -> Reference | None:
    if request.map is None and request.model is None:
        return None
    pixel = float(np.median(particles.pixel_size))
    return load_reference(particles.box_size, pixel, request.map, request.model, request.low_pass)


def _network(request: Request, mode: str) -> tuple[Multiview | None, dict[str, str], str]:
    """The network, its notes and its name; none in search mode where nothing fits."""
    if request.preset is not None and request.preset not in SPECS:
        raise InputError(f"--preset {request.preset}: expected one of {', '.join(SPECS)}")
    if request.weights is not None:
        spec = None if request.preset is None else SPECS[request.preset]
        model, notes = load_multiview(request.weights, spec)
        source = str(request.weights)
    else:
        source = f"fastar-{request.preset or SHIPPED}"
        try:
            model, notes = shipped_multiview(source)
        except InputError:
            if mode != "search" or request.preset is not None:
                raise
            return None, {}, ""
    require_spec(model.spec, mode, source)
    trained = notes.get("mode", mode)
    if mode == "ab-initio" and trained == "target":
        raise InputError(
            f"{source}: was trained to pose images against a map (--mode target), so it cannot pose them against each "
            "other. Give a map (--map), weights of `train-fastar --mode ab-initio`, or leave --experimental out"
        )
    if mode == "target" and trained == "ab-initio":
        raise InputError(
            f"{source}: was trained to pose images against each other (--mode ab-initio): it takes no --map and no "
            "--model. Give weights of `train-fastar --mode target`, or leave the map out and add --experimental"
        )
    if mode == "search" and trained != "target":
        return None, {}, ""
    if trained == "released":
        notice(f"{source}: the released CryoFastAR weights are licensed CC BY-NC-SA 4.0: not for commercial use")
    return model, notes, f"{source} ({spec_name(model.spec)})"


def _truth(path: Path, particles: ParticleSet) -> tuple[np.ndarray, np.ndarray]:
    """True poses of the particles: one row each, or one per row of the original set."""
    rotation, shift = read_poses(path)
    shift = np.zeros((len(rotation), 2), np.float32) if shift is None else shift
    if len(rotation) == len(particles):
        return rotation, shift
    if len(rotation) > int(particles.index.max()):
        return rotation[particles.index], shift[particles.index]
    raise InputError(f"{path}: holds {len(rotation)} poses, the set {len(particles)} particles: are they of this set?")


# --- the three modes -------------------------------------------------------------------------------------------------


def _target(
    particles: ParticleSet, model: Multiview, reference: Reference, request: Request, options: InferOptions,
    clock: Clock, precision: str, processes: Processes = ALONE,
) -> Predicted:  # fmt: skip
    window = choose_window(particles.box_size, model.spec.size, reference.gyration)
    if window.width < window.box:
        say(f"the particle is small: the middle {window.width} of {window.box} pixels are looked at")
    predictor = make_target(model, reference, window, request, str(clock.device), precision, clock)
    return predict_target(particles, predictor, window, options, clock, processes=processes)


def _star(
    particles: ParticleSet, model: Multiview, options: InferOptions, clock: Clock, precision: str
) -> Predicted:  # fmt: skip
    notice("poses by a network without a reference are experimental: look at the map before you trust them")
    if model.spec.role == "table" and options.star.views > VIEW_TABLE:
        raise InputError(f"--views {options.star.views}: the published network has places for {VIEW_TABLE} views")
    window = choose_window(particles.box_size, model.spec.size, None)
    return predict_star(particles, make_star(model, str(clock.device), precision, clock), window, options)


def _search(
    particles: ParticleSet, network: tuple[Multiview | None, dict, str], request: Request, options: InferOptions,
    clock: Clock, precision: str, processes: Processes = ALONE,
) -> Predicted:  # fmt: skip
    """From nothing, with what a network sees against the first map as a second opinion."""
    model = network[0]
    notice(
        "no reference (--map, --model): poses are searched for without one"
        + ("" if model is None else "; the network's poses against the first map are tried beside those of the search")
    )

    def guess(volume: torch.Tensor, low_pass: float) -> Predicted:
        smooth = low_passed(volume, low_pass / float(np.median(particles.pixel_size)))  # as networks know their targets
        found = Reference(smooth, low_pass, "the map found", gyration(volume))
        return _target(particles, model, found, request, options, clock, precision, processes)

    return predict_search(particles, options, clock, None if model is None else guess, processes=processes)


# --- files -----------------------------------------------------------------------------------------------------------


def _write(
    out: PosesDir, result: Inferred, request: Request, options: InferOptions, network: tuple, reference: Any, truth: Any
) -> dict[str, Any]:
    """All files, the summary last."""
    output.require_free(out, request.overwrite)
    unknown, posed = result.hand == "undetermined", result.posed
    with _stage(result, "write"):
        output.write_poses(out, posed, result.judged, unknown)
    facts: dict[str, Any] = {"version": __version__, "mode": options.mode, "particles": len(posed)}
    facts |= {
        "left_out": int(result.judged.rejected.sum()), "hand": result.hand, "network": network[2],
        "trained": {key: network[1][key] for key in SHOWN if key in network[1]},
        "reference": None if reference is None else reference.source, "low_pass_A": request.low_pass,
        "refinement": result.history, **result.predicted.facts,
        "confidence_median": float(np.median(result.judged.confidence[:, 0])),
    }  # fmt: skip
    if result.reconstruction is not None:
        # poses of a search from nothing come from maps of all images; refinement begins with them
        biased = request.low_pass if options.mode == "target" else result.predicted.facts.get("joint_maps_to_A")
        title = f"half maps, {result.reconstruction.count} particles"
        facts["map"] = output.write_maps(out, result.reconstruction, biased, unknown, title)[1]
        with _stage(result, "check"):
            facts["checks"] = output.check_conventions(posed, ~result.judged.rejected)
            if options.mode == "target":
                facts["checks"] |= output.check_hand(result.reconstruction.map, reference.volume)
    if unknown:
        notice(f"the images do not tell the hand: {out.flipped_map.name}, {out.flipped_poses.name} are the other one")
    facts["timing"] = output.write_timing(out, result.seconds, len(posed))
    if truth is not None:
        facts["truth"] = _against(truth, result)
        write_json(out.truth, facts["truth"])
    output.write_summary(out, {key: value for key, value in facts.items() if key != "truth"})
    return facts


def _stage(result: Inferred, name: str) -> Any:
    """Time one more stage on the CPU."""
    clock = Clock()
    clock.seconds = result.seconds  # type: ignore[assignment]
    result.seconds.setdefault(name, 0.0)
    return clock(name)


def _against(truth: tuple[np.ndarray, np.ndarray], result: Inferred) -> dict[str, Any]:
    """Errors as predicted and in the end, with their levels of chance."""
    posed, predicted = result.posed, result.predicted
    score = result.judged.confidence[:, 0]
    stages = {"predicted": (predicted.rotation, predicted.shift)}
    if result.history:
        stages["refined"] = (posed.rotation, posed.shift)
    return {
        name: pose_report(R, truth[0], t, truth[1], posed.box_size, score).plain() for name, (R, t) in stages.items()
    }
