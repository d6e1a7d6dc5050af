"""``cryosuite train-kraqen``: a mixture sorted into codes, each with its own map; no encoder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import typer

from cryosuite.commands import training_options as shared
from cryosuite.commands.options import Apix, Ctf, Datadir, Ind, Poses, Threads, say_not_used, say_without_effect
from cryosuite.commands.training_options import ENGINE, MACHINE, option, typed_again, typed_values
from cryosuite.data.typed import typed

CODES, ASSIGN, VOXEL, NETWORK, NETWORK_TRAINING = (
    "Codes", "Assignment of particles to codes", "Voxel field", "Network fields (triplane, fourier)",
    "Training of a network field",
)  # fmt: skip

RENAMED = {"march": "march_from"}
METHOD = (
    "field", "n_codes", "n_states", "assign", "kernel", "t_max", "t_min", "anneal", "balance", "split", "merge",
    "m_step", "refine_shifts", "iterations", "prior", "cluster_box", "march", "march_over", "rank", "channels",
    "plane_size", "levels", "features", "feat_sigma", "width", "layers", "init", "loss", "blend", "em_last", "beta",
    "margin", "alignment", "jitter", "straight_through", "fast", "em_finish",
)  # fmt: skip
TRAIN = ENGINE | {"num_epochs": "epochs", "precision": "precision"}
# what the voxel field has no use for: it takes all images in every round, and saves after it
OF_NETWORKS = ("num_epochs", "batch_size", "lr", "checkpoint_minutes", "precision")
WAYS_IN = ("poses", "ctf", "ind", "datadir", "pixel_size")


def main(
    context: typer.Context,
    particles: shared.Particles,
    outdir: shared.RunFolder,
    preset: str = typer.Option(
        "auto",
        help="compositional: mixtures of different molecules (voxel maps; auto). conformational: molecules that bend "
        "(a network). paper: as published (CryoKRAQEN), for a GPU.",
    ),
    resume: shared.Resume = False,
    overwrite: shared.Replace = False,
    poses: Poses = None,
    ctf: Ctf = None,
    ind: Ind = None,
    datadir: Datadir = None,
    pixel_size: Apix = None,
    invert_data: shared.InvertData = False,
    n_states: int = option(
        None,
        help="How many different molecules you expect: the search begins with 1.5 x as many codes, and joining them "
        "stops at this number.",
        panel=CODES,
    ),
    n_codes: int = option(None, "-k", "--n-codes", help="Number of codes; nothing: 32.", panel=CODES),
    split: bool = option(None, "--split/--no-split", help="Split the busiest code into unused ones.", panel=CODES),
    refine_shifts: bool = option(
        None,
        "--refine-shifts/--no-refine-shifts",
        help="Refine shifts that turn out to be wrong by more than a tenth of a pixel (usual, not with --preset paper; "
        "network fields ask one map of all particles only, which must show a quarter).",
        panel=CODES,
    ),
    merge: str = option(
        None,
        help="Joining of codes that show one state. overlap (usual): codes that share their images when all choose "
        "less sharply, but never to fewer than --n-states. likelihood: asked of images that had no part in the maps. "
        "correlation: half-map corrected, above .97. none: never.",
        panel=CODES,
    ),
    field: str = option(
        None,
        help="Form of the maps. voxel: solved directly. triplane (as published) or fourier: a network.",
        panel=CODES,
    ),
    assign: str = option(
        None, help="How particles are compared: likelihood, zcos (scale-free) or kernel (as published).", panel=ASSIGN
    ),
    kernel: str = option(None, help="Kernel of --assign kernel: epanechnikov, gaussian or none.", panel=ASSIGN),
    t_max: float = option(
        None, help="First temperature; 1 is the one that the noise asks for, more blurs.", panel=ASSIGN
    ),
    t_min: float = option(None, help="Last temperature of the assignment.", panel=ASSIGN),
    anneal: str = option(None, help="How the temperature falls: geometric or paper.", panel=ASSIGN),
    balance: float = option(None, help="How much busy codes are held back at first; 0: not.", panel=ASSIGN),
    iterations: int = option(None, "-i", "--iterations", help="Rounds of sorting and map making.", panel=VOXEL),
    m_step: str = option(
        None,
        "--m-step",
        help="How maps are made in between. local (usual): two half maps per code, cleaned as polish does; images are "
        "judged by the maps of the other half. wiener: one map of all images; quicker, needs 500 images per state.",
        panel=VOXEL,
    ),
    prior: float = option(None, help="Strength of the Wiener filter of --m-step wiener.", panel=VOXEL),
    cluster_box: int = option(
        None,
        help="Box in pixels in which codes are told apart; nothing: at most 32, then 64. Maps have the full box.",
        panel=VOXEL,
    ),  # fmt: skip
    march: float = option(
        None, help="Begin with this part of the Fourier disc and let it grow; 1: all from the start.", panel=VOXEL
    ),
    march_over: float = option(None, help="Fraction of the run in which that part of the disc grows.", panel=VOXEL),
    rank: int = option(
        None, help="Basis volumes that codes mix; nothing: as many as codes, at most 64.", panel=NETWORK
    ),
    channels: int = option(None, help="Channels of each plane of the tri-plane.", panel=NETWORK),
    plane_size: int = option(None, help="Side of the planes in pixels; nothing: the box + 1.", panel=NETWORK),
    levels: int = option(None, help="Sizes of planes. 1: one. 2: a quarter of it too.", panel=NETWORK),
    features: int = option(None, help="Random Fourier features beside the planes.", panel=NETWORK),
    feat_sigma: float = option(None, help="Spread of the random features, in box sizes.", panel=NETWORK),
    width: int = option(None, help="Neurons in each layer of the network.", panel=NETWORK),
    layers: int = option(None, help="Hidden layers of the network.", panel=NETWORK),
    init: str = option(None, help="Codes to start from: random, or kmeans of the particles' own codes.", panel=NETWORK),
    loss: str = option(None, help="Loss of the images: l2, l1 (as published) or huber.", panel=NETWORK),
    blend: str = option(
        None,
        help="What is compared with an image: blended codes (as published) or each code by itself (em).",
        panel=NETWORK,
    ),
    em_last: float = option(None, help="Last fraction of the training in which --blend em holds.", panel=NETWORK),
    beta: float = option(None, help="Weight of the triplet loss (paper: .05); 0: none.", panel=NETWORK),
    margin: float = option(
        None, help="Margin of the triplet loss, in mean squared distances of the codes.", panel=NETWORK
    ),
    alignment: float = option(None, help="Weight of the triplet loss's alignment term.", panel=NETWORK),
    jitter: float = option(None, help="Noise on the codes, falling to none.", panel=NETWORK),
    straight_through: bool = option(
        None, "--straight-through/--no-straight-through", help="Let gradients reach the assignment.", panel=NETWORK
    ),
    fast: float = option(None, help="Learning rate of planes and codes, times the network's.", panel=NETWORK),
    em_finish: int = option(None, help="Rounds of direct map making after the network.", panel=NETWORK),
    num_epochs: int = option(
        None, "-n", "--num-epochs", help="Epochs: how often all images are seen.", panel=NETWORK_TRAINING
    ),
    batch_size: int = option(
        None, "-b", "--batch-size", help="Images per step, over all GPUs.", panel=NETWORK_TRAINING
    ),
    lr: float = option(None, help="Learning rate of the network.", panel=NETWORK_TRAINING),
    max_minutes: shared.MaxMinutes = None,
    checkpoint_minutes: float = option(
        10.0, help="Minutes between two saves of what --resume needs.", panel=NETWORK_TRAINING
    ),
    precision: str = option(None, help="32 or bf16 of the network; nothing: bf16 on a GPU.", panel=MACHINE),
    accelerator: shared.Accelerator = "auto",
    devices: shared.Devices = 1,
    num_nodes: shared.NumNodes = 1,
    requeue: shared.Requeue = False,
    threads: Threads = 0,
    seed: shared.Seed = 0,
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
    values, typed = typed_values(context)
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
    from cryosuite.training.runs import begin_run, go_on_with, make_config, particles_path, start_run

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
    again = typed_again(values, typed, TRAIN)
    options = KraqenOptions.from_dict(config["options"])
    if resume and options.field == "voxel" and typed & {*OF_NETWORKS}:
        say_without_effect({name: "with --field voxel" for name in OF_NETWORKS if name in typed})
    result = train(particles, run, options, go_on_with(run, config, **again), resume, engine)
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
