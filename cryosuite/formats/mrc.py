"""MRC maps in and out; stacks are read and written by ``stacks`` and offered here too.

Arrays are [z, y, x] whatever the axis order of the file; lengths are Angstrom.
"""

from __future__ import annotations

import os
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import mrcfile
import numpy as np

from cryosuite.errors import InputError, notice
from cryosuite.formats.atomic import atomic_path
from cryosuite.formats.checks import existing_file
from cryosuite.formats.mrc_header import MrcHeader, open_mrc, parse_header, read_header
from cryosuite.formats.stacks import StackPart, StackReader, StackWriter

__all__ = ["Map", "MrcHeader", "StackPart", "StackReader", "StackWriter", "read_header", "read_map", "write_map"]

_CHUNK = 1 << 18  # taken whole before it is filled: not more than a small file may cost
_ORDER, _START = ("mapc", "mapr", "maps"), ("nxstart", "nystart", "nzstart")


@dataclass(frozen=True)
class Map:
    """A density map.

    ``data`` float32 (z, y, x); ``pixel_size`` (A) of x or None; ``origin`` (A, x y z) and ``nstart`` (voxels, x y z) as
    the header has them; ``axes`` (mapc, mapr, maps) of the file; ``voxel_size`` (A, x y z) or None; ``angles`` of the
    cell (degrees); ``header`` the bytes before the data, for a writer that wants the same header again.
    """

    data: np.ndarray
    pixel_size: float | None
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    nstart: tuple[int, int, int] = (0, 0, 0)
    axes: tuple[int, int, int] = (1, 2, 3)
    voxel_size: tuple[float, float, float] | None = None
    path: Path | None = None
    angles: tuple[float, float, float] = (90.0, 90.0, 90.0)
    header: bytes = field(default=b"", repr=False)

    @property
    def placement(self) -> tuple[float, float, float]:
        """Position (A, x y z) of the first voxel: the origin if any component is non-zero, else nstart x voxel size."""
        if any(self.origin):
            return self.origin
        size = self.voxel_size or (self.pixel_size or 1.0,) * 3
        return tuple(start * width for start, width in zip(self.nstart, size, strict=True))


def read_map(path: str | os.PathLike, cubic: bool = True) -> Map:
    """Read a map (.mrc, .map, .ccp4, also .gz) as float32 (z, y, x), axes put in order.

    A float32 map in this order is held once, as it is read; others are converted, with both in memory for a moment.
    Pixel size is xlen / mx (mx = nx for all but cropped maps). Notices say when the header has no pixel size or, where
    the caller needs cubic voxels (``cubic``), when they are not. Raises InputError as ``read_header`` does, and for a
    file that holds several volumes.
    """
    path = existing_file(path, "map")
    with open_mrc(path) as stream:
        header = parse_header(path, stream)
        if header.n_volumes > 1:
            raise InputError(
                f"{path}: holds {header.n_volumes} volumes (space group {header.ispg}): one map per file is expected; "
                "split the file"
            )
        extended, raw = _read_data(path, stream, header)
    for problem in header.problems:
        notice(problem)
    data = np.frombuffer(raw, header.dtype).reshape(header.nz, header.ny, header.nx)
    to_xyz = [header.axes.index(axis) for axis in (1, 2, 3)]  # file axis (0 fastest) that holds x, y, z
    data = data.transpose([2 - to_xyz[2], 2 - to_xyz[1], 2 - to_xyz[0]]).astype(np.float32, order="C", copy=False)
    if cubic:
        _warn_shape(header)
    return Map(
        data=data,
        pixel_size=header.pixel_size,
        origin=header.origin,
        nstart=tuple(header.nstart[axis] for axis in to_xyz),
        axes=header.axes,
        voxel_size=header.voxel_size,
        path=path,
        angles=header.angles,
        header=header.raw + extended,
    )


def _read_data(path: Path, stream: BinaryIO, header: MrcHeader) -> tuple[bytes, bytearray | np.ndarray]:
    """The extended header and the data block, which may be written to; from a gz file piece by piece, so that a lying
    header costs no memory."""
    extended = []
    try:
        left = header.data_offset - 1024
        while left > 0:
            skipped = stream.read(min(left, _CHUNK))
            if not skipped:
                break
            extended.append(skipped)
            left -= len(skipped)
        left = header.data_bytes
        if header.compressed:
            raw = bytearray()
            while left and (piece := stream.read(min(left, _CHUNK))):
                raw += piece
                left -= len(piece)
        else:
            raw = np.empty(left, np.uint8)
            while left and (count := stream.readinto(memoryview(raw)[len(raw) - left :])):
                left -= count
        trailing = len(stream.read(_CHUNK)) if header.compressed and not left else 0
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot read this map: {error}") from None
    if left:
        expected = header.data_offset + header.data_bytes
        raise InputError(f"{path}: truncated: expected {expected} bytes, found {expected - left}; copy the file again")
    if trailing:
        notice(f"{path}: bytes behind the last section are ignored")
    return b"".join(extended), raw


def _warn_shape(header: MrcHeader) -> None:
    """Notice voxels that are not cubic: the rest of the program takes one pixel size."""
    if header.voxel_size is not None:
        low, high = min(header.voxel_size), max(header.voxel_size)
        if high > low * 1.01:
            sizes = " x ".join(f"{size:.4g}" for size in header.voxel_size)
            notice(f"{header.path}: voxels are not cubic ({sizes} A): the pixel size of x is used")


def write_map(
    path: str | os.PathLike,
    data: np.ndarray,
    pixel_size: float | None,
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
    nstart: tuple[int, int, int] = (0, 0, 0),
    like: Map | None = None,
) -> None:
    """Write a map (z, y, x) as float32 MRC, gzipped where the name ends in .gz, atomically.

    ``pixel_size`` in A (None or 0 writes none). With ``like`` the header fields origin, nstart, axis order and, when
    the pixel size is unchanged or None, the voxel size are those of that map; where the pixel size differs the position
    in Angstrom is kept in ``origin`` instead of ``nstart``. Raises InputError when the file cannot be written.
    """
    data = np.asarray(data)
    if data.ndim != 3 or 0 in data.shape:
        raise InputError(f"{path}: a map has three dimensions, got an array of shape {data.shape}")
    axes, voxel = (1, 2, 3), (float(pixel_size or 0.0),) * 3
    if like is not None:
        axes, origin, nstart = like.axes, like.origin, like.nstart
        old = like.pixel_size
        if pixel_size is None or (old and abs(pixel_size - old) <= 1e-4 * old):
            voxel = like.voxel_size or (0.0, 0.0, 0.0)
        elif old and any(nstart):
            origin, nstart = like.placement, (0, 0, 0)
    in_file = data.transpose([2 - (axis - 1) for axis in reversed(axes)]).astype(np.float32)
    compression = "gzip" if str(path).lower().endswith(".gz") else None
    needed = None if compression else 1024 + in_file.nbytes
    with atomic_path(path, needed=needed) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mrcfile warns about NaN statistics
        with mrcfile.new(temporary, in_file, compression=compression, overwrite=True) as mrc:
            mrc.set_volume()
            for axis, size, n, place in zip("xyz", voxel, data.shape[::-1], origin, strict=True):
                mrc.header["cella"][axis], mrc.header["m" + axis], mrc.header["origin"][axis] = size * n, n, place
            for order, start, axis in zip(_ORDER, _START, axes, strict=True):
                mrc.header[order], mrc.header[start] = axis, nstart[axis - 1]
