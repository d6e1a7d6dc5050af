"""Plots of a landscape: -ln of the density, and particles per state with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from cryosuite.analysis.landscape import HIGHEST, Landscape
from cryosuite.analysis.palette import INK
from cryosuite.analysis.plots import draw_numbers, figure

ENERGY = LinearSegmentedColormap.from_list(
    "energy", ["#0a2346", "#123f73", "#2b6fae", "#6aa5d3", "#b9d4ea", "#eef4fa", "#fbf6ee", "#f3dcb9"]
)


def draw_landscape(
    path: Path, surface: Landscape, names: Sequence[str], middles: np.ndarray, colours: Sequence[str]
) -> None:
    """-ln of the density as filled contours, low (many particles) dark, with the middle of each state numbered.

    Args:
        middles: (k, 2). colours: of the states.
    """
    x, y = ((edge[1:] + edge[:-1]) / 2 for edge in (surface.x, surface.y))
    levels = np.arange(0, HIGHEST + 0.25, 0.5)
    with figure(path, 6.9, 6.0) as drawn:
        axes = drawn.add_subplot()
        shown = np.ma.masked_invalid(surface.energy)
        filled = axes.contourf(x, y, shown, levels=levels, cmap=ENERGY, extend="max")
        axes.contour(x, y, shown, levels=np.arange(1, HIGHEST + 0.5), colors=INK, linewidths=0.4, alpha=0.5)
        axes.set_xlim(surface.x[[0, -1]])
        axes.set_ylim(surface.y[[0, -1]])
        drawn.draw_without_rendering()
        draw_numbers(axes, middles, np.arange(len(middles)), colours)
        bar = drawn.colorbar(filled, ax=axes, shrink=0.6, aspect=28, pad=0.01)
        bar.outline.set_visible(False)
        bar.set_label("-ln(density), kT above the lowest point")
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        axes.set_title("Density of particles as a landscape")


def draw_counts(path: Path, sizes: np.ndarray, intervals: np.ndarray, colours: Sequence[str]) -> None:
    """Particles of each state as bars with their 95 % intervals."""
    count = len(sizes)
    with figure(path, max(4.6, 0.5 * count + 1.6), 4.0) as drawn:
        axes = drawn.add_subplot()
        axes.bar(np.arange(count), sizes, color=list(colours), width=0.75)
        missing = np.clip([sizes - intervals[:, 0], intervals[:, 1] - sizes], 0, None)
        axes.errorbar(np.arange(count), sizes, missing, fmt="none", ecolor=INK, capsize=3, lw=1.1)
        axes.set_xticks(np.arange(count))
        axes.set_xlabel("state, from 0")
        axes.set_ylabel("particles")
        axes.set_title("Particles per state, 95 % intervals")
