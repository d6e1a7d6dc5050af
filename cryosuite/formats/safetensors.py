"""Safetensors files: named arrays behind a JSON header. Nothing in them can run, and nothing they claim is believed.

Layout: 8 bytes little-endian length of the header, the header (JSON: name -> dtype, shape, data_offsets; and perhaps
``__metadata__``: text -> text), then the data without gaps. Read by hand because every number of the header has to be
checked against the file before memory is taken, and because a reader of 200 lines is one dependency less.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cryosuite.errors import InputError
from cryosuite.formats.atomic import atomic_path
from cryosuite.formats.checks import existing_file, printable

MAX_HEADER = 100_000_000  # bytes, the limit of the format's own reader
MAX_DIMENSIONS = 64  # numpy's own limit
METADATA = "__metadata__"

DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",  # widened to float32 when read
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
_WRITTEN = {np.dtype(code).newbyteorder("="): name for name, code in DTYPES.items() if name != "BF16"}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: dtype as the file names it, shape, first byte and the byte after the last, from the data's
    start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a file holds: entries by name, metadata, and where the data begins (bytes)."""

    path: Path
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    offset: int


def read_safetensors_header(path: str | os.PathLike) -> SafetensorsHeader:
    """Read and check the header: every tensor lies inside the file, has the bytes its shape asks for, none overlap.

    Raises InputError for a file that is missing, empty, cut short, of another kind, or whose header lies.
    """
    path = existing_file(path, "safetensors file")
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                stream.seek(0)
                raise _not_safetensors(path, stream.read(64), size, length)
            text = stream.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot read this safetensors file: {error.strerror or error}") from None
    said = _parse(path, text)
    metadata = said.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: broken safetensors header: {METADATA} must hold text only")
    entries = {name: _entry(path, name, value) for name, value in said.items()}
    _check_layout(path, entries, size - 8 - length)
    return SafetensorsHeader(path, entries, metadata, 8 + length)


def read_safetensors(
    source: str | os.PathLike | SafetensorsHeader, names: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """The tensors of a file by name (those in ``names``, or all), native byte order, BF16 widened to float32.

    Raises InputError as ``read_safetensors_header`` does, and for a name that is not there.
    """
    header = source if isinstance(source, SafetensorsHeader) else read_safetensors_header(source)
    names = list(header.entries if names is None else names)
    absent = [name for name in names if name not in header.entries]
    if absent:
        raise InputError(f"{header.path}: holds no tensor {printable(absent[0])}")
    found: dict[str, np.ndarray] = {}
    try:
        with open(header.path, "rb") as stream:
            for name in sorted(names, key=lambda name: header.entries[name].begin):
                entry = header.entries[name]
                stream.seek(header.offset + entry.begin)
                data = bytearray(entry.end - entry.begin)
                if stream.readinto(data) != len(data):
                    raise InputError(f"{header.path}: the file became shorter while it was read")
                found[name] = _array(data, entry)
    except OSError as error:
        raise InputError(f"{header.path}: cannot read this safetensors file: {error.strerror or error}") from None
    return {name: found[name] for name in names}


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays by name, widest numbers first so that all are aligned, atomically.

    Raises InputError when the file cannot be written, TypeError for a dtype that the format does not have.
    """
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    arrays: list[np.ndarray] = []
    begin = 0
    order = sorted(tensors, key=lambda name: (-np.asarray(tensors[name]).dtype.itemsize, name))
    for name in order:
        array = np.asarray(tensors[name])
        kind = _WRITTEN.get(array.dtype.newbyteorder("="))
        if kind is None or name == METADATA:
            raise TypeError(f"a safetensors file holds no tensor {name!r} of {array.dtype}")
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [begin, begin + array.nbytes]}
        begin += array.nbytes
        arrays.append(array)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with atomic_path(path, needed=8 + len(text) + begin) as temporary, open(temporary, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for array in arrays:
            stream.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())


def _not_safetensors(path: Path, start: bytes, size: int, length: int) -> InputError:
    """What the file seems to be instead, in words."""
    if start.startswith(b"version https://git-lfs"):
        return InputError(
            f"{path}: this is a Git LFS pointer, a note where the file is, not the file: run `git lfs pull`, or "
            "download the file itself"
        )
    if start.startswith(b"PK\x03\x04") or start[:1] == b"\x80":
        return InputError(f"{path}: this is a PyTorch file, not a safetensors file: give the .safetensors file")
    if size > 8 and start[8:9] == b"{":
        return InputError(
            f"{path}: its header claims {length} bytes, the file has {size}: truncated or broken; copy it again"
        )
    return InputError(f"{path}: not a safetensors file ({size} bytes)")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    """The header as a mapping; InputError for anything but one JSON object with names given once."""
    if not text.startswith(b"{"):
        raise InputError(f"{path}: not a safetensors file (its header is no JSON object)")
    try:
        said = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: broken safetensors header: {printable(error)}") from None
    return said


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {printable(twice)} is given twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of a header")


def _entry(path: Path, name: str, said: Any) -> TensorEntry:
    """One tensor's entry, its bytes counted against its shape in whole numbers of any size."""
    label = f"{path}: broken safetensors header: tensor {printable(name)}"
    if not isinstance(said, dict) or not {"dtype", "shape", "data_offsets"} <= said.keys():
        raise InputError(f"{label} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{label} has the dtype {printable(dtype)}; known are {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise InputError(f"{label} has the shape {printable(shape)}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{label} has the offsets {printable(offsets)}")
    wanted, given = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize, offsets[1] - offsets[0]
    if wanted != given:
        raise InputError(f"{label} of shape {printable(shape)} needs {printable(wanted)} bytes, but is given {given}")
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _counts(values: Any) -> bool:
    """A list of whole numbers from 0 that fit 63 bits?"""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_layout(path: Path, entries: dict[str, TensorEntry], available: int) -> None:
    """The tensors follow one another without gap or overlap and end where the file does."""
    at, before = 0, "the start"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > available:
            raise InputError(
                f"{path}: truncated: tensor {printable(name)} ends at byte {entry.end} of the data, the file has "
                f"{available}; copy the file again"
            )
        if entry.begin != at:
            how = "overlaps" if entry.begin < at else "leaves a gap after"
            raise InputError(f"{path}: broken safetensors header: tensor {printable(name)} {how} {printable(before)}")
        at, before = entry.end, name
    if at != available:
        raise InputError(f"{path}: {available - at} bytes behind the last tensor belong to none; the file is broken")


def _array(data: bytearray, entry: TensorEntry) -> np.ndarray:
    array = np.frombuffer(data, DTYPES[entry.dtype])
    if entry.dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    elif entry.dtype == "BOOL":
        array = np.frombuffer(data, np.uint8) != 0  # a byte other than 0 and 1 is no bool of numpy
    return array.astype(array.dtype.newbyteorder("="), copy=False).reshape(entry.shape)
