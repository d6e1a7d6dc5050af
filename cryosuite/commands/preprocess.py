"""``cryosuite preprocess``: any particle set -> a work folder that all other commands take."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from cryosuite.commands import options as opt

if TYPE_CHECKING:
    from cryosuite.data.workdir import WorkDir

CONTRAST = "Contrast"


def main(
    particles: opt.ParticlesArgument,
    outdir: opt.Outdir,
    box_size: Annotated[
        Optional[int],  # noqa: UP045  typer on Python 3.10 evaluates this
        typer.Option("-D", "--box", help="Box size to crop to, in pixels (even). Default: keep the images' box."),
    ] = None,
    particle_diameter: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--particle-diameter",
            help="Diameter of the particle in Angstrom; all outside is background. Default: 75 % of the box.",
        ),
    ] = None,
    float16: Annotated[
        bool, typer.Option("--float16", help="Write half-precision images: half the disk space, three digits.")
    ] = False,
    ind: opt.Ind = None,
    overwrite: opt.Overwrite = False,
    threads: opt.Threads = 0,
    poses: opt.Poses = None,
    ctf: opt.Ctf = None,
    datadir: opt.Datadir = None,
    passthrough: opt.Passthrough = None,
    apix: opt.Apix = None,
    kv: opt.Voltage = None,
    cs: opt.SphericalAberration = None,
    amplitude_contrast: opt.AmplitudeContrast = None,
    invert: Annotated[
        bool, typer.Option("--invert", help="Particles are dark in the images.", rich_help_panel=CONTRAST)
    ] = False,
    uninvert: Annotated[
        bool, typer.Option("--uninvert", help="Particles are white in the images.", rich_help_panel=CONTRAST)
    ] = False,
) -> None:
    """Prepare particle images: crop them in Fourier space, normalise the background, measure the noise.

    Writes a work folder: particles.mrcs, particles.star, poses.pkl, ctf.pkl,
    noise.pkl and dataset.yaml. Outside the particle the images then have
    mean 0 and standard deviation 1, and particles are white. Whether they
    were white or dark is taken from the .cs file or found from the images
    themselves; a note says which.

    From RELION, cropped to 128 pixels:

        cryosuite preprocess run_data.star --datadir /data -D 128 -o work

    From cryoSPARC:

        cryosuite preprocess J42.cs --passthrough J42_pass.cs -D 128 -o work

    From cryoDRGN:

        cryosuite preprocess p.mrcs --poses poses.pkl --ctf ctf.pkl -o work

    Started several times by srun or torchrun, the processes share the images.
    """
    from cryosuite import console
    from cryosuite.data.open import open_particles
    from cryosuite.data.preprocess import PreprocessOptions, preprocess
    from cryosuite.data.processes import ALONE
    from cryosuite.data.workdir import WorkDir
    from cryosuite.errors import InputError
    from cryosuite.ranks import process_count

    if invert and uninvert:
        raise InputError("give either --invert or --uninvert, not both")
    if WorkDir(outdir).exists() and not overwrite:
        raise InputError(
            f"{outdir}: holds a particle set already. Add --overwrite to replace it, or choose another -o."
        )
    _require_free_names(WorkDir(outdir), overwrite)
    processes = ALONE
    if process_count() > 1:
        from cryosuite.training.launch import join_processes

        processes = join_processes()
    began = time.monotonic()
    found = open_particles(
        particles,
        poses=poses,
        ctf=ctf,
        ind=ind,
        datadir=datadir,
        pixel_size=apix,
        need_poses=False,
        need_ctf=False,
        passthrough=passthrough or (),
        sign=-1 if invert else 1 if uninvert else None,
        voltage_kv=kv,
        cs_mm=cs,
        amplitude_contrast=amplitude_contrast,
        mixed_boxes=True,
        keep_tables=True,
    )
    options = PreprocessOptions(box_size, particle_diameter, "float16" if float16 else "float32", threads)
    done = preprocess(found, Path(outdir), options, shlex.join(["cryosuite", *sys.argv[1:]]), processes)
    if done is None:
        return
    dataset = done.work.read_dataset()
    absent = [name for name, value in (("orientations", found.rotation), ("CTF", found.ctf)) if value is None]
    console.table(
        "preprocess",
        ("what", "value"),
        [
            ("particles", f"{done.written}" + (f" ({len(done.excluded)} left out)" if len(done.excluded) else "")),
            ("box", f"{dataset['original_box_size']} -> {dataset['box_size']} pixels"),
            ("pixel size", f"{dataset['original_pixel_size']:.5g} -> {dataset['pixel_size']:.5g} A"),
            ("particles were", f"{'white' if done.sign > 0 else 'dark'} ({_who(done.sign_from)})"),
            ("missing", ", ".join(absent) or "nothing"),
            ("time", f"{console.duration(time.monotonic() - began)}"),
            ("written to", str(outdir)),
        ],
    )


def _require_free_names(work: WorkDir, overwrite: bool) -> None:
    """InputError when the folder holds files of our names that are somebody's own, such as RELION's particles.star."""
    from cryosuite.data.preprocess import outputs
    from cryosuite.errors import InputError

    found = [path.name for path in outputs(work) if path.exists()]
    if found and not work.exists() and not overwrite:
        raise InputError(
            f"{work.path}: holds {', '.join(found)}, but no finished particle set: they would be replaced. Choose "
            "another -o (a new folder), or add --overwrite."
        )


def _who(sign_from: str) -> str:
    """Who says whether particles are white, in words."""
    words = {"data": "found from the images", "option": "you said so", "assumed": "assumed"}
    return words.get(sign_from, f"says {sign_from}")
