"""The pickle of an array in pieces: writing a gigabyte of latents needs no second and third gigabyte of memory."""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Iterator

import numpy as np

_PIECE = 1 << 24  # bytes copied at a time
_MARK = b"here stand the data of the array"


class _Shell:
    """Pickled as an array would be, the mark in place of its data."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def __reduce__(self) -> tuple:
        make, arguments, (version, _, dtype, _, _) = np.empty(0, self.dtype).__reduce__()
        return make, arguments, (version, self.shape, dtype, False, _MARK)


def array_frame(shape: tuple[int, ...], dtype: np.dtype | type) -> tuple[bytes, bytes]:
    """What stands before and after the data (C order) in the pickle of an array of one axis or more.

    It reads back as that of ``pickle.dumps(array, protocol=4)`` does: the same numpy globals, no frames.
    """
    shape, dtype = tuple(int(n) for n in shape), np.dtype(dtype)
    # protocol 3 writes the very opcodes of 4 for these objects but keeps no count of bytes ahead of them
    whole = pickle.dumps(_Shell(shape, dtype), protocol=3)
    before, after = whole.split(pickle.SHORT_BINBYTES + bytes([len(_MARK)]) + _MARK)
    size = struct.pack("<Q", math.prod(shape) * dtype.itemsize)
    return pickle.PROTO + b"\x04" + before[2:] + pickle.BINBYTES8 + size, after


def array_pieces(array: np.ndarray) -> Iterator[bytes | memoryview]:
    """Buffers that make up a pickle of an array (one axis or more) when written one after the other."""
    before, after = array_frame(array.shape, array.dtype)
    yield before
    step = max(1, _PIECE // max(1, array[:1].nbytes))
    for begin in range(0, len(array), step):
        yield memoryview(np.ascontiguousarray(array[begin : begin + step]).reshape(-1).view(np.uint8))
    yield after
