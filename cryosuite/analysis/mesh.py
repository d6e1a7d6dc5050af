"""Surfaces of volumes as triangles, and their shaded pictures from any side, on the CPU and without a display.

The triangles are scikit-image's marching cubes (Lewiner et al. 2003); what does not depend on the view (normals, the
soft shadow in the clefts) is found once per surface, and each picture is then a z-buffer in numpy. Why not a kept
library for the picture too, measured on one core for maps of 64 and 128 voxels: matplotlib's ``plot_trisurf`` takes
0.07-0.11 s for a picture of 320 pixels but knows neither a z-buffer nor shadows nor smooth shading, so that touching
parts run into each other; pyvista needs VTK (100 MB and a GL driver).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from cryosuite.analysis.palette import hex_to_rgb

VOXELS = 96  # on a side of the map that a surface is drawn from
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


@dataclass(frozen=True)
class Surface:
    """Triangles of the surface where a map crosses a level.

    Attributes:
        points: (n, 3) float32, x y z from voxel D//2 in voxels. normals: (n, 3), outwards, of length 1.
        shadow: (n,) 0..1, how much density stands around the point. faces: (m, 3) rows of ``points``.
        size: voxels on a side of the box the points are counted in.
    """

    points: np.ndarray
    normals: np.ndarray
    shadow: np.ndarray
    faces: np.ndarray
    size: int


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


def cubic(size: int, count: int, at: np.ndarray) -> np.ndarray:
    """(count, size) matrix that samples a row of voxels at the places ``at`` (count,) with Keys' cubic (1981)."""
    distance = np.abs(at[:, None] - np.arange(size)[None])
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1.0
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4.0 * distance + 2.0
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0)).astype(np.float32)


def resample(volume: np.ndarray, voxels: int = VOXELS) -> np.ndarray:
    """The map on ``voxels`` on a side about the same centre voxel; what is not a number as solvent.

    Larger maps are smoothed first; smaller ones are enlarged at most threefold.
    """
    volume = np.nan_to_num(np.asarray(volume, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    size = volume.shape[0]
    voxels = min(voxels, 3 * size)
    if voxels == size:
        return volume
    if size > voxels:
        volume = ndimage.gaussian_filter(volume, 0.4 * size / voxels)
    matrix = cubic(size, voxels, (np.arange(voxels) - voxels // 2) * size / voxels + size // 2)
    for _ in range(3):  # one axis after the other; each turn brings the next axis to the front
        volume = np.moveaxis(np.tensordot(matrix, volume, axes=(1, 0)), 0, -1)
    return np.ascontiguousarray(volume)


def surface(volume: np.ndarray, level: float, voxels: int = VOXELS) -> Surface:
    """The surface of a cube (z, y, x) at ``level``, without specks; no triangles where nothing reaches the level."""
    from skimage.measure import marching_cubes

    volume = without_dust(resample(volume, voxels), level)
    size = volume.shape[0]
    # closed where the density leaves the box
    padded = np.pad(volume, 1, constant_values=min(float(np.median(volume)), level - 1e-6 * max(abs(level), 1.0)))
    if not volume.max() > level or not padded.min() < level:
        none = np.zeros((0, 3), np.float32)
        return Surface(none, none, none[:, 0], none.astype(np.int64), size)
    found, faces, _, _ = marching_cubes(padded, level, allow_degenerate=False)
    at = found.T - 1.0  # (3, n): z, y, x in voxels
    smooth = ndimage.gaussian_filter(volume, 0.6)
    slope = [ndimage.map_coordinates(axis, at, order=1, mode="nearest") for axis in np.gradient(smooth)]
    normals = -np.stack(slope[::-1], axis=-1)
    normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-9)
    solid = np.clip((volume - 0.6 * level) / max(0.8 * abs(level), 1e-12), 0, 1) if level > 0 else volume > level
    out = at + 0.02 * size * normals.T[::-1]
    shadow = np.zeros(at.shape[1], np.float32)
    for reach, weight in ((0.02, 0.4), (0.05, 0.6)):
        blurred = ndimage.gaussian_filter(solid.astype(np.float32), reach * size)
        shadow += weight * ndimage.map_coordinates(blurred, out, order=1, mode="nearest")
    points = (found[:, ::-1] - 1.0 - size // 2).astype(np.float32)
    return Surface(points, normals.astype(np.float32), shadow, faces.astype(np.int64), size)


def turned(view: tuple[float, float, float] = VIEW, spin: float = 0.0) -> np.ndarray:
    """(3, 3) matrix that turns the map into the picture's frame (x right, y up, z to the eye).

    Args:
        view: Euler angles about x, y, z, degrees. spin: a further turn about the picture's vertical, degrees.
    """
    return (
        Rotation.from_euler("y", spin, degrees=True).as_matrix()
        @ Rotation.from_euler("xyz", view, degrees=True).as_matrix()
    )


def picture(
    shape: Surface,
    colour: str = "#4d7fb5",
    pixels: int = 256,
    turn: np.ndarray | None = None,
    zoom: float = 1.0,
    light: Light | None = None,
) -> np.ndarray:
    """A shaded picture of a surface: (pixels, pixels, 4) uint8, wholly transparent where there is none.

    Args:
        turn: (3, 3) from ``turned``; None: VIEW. zoom: > 1 shows a smaller part of the box, larger.
    """
    light, turn = light or Light(), turned() if turn is None else turn
    fine = 2 * pixels  # drawn twice as large and averaged: smooth edges
    drawn = np.zeros((fine, fine, 4), np.float32)
    if len(shape.faces):
        at = shape.points @ turn.T.astype(np.float32) * np.float32(zoom)
        # the centre voxel lies in the middle of the picture
        scale, centre = np.float32(fine / shape.size), np.float32((fine - 1) / 2)
        flat = np.stack([centre + scale * at[:, 0], centre - scale * at[:, 1], shape.size / 2 - at[:, 2]], axis=-1)
        face, weight, depth = _rasterise(flat, shape.faces, fine)
        found = face >= 0
        corners = shape.faces[face[found]]  # (p, 3)
        blend = weight[found][..., None]
        normal = (shape.normals[corners] * blend).sum(axis=1) @ turn.T.astype(np.float32)
        shadow = (shape.shadow[corners] * blend[..., 0]).sum(axis=1)
        rgb = _shade(normal, shadow, depth[found], shape.size, colour, light)
        drawn[found, :3] = rgb * (1.0 - light.outline * _outline(depth, found, shape.size)[found])[:, None]
        drawn[found, 3] = 1.0
    small = drawn.reshape(pixels, 2, pixels, 2, 4).mean(axis=(1, 3))
    small[..., :3] /= np.maximum(small[..., 3:], 1e-6)
    return np.round(255 * np.clip(small, 0, 1)).astype(np.uint8)


def _rasterise(flat: np.ndarray, faces: np.ndarray, fine: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nearest triangle of each pixel.

    Args:
        flat: (n, 3) column, row (pixels) and depth of the points. faces: (m, 3).

    Returns:
        (fine, fine) row of ``faces`` or -1, (fine, fine, 3) weights of its corners, (fine, fine) depth.
    """
    a, b, c = (flat[faces[:, i]] for i in range(3))
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    low = np.ceil(np.minimum(np.minimum(a, b), c)[:, :2]).astype(np.int32)
    high = np.floor(np.maximum(np.maximum(a, b), c)[:, :2]).astype(np.int32)
    wide = high - low
    # marching cubes winds all triangles one way: those that show their back lie behind others
    shown = (area < -1e-9) & (wide >= 0).all(1) & (high >= 0).all(1) & (low < fine).all(1)
    pixel, depth, face, weight = [], [], [], []
    for row in range(int(wide[shown, 1].max(initial=-1)) + 1):
        for column in range(int(wide[shown, 0].max(initial=-1)) + 1):
            one = np.flatnonzero(shown & (wide[:, 0] >= column) & (wide[:, 1] >= row))
            x, y = low[one, 0] + column, low[one, 1] + row
            u = ((b[one, 0] - x) * (c[one, 1] - y) - (b[one, 1] - y) * (c[one, 0] - x)) / area[one]
            v = ((c[one, 0] - x) * (a[one, 1] - y) - (c[one, 1] - y) * (a[one, 0] - x)) / area[one]
            w = 1.0 - u - v
            inside = (np.minimum(np.minimum(u, v), w) >= -1e-6) & (x >= 0) & (x < fine) & (y >= 0) & (y < fine)
            one, x, y, u, v, w = (values[inside] for values in (one, x, y, u, v, w))
            pixel.append(y * fine + x)
            depth.append(u * a[one, 2] + v * b[one, 2] + w * c[one, 2])
            face.append(one)
            weight.append(np.stack([u, v, w], axis=-1))
    best = np.full(fine * fine, -1, np.int64)
    deep, share = np.zeros(fine * fine, np.float32), np.zeros((fine * fine, 3), np.float32)
    if pixel:
        pixel, depth, face, weight = map(np.concatenate, (pixel, depth, face, weight))
        order = np.argsort(-depth, kind="stable")  # the nearest is written last and stays
        pixel = pixel[order]
        best[pixel], deep[pixel], share[pixel] = face[order], depth[order], weight[order]
    return best.reshape(fine, fine), share.reshape(fine, fine, 3), deep.reshape(fine, fine)


def _outline(depth: np.ndarray, found: np.ndarray, size: int) -> np.ndarray:
    """0..1: how strongly a pixel lies on an edge of the surface (a jump in depth of more than 4 % of the box)."""
    padded = np.where(found, depth, 2.0 * size)
    jump = ndimage.maximum_filter(padded, 3) - padded
    return np.where(found, np.clip(jump / (0.04 * size) - 1.0, 0.0, 1.0), 0.0)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.maximum(np.linalg.norm(vector, axis=-1, keepdims=True), 1e-9)


def _shade(
    normal: np.ndarray, shadow: np.ndarray, depth: np.ndarray, size: int, colour: str, light: Light
) -> np.ndarray:
    """sRGB (p, 3) of points of a surface with normals (p, 3) in the picture's frame."""
    normal = _unit(normal)
    open_sky = np.clip(1.25 - light.occlusion * 1.5 * shadow, 0.15, 1.0)
    key, fill = _unit(np.array(light.key)), _unit(np.array(light.fill))
    half = _unit(key + np.array([0.0, 0.0, 1.0]))
    bright = light.ambient * open_sky + light.key_strength * np.clip(normal @ key, 0, 1) * (0.35 + 0.65 * open_sky)
    bright += light.fill_strength * np.clip(normal @ fill, 0, 1) * open_sky
    rgb = hex_to_rgb(colour) * bright[:, None]
    rgb += light.gloss * (np.clip(normal @ half, 0, 1) ** 24 * open_sky)[:, None]
    near, far = np.quantile(depth, [0.02, 0.98])
    haze = light.haze * np.clip((depth - near) / max(far - near, 0.15 * size), 0, 1)
    return rgb * (1 - haze)[:, None] + haze[:, None]
