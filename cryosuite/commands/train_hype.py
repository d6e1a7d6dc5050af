"""``cryosuite train-hype``: one volume per particle, by a transformer that writes the weights of a network."""

from __future__ import annotations

from typing import Any

import typer

from cryosuite.commands import training_options as shared
from cryosuite.commands.options import INPUT, Apix, Ctf, Datadir, Ind, Poses, say_not_used, say_without_effect
from cryosuite.commands.training_options import ENGINE, MACHINE, option, precision, typed_again, typed_values
from cryosuite.data.typed import typed

MODEL, ENCODER = "Model (the preset decides unless given)", "What the encoder sees"

# flags that are options of the method, under another name there
RENAMED = {"inr_dim": "inr_width", "features": "n_frequencies", "march": "march_from"}
METHOD = (
    "dim", "depth", "heads", "patch", "pos_embed", "groups", "hyper", "conditioning", "inr", "inr_dim", "inr_layers",
    "features", "feat_sigma", "field", "loss", "march", "march_over", "sample_coefficients", "encoder_input",
    "encoder_scale", "encoder_rmax", "encoder_lowpass", "encoder_align", "reading", "other_views", "pose_context",
    "window", "low_memory", "latent", "volume_from", "knn",
)  # fmt: skip
TRAIN = ENGINE | {
    "num_epochs": "epochs", "warmup": "warmup", "wd": "weight_decay", "ema": "ema", "checkpoint": "save_every",
    "log_interval": "log_every", "precision": "precision",
}  # fmt: skip
WAYS_IN = ("poses", "ctf", "ind", "datadir", "pixel_size")


def main(
    context: typer.Context,
    particles: shared.Particles,
    outdir: shared.RunFolder,
    preset: str = typer.Option(
        "auto",
        help="small: for a laptop (its volume network is twice as wide above 48 pixels). default: for a GPU. "
        "paper: as published (CryoHype), 50 M parameters. "
        "auto: default where there is a GPU, else small.",
    ),
    resume: shared.Resume = False,
    load: str = typer.Option(None, "--load", hidden=True, help="cryoDRGN's flag; latest means --resume."),
    overwrite: shared.Replace = False,
    poses: Poses = None,
    ctf: Ctf = None,
    ind: Ind = None,
    datadir: Datadir = None,
    pixel_size: Apix = None,
    invert_data: shared.InvertData = False,
    refine_shifts: bool = option(
        None,
        "--refine-shifts/--no-refine-shifts",
        help="Before training, refine shifts where one map of all particles shows them wrong by a quarter of a pixel "
        "or more (usual; not with --preset paper).",
        panel=INPUT,
    ),
    num_epochs: shared.NumEpochs = None,
    batch_size: shared.BatchSize = None,
    lr: shared.LearningRate = None,
    warmup: shared.Warmup = None,
    wd: shared.WeightDecay = None,
    ema: shared.Ema = None,
    max_minutes: shared.MaxMinutes = None,
    checkpoint: shared.Checkpoint = None,
    checkpoint_minutes: shared.CheckpointMinutes = 10.0,
    log_interval: shared.LogInterval = 50,
    seed: shared.Seed = 0,
    conditioning: str = option(
        None,
        help="hyper: the image writes weights. concat: the image's code is appended to the coordinates.",
        panel=MODEL,
    ),  # fmt: skip
    hyper: str = option(None, help="How weights are written: groups (as published) or lowrank.", panel=MODEL),
    inr: str = option(
        None, help="Volume network: mlp (as published) or triplane, which is smaller and faster.", panel=MODEL
    ),
    inr_dim: int = option(None, help="Neurons in each layer of the volume network.", panel=MODEL),
    inr_layers: int = option(None, help="Hidden layers of the volume network.", panel=MODEL),
    groups: int = option(None, help="Weight tokens for each hidden layer of the volume network.", panel=MODEL),
    features: int = option(None, help="Random frequencies that coordinates are given as.", panel=MODEL),
    feat_sigma: float = option(None, help="Spread of the random frequencies, in box sizes.", panel=MODEL),
    dim: int = option(None, help="Numbers in each token of the transformer.", panel=MODEL),
    depth: int = option(None, help="Blocks (layers) of the transformer.", panel=MODEL),
    heads: int = option(None, help="Attention heads of the transformer.", panel=MODEL),
    pos_embed: str = option(None, help="Position of a patch: learned, sincos or none.", panel=MODEL),
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
    latent: str = option(
        None, help="Latent of a particle: pca64 (64 numbers) or tokens (all weight tokens).", panel=MODEL
    ),
    volume_from: str = option(
        None, help="Volumes from the knn nearest particles, their cluster, or one image.", panel=MODEL
    ),
    knn: int = option(None, help="Nearest particles averaged with --volume-from knn.", panel=MODEL),
    patch: int = option(None, help="Side of the encoder's patches in pixels.", panel=ENCODER),
    encoder_input: str = option(
        None, help="Images shown to the encoder: hartley (as published) or real.", panel=ENCODER
    ),
    encoder_scale: str = option(None, help="How Fourier shells are weighed: noise, total or wiener.", panel=ENCODER),
    encoder_rmax: int = option(
        None, help="Crop the encoder's images to this radius in Fourier pixels; 0: no.", panel=ENCODER
    ),
    encoder_lowpass: float = option(
        None, help="Low-pass the encoder's images: Gaussian radius in Fourier pixels; 0: no.", panel=ENCODER
    ),
    encoder_align: bool = option(
        None, "--encoder-align/--no-encoder-align", help="Turn images upright by their known angle.", panel=ENCODER
    ),
    reading: str = option(
        None,
        help="How images are read in training. whole; halves: twice in a step, from two random halves of the Fourier "
        "coefficients, each judged by the other, so that no image's own noise is learnt (half as much time again); "
        "auto: halves where images hold very little signal.",
        panel=ENCODER,
    ),
    other_views: float = option(
        None,
        help="Share of the images, in each step, whose volume is read in part from a particle like them that is "
        "seen from another side, so that latents tell molecules and not views; 0: none. Of images read whole.",
        panel=ENCODER,
    ),
    pose_context: bool = option(
        None, "--pose-context/--no-pose-context", help="Tell the encoder the viewing direction.", panel=ENCODER
    ),
    window: bool = option(
        None,
        "--window/--no-window",
        help="Mask the corners of the images, outside the particle's circle.",
        panel=ENCODER,
    ),
    precision: shared.Precision = "auto",
    sample_coefficients: bool = option(
        None,
        "--sample-coefficients/--all-coefficients",
        help="Use a sample of the Fourier coefficients per step.",
        panel=MACHINE,
    ),  # fmt: skip
    low_memory: shared.LowMemory = None,
    accelerator: shared.Accelerator = "auto",
    devices: shared.Devices = 1,
    num_nodes: shared.NumNodes = 1,
    requeue: shared.Requeue = False,
) -> None:
    """Learn one volume per particle (CryoHype): which molecules or states are in the set, and what each looks like.

    Needs images with known poses and CTF. Good at sets of many different molecules. Writes latents (z.N.pkl),
    weights and poses; look at them with analyze.

        cryosuite train-hype work/ -o run/

        cryosuite train-hype particles.mrcs --poses poses.pkl --ctf ctf.pkl -o run/ -n 50

        cryosuite train-hype work/ -o run/ --resume
    """
    values, typed = typed_values(context)
    if values.pop("load"):
        values["resume"] = _as_resume(load)
    if values["resume"]:
        say_not_used(context, (*TRAIN, "load"))
    raise typer.Exit(_train(values, typed))


def _as_resume(load: str) -> bool:
    """cryoDRGN's --load latest is our --resume; anything else is refused, never ignored."""
    from cryosuite.errors import InputError, notice

    if load != "latest":
        raise InputError(
            f"--load {load}: only 'latest' is understood; to go on with a run give its folder and --resume"
        )
    notice("--load latest is read as --resume: the options are those the run began with")
    return True


def _train(values: dict[str, Any], typed: set[str]) -> int:
    """Open, train, write, print; returns the exit code."""
    from cryosuite.data.workdir import RunDir
    from cryosuite.methods.hype import Hype
    from cryosuite.methods.hype_options import HypeOptions
    from cryosuite.methods.hype_run import VOXEL, epoch_writer, open_for
    from cryosuite.reconstruct.backproject import common_pixel_size
    from cryosuite.training.launch import meet, process_rank, tune_process
    from cryosuite.training.loop import fit
    from cryosuite.training.poses import begin_with_refined_shifts
    from cryosuite.training.runs import begin_run, go_on_with, make_config, particles_path

    run = RunDir(values["outdir"])
    tune_process()
    how = {key: values[key] for key in WAYS_IN} | {"sign": -1 if values["invert_data"] else None}
    particles = None if values["resume"] else open_for(values["particles"], how)
    options, training, name = _options(values, typed, None if particles is None else particles.box_size)
    if particles is not None:
        idle = options.without_effect([RENAMED.get(name, name) for name in METHOD if name in typed])
        say_without_effect(idle, RENAMED)
        Hype(options).check(particles)  # before the folder is touched
    wanted = name != "paper" if values["refine_shifts"] is None else values["refine_shifts"]
    voxel = {} if particles is None else {VOXEL: common_pixel_size(particles.pixel_size)}
    config = make_config(
        "hype", values["particles"], run, options, training, preset=name, refine_shifts=wanted, **how, **voxel
    )
    config = begin_run(run, config, training, resume=values["resume"], overwrite=values["overwrite"])
    if particles is None:
        particles = open_for(particles_path(config, run), config)
    again = typed_again(values, typed, TRAIN)
    training = go_on_with(run, config, **again)
    particles = begin_with_refined_shifts(particles, run, config, meet(training))
    method = Hype(HypeOptions.from_dict(config["options"]), training.precision)
    result = fit(
        method, particles, run, training,
        resume=values["resume"], on_epoch=epoch_writer(method, particles, run),
    )  # fmt: skip
    if process_rank() == 0:
        _report(run, result)
    return result.exit_code


def _options(values: dict[str, Any], typed: set[str], box_size: int | None) -> tuple[Any, Any, str]:
    """(options of the method, of the training, name of the preset); a run that goes on has its own in its config."""
    from cryosuite.errors import notice
    from cryosuite.methods.hype_options import preset
    from cryosuite.training.launch import resolve_accelerator
    from cryosuite.training.options import TrainOptions

    gpu = resolve_accelerator(values["accelerator"]) == "cuda"
    changes = {} if values["resume"] else {RENAMED.get(name, name): values[name] for name in METHOD}
    name, chosen = preset(values["preset"], gpu, box_size, **changes)
    if values["preset"] == "auto" and not values["resume"]:
        reason = "a GPU is here" if gpu else "no GPU is used"
        notice(f"--preset {name} was chosen because {reason}; --preset small, default or paper decides otherwise")
    given = {to: values[key] for key, to in TRAIN.items() if values[key] is not None}
    merged = chosen.training | given | {"precision": precision(values, chosen.training.get("precision"), gpu)}
    merged.setdefault("save_every", max(1, merged["epochs"] // 4))
    return chosen.options, TrainOptions(**merged), name


def _report(run: Any, result: Any) -> None:
    """Where things lie and what to do next."""
    from cryosuite.console import say, table

    epochs = run.epochs()
    if epochs:
        n = epochs[-1]
        rows = [
            ["latents, one row per particle", run.z(n)],
            ["weights of the networks", run.weights(n)],
            ["poses used", run.poses(n)],
            ["learning curve", run.metrics],
            ["options", run.config],
        ]
        table(f"{result.epochs_done} epochs done; the last ones kept are of epoch {n}", ["what", "where"], rows)
    if result.stopped:
        say(f"stopped by {result.stopped}; go on with: cryosuite train-hype {typed(run.path)} ... --resume")
    if epochs:
        say(f"next: cryosuite analyze {typed(run.path)}")
