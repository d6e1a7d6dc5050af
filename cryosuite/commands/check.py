"""``cryosuite check``: find out before a GPU hour is spent whether a particle set is what it should be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cryosuite.commands import options as opt

if TYPE_CHECKING:
    from cryosuite.data.particles import ParticleSet
    from cryosuite.reconstruct.inspect import Finding

INPUT, TESTS = opt.INPUT, "Tests"
PROBE_IMAGES = 16
STEPS = 2  # timed, after one to warm up


def _option(default: Any, *names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(default, *names, help=help, rich_help_panel=panel, show_default=default is not None, **more)


def main(
    particles: Path = typer.Argument(
        ..., help="Work folder of preprocess or simulate; or a .star, .cs or .mrcs file.", metavar="PARTICLES"
    ),
    poses: opt.Poses = None,
    ctf: opt.Ctf = None,
    ind: opt.Ind = None,
    datadir: opt.Datadir = None,
    passthrough: opt.Passthrough = None,
    apix: opt.Apix = None,
    kv: opt.Voltage = None,
    cs: opt.SphericalAberration = None,
    amplitude_contrast: opt.AmplitudeContrast = None,
    invert_data: bool = _option(
        False, "--invert-data", "--invert", help="Particles are dark in the images.", panel=INPUT
    ),
    no_ctf: bool = _option(False, "--no-ctf", help="The images need no CTF correction.", panel=INPUT),
    sample: int = _option(3000, "--sample", help="Particles used for the quick maps.", panel=TESTS),
    reference: Path = _option(
        None, "--reference", help="A map from the same refinement: tells whether the hand is the same.", panel=TESTS
    ),
    preset: str = _option("auto", "--preset", help="Preset of train-hype whose time is estimated.", panel=TESTS),
    no_probe: bool = _option(False, "--no-probe", help="Leave out the estimate of training time.", panel=TESTS),
    threads: opt.Threads = 0,
) -> None:
    """Check a particle set before training: files, poses, CTF, contrast, time.

    Quick maps from a few thousand particles tell whether poses, shifts and
    CTF are read the right way round. The hand cannot be told from
    projections: give a map of the same refinement with --reference. Exit
    code 0 when nothing failed (warnings allowed), 1 when a check failed, 2
    when the particles cannot be opened.

        cryosuite check work/

        cryosuite check particles.star --datadir /data/project

        cryosuite check J42.cs --passthrough J42_passthrough.cs

        cryosuite check work/ --reference refined.mrc
    """
    import warnings

    import torch

    from cryosuite.data.open import open_particles
    from cryosuite.errors import UserNotice
    from cryosuite.reconstruct.inspect import FAIL, WARN, Finding, optics_rows

    if threads > 0:
        torch.set_num_threads(threads)
    findings: list[Finding] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserNotice)
        found = open_particles(
            particles, poses=poses, ctf=ctf, ind=ind, datadir=datadir, pixel_size=apix, need_poses=False,
            need_ctf=False, passthrough=passthrough or (), sign=-1 if invert_data else None, voltage_kv=kv, cs_mm=cs,
            amplitude_contrast=amplitude_contrast,
        )  # fmt: skip
        if no_ctf:
            found.ctf = None
        findings += _collect(found, sample, reference)
    notices = {str(entry.message): None for entry in caught if issubclass(entry.category, UserNotice)}
    findings += [Finding(WARN, "files", text) for text in notices]
    if found.rotation is not None and not no_probe and not any(one.status == FAIL for one in findings):
        findings.append(_cost(found, preset))
    _print(findings, optics_rows(found), found)
    if any(one.status == FAIL for one in findings):
        raise typer.Exit(1)


def _collect(particles: ParticleSet, sample: int, reference: Path | None) -> list[Finding]:
    """All findings about a set that could be opened."""
    from cryosuite.console import say
    from cryosuite.errors import InputError
    from cryosuite.reconstruct import inspect
    from cryosuite.reconstruct.diagnose import try_alternatives

    if sample < 50:
        raise InputError(f"--sample {sample}: at least 50 particles are needed")
    findings = [*inspect.inspect_numbers(particles), *inspect.inspect_metadata(particles)]
    findings += inspect.inspect_images(particles)
    trials = None
    if particles.rotation is None:
        findings.append(
            inspect.Finding(
                inspect.FAIL, "poses", "none", "Training and maps need poses: refine first, or give --poses poses.pkl."
            )
        )
    else:
        say("quick maps under different readings of the poses")
        trials = try_alternatives(particles, sample)
        findings += inspect.inspect_conventions(particles, trials, sample)
        if not any(one.status == inspect.FAIL for one in findings):
            findings.append(inspect.inspect_shifts(particles, sample))
    if particles.ctf is None:
        findings.append(
            inspect.Finding(inspect.WARN, "CTF", "none", "Right only for images without or with corrected CTF.")
        )
    findings.append(inspect.inspect_contrast(particles, trials))
    if trials is not None:
        findings.append(_hand(trials[0].map, particles, reference))
    return findings


def _hand(volume: Any, particles: ParticleSet, reference: Path | None) -> Finding:
    """Same hand as the reference map, or a reminder that nobody can tell."""
    import torch

    from cryosuite.errors import InputError
    from cryosuite.formats.mrc import read_map
    from cryosuite.kernels.fourier import fourier_crop_volume
    from cryosuite.reconstruct.diagnose import compare_hands
    from cryosuite.reconstruct.inspect import FAIL, OK, WARN, Finding

    if reference is None:
        return Finding(OK, "hand", "cannot be told from projections", "Give --reference with a map of known hand.")
    found = read_map(reference)
    size, box = volume.shape[-1], found.data.shape[-1]
    wide = float(found.pixel_size or 0) * box
    if wide and abs(wide - float(particles.pixel_size[0]) * particles.box_size) > 0.02 * wide:
        raise InputError(f"{reference}: is {wide:.0f} A wide, the particles' box is not: give a map of the same box")
    if box < size or len(set(found.data.shape)) != 1:
        raise InputError(f"{reference}: a cubic map with a box of at least {size} is needed")
    same, mirrored = compare_hands(volume, fourier_crop_volume(torch.from_numpy(found.data), size))
    text = f"FSC with the reference {same:.2f}, mirrored {mirrored:.2f}"
    if max(same, mirrored) < 0.3:
        return Finding(WARN, "hand", text, "Neither agrees: is the reference from the same refinement, in one frame?")
    if mirrored > same + 0.05:
        return Finding(FAIL, "hand", text, "Opposite hand: use --flip for maps, or mirror the poses in the refinement.")
    return Finding(OK, "hand", text)


def _cost(particles: ParticleSet, name: str) -> Finding:
    """Time and memory of train-hype on this machine, from a few timed steps."""
    import time

    import torch

    from cryosuite.console import duration, say
    from cryosuite.data.loader import BatchLoader
    from cryosuite.errors import InputError
    from cryosuite.methods.hype import Hype
    from cryosuite.methods.hype_options import preset
    from cryosuite.reconstruct.inspect import OK, WARN, Finding
    from cryosuite.training.inference import autocast
    from cryosuite.training.method import Step

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    name, chosen = preset(name, gpu, particles.box_size)
    say("timing a few steps of train-hype")
    method = Hype(chosen.options)
    batch = PROBE_IMAGES if not gpu else int(chosen.training.get("batch_size", 64))
    try:
        model = method.build(particles).to(device)
        found = next(iter(BatchLoader(particles, min(batch, len(particles)), prefetch=0).epoch(0))).to(device)
        half = autocast(device, "auto")
        for step in range(STEPS + 1):
            if step == 1:
                began = time.perf_counter()
            with half:
                loss = method.loss(model, found, Step(99, 100))["loss"]
            loss.backward()
            if gpu:
                torch.cuda.synchronize()
    except InputError as error:
        return Finding(WARN, "training", str(error))
    except torch.OutOfMemoryError:
        advice = "Use a smaller -b (batch size), --low-memory, or preprocess to a smaller box."
        return Finding(WARN, "training", f"preset {name} with {batch} images per step does not fit this GPU", advice)
    rate = STEPS * len(found) / max(time.perf_counter() - began, 1e-9)
    epochs = int(chosen.training.get("epochs", 20))
    weights = sum(parameter.numel() for parameter in model.parameters())
    memory = torch.cuda.max_memory_allocated() if gpu else _peak_bytes()
    text = (
        f"preset {name}: about {rate:.0f} images/s on this {'GPU' if gpu else 'processor'}, "
        f"{duration(len(particles) * epochs / rate)} for {epochs} epochs; {weights / 1e6:.1f} M weights "
        f"({16 * weights / 2**30:.2f} GiB with optimiser), {memory / 2**30:.1f} GiB in this test of {len(found)} images"
    )
    long = len(particles) * epochs / rate > 86400
    advice = (
        "More than a day: use a GPU, --preset small, a smaller box (preprocess -D) or fewer epochs." if long else ""
    )
    return Finding(WARN if long else OK, "training", text, advice)


def _peak_bytes() -> int:
    """Peak memory of this process so far, bytes."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _print(findings: list[Finding], optics: list[list[str]], particles: ParticleSet) -> None:
    """The two tables and the verdict."""
    from cryosuite.console import say, table

    columns = ["optics group", "particles", "A per pixel", "kV", "Cs (mm)", "amplitude contrast", "defocus (um)"]
    if len(optics) > 30:
        optics = [*optics[:29], [f"... {len(optics)} in all", *["..."] * 6]]
    table(f"{particles.path}", columns, optics)
    mark = {"ok": "ok", "warn": "WARN", "fail": "FAIL"}
    order = {"fail": 0, "warn": 1, "ok": 2}
    findings = sorted(findings, key=lambda one: order[one.status])
    table(
        "checks", ["", "what", "found", "what to do"], [[mark[f.status], f.what, f.found, f.advice] for f in findings]
    )
    failed, warned = (sum(one.status == status for one in findings) for status in ("fail", "warn"))
    if failed:
        say(f"{failed} checks failed, {warned} warnings: put this right before training")
    elif warned:
        say(f"nothing failed, {warned} warnings: read them")
    else:
        say("all is well")
