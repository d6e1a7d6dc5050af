"""A path through latent space on disk: volumes, pictures, tables, plots, ChimeraX scripts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np

from cryosuite import __version__
from cryosuite.analysis import chimerax, plots, sheets
from cryosuite.analysis.latents import Pca, nearest, pca
from cryosuite.analysis.movie import frame_count, path_frames, write_movies
from cryosuite.analysis.trajectory import LatentPath
from cryosuite.analysis.volumes import (
    Decode,
    VolumeFile,
    VolumeOptions,
    check_options,
    draw_volumes,
    write_volumes,
)
from cryosuite.console import Progress
from cryosuite.data.claim import claim, finished
from cryosuite.data.latents import fingerprint
from cryosuite.data.workdir import VolumeDir
from cryosuite.errors import InputError
from cryosuite.formats.config import write_yaml

UMAP_NAMES = ("UMAP 1", "UMAP 2")
SHOWN_COMPONENTS = 8


def write_path(
    folder: VolumeDir,
    path: LatentPath,
    decode: Decode,
    pixel_size: float,
    box_size: int,
    options: VolumeOptions,
    texts: Sequence[str],
    script: str = "trajectory.cxc",
    pixels: int = 320,
    progress: Progress | None = None,
) -> list[VolumeFile]:
    """Decode a path and write vol_000.mrc, ... with pictures, one sheet of all, and scripts; all shown at one level.

    Args:
        texts: under each volume on the sheet. script: name of the one that plays the volumes; morph.cxc blends them.
        pixels: side of the pictures. progress: advanced twice per volume.

    Returns:
        The volumes, all with their median level.
    """
    count = len(path.z)
    colours = loop_colours(count) if path.loop else plots.path_colours(count)
    files = write_volumes(path.z, decode, folder, pixel_size, options, colours, box_size, progress)
    level = float(np.median([file.level for file in files]))
    files = [replace(file, level=level) for file in files]
    pictures = draw_volumes(files, folder, pixels, progress)
    heads = [str(file.number) for file in files]
    sheets.contact_sheet(folder.plot("volumes"), pictures, colours, heads, texts, sheets.walk_columns(count))
    chimerax.series_script(folder.path / script, files, path.title, path.loop)
    chimerax.morph_script(folder.morph, files, path.title, path.loop)
    return files


def loop_colours(count: int) -> list[str]:
    """Colours along a path that comes back: there and back again through the colours of an open one."""
    there = plots.path_colours(count // 2 + 1)
    return [*there, *there[-1 - (count + 1) % 2 : 0 : -1]][:count]


def path_table(path: LatentPath, files: Sequence[VolumeFile], model: Pca, rows: np.ndarray) -> dict[str, Sequence]:
    """Columns of the table of a path: volume, distance, the nearest particle, principal components.

    Args:
        model: principal components of the latents of ``rows`` (M,), rows of the run's particle set.
    """
    scores = (path.z - model.mean) @ model.components.T
    anchors = set(path.anchors.tolist())
    columns: dict[str, Sequence] = {
        "number": [file.number for file in files],
        "volume": [file.path.name for file in files],
        "distance": path.at,
        "asked_for": [int(i in anchors) for i in range(len(path.z))],
        "nearest_row_from_0": rows[nearest(model.scores, scores[:, : model.scores.shape[1]])],
        "level": [file.level for file in files],
        "colour": [file.colour for file in files],
    }
    return columns | {f"pc{i + 1}": scores[:, i] for i in range(min(scores.shape[1], SHOWN_COMPONENTS))}


def plot_path(
    folder: VolumeDir, path: LatentPath, model: Pca, umap: np.ndarray | None, first: int, title: str
) -> None:  # fmt: skip
    """Draw a path over the particles: pca_traversal.png, and umap_traversal.png by the particles nearest to it.

    Args:
        umap: (M, 2) of the rows of ``model``, or None. first: number of the first volume.
    """
    scores = (path.z - model.mean) @ model.components.T
    title = textwrap.fill(title, 56)
    if model.scores.shape[1] > 1:
        xy = model.scores[:, :2]
        plots.traversal(folder.plot("pca_traversal"), xy, scores[:, :2], ("PC1", "PC2"), title, first)
    if umap is not None:
        places = umap[nearest(model.scores, scores)]
        plots.traversal(
            folder.plot("umap_traversal"), umap, places, UMAP_NAMES, f"{title}\nby the nearest particles", first
        )  # fmt: skip


def make_trajectory(
    folder: VolumeDir,
    path: LatentPath,
    z: np.ndarray,  # (N, zdim)
    decode: Decode | None,
    pixel_size: float,
    box_size: int,
    options: VolumeOptions,
    *,
    umap: np.ndarray | None = None,
    film: bool = True,
    pixels: int = 320,
) -> list[VolumeFile]:
    """Write a trajectory: volumes along a path, their pictures and table, scripts, plots over all particles, films.

    Args:
        umap: (N, 2) of all particles, NaN where left out. film: also movie.gif and, with ffmpeg, movie.mp4.

    Raises:
        InputError: a run that makes no volumes; options that cannot be met; a folder that cannot be written.
    """
    if decode is None:
        raise InputError("this run makes no volumes of latents, so there is nothing to walk through.")
    check_options(options, box_size)
    rows = np.flatnonzero(np.isfinite(z).all(axis=1))
    model = pca(z[rows])
    count, table = len(path.z), folder.path / "trajectory.csv"
    names = ("movie.gif", "movie.mp4", "pca_traversal.png", "umap_traversal.png", "particles.csv")
    claim(folder.path, folder.summary, [*folder.names(), table.name, *names, "vol_[0-9]*.mrc"])
    for old in (folder.summary, table, *(folder.path / name for name in names)):  # of an earlier path in this folder
        old.unlink(missing_ok=True)
    frames = frame_count(count, loop=path.loop) if film and count > 1 else 0
    texts = [f"{at:.3g}" for at in path.at]
    with Progress(2 * count + frames, "trajectory", unit="steps") as progress:
        files = write_path(folder, path, decode, pixel_size, box_size, options, texts, pixels=pixels, progress=progress)
        columns = path_table(path, files, model, rows)
        plots.write_csv(table, columns)
        plot_path(folder, path, model, None if umap is None else umap[rows], options.start_index, path.title)
        if frames:
            drawn = path_frames(files, loop=path.loop, progress=progress)
            write_movies(folder.path / "movie.gif", folder.path / "movie.mp4", drawn, to_and_fro=not path.loop)
    if len(path.through):
        plots.write_csv(folder.path / "particles.csv", {"row_from_0": path.through})
    write_yaml(folder.summary, {
        "kind": "trajectory", "version": __version__, "path": path.title, "how": path.how, "loop": path.loop,
        "counting": "volumes and rows count from 0; principal components from 1", "n_particles": len(z),
        "latents": fingerprint(z), "volumes": asdict(options),
    })  # fmt: skip
    finished(folder.path)
    return files
