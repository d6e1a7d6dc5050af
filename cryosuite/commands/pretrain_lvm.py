"""``cryosuite pretrain-lvm``: an encoder of density maps that learns without answers, from hidden blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from cryosuite.commands.options import say_not_used
from cryosuite.data.typed import typed

DATA, LEARNT, TRAINING, SPEED = "Maps", "What is learnt", "Training", "Machine"
METHOD = ("structures", "hold_out", "crop", "volume", "crops_per_volume", "mix", "norm", "schedule", "warmup")
OWN = ("objective", "mask_at", "mask_mode", "mask_ratio")
TRAIN = {
    "batch_size": "batch_size", "lr": "lr", "seed": "seed", "checkpoint_minutes": "checkpoint_every_minutes",
    "accelerator": "accelerator", "devices": "devices", "num_nodes": "num_nodes", "log_interval": "log_every",
    "requeue": "requeue", "compile": "compile", "micro_batches": "micro_batches", "max_minutes": "max_minutes",
}  # fmt: skip
LR_256, LR_LOW, LR_HIGH = 5e-4, 3e-4, 1e-3


def _option(default: Any, *names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(default, *names, help=help, rich_help_panel=panel, show_default=default is not None, **more)


def main(
    context: typer.Context,
    maps: list[Path] = typer.Argument(
        None, help="Your own maps to learn from too: .mrc, .map, .gz, or folders of them.", metavar="[MAPS]..."
    ),
    outdir: Path = typer.Option(..., "-o", "--outdir", help="Folder of the run, made by this command."),
    preset: str = typer.Option(
        "default", help="Choice of options: default, or paper (random masks and grey values as CryoLVM describes them)."
    ),
    resume: bool = typer.Option(False, "--resume", help="Go on where the run in this folder stopped."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the run that is in the folder."),
    structures: str = _option(
        None,
        help="Molecules to simulate maps of: phantom (made up, endless; default), a PDB or mmCIF file, a folder of "
        "them, or both:FOLDER.",
        panel=DATA,
    ),
    hold_out: str = _option(None, help="Structures kept out to test on: how many, or names.", panel=DATA),
    crop: int = _option(None, help="Edge of the crops in voxels of 1 A; default: 48 on a GPU, else 32.", panel=DATA),
    volume: int = _option(None, help="Edge of what is simulated at once, in voxels.", panel=DATA),
    crops_per_volume: int = _option(None, help="Crops cut from each simulated volume.", panel=DATA),
    mix: int = _option(None, help="Simulated volumes that are shuffled together.", panel=DATA),
    norm: str = _option(None, help="Grey values: robust (ours), paper or emready.", panel=DATA),
    resolution: str = _option(None, help="Resolution of the maps in A, from:to, such as 2.5:8.", panel=DATA),
    size: str = _option(
        None,
        help="micro, small, default, medium or large (d = 8, 16, 24, 32 channels); default: default on a GPU, else "
        "small.",
        panel=LEARNT,
    ),
    net: str = _option("scunet", help="Network: scunet, or vit to compare with.", panel=LEARNT),
    drop_path: float = _option(
        None, help="Stochastic depth, a share of blocks left out; default 0 up to small, else 0.1.", panel=LEARNT
    ),
    objective: str = _option(
        None, help="jepa: predict embeddings of hidden blocks (default). mae: predict their voxels.", panel=LEARNT
    ),
    mask_at: str = _option(
        None,
        help="input: hidden voxels cannot be read (default). embedding: hidden after the encoder, which leaks.",
        panel=LEARNT,
    ),
    mask_mode: str = _option(None, help="Which blocks are hidden: multiblock (default) or random.", panel=LEARNT),
    mask_ratio: float = _option(None, help="Share of hidden tokens with random masks.", panel=LEARNT),
    weight_decay: str = _option(None, help="From:to along a cosine; default 0.04:0.4.", panel=LEARNT),
    images: str = _option(None, help="Crops seen in all, such as 100k or 2M.", panel=TRAINING),
    every: str = _option(
        None, help="Test and write the weights every so many crops; default: 10 times.", panel=TRAINING
    ),
    batch_size: int = _option(None, "-b", "--batch-size", help="Crops per step over all GPUs.", panel=TRAINING),
    micro_batches: int = _option(1, help="Pieces a batch is computed in, for less memory.", panel=TRAINING),
    lr: float = _option(
        None, help="Learning rate; default: 5e-4 for a batch of 256, from 3e-4 to 1e-3.", panel=TRAINING
    ),
    schedule: str = _option(
        None,
        help="Learning rate over time: cosine, or flat (until the last fifth: --resume --images may move the end).",
        panel=TRAINING,
    ),  # fmt: skip
    warmup: float = _option(None, help="Fraction of the training in which the learning rate rises.", panel=TRAINING),
    max_minutes: float = _option(None, help="Stop after so many minutes; --resume goes on.", panel=TRAINING),
    max_hours: float = _option(None, help="Stop after so many hours; --resume goes on.", panel=TRAINING),
    checkpoint_minutes: float = _option(5.0, help="Minutes between two saves of what --resume needs.", panel=TRAINING),
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
    """Pre-train an encoder of density maps: from what is shown of a map, predict what is hidden (CryoLVM).

    Nothing is downloaded: maps are simulated from atomic models or made-up
    molecules, and degraded as deposited maps are; your own maps can be added.
    Writes encoder.safetensors and a card, and says so when nothing is learnt.

        cryosuite pretrain-lvm -o run/ --structures both:models/

        cryosuite pretrain-lvm maps/*.mrc -o run/ --max-hours 8

        cryosuite train-lvm --task sharpen --init run/ -o sharpen/
    """
    raise typer.Exit(_train(*given(context)))


def given(context: typer.Context) -> tuple[dict[str, Any], set[str]]:
    """All values of a command, and the names of those that the user typed."""
    values = dict(context.params)
    sources = {name: getattr(context.get_parameter_source(name), "name", "DEFAULT") for name in values}
    values["max_minutes"] = _minutes(values)
    if values["resume"]:
        say_not_used(context, (*TRAIN, "images", "max_hours"))
    return values, {name for name, source in sources.items() if not source.startswith("DEFAULT")}


def _minutes(values: dict[str, Any]) -> float | None:
    """The time budget, the shorter of the two ways to give it."""
    both = [values["max_minutes"], None if values["max_hours"] is None else 60 * values["max_hours"]]
    return min((value for value in both if value is not None), default=None)


def span(text: str | None, option: str) -> tuple[float, float] | None:
    """``a:b``, or ``a`` for both ends.

    Raises InputError for anything else.
    """
    from cryosuite.errors import InputError

    if text is None:
        return None
    try:
        ends = tuple(float(part) for part in text.split(":"))
    except ValueError:
        ends = ()
    if len(ends) not in (1, 2):
        raise InputError(f"{option} {text}: expected a number, or from:to")
    return (ends[0], ends[-1])


def list_maps(paths: list[Path] | None) -> tuple[str, ...]:
    """Absolute paths of maps; folders stand for the maps in them.

    Raises InputError for what is not there or no map.
    """
    from cryosuite.data.map_sets import map_entries

    return tuple(str(entry.map.absolute()) for entry in map_entries(paths or ()))


def common_options(values: dict[str, Any], gpu: bool) -> dict[str, Any]:
    """Options that both trainings have, of those that the user gave, and the size of the crops."""
    chosen = {name: values[name] for name in METHOD if values[name] is not None}
    chosen.setdefault("crop", 48 if gpu else 32)
    if values["structures"] is None:
        chosen["structures"] = "phantom"
    chosen["resolution"] = span(values["resolution"], "--resolution")
    return chosen


def lengths(values: dict[str, Any], total: int, batch: int) -> tuple[int, int]:
    """(epochs, crops of one epoch), from --images and --every or the default ``total``."""
    from cryosuite.commands.pretrain_iev import count, rounds

    total = total if values["images"] is None else count(values["images"], "--images")
    total = max(batch, total - total % batch)
    every = max(total // 10, batch) if values["every"] is None else count(values["every"], "--every")
    return rounds(total, every, batch)


def train_values(values: dict[str, Any], gpu: bool, **defaults: Any) -> dict[str, Any]:
    """Options of the training loop: the defaults, what the user gave, and the precision."""
    from cryosuite.training.launch import fast_bf16

    chosen = defaults | {to: values[key] for key, to in TRAIN.items() if values[key] is not None}
    chosen["precision"] = values["precision"]
    if values["precision"] == "auto" and not gpu and fast_bf16():
        chosen["precision"] = "bf16"
    return chosen


def again(values: dict[str, Any], typed: set[str], config: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """(options that a continued training takes anew, its command as the card says it)."""
    from cryosuite.commands.pretrain_iev import count

    changed = {to: values[key] for key, to in TRAIN.items() if key in typed} if values["resume"] else {}
    changed["max_minutes"] = values["max_minutes"]
    command = config["command"]
    if values["resume"] and values["images"] is not None:
        changed["epochs"] = max(1, count(values["images"], "--images") // config["epoch_images"])
        command += f" (then --resume --images {values['images']})"
    return changed, command


def _train(values: dict[str, Any], typed: set[str]) -> int:
    """Open, train, write, print; returns the exit code."""
    from cryosuite.commands.train_hype import tune_process
    from cryosuite.data.workdir import RunDir
    from cryosuite.methods.lvm import Pretrain
    from cryosuite.methods.lvm_options import PretrainOptions
    from cryosuite.methods.lvm_run import after_pretrain_epoch, make_crops
    from cryosuite.methods.lvm_validate import PretrainExaminer
    from cryosuite.training.launch import meet, process_rank
    from cryosuite.training.loop import fit
    from cryosuite.training.runs import begin_run, make_config, train_options

    tune_process()
    run = RunDir(values["outdir"])
    options, training, every = _options(values)
    config = make_config("lvm-pretrain", run.path, run, options, training, epoch_images=every)
    config = begin_run(run, config, training, resume=values["resume"], overwrite=values["overwrite"])
    if not run.checkpoint.exists() and process_rank() == 0:
        for path in (run.encoder, run.card):  # of a run that was replaced
            path.unlink(missing_ok=True)
    chosen = PretrainOptions.from_dict(config["options"])
    changed, command = again(values, typed, config)
    wanted = train_options(config, **changed)
    # what one process cannot read ends all of them: the others would wait for it
    crops = meet(wanted).each(lambda: make_crops(chosen, "pretrain", config["epoch_images"], run))
    method = Pretrain(chosen, wanted.lr)
    notes = {"command": command, "seed": wanted.seed, "trained_by": "cryosuite pretrain-lvm", "epochs": wanted.epochs}
    examiner = PretrainExaminer(crops, method, run)
    result = fit(
        method, crops, run, wanted, resume=values["resume"],
        on_epoch=after_pretrain_epoch(run, chosen, examiner, notes, config["epoch_images"]),
    )  # fmt: skip
    if process_rank() == 0:
        _report(run, chosen, result)
    return result.exit_code


def _options(values: dict[str, Any]) -> tuple[Any, Any, int]:
    """(options of the method, of the training, crops between two validations)."""
    from cryosuite.errors import InputError
    from cryosuite.methods.lvm_options import PAPER_PRETRAIN, PretrainOptions, net_spec
    from cryosuite.training.launch import resolve_accelerator
    from cryosuite.training.options import TrainOptions

    if values["preset"] not in ("default", "paper"):
        raise InputError(f"--preset {values['preset']}: expected default or paper")
    gpu = resolve_accelerator(values["accelerator"]) == "cuda"
    paper = PAPER_PRETRAIN if values["preset"] == "paper" else {}
    chosen = paper | common_options(values, gpu)
    chosen |= {name: values[name] for name in OWN if values[name] is not None}
    if (decay := span(values["weight_decay"], "--weight-decay")) is not None:
        chosen["decay"] = decay
    size = values["size"] or ("default" if gpu else "small")
    options = PretrainOptions(
        net=values["net"], spec=net_spec(values["net"], size, values["drop_path"]), maps=list_maps(values["maps"]),
        **chosen,
    )  # fmt: skip
    batch = values["batch_size"] or (256 if gpu else 32)
    lr = min(max(LR_256 * batch / 256, LR_LOW), LR_HIGH)
    averaged = 0.999 if options.objective == "mae" else 0.0  # JEPA has a slow copy of its own
    training = train_values(
        values, gpu, batch_size=batch, lr=lr, betas=(0.9, 0.95), ema=averaged, grad_clip=1.0,
        weight_decay=max(options.decay[0], 1e-12),
    )  # fmt: skip
    epochs, every = lengths(values, 2_000_000 if gpu else 50_000, batch)
    return options, TrainOptions(epochs=epochs, **training), every


def _report(run: Any, options: Any, result: Any) -> None:
    """What was learnt, where it lies and what to do next."""
    from cryosuite.console import say, table
    from cryosuite.methods.lvm_run import PRETRAIN_HEADER, last_scores, pretrain_rows
    from cryosuite.methods.lvm_validate import fired

    scores = last_scores(run, "heldout_loss")
    if run.encoder.is_file() and scores:
        table(f"{result.epochs_done} rounds done", PRETRAIN_HEADER, pretrain_rows(scores))
        if found := fired(scores, options.objective):
            say(f"WARNING: not usable as it is ({', '.join(found)}): see the notes above and {run.card}")
        say(f"encoder: {run.encoder}; card: {run.card}")
    if result.stopped:
        say(f"stopped by {result.stopped}; go on with: cryosuite pretrain-lvm -o {typed(run.path)} --resume")
    if run.encoder.is_file():
        say(f"next: cryosuite train-lvm --task sharpen --init {typed(run.path)} -o sharpen/")
