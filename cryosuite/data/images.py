"""Images on demand from one or thousands of stacks: which file and which slice each row is, never the pixels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np

from cryosuite.errors import InputError

KNOWN_STACKS = 4096  # readers kept, 1.5 KB each: their headers need not be read again, files are opened by a pool


class Images(Protocol):
    """What a particle set needs of its images; sources that can fill a caller's array have ``read_into`` as well."""

    def __len__(self) -> int: ...

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Images (b, D, D) float32 of the rows, in their order."""
        ...

    def subset(self, rows: np.ndarray) -> Images:
        """The images of some rows, renumbered from 0."""
        ...

    def identity(self) -> np.ndarray:
        """A number (N,) int64 per row, the same for rows that show the same image."""
        ...


class ArrayImages:
    """Images held in memory, (N, D, D); for tests and small synthetic sets."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Images (b, D, D) float32 of the rows (a copy)."""
        return np.array(self.array[rows], dtype=np.float32)

    def subset(self, rows: np.ndarray) -> ArrayImages:
        """The images of some rows."""
        return ArrayImages(self.array[rows])

    def identity(self) -> np.ndarray:
        """A number (N,) int64 per row, the same for rows that show the same image."""
        return np.arange(len(self), dtype=np.int64)


class StackCache:
    """Readers of stacks (headers, no open files), shared by all subsets of a set; safe to use from several threads."""

    def __init__(self, limit: int = KNOWN_STACKS) -> None:
        self.limit = limit
        self._readers: OrderedDict[str, Any] = OrderedDict()
        self._lock = Lock()

    def get(self, path: Path | str) -> Any:
        """The reader of a stack; the one unused for longest is forgotten when there are too many."""
        from cryosuite.formats.mrc import StackReader

        key = str(path)
        with self._lock:
            reader = self._readers.pop(key, None)
            if reader is None:
                reader = StackReader(Path(path), warn=False)
            self._readers[key] = reader
            while len(self._readers) > self.limit:
                self._readers.popitem(last=False)
            return reader

    def __getstate__(self) -> dict[str, int]:
        return {"limit": self.limit}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["limit"])


class StackImages:
    """Rows that live in stacks on disk: per row the number of its file and its slice in it, 8 bytes together.

    Args:
        files: the stacks.
        file_id: (N,) row -> position in ``files``.
        slices: (N,) row -> image in that stack, counted from 0.
        signs: (N,) int8 +1/-1 for sets in which the contrast differs from row to row, else None.
        image: (N,) number of the image a row shows, where several slices are copies of one image, else None.
    """

    def __init__(
        self,
        files: Sequence[Path | str],
        file_id: np.ndarray,
        slices: np.ndarray,
        signs: np.ndarray | None = None,
        cache: StackCache | None = None,
        image: np.ndarray | None = None,
    ) -> None:
        self.files = list(files)
        self.file_id = np.asarray(file_id, dtype=np.int32)
        self.slices = np.asarray(slices, dtype=np.int32)
        self.signs, self.image = signs, image
        self.cache = cache or StackCache()

    @classmethod
    def of_stack(cls, path: Path | str, count: int) -> StackImages:
        """All ``count`` images of one stack, in order."""
        return cls([path], np.zeros(count, np.int32), np.arange(count, dtype=np.int32))

    def __len__(self) -> int:
        return len(self.slices)

    def subset(self, rows: np.ndarray) -> StackImages:
        """The images of some rows; readers are shared with this set."""
        signs, image = (None if values is None else values[rows] for values in (self.signs, self.image))
        return StackImages(self.files, self.file_id[rows], self.slices[rows], signs, self.cache, image)

    def identity(self) -> np.ndarray:
        """A number (N,) int64 per row, the same for rows that show the same image."""
        if self.image is not None:
            return self.image.astype(np.int64)
        known: dict[str, int] = {}  # a list may name a stack twice
        number = np.array([known.setdefault(str(path), place) for place, path in enumerate(self.files)], np.int64)
        return (number[self.file_id] << 32) | self.slices

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Images (b, D, D) float32 of the rows, in their order; each file is visited once, its slices in order."""
        rows = np.asarray(rows)
        first = self.cache.get(self.files[self.file_id[rows[0]] if len(rows) else 0])
        images = np.empty((len(rows), *first.box_size), np.float32)
        self.read_into(images, rows, np.arange(len(rows)))
        return images

    def read_into(self, images: np.ndarray, rows: np.ndarray, places: np.ndarray) -> None:
        """``read`` with the image of ``rows[i]`` at ``images[places[i]]``, images (n, D, D) float32.

        Raises InputError for a stack of another box.
        """
        file_id, slices = self.file_id[rows], self.slices[rows]
        one = (file_id[:1] == file_id).all()
        order = np.argsort(slices, kind="stable") if one else np.lexsort((slices, file_id))
        starts = np.flatnonzero(np.diff(file_id[order], prepend=-1))
        for begin, end in zip(starts, np.append(starts[1:], len(order))[: len(starts)], strict=True):
            part = order[begin:end]
            reader = self.cache.get(self.files[file_id[part[0]]])
            if reader.box_size != images.shape[1:]:
                raise InputError(
                    f"{reader.path}: box {reader.box_size}, but other stacks of the set have box {images.shape[1:]}. "
                    "Run `cryosuite preprocess` first: it brings all images to one box."
                )
            reader.read(slices[part], images, places[part])
        if self.signs is not None:
            images[places] *= self.signs[rows, None, None]
