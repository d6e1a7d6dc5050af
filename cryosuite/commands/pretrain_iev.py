"""``cryosuite pretrain-iev``: an encoder that knows particle images, learnt without labels; features of a set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from cryosuite.commands.options import say_not_used, say_without_effect
from cryosuite.data.typed import typed

DATA, SIMULATE, MODEL, TRAINING, ENCODE, SPEED = (
    "Particles", "Simulated particles", "Model (the preset decides unless given)", "Training",
    "Features instead of training", "Machine",
)  # fmt: skip
METHOD = {
    "size": "size", "norm2": "norm2", "prep": "prep", "tau": "tau", "momentum": "momentum", "m_cos": "m_cos",
    "hidden": "hidden", "train_patch": "train_patch", "positives": "positives", "circle": "circle",
    "low_memory": "low_memory", "keep": "keep", "patch_start": "patch_start", "guide": "guide",
}  # fmt: skip
TRAIN = {
    "batch_size": "batch_size", "lr": "lr", "warmup": "warmup", "wd": "weight_decay", "seed": "seed",
    "max_minutes": "max_minutes",
    "checkpoint_minutes": "checkpoint_every_minutes", "accelerator": "accelerator", "devices": "devices",
    "num_nodes": "num_nodes", "log_interval": "log_every", "requeue": "requeue",
}  # fmt: skip


def _option(default: Any, *names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(default, *names, help=help, rich_help_panel=panel, show_default=default is not None, **more)


def main(
    context: typer.Context,
    sets: list[Path] = typer.Argument(
        None, help="Work folders, .star, .cs or .mrcs files, folders of them, or a .yaml list.", metavar="[SETS]..."
    ),
    outdir: Path = typer.Option(..., "-o", "--outdir", help="Folder of the run, made by this command."),
    preset: str = typer.Option(
        "auto",
        help="tiny: 3 M parameters, 112 pixels, for a CPU or a short time. default: small encoder for a GPU. paper: as "
        "published (Cryo-IEF), many GPUs. auto: default where there is a GPU, else tiny.",
    ),
    resume: bool = typer.Option(False, "--resume", help="Go on where the run in this folder stopped."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the run that is in the folder."),
    datadir: Path = _option(None, help="Folder in which the image stacks lie.", panel=DATA),
    pixel_size: float = _option(None, "--Apix", help="Pixel size in Angstrom, where no file says it.", panel=DATA),
    invert_data: bool = _option(False, "--invert-data", help="Particles are dark in the images.", panel=DATA),
    cache: bool = _option(
        False, "--cache", help="Keep prepared images in the run folder (12 to 50 kB each): faster passes.", panel=DATA
    ),
    simulate: str = _option(
        None,
        help="Also (or only) simulated particles: phantom:N, a folder of PDB or mmCIF files, or both, separated "
        "by commas.",
        panel=SIMULATE,
    ),  # fmt: skip
    hold_out: str = _option("8", help="Molecules kept out to test on: how many, or names.", panel=SIMULATE),
    share: float = _option(None, help="Share of simulated images; default: all, or half beside sets.", panel=SIMULATE),
    views: int = _option(200, help="Directions in which each molecule is projected beforehand.", panel=SIMULATE),
    field: float = _option(320.0, help="Edge of simulated images in Angstrom.", panel=SIMULATE),
    snr: str = _option(
        "0.003:0.2", help="Signal to noise ratio of simulated images, from:to, at 128 pixels.", panel=SIMULATE
    ),
    boxes: str = _option(
        "32,48,64,96,128", help="Box sizes in pixels that simulated images come from.", panel=SIMULATE
    ),
    positives: str = _option(
        None,
        help="What two simulated views share: augment (one image), same-view (molecule and pose), "
        "same-structure (molecule) or mixed.",
        panel=SIMULATE,
    ),  # fmt: skip
    guide: float = _option(
        None,
        help="Weight of a second loss: features must tell the shape of the clean picture; 0: none.",
        panel=SIMULATE,
    ),
    size: str = _option(None, help="Size of the encoder: vit_tiny, vit_small or vit_base.", panel=MODEL),
    norm2: str = _option(
        None, help="Second norm of a block: bn (as the released files) or ln (for small batches).", panel=MODEL
    ),
    prep: str = _option(None, help="Grey values: standard or robust (ours), ief (as published).", panel=MODEL),
    hidden: int = _option(None, help="Neurons of projector and predictor.", panel=MODEL),
    patch_start: str = _option(
        None, help="Start of the patch projection: random (as published), or smooth (low-pass patterns).", panel=MODEL
    ),
    train_patch: bool = _option(
        None, "--train-patch/--frozen-patch", help="Also train the patch projection.", panel=MODEL
    ),
    circle: bool = _option(
        None, "--circle/--no-circle", help="Hide what lies outside the particle's circle.", panel=MODEL
    ),
    keep: float = _option(
        None, help="Share of the patches shown in all but the last tenth of the training.", panel=TRAINING
    ),
    tau: float = _option(None, help="Temperature of the contrastive loss.", panel=TRAINING),
    momentum: float = _option(None, help="How slowly the momentum copy follows.", panel=TRAINING),
    m_cos: bool = _option(None, "--m-cos/--m-constant", help="Let the momentum rise to 1.", panel=TRAINING),
    aug: str = _option(
        None,
        help="Augmentations, separated by commas: rotate, flip, shift, crop, blur, noise, contrast, defocus, "
        "sign; or none.",
        panel=TRAINING,
    ),  # fmt: skip
    no_flip: bool = _option(
        False, "--no-flip", help="Without mirror images: features then know hands.", panel=TRAINING
    ),
    images: str = _option(None, help="Images seen in all, such as 300k or 10M.", panel=TRAINING),
    every: str = _option(
        None, help="Test and write the encoder every so many images; default: 20 times.", panel=TRAINING
    ),
    batch_size: int = _option(
        None, "-b", "--batch-size", help="Images per step over all GPUs; each is told from all others.", panel=TRAINING
    ),
    lr: float = _option(None, help="Learning rate for this batch size; default: grows with the batch.", panel=TRAINING),
    warmup: float = _option(None, help="Fraction of the training in which the learning rate rises.", panel=TRAINING),
    wd: float = _option(None, help="Weight decay of matrices.", panel=TRAINING),
    max_minutes: float = _option(None, help="Stop after so many minutes with a checkpoint.", panel=TRAINING),
    checkpoint_minutes: float = _option(10.0, help="Minutes between two saves of what --resume needs.", panel=TRAINING),
    log_interval: int = _option(20, help="Steps between two lines of metrics.jsonl.", panel=TRAINING),
    seed: int = _option(0, help="Random seed: the same seed gives the same result (on one machine).", panel=TRAINING),
    encode: bool = _option(
        False,
        "--encode",
        help="Train nothing: write the features of one set, to be looked at with analyze.",
        panel=ENCODE,
    ),  # fmt: skip
    weights: str = _option(
        None, help="iev-tiny (comes with cryosuite), or a .safetensors file: Cryo-IEF's or ours.", panel=ENCODE
    ),
    low_memory: bool = _option(
        None, "--low-memory/--keep-activations", help="Need less memory and a third more time.", panel=SPEED
    ),
    precision: str = _option(
        "auto",
        help="Precision of numbers: 32 or bf16; auto: bf16 where the machine is fast at it (--encode: on a GPU only).",
        panel=SPEED,
    ),
    accelerator: str = _option("auto", help="Where to compute: auto, cpu or gpu.", panel=SPEED),
    devices: int = _option(1, help="GPUs on each machine (processes without GPUs).", panel=SPEED),
    num_nodes: int = _option(1, help="Machines that train together.", panel=SPEED),
    requeue: bool = _option(False, "--requeue", help="SLURM: put the job back into the queue.", panel=SPEED),
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
    values = dict(context.params)
    sources = {name: getattr(context.get_parameter_source(name), "name", "DEFAULT") for name in values}
    typed = {name for name, source in sources.items() if not source.startswith("DEFAULT")}
    if resume and not encode:
        say_not_used(context, (*TRAIN, "images"))
    raise typer.Exit(_encode(values) if encode else _train(values, typed))


def count(text: str, option: str) -> int:
    """A number of images as people write it: 5000, 300k, 10M.

    Raises InputError for anything else.
    """
    from cryosuite.errors import InputError

    factors = {"k": 10**3, "m": 10**6, "g": 10**9}
    factor = factors.get(text[-1:].lower(), 1)
    try:
        number = int(round(float(text[:-1] if factor > 1 else text) * factor))
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise InputError(f"{option} {text}: expected a number of images such as 5000, 300k or 10M")
    return number


def rounds(total: int, every: int, batch: int) -> tuple[int, int]:
    """(epochs, images of one) for ``total`` images, a multiple of the batch, and a test about every so many.

    Epochs are whole and as long as each other: they are made longer rather than that images are left out.
    """
    epochs = max(1, total // max(batch, every - every % batch))
    every = total // epochs
    return epochs, every - every % batch


def _train(values: dict[str, Any], typed: set[str]) -> int:
    """Open, train, write, print; returns the exit code."""
    from cryosuite.commands.train_hype import tune_process
    from cryosuite.data.workdir import RunDir
    from cryosuite.errors import InputError
    from cryosuite.methods.iev import Guard, Iev, after_epoch, encoder_file
    from cryosuite.methods.iev_options import IevOptions
    from cryosuite.methods.iev_run import make_corpus, sets_from, simulated_from
    from cryosuite.training.launch import meet, process_rank, resolve_accelerator
    from cryosuite.training.loop import fit
    from cryosuite.training.runs import begin_run, make_config, train_options

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
    again = {to: values[key] for key, to in TRAIN.items() if key in typed} if values["resume"] else {}
    command = config["command"]
    if values["resume"] and values["images"] is not None:  # a longer training: the learning rate rises again
        again["epochs"] = max(1, count(values["images"], "--images") // config["epoch_images"])
        command += f" (then --resume --images {values['images']})"
    training = train_options(config, **again)
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
    from cryosuite.training.launch import fast_bf16, resolve_accelerator
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
    total = chosen.images if values["images"] is None else count(values["images"], "--images")
    batch = merged["batch_size"]
    total = max(batch, total - total % batch)
    every = max(total // 20, batch) if values["every"] is None else count(values["every"], "--every")
    epochs, every = rounds(total, every, batch)
    merged["lr"] = chosen.lr_256 * batch / 256 if values["lr"] is None else values["lr"]
    merged["precision"] = values["precision"]
    if values["precision"] == "auto" and not gpu and fast_bf16():
        merged["precision"] = "bf16"
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
