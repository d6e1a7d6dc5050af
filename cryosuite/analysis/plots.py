"""Plots of latents: scatter, density, marginals, paths, learning curves; each with its numbers as CSV beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from cryosuite.analysis.palette import GREY, INK
from cryosuite.formats.atomic import atomic_path
from cryosuite.formats.csv_text import guarded

STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": "#b8bec6",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "xtick.color": "#6b737c",
    "ytick.color": "#6b737c",
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": INK,
    "legend.frameon": False,
}
DENSITY = LinearSegmentedColormap.from_list(
    "density", ["#eef4fa", "#b9d4ea", "#6aa5d3", "#2b6fae", "#123f73", "#0a2346"]
)
PATH = LinearSegmentedColormap.from_list("path", ["#440f5f", "#31688e", "#2aa083", "#8fcf54", "#f2dc3a"])
BLUE = "#2b6fae"
RIBBON = 50  # steps averaged in a learning curve


@contextmanager
def figure(path: Path, width: float, height: float, dpi: int = 150) -> Iterator[Figure]:
    """A figure of width x height inches in the house style, written to ``path`` at the end, whole or not at all."""
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(width, height), dpi=dpi, layout="constrained", facecolor="white")
        yield drawn
        with atomic_path(path, suffix=".png") as temporary:
            drawn.savefig(temporary, format="png", metadata={"Software": "cryosuite"})


def write_csv(path: Path, columns: Mapping[str, np.ndarray | Sequence]) -> None:
    """Write named columns of equal length as CSV; column names say where counting starts."""
    import pandas

    with atomic_path(path) as temporary:
        table = pandas.DataFrame({name: _safe(values) for name, values in columns.items()})
        table.to_csv(temporary, index=False, float_format="%.6g")


def _safe(values: np.ndarray | Sequence) -> np.ndarray | Sequence:
    """Text that came from a star file is no formula for a spreadsheet."""
    return (
        [guarded(v) if isinstance(v, str) else v for v in values] if np.asarray(values).dtype.kind in "OU" else values
    )


def path_colours(count: int) -> list[str]:
    """Colours ``#rrggbb`` along a path, dark to light."""
    return [matplotlib.colors.to_hex(PATH(i / max(count - 1, 1))) for i in range(count)]


def point_size(count: int) -> tuple[float, float]:
    """Area (points^2) and opacity of the dots of a scatter of ``count`` particles."""
    area = float(np.clip(3.2e4 / max(count, 1), 0.9, 16.0))
    return area, float(np.clip(5e4 / max(count, 1), 0.3, 0.85))


def _square(axes: Axes, xy: np.ndarray) -> None:
    """Limits with a small margin, blind to the farthest thousandth of the particles."""
    low, high = np.percentile(xy, [0.05, 99.95], axis=0)
    margin = np.maximum(0.06 * (high - low), 1e-6 + 1e-3 * np.abs(high))
    axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
    axes.set_ylim(low[1] - margin[1], high[1] + margin[1])


def draw_points(axes: Axes, xy: np.ndarray, colours: np.ndarray | str, seed: int = 0, scale: float = 1.0) -> None:
    """Dots in random order, so that no cluster hides another one."""
    area, opacity = point_size(len(xy))
    order = np.random.default_rng(seed).permutation(len(xy))
    shade = colours if isinstance(colours, str) else np.asarray(colours)[order]
    axes.scatter(*xy[order].T, s=area * scale, c=shade, alpha=opacity, linewidths=0, rasterized=True)
    _square(axes, xy)


def draw_numbers(
    axes: Axes, xy: np.ndarray, labels: np.ndarray, colours: Sequence[str], size: float | None = None
) -> None:
    """The number of each cluster in a ring of its colour: in its middle, or beside it when it is small."""
    size = size or (9.0 if len(colours) <= 30 else 6.5)
    points_per_unit = 72.0 / axes.figure.dpi
    shown = [label for label in range(len(colours)) if (labels == label).any()]
    anchors, offsets = [], []
    for label in shown:
        own = xy[labels == label]
        place = own[np.square(own - np.median(own, axis=0)).sum(axis=1).argmin()]
        apart = (axes.transData.transform(own) - axes.transData.transform(place)) * points_per_unit
        near = float(np.percentile(np.linalg.norm(apart, axis=1), 40))
        shift = near + 1.5 * size if near < 1.5 * size else 0.0
        anchors.append(place)
        offsets.append((0.6 * shift, 0.8 * shift))
    at = axes.transData.transform(np.array(anchors)) * points_per_unit
    offsets = _push_apart(at + np.array(offsets), 2.1 * size) - at
    for label, place, offset in zip(shown, anchors, offsets, strict=True):
        box = {"boxstyle": "circle,pad=0.22", "fc": "white", "ec": colours[label], "lw": 1.4, "alpha": 0.92}
        axes.annotate(str(label), place, xytext=tuple(offset), textcoords="offset points", fontsize=size,
                      ha="center", va="center", color=INK, weight="bold", bbox=box, zorder=5)  # fmt: skip


def _push_apart(places: np.ndarray, distance: float, rounds: int = 60) -> np.ndarray:
    """Move points (k, 2) as little as it takes until hardly any two are closer than ``distance``."""
    places = places.copy()
    for _ in range(rounds):
        between = places[:, None] - places[None]
        length = np.linalg.norm(between, axis=-1)
        # points at one place leave along directions of their own
        angle = np.arange(len(places)) * 2.4
        between = np.where(length[..., None] > 1e-6, between, np.stack([np.cos(angle), np.sin(angle)], -1)[:, None])
        missing = np.clip(distance - length, 0, None)
        np.fill_diagonal(missing, 0)
        if missing.max(initial=0.0) < 0.05 * distance:
            break
        step = between / np.maximum(length, 1.0)[..., None] * missing[..., None]
        places += 0.4 * step.sum(axis=1)
    return places


def _bare(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])


def scatter(path: Path, xy: np.ndarray, names: Sequence[str], title: str, labels: np.ndarray | None = None,
            colours: Sequence[str] = ()) -> None:  # fmt: skip
    """Particles as dots; with ``labels`` (M,) in the colours of their clusters, numbered."""
    with figure(path, 6.4, 6.0) as drawn:
        axes = drawn.add_subplot()
        if labels is None:
            draw_points(axes, xy, BLUE)
        else:
            draw_points(axes, xy, np.array(list(colours))[labels])
            drawn.draw_without_rendering()
            draw_numbers(axes, xy, labels, colours)
        _bare(axes, names)
        axes.set_title(title)


def hexbin(path: Path, xy: np.ndarray, names: Sequence[str], title: str) -> None:
    """Density of the particles on a hexagonal grid."""
    with figure(path, 6.8, 6.0) as drawn:
        axes = drawn.add_subplot()
        grid = int(np.clip(len(xy) ** 0.5 / 1.6, 12, 90))
        _square(axes, xy)
        extent = (*axes.get_xlim(), *axes.get_ylim())
        cells = axes.hexbin(*xy.T, gridsize=grid, extent=extent, mincnt=1, cmap=DENSITY, bins="log", linewidths=0.1)
        bar = drawn.colorbar(cells, ax=axes, shrink=0.6, aspect=28, pad=0.01)
        bar.outline.set_visible(False)
        bar.set_label("particles per cell")
        _bare(axes, names)
        axes.set_title(title)


def marginals(path: Path, xy: np.ndarray, names: Sequence[str]) -> None:
    """Particles as dots with a histogram along each axis."""
    with figure(path, 6.4, 6.4) as drawn:
        grid = drawn.add_gridspec(2, 2, width_ratios=(5, 1), height_ratios=(1, 5), wspace=0.02, hspace=0.02)
        axes = drawn.add_subplot(grid[1, 0])
        draw_points(axes, xy, BLUE)
        _bare(axes, names)
        for place, axis, way in ((grid[0, 0], 0, "vertical"), (grid[1, 1], 1, "horizontal")):
            side = drawn.add_subplot(place, **{("sharex", "sharey")[axis]: axes})
            limits = (axes.get_xlim(), axes.get_ylim())[axis]
            side.hist(xy[:, axis], bins=80, range=limits, color="#9cc0e0", orientation=way)
            side.axis("off")


def one_dimension(scatter_path: Path, histogram_path: Path, z: np.ndarray) -> None:
    """zdim 1: latent against particle number, and its histogram."""
    with figure(scatter_path, 6.8, 4.2) as drawn:
        axes = drawn.add_subplot()
        draw_points(axes, np.stack([np.arange(len(z)), z], axis=1), BLUE)
        _bare(axes, ("particle", "z"))
    with figure(histogram_path, 6.8, 4.2) as drawn:
        axes = drawn.add_subplot()
        axes.hist(z, bins=min(100, max(10, len(z) // 20)), color="#6aa5d3")
        _bare(axes, ("z", "particles"))


def traversal(path: Path, xy: np.ndarray, along: np.ndarray, names: Sequence[str], title: str, first: int = 0) -> None:
    """A path of numbered points ``along`` (k, 2) over all particles ``xy`` (M, 2) in grey."""
    with figure(path, 6.4, 6.0) as drawn:
        axes = drawn.add_subplot()
        draw_points(axes, xy, "#c3cad2")
        axes.plot(*along.T, color=INK, lw=1.0, alpha=0.6, zorder=3)
        axes.scatter(*along.T, c=path_colours(len(along)), s=70, edgecolors="white", linewidths=1.0, zorder=4)
        for text, place in _shared_places(along, first):
            axes.annotate(text, place, xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8,
                          path_effects=[patheffects.withStroke(linewidth=2, foreground="white")], zorder=5)  # fmt: skip
        _bare(axes, names)
        axes.set_title(title)


def _shared_places(along: np.ndarray, first: int) -> list[tuple[str, np.ndarray]]:
    """Texts such as ``2-5`` and where to write them: consecutive points of a path at one place share a text."""
    texts: list[tuple[str, np.ndarray]] = []
    start = 0
    for number in range(1, len(along) + 1):
        if number == len(along) or not np.array_equal(along[number], along[start]):
            one = number - 1 == start
            texts.append((f"{start + first}" if one else f"{start + first}-{number - 1 + first}", along[start]))
            start = number
    return texts


def learning_curve(path: Path, records: Sequence[Mapping[str, float]], epoch: int) -> bool:
    """Loss over the steps of a metrics.jsonl up to ``epoch``, light, and its running mean; False when there is none."""
    rows = [r for r in records if np.isfinite(r.get("loss", np.nan)) and r.get("epoch", 0) <= epoch]
    if not rows:
        return False
    step = np.array([float(r["step"]) for r in rows])
    loss = np.array([float(r["loss"]) for r in rows])
    width = min(RIBBON, max(1, len(loss) // 8))
    mean = np.convolve(np.pad(loss, (width // 2, width - 1 - width // 2), mode="edge"), np.ones(width) / width, "valid")
    with figure(path, 6.8, 4.2) as drawn:
        axes = drawn.add_subplot()
        if width > 2:
            axes.plot(step, loss, color="#b9d4ea", lw=0.8, label="as written down")
            axes.plot(step, mean, color="#123f73", lw=1.8, label=f"mean of {width} values")
        else:
            axes.plot(step, loss, "-o", color="#123f73", lw=1.8, ms=3.5, label="as written down")
        low, high = np.percentile(loss, [0.5, 98])
        axes.set_ylim(low - 0.08 * (high - low) - 1e-9, high + 0.12 * (high - low) + 1e-9)
        _bare(axes, ("training step", "loss"))
        axes.set_title(f"Learning curve, epoch {epoch}")
        axes.legend(loc="upper right", fontsize=8.5)
    columns = [name for name in rows[-1] if isinstance(rows[-1][name], int | float)]
    write_csv(path.with_suffix(".csv"), {name: [r.get(name, np.nan) for r in rows] for name in columns})
    return True


def model_choice(
    path: Path, scores: Mapping[int, float], chosen: int, stability: Mapping[int, float] | None = None
) -> None:
    """Bayesian information criterion (and stability) against the number of groups, the chosen one marked."""
    counts, values = np.array(list(scores)), np.array(list(scores.values()))
    with figure(path, 5.6, 3.8) as drawn:
        axes = drawn.add_subplot()
        axes.plot(counts, values, "-o", color=BLUE, ms=4, lw=1.3)
        axes.plot([chosen], [scores[chosen]], "o", ms=10, mfc="none", mec="#c8553d", mew=1.8)
        _bare(axes, ("number of groups", "BIC (lower is better)"))
        axes.set_title(f"{chosen} groups")
        if stability:
            side = axes.twinx()
            side.plot(list(stability), list(stability.values()), "--s", color="#2aa083", ms=3.5, lw=1.0)
            side.set_ylim(0, 1.05)
            side.set_ylabel("stability over five seeds", color="#2aa083")
            side.spines["right"].set_visible(True)


def coloured(path: Path, xy: np.ndarray, values: np.ndarray, names: Sequence[str], title: str) -> None:
    """Particles as dots coloured by a value (M,)."""
    with figure(path, 6.9, 6.0) as drawn:
        axes = drawn.add_subplot()
        area, opacity = point_size(len(xy))
        low, high = np.percentile(values, [2, 98])
        order = np.random.default_rng(0).permutation(len(xy))
        look = {"s": area, "alpha": max(opacity, 0.5), "linewidths": 0, "rasterized": True}
        dots = axes.scatter(*xy[order].T, c=values[order], cmap=PATH, vmin=low, vmax=high, **look)
        _square(axes, xy)
        bar = drawn.colorbar(dots, ax=axes, shrink=0.6, aspect=28, pad=0.01)
        bar.outline.set_visible(False)
        bar.solids.set_alpha(1.0)
        _bare(axes, names)
        axes.set_title(title)


def colours_of(labels: np.ndarray, colours: Sequence[str]) -> np.ndarray:
    """Colour of each particle; grey where the label is -1."""
    return np.array([*colours, GREY])[labels]
