"""``cryosuite pretrain-lvm``: an encoder of density maps that learns without answers, from hidden blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from cryosuite.commands import lvm_training_options as maps_options
from cryosuite.commands import training_options as shared
from cryosuite.commands.lvm_training_options import LEARNT, again, common_options, train_values, values_of
from cryosuite.commands.training_options import TRAINING, ends, lengths, option
from cryosuite.data.typed import typed

OWN = ("objective", "mask_at", "mask_mode", "mask_ratio")
LR_256, LR_LOW, LR_HIGH = 5e-4, 3e-4, 1e-3


def main(
    context: typer.Context,
    outdir: shared.RunFolder,
    maps: list[Path] = typer.Argument(
        None, help="Your own maps to learn from too: .mrc, .map, .gz, or folders of them.", metavar="[MAPS]..."
    ),
    preset: str = typer.Option(
        "default", help="Choice of options: default, or paper (random masks and grey values as CryoLVM describes them)."
    ),
    resume: shared.Resume = False,
    overwrite: shared.Replace = False,
    structures: maps_options.Structures = None,
    hold_out: maps_options.HoldOut = None,
    crop: maps_options.Crop = None,
    volume: maps_options.Volume = None,
    crops_per_volume: maps_options.CropsPerVolume = None,
    mix: maps_options.Mix = None,
    norm: maps_options.Norm = None,
    resolution: maps_options.Resolution = None,
    size: str = option(
        None,
        help="micro, small, default, medium or large (d = 8, 16, 24, 32 channels); default: default on a GPU, else "
        "small.",
        panel=LEARNT,
    ),
    net: str = option("scunet", help="Network: scunet, or vit to compare with.", panel=LEARNT),
    drop_path: maps_options.DropPath = None,
    objective: str = option(
        None, help="jepa: predict embeddings of hidden blocks (default). mae: predict their voxels.", panel=LEARNT
    ),
    mask_at: str = option(
        None,
        help="input: hidden voxels cannot be read (default). embedding: hidden after the encoder, which leaks.",
        panel=LEARNT,
    ),
    mask_mode: str = option(None, help="Which blocks are hidden: multiblock (default) or random.", panel=LEARNT),
    mask_ratio: float = option(None, help="Share of hidden tokens with random masks.", panel=LEARNT),
    weight_decay: str = option(None, help="From:to along a cosine; default 0.04:0.4.", panel=LEARNT),
    images: maps_options.Images = None,
    every: maps_options.Every = None,
    batch_size: maps_options.BatchSize = None,
    micro_batches: maps_options.MicroBatches = 1,
    lr: float = option(
        None, help="Learning rate; default: 5e-4 for a batch of 256, from 3e-4 to 1e-3.", panel=TRAINING
    ),
    schedule: maps_options.Schedule = None,
    warmup: shared.Warmup = None,
    max_minutes: shared.MaxMinutes = None,
    max_hours: shared.MaxHours = None,
    checkpoint_minutes: shared.CheckpointMinutes = 5.0,
    log_interval: shared.LogInterval = 20,
    seed: shared.Seed = 0,
    precision: shared.Precision = "auto",
    accelerator: shared.Accelerator = "auto",
    devices: shared.Devices = 1,
    num_nodes: shared.NumNodes = 1,
    compile: shared.Compile = False,
    requeue: shared.Requeue = False,
) -> None:
    """Pre-train an encoder of density maps: from what is shown of a map, predict what is hidden (CryoLVM).

    Nothing is downloaded: maps are simulated from atomic models or made-up
    molecules, and degraded as deposited maps are; your own maps can be added.
    Writes encoder.safetensors and a card, and says so when nothing is learnt.

        cryosuite pretrain-lvm -o run/ --structures both:models/

        cryosuite pretrain-lvm maps/*.mrc -o run/ --max-hours 8

        cryosuite train-lvm --task sharpen --init run/ -o sharpen/
    """
    raise typer.Exit(_train(*values_of(context)))


def list_maps(paths: list[Path] | None) -> tuple[str, ...]:
    """Absolute paths of maps; folders stand for the maps in them.

    Raises InputError for what is not there or no map.
    """
    from cryosuite.data.map_sets import map_entries

    return tuple(str(entry.map.absolute()) for entry in map_entries(paths or ()))


def _train(values: dict[str, Any], typed: set[str]) -> int:
    """Open, train, write, print; returns the exit code."""
    from cryosuite.data.workdir import RunDir
    from cryosuite.methods.lvm import Pretrain
    from cryosuite.methods.lvm_options import PretrainOptions
    from cryosuite.methods.lvm_run import after_pretrain_epoch, make_crops
    from cryosuite.methods.lvm_validate import PretrainExaminer
    from cryosuite.training.launch import meet, process_rank, tune_process
    from cryosuite.training.loop import fit
    from cryosuite.training.runs import begin_run, go_on_with, make_config

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
    wanted = go_on_with(run, config, **changed)
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
    if (decay := ends(values["weight_decay"], "--weight-decay")) is not None:
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
