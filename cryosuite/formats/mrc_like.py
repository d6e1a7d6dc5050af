"""A map written with the header of another: grid, cell, axis order, symmetry and labels are those of the source."""

from __future__ import annotations

import gzip
import os
from typing import BinaryIO

import numpy as np
from mrcfile.dtypes import HEADER_DTYPE

from cryosuite.errors import InputError
from cryosuite.formats.atomic import atomic_path
from cryosuite.formats.mrc import Map, write_map
from cryosuite.formats.mrc_header import HEADER_BYTES

LABELS, LABEL_BYTES = 10, 80
_TEXT_HEADERS = {b"", b"CCP4", b"MRCO"}  # kinds of extended header that hold text (symmetry), no numbers to be swapped


def write_map_like(
    path: str | os.PathLike,
    data: np.ndarray,  # (z, y, x)
    source: Map,
    label: str = "",
    voxel_size: tuple[float, float, float] | None = None,
) -> None:
    """Write a map as float32 with the source's header, gzipped where the name ends in .gz, atomically.

    Dimensions, cell, nstart, origin, axis order, space group, extended header and labels are the source's own bytes;
    mode, statistics and byte order (little endian) are those of the new data, ``label`` is added to the labels.
    ``voxel_size`` (A, x y z) corrects the cell where the source's header has none or a wrong one.

    Raises:
        InputError: the data have another shape than the source, or the file cannot be written.
    """
    data = np.asarray(data)
    if data.shape != source.data.shape:
        raise InputError(f"{path}: data of shape {data.shape} do not fit the grid {source.data.shape} of {source.path}")
    if not source.header:
        write_map(path, data, None if voxel_size is None else voxel_size[0], like=source)
        return
    in_file = data.transpose([2 - (axis - 1) for axis in reversed(source.axes)]).astype("<f4", order="C")
    header, extended = _header(source, in_file, label, voxel_size)
    compressed = str(path).lower().endswith(".gz")
    needed = None if compressed else len(header) + len(extended) + in_file.nbytes
    with atomic_path(path, needed=needed) as temporary, _stream(temporary, compressed) as stream:
        stream.write(header)
        stream.write(extended)
        stream.write(in_file.data)


def _stream(path: os.PathLike, compressed: bool) -> BinaryIO:
    return gzip.GzipFile(path, "wb", compresslevel=6, mtime=0) if compressed else open(path, "wb")


def _header(
    source: Map, data: np.ndarray, label: str, voxel_size: tuple[float, float, float] | None
) -> tuple[bytes, bytes]:
    """The 1024 bytes and the extended header of the new file."""
    raw, extended = source.header[:HEADER_BYTES], source.header[HEADER_BYTES:]
    swapped = int(np.frombuffer(raw, "<i4", 1, 0)[0]) != data.shape[2]  # columns: the byte order shows itself
    header = np.frombuffer(raw, HEADER_DTYPE.newbyteorder(">" if swapped else "<")).astype(
        HEADER_DTYPE.newbyteorder("<")
    )
    one = header[0]
    if swapped and bytes(one["exttyp"]).strip(b"\0 ") not in _TEXT_HEADERS:
        extended, one["nsymbt"] = b"", 0  # numbers in an order that nobody would expect in the new file
    one["mode"] = 2
    one["dmin"], one["dmax"], one["dmean"] = data.min(), data.max(), data.mean(dtype=np.float64)
    one["rms"] = data.std(dtype=np.float64)
    one["machst"] = (0x44, 0x44, 0, 0)
    one["map"] = b"MAP "
    if not 0 <= one["ispg"] <= 230 and not 401 <= one["ispg"] <= 630:  # headers of before 2000 hold other things there
        one["ispg"] = 1
    if voxel_size is not None:
        for axis, size, n in zip("xyz", voxel_size, source.data.shape[::-1], strict=True):
            if one["m" + axis] <= 0:
                one["m" + axis] = n
            one["cella"][axis] = size * int(one["m" + axis])
    if label:
        place = min(max(int(one["nlabl"]), 0), LABELS - 1)  # the last one makes room when all are taken
        one["label"][place] = label.encode("ascii", "replace")[:LABEL_BYTES].ljust(LABEL_BYTES)
        one["nlabl"] = place + 1
    return header.tobytes(), extended
