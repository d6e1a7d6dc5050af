"""The picture of a whole analysis: the map of its particles beside the volumes of their clusters, colours matching."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from cryosuite.analysis.plots import draw_numbers, draw_points, figure
from cryosuite.analysis.sheets import CAPTION, QUIET, crop_together, fill, grid_shape, percent


def overview(
    path: Path,
    xy: np.ndarray,  # (M, 2)
    labels: np.ndarray,  # (M,) int, -1: left out
    colours: Sequence[str],
    pictures: Sequence[np.ndarray],
    names: Sequence[str] = ("UMAP 1", "UMAP 2"),
) -> None:
    """The map of latents coloured by cluster, and the volume of every cluster in its colour: one PNG 1600 px wide."""
    shown = labels >= 0
    sizes = np.bincount(labels[shown], minlength=len(colours))
    width, height, text = 16.0, 7.4, 10.5 if len(pictures) <= 20 else 8.0
    _, columns, cell = grid_shape(len(pictures), 8.6, height - 0.1, CAPTION * text)
    cell = min(cell, 2.8)
    split = width - columns * cell - 0.3  # the map takes what the volumes leave
    with figure(path, width, height, dpi=100) as page:
        page.set_layout_engine("none")
        axes = page.add_axes((0.5 / width, 0.5 / height, (split - 0.9) / width, (height - 0.75) / height))
        draw_points(axes, xy[shown], np.array(list(colours))[labels[shown]], scale=1.5)
        draw_numbers(axes, xy[shown], labels[shown], colours, 10.5 if len(colours) <= 30 else 7.5)
        _corner_axes(axes, names)
        heads, texts = [str(i) for i in range(len(pictures))], percent(list(sizes))
        frame = (split, 0.0, width - split, height)
        fill(page, frame, columns, cell, crop_together(pictures), colours, heads, texts, text)


def _corner_axes(axes: Axes, names: Sequence[str]) -> None:
    """Two small arrows in the corner instead of a frame: the units of a UMAP mean nothing."""
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    arrow = {"arrowstyle": "-|>", "color": QUIET, "lw": 1.0, "shrinkA": 0}
    short = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    axes.annotate("", xy=(0, 0), xytext=(70, 0), arrowprops={**arrow, "arrowstyle": "<|-"}, **short)
    axes.annotate("", xy=(0, 0), xytext=(0, 70), arrowprops={**arrow, "arrowstyle": "<|-"}, **short)
    axes.annotate(names[0], xy=(0, 0), xytext=(34, -11), ha="center", va="center", fontsize=9.5, color=QUIET, **short)
    axes.annotate(
        names[1], xy=(0, 0), xytext=(-11, 34), ha="center", va="center", fontsize=9.5, color=QUIET, rotation=90, **short
    )
