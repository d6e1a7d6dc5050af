"""ChimeraX scripts (version 1.6 or later): clusters side by side, and films along a path.

A script names its volumes relative to its own folder; ChimeraX runs a script from there, so a run can be moved.
Commands after the ChimeraX user guide: open, volume, volume morph, vseries, surface dust, tile, lighting, camera.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cryosuite.analysis.render import VIEW
from cryosuite.analysis.volumes import VolumeFile
from cryosuite.formats.atomic import atomic_path

TURN = (f"turn x {VIEW[0]:g}", f"turn y {VIEW[1]:g}", f"turn z {VIEW[2]:g}")  # the view of the PNG previews
FILM_FRAMES = 24  # pictures between two volumes of a morph
OPENING = ("set bgColor white", "camera ortho", "lighting soft", "graphics silhouettes true")


def _relative(path: Path, script: Path) -> str:
    """The path of a volume as seen from the script's folder, quoted when ChimeraX would split it."""
    text = Path(os.path.relpath(path, script.parent)).as_posix()
    return f'"{text}"' if any(c in text for c in " ;#") else text


def _number(value: float) -> str:
    return f"{value:.6g}"


def _write(script: Path, lines: Sequence[str]) -> None:
    with atomic_path(script) as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def cluster_script(
    script: Path, files: Sequence[VolumeFile], sizes: Sequence[int], pixel_size: float, columns: int | None = None
) -> None:
    """Write a script that opens one volume per cluster in its colour, at its level, tiled.

    Args:
        script: the .cxc file. files: volumes in the order of their labels. sizes: particles of each.
        pixel_size: of the written volumes, A; specks up to five voxels wide are hidden.
        columns: of the tiling; None: about 1.4 times as wide as high.
    """
    count = len(files)
    columns = columns or max(1, round((1.4 * count) ** 0.5))
    lines = [
        "# ChimeraX 1.6 or later: open this file, or type  open view.cxc",
        "# model #1 is cluster 0, #2 is cluster 1, ...; colours are those of the UMAP",
        *OPENING,
    ]
    for label, (file, size) in enumerate(zip(files, sizes, strict=True)):
        model = f"#{label + 1}"
        lines += [
            f'open {_relative(file.path, script)} id {label + 1} name "cluster {label}, {size} particles"',
            f"volume {model} style surface step 1 level {_number(file.level)} color {file.colour}",
        ]
    everything = f"#1-{count}" if count > 1 else "#1"
    lines += [f"surface dust {everything} size {_number(5 * pixel_size)}", "view orient", *TURN]
    if count > 1:
        lines.append(f"tile {everything} columns {columns} spacingFactor 1.1")
    lines.append("view")
    _write(script, lines)


def series_script(script: Path, files: Sequence[VolumeFile], title: str) -> None:
    """Write a script that plays the volumes of a path to and fro, all at one level, with a slider."""
    names = " ".join(_relative(file.path, script) for file in files)
    lines = [f"# ChimeraX 1.6 or later: {title}; stop with  vseries stop #1", *OPENING]
    lines += [f"open {names} vseries true id 1" if len(files) > 1 else f"open {names} id 1"]
    lines.append(f"volume #1 style surface step 1 level {_number(files[0].level)} color {files[0].colour}")
    if len(files) > 1:
        for number, file in enumerate(files, start=1):
            lines.append(f"volume #1.{number} style surface step 1 level {_number(file.level)} color {file.colour}")
    lines += ["view orient", *TURN, "view"]
    if len(files) > 1:
        lines += ["vseries slider #1", "vseries play #1 direction oscillate loop true maxFrameRate 6"]
    _write(script, lines)


def morph_script(script: Path, files: Sequence[VolumeFile], title: str) -> None:
    """Write a script that blends each volume of a path into the next (a smooth film of interpolated densities)."""
    count = len(files)
    lines = [f"# ChimeraX 1.6 or later: {title}, blended from one volume to the next", *OPENING]
    for number, file in enumerate(files, start=1):
        lines += [
            f"open {_relative(file.path, script)} id {number}",
            f"volume #{number} style surface step 1 level {_number(file.level)} color {file.colour}",
        ]
    lines += ["view orient", *TURN, "view"]
    if count > 1:
        step = 1.0 / (FILM_FRAMES * (count - 1))
        lines.append(
            f"volume morph #1-{count} frames {2 * FILM_FRAMES * (count - 1)} playStep {_number(step)} "
            "interpolateColors true"
        )
    _write(script, lines)
