"""A path through latent space on disk: volumes, pictures, tables, plots, ChimeraX scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cryosuite.analysis import chimerax, plots, sheets
from cryosuite.analysis.latents import Pca, nearest
from cryosuite.analysis.trajectory import LatentPath
from cryosuite.analysis.volumes import Decode, VolumeFile, VolumeOptions, draw_volumes, write_volumes
from cryosuite.console import Progress
from cryosuite.data.workdir import VolumeDir

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
    if model.scores.shape[1] > 1:
        xy = model.scores[:, :2]
        plots.traversal(folder.plot("pca_traversal"), xy, scores[:, :2], ("PC1", "PC2"), title, first)
    if umap is not None:
        places = umap[nearest(model.scores, scores)]
        plots.traversal(
            folder.plot("umap_traversal"), umap, places, UMAP_NAMES, f"Nearest particles: {title}", first
        )  # fmt: skip
