"""``cryosuite train-hype``: one volume per particle, by a transformer that writes the weights of a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from cryosuite.commands.options import say_not_used, say_without_effect
from cryosuite.data.typed import typed

INPUT, TRAINING, MODEL, ENCODER, SPEED = (
    "Particles", "Training", "Model (the preset decides unless given)", "What the encoder sees", "Machine",
)  # fmt: skip

# flags that are options of the method, under another name there
RENAMED = {"inr_dim": "inr_width", "features": "n_frequencies", "march": "march_from"}
METHOD = (
    "dim", "depth", "heads", "patch", "pos_embed", "groups", "hyper", "conditioning", "inr", "inr_dim", "inr_layers",
    "features", "feat_sigma", "field", "loss", "march", "march_over", "sample_coefficients", "encoder_input",
    "encoder_scale", "encoder_rmax", "encoder_lowpass", "encoder_align", "encoder_drop", "other_views", "pose_context",
    "window", "low_memory", "latent", "volume_from", "knn",
)  # fmt: skip
TRAIN = {
    "num_epochs": "epochs", "batch_size": "batch_size", "lr": "lr", "warmup": "warmup", "wd": "weight_decay",
    "ema": "ema", "seed": "seed", "max_minutes": "max_minutes", "checkpoint": "save_every",
    "checkpoint_minutes": "checkpoint_every_minutes", "precision": "precision", "accelerator": "accelerator",
    "devices": "devices", "num_nodes": "num_nodes", "log_interval": "log_every", "requeue": "requeue",
}  # fmt: skip
WAYS_IN = ("poses", "ctf", "ind", "datadir", "pixel_size")


def _option(default: Any, *names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(default, *names, help=help, rich_help_panel=panel, show_default=default is not None, **more)


def main(
    context: typer.Context,
    particles: Path = typer.Argument(
        ..., help="Work folder of preprocess or simulate; or a .star, .cs or .mrcs file.", metavar="PARTICLES"
    ),
    outdir: Path = typer.Option(..., "-o", "--outdir", help="Folder of the run, made by this command."),
    preset: str = typer.Option(
        "auto",
        help="small: for a laptop (its volume network is twice as wide above 48 pixels). default: for a GPU. "
        "paper: as published (CryoHype), 50 M parameters. "
        "auto: default where there is a GPU, else small.",
    ),
    resume: bool = typer.Option(False, "--resume", help="Go on where the run in this folder stopped."),
    load: str = typer.Option(None, "--load", hidden=True, help="cryoDRGN's flag; latest means --resume."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the run that is in the folder."),
    poses: Path = _option(None, help="Poses as cryoDRGN writes them (poses.pkl).", panel=INPUT),
    ctf: Path = _option(None, help="CTF parameters as cryoDRGN writes them (ctf.pkl).", panel=INPUT),
    ind: Path = _option(None, help="Use only these particles (a .pkl of indices).", panel=INPUT),
    datadir: Path = _option(None, help="Folder in which the image stacks lie.", panel=INPUT),
    pixel_size: float = _option(None, "--Apix", help="Pixel size in Angstrom, where no file says it.", panel=INPUT),
    invert_data: bool = _option(False, "--invert-data", help="Particles are dark in the images.", panel=INPUT),
    refine_shifts: bool = _option(
        None,
        "--refine-shifts/--no-refine-shifts",
        help="Before training, refine shifts where one map of all particles shows them wrong by a quarter of a pixel "
        "or more (usual; not with --preset paper).",
        panel=INPUT,
    ),
    num_epochs: int = _option(
        None, "-n", "--num-epochs", help="Epochs: how often all images are seen.", panel=TRAINING
    ),
    batch_size: int = _option(None, "-b", "--batch-size", help="Images per step, over all GPUs.", panel=TRAINING),
    lr: float = _option(None, help="Learning rate of the network.", panel=TRAINING),
    warmup: float = _option(None, help="Fraction of the training in which the learning rate rises.", panel=TRAINING),
    wd: float = _option(None, help="Weight decay of the matrices.", panel=TRAINING),
    ema: float = _option(None, help="Decay of the running average of the weights; 0: none.", panel=TRAINING),
    max_minutes: float = _option(
        None, help="Stop after so many minutes with a checkpoint; go on with --resume.", panel=TRAINING
    ),
    checkpoint: int = _option(
        None, help="Write latents and weights every so many epochs; default: four times in all.", panel=TRAINING
    ),
    checkpoint_minutes: float = _option(10.0, help="Minutes between two saves of what --resume needs.", panel=TRAINING),
    log_interval: int = _option(50, help="Steps between two lines of metrics.jsonl.", panel=TRAINING),
    seed: int = _option(0, help="Random seed: the same seed gives the same result (on one machine).", panel=TRAINING),
    conditioning: str = _option(
        None,
        help="hyper: the image writes weights. concat: the image's code is appended to the coordinates.",
        panel=MODEL,
    ),  # fmt: skip
    hyper: str = _option(None, help="How weights are written: groups (as published) or lowrank.", panel=MODEL),
    inr: str = _option(
        None, help="Volume network: mlp (as published) or triplane, which is smaller and faster.", panel=MODEL
    ),
    inr_dim: int = _option(None, help="Neurons in each layer of the volume network.", panel=MODEL),
    inr_layers: int = _option(None, help="Hidden layers of the volume network.", panel=MODEL),
    groups: int = _option(None, help="Weight tokens for each hidden layer of the volume network.", panel=MODEL),
    features: int = _option(None, help="Random frequencies that coordinates are given as.", panel=MODEL),
    feat_sigma: float = _option(None, help="Spread of the random frequencies, in box sizes.", panel=MODEL),
    dim: int = _option(None, help="Numbers in each token of the transformer.", panel=MODEL),
    depth: int = _option(None, help="Blocks (layers) of the transformer.", panel=MODEL),
    heads: int = _option(None, help="Attention heads of the transformer.", panel=MODEL),
    pos_embed: str = _option(None, help="Position of a patch: learned, sincos or none.", panel=MODEL),
    field: str = _option(
        None, help="Values of the Fourier field: complex (half the work) or hartley (as published).", panel=MODEL
    ),
    loss: str = _option(None, help="Loss: whitened (weighs by the noise) or mse (as published).", panel=MODEL),
    march: float = _option(
        None, help="Begin with this part of the Fourier disc and let it grow; 1: all from the start.", panel=MODEL
    ),
    march_over: float = _option(
        None, help="Fraction of the training in which that part of the disc grows.", panel=MODEL
    ),
    latent: str = _option(
        None, help="Latent of a particle: pca64 (64 numbers) or tokens (all weight tokens).", panel=MODEL
    ),
    volume_from: str = _option(
        None, help="Volumes from the knn nearest particles, their cluster, or one image.", panel=MODEL
    ),
    knn: int = _option(None, help="Nearest particles averaged with --volume-from knn.", panel=MODEL),
    patch: int = _option(None, help="Side of the encoder's patches in pixels.", panel=ENCODER),
    encoder_input: str = _option(
        None, help="Images shown to the encoder: hartley (as published) or real.", panel=ENCODER
    ),
    encoder_scale: str = _option(None, help="How Fourier shells are weighed: noise, total or wiener.", panel=ENCODER),
    encoder_rmax: int = _option(
        None, help="Crop the encoder's images to this radius in Fourier pixels; 0: no.", panel=ENCODER
    ),
    encoder_lowpass: float = _option(
        None, help="Low-pass the encoder's images: Gaussian radius in Fourier pixels; 0: no.", panel=ENCODER
    ),
    encoder_align: bool = _option(
        None, "--encoder-align/--no-encoder-align", help="Turn images upright by their known angle.", panel=ENCODER
    ),
    encoder_drop: float = _option(
        None, help="Share of the Fourier coefficients hidden in each step, against learning noise.", panel=ENCODER
    ),
    other_views: float = _option(
        None,
        help="Share of the images, in each step, whose volume is read in part from a particle like them that is "
        "seen from another side, so that latents tell molecules and not views; 0: none.",
        panel=ENCODER,
    ),
    pose_context: bool = _option(
        None, "--pose-context/--no-pose-context", help="Tell the encoder the viewing direction.", panel=ENCODER
    ),
    window: bool = _option(
        None,
        "--window/--no-window",
        help="Mask the corners of the images, outside the particle's circle.",
        panel=ENCODER,
    ),
    precision: str = _option(
        "auto", help="Precision of numbers: 32 or bf16; auto: bf16 where the machine is fast at it.", panel=SPEED
    ),
    sample_coefficients: bool = _option(
        None,
        "--sample-coefficients/--all-coefficients",
        help="Use a sample of the Fourier coefficients per step.",
        panel=SPEED,
    ),  # fmt: skip
    low_memory: bool = _option(
        None, "--low-memory/--keep-activations", help="Need less memory and a third more time.", panel=SPEED
    ),
    accelerator: str = _option("auto", help="Where to compute: auto, cpu or gpu.", panel=SPEED),
    devices: int = _option(1, help="GPUs on each machine (processes without GPUs).", panel=SPEED),
    num_nodes: int = _option(1, help="Machines that train together.", panel=SPEED),
    requeue: bool = _option(False, "--requeue", help="Under SLURM: put the job back into the queue.", panel=SPEED),
) -> None:
    """Learn one volume per particle (CryoHype): which molecules or states are in the set, and what each looks like.

    Needs images with known poses and CTF. Good at sets of many different molecules. Writes latents (z.N.pkl),
    weights and poses; look at them with analyze.

        cryosuite train-hype work/ -o run/

        cryosuite train-hype particles.mrcs --poses poses.pkl --ctf ctf.pkl -o run/ -n 50

        cryosuite train-hype work/ -o run/ --resume
    """
    values = dict(context.params)
    # by name: Typer may bring its own copy of click, whose enumeration is another class
    sources = {name: getattr(context.get_parameter_source(name), "name", "DEFAULT") for name in values}
    typed = {name for name, source in sources.items() if not source.startswith("DEFAULT")}
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
    from cryosuite.methods.hype_run import epoch_writer, open_for
    from cryosuite.training.launch import meet, process_rank
    from cryosuite.training.loop import fit
    from cryosuite.training.poses import begin_with_refined_shifts
    from cryosuite.training.runs import begin_run, make_config, particles_path, train_options

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
    config = make_config("hype", values["particles"], run, options, training, preset=name, refine_shifts=wanted, **how)
    config = begin_run(run, config, training, resume=values["resume"], overwrite=values["overwrite"])
    if particles is None:
        particles = open_for(particles_path(config, run), config)
    again = {to: values[key] for key, to in TRAIN.items() if key in typed} if values["resume"] else {}
    training = train_options(config, **again)
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
    from cryosuite.training.launch import fast_bf16, resolve_accelerator
    from cryosuite.training.options import TrainOptions

    gpu = resolve_accelerator(values["accelerator"]) == "cuda"
    changes = {} if values["resume"] else {RENAMED.get(name, name): values[name] for name in METHOD}
    name, chosen = preset(values["preset"], gpu, box_size, **changes)
    if values["preset"] == "auto" and not values["resume"]:
        reason = "a GPU is here" if gpu else "no GPU is used"
        notice(f"--preset {name} was chosen because {reason}; --preset small, default or paper decides otherwise")
    given = {to: values[key] for key, to in TRAIN.items() if values[key] is not None}
    if values["precision"] == "auto":
        given["precision"] = chosen.training.get("precision", "auto")
        if not gpu and "precision" not in chosen.training and fast_bf16():
            given["precision"] = "bf16"
    merged = chosen.training | given
    merged.setdefault("save_every", max(1, merged["epochs"] // 4))
    return chosen.options, TrainOptions(**merged), name


def tune_process() -> None:
    """Settings of this process that make training on a CPU faster and change no number that matters.

    Denormal numbers count as zero, and the C library keeps freed memory instead of handing every tensor's pages back
    to the system and asking for them again.
    """
    import ctypes
    import sys

    import torch

    torch.set_flush_denormal(True)
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 64 << 20)):  # mmap, trim, top pad
        mallopt(parameter, value)


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
