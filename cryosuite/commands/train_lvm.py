"""``cryosuite train-lvm``: a network that sharpens maps, raises their resolution, or fills in a missing wedge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from cryosuite.commands import lvm_training_options as maps_options
from cryosuite.commands import training_options as shared
from cryosuite.commands.lvm_training_options import DATA, LEARNT, again, common_options, train_values, values_of
from cryosuite.commands.training_options import TRAINING, lengths, option
from cryosuite.data.typed import typed

OWN = (
    "spectrum",
    "noise_only",
    "clean",
    "alpha",
    "hist_mask",
    "hist_sample",
    "cc",
    "ssim",
    "fsc",
    "frozen",
    "patience",
)
LR, ENCODER_LR, FROZEN = 3e-4, 1e-4, 0.1  # of the decoder, of an encoder that was trained before


def main(
    context: typer.Context,
    outdir: shared.RunFolder,
    task: str = typer.Option(
        None,
        help="sharpen: a map as its model shows it. superres: at a better resolution than it has. wedge: a tomographic "
        "map (10 A voxels) without its missing wedge.",
        show_default=False,
    ),
    init: str = typer.Option(
        None,
        help="A pretrained encoder (a file or the folder of pretrain-lvm), or scratch (default).",
        show_default=False,
    ),  # fmt: skip
    weights: str = typer.Option(
        None,
        help="Go on from a whole network: a file, a run's folder, or sharpen, superres or wedge, as installed.",
        show_default=False,
    ),  # fmt: skip
    preset: str = typer.Option(
        "default", help="Choice of options: default, or paper (loss and grey values as CryoLVM describes them)."
    ),
    resume: shared.Resume = False,
    overwrite: shared.Replace = False,
    structures: maps_options.Structures = None,
    pairs: Path = option(None, help="Your own pairs: a folder or table of maps and their models.", panel=DATA),
    hold_out: maps_options.HoldOut = None,
    crop: maps_options.Crop = None,
    volume: maps_options.Volume = None,
    crops_per_volume: maps_options.CropsPerVolume = None,
    mix: maps_options.Mix = None,
    norm: maps_options.Norm = None,
    spectrum: str = option(
        None,
        help="Amplitudes of the maps given: matched (they fall as those of a model's map of the same resolution; "
        "default, not of tomograms) or as-is.",
        panel=DATA,
    ),
    resolution: maps_options.Resolution = None,
    noise_only: float = option(None, help="Chance of a volume of noise, whose target is empty.", panel=DATA),
    clean: float = option(None, help="Chance of a map that needs no change.", panel=DATA),
    size: str = option(
        None,
        help="micro, small, default, medium or large (d = 8, 16, 24, 32 channels); default: that of --init or "
        "--weights, else default on a GPU and small on a CPU.",
        panel=LEARNT,
    ),
    net: str = option(None, help="Network: scunet (default), or vit to compare with.", panel=LEARNT),
    drop_path: maps_options.DropPath = None,
    alpha: float = option(
        None,
        help="Share of the mean square error in the loss (default 0.9); the rest is the histogram's.",
        panel=LEARNT,
    ),
    hist_mask: str = option(
        None, help="Voxels of the histogram: union (molecule in either map, default) or whole.", panel=LEARNT
    ),
    hist_sample: int = option(None, help="Voxels of each crop that the histogram is taken from; 0: all.", panel=LEARNT),
    cc: float = option(None, help="Weight of 1 - correlation inside the molecule.", panel=LEARNT),
    ssim: float = option(None, help="Weight of a structural similarity loss.", panel=LEARNT),
    fsc: float = option(None, help="Weight of a Fourier shell correlation loss.", panel=LEARNT),
    encoder_lr: float = option(
        None, help="Learning rate of the encoder; default: 1e-4 if it was trained before, else --lr.", panel=LEARNT
    ),
    frozen: float = option(
        None, help="Part of the training in which a pretrained encoder stays as it is (default 0.1).", panel=LEARNT
    ),
    patience: int = option(
        None, help="End early after so many tests without a better CC; the best weights are kept.", panel=TRAINING
    ),
    images: maps_options.Images = None,
    every: maps_options.Every = None,
    batch_size: maps_options.BatchSize = None,
    micro_batches: maps_options.MicroBatches = 1,
    lr: float = option(None, help="Learning rate (of the decoder); default 3e-4.", panel=TRAINING),
    schedule: maps_options.Schedule = None,
    warmup: shared.Warmup = None,
    ema: float = option(0.999, help="Decay of the averaged weights.", panel=TRAINING),
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
    """Train a network that restores density maps, on simulated pairs of maps or your own (CryoLVM).

    Writes weights.safetensors for lvm-sharpen and a card that says how good
    it is on structures never seen, beside the map it was given.

        cryosuite train-lvm --task sharpen --structures both:models/ -o run/

        cryosuite train-lvm --task wedge --init pretrained/ -o run/

        cryosuite train-lvm --task superres --weights sharpen -o run/

        cryosuite lvm-sharpen map.mrc --weights run/weights.safetensors -o out.mrc
    """
    raise typer.Exit(_train(*values_of(context)))


def _train(values: dict[str, Any], typed: set[str]) -> int:
    """Open, train, write, print; returns the exit code."""
    from cryosuite.data.workdir import RunDir
    from cryosuite.methods.lvm_options import TrainLvmOptions
    from cryosuite.methods.lvm_run import after_train_epoch, make_crops
    from cryosuite.methods.lvm_train import TrainLvm
    from cryosuite.methods.lvm_validate import Examiner
    from cryosuite.training.launch import meet, process_rank, tune_process
    from cryosuite.training.loop import fit
    from cryosuite.training.runs import begin_run, go_on_with, make_config

    tune_process()
    run = RunDir(values["outdir"])
    options, training, every = (TrainLvmOptions(), None, 1) if values["resume"] else _options(values)
    config = make_config("lvm", run.path, run, options, training, epoch_images=every)
    config = begin_run(run, config, training, resume=values["resume"], overwrite=values["overwrite"])
    fresh = not run.checkpoint.exists()
    if fresh and process_rank() == 0:
        for path in (run.network, run.card):  # of a run that was replaced
            path.unlink(missing_ok=True)
    chosen = TrainLvmOptions.from_dict(config["options"])
    changed, command = again(values, typed, config)
    wanted = go_on_with(run, config, **changed)
    # what one process cannot read ends all of them: the others would wait for it
    crops = meet(wanted).each(lambda: make_crops(chosen, chosen.task, config["epoch_images"], run))
    notes = {"command": command, "seed": wanted.seed, "trained_by": "cryosuite train-lvm"}
    result = fit(
        TrainLvm(chosen, load=fresh), crops, run, wanted, resume=values["resume"],
        on_epoch=after_train_epoch(run, chosen, Examiner(crops, run), notes, config["epoch_images"]),
    )  # fmt: skip
    if process_rank() == 0:
        _report(run, chosen, result)
    return result.exit_code


def _options(values: dict[str, Any]) -> tuple[Any, Any, int]:
    """(options of the method, of the training, crops between two validations)."""
    from cryosuite.errors import InputError
    from cryosuite.methods.lvm_options import PAPER_TRAIN, TASKS, TrainLvmOptions
    from cryosuite.training.launch import resolve_accelerator
    from cryosuite.training.options import TrainOptions

    if values["task"] is None:
        raise InputError(f"--task: say what is to be learnt: {', '.join(TASKS)}")
    if values["preset"] not in ("default", "paper"):
        raise InputError(f"--preset {values['preset']}: expected default or paper")
    gpu = resolve_accelerator(values["accelerator"]) == "cuda"
    paper = PAPER_TRAIN if values["preset"] == "paper" else {}
    chosen = paper | common_options(values, gpu) | {name: values[name] for name in OWN if values[name] is not None}
    lr = values["lr"] or LR
    chosen |= _network(values, gpu, chosen)
    trained = chosen["start"] != "scratch"
    encoder_lr = (ENCODER_LR / LR * lr if trained else lr) if values["encoder_lr"] is None else values["encoder_lr"]
    chosen["encoder_lr"] = encoder_lr / lr
    if values["pairs"] is not None:
        chosen["pairs"] = str(values["pairs"].absolute())
    options = TrainLvmOptions(task=values["task"], **chosen)
    batch = values["batch_size"] or (64 if gpu else 16)
    training = train_values(
        values, gpu, batch_size=batch, lr=lr, ema=values["ema"], grad_clip=1.0, weight_decay=0.05, betas=(0.9, 0.99)
    )
    epochs, every = lengths(values, 1_000_000 if gpu else 60_000, batch)
    return options, TrainOptions(epochs=epochs, **training), every


def _network(values: dict[str, Any], gpu: bool, chosen: dict[str, Any]) -> dict[str, Any]:
    """Kind and spec of the network, and where its weights come from."""
    from cryosuite.errors import InputError, notice
    from cryosuite.methods.lvm_options import net_spec, size_name
    from cryosuite.methods.lvm_start import find_start

    start = find_start(values["init"], values["weights"])
    if start is None:
        if values["frozen"]:
            raise InputError("--frozen needs --init: an encoder with random weights must learn")
        net = values["net"] or "scunet"
        size = values["size"] or ("default" if gpu else "small")
        return {"net": net, "spec": net_spec(net, size, values["drop_path"]), "start": "scratch"}
    if values["net"] not in (None, start.net):
        raise InputError(f"--net {values['net']}: {start.path} holds a {size_name(start.net, start.spec)}")
    if values["size"] is not None:
        wanted = net_spec(start.net, values["size"])
        if {**wanted, "drop_path": 0} != {**start.spec, "drop_path": 0}:
            raise InputError(
                f"--size {values['size']}: {start.path} holds a {size_name(start.net, start.spec)}; leave --size out"
            )
    spec = dict(start.spec)
    if values["drop_path"] is not None:
        net_spec(start.net, "small", values["drop_path"])  # is it one?
        spec["drop_path"] = values["drop_path"]
    norm = chosen.get("norm") or start.norm or "robust"
    if start.norm is not None and norm != start.norm:
        notice(f"{start.path} was trained on grey values by --norm {start.norm}; it is going to see {norm} now")
    spectrum = chosen.get("spectrum") or ("as-is" if values["task"] == "wedge" else start.spectrum or "matched")
    if start.spectrum is not None and spectrum != start.spectrum:
        notice(f"{start.path} was trained on amplitudes {start.spectrum}; it is going to see them {spectrum} now")
    frozen = (FROZEN if start.pretrained else 0.0) if values["frozen"] is None else values["frozen"]
    return {
        "net": start.net, "spec": spec, "start": start.path, "pretrained": start.pretrained, "norm": norm,
        "spectrum": spectrum, "frozen": frozen,
    }  # fmt: skip


def _report(run: Any, options: Any, result: Any) -> None:
    """How good it is, where it lies and what to do next."""
    from cryosuite.console import say, table
    from cryosuite.methods.lvm_run import EARLY, HEADER, last_scores, score_rows

    scores = last_scores(run, "cc_mask")
    if run.network.is_file() and scores:
        table(f"{result.epochs_done} rounds done", HEADER, score_rows(scores))
        if scores["cc_mask"] <= scores["cc_mask_input"]:
            say("verdict: not better than the map it is given: do not use it; train longer, or raise --lr")
        say(f"weights: {run.network}; card: {run.card}")
    if result.stopped == EARLY:
        say(f"ended early: no better CC for {options.patience} tests; the weights are those of the best")
    elif result.stopped:
        say(f"stopped by {result.stopped}; go on with: cryosuite train-lvm -o {typed(run.path)} --resume")
    if run.network.is_file():
        extra = " --task wedge" if options.task == "wedge" else ""
        say(f"next: cryosuite lvm-sharpen map.mrc --weights {typed(run.network)}{extra} -o out.mrc")
