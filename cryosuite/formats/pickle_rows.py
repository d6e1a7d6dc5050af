"""A pickled table of numbers (N, C) that is larger than memory: written as its rows come, read piece by piece.

Several processes can fill one file, each its own rows, as they fill the stack of ``preprocess``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from types import TracebackType

import numpy as np

from cryosuite.errors import FileError
from cryosuite.formats.atomic import atomic_path, reserve, write_all, write_error
from cryosuite.formats.pickle_pieces import array_frame


class PickledRows:
    """A file that ``RowsWriter`` has written, its rows read when they are asked for; no memory is mapped.

    Attributes:
        shape: (N, C). dtype: as written.
    """

    def __init__(self, path: str | os.PathLike, shape: tuple[int, int], dtype: np.dtype | type = np.float32) -> None:
        self.path, self.shape, self.dtype = Path(path), shape, np.dtype(dtype)
        self._begin = len(array_frame(shape, dtype)[0])
        self._row_bytes = shape[1] * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def pieces(self, rows: int) -> Iterator[np.ndarray]:
        """All rows in order, so many at a time, each piece an array of its own."""
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._begin)
            for begin in range(0, len(self), rows):
                piece = np.empty((min(rows, len(self) - begin), self.shape[1]), self.dtype)
                _fill(file, piece)
                yield piece

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Some rows (n, C), in the order asked for."""
        found = np.empty((len(rows), self.shape[1]), self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            for place, row in enumerate(np.asarray(rows).tolist()):
                file.seek(self._begin + row * self._row_bytes)
                _fill(file, found[place])
        return found


class RowsWriter:
    """Write the pickle of an (N, C) table as its rows come: a context manager with ``write(first, rows)``.

    The file appears under its name when the block ends without an error; it has its whole length on the disk from the
    start. Raises InputError for a full disk, with the space needed. Rows that are never written are zeros.
    """

    def __init__(self, path: str | os.PathLike, shape: tuple[int, int], dtype: np.dtype | type = np.float32) -> None:
        self.path, self.shape, self.dtype = Path(path), (int(shape[0]), int(shape[1])), np.dtype(dtype)
        self._before, self._after = array_frame(self.shape, self.dtype)
        self._row_bytes = self.shape[1] * self.dtype.itemsize
        self.needed = len(self._before) + self.shape[0] * self._row_bytes + len(self._after)

    def __enter__(self) -> RowsWriter:
        with contextlib.ExitStack() as opened:
            self.temporary = opened.enter_context(atomic_path(self.path, needed=self.needed))
            self._file = opened.enter_context(open(self.temporary, "r+b", buffering=0))
            reserve(self._file, self.needed, self.path)
            self._put(0, self._before)
            self._put(self.needed - len(self._after), self._after)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.ExitStack() as opened:
            opened.push(self._opened)
            if error is not None:
                raise error.with_traceback(trace)  # through atomic_path, which leaves nothing behind

    def write(self, first: int, rows: np.ndarray) -> None:
        """Put rows (b, C) at the places from ``first`` on; ValueError for rows that do not fit the table."""
        if rows.ndim != 2 or rows.shape[1] != self.shape[1] or not 0 <= first <= self.shape[0] - len(rows):
            raise ValueError(f"rows of shape {rows.shape} from number {first} on do not fit a table of {self.shape}")
        if len(rows):
            self._put(len(self._before) + first * self._row_bytes, np.ascontiguousarray(rows, self.dtype).data)

    def _put(self, place: int, data: bytes | memoryview) -> None:
        try:
            self._file.seek(place)
            write_all(self._file, data)
        except OSError as error:
            raise write_error(self.path, error, self.needed) from error


class RowsPart(RowsWriter):
    """One process's part of a table: rows written into the file that the ``RowsWriter`` of another process made."""

    def __init__(
        self,
        path: str | os.PathLike,
        temporary: str | os.PathLike,
        shape: tuple[int, int],
        dtype: np.dtype | type = np.float32,
    ) -> None:
        super().__init__(path, shape, dtype)
        self.temporary = Path(temporary)

    def __enter__(self) -> RowsPart:
        try:
            self._file = open(self.temporary, "r+b", buffering=0)
        except OSError as error:
            raise write_error(self.path, error, self.needed) from None
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._file:
            if error is None:
                os.fsync(self._file.fileno())  # before another machine reads it


def _fill(file: FileIO, array: np.ndarray) -> None:
    """Read exactly as many bytes as an array holds; FileError where the file ends before."""
    left = memoryview(array.reshape(-1).view(np.uint8))
    while len(left):
        count = file.readinto(left)
        if not count:
            raise FileError(f"{file.name}: became shorter while it was read: does another program write it?")
        left = left[count:]
