"""Confounds on disk: tables, the picture, and what to test of a particle set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cryosuite.analysis.confounds import NAMED, Confound, confounds
from cryosuite.analysis.palette import GREY, INK
from cryosuite.analysis.particle_table import OWN, Column
from cryosuite.analysis.plots import figure, write_csv
from cryosuite.data.particles import ParticleSet
from cryosuite.errors import notice

ANGLES = {"rot", "tilt"}  # told better by the view direction
SHOWN = 24  # columns in the picture
BLUE, ORANGE = "#2b6fae", "#c8553d"


def view_directions(rotation: np.ndarray) -> np.ndarray:
    """Directions (N, 3) the particles (rotations (N, 3, 3), molecule to image) are seen from, molecule's frame."""
    return np.asarray(rotation, np.float64)[:, 2, :]


def columns_to_test(columns: Sequence[Column], particles: ParticleSet | None) -> dict[str, np.ndarray]:
    """What to test: columns of the particle table that do not come from the latents; the view as a direction."""
    found: dict[str, np.ndarray] = {}
    if particles is not None and particles.rotation is not None:
        found["view"] = view_directions(particles.rotation)
    for column in columns:
        if column.name in OWN or column.name in ANGLES or column.constant:
            continue
        if column.names:
            found[column.name] = np.array([*column.names, ""], object)[column.values]
        elif column.cyclic:
            angle = np.deg2rad(np.asarray(column.values, np.float64))
            found[column.name] = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        else:
            found[column.name] = np.asarray(column.values)
    return found


def write_confounds(
    folder: Path,
    z: np.ndarray,  # (N, zdim)
    labels: np.ndarray | None,  # (N,), -1: left out
    columns: Mapping[str, np.ndarray],
    seed: int = 0,
) -> list[Confound]:
    """Test the columns and write confounds.csv, confounds_clusters.csv and confounds.png; warnings become notices."""
    found = confounds(z, labels, columns, seed)
    for path in (folder / "confounds.csv", folder / "confounds_clusters.csv", folder / "confounds.png"):
        path.unlink(missing_ok=True)
    if not found:
        return found
    write_csv(folder / "confounds.csv", {
        "column": [one.name for one in found],
        "of": [one.of for one in found],
        "mutual_information_bits": [one.bits for one in found],
        "share_explained": [one.share for one in found],
        "share_by_chance_1_percent": [one.chance for one in found],
        "p_value": [one.p for one in found],
        "clusters_from_0": [" ".join(map(str, one.clusters)) for one in found],
        "warning": [one.warning for one in found],
    })  # fmt: skip
    each = [row for one in found for row in one.each]
    if each:
        write_csv(folder / "confounds_clusters.csv", {name: [row[name] for row in each] for name in each[0]})
    draw_confounds(folder / "confounds.png", found)
    for one in found:
        if one.warning:
            notice(one.warning)
    return found


def draw_confounds(path: Path, found: Sequence[Confound]) -> None:
    """Bars of the shares explained, of the latents and of the clusters, those with a warning in orange."""
    names = list(dict.fromkeys(one.name for one in sorted(found, key=lambda one: -one.share)))[:SHOWN]
    kinds = [of for of in ("latents", "clusters") if any(one.of == of for one in found)]
    titles = {"latents": "share of it that the latents tell", "clusters": "share of the clusters that it tells"}
    with figure(path, 4.2 * len(kinds) + 1.2, 0.32 * len(names) + 1.3) as drawn:
        places = drawn.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for axes, of in zip(places, kinds, strict=True):
            of_name = {one.name: one for one in found if one.of == of}
            for row, name in enumerate(names):
                one = of_name.get(name)
                if one is None:
                    continue
                axes.barh(row, one.share, height=0.62, color=ORANGE if one.warning else BLUE)
                axes.plot([one.chance] * 2, [row - 0.4, row + 0.4], color=INK, lw=1.2)
                text = f" {one.bits:.2f} bits" if np.isfinite(one.bits) else ""
                if one.clusters:
                    text += f"  cluster {', '.join(map(str, one.clusters[:NAMED]))}" + ", ..." * (
                        len(one.clusters) > NAMED
                    )
                axes.annotate(text, (max(one.share, one.chance), row), va="center", fontsize=8, color=GREY)
            axes.set_xlim(0, 1.18)
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
            axes.set_title(titles[of], fontsize=9.5)
        places[0].set_yticks(range(len(names)), names)
        places[0].invert_yaxis()
        drawn.supxlabel(
            "black line: one shuffled column in a hundred does better.  orange: see the warning", fontsize=8
        )
