"""``cryosuite train-fastar``: a network that says from where a particle image was taken, learnt from simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from cryosuite.commands.options import say_not_used, say_without_effect
from cryosuite.data.typed import typed

DATA, LOSS, TRAINING, SPEED = "Simulated particles", "What is learnt", "Training", "Machine"
METHOD = {
    "mode": "mode", "structures": "structures", "hold_out": "hold_out", "map": "map", "full_map": "full_map",
    "finetune": "finetune", "start": "start", "views": "views", "snr": "snr", "curriculum": "curriculum", "ctf": "ctf",
    "shift": "shift", "junk": "junk", "hand_loss": "hand_loss", "map_weight": "map_weight", "templates": "templates",
    "hard": "hard",
}  # fmt: skip
TRAIN = {
    "batch_size": "batch_size", "lr": "lr", "seed": "seed", "checkpoint_minutes": "checkpoint_every_minutes",
    "accelerator": "accelerator", "devices": "devices", "num_nodes": "num_nodes", "log_interval": "log_every",
    "requeue": "requeue", "compile": "compile",
}  # fmt: skip


def _option(default: Any, *names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(default, *names, help=help, rich_help_panel=panel, show_default=default is not None, **more)


def main(
    context: typer.Context,
    outdir: Path = typer.Option(..., "-o", "--outdir", help="Folder of the run, made by this command."),
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
    resume: bool = typer.Option(False, "--resume", help="Go on where the run in this folder stopped."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the run that is in the folder."),
    structures: str = _option(
        None,
        help="Molecules to simulate: phantom (made up, endless; default), a folder of PDB or mmCIF files, or "
        "both:FOLDER.",
        panel=DATA,
    ),
    hold_out: str = _option(None, help="Structures kept out to test on: how many, or names.", panel=DATA),
    map: Path = _option(
        None, "--map", help="Tune on this one molecule: an .mrc map, low-passed as fastar-infer does.", panel=DATA
    ),
    full_map: bool = _option(
        None, "--full-map", help="Do not low-pass the map of --map; its own details then bias poses.", panel=DATA
    ),
    finetune: Path = _option(
        None,
        "--finetune",
        help="Tune on real particles with known poses (a .star, .cs or work folder); needs --map.",
        panel=DATA,
    ),
    views: str = _option(None, help="Views of each molecule in a step, such as 64, or 3:32 to rise.", panel=DATA),
    snr: str = _option(None, help="Signal to noise ratio, from:to over the curriculum, such as 10:0.1.", panel=DATA),
    curriculum: str = _option(None, help="Images over which the noise rises, such as 200k.", panel=DATA),
    ctf: float = _option(None, help="Share of the steps with a CTF, once it is switched on.", panel=DATA),
    shift: float = _option(None, help="Largest shift, as a fraction of the box.", panel=DATA),
    junk: float = _option(None, help="Share of images without particle (ab-initio).", panel=DATA),
    start: Path = _option(
        None, "--weights", help="Go on from these weights (of the same preset); for --map and --finetune.", panel=LOSS
    ),
    hard: int = _option(None, help="Wrong projections per particle that look nearly right.", panel=LOSS),
    map_weight: float = _option(
        None, help="Weight of predicting the planar map against templates too; 0: only matching.", panel=LOSS
    ),
    templates: int = _option(
        None, help="Views of the reference that are shown where the planar map is predicted.", panel=LOSS
    ),
    hand_loss: str = _option(
        None, help="ab-initio: which hand of a set is right: min (the nearer), anchor or none.", panel=LOSS
    ),
    images: str = _option(None, help="Images seen in all, such as 900k or 40M.", panel=TRAINING),
    every: str = _option(
        None, help="Test and write the weights every so many images; default: 10 times.", panel=TRAINING
    ),
    batch_size: int = _option(None, "-b", "--batch-size", help="Images per step over all GPUs.", panel=TRAINING),
    lr: float = _option(None, help="Learning rate of the network.", panel=TRAINING),
    warmup: int = _option(500, help="Steps in which the learning rate rises.", panel=TRAINING),
    max_minutes: float = _option(None, help="Stop after so many minutes; --resume goes on.", panel=TRAINING),
    max_hours: float = _option(None, help="Stop after so many hours; --resume goes on.", panel=TRAINING),
    checkpoint_minutes: float = _option(1.0, help="Minutes between two saves of what --resume needs.", panel=TRAINING),
    log_interval: int = _option(20, help="Steps between two lines of metrics.jsonl.", panel=TRAINING),
    seed: int = _option(0, help="Random seed: the same seed gives the same result (on one machine).", panel=TRAINING),
    precision: str = _option(
        "auto", help="Precision of numbers: 32 or bf16; auto: bf16 where the machine is fast at it.", panel=SPEED
    ),
    accelerator: str = _option("auto", help="Where to compute: auto, cpu or gpu.", panel=SPEED),
    devices: int = _option(1, help="GPUs on each machine (processes without GPUs).", panel=SPEED),
    num_nodes: int = _option(1, help="Machines that train together.", panel=SPEED),
    compile: bool = _option(False, "--compile", help="Use torch.compile, for long trainings on a GPU.", panel=SPEED),
    requeue: bool = _option(False, "--requeue", help="SLURM: put the job back into the queue.", panel=SPEED),
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
    values = dict(context.params)
    sources = {name: getattr(context.get_parameter_source(name), "name", "DEFAULT") for name in values}
    typed = {name for name, source in sources.items() if not source.startswith("DEFAULT")}
    if resume:
        say_not_used(context, (*TRAIN, "images", "max_minutes", "max_hours"))
    raise typer.Exit(_train(values, typed))


def _pair(text: str | None, option: str, kind: type) -> tuple | None:
    """``a:b``, or ``a`` for both ends."""
    from cryosuite.errors import InputError

    if text is None:
        return None
    try:
        ends = tuple(kind(part) for part in text.split(":"))
    except ValueError:
        ends = ()
    if len(ends) not in (1, 2):
        raise InputError(f"{option} {text}: expected a number, or from:to")
    return ends * (3 - len(ends))


def _train(values: dict[str, Any], typed: set[str]) -> int:
    """Open, train, write, print; returns the exit code."""
    from cryosuite.commands.pretrain_iev import count
    from cryosuite.commands.train_hype import tune_process
    from cryosuite.data.workdir import RunDir
    from cryosuite.methods.fastar import Fastar
    from cryosuite.methods.fastar_options import FastarOptions
    from cryosuite.methods.fastar_run import after_epoch, card_file, make_molecules, weights_file
    from cryosuite.methods.fastar_validate import Examiner
    from cryosuite.training.launch import meet, process_rank
    from cryosuite.training.loop import fit
    from cryosuite.training.runs import begin_run, make_config, train_options

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
    again = {to: values[key] for key, to in TRAIN.items() if key in typed} if values["resume"] else {}
    again["max_minutes"] = _minutes(values)
    command = config["command"]
    if values["resume"] and values["images"] is not None:  # the last fifth moves to the new end
        again["epochs"] = max(1, count(values["images"], "--images") // config["epoch_images"])
        command += f" (then --resume --images {values['images']})"
    wanted = train_options(config, **again)
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


def _minutes(values: dict[str, Any]) -> float | None:
    """The time budget, the shorter of the two ways to give it."""
    given = [values["max_minutes"], None if values["max_hours"] is None else 60 * values["max_hours"]]
    return min((value for value in given if value is not None), default=None)


def _options(values: dict[str, Any]) -> tuple[Any, Any, int]:
    """(options of the method, of the training, images between two validations)."""

    from cryosuite.commands.pretrain_iev import count, rounds
    from cryosuite.errors import InputError, notice
    from cryosuite.methods.fastar_options import preset
    from cryosuite.training.launch import fast_bf16, resolve_accelerator
    from cryosuite.training.options import TrainOptions

    gpu = resolve_accelerator(values["accelerator"]) == "cuda"
    name = values["preset"]
    if name == "auto":
        name = "nano64" if gpu else "micro"
        if not values["resume"]:
            reason = "a GPU is here" if gpu else "no GPU is used"
            notice(f"--preset {name} was chosen because {reason}; --preset micro, nano64, tiny64 or small64 decides")
    parsed = dict(values)
    parsed["views"] = _pair(values["views"], "--views", int)
    parsed["snr"] = _pair(values["snr"], "--snr", float)
    if values["curriculum"] is not None:
        parsed["curriculum"] = count(values["curriculum"], "--curriculum")
    for key in ("map", "finetune", "start"):
        parsed[key] = None if values[key] is None else str(Path(values[key]).absolute())
    if values["finetune"] is not None and values["map"] is None:
        raise InputError("--finetune needs --map, the map of the molecule in the frame of the particles' poses")
    # a run that goes on takes its own options from its config
    chosen = preset(name, **({} if values["resume"] else {to: parsed[key] for key, to in METHOD.items()}))
    given = {to: values[key] for key, to in TRAIN.items() if values[key] is not None}
    merged = chosen.training | {"lr_final": 0.0} | given | {"max_minutes": _minutes(values)}
    total = chosen.images if values["images"] is None else count(values["images"], "--images")
    batch = merged["batch_size"]
    total = max(batch, total - total % batch)
    every = max(total // 10, batch) if values["every"] is None else count(values["every"], "--every")
    epochs, every = rounds(total, every, batch)
    merged["precision"] = values["precision"]
    if values["precision"] == "auto" and not gpu and fast_bf16():
        merged["precision"] = "bf16"
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
