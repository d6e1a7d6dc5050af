"""``cryosuite fastar-infer``: poses of a particle set in one pass of a trained network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cryosuite.commands.options import (
    INPUT,
    AmplitudeContrast,
    Apix,
    Ctf,
    Datadir,
    Ind,
    Outdir,
    Overwrite,
    ParticlesArgument,
    Passthrough,
    SphericalAberration,
    Threads,
    Voltage,
    check_seed,
)
from cryosuite.data.typed import typed

if TYPE_CHECKING:
    from cryosuite.data.particles import ParticleSet

NETWORK, REFERENCE, POSES, BLIND, MACHINE = (
    "Network", "What the particles are", "Poses and map", "Without a reference", "Machine",
)  # fmt: skip


def _option(default: Any, *names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(default, *names, help=help, rich_help_panel=panel, show_default=default is not None, **more)


def main(
    particles: ParticlesArgument,
    outdir: Outdir,
    overwrite: Overwrite = False,
    map_: Path = _option(
        None, "--map", help="A map of the molecule (.mrc), of any box and pixel size.", panel=REFERENCE
    ),
    model: Path = _option(
        None, "--model", help="An atomic model of the molecule (.pdb, .cif), in place of --map.", panel=REFERENCE
    ),
    low_pass: float = _option(
        20.0, "--low-pass", help="Resolution in Angstrom that the map is low-passed to; 0: not at all.", panel=REFERENCE
    ),
    weights: Path = _option(
        None, help="Weights of train-fastar (file or run), or the released CryoFastAR checkpoint.", panel=NETWORK
    ),
    preset: str = _option(
        None, help="Name of a network that comes with cryosuite: micro. In place of --weights.", panel=NETWORK
    ),
    templates: int = _option(12, help="Views of the map that the network is shown.", panel=NETWORK),
    turns: int = _option(
        4, help="Look at each image in 1, 2 or 4 quarter turns: fewer poses go wrong, at little cost.", panel=NETWORK
    ),
    refine: int = _option(2, help="Rounds of local search after the prediction; 0: none.", panel=POSES),
    cone: float = _option(20.0, help="Degrees around each prediction that the first round searches.", panel=POSES),
    rescue: float = _option(
        0.4,
        help="Particles of which the network is less sure than this (0 to 1) are first searched for over all "
        "orientations; 0: none, 1: all.",
        panel=POSES,
    ),
    reject: float = _option(
        0.1, help="Share of the particles, the least certain of each view, left out of the map.", panel=POSES
    ),
    no_ctf: bool = _option(False, "--no-ctf", help="The map needs no CTF correction.", panel=POSES),
    truth: Path = _option(None, help="True poses (poses.pkl): print the errors.", panel=POSES),
    mode: str = _option(
        "auto", help="target: against the map. ab-initio: against each other. search: no network first.", panel=BLIND
    ),
    experimental: bool = _option(
        False, "--experimental", help="Allow ab-initio poses by a network (not proven).", panel=BLIND
    ),
    views: int = _option(128, help="Images the network sees at a time.", panel=BLIND),
    anchors: int = _option(8, help="Particles that all such sets share.", panel=BLIND),
    ref_candidates: int = _option(16, help="Images tried as reference.", panel=BLIND),
    references: int = _option(1, help="References whose predictions are combined.", panel=BLIND),
    ind: Ind = None,
    ctf: Ctf = None,
    datadir: Datadir = None,
    passthrough: Passthrough = None,
    apix: Apix = None,
    voltage: Voltage = None,
    cs: SphericalAberration = None,
    amplitude_contrast: AmplitudeContrast = None,
    invert_data: bool = typer.Option(
        False, "--invert-data", help="Particles are dark in the images.", rich_help_panel=INPUT
    ),
    batch_size: int = _option(256, "-b", "--batch-size", help="Images computed at a time.", panel=MACHINE),
    precision: str = _option(
        "auto", help="Precision of numbers: bf16, 32, or auto (what the machine is fast at).", panel=MACHINE
    ),
    accelerator: str = _option("auto", help="Where to compute: cpu, gpu, or auto.", panel=MACHINE),
    seed: int = _option(
        0, help="Random seed: the same seed gives the same result.", panel=MACHINE, callback=check_seed
    ),
    threads: Threads = 0,
) -> None:
    """Poses of particles, in one pass of a network that was trained before.

    With a map or a model of the molecule every image is compared with views of
    it, and the poses are absolute. Two rounds of local search make them
    precise; each half set is matched to its own half map only. Without a map,
    poses are searched for from nothing, and a network helps.

    Writes poses.pkl, poses.star (for RELION), confidence.npy, map.mrc, the
    half maps, fsc.csv and timing.json. Goes on with deco-classify --poses
    out/poses.pkl, train-hype out/poses.star or train-kraqen.

        cryosuite fastar-infer particles.star -o out --map ref.mrc

        cryosuite fastar-infer work/ -o out --model 6vxx.cif --refine 3
    """
    import torch

    from cryosuite.methods.fastar_run_infer import Request, run
    from cryosuite.training.launch import join_processes

    if threads > 0:
        torch.set_num_threads(threads)
    _check(map_, model, mode, experimental, batch_size, precision, templates, turns, low_pass)
    processes = join_processes()
    found = _open(
        particles, ind=ind, ctf=ctf, datadir=datadir, passthrough=tuple(passthrough or ()), pixel_size=apix,
        voltage_kv=voltage, cs_mm=cs, amplitude_contrast=amplitude_contrast, sign=-1 if invert_data else None,
    )  # fmt: skip
    request = Request(
        outdir=outdir, overwrite=overwrite, map=map_, model=model, low_pass=low_pass, weights=weights, preset=preset,
        templates=templates, turns=turns, mode=mode, experimental=experimental, truth=truth, precision=precision,
        accelerator=accelerator,
        options={"refine": refine, "cone": cone, "rescue": rescue, "reject": reject, "use_ctf": not no_ctf,
                 "batch": batch_size, "seed": seed},
        star={"views": views, "anchors": anchors, "candidates": ref_candidates, "references": references, "seed": seed},
    )  # fmt: skip
    done = run(found, request, processes)
    if done is not None:
        _report(done, outdir, particles)


def _check(
    map_: Path | None, model: Path | None, mode: str, experimental: bool, batch: int, precision: str, templates: int,
    turns: int, low_pass: float,
) -> None:  # fmt: skip
    """InputError for options that contradict each other."""
    from cryosuite.errors import InputError

    if map_ is not None and model is not None:
        raise InputError("give either --map or --model, not both")
    if mode not in ("auto", "target", "ab-initio", "search"):
        raise InputError(f"--mode {mode}: expected auto, target, ab-initio or search")
    if mode == "target" and map_ is None and model is None:
        raise InputError("--mode target needs to know the molecule: give --map ref.mrc or --model x.cif")
    if mode == "ab-initio" and not experimental:
        raise InputError(
            "--mode ab-initio: poses by a network without a reference are not proven to work here. Add --experimental "
            "to try, or leave --mode out: poses are then searched for without a network"
        )
    if turns not in (1, 2, 4):
        raise InputError(f"--turns {turns}: expected 1, 2 or 4")
    if batch < 1 or templates < 4 or low_pass < 0 or precision not in ("auto", "bf16", "32"):
        raise InputError(
            f"--batch-size {batch}, --templates {templates}, --low-pass {low_pass:g}, --precision {precision}: "
            "expected 1 or more images, 4 or more templates, 0 or more Angstrom, and bf16, 32 or auto"
        )


def _open(path: Path, **how: Any) -> ParticleSet:
    """The particles; their poses are not asked for, nor a CTF."""
    from cryosuite.data.open import open_particles

    return open_particles(path, need_poses=False, need_ctf=False, keep_tables=True, **how)


def _report(result: dict[str, Any], outdir: Path, particles: Path) -> None:
    """Tables of what came out, and what to do next."""
    from cryosuite.console import say, table
    from cryosuite.data.results import PosesDir

    out = PosesDir(outdir)
    timing = result["timing"]
    rows = [
        ["particles", f"{result['particles']:,}, {result['left_out']:,} left out of the map"],
        ["mode", result["mode"] + (f", against {result['reference']}" if result.get("reference") else "")],
        ["network", result.get("network") or "none"],
        ["images per second, prediction", f"{timing['images_per_s_prediction']:,.0f}"],
        ["seconds in all", f"{timing['total']:.1f}"],
        ["poses", str(out.poses)],
    ]
    if result.get("map"):
        found = result["map"]
        rows += [
            ["map", str(out.map)],
            ["half maps, FSC 0.143 (masked)", f"{found.get('resolution_masked_0.143_A', float('nan')):.1f} A"],
        ]
        if found.get("reference_biased_to_A") is not None:
            limit = found["reference_biased_to_A"]
            rows.append(["FSC owes something to the reference", f"down to {limit:.1f} A" if limit else "everywhere"])
    rows.append(["hand", result["hand"]])
    table("poses", ["what", "value"], rows)
    if result.get("truth"):
        _print_truth(result["truth"])
    say(f"next: cryosuite train-hype {typed(out.star)} -o run")
    say(f"or:   cryosuite deco-classify {typed(particles)} --poses {typed(out.poses)} -o run")


def _print_truth(stages: dict[str, Any]) -> None:
    """Errors against the truth, each beside its level of chance."""
    from cryosuite.console import table

    names = {
        "median_deg": "median angle (deg)", "mean_deg": "mean angle (deg)", "p90_deg": "90 % below (deg)",
        "under_10_deg": "share under 10 deg", "direction_median_deg": "view direction, median (deg)",
        "in_plane_median_deg": "in the plane, median (deg)", "frobenius_mean": "mean |R - R'| (paper's measure)",
        "shift_median_px": "shift, median (px)",
    }  # fmt: skip
    for stage, report in stages.items():
        rows = [
            [title, *(f"{report[column][key]:.3g}" for column in ("raw", "chance_raw", "aligned", "chance_aligned"))]
            for key, title in names.items()
        ]
        hand = ", other hand" if report["mirrored"] else ""
        table(f"errors of the poses {stage}", ["", "as they are", "chance", f"aligned{hand}", "chance"], rows)
