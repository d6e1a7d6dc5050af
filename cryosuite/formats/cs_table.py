"""cryoSPARC .cs files as tables: one numpy structured array in npy form, rows known by ``uid``."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cryosuite.errors import InputError, notice
from cryosuite.formats.atomic import atomic_path
from cryosuite.formats.checks import existing_file, printable
from cryosuite.formats.npy_header import MAGIC, read_npy_header, require_characters
from cryosuite.formats.unpickler import load_bytes

_MAX_HEADER = 1 << 20


def read_cs(path: str | os.PathLike, passthrough: Iterable[str | os.PathLike] = ()) -> np.ndarray:
    """Read a .cs file as a structured array (N,), with the fields of ``passthrough`` files joined by uid.

    Rows and their order are those of ``path``; fields present in both keep the values of ``path``. Raises InputError
    for a missing, empty, truncated or damaged file, for Python objects inside (named, nothing is run), and for rows
    that a passthrough file lacks. Notices uids that occur twice.
    """
    array = _read_npy(path)
    _notice_duplicates(path, array)
    for extra in passthrough:
        array = _join(path, array, extra)
    return array


def _read_npy(path: str | os.PathLike) -> np.ndarray:
    path = existing_file(path, ".cs file")
    try:
        with open(path, "rb") as stream:
            dtype, shape, offset = _npy_header(path, stream)
            found, expected = path.stat().st_size - offset, int(np.prod(shape, dtype=object)) * dtype.itemsize
            if found < expected:
                raise InputError(
                    f"{path}: truncated: {shape[0]} rows need {expected} bytes, found {found}; copy the file again"
                )
            if found > expected:
                notice(f"{path}: {found - expected} bytes behind the last row are ignored")
            array = np.empty(shape[0], dtype)
            if stream.readinto(memoryview(array.view(np.uint8))) != expected:
                raise InputError(f"{path}: the file became shorter while it was read")
    except OSError as error:
        raise InputError(f"{path}: cannot read this .cs file: {error.strerror or error}") from None
    try:
        require_characters(array)
    except ValueError as error:
        raise InputError(f"{path}: damaged: {error}; export it again from cryoSPARC") from None
    return array


def _npy_header(path: Path, stream: io.BufferedReader) -> tuple[np.dtype, tuple[int, ...], int]:
    """Type, shape and start of the data of an npy stream that holds one table of plain fields."""
    start = stream.read(8)
    if start[:2] == b"PK":
        raise InputError(f"{path}: is a zip (npz) archive, not a .cs table")
    if start.startswith(b"\x94CSDAT"):
        raise InputError(
            f"{path}: is in cryoSPARC's compressed form (CSDAT), which is not read: save it again with "
            "cryosparc-tools, Dataset.load(name).save(name, format=1)"
        )
    if not start.startswith(MAGIC):
        raise InputError(f"{path}: not a .cs file (it does not start as a numpy table); export it again from cryoSPARC")
    stream.seek(0)
    try:
        shape, _, dtype = read_npy_header(stream, path.stat().st_size, _MAX_HEADER)
    except Exception as error:  # the header is text that numpy parses; its errors are of many kinds
        said = printable(error) or "it cannot be parsed"
        raise InputError(f"{path}: damaged or truncated .cs header: {said}") from None
    if dtype.hasobject:
        _refuse_objects(path, stream)
    if dtype.names is None or len(shape) != 1 or shape[0] < 0:
        raise InputError(
            f"{path}: not a .cs table: expected rows of named fields, found shape {shape} of {printable(dtype)}"
        )
    if dtype.itemsize == 0:
        raise InputError(f"{path}: damaged .cs header: rows of 0 bytes")
    return dtype, shape, stream.tell()


def _refuse_objects(path: Path, stream: io.BufferedReader) -> None:
    """End with the name of what the pickled objects ask for; they are looked at, never built."""
    load_bytes(path, stream.read())
    raise InputError(f"{path}: refused: holds Python objects (pickled); a .cs file holds numbers and text only")


def _notice_duplicates(path: str | os.PathLike, array: np.ndarray) -> None:
    if "uid" in (array.dtype.names or ()) and len(np.unique(array["uid"])) != len(array):
        repeats = len(array) - len(np.unique(array["uid"]))
        notice(
            f"{path}: {repeats} rows repeat the uid of another row: joining other files by uid is ambiguous for them"
        )


def _join(path: str | os.PathLike, array: np.ndarray, extra: str | os.PathLike) -> np.ndarray:
    """``array`` with the fields that only ``extra`` has, matched by uid."""
    other = _read_npy(extra)
    for name, table in ((path, array), (extra, other)):
        if "uid" not in table.dtype.names:
            raise InputError(f"{name}: has no field uid: it cannot be joined with another .cs file")
    new = [name for name in other.dtype.names if name not in array.dtype.names]
    _notice_duplicates(extra, other)
    order = np.argsort(other["uid"], kind="stable")
    sorted_uid = other["uid"][order]
    place = np.searchsorted(sorted_uid, array["uid"])
    found = place < len(sorted_uid)
    found[found] = sorted_uid[place[found]] == array["uid"][found]
    if not found.all():
        missing = np.flatnonzero(~found)
        raise InputError(
            f"{extra}: lacks {len(missing)} of the {len(array)} particles of {path} (by uid; first uid "
            f"{int(array['uid'][missing[0]])}): the passthrough file must be of the same job"
        )
    rows = order[place]
    joined = np.empty(len(array), array.dtype.descr + [_describe(other.dtype, name) for name in new])
    for name in array.dtype.names:
        joined[name] = array[name]
    for name in new:
        joined[name] = other[name][rows]
    return joined


def _describe(dtype: np.dtype, name: str) -> tuple:
    field = dtype[name]
    return (name, field.base.str, field.shape) if field.shape else (name, field.str)


def write_cs(path: str | os.PathLike, array: np.ndarray) -> None:
    """Write a structured array as .cs (npy, no Python objects), atomically; uid and unknown fields stay as they are."""
    array = np.ascontiguousarray(array)
    if array.dtype.names is None or array.dtype.hasobject:
        raise TypeError("a .cs file holds a structured array of numbers and text")
    with atomic_path(path, needed=array.nbytes + 4096) as temporary, open(temporary, "wb") as stream:
        np.lib.format.write_array(stream, array, allow_pickle=False)
