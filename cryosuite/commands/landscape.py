"""``cryosuite landscape``: states among the volumes of a trained run, and how many particles each has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from cryosuite.commands import volume_options as shared
from cryosuite.commands.options import check_seed
from cryosuite.commands.volume_options import PLACE, VOLUMES
from cryosuite.data.typed import typed


def main(
    run: shared.Run,
    count: Annotated[
        int, typer.Option("-N", "--sketch", help="Volumes that stand for all particles; each has to be decoded.")
    ] = 300,
    states: Annotated[int, typer.Option("-M", "--states", help="States to divide them into.")] = 10,
    linkage: Annotated[
        str,
        typer.Option("--linkage", help="How states are joined: ward (even sizes), average (cryoDRGN's) or complete."),
    ] = "ward",
    pc_dim: Annotated[int, typer.Option("--pc-dim", help="Components of the volumes that are compared.")] = 20,
    mask: Annotated[
        Optional[Path],  # noqa: UP045  typer on Python 3.10 evaluates this
        typer.Option("--mask", help="Map above 0.5 where volumes are compared; nothing: around what is dense."),
    ] = None,
    downsample: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "-d",
            "--downsample",
            help="Box size in pixels for the comparison; nothing: 64 at most.",
            rich_help_panel=VOLUMES,
        ),
    ] = None,  # fmt: skip
    apix: shared.Apix = None,
    flip: shared.Flip = False,
    invert: shared.Invert = False,
    low_pass: shared.LowPass = None,
    mass_kda: shared.MassKda = None,
    epoch: shared.Epoch = None,
    outdir: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("-o", "--outdir", help="Folder; nothing: RUN/analyze.EPOCH/landscape.", rich_help_panel=PLACE),
    ] = None,
    datadir: shared.Datadir = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            help="Random seed: the same seed gives the same result.",
            rich_help_panel=PLACE,
            callback=check_seed,
        ),
    ] = 0,
) -> None:
    """Find states among the volumes of a trained run, count their particles, and plot the landscape.

    Some hundred particles stand for all; their volumes are decoded, masked
    and compared (principal components of volumes), and joined to states.
    labels.pkl has the state of every particle, for select, export and
    polish; states.csv their numbers with 95 % intervals. States, volumes
    and rows count from 0.

        cryosuite landscape run/

        cryosuite landscape run/ -N 500 -M 8 --mask moving_part.mrc

        cryosuite export run/ --labels run/analyze.20/landscape/labels.pkl --cluster 3 -o state3.star
    """
    from cryosuite.analysis.landscape_files import LandscapeOptions, make_landscape
    from cryosuite.analysis.volumes import VolumeOptions
    from cryosuite.console import say
    from cryosuite.data.analysis_dir import LandscapeDir
    from cryosuite.data.latents import read_umap
    from cryosuite.data.workdir import RunDir
    from cryosuite.errors import InputError
    from cryosuite.methods import load_run

    for name, value in (("-N", count), ("-M", states), ("--pc-dim", pc_dim)):
        if value < 1:
            raise InputError(f"{name} {value}: expected at least 1.")
    loaded = load_run(run, epoch, **({} if datadir is None else {"datadir": datadir}))
    analysis = RunDir(run).analysis(loaded.epoch)
    out = LandscapeDir(outdir) if outdir is not None else analysis.landscape
    say(f"epoch {loaded.epoch}: {len(loaded.z):,} particles -> {out.path}")
    volumes = VolumeOptions(apix, flip, invert, None, low_pass, 0, mass_kda)
    options = LandscapeOptions(count, downsample, pc_dim, states, linkage, mask, seed, volumes)
    found = make_landscape(
        out, loaded.z, loaded.decode, loaded.pixel_size, loaded.box_size, options,
        particles=loaded.particles, umap=read_umap(analysis, len(loaded.z), loaded.z),
    )  # fmt: skip
    _report(found, out, run)


def _report(found: Any, out: Any, run: Path) -> None:
    """The states, and what to do next."""
    from cryosuite.console import say, table

    total = found.sizes.sum()
    rows = [
        [k, f"{size:,}", f"{low:,.0f} to {high:,.0f}", f"{100 * size / total:.1f} %", f"{out.states.volume(k).name}"]
        for k, (size, (low, high)) in enumerate(zip(found.sizes, found.intervals, strict=True))
    ]
    table(
        f"{len(rows)} states of {total:,} particles", ["state", "particles", "95 % interval", "share", "volume"], rows
    )
    say(f"look:  {out.plot('landscape_volume_pca')}, {out.plot('volumes')}, chimerax {out.overlay}")
    say(f"next:  cryosuite polish {typed(run)} --labels {typed(out.labels)} -o {typed(out.path / 'polish')}")
