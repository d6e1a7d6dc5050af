"""A line plot in a PNG without matplotlib, whose import and first picture cost as much as a whole backprojection."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

SIZE = (900, 600)
MARGIN = (80, 50, 25, 60)  # left, top, right, bottom
OVERSAMPLE = 2  # drawn twice as large and reduced: smooth lines
COLOURS = ("#5a5a5a", "#1f77b4", "#bbbbbb", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")


def line_plot(
    path: Path,
    lines: Sequence[tuple[str, np.ndarray, np.ndarray]],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_ticks: Sequence[tuple[float, str]],
    levels: Sequence[float] = (),
    title: str = "",
    x_label: str = "",
    y_label: str = "",
) -> None:
    """Draw curves with a legend into a PNG of 900 x 600 pixels.

    Args:
        lines: (name, x, y) per curve; the y are clipped to ``y_range``.
        x_ticks: (place, text).
        levels: grey horizontal lines.
    """
    from PIL import Image, ImageDraw, ImageFont

    scale = OVERSAMPLE
    image = Image.new("RGB", (SIZE[0] * scale, SIZE[1] * scale), "white")
    draw = ImageDraw.Draw(image)
    font, large = (ImageFont.load_default(size=points * scale) for points in (14, 17))
    left, top = MARGIN[0] * scale, MARGIN[1] * scale
    right, bottom = (SIZE[0] - MARGIN[2]) * scale, (SIZE[1] - MARGIN[3]) * scale

    def place(x: np.ndarray | float, y: np.ndarray | float) -> tuple:
        across = (np.asarray(x) - x_range[0]) / (x_range[1] - x_range[0])
        up = (np.clip(y, *y_range) - y_range[0]) / (y_range[1] - y_range[0])
        return left + across * (right - left), bottom - up * (bottom - top)

    for level in (*levels, 0.0):
        height = float(place(0, level)[1])
        draw.line([(left, height), (right, height)], fill="#dddddd", width=scale)
    for tick in np.arange(0.0, y_range[1], 0.2):
        height = float(place(0, tick)[1])
        draw.line([(left - 5 * scale, height), (left, height)], fill="black", width=scale)
        draw.text((left - 9 * scale, height), f"{tick:.1f}", fill="black", font=font, anchor="rm")
    for where, text in x_ticks:
        across = float(place(where, 0)[0])
        draw.line([(across, bottom), (across, bottom + 5 * scale)], fill="black", width=scale)
        draw.text((across, bottom + 9 * scale), text, fill="black", font=font, anchor="mt")
    draw.rectangle([left, top, right, bottom], outline="black", width=scale)
    for number, (name, x, y) in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        keep = np.isfinite(y)
        points = list(zip(*(axis.tolist() for axis in place(x[keep], y[keep])), strict=True))
        draw.line(points, fill=colour, width=(2 if colour != "#bbbbbb" else 1) * scale, joint="curve")
        row = bottom - (18 + 22 * (len(lines) - 1 - number)) * scale  # lower left: curves leave that corner free
        draw.line([(left + 15 * scale, row), (left + 43 * scale, row)], fill=colour, width=2 * scale)
        draw.text((left + 50 * scale, row), name, fill="black", font=font, anchor="lm")
    draw.text(((left + right) / 2, top / 2), title, fill="black", font=large, anchor="mm")
    draw.text(((left + right) / 2, (SIZE[1] - 14) * scale), x_label, fill="black", font=font, anchor="mm")
    draw.text((20 * scale, (top + bottom) / 2), y_label, fill="black", font=font, anchor="lm")
    image.resize(SIZE, Image.Resampling.LANCZOS).save(path, format="PNG")
