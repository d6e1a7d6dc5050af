"""Montages: all volumes of a folder on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from cryosuite.analysis.palette import INK
from cryosuite.analysis.plots import figure
from cryosuite.analysis.render import on_white

QUIET = "#6b737c"


CAPTION = 2.9 / 72.0  # height of the two lines under a picture, inches per point of text


def grid_shape(count: int, width: float, height: float, caption: float = 0.0) -> tuple[int, int, float]:
    """Rows, columns and side of the largest equal squares, each over a ``caption``, that fit on a page."""

    def fit(columns: int) -> tuple[float, int, int]:
        rows = -(-count // columns)
        return round(min(width / columns, height / rows - caption), 3), -rows * columns, columns

    cell, _, columns = max(fit(columns) for columns in range(1, max(count, 1) + 1))
    return -(-count // columns), columns, cell


def crop_together(pictures: Sequence[np.ndarray], margin: float = 0.03) -> list[np.ndarray]:
    """Cut the same empty border off all pictures (h, h, 4), so that what is on them fills the sheet."""
    alpha = np.max([picture[..., 3] for picture in pictures], axis=0) > 8
    if not alpha.any():
        return list(pictures)
    size = alpha.shape[0]
    reach = np.abs(np.argwhere(alpha) - (size - 1) / 2).max() + margin * size
    cut = int(max(size / 2 - reach, 0))
    return [picture[cut : size - cut, cut : size - cut] for picture in pictures]


def _cell(axes: Axes, picture: np.ndarray, colour: str, head: str, text: str, size: float) -> None:
    axes.imshow(on_white(picture), interpolation="lanczos")
    axes.axis("off")
    below = {"xy": (0.5, 0.0), "xycoords": "axes fraction", "textcoords": "offset points", "va": "center"}
    wide = 0.32 * size * len(head)
    axes.annotate("●", xytext=(-wide, -0.62 * size), color=colour, ha="right", fontsize=1.15 * size, **below)
    axes.annotate(
        head, xytext=(0.42 * size - wide, -0.62 * size), color=INK, ha="left", fontsize=size, weight="bold", **below
    )
    axes.annotate(text, xytext=(0, -1.9 * size), color=QUIET, ha="center", fontsize=0.8 * size, **below)


def fill(page: Figure | SubFigure, frame: tuple[float, float, float, float], columns: int, cell: float,
           pictures: Sequence[np.ndarray], colours: Sequence[str], heads: Sequence[str], texts: Sequence[str],
           size: float) -> None:  # fmt: skip
    """Squares of ``cell`` inches with two lines of ``size`` points under each, centred in a frame of the page.

    Args:
        frame: left and bottom edge, width and height, inches.
    """
    width, height = page.get_size_inches()
    step = cell + CAPTION * size
    rows = -(-len(pictures) // columns)
    left = frame[0] + (frame[2] - columns * cell) / 2
    top = frame[1] + frame[3] - (frame[3] - rows * step) / 2
    inset = 0.03 * cell
    side = cell - 2 * inset
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        x, y = left + column * cell + inset, top - row * step - cell + inset
        axes = page.add_axes((x / width, y / height, side / width, side / height))
        _cell(axes, picture, colours[number], heads[number], texts[number], size)


def percent(sizes: Sequence[int]) -> list[str]:
    """Particles of each group as text: ``1,204 (12 %)``."""
    total = max(sum(sizes), 1)
    return [f"{size:,} ({100 * size / total:.0f} %)" for size in sizes]


def contact_sheet(
    path: Path,
    pictures: Sequence[np.ndarray],
    colours: Sequence[str],
    heads: Sequence[str],
    texts: Sequence[str],
    columns: int | None = None,
) -> None:
    """All volumes of a folder as one PNG, about 1600 px wide.

    Args:
        pictures: (h, h, 4) uint8 surfaces drawn at one zoom. colours: of the dots. heads, texts: lines under each.
        columns: of the sheet; None: a sheet half as wide again as high.
    """
    columns = columns or grid_shape(len(pictures), 1.5, 1.0)[1]
    rows = -(-len(pictures) // columns)
    cell = min(10.6 / columns, 2.6)
    size = float(np.clip(4.4 * cell, 6.0, 11.0))
    width, height = columns * cell, rows * (cell + CAPTION * size) + 0.1
    with figure(path, width, height) as page:
        page.set_layout_engine("none")
        fill(page, (0, 0, width, height), columns, cell, crop_together(pictures), colours, heads, texts, size)


def walk_columns(count: int) -> int:
    """Columns of a sheet that is read as a sequence: one row of up to 6, two rows of up to 8, else rows of 8."""
    return count if count <= 6 else min(-(-count // 2), 8)
