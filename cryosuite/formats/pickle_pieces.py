"""The pickle of an array in pieces: writing a gigabyte of latents needs no second and third gigabyte of memory."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator

import numpy as np

_PIECE = 1 << 24  # bytes copied at a time
_MARK = b"here stand the data of the array"


class _Shell:
    """Pickled as an array would be, the mark in place of its data."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __reduce__(self) -> tuple:
        make, arguments, (version, _, dtype, _, _) = self.array[:0].reshape(0).__reduce__()
        return make, arguments, (version, self.array.shape, dtype, False, _MARK)


def array_pieces(array: np.ndarray) -> Iterator[bytes | memoryview]:
    """Buffers that make up a pickle of an array (one axis or more) when written one after the other.

    It reads back as that of ``pickle.dumps(array, protocol=4)`` does: the same numpy globals, no frames.
    """
    # protocol 3 writes the very opcodes of 4 for these objects but keeps no count of bytes ahead of them
    before, after = pickle.dumps(_Shell(array), protocol=3).split(pickle.SHORT_BINBYTES + bytes([len(_MARK)]) + _MARK)
    yield pickle.PROTO + b"\x04" + before[2:]
    yield pickle.BINBYTES8 + struct.pack("<Q", array.nbytes)
    step = max(1, _PIECE // max(1, array[:1].nbytes))
    for begin in range(0, len(array), step):
        yield memoryview(np.ascontiguousarray(array[begin : begin + step]).reshape(-1).view(np.uint8))
    yield after
