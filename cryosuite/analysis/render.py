"""Pictures of volumes without a display: shaded isosurfaces (see ``mesh``), central slices, levels to show maps at."""

from __future__ import annotations

import numpy as np

from cryosuite.analysis.mesh import VIEW, Light, cubic, picture, surface, turned, without_dust

DALTON_PER_CUBIC_ANGSTROM = 1 / 1.21  # protein of 1.35 g/ml


def contour_level(volume: np.ndarray, pixel_size: float | None = None, mass_kda: float | None = None) -> float:
    """A level to show a map at, in the units of the map.

    With ``mass_kda`` the level encloses the volume of that much protein (1.21 A^3 per Da; needs ``pixel_size`` in A).
    Otherwise, with the solvent's median m and spread s (from the median absolute deviation) and the mean p of the
    densest half percent of voxels: m + max(4 s, 0.3 (p - m)), held between 0.2 and 15 percent of the box.

    Args:
        volume: (z, y, x).

    Returns:
        The level; 0.0 for a constant map.
    """
    values = volume[np.isfinite(volume)].ravel()
    if not len(values) or values.min() == values.max():
        return 0.0
    if mass_kda is not None and pixel_size is not None:
        voxels = mass_kda * 1000.0 / DALTON_PER_CUBIC_ANGSTROM / pixel_size**3
        return float(np.quantile(values, 1.0 - min(voxels / volume.size, 0.5)))
    middle = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(values - middle)))
    densest = float(values[values >= np.quantile(values, 0.995)].mean())
    level = middle + max(4.0 * spread, 0.3 * (densest - middle))
    low, high = np.quantile(values, [0.85, 0.998])
    return float(np.clip(level, low, high))


def isosurface(
    volume: np.ndarray,
    level: float,
    colour: str = "#4d7fb5",
    pixels: int = 256,
    view: tuple[float, float, float] = VIEW,
    zoom: float = 1.0,
    light: Light | None = None,
) -> np.ndarray:
    """A shaded picture of the surface where the map crosses ``level``.

    Args:
        volume: (z, y, x), a cube.
        level: contour level in the map's units.
        colour: ``#rrggbb`` of the surface.
        pixels: side of the picture.
        view: Euler angles x, y, z in degrees that turn the map into the picture.
        zoom: > 1 shows a smaller part of the box, larger.

    Returns:
        (pixels, pixels, 4) uint8, RGB and alpha; wholly transparent where no density reaches the level.
    """
    return picture(surface(volume, level), colour, pixels, turned(view), zoom, light)


def slices(volume: np.ndarray, pixels: int = 256) -> np.ndarray:
    """The three central planes side by side (across z, y and x), grey: (pixels, 3 pixels + gaps) uint8."""
    volume = np.nan_to_num(np.asarray(volume, np.float32))
    middle = volume.shape[0] // 2
    planes = [volume[middle], volume[:, middle], volume[:, :, middle]]
    low, high = np.quantile(np.concatenate([p.ravel() for p in planes]), [0.005, 0.998])
    grey = [np.clip((p - low) / max(high - low, 1e-12), 0, 1) for p in planes]
    size = volume.shape[0]
    matrix = cubic(size, pixels, (np.arange(pixels) + 0.5) * size / pixels - 0.5)
    shown = [np.clip(matrix @ g @ matrix.T, 0, 1) for g in grey]
    gap = np.ones((pixels, max(pixels // 64, 1)), np.float32)
    strip = np.concatenate([shown[0], gap, shown[1], gap, shown[2]], axis=1)
    return np.round(255 * strip).astype(np.uint8)


def reach(volume: np.ndarray, level: float) -> float:
    """How far the map above ``level`` extends from the centre voxel, as a fraction of half the box; 0 when empty."""
    inside = np.nonzero(without_dust(np.nan_to_num(volume), level) > level)
    if not len(inside[0]):
        return 0.0
    middle = volume.shape[0] // 2
    radius = np.sqrt(sum((axis - middle) ** 2.0 for axis in inside))
    return float(np.quantile(radius, 0.999)) / middle


def common_zoom(reaches: list[float]) -> float:
    """One zoom for several maps: the widest fills nine tenths of its picture and sizes stay comparable."""
    widest = max(reaches, default=0.0)
    return float(np.clip(0.92 / widest, 0.9, 3.0)) if widest else 1.0


def on_white(picture: np.ndarray) -> np.ndarray:
    """RGBA uint8 (h, w, 4) -> RGB uint8 (h, w, 3) on white."""
    alpha = picture[..., 3:].astype(np.float32) / 255
    return np.round(picture[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
