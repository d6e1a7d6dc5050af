"""ChimeraX scripts (version 1.6 or later): clusters side by side or one after the other, and films along a path.

A script names its volumes relative to its own folder; ChimeraX runs a script from there, so a run can be moved.
Commands after the ChimeraX user guide: open, volume, volume morph, mseries slider, surface dust, tile, hide, lighting,
camera. A series is a model series and not a volume series, because the latter copies colour and level from map to map.
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


def _plain(line: str) -> str:
    """A line without control characters: a line end in a name would begin a command of its own."""
    return "".join(c if c.isprintable() else "?" for c in line)


def _write(script: Path, lines: Sequence[str]) -> None:
    with atomic_path(script) as path:
        path.write_text("\n".join(map(_plain, lines)) + "\n", encoding="utf-8")


def _opened(script: Path, files: Sequence[VolumeFile], names: Sequence[str], pixel_size: float | None) -> list[str]:
    """Commands that open the volumes as models #1, #2, ... in their colours, at their levels."""
    lines = []
    for number, (file, name) in enumerate(zip(files, names, strict=True), start=1):
        lines += [
            f'open {_relative(file.path, script)} id {number} name "{name}"',
            f"volume #{number} style surface step 1 level {_number(file.level)} color {file.colour}",
        ]
    if pixel_size is not None:
        lines.append(f"surface dust {_models(len(files))} size {_number(5 * pixel_size)}")
    return lines


def _models(count: int, first: int = 1) -> str:
    return f"#{first}-{count}" if count > first else f"#{first}"


def _slider(count: int) -> list[str]:
    """One model at a time, the first at the start."""
    return [f"hide {_models(count, 2)} models", f"mseries slider {_models(count)}"] if count > 1 else []


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
    lines = [*_head(f"type  open {script.name}"), *_opened(script, files, _cluster_names(sizes), pixel_size)]
    lines += ["view orient", *TURN]
    if count > 1:
        lines.append(f"tile {_models(count)} columns {columns} spacingFactor 1.1")
    lines.append("view")
    _write(script, lines)


def overlay_script(script: Path, files: Sequence[VolumeFile], sizes: Sequence[int], pixel_size: float) -> None:
    """Write a script that shows the clusters at one place, one at a time, with a slider: what moves is seen at once.

    Arguments as of ``cluster_script``.
    """
    lines = [*_head(f"type  open {script.name}"), *_opened(script, files, _cluster_names(sizes), pixel_size)]
    lines += ["view orient", *TURN, "view", *_slider(len(files))]
    _write(script, lines)


def _cluster_names(sizes: Sequence[int]) -> list[str]:
    return [f"cluster {label}, {size} particles" for label, size in enumerate(sizes)]


def _head(how: str) -> list[str]:
    return [
        f"# ChimeraX 1.6 or later: open this file, or {how}",
        "# model #1 is cluster 0, #2 is cluster 1, ...; colours are those of the plots",
        *OPENING,
    ]


def series_script(script: Path, files: Sequence[VolumeFile], title: str, loop: bool = False) -> None:
    """Write a script that steps through the volumes of a path, all at one level, with a slider.

    The slider plays them one after the other. ``loop``: the path comes back to its beginning.
    """
    count = len(files)
    back = ", which comes back to its beginning" if loop else ""
    lines = [
        f"# ChimeraX 1.6 or later: {title}{back}; drag the slider or press its play button",
        f"# another level for all:  volume {_models(count)} level {_number(files[0].level)}",
        *OPENING,
        *_opened(script, files, [f"volume {file.number}" for file in files], None),
        "view orient", *TURN, "view", *_slider(count),
    ]  # fmt: skip
    _write(script, lines)


def morph_script(script: Path, files: Sequence[VolumeFile], title: str, loop: bool = False) -> None:
    """Write a script that blends each volume of a path into the next (a smooth film of interpolated densities).

    It plays to and fro; with ``loop`` the first volume follows the last one and it plays once round.
    """
    shown = [*files, files[0]] if loop and len(files) > 1 else list(files)
    count = len(shown)
    lines = [
        f"# ChimeraX 1.6 or later: {title}, blended from one volume to the next", *OPENING,
        *_opened(script, shown, [f"volume {file.number}" for file in shown], None),
        "view orient", *TURN, "view",
    ]  # fmt: skip
    if count > 1:
        # to and fro is twice the number of steps; frames are counted over both
        steps = FILM_FRAMES * (count - 1)
        frames = steps if loop else 2 * steps
        lines.append(
            f"volume morph {_models(count)} frames {frames} playStep {_number(1.0 / steps)} interpolateColors true"
        )
    _write(script, lines)
