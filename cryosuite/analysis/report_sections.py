"""The parts of a report below its map: clusters, confounds, learning curves, walks, how it was made, how to go on."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cryosuite import __version__
from cryosuite.analysis.particle_table import Column
from cryosuite.analysis.report_pack import escaped, thinned
from cryosuite.analysis.report_page import (
    caption,
    cluster_table,
    command,
    confound_table,
    figure,
    listing,
    section,
)
from cryosuite.analysis.report_pictures import still
from cryosuite.analysis.report_read import Found, RunFacts, shown_path
from cryosuite.data.latents import fingerprint
from cryosuite.data.workdir import VolumeDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.config import read_yaml

CURVES = ("loss",)  # first of the choices
QUIET = {"step", "epoch", "iteration", "images", "seconds", "images_per_s"}
MOST_PICTURES = 16


def curves(records: Sequence[Mapping[str, float]], epoch: int) -> dict[str, list[list[float]]]:
    """Numbers of metrics.jsonl against the training step up to an epoch, thinned; those that never change left out."""
    found: dict[str, list[list[float]]] = {}
    known = [record for record in records if record.get("epoch", 0) <= epoch or not epoch]
    names = list(dict.fromkeys([*CURVES, *(name for record in known for name in record)]))
    for name in names:
        if name in QUIET:
            continue
        pairs = [(r["step"], r[name]) for r in known if isinstance(r.get(name), int | float)]
        if len({y for _, y in pairs}) > 1:
            found[name] = thinned(pairs)
    return found


def sections(
    found: Found,
    facts: RunFacts,
    clusters: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    left: Sequence[str],
    notes: Mapping[str, str],
) -> dict[str, str]:
    """The template's places that hold HTML."""
    name = facts.name or found.out.path.name
    body = [
        section("Clusters", cluster_table(clusters) + caption(_about_clusters(found)), "clusters"),
        _confounds(found),
        _curves(facts),
        _walks(found),
        _gallery(found, facts),
        _made(found, facts, columns, left),
    ]
    return {
        "generator": escaped(f"cryosuite {__version__}"),
        "title": escaped(f"{name}: cryosuite analysis"),
        "eyebrow": escaped("cryosuite analysis" + (f" of a {facts.method} run" if facts.method else "")),
        "heading": escaped(_heading(name, facts)),
        "chips": _chips(found, facts),
        "warnings": _warnings(found, notes),
        "sections": "\n".join(part for part in body if part),
        "footer": escaped(
            f"cryosuite {__version__}, {time.strftime('%Y-%m-%d %H:%M')}. Clusters, volumes, rows and indices count "
            "from 0; epochs and principal components from 1. This file needs no network and no server: it can be kept, "
            "sent and printed. The plots use plotly.js (MIT licence), which is inside."
        ),
    }


def _heading(name: str, facts: RunFacts) -> str:
    """The run's name after that of its folder's folder: most runs are called run."""
    above = facts.run.resolve().parent.name if facts.run is not None else ""
    return f"{above} / {name}" if above else name


def _chips(found: Found, facts: RunFacts) -> str:
    used = int((found.labels >= 0).sum())
    items = [
        (f"{len(found.labels):,}", "particles" if len(found.labels) != 1 else "particle"),
        (f"{len(found.colours)}", "clusters"),
        (f"{facts.z.shape[1]}", "latent numbers each"),
        (f"epoch {facts.epoch}", "counted from 1"),
    ]
    if facts.particles is not None:
        pixel = float(np.median(facts.particles.pixel_size))
        items.append((f"{facts.particles.box_size} pixels", f"box, {pixel:.3g} Å per pixel"))
    if used < len(found.labels):
        items.append((f"{len(found.labels) - used:,}", "left out"))
    return " ".join(f"<span><b>{escaped(value)}</b> {escaped(text)}</span>" for value, text in items)


def _warnings(found: Found, notes: Mapping[str, str]) -> str:
    texts = [text for key, text in notes.items() if key in ("images", "sharpened")]
    left = [row for row in found.summary.get("left_out") or [] if isinstance(row, int)]
    if left:
        shown = ", ".join(map(str, left[:12])) + (", ..." if len(left) > 12 else "")
        texts.append(f"{len(left):,} latents are not numbers (NaN) and are left out, label -1: rows {shown}, from 0.")
    return "".join(f'<div class="warning" role="note"><p>{escaped(text)}</p></div>' for text in texts)


def _about_clusters(found: Found) -> str:
    how = str(found.summary.get("clustering") or "kmeans")
    kind = "k-means" if how == "kmeans" else how
    confidence = (
        "Confidence is the probability of the label in the mixture."
        if found.confidence is not None
        else "Confidence is the probability of the label if every cluster were a round cloud of the same width."
    )
    return (
        f"Found by {kind}. Click a row to see the cluster. {confidence} Clusters cut a continuous change into pieces: "
        "neighbouring numbers are alike, and a cluster is not yet a state."
    )


def _confounds(found: Found) -> str:
    path = found.out.confounds
    if not path.is_file():
        return ""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return ""
    rows.sort(key=lambda row: (not row.get("warning"), -_float(row.get("share_explained"))))
    warned = sum(bool(row.get("warning")) for row in rows)
    count = "1 warning" if warned == 1 else f"{warned} warnings"
    text = (
        f"{count}: a difference that follows the microscope or the view is not one of the molecule."
        if warned
        else "No warnings: neither latents nor clusters follow any of these."
    )
    about = (
        "For each column: what the latents tell of it, and what it tells of the clusters, beside what shuffled columns "
        "reach once in a hundred times by chance, and the share of shuffled columns that do as well (p). Mutual "
        "information is in bits; 0 bits and 0 % mean that one says nothing of the other."
    )
    return section("Do the clusters follow the microscope?", f"<p>{escaped(text)}</p>" + confound_table(rows)
                   + caption(about), "confounds")  # fmt: skip


def _float(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


def _curves(facts: RunFacts) -> str:
    if not curves(facts.records, facts.epoch):
        return ""
    return section(
        "Learning curves",
        '<div class="bar"><label>Show <select id="curve-of"></select></label></div><div id="curve"></div>'
        + caption("What training wrote down (metrics.jsonl). The loss should fall and then level off; still falling at "
                  "the end means that more epochs may help. Losses of different data or options cannot be compared."),
        "learning",
    )  # fmt: skip


def _walks(found: Found) -> str:
    """Volumes along the principal components."""
    parts = []
    for component in range(1, 100):
        folder = found.out.pc(component)
        picture = folder.plot("volumes")
        if not picture.is_file():
            break
        text = (
            f"Volumes along principal component {component}, from one end of the particles to the other, all at one "
            f"level; files count from {found.first_volume}. In ChimeraX: open {folder.path.name}/view.cxc (steps) "
            f"or {folder.path.name}/morph.cxc (blended)."
        )
        parts.append(_still(picture, text, f"Volumes along principal component {component}"))
    return section("Along the principal components", "".join(parts), "walks") if parts else ""


def _gallery(found: Found, facts: RunFacts) -> str:
    """Pictures that trajectories and landscapes of these latents left in the folder."""
    parts: list[str] = []
    out, of_these = found.out, fingerprint(facts.z)
    walks = sorted(path for path in out.trajectories.glob("*") if path.is_dir())
    for folder, summary, text in (
        *((walk, VolumeDir(walk).summary, "Trajectory") for walk in walks),
        (out.landscape.path, out.landscape.summary, "Landscape"),
    ):
        pictures = sorted([*folder.rglob("*.png"), *folder.rglob("movie.gif")])
        if not pictures:
            continue
        noted = read_yaml(summary).get("latents") if summary.is_file() else None
        if noted not in (None, of_these):
            notice(f"{folder}: was made of other latents (trained anew?) and is left out of the report")
            continue
        text += "" if noted else " (of which latents is not noted; perhaps of earlier ones)"
        for picture in [p for p in pictures if not p.stem.startswith("vol_")][: MOST_PICTURES - len(parts)]:
            name = picture.relative_to(out.path).as_posix()
            parts.append(_still(picture, f"{text}: {name}", name))
    return section("Trajectories and landscape", "".join(parts), "gallery") if parts else ""


def _still(path: Path, text: str, alt: str) -> str:
    try:
        return figure(still(path).uri, text, alt)
    except (InputError, OSError) as error:
        notice(f"{path}: is not in the report: {error}")
        return ""


def _made(found: Found, facts: RunFacts, columns: Sequence[Column], left: Sequence[str]) -> str:
    """Commands, ChimeraX, files, columns."""
    out = found.out
    lines = []
    if facts.command:
        lines.append(caption("Training:") + command(facts.command, "command-train"))
    analysed = str(found.summary.get("command") or f"cryosuite analyze {shown_path(facts.run or out.path)}")
    lines.append(caption(f"Analysis (seed {found.summary.get('seed', 0)}: the same seed gives the same result):")
                 + command(analysed, "command-analyze"))  # fmt: skip
    lines.append(caption("This page again, for instance after polish:")
                 + command(f"cryosuite report {shown_path(out.path)}", "command-report"))  # fmt: skip
    left_text = f" Too many for this page, only in particles.csv: {', '.join(left)}." if left else ""
    made = "<h3>How this was made</h3>" + "".join(lines)
    look = "<h3>Look closer in ChimeraX</h3>"
    if out.chimerax.is_file():
        look += caption("All volumes in the colours of this page; open this file in ChimeraX 1.6 or later, or type:")
        look += command(f"chimerax {shown_path(out.chimerax)}", "command-chimerax")
    else:
        look += caption("No volumes were made, so there is no ChimeraX script.")
    files = [(name, text) for name, text in FILES if (out.path / name).is_file()]
    files.append((found.folder.path.name + "/", "volumes of the clusters, their pictures and latents"))
    table = listing((c.header, f"{c.about}{f' ({c.unit})' if c.unit else ''}") for c in columns)
    look += "<h3>Files beside this page</h3>" + listing(files)
    known = f"<details><summary>{len(columns)} columns of particles.csv, for cryosuite select --where</summary>{table}"
    both = f'<div class="columns"><div>{made}</div><div>{look}</div></div>'
    body = both + known + caption(left_text) + "</details>"
    return section("How it was made, and where to go on", body, "made")  # fmt: skip


FILES = (
    ("particles.csv", "one row per particle: all that this page shows, and more"),
    ("labels.pkl", "cluster of each particle, from 0; -1 for those left out"),
    ("umap.pkl", "UMAP coordinates"),
    ("z_pca.csv", "principal components"),
    ("view.cxc", "ChimeraX: all volumes"),
    ("overview.png", "the map and the volumes in one picture"),
    ("confounds.csv", "what the latents and clusters follow"),
    ("analyze.yaml", "what was done, with all options"),
)
