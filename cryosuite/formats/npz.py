"""npz archives of plain arrays: what runs keep beside their checkpoints, read without believing their headers."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Iterable

import numpy as np

from cryosuite.errors import InputError
from cryosuite.formats.checks import printable, read_bytes
from cryosuite.formats.npy_header import read_npy_header, require_characters

_MAX_HEADER = 10_000  # bytes of text that describe one array


def read_npz(path: str | os.PathLike, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Arrays of an .npz that ``numpy.savez`` wrote, by name.

    Members are as large as they lie in the file (nothing is unpacked: what unpacks may be a bomb), and each array has
    exactly the bytes that its header asks for. Raises InputError for a missing or damaged file, a compressed one, a
    name that is not there, and for arrays of Python objects.
    """
    data = read_bytes(path, "npz file")
    found: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # of a file it takes at once what its sizes ask for
            members = {info.filename: info for info in archive.infolist()}
            for name in names:
                info = members.get(f"{name}.npy")
                if info is None:
                    raise InputError(f"{path}: holds no array {printable(name)}")
                if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(data):
                    raise InputError(f"{path}: {printable(name)} is compressed, or larger than the file: not ours")
                found[name] = _array(archive.read(info))
    except InputError:
        raise
    except Exception as error:  # zipfile and numpy raise a dozen types for damaged files
        raise InputError(f"{path}: damaged npz file: {printable(error) or type(error).__name__}") from None
    return found


def _array(data: bytes) -> np.ndarray:
    """One .npy, its shape counted against its bytes before anything is made. Raises ValueError for what lies."""
    stream = io.BytesIO(data)
    shape, fortran, dtype = read_npy_header(stream, len(data), _MAX_HEADER)
    left = len(data) - stream.tell()
    if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != left:
        raise ValueError(f"an array of {dtype} and shape {shape} in {left} bytes")
    values = np.frombuffer(data, dtype, offset=stream.tell()) if left else np.zeros(0, dtype)
    require_characters(values)
    return values.reshape(shape, order="F" if fortran else "C").copy()
