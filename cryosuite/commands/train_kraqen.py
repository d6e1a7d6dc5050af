"""``cryosuite train-kraqen``: a mixture sorted into codes, each with its own map; no encoder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import typer

from cryosuite.commands.options import say_not_used, say_without_effect
from cryosuite.data.typed import typed

INPUT, CODES, ASSIGN, VOXEL, NETWORK, TRAINING, MACHINE = (
    "Particles", "Codes", "Assignment of particles to codes", "Voxel field", "Network fields (triplane, fourier)",
    "Training of a network field", "Machine",
)  # fmt: skip

RENAMED = {"march": "march_from"}
METHOD = (
    "field", "n_codes", "n_states", "assign", "kernel", "t_max", "t_min", "anneal", "balance", "split", "merge",
    "m_step", "refine_shifts", "iterations", "prior", "cluster_box", "march", "march_over", "rank", "channels",
    "plane_size", "levels", "features", "feat_sigma", "width", "layers", "init", "loss", "blend", "em_last", "beta",
    "margin", "alignment", "jitter", "straight_through", "fast", "em_finish",
)  # fmt: skip
TRAIN = {
    "num_epochs": "epochs", "batch_size": "batch_size", "lr": "lr", "seed": "seed", "max_minutes": "max_minutes",
    "precision": "precision", "accelerator": "accelerator", "devices": "devices", "num_nodes": "num_nodes",
    "checkpoint_minutes": "checkpoint_every_minutes", "requeue": "requeue",
}  # fmt: skip
# what the voxel field has no use for: it takes all images in every round, and saves after it
OF_NETWORKS = ("num_epochs", "batch_size", "lr", "checkpoint_minutes", "precision")
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
        help="compositional: mixtures of different molecules (voxel maps; auto). conformational: molecules that bend "
        "(a network). paper: as published (CryoKRAQEN), for a GPU.",
    ),
    resume: bool = typer.Option(False, "--resume", help="Go on where the run in this folder stopped."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the run that is in the folder."),
    poses: Path = _option(None, help="Poses as cryoDRGN writes them (poses.pkl).", panel=INPUT),
    ctf: Path = _option(None, help="CTF parameters as cryoDRGN writes them (ctf.pkl).", panel=INPUT),
    ind: Path = _option(None, help="Use only these particles (a .pkl of indices).", panel=INPUT),
    datadir: Path = _option(None, help="Folder in which the image stacks lie.", panel=INPUT),
    pixel_size: float = _option(None, "--Apix", help="Pixel size in Angstrom, where no file says it.", panel=INPUT),
    invert_data: bool = _option(False, "--invert-data", help="Particles are dark in the images.", panel=INPUT),
    n_states: int = _option(
        None,
        help="How many different molecules you expect: the search begins with 1.5 x as many codes, and joining them "
        "stops at this number.",
        panel=CODES,
    ),
    n_codes: int = _option(None, "-k", "--n-codes", help="Number of codes; nothing: 32.", panel=CODES),
    split: bool = _option(None, "--split/--no-split", help="Split the busiest code into unused ones.", panel=CODES),
    refine_shifts: bool = _option(
        None,
        "--refine-shifts/--no-refine-shifts",
        help="Refine shifts that turn out to be wrong by more than a tenth of a pixel (usual, not with --preset paper; "
        "network fields ask one map of all particles only, which must show a quarter).",
        panel=CODES,
    ),
    merge: str = _option(
        None,
        help="Joining of codes that show one state. overlap (usual): codes that share their images when all choose "
        "less sharply, but never to fewer than --n-states. likelihood: asked of images that had no part in the maps. "
        "correlation: half-map corrected, above .97. none: never.",
        panel=CODES,
    ),
    field: str = _option(
        None,
        help="Form of the maps. voxel: solved directly. triplane (as published) or fourier: a network.",
        panel=CODES,
    ),
    assign: str = _option(
        None, help="How particles are compared: likelihood, zcos (scale-free) or kernel (as published).", panel=ASSIGN
    ),
    kernel: str = _option(None, help="Kernel of --assign kernel: epanechnikov, gaussian or none.", panel=ASSIGN),
    t_max: float = _option(
        None, help="First temperature; 1 is the one that the noise asks for, more blurs.", panel=ASSIGN
    ),
    t_min: float = _option(None, help="Last temperature of the assignment.", panel=ASSIGN),
    anneal: str = _option(None, help="How the temperature falls: geometric or paper.", panel=ASSIGN),
    balance: float = _option(None, help="How much busy codes are held back at first; 0: not.", panel=ASSIGN),
    iterations: int = _option(None, "-i", "--iterations", help="Rounds of sorting and map making.", panel=VOXEL),
    m_step: str = _option(
        None,
        "--m-step",
        help="How maps are made in between. local (usual): two half maps per code, cleaned as polish does; images are "
        "judged by the maps of the other half. wiener: one map of all images; quicker, needs 500 images per state.",
        panel=VOXEL,
    ),
    prior: float = _option(None, help="Strength of the Wiener filter of --m-step wiener.", panel=VOXEL),
    cluster_box: int = _option(
        None,
        help="Box in pixels in which codes are told apart; nothing: at most 32, then 64. Maps have the full box.",
        panel=VOXEL,
    ),  # fmt: skip
    march: float = _option(
        None, help="Begin with this part of the Fourier disc and let it grow; 1: all from the start.", panel=VOXEL
    ),
    march_over: float = _option(None, help="Fraction of the run in which that part of the disc grows.", panel=VOXEL),
    rank: int = _option(
        None, help="Basis volumes that codes mix; nothing: as many as codes, at most 64.", panel=NETWORK
    ),
    channels: int = _option(None, help="Channels of each plane of the tri-plane.", panel=NETWORK),
    plane_size: int = _option(None, help="Side of the planes in pixels; nothing: the box + 1.", panel=NETWORK),
    levels: int = _option(None, help="Sizes of planes. 1: one. 2: a quarter of it too.", panel=NETWORK),
    features: int = _option(None, help="Random Fourier features beside the planes.", panel=NETWORK),
    feat_sigma: float = _option(None, help="Spread of the random features, in box sizes.", panel=NETWORK),
    width: int = _option(None, help="Neurons in each layer of the network.", panel=NETWORK),
    layers: int = _option(None, help="Hidden layers of the network.", panel=NETWORK),
    init: str = _option(
        None, help="Codes to start from: random, or kmeans of the particles' own codes.", panel=NETWORK
    ),
    loss: str = _option(None, help="Loss of the images: l2, l1 (as published) or huber.", panel=NETWORK),
    blend: str = _option(
        None,
        help="What is compared with an image: blended codes (as published) or each code by itself (em).",
        panel=NETWORK,
    ),
    em_last: float = _option(None, help="Last fraction of the training in which --blend em holds.", panel=NETWORK),
    beta: float = _option(None, help="Weight of the triplet loss (paper: .05); 0: none.", panel=NETWORK),
    margin: float = _option(
        None, help="Margin of the triplet loss, in mean squared distances of the codes.", panel=NETWORK
    ),
    alignment: float = _option(None, help="Weight of the triplet loss's alignment term.", panel=NETWORK),
    jitter: float = _option(None, help="Noise on the codes, falling to none.", panel=NETWORK),
    straight_through: bool = _option(
        None, "--straight-through/--no-straight-through", help="Let gradients reach the assignment.", panel=NETWORK
    ),
    fast: float = _option(None, help="Learning rate of planes and codes, times the network's.", panel=NETWORK),
    em_finish: int = _option(None, help="Rounds of direct map making after the network.", panel=NETWORK),
    num_epochs: int = _option(
        None, "-n", "--num-epochs", help="Epochs: how often all images are seen.", panel=TRAINING
    ),
    batch_size: int = _option(None, "-b", "--batch-size", help="Images per step, over all GPUs.", panel=TRAINING),
    lr: float = _option(None, help="Learning rate of the network.", panel=TRAINING),
    max_minutes: float = _option(
        None, help="Stop after so many minutes with a checkpoint; go on with --resume.", panel=MACHINE
    ),
    checkpoint_minutes: float = _option(10.0, help="Minutes between two saves of what --resume needs.", panel=TRAINING),
    precision: str = _option(None, help="32 or bf16 of the network; nothing: bf16 on a GPU.", panel=MACHINE),
    accelerator: str = _option("auto", help="Where to compute: auto, cpu or gpu.", panel=MACHINE),
    devices: int = _option(1, help="GPUs on each machine (processes without GPUs).", panel=MACHINE),
    num_nodes: int = _option(1, help="Machines that work together.", panel=MACHINE),
    requeue: bool = _option(False, "--requeue", help="Under SLURM: put the job back into the queue.", panel=MACHINE),
    threads: int = _option(0, "--threads", help="Processor threads to use; 0: all.", panel=MACHINE),
    seed: int = _option(0, help="Random seed: the same seed gives the same result (on one machine).", panel=MACHINE),
) -> None:
    """Sort a mixture into codes and make a map of each (CryoKRAQEN).

    Needs images with known poses and CTF. Every particle is compared with
    the projections of all codes; codes that nobody uses are given to busy
    ones, twins are merged at the end. Writes vol_000.mrc ..., labels, shares
    and latents; sharpen the maps with polish.

        cryosuite train-kraqen work/ -o run/ --n-states 16

        cryosuite train-kraqen work/ -o run/ --preset conformational

        cryosuite train-kraqen work/ -o run/ --resume
    """
    values = dict(context.params)
    sources = {name: getattr(context.get_parameter_source(name), "name", "DEFAULT") for name in values}
    typed = {name for name, source in sources.items() if not source.startswith("DEFAULT")}
    if resume:
        say_not_used(context, (*TRAIN, "threads"))
    raise typer.Exit(_train(values, typed))


def _train(values: dict[str, Any], typed: set[str]) -> int:
    """Open, train, write, print; returns the exit code."""
    import torch

    from cryosuite.data.workdir import RunDir
    from cryosuite.methods.kraqen_options import KraqenOptions, preset
    from cryosuite.methods.kraqen_run import open_for, prepare, train
    from cryosuite.ranks import process_count
    from cryosuite.training.launch import process_rank, resolve_accelerator, was_restarted
    from cryosuite.training.options import TrainOptions
    from cryosuite.training.runs import begin_run, make_config, particles_path, start_run, train_options

    run, resume = RunDir(values["outdir"]), values["resume"]
    if values["threads"] > 0:
        torch.set_num_threads(values["threads"])
    how = {key: values[key] for key in WAYS_IN} | {"sign": -1 if values["invert_data"] else None}
    particles = None if resume else open_for(values["particles"], how)
    box = 0 if particles is None else particles.box_size
    gpu = resolve_accelerator(values["accelerator"]) == "cuda"
    changes = {RENAMED.get(name, name): values[name] for name in METHOD}
    name, chosen = preset(values["preset"], box, gpu, **changes)
    given = {to: values[key] for key, to in TRAIN.items() if values[key] is not None}
    merged = chosen.training | given
    merged.setdefault("save_every", merged["epochs"])
    training = TrainOptions(**merged)
    _say_what_counts_nothing(chosen.options, typed, resume)
    # before the folder is touched; a run that is there already is refused by start_run: without waiting for this, where
    # no other process has to be told
    several = process_count() > 1 and not was_restarted()
    fresh = particles is not None and (values["overwrite"] or not run.exists() or several)
    engine = prepare(particles, chosen.options, training) if fresh else None
    config = make_config("kraqen", values["particles"], run, chosen.options, training, preset=name, **how)
    how_begun = {"resume": resume, "overwrite": values["overwrite"]}
    begin = partial(start_run, run, config, **how_begun)
    if engine is None:
        config = begin_run(run, config, training, **how_begun)
    else:
        config = engine.processes.first_does(begin) if several else begin()
    if particles is None:
        particles = open_for(particles_path(config, run), config)
    again = {to: values[key] for key, to in TRAIN.items() if key in typed} if resume else {}
    options = KraqenOptions.from_dict(config["options"])
    if resume and options.field == "voxel" and typed & {*OF_NETWORKS}:
        say_without_effect({name: "with --field voxel" for name in OF_NETWORKS if name in typed})
    result = train(particles, run, options, train_options(config, **again), resume, engine)
    if process_rank() == 0:
        _report(run, values["particles"], result)
    return result.exit_code


def _say_what_counts_nothing(options: Any, typed: set[str], resume: bool) -> None:
    """A notice for options that were typed and change nothing."""
    from cryosuite.errors import InputError

    if "n_codes" in typed and options.n_codes < 1:
        raise InputError(f"--n-codes {options.n_codes}: expected at least 1")
    if "n_states" in typed and options.n_states < 1:
        raise InputError(f"--n-states {options.n_states}: expected at least 1")
    if resume:
        return
    idle = options.without_effect([RENAMED.get(name, name) for name in METHOD if name in typed])
    if options.field == "voxel":
        idle |= {name: "with --field voxel" for name in OF_NETWORKS if name in typed}
    say_without_effect(idle, RENAMED)


def _report(run: Any, particles: Path, result: Any) -> None:
    """The occupancy table, warnings and what to do next."""
    import math

    from cryosuite.console import say, table
    from cryosuite.errors import notice

    if result.stopped:
        again = f"cryosuite train-kraqen {typed(particles)} -o {typed(run.path)} --resume"
        say(f"stopped by {result.stopped}; go on with: {again}")
        return
    rows = [
        [code.number, f"{code.particles:.1f}", code.labelled, f"{100 * code.share:.1f} %",
         "-" if math.isnan(code.resolution) else f"{code.resolution:.1f}", run.volume(code.number)]
        for code in result.codes
    ]  # fmt: skip
    columns = ["code", "particles (shares)", "particles (labels)", "share", "A at FSC .143", "map"]
    if len(rows) > 60:
        rows = [*rows[:30], ["..."] * len(columns), *rows[-30:]]
    twins = f", {result.merged} twins merged" if result.merged else ""
    # images chose their codes by maps of the other half set, which makes the two a little alike
    apart = "resolution of their half maps, a little flattered (polish --half-sets keeps the halves apart)"
    table(f"{len(result.codes)} codes{twins}; {apart}", columns, rows)
    if result.warning:
        notice(result.warning)
    say(f"shares {run.shares(result.epoch)}, labels {run.labels(result.epoch)}, latents {run.z(result.epoch)}")
    say(f"next: cryosuite polish {typed(run.path)}    and: cryosuite analyze {typed(run.path)}")
