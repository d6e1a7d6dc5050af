"""``cryosuite trajectory``: volumes and films along a path through the latents of a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from cryosuite.commands import volume_options as shared
from cryosuite.commands.options import check_seed
from cryosuite.commands.volume_options import PLACE, VOLUMES

if TYPE_CHECKING:
    import numpy as np

    from cryosuite.analysis.trajectory import LatentPath

WAY = "Which way"
HOW = ("graph", "direct")
NEIGHBOURS = 10
VOLUME_COUNT = 10


def main(
    run: shared.Run,
    start: Annotated[
        Optional[int],  # noqa: UP045  typer on Python 3.10 evaluates this
        typer.Option("--from", help="Particle to begin at: a row of the run, from 0.", rich_help_panel=WAY),
    ] = None,
    end: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--to", help="Particle to end at.", rich_help_panel=WAY),
    ] = None,
    through: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--through", help="Particles between, in order: --through 55,780.", metavar="<rows>", rich_help_panel=WAY
        ),
    ] = None,  # fmt: skip
    pc: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--pc", help="Walk along this principal component, from 1, instead.", rich_help_panel=WAY),
    ] = None,
    z_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--z", help="Text file of latents instead: each line a volume (no -n).", rich_help_panel=WAY),
    ] = None,
    how: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--how",
            help="graph (or nothing): from neighbour to neighbour, where particles are; direct: straight lines.",
            rich_help_panel=WAY,
        ),
    ] = None,  # fmt: skip
    loop: Annotated[bool, typer.Option("--loop", help="Come back to the beginning.", rich_help_panel=WAY)] = False,
    neighbours: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--neighbours",
            help="Neighbours of each particle that --how graph looks at; nothing: 10.",
            rich_help_panel=WAY,
        ),
    ] = None,
    count: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("-n", "--volumes", help="Volumes along the path; nothing: 10.", rich_help_panel=VOLUMES),
    ] = None,
    apix: shared.Apix = None,
    flip: shared.Flip = False,
    invert: shared.Invert = False,
    downsample: shared.Downsample = None,
    low_pass: shared.LowPass = None,
    vol_start_index: shared.VolStartIndex = 0,
    mass_kda: shared.MassKda = None,
    no_movie: Annotated[
        bool, typer.Option("--no-movie", help="Leave out movie.gif and movie.mp4.", rich_help_panel=PLACE)
    ] = False,
    epoch: shared.Epoch = None,
    outdir: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "-o", "--outdir", help="Folder; nothing: RUN/analyze.EPOCH/trajectories/NAME.", rich_help_panel=PLACE
        ),
    ] = None,  # fmt: skip
    datadir: shared.Datadir = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--seed",
            help="Random seed of the particles of a large graph; nothing: 0.",
            rich_help_panel=PLACE,
            callback=check_seed,
        ),
    ] = None,
) -> None:
    """Walk through the latents of a trained run: volumes, a film and ChimeraX scripts along a path.

    Between particles the path goes from neighbour to neighbour, so that
    every volume lies where particles are; --how direct takes the straight
    line. Rows of particles are in umap.csv and the report; all count from 0.
    Writes vol_000.mrc ..., movie.gif, trajectory.cxc (steps) and morph.cxc
    (blended) for ChimeraX, z_values.txt and trajectory.csv.

        cryosuite trajectory run/ --from 12 --to 900

        cryosuite trajectory run/ --from 12 --through 55,780 --to 900 -n 20

        cryosuite trajectory run/ --from 12 --through 900 --loop --how direct

        cryosuite trajectory run/ --pc 1 -n 15 --flip
    """
    from cryosuite.errors import InputError

    stops = _stops(start, end, through or [])
    if sum((bool(stops), pc is not None, z_file is not None)) != 1:
        raise InputError("say which way: --from ROW --to ROW, or --pc NUMBER, or --z FILE.")
    if how not in (None, *HOW):
        raise InputError(f"--how {how}: expected graph or direct.")
    if how is not None and not stops:
        raise InputError(f"--how {how}: is for a path between particles (--from, --to), not for --pc or --z.")
    for name, value in (("--neighbours", neighbours), ("--seed", seed)):
        if value is not None and (how == "direct" or not stops):
            raise InputError(f"{name} {value}: is only for the graph between particles (--from, --to, --how graph).")
    if count is not None and z_file is not None:
        raise InputError(f"-n {count}: each line of --z is one volume; leave -n out.")
    count = VOLUME_COUNT if count is None else count
    if count < 2:
        raise InputError(f"-n {count}: expected at least 2 volumes.")

    from cryosuite.analysis.path_files import make_trajectory
    from cryosuite.analysis.volumes import VolumeOptions
    from cryosuite.console import say, table
    from cryosuite.data.latents import read_umap
    from cryosuite.data.workdir import RunDir, VolumeDir
    from cryosuite.methods import load_run

    loaded = load_run(run, epoch, **({} if datadir is None else {"datadir": datadir}))
    analysis = RunDir(run).analysis(loaded.epoch)
    path = _path(
        loaded.z, stops, pc, z_file, how or HOW[0], loop, count, NEIGHBOURS if neighbours is None else neighbours,
        seed or 0,
    )  # fmt: skip
    folder = VolumeDir(outdir if outdir is not None else analysis.trajectories / _name(path, stops, pc, z_file))
    volumes = VolumeOptions(apix, flip, invert, downsample, low_pass, vol_start_index, mass_kda)
    say(f"epoch {loaded.epoch}: {len(path.z)} volumes {path.title} -> {folder.path}")
    files = make_trajectory(
        folder, path, loaded.z, loaded.decode, loaded.pixel_size, loaded.box_size, volumes,
        umap=read_umap(analysis, len(loaded.z), loaded.z), film=not no_movie,
    )  # fmt: skip
    rows: list[list[object]] = [[f"{len(files)} volumes, one level", folder.path]]
    rows += [[what, folder.path / name] for what, name in (
        ("all of them on one sheet", "volumes.png"), ("film", "movie.gif"), ("film", "movie.mp4"),
        ("the path over the particles", "pca_traversal.png"), ("the same on the UMAP", "umap_traversal.png"),
        ("for ChimeraX, step by step", "trajectory.cxc"), ("for ChimeraX, blended", "morph.cxc"),
        ("latents, distances, nearest particles", "trajectory.csv"),
    ) if (folder.path / name).is_file()]  # fmt: skip
    table(path.title, ["what", "where"], rows)


def _stops(start: int | None, end: int | None, through: list[str]) -> list[int]:
    """Rows to go to, in order."""
    from cryosuite.errors import InputError

    words = " ".join(through).replace(",", " ").split()
    wrong = [word for word in words if not word.lstrip("-").isdigit()]
    if wrong:
        raise InputError(f"--through {wrong[0]}: expected rows of particles, whole numbers from 0.")
    return [row for row in [start, *map(int, words), end] if row is not None]


def _path(
    z: np.ndarray, stops: list[int], pc: int | None, z_file: Path | None, how: str, loop: bool, count: int,
    neighbours: int, seed: int,
) -> LatentPath:  # fmt: skip
    """The path that was asked for."""
    from cryosuite.analysis import trajectory
    from cryosuite.analysis.latents import finite_rows, pca, traversal
    from cryosuite.errors import InputError

    usable = finite_rows(z)
    if stops:
        rows = trajectory.check_rows(stops, z, usable)
        if how == "direct":
            return trajectory.direct(z, rows, count, loop)
        if neighbours < 1:
            raise InputError(f"--neighbours {neighbours}: expected at least 1.")
        return trajectory.through_neighbours(z, rows, count, usable, loop, neighbours, seed)
    if z_file is not None:
        return trajectory.of_points(trajectory.read_points(z_file, z.shape[1]), f"of {z_file.name}", loop=loop)
    model = pca(z[usable])
    if not 1 <= pc <= len(model.components):
        raise InputError(f"--pc {pc}: the latents have the principal components 1 to {len(model.components)}.")
    if not model.spread:
        raise InputError("all latents are equal: there is nothing to walk along.")
    if loop:
        raise InputError("--loop: a walk along a principal component does not come back; give particles.")
    return trajectory.of_points(traversal(model, pc - 1, count), f"along principal component {pc}", "pc")


def _name(path: LatentPath, stops: list[int], pc: int | None, z_file: Path | None) -> str:
    """Name of the folder: what was asked for."""
    if stops:
        return "_".join([path.how, *map(str, stops[:8]), *(["loop"] if path.loop else [])])
    return f"pc{pc}" if pc is not None else "".join(c if c.isalnum() else "_" for c in z_file.stem)
