"""What a user should hear about a map before a network enhances it: masked, sharpened, too coarse, no voxel size."""

from __future__ import annotations

import numpy as np
import torch

from cryosuite.data.map_grid import MapGrid
from cryosuite.errors import notice
from cryosuite.kernels.map_norm import auto_mask, quantile
from cryosuite.metrics.model_cc import d99
from cryosuite.metrics.model_map import frequency_squared

__all__ = ["MapFacts", "guinier_b", "inspect_map", "warn"]

ZEROS = 0.3  # of the voxels of the ellipsoid in the box: exactly one value there means a mask
SHARP = 20.0  # A^2: maps as they come from a reconstruction fall faster than this
FROM = 10.0  # A, where the Guinier fit begins
TO = 5.0  # A, where it ends at the latest
COARSEST = 10.0  # A, resolution beyond which the networks were shown nothing
CROP = 192  # voxels of the middle of a map that spectra are measured on


class MapFacts:
    """Numbers of a map that tell how it was made.

    Attributes:
        empty: share of the voxels in the box's ellipsoid that all have the map's commonest value, if it is 0.
        b: B factor of the fall of amplitudes from 10 A on, A^2, NaN where the map is too coarse to tell.
        detail: A, resolution that holds .99 of the map's correlation with itself.
        inverted: whether the tail of low values is the longer one.
        plain_voxel: whether the header says exactly 1 A, which is also what programs write that do not know.
    """

    def __init__(self, grid: MapGrid) -> None:
        values = torch.from_numpy(grid.data)
        self.empty = _empty(grid.data)
        low, middle, high = (quantile(values, q) for q in (0.0005, 0.5, 0.9995))
        self.inverted = middle - low > 1.5 * (high - middle)
        self.plain_voxel = not grid.corrected and all(abs(size - 1.0) < 1e-6 for size in grid.voxel)
        crop = _middle(grid.data)
        solid = min(crop.shape) >= 4 and float(crop.std()) > 0
        self.b = guinier_b(crop, grid.voxel) if solid else float("nan")
        self.detail = d99(crop - crop.mean(), grid.voxel) if solid else float("nan")


def inspect_map(grid: MapGrid, task: str, voxel: float, resolution: float | None = None) -> MapFacts:
    """Measure a map and tell the user what stands against enhancing it.

    Args:
        task: what will be done. voxel: A, of the network. resolution: A, where it is known.
    """
    facts = MapFacts(grid)
    for message in warn(facts, grid, task, voxel, resolution):
        notice(message)
    return facts


def warn(facts: MapFacts, grid: MapGrid, task: str, voxel: float, resolution: float | None) -> list[str]:
    """Sentences for the user."""
    path, coarse = grid.path, max(grid.voxel)
    out = []
    if facts.plain_voxel and task != "wedge":
        out.append(f"{path}: the header says exactly 1 A per voxel; if that is a stand-in, give the true one (--apix)")
    if facts.empty > ZEROS:
        out.append(
            f"{path}: {100 * facts.empty:.0f} % of the voxels are exactly 0: the map was masked. What the mask cut off "
            "cannot come back, and its edge may be taken for density: give the unmasked map if there is one"
        )
    if facts.inverted:
        out.append(
            f"{path}: the lowest values stand out more than the highest: if the molecule is dark, multiply by -1"
        )
    if task == "wedge":
        if coarse < voxel / 2:
            out.append(f"{path}: voxels of {coarse:.3g} A; the network works at {voxel:g} A and adds nothing finer")
        return out
    if np.isfinite(facts.b) and facts.b < SHARP:
        out.append(
            f"{path}: amplitudes hardly fall from 10 A on (B about {facts.b:.0f} A^2): the map seems to be sharpened "
            "already. Give the unsharpened map: noise that sharpening raised may be taken for density"
        )
    limit = max(2 * coarse, resolution or 0.0, facts.detail if np.isfinite(facts.detail) else 0.0)
    if limit > COARSEST:
        out.append(
            f"{path}: holds no detail finer than about {limit:.0f} A. The network was trained on maps of 2.5 to 8 A "
            "and can add nothing that is known to be true here: expect a smooth map at best, and trust none of it"
        )
    elif 2 * coarse > 4.0:
        out.append(
            f"{path}: voxels of {coarse:.3g} A hold nothing finer than {2 * coarse:.3g} A, neither before nor after: "
            "the output lies on the same grid"
        )
    return out


def guinier_b(values: np.ndarray, voxel: tuple[float, float, float]) -> float:
    """B factor (A^2) of a map (z, y, x) with voxels (x, y, z): -4 times the slope of ln |F| over 1/d^2.

    From 10 A to 5 A, or to 2.5 voxels if they are coarser (NaN above 7 A), inside the map's own mask so that noise in
    the solvent does not flatten it. A molecule's own amplitudes rise and fall there, by some 20 A^2 at most.
    """
    end = max(TO, 2.5 * max(voxel))
    if end > 0.7 * FROM:
        return float("nan")
    volume = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    mask = auto_mask(volume, float(np.mean(voxel)))
    if not bool(mask.any()):
        return float("nan")
    outside = volume[~mask]
    volume = (volume - (outside.mean() if len(outside) else volume.mean())) * _soft(mask)
    power = torch.fft.rfftn(volume).abs().square().flatten().double()
    square = frequency_squared(values.shape, voxel).flatten().double()
    first, last = 1 / FROM**2, 1 / end**2
    bins = ((square - first) / (last - first) * 12).floor().long()
    chosen = (bins >= 0) & (bins < 12)
    count = torch.bincount(bins[chosen], minlength=12)
    sums = torch.bincount(bins[chosen], power[chosen], minlength=12)
    good = ((count > 0) & (sums > 0)).numpy()
    if good.sum() < 4:
        return float("nan")
    centre = first + (np.arange(12) + 0.5) * (last - first) / 12
    amplitude = 0.5 * np.log(sums.numpy()[good] / count.numpy()[good])
    return float(-4 * np.polyfit(centre[good], amplitude, 1)[0])


def _empty(data: np.ndarray) -> float:
    """Share of exact zeros in the ellipsoid that touches the faces of the box (spheres leave the corners at 0)."""
    axes = [((np.arange(n) + 0.5) / n * 2 - 1) ** 2 for n in data.shape]
    inside = zeros = 0
    for plane, z in zip(data, axes[0], strict=True):
        where = z + axes[1][:, None] + axes[2] < 0.9
        inside += int(where.sum())
        zeros += int((plane[where] == 0).sum())
    return zeros / max(inside, 1)


def _middle(data: np.ndarray) -> np.ndarray:
    """The middle of a large map."""
    return data[tuple(slice(max(0, (n - CROP) // 2), max(0, (n - CROP) // 2) + CROP) for n in data.shape)]


def _soft(mask: torch.Tensor) -> torch.Tensor:
    """A bool mask with an edge some voxels wide."""
    soft = mask.float()[None, None]
    for _ in range(2):
        soft = torch.nn.functional.avg_pool3d(soft, 3, 1, 1)
    return soft[0, 0]
