"""``report.html``: one self-contained page of an analysis, and the table of particles behind it.

Everything is read back from the analysis' own folder, so that the page can be made again after ``polish``; the latents
and particles come from the run. The page works without network, server or WebGL: all particles travel in it as packed
numbers and are drawn by its own script below plotly's axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cryosuite.analysis import plots
from cryosuite.analysis.palette import GREY, palette
from cryosuite.analysis.particle_table import Column, particle_columns, write_particle_table
from cryosuite.analysis.report_clusters import cluster_parts
from cryosuite.analysis.report_pack import data_script, packed, script_json
from cryosuite.analysis.report_page import assemble
from cryosuite.analysis.report_read import Found, RunFacts, shown_path
from cryosuite.analysis.report_sections import curves, sections
from cryosuite.errors import notice
from cryosuite.formats.atomic import atomic_path

MOST_BYTES = 30e6  # of packed columns in the page; further columns are only in particles.csv
LABELS = ("cluster", "gmm", "code")
MANY_LABELS, FEW = 4096, 24  # different values that get a colour each; above that a scale
ROUNDED = 2**24  # from here on the float32 of the page do not tell whole numbers apart
RING = ("#440f5f", "#31688e", "#2aa083", "#e0b13a", "#c8553d", "#8a2f6b", "#440f5f")
FIRST = ("cluster", "confidence", "defocus", "rot", "tilt", "shift", "micrograph")
TITLES = {
    "row": "row of the run's set, from 0", "index": "original index, from 0", "cluster": "cluster, from 0",
    "umap1": "UMAP 1", "umap2": "UMAP 2", "gmm": "Gaussian group, from 0", "gmm_confidence": "confidence of the group",
    "rot": "view direction: rot", "tilt": "view direction: tilt", "psi": "turn in the plane: psi", "half": "half set",
    "optics": "optics group, from 0", "shift_x": "shift along x", "shift_y": "shift along y", "code": "the run's code",
    "z": "latent number", **{f"pc{i}": f"PC{i}" for i in range(1, 9)},
}  # fmt: skip


def write_particles(found: Found, facts: RunFacts) -> list[Column]:
    """Write particles.csv of an analysis and return its columns."""
    columns = particle_columns(
        facts.z, found.labels, facts.particles, pca_scores=found.scores, umap=found.umap, confidence=found.confidence,
        groups=found.groups, codes=facts.codes,
    )  # fmt: skip
    write_particle_table(found.out.particles, columns)
    return columns


def write_report(found: Found, facts: RunFacts, columns: Sequence[Column]) -> Path:
    """Write report.html of an analysis; ``columns`` from ``write_particles``."""
    heads, scripts, left = _pack(columns, found)
    clusters, pictures, notes = cluster_parts(found, facts, columns)
    spaces = _spaces(found, {head["name"] for head in heads})
    meta = {
        "particles": len(found.labels), "clusters": clusters, "columns": heads, "spaces": spaces,
        "variance": {f"pc{i + 1}": f"{100 * r:.0f} %" for i, r in enumerate(found.ratio[:8])}, "grey": GREY,
        "ramps": _ramps(), "notes": notes, "curves": curves(facts.records, facts.epoch), "first": _first(clusters),
        "selection": {"run": facts.name, "epoch": facts.epoch, "n_particles": len(found.labels)},
        "commands": {"select": [_select_command(found)]},
    }  # fmt: skip
    parts = sections(found, facts, clusters, columns, left, notes)
    parts["meta"] = script_json(meta)
    parts["data"] = "".join(scripts) + "".join(data_script(name, uri) for name, uri in pictures.items())
    with atomic_path(found.out.report) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(assemble(parts))
    size = found.out.report.stat().st_size / 1e6
    if size > 60:
        notice(f"{found.out.report}: {size:.0f} MB; browsers may take long to open it")
    return found.out.report


def _pack(columns: Sequence[Column], found: Found) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Columns of the page, their packed values, and names of columns that no longer fitted (only in particles.csv)."""
    heads, scripts, left, used = [], [], [], 0
    places = {"row", "index", "cluster", "confidence", "pc1", "pc2", "umap1", "umap2", "z"}
    for column in columns:
        whole_set = column.name in places
        if column.constant and not whole_set:
            continue
        column = column if whole_set else _as_names(column)
        head, text = packed(column)
        if not whole_set and used + len(text) > MOST_BYTES:
            left.append(column.name)
            continue
        used += len(text)
        head |= {"number": len(heads), "title": TITLES.get(column.name, column.name)}
        head["categories"] = _categories(column, found)
        head["axis"] = not column.names and column.name not in ("cluster", "half", "optics", "gmm", "code")
        head["colour"] = column.name not in ("row", "umap1", "umap2")
        heads.append(head)
        if text:
            scripts.append(data_script(f"column-{head['number']}", text))
    order = {name: i for i, name in enumerate(FIRST)}
    return sorted(heads, key=lambda head: order.get(head["name"], len(order))), scripts, left


def _as_names(column: Column) -> Column:
    """A column of few whole numbers that the page would round (ids of 32 or 64 bits) as names; others as they are."""
    values = np.asarray(column.values)
    known = np.isfinite(values)
    if column.names or not known.any():
        return column
    low, high = values[known].min(), values[known].max()
    if max(-float(low), float(high)) < ROUNDED:
        return column
    present, code = np.unique(values[known], return_inverse=True)
    if len(present) > FEW or not (present == np.rint(present)).all():
        return column
    codes = np.full(len(values), -1, np.int32)
    codes[known] = code
    return replace(column, values=codes, names=tuple(str(int(value)) for value in present))


def _categories(column: Column, found: Found) -> list[dict[str, Any]] | None:
    """The values of a few-valued column with names, colours and counts; None for a column shown by a scale."""
    values = np.asarray(column.values)
    known = values[values >= 0] if column.names else values[np.isfinite(values)]
    if column.name in LABELS:
        known = known[known >= 0]
    present, count = np.unique(known, return_counts=True)
    most = MANY_LABELS if column.name in LABELS else FEW
    if not len(present) or len(present) > most or not (present == np.rint(present)).all():
        return None
    colours = found.colours if column.name == "cluster" else palette(len(present))
    return [
        {"value": int(value), "text": column.names[int(value)] if column.names else f"{value:.0f}", "count": int(n),
         "colour": colours[int(value)] if column.name == "cluster" else colours[i]}
        for i, (value, n) in enumerate(zip(present, count, strict=True))
    ]  # fmt: skip


def _spaces(found: Found, names: set[str]) -> list[dict[str, Any]]:
    """Pairs of columns with a name of their own, the first shown first."""
    spaces = []
    if {"umap1", "umap2"} <= names:
        text = "UMAP keeps neighbours together; distances between groups, and sizes of groups, mean little."
        spaces.append({"name": "UMAP", "x": "umap1", "y": "umap2", "equal": True, "about": text})
    if {"pc1", "pc2"} <= names:
        text = "Principal components: the directions in which the latents differ most; distances mean something here."
        spaces.append({"name": "PCA", "x": "pc1", "y": "pc2", "equal": False, "about": text})
    if not spaces:
        y = next((name for name in ("z", "pc1") if name in names), "confidence")
        text = "One latent number against the row of the particle."
        spaces.append({"name": "Latent", "x": "row", "y": y, "equal": False, "about": text})
    return spaces


def _ramps() -> dict[str, list[str]]:
    """Colour scales of the plots as a few ``#rrggbb``; the ring for angles begins and ends alike."""
    from matplotlib.colors import to_hex

    def stops(scale: Any, positions: np.ndarray) -> list[str]:
        return [to_hex(scale(position)) for position in positions]

    density = stops(plots.DENSITY, np.linspace(0.12, 1, 12))
    return {
        "path": stops(plots.PATH, np.linspace(0, 1, 16)), "density": density,
        "densityDark": stops(plots.DENSITY, np.linspace(0.8, 0, 12)), "cyclic": list(RING),
    }  # fmt: skip


def _first(clusters: Sequence[dict[str, Any]]) -> int:
    """The cluster shown at first: the largest; -1 when there is none."""
    return max(range(len(clusters)), key=lambda i: clusters[i]["size"]) if clusters else -1


def _select_command(found: Found) -> str:
    """Of this analysis, which need not be the newest one of its run."""
    return f"cryosuite select {shown_path(found.out.path)} --from lasso.json -o ind.pkl -o chosen.star"
