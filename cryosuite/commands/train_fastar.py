"""``cryosuite train-fastar``: a network that says from where a particle image was taken, learnt from simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from cryosuite.commands import training_options as shared
from cryosuite.commands.options import say_not_used, say_without_effect
from cryosuite.commands.training_options import (
    ENGINE,
    TRAINING,
    count,
    ends,
    lengths,
    longer,
    option,
    precision,
    shorter_budget,
    typed_again,
    typed_values,
)
from cryosuite.data.typed import typed

DATA, LOSS = "Simulated particles", "What is learnt"
METHOD = {
    "mode": "mode", "structures": "structures", "hold_out": "hold_out", "map": "map", "full_map": "full_map",
    "finetune": "finetune", "start": "start", "views": "views", "snr": "snr", "curriculum": "curriculum", "ctf": "ctf",
    "shift": "shift", "junk": "junk", "hand_loss": "hand_loss", "map_weight": "map_weight", "templates": "templates",
    "hard": "hard",
}  # fmt: skip
TRAIN = ENGINE | {"log_interval": "log_every", "compile": "compile"}


def main(
    context: typer.Context,
    outdir: shared.RunFolder,
    preset: str = typer.Option(
        "auto",
        help="Size of the network: micro (32 pixels, for a CPU), nano64, tiny64 or small64 (64 pixels, for a GPU). "
        "auto: nano64 where there is a GPU, else micro.",
    ),
    mode: str = typer.Option(
        None,
        help="target: poses against a map or model you have (default). ab-initio: poses of images relative to each "
        "other, experimental.",
        show_default=False,
    ),
    resume: shared.Resume = False,
    overwrite: shared.Replace = False,
    structures: str = option(
        None,
        help="Molecules to simulate: phantom (made up, endless; default), a folder of PDB or mmCIF files, or "
        "both:FOLDER.",
        panel=DATA,
    ),
    hold_out: str = option(None, help="Structures kept out to test on: how many, or names.", panel=DATA),
    map: Path = option(
        None, "--map", help="Tune on this one molecule: an .mrc map, low-passed as fastar-infer does.", panel=DATA
    ),
    full_map: bool = option(
        None, "--full-map", help="Do not low-pass the map of --map; its own details then bias poses.", panel=DATA
    ),
    finetune: Path = option(
        None,
        "--finetune",
        help="Tune on real particles with known poses (a .star, .cs or work folder); needs --map.",
        panel=DATA,
    ),
    views: str = option(None, help="Views of each molecule in a step, such as 64, or 3:32 to rise.", panel=DATA),
    snr: str = option(None, help="Signal to noise ratio, from:to over the curriculum, such as 10:0.1.", panel=DATA),
    curriculum: str = option(None, help="Images over which the noise rises, such as 200k.", panel=DATA),
    ctf: float = option(None, help="Share of the steps with a CTF, once it is switched on.", panel=DATA),
    shift: float = option(None, help="Largest shift, as a fraction of the box.", panel=DATA),
    junk: float = option(None, help="Share of images without particle (ab-initio).", panel=DATA),
    start: Path = option(
        None, "--weights", help="Go on from these weights (of the same preset); for --map and --finetune.", panel=LOSS
    ),
    hard: int = option(None, help="Wrong projections per particle that look nearly right.", panel=LOSS),
    map_weight: float = option(
        None, help="Weight of predicting the planar map against templates too; 0: only matching.", panel=LOSS
    ),
    templates: int = option(
        None, help="Views of the reference that are shown where the planar map is predicted.", panel=LOSS
    ),
    hand_loss: str = option(
        None, help="ab-initio: which hand of a set is right: min (the nearer), anchor or none.", panel=LOSS
    ),
    images: str = option(None, help="Images seen in all, such as 900k or 40M.", panel=TRAINING),
    every: str = option(
        None, help="Test and write the weights every so many images; default: 10 times.", panel=TRAINING
    ),
    batch_size: shared.BatchSize = None,
    lr: shared.LearningRate = None,
    warmup: int = option(500, help="Steps in which the learning rate rises.", panel=TRAINING),
    max_minutes: shared.MaxMinutes = None,
    max_hours: shared.MaxHours = None,
    checkpoint_minutes: shared.CheckpointMinutes = 1.0,
    log_interval: shared.LogInterval = 20,
    seed: shared.Seed = 0,
    precision: shared.Precision = "auto",
    accelerator: shared.Accelerator = "auto",
    devices: shared.Devices = 1,
    num_nodes: shared.NumNodes = 1,
    compile: shared.Compile = False,
    requeue: shared.Requeue = False,
) -> None:
    """Train a network that finds the poses of particle images, on simulated particles (CryoFastAR).

    Nothing is downloaded: molecules are made up, or taken from a folder of
    atomic models. Writes weights.safetensors and a card that says how good
    they are on molecules never seen, beside what guessing would give.

        cryosuite train-fastar -o run/ --structures both:models/

        cryosuite train-fastar -o run/ --resume --max-minutes 60

        cryosuite train-fastar -o tuned/ --weights run/ --map ref.mrc

        cryosuite fastar-infer set.star --map ref.mrc --weights run/ -o poses/
    """
    values, typed = typed_values(context)
    values["max_minutes"] = shorter_budget(values)
    if resume:
        say_not_used(context, (*TRAIN, "images", "max_hours"))
    raise typer.Exit(_train(values, typed))


def _train(values: dict[str, Any], typed: set[str]) -> int:
    """Open, train, write, print; returns the exit code."""
    from cryosuite.data.workdir import RunDir
    from cryosuite.methods.fastar import Fastar
    from cryosuite.methods.fastar_options import FastarOptions
    from cryosuite.methods.fastar_run import after_epoch, card_file, make_molecules, weights_file
    from cryosuite.methods.fastar_validate import Examiner
    from cryosuite.training.launch import meet, process_rank, tune_process
    from cryosuite.training.loop import fit
    from cryosuite.training.runs import begin_run, go_on_with, make_config

    tune_process()
    run = RunDir(values["outdir"])
    options, training, epoch_images = _options(values)
    if not values["resume"]:
        say_without_effect(options.without_effect(typed))
    config = make_config("fastar", run.path, run, options, training, epoch_images=epoch_images, warmup=values["warmup"])
    config = begin_run(run, config, training, resume=values["resume"], overwrite=values["overwrite"])
    fresh = not run.checkpoint.exists()
    if fresh and process_rank() == 0:
        for path in (weights_file(run), card_file(run)):  # of a run that was replaced
            path.unlink(missing_ok=True)
    chosen = FastarOptions.from_dict(config["options"])
    longer_by, command = longer(values, config)  # then the last fifth moves to the new end
    again = typed_again(values, typed, TRAIN) | {"max_minutes": values["max_minutes"]} | longer_by
    wanted = go_on_with(run, config, **again)
    # what one process cannot read ends all of them: the others would wait for it
    molecules, held = meet(wanted).each(lambda: make_molecules(chosen, config["epoch_images"], run))
    method = Fastar(chosen, config["warmup"], load=fresh)
    notes = {"command": command, "seed": config["training"]["seed"], "trained_by": "cryosuite train-fastar"}
    examiner = Examiner(molecules, method, run, held)
    result = fit(
        method, molecules, run, wanted, resume=values["resume"],
        on_epoch=after_epoch(run, chosen, examiner, notes, config["epoch_images"]),
    )  # fmt: skip
    if process_rank() == 0:
        _report(run, chosen, result)
    return result.exit_code


def _options(values: dict[str, Any]) -> tuple[Any, Any, int]:
    """(options of the method, of the training, images between two validations)."""

    from cryosuite.errors import InputError, notice
    from cryosuite.methods.fastar_options import preset
    from cryosuite.training.launch import resolve_accelerator
    from cryosuite.training.options import TrainOptions

    gpu = resolve_accelerator(values["accelerator"]) == "cuda"
    name = values["preset"]
    if name == "auto":
        name = "nano64" if gpu else "micro"
        if not values["resume"]:
            reason = "a GPU is here" if gpu else "no GPU is used"
            notice(f"--preset {name} was chosen because {reason}; --preset micro, nano64, tiny64 or small64 decides")
    parsed = dict(values)
    parsed["views"] = ends(values["views"], "--views", int)
    parsed["snr"] = ends(values["snr"], "--snr")
    if values["curriculum"] is not None:
        parsed["curriculum"] = count(values["curriculum"], "--curriculum")
    for key in ("map", "finetune", "start"):
        parsed[key] = None if values[key] is None else str(Path(values[key]).absolute())
    if values["finetune"] is not None and values["map"] is None:
        raise InputError("--finetune needs --map, the map of the molecule in the frame of the particles' poses")
    # a run that goes on takes its own options from its config
    chosen = preset(name, **({} if values["resume"] else {to: parsed[key] for key, to in METHOD.items()}))
    given = {to: values[key] for key, to in TRAIN.items() if values[key] is not None}
    merged = chosen.training | {"lr_final": 0.0} | given
    epochs, every = lengths(values, chosen.images, merged["batch_size"])
    merged["precision"] = precision(values, None, gpu)
    return chosen.options, TrainOptions(epochs=epochs, **merged), every


def _report(run: Any, options: Any, result: Any) -> None:
    """How good it is, where it lies and what to do next."""
    from cryosuite.console import say, table
    from cryosuite.methods.fastar_run import HEADER, card_file, last_scores, score_rows, weights_file
    from cryosuite.methods.fastar_validate import verdict

    scores, path = last_scores(run), weights_file(run)
    if path.is_file() and scores:
        table(f"{result.epochs_done} rounds done", HEADER, score_rows(scores))
        say(f"verdict: {verdict(scores, options.mode)}")
        say(f"weights: {path}; card: {card_file(run)}")
    if result.stopped:
        say(f"stopped by {result.stopped}; go on with: cryosuite train-fastar -o {typed(run.path)} --resume")
    if path.is_file():
        extra = "--map ref.mrc" if options.mode == "target" else "--experimental"
        say(f"next: cryosuite fastar-infer particles.star {extra} --weights {typed(path)} -o poses/")
