"""The header of numpy's npy form, looked at before numpy parses it: it is a piece of Python text from anybody."""

from __future__ import annotations

import re
from typing import BinaryIO

import numpy as np

MAGIC = b"\x93NUMPY"
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_PLAIN = re.compile(r"[\w\s{}()\[\],:]*")  # names, numbers, brackets: no operators, which can be nested without end
_LAST_CHARACTER = 0x10FFFF  # of Unicode
_MAX_DEPTH = 10  # brackets in brackets; a table of fields with shapes has four


def read_npy_header(stream: BinaryIO, size: int, most: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran order, type) of an array; the stream then stands at its data.

    Args:
        stream: at the beginning of an npy file of ``size`` bytes.
        most: bytes of text that the header may have.

    Raises ValueError for a header that is damaged, too long, or deeper than any that numpy writes.
    """
    start = stream.read(12)
    version = tuple(start[6:8])
    if not start.startswith(MAGIC) or len(start) < 12 or version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError("no npy file of a known version")
    # in version 1 two bytes, from version 2 on four say how long the text is; numpy takes as much memory at once
    first = 10 if version == (1, 0) else 12
    length = int.from_bytes(start[8:first], "little")
    if not 0 < length <= min(most, size - first):
        raise ValueError(f"{length} bytes are said to describe the fields")
    stream.seek(first)
    _require_modest(stream.read(length).decode("latin-1"))
    stream.seek(8)
    # 3.0 differs from 2.0 in names that are not ASCII
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream, max_header_size=most)


def require_characters(values: np.ndarray) -> None:
    """Raise ValueError for text, in an array or in fields of a table, whose numbers are no characters."""
    for name in values.dtype.names or ():
        require_characters(values[name])
    if values.dtype.kind == "U" and values.dtype.itemsize:
        codes = np.ascontiguousarray(values).reshape(-1).view(np.dtype("u4").newbyteorder(values.dtype.byteorder))
        if codes.max(initial=0) > _LAST_CHARACTER:
            raise ValueError(f"text with the number {codes.max()}, which is no character")


def _require_modest(text: str) -> None:
    """ValueError for text that Python's parser would use up its stack on."""
    bare = _QUOTED.sub("", text)
    if not _PLAIN.fullmatch(bare):
        raise ValueError("it is no description of an array")
    depth = 0
    for sign in bare:
        depth += (sign in "{([") - (sign in "])}")
        if depth > _MAX_DEPTH:
            raise ValueError("brackets are nested too deeply")
