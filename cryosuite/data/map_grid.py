"""A map on its grid in space: voxel sizes, position, the file's own header, and Fourier resampling that loses neither.

A grid is an affine: voxel (i, j, k) along x, y, z lies at origin + (i, j, k) x voxel, in Angstrom. The origin in the
header wins where any component is non-zero, else nstart x voxel size; never their sum (CONVENTIONS, Files).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cryosuite.errors import InputError
from cryosuite.formats.mrc import Map, read_map
from cryosuite.formats.mrc_like import write_map_like
from cryosuite.kernels.fourier import resize_axis

RIGHT_ANGLE = 0.1  # degrees by which a cell may differ from a rectangular one
SAME_LENGTH = 1e-4  # relative difference of the lengths of two grids that cover one box
MAX_VOXELS = 1 << 31  # of a resampled map


@dataclass(frozen=True)
class MapGrid:
    """A map and where it lies.

    Attributes:
        data: (z, y, x) float32.
        voxel: (x, y, z) A.
        origin: (x, y, z) A, position of voxel 0 0 0.
        source: the map as it was read; its header is what ``write_like`` writes again.
        corrected: whether ``voxel`` is the user's, not the header's.
    """

    data: np.ndarray
    voxel: tuple[float, float, float]
    origin: tuple[float, float, float]
    source: Map
    corrected: bool = False

    @property
    def path(self) -> Path | None:
        """The file that the map was read from."""
        return self.source.path

    @property
    def extent(self) -> tuple[float, float, float]:
        """Lengths (x, y, z) of the box, A: voxels times voxel size."""
        return tuple(n * size for n, size in zip(self.data.shape[::-1], self.voxel, strict=True))

    def index_of(self, xyz: np.ndarray) -> np.ndarray:
        """Positions (n, 3) x y z in A as fractional voxels (n, 3) z y x."""
        return ((np.asarray(xyz, np.float64) - self.origin) / self.voxel)[:, ::-1]

    def position_of(self, index: np.ndarray) -> np.ndarray:
        """Voxels (n, 3) z y x as positions (n, 3) x y z in A: the inverse of ``index_of``."""
        return np.asarray(index, np.float64)[:, ::-1] * self.voxel + self.origin

    def with_data(self, data: np.ndarray) -> MapGrid:
        """Other values on the same grid; InputError when they have another shape."""
        if data.shape != self.data.shape:
            raise InputError(f"values of shape {data.shape} do not fit a grid of {self.data.shape}")
        return replace(self, data=data)


def read_grid(path: str | os.PathLike, apix: float | None = None) -> MapGrid:
    """Read a map (.mrc, .map, .ccp4, also .gz; any axis order, number type and byte order) with its grid.

    Args:
        apix: A per voxel on all axes, in place of the header's.

    Raises:
        InputError: as ``formats.mrc.read_map``; a cell that is not rectangular, no voxel size, values not finite.
    """
    found = read_map(path, cubic=False)
    if max(abs(angle - 90.0) for angle in found.angles) > RIGHT_ANGLE:
        angles = ", ".join(f"{angle:g}" for angle in found.angles)
        raise InputError(
            f"{path}: the cell angles are {angles} degrees; only boxes with right angles are handled. Resample the map "
            "on a rectangular grid first (ChimeraX: volume resample)"
        )
    if apix is not None and not (np.isfinite(apix) and apix > 0):
        raise InputError(f"a voxel size of {apix} A was given; a positive number of Angstrom is needed")
    if apix is None and found.voxel_size is None:
        raise InputError(f"{path}: the header gives no voxel size; give it with --apix (Angstrom per voxel)")
    finite = int(np.isfinite(found.data).sum())
    if finite < found.data.size:
        raise InputError(
            f"{path}: {found.data.size - finite} of {found.data.size} values are not finite (NaN or infinite); "
            "write the map again with the program that made it"
        )
    voxel = found.voxel_size if apix is None else (float(apix),) * 3
    placed = replace(found, voxel_size=voxel, pixel_size=voxel[0])
    return MapGrid(found.data, voxel, placed.placement, found, corrected=apix is not None)


def values_on(other: MapGrid, grid: MapGrid) -> np.ndarray:
    """The values (z, y, x) of a map that must lie on the grid of another; InputError that describes both if not."""
    same = other.data.shape == grid.data.shape and np.allclose(other.voxel, grid.voxel, rtol=1e-3)
    if not same or np.abs(np.subtract(other.origin, grid.origin)).max() > 0.05 * max(grid.voxel):
        raise InputError(f"{_where(other)}, {_where(grid)}: they are not on one grid")
    return other.data


def _where(grid: MapGrid) -> str:
    shape, origin = (" x ".join(f"{x:g}" for x in np.round(one, 3)) for one in (grid.data.shape[::-1], grid.origin))
    return f"{grid.path} has {shape} voxels of {grid.voxel[0]:.4g} A from {origin} A"


def write_like(path: str | os.PathLike, array: np.ndarray, source: MapGrid, label: str = "") -> None:
    """Write values (z, y, x) on the grid of a map that was read, with the header it had, as float32.

    A voxel size given by the user goes into the header; ``label`` is added to the labels. Raises InputError when the
    shapes differ or the file cannot be written.
    """
    write_map_like(path, array, source.source, label, source.voxel if source.corrected else None)


def resampled(grid: MapGrid, voxel: float) -> MapGrid:
    """The same box on a grid of about ``voxel`` A: n' = round(n v / voxel) voxels of exactly n v / n' A on each axis.

    By Fourier cropping or padding: voxel 0 0 0 and the lengths of the box stay, so ``back_to`` inverts it (up to what
    a coarser grid cannot hold). The box counts as periodic. Raises InputError for a voxel size that makes no map.
    """
    if not (np.isfinite(voxel) and voxel > 0):
        raise InputError(f"a voxel size of {voxel} A was asked for; a positive number of Angstrom is needed")
    shape = tuple(max(1, round(length / voxel)) for length in reversed(grid.extent))
    if np.prod(shape, dtype=np.float64) > MAX_VOXELS:
        raise InputError(f"{grid.path}: at {voxel:g} A the map would have {' x '.join(map(str, shape))} voxels")
    sizes = tuple(length / n for length, n in zip(grid.extent, reversed(shape), strict=True))
    return replace(grid, data=_resized(grid.data, shape), voxel=sizes)


def back_to(grid: MapGrid, source: MapGrid) -> MapGrid:
    """A resampled map on the grid that it came from, header included.

    Raises InputError when the two do not cover one box.
    """
    for a, b in zip((*grid.extent, *grid.origin), (*source.extent, *source.origin), strict=True):
        if abs(a - b) > SAME_LENGTH * max(source.extent):
            raise InputError(
                f"{source.path}: the box of the new map ({_sizes(grid.extent)} A at {_sizes(grid.origin)}) is not that "
                f"of the source ({_sizes(source.extent)} A at {_sizes(source.origin)})"
            )
    return source.with_data(_resized(grid.data, source.data.shape))


def _resized(data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(z, y, x) float32 brought to another shape, axis by axis, the shrinking axes first."""
    values = torch.from_numpy(np.ascontiguousarray(data, np.float32))
    for axis in sorted(range(3), key=lambda axis: shape[axis] / data.shape[axis]):
        values = resize_axis(values, shape[axis], axis)
    return values.contiguous().numpy()


def _sizes(values: tuple[float, ...]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
