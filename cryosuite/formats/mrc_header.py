"""The 1024-byte MRC header: read strictly, checked against the size of the file before anything is allocated.

Layout: MRC2014 (Cheng et al., J. Struct. Biol. 192, 146, 2015); field names are those of the mrcfile package.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from mrcfile.dtypes import HEADER_DTYPE

from cryosuite.errors import FileError, InputError
from cryosuite.formats.checks import existing_file

HEADER_BYTES = 1024
MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
_OTHER_MODES = {3: "complex int16", 4: "complex float32", 16: "RGB bytes", 101: "4-bit integers"}
_GZIP = b"\x1f\x8b"
_STACK_SUFFIXES = {".mrcs", ".st", ".stk"}
_DEFLATE_RATIO = 1032  # the most that deflate can shrink: a gz file that promises more cannot hold it


@dataclass(frozen=True)
class MrcHeader:
    """What an MRC header says, in plain types.

    nx, ny, nz count columns, rows and sections as they lie in the file; ``nstart`` too; ``axes`` = (mapc, mapr, maps)
    says which of x = 1, y = 2, z = 3 they are. ``origin`` (A), ``voxel_size`` (A) are (x, y, z). ``pixel_size`` is that
    of x, or None where the header has none. ``angles`` (degrees) are those of the cell: alpha, beta, gamma. ``raw`` are
    the 1024 bytes themselves. ``problems`` are sentences for the user about what was odd but readable.
    """

    path: Path
    nx: int
    ny: int
    nz: int
    mode: int
    dtype: np.dtype
    byte_order: str
    pixel_size: float | None
    voxel_size: tuple[float, float, float] | None
    origin: tuple[float, float, float]
    nstart: tuple[int, int, int]
    axes: tuple[int, int, int]
    data_offset: int
    is_stack: bool
    labels: tuple[str, ...]
    ispg: int
    n_volumes: int
    compressed: bool
    problems: tuple[str, ...] = field(default=())
    angles: tuple[float, float, float] = (90.0, 90.0, 90.0)
    raw: bytes = field(default=b"", repr=False)

    @property
    def data_bytes(self) -> int:
        """Bytes of image data that the header promises."""
        return self.nx * self.ny * self.nz * self.dtype.itemsize


def open_mrc(path: Path) -> BinaryIO:
    """Open an MRC file for reading, through gzip where its first bytes say so."""
    try:
        stream = open(path, "rb")  # noqa: SIM115 (the caller closes it)
        if stream.peek(2)[:2] != _GZIP:
            return stream
        stream.close()
        return gzip.open(path, "rb")
    except OSError as error:
        raise FileError(f"{path}: cannot open this MRC file: {error.strerror or error}") from None


def read_header(path: str | os.PathLike) -> MrcHeader:
    """Read and check the header of an MRC map or stack (.mrc, .mrcs, .map, .gz).

    Raises InputError for a file that is missing, empty, shorter than its header, of unknown mode or byte order, with
    dimensions below 1, or with fewer bytes than the header promises (expected and found are given).
    """
    path = existing_file(path, "MRC file")
    with open_mrc(path) as stream:
        return parse_header(path, stream)


def parse_header(path: Path, stream: BinaryIO) -> MrcHeader:
    """The header at the start of an open stream; see ``read_header``."""
    try:
        raw = stream.read(HEADER_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise FileError(f"{path}: cannot read this MRC file: {error}") from None
    if len(raw) < HEADER_BYTES:
        raise InputError(f"{path}: not an MRC file: {len(raw)} bytes, the header alone needs {HEADER_BYTES}")
    compressed = isinstance(stream, gzip.GzipFile)
    order = _byte_order(path, raw)
    header = np.frombuffer(raw, HEADER_DTYPE.newbyteorder(order))[0]
    problems: list[str] = []
    nx, ny, nz, mode = (int(header[name]) for name in ("nx", "ny", "nz", "mode"))
    if min(nx, ny, nz) < 1:
        raise InputError(f"{path}: the header gives dimensions {nx} x {ny} x {nz}: each must be at least 1")
    dtype = np.dtype(MODES[mode]).newbyteorder(order)
    offset = _data_offset(path, int(header["nsymbt"]))
    _check_size(path, offset, nx * ny * nz * dtype.itemsize, compressed, f"{nx} x {ny} x {nz} of mode {mode}", problems)
    voxel = _voxel_size(path, header, problems)
    axes = _axes(path, header, problems)
    origin = tuple(float(header["origin"][name]) for name in "xyz")
    if not all(math.isfinite(value) and abs(value) < 1e9 for value in origin):
        problems.append(f"{path}: the origin in the header is not a number: taken as 0")
        origin = (0.0, 0.0, 0.0)
    ispg, mz = int(header["ispg"]), int(header["mz"])
    labels = [bytes(label).decode("latin-1").rstrip("\0 ") for label in header["label"][: max(0, int(header["nlabl"]))]]
    stacked_volumes = 401 <= ispg <= 630 and mz > 0
    return MrcHeader(
        path=path,
        nx=nx,
        ny=ny,
        nz=nz,
        mode=mode,
        dtype=dtype,
        byte_order=order,
        pixel_size=None if voxel is None else voxel[0],
        voxel_size=voxel,
        origin=origin,
        nstart=tuple(int(header[name]) for name in ("nxstart", "nystart", "nzstart")),
        axes=axes,
        data_offset=offset,
        is_stack=path.suffix.lower() in _STACK_SUFFIXES or (ispg == 0 and mz in (0, 1) and nz > 1),
        labels=tuple(labels),
        ispg=ispg,
        n_volumes=max(1, nz // mz) if stacked_volumes else 1,
        compressed=compressed,
        problems=tuple(problems),
        angles=_angles(header),
        raw=raw,
    )


def _byte_order(path: Path, raw: bytes) -> str:
    """'<' or '>': the order in which the mode is a known one; the machine stamp decides where both would do."""
    first = ">" if raw[212:214] == b"\x11\x11" else "<"
    modes = []
    for order in (first, ">" if first == "<" else "<"):
        mode = int(np.frombuffer(raw, order + "i4", 1, 12)[0])
        columns = int(np.frombuffer(raw, order + "i4", 1, 0)[0])
        if mode in MODES and (mode != 0 or 0 < columns < 1 << 24):  # 0 is 0 in either order: the width decides
            return order
        modes.append(mode)
    if modes[0] == 0:
        return first
    name = f" ({_OTHER_MODES[modes[0]]})" if modes[0] in _OTHER_MODES else ""
    raise InputError(
        f"{path}: mode {modes[0]}{name} is not supported: expected 0 (int8), 1 (int16), 2 (float32), 6 (uint16) or "
        "12 (float16); if this is no MRC file at all, check the name"
    )


def _data_offset(path: Path, nsymbt: int) -> int:
    if nsymbt < 0:
        raise InputError(f"{path}: the extended header has a negative size ({nsymbt} bytes)")
    return HEADER_BYTES + nsymbt


def _check_size(path: Path, offset: int, data: int, compressed: bool, shape: str, problems: list[str]) -> None:
    """Compare what the header promises with what the file holds."""
    found, expected = path.stat().st_size, offset + data
    if compressed:
        if expected > found * _DEFLATE_RATIO + HEADER_BYTES:
            raise InputError(
                f"{path}: the header promises {shape}, {expected} bytes, which {found} compressed bytes cannot hold"
            )
        return
    if found < offset:
        raise InputError(
            f"{path}: the extended header is said to end at byte {offset}, but the file has {found} bytes: "
            "the header is damaged or the file truncated"
        )
    if found == offset:
        raise InputError(f"{path}: holds no image data behind the header (expected {expected} bytes, found {found})")
    if found < expected:
        raise FileError(
            f"{path}: truncated: the header promises {shape}, expected {expected} bytes, found {found}; "
            "copy the file again"
        )
    if found > expected:
        problems.append(f"{path}: {found - expected} bytes behind the last image are ignored")


def _voxel_size(path: Path, header: np.void, problems: list[str]) -> tuple[float, float, float] | None:
    """Cell length over grid intervals (xlen / mx; mx = nx but for cropped maps) in A, or None with a sentence."""
    sizes = []
    for axis, n in zip("xyz", ("nx", "ny", "nz"), strict=True):
        length, intervals = float(header["cella"][axis]), int(header["m" + axis])
        sizes.append(length / (intervals if intervals > 0 else int(header[n])))
    good = [math.isfinite(size) and 1e-4 < size < 1e6 for size in sizes]
    if not good[0]:
        problems.append(f"{path}: the header gives no pixel size (found {sizes[0]:.4g} A)")
        return None
    return tuple(size if ok else sizes[0] for size, ok in zip(sizes, good, strict=True))


def _angles(header: np.void) -> tuple[float, float, float]:
    """Cell angles in degrees; old writers leave zeros, which means 90."""
    angles = tuple(float(header["cellb"][name]) for name in ("alpha", "beta", "gamma"))
    return angles if any(angles) else (90.0, 90.0, 90.0)


def _axes(path: Path, header: np.void, problems: list[str]) -> tuple[int, int, int]:
    """(mapc, mapr, maps); old writers leave zeros, which means 1, 2, 3."""
    axes = tuple(int(header[name]) for name in ("mapc", "mapr", "maps"))
    if axes == (0, 0, 0):
        problems.append(f"{path}: the header gives no axis order (mapc, mapr, maps are 0): taken as x, y, z")
        return (1, 2, 3)
    if sorted(axes) != [1, 2, 3]:
        raise InputError(
            f"{path}: the axis order mapc, mapr, maps = {axes[0]}, {axes[1]}, {axes[2]} is not an order of 1, 2, 3: "
            "the header is damaged"
        )
    return axes
