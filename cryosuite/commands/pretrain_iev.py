"""``cryosuite pretrain-iev``: an encoder that knows particle images, learnt without labels; features of a set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from cryosuite.commands import training_options as shared
from cryosuite.commands.options import Apix, Datadir, say_not_used, say_without_effect
from cryosuite.commands.training_options import (
    ENGINE,
    MACHINE,
    TRAINING,
    lengths,
    longer,
    option,
    precision,
    typed_again,
    typed_values,
)
from cryosuite.data.typed import typed

DATA, SIMULATE, MODEL, ENCODE = (
    "Particles", "Simulated particles", "Model (the preset decides unless given)", "Features instead of training",
)  # fmt: skip
METHOD = {
    "size": "size", "norm2": "norm2", "prep": "prep", "tau": "tau", "momentum": "momentum", "m_cos": "m_cos",
    "hidden": "hidden", "train_patch": "train_patch", "positives": "positives", "circle": "circle",
    "low_memory": "low_memory", "keep": "keep", "patch_start": "patch_start", "guide": "guide",
}  # fmt: skip
TRAIN = ENGINE | {"warmup": "warmup", "wd": "weight_decay", "log_interval": "log_every"}


def main(
    context: typer.Context,
    outdir: shared.RunFolder,
    sets: list[Path] = typer.Argument(
        None, help="Work folders, .star, .cs or .mrcs files, folders of them, or a .yaml list.", metavar="[SETS]..."
    ),
    preset: str = typer.Option(
        "auto",
        help="tiny: 3 M parameters, 112 pixels, for a CPU or a short time. default: small encoder for a GPU. paper: as "
        "published (Cryo-IEF), many GPUs. auto: default where there is a GPU, else tiny.",
    ),
    resume: shared.Resume = False,
    overwrite: shared.Replace = False,
    datadir: Datadir = None,
    pixel_size: Apix = None,
    invert_data: shared.InvertData = False,
    cache: bool = option(
        False, "--cache", help="Keep prepared images in the run folder (12 to 50 kB each): faster passes.", panel=DATA
    ),
    simulate: str = option(
        None,
        help="Also (or only) simulated particles: phantom:N, a folder of PDB or mmCIF files, or both, separated "
        "by commas.",
        panel=SIMULATE,
    ),  # fmt: skip
    hold_out: str = option("8", help="Molecules kept out to test on: how many, or names.", panel=SIMULATE),
    share: float = option(None, help="Share of simulated images; default: all, or half beside sets.", panel=SIMULATE),
    views: int = option(200, help="Directions in which each molecule is projected beforehand.", panel=SIMULATE),
    field: float = option(320.0, help="Edge of simulated images in Angstrom.", panel=SIMULATE),
    snr: str = option(
        "0.003:0.2", help="Signal to noise ratio of simulated images, from:to, at 128 pixels.", panel=SIMULATE
    ),
    boxes: str = option("32,48,64,96,128", help="Box sizes in pixels that simulated images come from.", panel=SIMULATE),
    positives: str = option(
        None,
        help="What two simulated views share: augment (one image), same-view (molecule and pose), "
        "same-structure (molecule) or mixed.",
        panel=SIMULATE,
    ),  # fmt: skip
    guide: float = option(
        None,
        help="Weight of a second loss: features must tell the shape of the clean picture; 0: none.",
        panel=SIMULATE,
    ),
    size: str = option(None, help="Size of the encoder: vit_tiny, vit_small or vit_base.", panel=MODEL),
    norm2: str = option(
        None, help="Second norm of a block: bn (as the released files) or ln (for small batches).", panel=MODEL
    ),
    prep: str = option(None, help="Grey values: standard or robust (ours), ief (as published).", panel=MODEL),
    hidden: int = option(None, help="Neurons of projector and predictor.", panel=MODEL),
    patch_start: str = option(
        None, help="Start of the patch projection: random (as published), or smooth (low-pass patterns).", panel=MODEL
    ),
    train_patch: bool = option(
        None, "--train-patch/--frozen-patch", help="Also train the patch projection.", panel=MODEL
    ),
    circle: bool = option(
        None, "--circle/--no-circle", help="Hide what lies outside the particle's circle.", panel=MODEL
    ),
    keep: float = option(
        None, help="Share of the patches shown in all but the last tenth of the training.", panel=TRAINING
    ),
    tau: float = option(None, help="Temperature of the contrastive loss.", panel=TRAINING),
    momentum: float = option(None, help="How slowly the momentum copy follows.", panel=TRAINING),
    m_cos: bool = option(None, "--m-cos/--m-constant", help="Let the momentum rise to 1.", panel=TRAINING),
    aug: str = option(
        None,
        help="Augmentations, separated by commas: rotate, flip, shift, crop, blur, noise, contrast, defocus, "
        "sign; or none.",
        panel=TRAINING,
    ),  # fmt: skip
    no_flip: bool = option(False, "--no-flip", help="Without mirror images: features then know hands.", panel=TRAINING),
    images: str = option(None, help="Images seen in all, such as 300k or 10M.", panel=TRAINING),
    every: str = option(
        None, help="Test and write the encoder every so many images; default: 20 times.", panel=TRAINING
    ),
    batch_size: int = option(
        None, "-b", "--batch-size", help="Images per step over all GPUs; each is told from all others.", panel=TRAINING
    ),
    lr: float = option(None, help="Learning rate for this batch size; default: grows with the batch.", panel=TRAINING),
    warmup: shared.Warmup = None,
    wd: float = option(None, help="Weight decay of matrices.", panel=TRAINING),
    max_minutes: shared.MaxMinutes = None,
    checkpoint_minutes: shared.CheckpointMinutes = 10.0,
    log_interval: shared.LogInterval = 20,
    seed: shared.Seed = 0,
    encode: bool = option(
        False,
        "--encode",
        help="Train nothing: write the features of one set, to be looked at with analyze.",
        panel=ENCODE,
    ),  # fmt: skip
    weights: str = option(
        None, help="iev-tiny (comes with cryosuite), or a .safetensors file: Cryo-IEF's or ours.", panel=ENCODE
    ),
    low_memory: shared.LowMemory = None,
    precision: str = option(
        "auto",
        help="Precision of numbers: 32 or bf16; auto: bf16 where the machine is fast at it (--encode: on a GPU only).",
        panel=MACHINE,
    ),
    accelerator: shared.Accelerator = "auto",
    devices: shared.Devices = 1,
    num_nodes: shared.NumNodes = 1,
    requeue: shared.Requeue = False,
) -> None:
    """Train an encoder of particle images without labels (MoCo v3), for deco-classify and a first look at a set.

    Takes any number of sets, streams them, and writes encoder.safetensors in
    the layout of the released Cryo-IEF weights. With --encode it writes the
    features of a set instead, by an encoder that exists.

        cryosuite pretrain-iev set1/ set2/particles.star -o run/

        cryosuite pretrain-iev --simulate phantom:60 --images 100k -o run/

        cryosuite pretrain-iev particles.star --encode --weights iev-tiny -o features/

        cryosuite analyze features/
    """
    values, typed = typed_values(context)
    if resume and not encode:
        say_not_used(context, (*TRAIN, "images"))
    raise typer.Exit(_encode(values) if encode else _train(values, typed))


def _train(values: dict[str, Any], typed: set[str]) -> int:
    """Open, train, write, print; returns the exit code."""
    from cryosuite.data.workdir import RunDir
    from cryosuite.errors import InputError
    from cryosuite.methods.iev import Guard, Iev, after_epoch, encoder_file
    from cryosuite.methods.iev_options import IevOptions
    from cryosuite.methods.iev_run import make_corpus, sets_from, simulated_from
    from cryosuite.training.launch import meet, process_rank, resolve_accelerator, tune_process
    from cryosuite.training.loop import fit
    from cryosuite.training.runs import begin_run, go_on_with, make_config

    if values["weights"] is not None:
        raise InputError("--weights goes with --encode: training starts from nothing (to go on with a run: --resume)")
    if not (values["sets"] or values["simulate"] or values["resume"]):
        raise InputError("nothing to train on: give particle sets, or --simulate phantom:60")
    tune_process()
    run = RunDir(values["outdir"])
    options, training, name, epoch_images, lists, simulated = _options(values)
    if not (values["resume"] or values["simulate"]):
        said = typed & {"hold_out", "share", "snr", "boxes", "positives", "guide"}
        say_without_effect(dict.fromkeys(said, "without --simulate"))
    config = make_config(
        "iev", run.path, run, options, training, preset=name, epoch_images=epoch_images, sets=lists,
        simulate=simulated, cache=values["cache"], holds="training",
    )  # fmt: skip
    config = begin_run(run, config, training, resume=values["resume"], overwrite=values["overwrite"])
    if config.get("holds") != "training":
        raise InputError(f"{run.path}: holds features of --encode, not a training")
    if not run.checkpoint.exists() and process_rank() == 0:
        encoder_file(run).unlink(missing_ok=True)  # of a run that was replaced
    chosen = IevOptions.from_dict(config["options"])
    longer_by, command = longer(values, config)  # then the learning rate rises again
    training = go_on_with(run, config, **typed_again(values, typed, TRAIN), **longer_by)
    processes = meet(training)  # which share the making of the files
    device = resolve_accelerator(values["accelerator"])
    corpus, held = make_corpus(
        sets_from(config["sets"]), simulated_from(config["simulate"]), chosen, run, config["epoch_images"],
        config["cache"], device, processes,
    )  # fmt: skip
    method = Iev(chosen)
    notes = {"command": command, "seed": config["training"]["seed"], "trained_by": "cryosuite pretrain-iev"}
    guard = Guard(*held, method, run)
    result = fit(
        method, corpus, run, training,
        resume=values["resume"], on_epoch=after_epoch(run, chosen, guard, notes),
    )  # fmt: skip
    if process_rank() == 0:
        _report(run, result)
    return result.exit_code


def _options(values: dict[str, Any]) -> tuple[Any, Any, str, int, list[dict], dict]:
    """(options of the method, of the training, preset's name, images per epoch, sets, what is simulated)."""

    from cryosuite.errors import notice
    from cryosuite.methods.iev_options import preset
    from cryosuite.methods.iev_run import describe_simulated, list_sets, plain_sets
    from cryosuite.training.launch import resolve_accelerator
    from cryosuite.training.options import TrainOptions

    gpu = resolve_accelerator(values["accelerator"]) == "cuda"
    # a run that goes on takes its own from its config
    changes = {} if values["resume"] else {to: values[key] for key, to in METHOD.items()}
    if values["aug"] is not None:
        changes["aug"] = tuple(part.strip() for part in values["aug"].split(",") if part.strip() not in ("", "none"))
    name, chosen = preset(values["preset"], gpu, **changes)
    options = chosen.options
    if values["no_flip"]:
        from dataclasses import replace

        options = replace(options, aug=tuple(part for part in options.aug if part != "flip"))
    if values["preset"] == "auto" and not values["resume"]:
        reason = "a GPU is here" if gpu else "no GPU is used"
        notice(f"--preset {name} was chosen because {reason}; --preset tiny, default or paper decides otherwise")
    given = {to: values[key] for key, to in TRAIN.items() if values[key] is not None}
    merged = chosen.training | {"ema": 0.0, "lr_final": 0.0} | given
    batch = merged["batch_size"]
    epochs, every = lengths(values, chosen.images, batch, tests=20)
    merged["lr"] = chosen.lr_256 * batch / 256 if values["lr"] is None else values["lr"]
    merged["precision"] = precision(values, None, gpu)
    sign = -1 if values["invert_data"] else None
    lists = plain_sets(list_sets(values["sets"] or []), values["datadir"], values["pixel_size"], sign)
    return (
        options,
        TrainOptions(epochs=epochs, **merged),
        name,
        every,
        lists,
        describe_simulated(values),
    )


def _encode(values: dict[str, Any]) -> int:
    """Features of one set into a folder that analyze takes."""
    from cryosuite.errors import InputError
    from cryosuite.methods.iev_encode import encode_to_run

    if not values["sets"] or len(values["sets"]) != 1 or values["simulate"]:
        raise InputError("--encode takes one particle set: a work folder, or a .star, .cs or .mrcs file")
    encode_to_run(
        values["sets"][0], values["outdir"], values["weights"] or "iev-tiny", overwrite=values["overwrite"],
        batch=values["batch_size"] or 64, accelerator=values["accelerator"], precision=values["precision"],
        prep=values["prep"], circle=values["circle"] is not False, datadir=values["datadir"],
        pixel_size=values["pixel_size"], sign=-1 if values["invert_data"] else None, devices=values["devices"],
        num_nodes=values["num_nodes"],
    )  # fmt: skip
    return 0


def _report(run: Any, result: Any) -> None:
    """What was learnt, where it lies and what to do next."""
    from cryosuite.console import say, table
    from cryosuite.methods.iev import encoder_file
    from cryosuite.training.logs import read_metrics

    scores = [record for record in read_metrics(run.metrics) if "knn" in record]
    path = encoder_file(run)
    if path.is_file() and scores:
        last = scores[-1]
        rows = [
            ["encoder, in Cryo-IEF's layout", path],
            ["right by 10 nearest neighbours, molecules never seen", f"{100 * last['knn']:.1f} %"],
            ["the same, before training", f"{100 * last['knn_random']:.1f} %"],
            ["the same, components of the pixels", f"{100 * last['knn_pixels']:.1f} %"],
            ["learning curve", run.metrics],
            ["options", run.config],
        ]
        table(f"{result.epochs_done} rounds done", ["what", "where"], rows)
    if result.stopped:
        say(f"stopped by {result.stopped}; go on with: cryosuite pretrain-iev -o {typed(run.path)} --resume")
    if path.is_file():
        say(f"next: cryosuite pretrain-iev particles.star --encode --weights {typed(path)} -o features/")
