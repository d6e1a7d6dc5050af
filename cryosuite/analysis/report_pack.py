"""What a page carries: columns of numbers as short binary text, and values as JSON that no name can break out of."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from cryosuite.analysis.particle_table import Column
from cryosuite.formats import json_text

MISSING8, MISSING16 = 255, 65535
FAR = 40.0  # a range this many times that of the middle 99.8 % is kept in full precision


def packed(column: Column) -> tuple[dict[str, Any], str]:
    """How the page reads a column, and its values as base64 of little-endian bytes.

    Whole numbers of a range up to 254 or 65,534 and codes of names are exact (``u8``, ``u16``); other numbers are
    rounded to 1/65,534 of their range (``u16``), or float32 (``f32``) where a few far values would spoil that; 0, 1, 2,
    ... need no values (``count``). A number is ``low + step * stored``; the largest integer (NaN in f32) stands for
    unknown. ``shown`` is the range of colours: the middle 96 %.
    """
    values = np.asarray(column.values, np.float64)
    count = len(values) > 1 and not column.names and bool((values == np.arange(len(values))).all())
    if column.names:
        values = np.where(values >= 0, values, np.nan)
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    shown = [float(v) for v in np.percentile(known, [2, 98])] if len(known) else [0.0, 0.0]
    if shown[0] == shown[1]:
        shown = [low, high]
    head: dict[str, Any] = {
        "name": column.name, "unit": column.unit, "about": column.about, "cyclic": column.cyclic,
        "names": list(column.names), "low": low, "high": high, "shown": shown, "constant": low == high,
    }  # fmt: skip
    whole = bool(len(known)) and bool((known == np.rint(known)).all())
    head["whole"] = whole
    if count:
        return head | {"kind": "count", "step": 1.0}, ""
    if len(known) and (_huge(low, high) if whole else _far(known, low, high)):
        return head | {"kind": "f32", "step": 1.0}, _base64(np.asarray(values, "<f4"))
    if whole and high - low < MISSING16:
        kind, step = ("u8" if high - low < MISSING8 else "u16"), 1.0
    elif whole:
        return head | {"kind": "u32", "low": 0.0, "step": 1.0}, _base64(np.nan_to_num(values, nan=2**32 - 1), "<u4")
    else:
        kind, step = "u16", (high - low) / (MISSING16 - 1) or 1.0
    missing = MISSING8 if kind == "u8" else MISSING16
    finite = np.isfinite(values)
    stored = np.where(finite, np.rint((np.where(finite, values, low) - low) / step), missing)
    return head | {"kind": kind, "step": step}, _base64(stored, "u1" if kind == "u8" else "<u2")


def _far(known: np.ndarray, low: float, high: float) -> bool:
    inner = np.percentile(known, [0.1, 99.9])
    return high - low > FAR * max(float(inner[1] - inner[0]), 1e-30)


def _huge(low: float, high: float) -> bool:
    """Whole numbers that no 32 bits hold."""
    return high - low >= MISSING16 and (low < 0 or high >= 2**32 - 1)


def _base64(values: np.ndarray, kind: str | None = None) -> str:
    return base64.b64encode(np.ascontiguousarray(values.astype(kind or values.dtype)).tobytes()).decode("ascii")


def script_json(value: Any) -> str:
    """JSON for the inside of a <script> element: no text in it can end the element or open a comment.

    Numbers that are not finite become null.
    """
    text = json.dumps(json_text.finite(value), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def escaped(value: object) -> str:
    """Any value as text of an HTML page or attribute."""
    return html.escape(str(value), quote=True)


def data_script(name: str, text: str, kind: str = "text/plain") -> str:
    """A <script> element that only holds data; ``text`` must be base64 or come from ``script_json``."""
    return f'<script type="{kind}" id="{escaped(name)}">{text}</script>\n'


def thinned(values: Iterable[tuple[float, float]], most: int = 800) -> list[list[float]]:
    """A curve [[x, ...], [y, ...]] of at most ``most`` points: means of neighbours, so that noise stays visible."""
    pairs = np.array([(x, y) for x, y in values], np.float64).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    if len(pairs) > most:
        edges = np.linspace(0, len(pairs), most + 1).astype(int)[:-1]
        pairs = np.add.reduceat(pairs, edges, axis=0) / np.diff([*edges, len(pairs)])[:, None]
    return [[float(f"{v:.6g}") for v in column] for column in pairs.T]
