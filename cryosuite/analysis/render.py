"""Pictures of volumes without a display: shaded isosurfaces and central slices, drawn with numpy and scipy alone.

The volume is turned into the view with a cubic spline, enlarged to the picture, and each column of it is followed to
its first crossing of the level (an orthographic ray caster). Normals are gradients at the hit, and the soft shadow in
the clefts is an ambient occlusion read from the blurred occupancy. Twice the size, then averaged: smooth edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from cryosuite.analysis.palette import hex_to_rgb

DALTON_PER_CUBIC_ANGSTROM = 1 / 1.21  # protein of 1.35 g/ml
FINEST = 96  # voxels on a side that a preview is drawn from; larger maps are averaged down
VIEW = (-62.0, 0.0, 28.0)  # degrees: looking a little from above, from the side


@dataclass(frozen=True)
class Light:
    """How a surface is lit; directions in the picture's frame (x right, y up, z to the eye)."""

    key: tuple[float, float, float] = (-0.45, 0.65, 0.75)
    fill: tuple[float, float, float] = (0.75, -0.1, 0.55)
    ambient: float = 0.5
    key_strength: float = 0.62
    fill_strength: float = 0.2
    gloss: float = 0.13
    occlusion: float = 0.85
    haze: float = 0.2
    outline: float = 0.55


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


def without_dust(volume: np.ndarray, level: float, fraction: float = 0.02) -> np.ndarray:
    """The map with specks pushed below the level: pieces smaller than ``fraction`` of the largest one."""
    middle = float(np.median(volume))
    # a little below the level: the spline between voxels overshoots, and specks have peaks there
    pieces, count = ndimage.label(volume > middle + 0.75 * (level - middle))
    if count < 2:
        return volume
    sizes = np.bincount(pieces.ravel())[1:]
    speck = np.concatenate([[False], sizes < fraction * sizes.max()])[pieces]
    # the slopes of a speck go with it
    near = ndimage.binary_dilation(speck, iterations=2) & ~((pieces > 0) & ~speck)
    return np.where(near, np.minimum(volume, middle), volume)


def _shrink(volume: np.ndarray) -> np.ndarray:
    """The map with at most FINEST voxels on a side; non-finite voxels as solvent."""
    volume = np.nan_to_num(np.asarray(volume, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    if volume.shape[0] <= FINEST:
        return volume
    return ndimage.zoom(
        ndimage.gaussian_filter(volume, 0.4 * volume.shape[0] / FINEST), FINEST / volume.shape[0], order=1
    )


def _turn(volume: np.ndarray, view: tuple[float, float, float], scale: float) -> np.ndarray:
    """The map (z, y, x) sampled on a grid of the view's axes: (depth from the eye, row downwards, column)."""
    size = volume.shape[0]
    middle = size // 2
    steps = (np.arange(size) - middle) / scale
    # picture axes: column = +x, row = -y (downwards), depth = -z (away from the eye)
    turn = Rotation.from_euler("xyz", view, degrees=True).as_matrix()
    depth, row, column = np.meshgrid(-steps, -steps, steps, indexing="ij")
    points = np.stack([column, row, depth], axis=-1).reshape(-1, 3) @ turn  # (x, y, z) in the map
    at = points[:, ::-1].T + middle
    return ndimage.map_coordinates(volume, at, order=3, mode="grid-constant").reshape(volume.shape).astype(np.float32)


def _enlarge(size: int, pixels: int) -> np.ndarray:
    """(pixels, size) matrix that samples a row of voxels at picture pixels with Keys' cubic."""
    at = (np.arange(pixels) + 0.5) * size / pixels - 0.5
    distance = np.abs(at[:, None] - np.arange(size)[None])
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1.0
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4.0 * distance + 2.0
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0)).astype(np.float32)


def _first_hit(volume: np.ndarray, level: float, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Depth (in voxels) of the first crossing of the level per pixel, and whether there is one: (pixels, pixels)."""
    size = volume.shape[0]
    matrix = _enlarge(size, pixels)
    wide = volume @ matrix.T  # (depth, row, pixels)
    depth = np.zeros((pixels, pixels), np.float32)
    found = np.zeros((pixels, pixels), bool)
    rows_with = np.flatnonzero((wide > 0.7 * level if level > 0 else wide > level).any(axis=(0, 2)))
    if not len(rows_with):
        return depth, found
    first = max(int((rows_with[0] - 2) * pixels / size), 0)
    last = min(int((rows_with[-1] + 3) * pixels / size) + 1, pixels)
    for start in range(first, last, 64):
        rows = slice(start, min(start + 64, last))
        block = np.einsum("rk,dkc->drc", matrix[rows], wide, optimize=True)  # (depth, rows, pixels)
        inside = block > level
        hit = inside.any(axis=0)
        at = inside.argmax(axis=0)
        here = np.take_along_axis(block, at[None], 0)[0]
        before = np.take_along_axis(block, np.maximum(at - 1, 0)[None], 0)[0]
        part = np.where(at > 0, (here - level) / np.maximum(here - before, 1e-12), 0.0)
        depth[rows], found[rows] = at - np.clip(part, 0, 1), hit
    return depth, found


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.maximum(np.linalg.norm(vector, axis=-1, keepdims=True), 1e-9)


def _outline(depth: np.ndarray, found: np.ndarray, size: int) -> np.ndarray:
    """0..1: how strongly a pixel lies on an edge of the surface (a jump in depth of more than 4 % of the box)."""
    padded = np.where(found, depth, 2.0 * size)
    jump = ndimage.maximum_filter(padded, 3) - padded
    return np.where(found, np.clip(jump / (0.04 * size) - 1.0, 0.0, 1.0), 0.0)


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
    light = light or Light()
    volume = without_dust(_shrink(volume), level)
    size, fine = volume.shape[0], 2 * pixels
    turned = _turn(volume, view, zoom)
    depth, found = _first_hit(turned, level, fine)
    picture = np.zeros((fine, fine, 4), np.float32)
    if found.any():
        row, column = np.nonzero(found)
        at = np.stack([depth[found], (row + 0.5) * size / fine - 0.5, (column + 0.5) * size / fine - 0.5])
        picture[found, :3] = _shade(turned, level, at, colour, light)
        picture[found, 3] = 1.0
        edge = _outline(depth, found, size)[found]
        picture[found, :3] *= (1.0 - light.outline * edge)[:, None]
    picture[..., :3] *= picture[..., 3:]
    small = picture.reshape(pixels, 2, pixels, 2, 4).mean(axis=(1, 3))
    small[..., :3] /= np.maximum(small[..., 3:], 1e-6)
    return np.round(255 * np.clip(small, 0, 1)).astype(np.uint8)


def _shade(turned: np.ndarray, level: float, at: np.ndarray, colour: str, light: Light) -> np.ndarray:
    """sRGB (n, 3) of surface points ``at`` (3, n: depth, row, column) of a map in the view's frame."""
    size = turned.shape[0]
    smooth = ndimage.gaussian_filter(turned, 0.6)
    slope = [ndimage.map_coordinates(g, at, order=1, mode="nearest") for g in np.gradient(smooth)]
    # outwards is against the gradient; picture frame x right, y up, z to the eye
    normal = _unit(np.stack([-slope[2], slope[1], slope[0]], axis=-1))
    solid = (
        np.clip((turned - 0.6 * level) / max(0.8 * abs(level), 1e-12), 0, 1) if level > 0 else (turned > level) * 1.0
    )
    out = at + 0.02 * size * np.stack([-normal[:, 2], -normal[:, 1], normal[:, 0]])
    shadow = np.zeros(at.shape[1])
    for reach, weight in ((0.02, 0.4), (0.05, 0.6)):
        blurred = ndimage.gaussian_filter(solid.astype(np.float32), reach * size)
        shadow += weight * ndimage.map_coordinates(blurred, out, order=1, mode="nearest")
    open_sky = np.clip(1.25 - light.occlusion * 1.5 * shadow, 0.15, 1.0)

    key, fill = _unit(np.array(light.key)), _unit(np.array(light.fill))
    toward = np.clip(normal @ key, 0, 1)
    half = _unit(key + np.array([0.0, 0.0, 1.0]))
    bright = light.ambient * open_sky + light.key_strength * toward * (0.35 + 0.65 * open_sky)
    bright += light.fill_strength * np.clip(normal @ fill, 0, 1) * open_sky
    base = hex_to_rgb(colour)
    rgb = base * bright[:, None] + light.gloss * (np.clip(normal @ half, 0, 1) ** 24 * open_sky)[:, None]
    near, far = np.quantile(at[0], [0.02, 0.98])
    haze = light.haze * np.clip((at[0] - near) / max(far - near, 0.15 * size), 0, 1)
    return rgb * (1 - haze)[:, None] + haze[:, None]


def slices(volume: np.ndarray, pixels: int = 256) -> np.ndarray:
    """The three central planes side by side (across z, y and x), grey: (pixels, 3 pixels + gaps) uint8."""
    volume = np.nan_to_num(np.asarray(volume, np.float32))
    middle = volume.shape[0] // 2
    planes = [volume[middle], volume[:, middle], volume[:, :, middle]]
    low, high = np.quantile(np.concatenate([p.ravel() for p in planes]), [0.005, 0.998])
    grey = [np.clip((p - low) / max(high - low, 1e-12), 0, 1) for p in planes]
    matrix = _enlarge(volume.shape[0], pixels)
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
