"""What ``eval-fsc --map --model`` does: the scores of a map against an atomic model, on screen and in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cryosuite.console import say, table
from cryosuite.errors import InputError, notice

if TYPE_CHECKING:
    from cryosuite.data.map_grid import MapGrid
    from cryosuite.metrics.local import LocalScores
    from cryosuite.metrics.model import ModelScores

CUBIC = 1.02  # largest ratio of voxel sizes for windows that are balls
MOST_TICKS = 12  # of chains in the plot
POINTS = 300  # residues, or means of several, that one can tell apart in it


@dataclass(frozen=True)
class ModelOptions:
    """Options of the evaluation; see the command's help."""

    map: Path | None
    model: Path | None
    half1: Path | None = None
    half2: Path | None = None
    resolution: float | None = None
    apix: float | None = None
    outdir: Path | None = None


@dataclass(frozen=True)
class LocalResolution:
    """Local resolution of half maps: ``values`` (n,) A at the windows' centres, ``field`` (z, y, x) A in the mask."""

    scores: LocalScores
    values: np.ndarray
    field: np.ndarray

    def summary(self) -> dict[str, float]:
        """Median and the 10th and 90th percentile, A."""
        names = {"median": 50, "p10": 10, "p90": 90}
        return {f"local_resolution_{name}_A": float(np.percentile(self.values, at)) for name, at in names.items()}


def evaluate_model(options: ModelOptions) -> None:
    """Read map, model and half maps, score them, print the table, write the files.

    Raises:
        InputError: an input is missing or unreadable, the half maps lie on another grid, or the model not in the map.
    """
    from cryosuite.formats.atoms import read_atoms
    from cryosuite.metrics.model import score_model

    if options.model is None:
        raise InputError("--map needs an atomic model: give --model MODEL.cif (or .pdb)")
    grid, halves = _read_maps(options)
    atoms = read_atoms(options.model, waters=True)
    scores = score_model(grid, atoms, options.resolution, halves)
    local = None if halves is None else _local(grid, halves, scores)
    _print(scores, local, grid, options)
    if options.outdir is not None:
        _write(scores, local, grid, options)


def _read_maps(options: ModelOptions) -> tuple[MapGrid, tuple[np.ndarray, np.ndarray] | None]:
    """The map and its half maps; without a map the mean of the half maps."""
    from cryosuite.data.map_grid import read_grid, values_on

    paths = [path for path in (options.half1, options.half2) if path is not None]
    if len(paths) == 1:
        raise InputError(f"{paths[0]}: one half map alone was given; give both --half1 and --half2, or neither")
    if options.map is None and not paths:
        raise InputError("--model needs a map: give --map MAP.mrc, or --half1 and --half2")
    grids = [read_grid(path, options.apix) for path in paths]
    if options.map is None:
        notice("no --map: the mean of the half maps is judged")
        grid = grids[0].with_data((grids[0].data + values_on(grids[1], grids[0])) / 2)
    else:
        grid = read_grid(options.map, options.apix)
    return grid, tuple(values_on(half, grid) for half in grids) if grids else None


def _local(grid: MapGrid, halves: tuple[np.ndarray, np.ndarray], scores: ModelScores) -> LocalResolution | None:
    """Windowed FSC of the half maps around the model."""
    import torch

    from cryosuite.metrics.local import WINDOW, grid_centres, local_fsc, spread
    from cryosuite.metrics.model import RADIUS
    from cryosuite.metrics.model_map import ModelOnGrid

    if max(grid.voxel) > CUBIC * min(grid.voxel):
        notice(f"{grid.path}: no local resolution: it needs cubic voxels")
        return None
    where = ModelOnGrid(scores.atoms, grid).mask(RADIUS)
    pixel = float(np.mean(grid.voxel))
    centres = grid_centres(where, max(4, round(WINDOW / 4 / pixel)))
    if not len(centres):
        return None
    first, second = (torch.from_numpy(half) for half in halves)
    found = local_fsc(first, second, pixel, centres=centres)
    values = found.resolution()
    return LocalResolution(found, values, spread(found, values, where))


def _print(scores: ModelScores, local: LocalResolution | None, grid: MapGrid, options: ModelOptions) -> None:
    shape = " x ".join(map(str, grid.data.shape[::-1]))
    title = f"{(options.map or options.half1).name} and {options.model.name}: {shape} voxels of "
    title += " x ".join(f"{size:.4g}" for size in grid.voxel) + " A"
    table(title, ["score", "value", "of what"], [*_correlations(scores), *_resolutions(scores, local), *_q(scores)])
    if abs(scores.plain.mask) > 0.2 and scores.plain.mask < 0:
        say("note: the correlation is negative: the map has inverted contrast")


def _correlations(scores: ModelScores) -> list[list[str]]:
    solvent, plain = scores.solvent, scores.plain
    cut = f"calculated map cut at {scores.d_min:.2f} A ({scores.d_min_from})"
    rows = [
        ("CC mask", solvent.mask, f"{solvent.voxels} voxels that solvent cannot reach (Jiang and Bruenger); {cut}"),
        ("CC mask, 3 A", plain.mask, f"{plain.voxels} voxels within 3 A of an atom"),
        ("CC box", solvent.box, "all voxels; removing solvent alone raises it: read it beside CC mask and Q"),
        ("CC volume", solvent.volume, "the highest voxels of the calculated map, as many as in the mask"),
        ("CC peaks", solvent.peaks, "the highest voxels of either map, as many as in the mask"),
    ]
    return [[name, f"{value:.3f}", words] for name, value, words in rows]


def _resolutions(scores: ModelScores, local: LocalResolution | None) -> list[list[str]]:
    rows = []
    for name, curve in scores.fsc.items():
        words = f"FSC of {name}" if name.startswith("half") else f"FSC of map and model, {name}"
        rows += [[words, f"{curve.resolution(limit):.2f} A", f"at {limit}"] for limit in (0.5, 0.143)]
    for name, (d, b) in scores.d_model.items():
        rows.append([f"d_model, {name}", f"{d:.2f} A", f"the model's map is most like this one, with B = {b:.0f} A^2"])
    rows.append(["d99", f"{scores.d99:.2f} A", "cut here, the map still correlates by .99 with itself"])
    if local is not None:
        low, middle, high = (local.summary()[f"local_resolution_{name}_A"] for name in ("p10", "median", "p90"))
        words = f"median in {len(local.values)} windows of 25 A, FSC .5; 80 % are {low:.1f} to {high:.1f}"
        rows.append(["local resolution", f"{middle:.2f} A", words])
    return rows


def _q(scores: ModelScores) -> list[list[str]]:
    expected, rows = scores.expected(scores.d_min), []
    kinds = sorted(set(scores.atoms.kind[np.isfinite(scores.q[:, 0])].tolist()))
    for kind in (None, *(kinds if len(kinds) > 1 else ())):
        narrow, wide = scores.mean_q(kind)
        n = int((scores.atoms.kind[np.isfinite(scores.q[:, 0])] == kind).sum())
        words = f"{n} atoms" if kind else "all atoms in the map but waters"
        usual = expected.get(kind or (kinds[0] if len(kinds) == 1 else ""))
        if usual is not None:
            words += f"; usual at {scores.d_min:.1f} A for sigma .6: {usual:.2f}"
        rows.append([f"Q, {kind}" if kind else "Q, sigma .4 and .6", f"{narrow:.3f}  {wide:.3f}", words])
    return rows


def _write(scores: ModelScores, local: LocalResolution | None, grid: MapGrid, options: ModelOptions) -> None:
    """CSV, JSON, PNG and the map of the local resolution."""
    from cryosuite.data.map_grid import write_like
    from cryosuite.data.results import ScoresDir
    from cryosuite.formats.atomic import atomic_path, write_text
    from cryosuite.formats.json_text import write_json
    from cryosuite.metrics.fsc import rows_as_csv

    out = ScoresDir(options.outdir)
    out.path.mkdir(parents=True, exist_ok=True)
    files = (options.map, options.model, options.half1, options.half2)
    summary = {"files": [str(path) for path in files if path is not None], "voxel_A": grid.voxel}
    summary |= scores.summary() | (local.summary() if local else {})
    write_json(out.summary, summary)
    write_text(out.curves, rows_as_csv(scores.fsc_rows()))
    write_text(out.atoms, rows_as_csv(scores.atom_rows()))
    rows = scores.residue_rows()
    write_text(out.residues, rows_as_csv(rows))
    name = (options.map or options.half1).name
    with atomic_path(out.plot) as temporary:
        _plot_fsc(temporary, scores, f"{name} and {options.model.name}")
    with atomic_path(out.residue_plot) as temporary:
        _plot_residues(temporary, rows, scores.expected(scores.d_min), f"Q-scores of {options.model.name} in {name}")
    if local is not None:
        write_like(out.local_resolution, local.field, grid, "cryosuite: local resolution in Angstrom")
    say(f"written: {out.path}")


def _plot_fsc(path: Path, scores: ModelScores, title: str) -> None:
    from cryosuite.metrics.plot import line_plot

    lines = []
    for name, curve in scores.fsc.items():
        what = name if name.startswith("half") else f"map and model {name}"
        lines.append((f"{what} ({curve.resolution(0.5):.1f} A at 0.5)", curve.frequency, curve.fsc))
    end = 1.0 / scores.fsc["unmasked"].nyquist
    ticks = [(end * part / 5, f"{5 / (part * end):.1f}") for part in range(1, 6)]
    line_plot(path, lines, (0.0, end), (-0.1, 1.05), ticks, [0.5, 0.143], title, "resolution (A)", "FSC")


def _plot_residues(path: Path, rows: list[dict], expected: dict[str, float], title: str) -> None:
    """Q of the residues one after another, waters left out; a tick where a chain begins; long models are smoothed."""
    from scipy.ndimage import uniform_filter1d

    from cryosuite.metrics.plot import line_plot

    rows = [row for row in rows if row["kind"] != "water"] or rows
    place, width = np.arange(len(rows)), -(-len(rows) // POINTS)
    curves = [uniform_filter1d(np.array([row[f"q_{sigma}"] for row in rows]), width) for sigma in (0.4, 0.6)]
    lines = [(f"sigma {sigma}", place, curve) for sigma, curve in zip((0.4, 0.6), curves, strict=True)]
    if "protein" in expected:
        usual = np.full(len(rows), expected["protein"])
        lines.append((f"usual for protein, sigma 0.6: {usual[0]:.2f}", place, usual))
    chains = [row["chain"] for row in rows]
    starts = [i for i in range(len(rows)) if i == 0 or chains[i] != chains[i - 1]]
    starts = starts[:: -(-len(starts) // MOST_TICKS)]
    ticks = [(i, f"{chains[i]} {rows[i]['residue']}") for i in starts]
    along = "residue" if width == 1 else f"residue (means of {width})"
    low = min(0.0, *(float(curve.min()) for curve in curves))
    line_plot(path, lines, (0, max(len(rows) - 1, 1)), (low, 1.02), ticks, (), title, along, "Q")
