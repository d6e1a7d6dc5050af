"""A volume turning about the picture's vertical: frames for the report, for GIF and for MP4, drawn without a display.

The surface is found once and drawn from every side (``mesh``): on one core, 160 pixels, maps of 64 to 128 voxels, 0.2 s
for the surface and 0.04 s a frame; the ray caster that was here before took 0.2 to 0.6 s a frame for equal pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cryosuite.analysis.mesh import VIEW, picture, surface, turned
from cryosuite.analysis.render import common_zoom, on_white, reach

if TYPE_CHECKING:
    from PIL import ImageFont

BAR_SHARE = 0.3  # of the picture's width: the longest scale bar
INK = (36, 41, 47)


def turntable(
    volume: np.ndarray,  # (z, y, x)
    level: float,
    colour: str,
    pixel_size: float | None = None,
    frames: int = 24,
    size: int = 160,
    *,
    zoom: float | None = None,
    view: tuple[float, float, float] = VIEW,
) -> list[np.ndarray]:
    """Frames of a shaded isosurface that turns once about the picture's vertical; the last leads into the first.

    Args:
        level: contour level in the map's units. colour: ``#rrggbb``.
        pixel_size: A per voxel; draws a scale bar. None: no bar.
        frames: pictures of one full turn. size: pixels on a side.
        zoom: > 1 shows a smaller part of the box; None: the volume fills the picture (give one zoom to volumes that
            are to be compared, see ``common_zoom``).
        view: of the first frame, Euler angles about x, y, z in degrees; that of the still previews.

    Returns:
        ``frames`` pictures (size, size, 3) uint8 on white; white where no density reaches the level.

    Raises:
        ValueError: less than one frame or pixel, or a volume that is no cube.
    """
    volume = np.asarray(volume, np.float32)
    if frames < 1 or size < 1:
        raise ValueError(f"{frames} frames of {size} pixels: expected at least one of each")
    if volume.ndim != 3 or len(set(volume.shape)) != 1:
        raise ValueError(f"a cube is needed, not {volume.shape}")
    zoom = common_zoom([reach(volume, level)]) if zoom is None else zoom
    shape = surface(volume, level)
    spins = 360.0 * np.arange(frames) / frames
    pictures = [on_white(picture(shape, colour, size, turned(view, spin), zoom)) for spin in spins]
    if pixel_size:
        pictures = scale_bar(pictures, pixel_size * volume.shape[0] / zoom)
    return pictures


def strip(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """All frames side by side, (size, frames * size, 3) uint8: one image a page can step through."""
    return np.concatenate(list(pictures), axis=1)


def bar_length(width_angstrom: float) -> float:
    """The longest of 1, 2, 5, 10, ... A that is at most ``BAR_SHARE`` of a picture ``width_angstrom`` wide."""
    most = BAR_SHARE * width_angstrom
    power = 10.0 ** (np.floor(np.log10(most)) - 1)  # one decade lower: the logarithm of 99.999... is that of 100
    return float(max(step * power for step in (1, 2, 5, 10, 20, 50) if step * power <= most))


def scale_bar(pictures: Sequence[np.ndarray], width_angstrom: float) -> list[np.ndarray]:
    """Pictures (h, w, 3) uint8 with a bar of a round length, in A, in the lower left corner."""
    length = bar_length(width_angstrom)
    drawn = []
    for one in pictures:
        height, width = one.shape[:2]
        edge, thick = max(width // 32, 2), max(width // 100, 1)
        one = labelled(one, f"{length:g} Å", (edge, height - edge - thick - 2), "ls")
        one[height - edge - thick : height - edge + 1, edge : edge + round(length / width_angstrom * width)] = INK
        drawn.append(one)
    return drawn


def labelled(shown: np.ndarray, text: str, at: tuple[int, int], anchor: str) -> np.ndarray:
    """A copy of the picture (h, w, 3) with a small text; ``at`` is (x, y) of its ``anchor`` (Pillow's two letters)."""
    from PIL import Image, ImageDraw

    page = Image.fromarray(shown)
    ImageDraw.Draw(page).text(at, text, fill=INK, font=_letters(max(shown.shape[1] // 18, 8)), anchor=anchor)
    return np.array(page)


@cache
def _letters(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
