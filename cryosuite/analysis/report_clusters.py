"""What the page says of each cluster: numbers, maps that turn, typical and odd particles, commands to go on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cryosuite.analysis import render
from cryosuite.analysis.leftovers import shows_centres
from cryosuite.analysis.particle_table import Column
from cryosuite.analysis.report_maps import ClusterMap, find_maps
from cryosuite.analysis.report_pictures import (
    FEWER_FRAMES,
    FRAMES,
    MANY,
    central_planes,
    montages,
    turning,
    typical_and_odd,
)
from cryosuite.analysis.report_read import Found, RunFacts, shown_path
from cryosuite.console import Progress
from cryosuite.data.results import PolishDir, run_polish
from cryosuite.errors import InputError, notice
from cryosuite.formats.mrc import read_map

CURVE_POINTS = 160
MEDIANS = ("defocus", "shift")
NO_VOLUMES = (
    "No volumes: this run decodes none, or they were left out (--skip-vol). The particles below and `cryosuite polish` "
    "still show what the cluster is."
)
SHARPENED = (
    "{count} maps were also sharpened by a network (analyze --sharpen): {first} and so on, beside the originals. They "
    "are predictions to look at; the maps, resolutions and curves on this page are the originals'."
)
TITLES = {"polished": "Polished map", "backprojected": "Backprojection"}
ABOUT = {
    "decoded": "What the network draws at the middle of the cluster, turning about the vertical. A picture of what it "
    "learnt: smooth, and not a measurement.",
    "polished": "The map of the cluster's own images, kept where its two half sets agree and calmed where they do not; "
    "turning about the vertical.",
    "backprojected": "The plain reconstruction of the cluster's own images, turning about the vertical.",
}


def cluster_parts(
    found: Found, facts: RunFacts, columns: Sequence[Column]
) -> tuple[list[dict[str, Any]], dict[str, str], dict[str, str]]:
    """One entry per cluster for the page's script, the pictures it names, and notes where something is missing."""
    count = len(found.colours)
    sizes = np.bincount(found.labels[found.labels >= 0], minlength=count)
    pictures: dict[str, str] = {}
    notes = {"volumes": NO_VOLUMES}
    maps = _maps(found, facts, sizes, pictures)
    lists = typical_and_odd(np.nan_to_num(facts.z), found.labels, count)
    sheets, missing = montages(facts.particles, lists)
    if missing:
        notes["images"] = f"No pictures of particles: {missing}"
    made = [*found.folder.sharpened(), *PolishDir(found.out.path / "polish").sharpened()]
    if made:
        notes["sharpened"] = SHARPENED.format(count=len(made), first=made[0].relative_to(found.out.path))
    by_name = {column.name: column for column in columns}
    clusters = []
    for label in range(count):
        own = np.flatnonzero(found.labels == label)
        entry: dict[str, Any] = {"label": label, "colour": found.colours[label], "size": int(sizes[label])}
        entry["share"] = 100 * len(own) / max(int(sizes.sum()), 1)
        entry["confidence"] = _mean(by_name["confidence"].values[own]) if "confidence" in by_name else None
        entry["maps"] = maps[label]
        judged = next((m for m in reversed(maps[label]) if m["resolution"] and m["resolution"][0] is not None), None)
        entry["resolution"] = judged["resolution"][0] if judged else None
        entry["limit"] = judged["limit"] if judged else 0.0
        entry["medians"] = [(n, _median(by_name[n], own)) for n in MEDIANS if n in by_name and not by_name[n].constant]
        entry["facts"] = _facts(entry, own, by_name)
        entry["commands"] = _commands(label, facts, found)
        entry["particles"] = {}
        for which, rows, uri in zip(("typical", "odd"), lists[label], sheets[label], strict=True):
            name = f"{which}-{label}" if uri else ""
            if uri:
                pictures[name] = uri
            entry["particles"][which] = {"rows": rows, "picture": name}
        clusters.append(entry)
    return clusters, pictures, notes


def _maps(found: Found, facts: RunFacts, sizes: np.ndarray, pictures: dict[str, str]) -> list[list[dict[str, Any]]]:
    """Maps of each cluster as the page shows them; their pictures are added to ``pictures``."""
    count = len(sizes)
    files: list[list[ClusterMap]] = [[] for _ in range(count)]
    current = shows_centres(found.folder)
    for label in range(count):
        path = found.folder.volume(label + found.first_volume)
        if current and path.is_file():
            files[label].append(ClusterMap(label, "decoded", path, read_map(path).pixel_size))
    index = np.arange(len(found.labels)) if facts.particles is None else facts.particles.index
    places = [*facts.maps, found.out.path / "polish", found.out.path / "backproject"]
    places += [run_polish(facts.run, facts.epoch).path] if facts.run is not None else []
    for one in find_maps(places, found.labels, np.asarray(index)):
        files[one.label].append(one)
    for folder in facts.maps:
        if not any(one.path.is_relative_to(folder) for own in files for one in own):
            notice(f"--maps {folder}: no map of it is shown: none is of these clusters, or each has been shown already")
    every = [one for own in files for one in own]
    shown = {kind: _zoom([one for one in every if one.kind == kind], found) for kind in {one.kind for one in every}}
    frames = FEWER_FRAMES if len(every) > MANY else FRAMES
    result: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    if not every:
        return result
    with Progress(len(every), "turning volumes", unit="volumes") as progress:
        for one in every:
            try:
                result[one.label].append(_shown(one, found, shown[one.kind], frames, pictures))
            except (InputError, ValueError) as error:
                notice(f"{one.path}: is not in the report: {error}")
            progress.advance()
    return result


def _level(one: ClusterMap, found: Found) -> float:
    """The level of a decoded volume is that of the previews; of other maps it is chosen from the map."""
    known = found.levels[one.label] if one.kind == "decoded" else None
    mass = (found.summary.get("volumes") or {}).get("mass_kda")
    return float(known) if known is not None else render.contour_level(read_map(one.path).data, one.pixel_size, mass)


def _zoom(maps: Sequence[ClusterMap], found: Found) -> float:
    """One zoom for all maps of a kind, so that sizes can be compared."""
    return render.common_zoom([render.reach(read_map(one.path).data, _level(one, found)) for one in maps])


def _shown(one: ClusterMap, found: Found, zoom: float, frames: int, pictures: dict[str, str]) -> dict[str, Any]:
    name = f"{one.kind}-{one.label}"
    kept = found.out.turntable(one.label) if one.kind == "decoded" else found.out.turntable(one.label, one.kind)
    colour = found.colours[one.label]
    turn = turning(one.path, kept, _level(one, found), colour, one.pixel_size, zoom, frames)
    pictures[f"turn-{name}"] = turn.uri
    pictures[f"planes-{name}"] = central_planes(one.path).uri
    known = [value if np.isfinite(value) else None for value in one.resolution]
    return {
        "title": TITLES.get(one.kind, "Network's volume"), "about": ABOUT[one.kind], "strip": f"turn-{name}",
        "planes": f"planes-{name}", "frames": turn.frames, "limit": 2 * one.pixel_size,
        "file": _file(one.path, found.out.path),
        "resolution": known if any(v is not None for v in known) else None, "note": one.note,
        "curve": None if one.curve is None else [_few(part) for part in one.curve],
    }  # fmt: skip


def _few(values: np.ndarray) -> list[float]:
    step = max(1, -(-len(values) // CURVE_POINTS))
    return [float(f"{v:.5g}") for v in values[::step]]


def _file(path: Path, home: Path) -> str:
    """A path as seen from the analysis' folder where it lies near it, so that no report names a disk."""
    import os

    return Path(os.path.relpath(path.absolute(), home.absolute())).as_posix()


def _mean(values: np.ndarray) -> float | None:
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if len(known) else None


def _median(column: Column, rows: np.ndarray) -> str:
    known = np.asarray(column.values[rows], np.float64)
    known = known[np.isfinite(known)]
    return f"{np.median(known):,.{0 if np.median(known) > 100 else 1}f} Å" if len(known) else "–"


def _facts(entry: dict[str, Any], own: np.ndarray, columns: dict[str, Column]) -> list[list[str]]:
    """Name, value with its unit, and what it means, of the numbers on a cluster's card."""
    facts = [["particles", f"{entry['size']:,}", "images whose latents lie nearest to this cluster"],
             ["share", f"{entry['share']:.1f} %", "of all particles that have a cluster"]]  # fmt: skip
    if entry["confidence"] is not None:
        facts.append(["mean confidence", f"{entry['confidence']:.2f} of 1", "mean probability of the cluster"])
    if entry["resolution"] is not None:
        limit = entry["resolution"] <= 1.01 * entry["limit"]
        text = f"{entry['resolution']:.1f} Å" + (" (limit of the pixels)" if limit else "")
        facts.append(["resolution", text, "where the FSC of the half maps falls below 0.143"])
    facts += [[f"median {name}", text, columns[name].about] for name, text in entry["medians"]]
    if "micrograph" in columns:
        codes = columns["micrograph"].values[own]
        facts.append(["micrographs", f"{len(np.unique(codes[codes >= 0])):,}", "micrographs with such particles"])
    if "half" in columns:
        half = columns["half"].values[own]
        facts.append(
            ["half sets", f"{int((half == 0).sum()):,} + {int((half == 1).sum()):,}", "particles in each half"]
        )
    return facts


def _commands(label: int, facts: RunFacts, found: Found) -> list[list[str]]:
    """What a user does next with a cluster."""
    run = shown_path(facts.run) if facts.run else shown_path(found.out.path)
    labels, here = shown_path(found.out.labels), shown_path(found.out.path)  # `select RUN` takes the newest analysis
    lines = [
        ["Its particles, un-binned, for RELION:", f"cryosuite select {here} --cluster {label} -o cluster{label}.star"]
    ]
    if facts.particles is not None and facts.particles.rotation is not None and facts.particles.path is not None:
        particles = shown_path(facts.particles.path)
        lines.append(["Its map with half maps and FSC:", f"cryosuite backproject {particles} --labels {labels} "
                      f"--cluster {label} -o cluster{label}"])  # fmt: skip
        lines.append(["Polished maps of all clusters, shown here afterwards:",
                      f"cryosuite polish {run} --labels {labels} -o {shown_path(found.out.path / 'polish')} && "
                      f"cryosuite report {here}"])  # fmt: skip
    return lines
