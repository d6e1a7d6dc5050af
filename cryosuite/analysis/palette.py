"""Colours for clusters: one list for the plots, the previews and ChimeraX, readable with colour-blind eyes.

The first seven are in the spirit of Okabe and Ito's set (Color Universal Design, 2008), a little softer so that
shaded surfaces look well; further ones are chosen one by one as the candidate farthest from all earlier ones, the
distance taken in OKLab (Ottosson, 2020) for normal, protanope and deuteranope eyes (Vienot, Brettel and Mollon, 1999).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

FIRST = ("#0072b2", "#e08214", "#2a9d77", "#c8553d", "#56b4e9", "#b565a7", "#d9b310")
GREY = "#9aa0a6"  # particles left out, and clusters without a colour of their own
INK = "#24292f"
OWN_COLOURS = 64  # beyond this the list repeats: no eye tells more apart

# linear-light sRGB as seen by a protanope and by a deuteranope (Vienot et al. 1999)
_PROTAN = np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]])
_DEUTAN = np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]])
_LMS = np.array([[0.4122214708, 0.5363325363, 0.0514459929],
                 [0.2119034982, 0.6806995451, 0.1073969566],
                 [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
_LAB = np.array([[0.2104542553, 0.7936177850, -0.0040720468],
                 [1.9779984951, -2.4285922050, 0.4505937099],
                 [0.0259040371, 0.7827717662, -0.8086757660]])  # fmt: skip


def hex_to_rgb(colour: str) -> np.ndarray:
    """``#rrggbb`` -> (3,) float64 sRGB values in 0..1."""
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255.0


def rgb_to_hex(rgb: np.ndarray) -> str:
    """(3,) sRGB values in 0..1 -> ``#rrggbb``."""
    return "#" + "".join(f"{int(round(255 * float(v))):02x}" for v in np.clip(rgb, 0, 1))


def _linear(srgb: np.ndarray) -> np.ndarray:
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def oklab(srgb: np.ndarray, eye: np.ndarray | None = None) -> np.ndarray:
    """sRGB (..., 3) in 0..1 -> OKLab (..., 3), optionally as seen by a colour-blind ``eye`` (3, 3)."""
    light = _linear(srgb)
    if eye is not None:
        light = np.clip(light @ eye.T, 0.0, None)
    return np.cbrt(light @ _LMS.T) @ _LAB.T


def distances(colours: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How far two lists of sRGB colours (n, 3), (m, 3) are apart: (n, m), the mean over three kinds of eyes.

    Normal sight counts twice; the smallest of the colour-blind distances once, so that no pair is lost on them.
    """
    apart = [
        np.linalg.norm(oklab(colours, eye)[:, None] - oklab(others, eye)[None], axis=-1)
        for eye in (None, _PROTAN, _DEUTAN)
    ]
    return (2.0 * apart[0] + np.minimum(apart[1], apart[2])) / 3.0


@lru_cache(maxsize=1)
def _all_colours() -> tuple[str, ...]:
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 23)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = oklab(grid)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    # neither nearly black nor nearly white, neither grey nor neon
    grid = grid[(lab[:, 0] > 0.47) & (lab[:, 0] < 0.84) & (chroma > 0.07) & (chroma < 0.16)]
    chosen = [hex_to_rgb(c) for c in FIRST]
    nearest = distances(grid, np.array(chosen)).min(axis=1)
    while len(chosen) < OWN_COLOURS:
        best = int(nearest.argmax())
        chosen.append(grid[best])
        nearest = np.minimum(nearest, distances(grid, grid[best : best + 1])[:, 0])
    return tuple(rgb_to_hex(c) for c in chosen)


def palette(count: int) -> list[str]:
    """``count`` colours as ``#rrggbb``; the first n of a longer palette are the palette of n."""
    colours = _all_colours() if count > len(FIRST) else FIRST
    return [colours[i % len(colours)] for i in range(count)]
