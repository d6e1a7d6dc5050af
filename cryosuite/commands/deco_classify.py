"""``cryosuite deco-classify``: poses and classes of particles, from a pre-trained encoder and one decoder for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from cryosuite.commands import training_options as shared
from cryosuite.commands.options import Apix, Ctf, Datadir, Ind, Poses, Threads, say_without_effect
from cryosuite.commands.training_options import ENGINE, TRAINING, option, precision, typed_again, typed_values
from cryosuite.data.typed import typed

POSES, CLASSES, MODEL = "Poses", "Classes", "Model (the preset decides unless given)"

RENAMED = {"dim": "width", "features": "n_frequencies", "march": "march_from", "hps_epochs": "search_epochs",
           "re_search": "research_every"}  # fmt: skip
METHOD = (
    "encoder", "encoder_size", "encoder_input", "finetune", "bn", "dim", "layers", "features", "feat_sigma",
    "layer_norm", "field", "loss", "window", "march", "march_over", "lr_encoder", "lr_poses", "refine_poses", "start",
    "classes", "starts", "warmup_images", "hps_epochs", "hold_poses", "re_search", "shift_extent", "search",
    "cached_volumes", "cluster", "settle", "hand", "low_memory",
)  # fmt: skip
TRAIN = ENGINE | {
    "num_epochs": "epochs", "warmup": "warmup", "wd": "weight_decay", "ema": "ema", "checkpoint": "save_every",
    "log_interval": "log_every", "precision": "precision",
}  # fmt: skip
NETWORK_START = ("hps_epochs", "warmup_images")  # what nothing else makes use of
WAYS_IN = ("poses", "ctf", "ind", "datadir", "pixel_size")


def main(
    context: typer.Context,
    particles: shared.Particles,
    outdir: shared.RunFolder,
    preset: str = typer.Option(
        "auto",
        help="small: for a laptop. default: for a GPU. paper: as published (CryoDECO). auto: default where there is "
        "a GPU, else small.",
    ),
    resume: shared.Resume = False,
    overwrite: shared.Replace = False,
    poses: Poses = None,
    ctf: Ctf = None,
    ind: Ind = None,
    datadir: Datadir = None,
    pixel_size: Apix = None,
    invert_data: shared.InvertData = False,
    ab_initio: bool = option(
        False, "--ab-initio", help="Find the poses, even where the particles have some.", panel=POSES
    ),
    refine_poses: bool = option(
        None, "--refine-poses/--fixed-poses", help="Let known poses move with the training.", panel=POSES
    ),
    classes: int = option(
        None, "--classes", help="Ab initio: maps the first poses are searched with. Default: --k, else 1.", panel=POSES
    ),
    start: str = option(None, help="Ab initio: voxel (closed-form maps first) or network (as published).", panel=POSES),
    starts: int = option(None, help="Voxel start: random starts, of which the most likely is kept.", panel=POSES),
    shift_extent: float = option(None, help="Largest shift searched for, as a fraction of the box.", panel=POSES),
    search: str = option(
        None,
        help="Searches with the network: exact, in each particle's own volume (default), or cached, in the volumes of "
        "groups of particles, which is faster. Needs --start network or --re-search.",
        panel=POSES,
    ),
    cached_volumes: int = option(None, help="Number of these groups, 64 to 512.", panel=POSES),
    hps_epochs: int = option(None, help="Network start: epochs of hierarchical pose search.", panel=POSES),
    warmup_images: int = option(None, help="Network start: images with random poses before.", panel=POSES),
    hold_poses: float = option(
        None, help="Fraction of the training in which given or found poses are not refined yet.", panel=POSES
    ),
    re_search: int = option(
        None, help="Search anew for the worst 5 % of the poses every so many epochs; 0: never.", panel=POSES
    ),
    hand: str = option(
        None,
        help="Hand of the maps. auto: classes agree with the largest. flip: likewise, all of the other hand. keep: as "
        "found.",
        panel=POSES,
    ),
    k: str = option("auto", "-k", "--k", help="Number of classes, or auto (BIC, shown in bic.png).", panel=CLASSES),
    cluster: str = option(
        None, help="How latents are clustered: gmm-umap16 (as published), gmm-direct or kmeans.", panel=CLASSES
    ),
    settle: bool = option(
        None,
        "--settle/--no-settle",
        help="Let the images choose their classes anew, by half maps they have no part in; default: where all "
        "classes share one frame, except with --preset paper.",
        panel=CLASSES,
    ),  # fmt: skip
    num_epochs: shared.NumEpochs = None,
    batch_size: shared.BatchSize = None,
    lr: float = option(None, help="Learning rate of the decoder.", panel=TRAINING),
    lr_encoder: float = option(None, help="Learning rate of the encoder, as a multiple of --lr.", panel=TRAINING),
    lr_poses: float = option(None, help="Learning rate of the poses, as a multiple of --lr.", panel=TRAINING),
    warmup: shared.Warmup = None,
    wd: shared.WeightDecay = None,
    ema: shared.Ema = None,
    finetune: str = option(
        None,
        help="What of the encoder is trained: all, last-3 blocks (or another number), head, none.",
        panel=TRAINING,
    ),  # fmt: skip
    max_minutes: shared.MaxMinutes = None,
    checkpoint: shared.Checkpoint = None,
    checkpoint_minutes: shared.CheckpointMinutes = 10.0,
    log_interval: shared.LogInterval = 50,
    seed: shared.Seed = 0,
    encoder: str = option(
        None,
        help="First encoder: random (preset small), iev-tiny (shipped), or a weights file (Cryo-IEF, pretrain-iev).",
        panel=MODEL,
    ),
    encoder_size: str = option(None, help="Size of a random encoder: micro, vit_tiny or vit_small.", panel=MODEL),
    encoder_input: str = option(
        None,
        help="Images the encoder sees: raw, flipped (CTF signs undone), upright (turned by the known angle too), auto.",
        panel=MODEL,
    ),  # fmt: skip
    bn: str = option(None, help="Batch norms of the encoder: frozen or train (as published).", panel=MODEL),
    zdim: str = option(None, help="Length of the latent; auto tries 4 to 128 on held-out images.", panel=MODEL),
    dim: int = option(None, help="Neurons in each layer of the volume network.", panel=MODEL),
    layers: int = option(None, help="Residual layers of the volume network.", panel=MODEL),
    features: int = option(None, help="Random frequencies that coordinates are given as.", panel=MODEL),
    feat_sigma: float = option(None, help="Spread of the random frequencies, in units of half the box.", panel=MODEL),
    layer_norm: bool = option(
        None, "--layer-norm/--no-layer-norm", help="Layer norms in the volume network (as published).", panel=MODEL
    ),
    field: str = option(
        None, help="Values of the Fourier field: complex (half the work) or hartley (as published).", panel=MODEL
    ),
    loss: str = option(None, help="Loss: whitened (weighs by the noise) or mse (as published).", panel=MODEL),
    march: float = option(
        None, help="Begin with this part of the Fourier disc and let it grow; 1: all from the start.", panel=MODEL
    ),
    march_over: float = option(
        None, help="Fraction of the training in which that part of the disc grows.", panel=MODEL
    ),
    window: bool = option(
        None, "--window/--no-window", help="Mask the corners of the images, outside the particle's circle.", panel=MODEL
    ),
    precision: shared.Precision = "auto",
    low_memory: shared.LowMemory = None,
    threads: Threads = 0,
    accelerator: shared.Accelerator = "auto",
    devices: shared.Devices = 1,
    num_nodes: shared.NumNodes = 1,
    requeue: shared.Requeue = False,
) -> None:
    """Sort particles into classes, with known poses or without any (CryoDECO).

    An encoder that has seen many particles gives each image a latent, one
    network turns latents into volumes, and the latents are clustered. Poses
    are those of the particles; where there are none, or with --ab-initio,
    they are found. Needs the CTF.

    Writes latents, poses, labels, and in clusters.N/ a star and a cs file per
    class with its poses, ready for RELION or cryoSPARC; maps in polish.N/.

        cryosuite deco-classify work/ -o run/ -k 16

        cryosuite deco-classify particles.star -o run/ --ab-initio -k 4

        cryosuite deco-classify work/ -o run/ --resume
    """
    values, typed = typed_values(context)
    raise typer.Exit(_train(values, typed))


def _train(values: dict[str, Any], typed: set[str]) -> int:
    """Open, train, write, print; returns the exit code."""
    import torch

    from cryosuite.data.workdir import RunDir
    from cryosuite.errors import notice
    from cryosuite.methods.deco_options import DecoOptions
    from cryosuite.methods.deco_run import can_resume, check, open_for, train
    from cryosuite.training.launch import process_rank, tune_process, was_restarted
    from cryosuite.training.runs import (
        begin_run,
        go_on_with,
        make_config,
        particles_path,
        read_run_config,
        with_particles,
        without_limit,
    )

    run = RunDir(values["outdir"])
    tune_process()
    if values["threads"] > 0:
        torch.set_num_threads(values["threads"])
    resume = values["resume"] or was_restarted()
    how = {key: values[key] for key in WAYS_IN} | {"sign": -1 if values["invert_data"] else None}
    if resume and can_resume(run):
        config = read_run_config(run)
        config = with_particles(without_limit(config) if values["resume"] else config, values["particles"], run)
        kept = sorted(typed & {*METHOD, *WAYS_IN, "preset", "k", "zdim", "ab_initio", "invert_data"})
        if kept:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in kept)
            notice(f"{flags}: not used, a run goes on with the options it began with")
        particles = open_for(particles_path(config, run), config)
    else:
        particles = open_for(values["particles"], how)
        options, training, name = _options(values, particles)
        check(particles, options, training)  # before the folder is touched
        config = make_config(
            "deco", values["particles"], run, options, training, preset=name, poses_found=options.table, **how
        )
        config = begin_run(run, config, training, resume=values["resume"], overwrite=values["overwrite"])
        resume = False
    again = typed_again(values | {"resume": resume}, typed, TRAIN)
    result = train(particles, run, DecoOptions.from_dict(config["options"]), go_on_with(run, config, **again), resume)
    if process_rank() == 0:
        _report(run, values["particles"], result)
    return result.exit_code


def _options(values: dict[str, Any], particles: Any) -> tuple[Any, Any, str]:
    """(options of the method, of the training, name of the preset)."""
    from cryosuite.errors import InputError, notice
    from cryosuite.methods.deco_options import preset
    from cryosuite.methods.deco_run import available_encoder
    from cryosuite.training.launch import resolve_accelerator
    from cryosuite.training.options import TrainOptions

    if values["cached_volumes"] is not None and values["search"] != "cached":
        raise InputError("--cached-volumes: goes with --search cached")
    gpu = resolve_accelerator(values["accelerator"]) == "cuda"
    changes = {RENAMED.get(name, name): values[name] for name in METHOD}
    changes["k"] = _number("--k", values["k"], 0)
    changes["zdim"] = None if values["zdim"] in (None, "auto") else _number("--zdim", values["zdim"], None)
    changes["zdim_auto"] = values["zdim"] == "auto" or None
    known = particles.rotation is not None and not values["ab_initio"]
    if particles.rotation is None and not values["ab_initio"]:
        notice(f"{values['particles']}: has no poses: they are found ab initio (--poses gives known ones)")
    changes["poses"] = "known" if known else "none"
    changes["classes"] = changes["classes"] or changes["k"] or 1
    name, chosen = preset(values["preset"], gpu, **changes)
    if changes["encoder"] is None:
        chosen = available_encoder(chosen, changes["lr_encoder"])
    unused = [f"--{flag.replace('_', '-')}" for flag in NETWORK_START if values[flag] is not None]
    if unused and not (chosen.options.poses == "none" and chosen.options.start == "network"):
        now = "the poses are known here" if known else "here a voxel start finds the poses"
        raise InputError(f"{', '.join(unused)}: go with --ab-initio --start network; {now}. Leave them out")
    names = [flag for flag in (*METHOD, "zdim") if values[flag] is not None]
    say_without_effect(chosen.options.without_effect([RENAMED.get(flag, flag) for flag in names]), RENAMED)
    if values["preset"] == "auto":
        reason = "a GPU is here" if gpu else "no GPU is used"
        notice(f"--preset {name} was chosen because {reason}; --preset small, default or paper decides otherwise")
    given = {to: values[key] for key, to in TRAIN.items() if values[key] is not None}
    merged = chosen.training | given | {"precision": precision(values, chosen.training.get("precision"), gpu)}
    merged.setdefault("save_every", max(1, -(-merged["epochs"] // 4)))
    return chosen.options, TrainOptions(**merged), name


def _number(name: str, text: str, auto: int | None) -> int | None:
    """A whole number of at least 1, or what stands for "auto"."""
    from cryosuite.errors import InputError

    if text == "auto":
        return auto
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"{name} {text}: expected a whole number of at least 1, or auto")
    return int(text)


def _report(run: Any, particles: Path, result: Any) -> None:
    """The table of classes and what to do next."""
    import math

    from cryosuite.console import say, table
    from cryosuite.data.results import run_clusters, run_polish

    if result.stopped:
        again = f"cryosuite deco-classify {typed(particles)} -o {typed(run.path)} --resume"
        say(f"stopped by {result.stopped}; go on with: {again}")
        return
    folder = run_clusters(run.path, result.epoch)
    rows = [
        [row.number, row.particles, "-" if math.isnan(row.margin) else f"{row.margin:.1f}",
         "-" if math.isnan(row.resolution) else f"{row.resolution:.1f}", folder.volume(row.number)]
        for row in result.classes
    ]  # fmt: skip
    columns = ["class", "particles", "pose margin", "A at FSC .143", "map of the network"]
    if len(rows) > 60:
        rows = [*rows[:30], ["..."] * len(columns), *rows[-30:]]
    table(f"{len(result.classes)} classes after epoch {result.epoch}", columns, rows)
    say(f"labels {run.labels(result.epoch)}, latents {run.z(result.epoch)}, poses {run.poses(result.epoch)}")
    say(f"star and cs files per class in {folder.path}; polished maps in {run_polish(run.path, result.epoch).path}")
    say(f"next: cryosuite analyze {typed(run.path)}")
