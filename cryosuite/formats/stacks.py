"""Stacks of images: read at any row without holding a file handle or the stack, written as a stream.

Reads are positional (``pread``) into the caller's rows rather than through a mapped view: a mapping keeps its file
open, counts every page it touched as memory of the program, and dies by a signal when a file shrinks under it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from mrcfile.dtypes import HEADER_DTYPE

from cryosuite.errors import FileError, InputError, notice
from cryosuite.formats.atomic import atomic_path, write_all, write_error
from cryosuite.formats.checks import name_rows
from cryosuite.formats.mrc_header import HEADER_BYTES, MrcHeader, read_header

OPEN_FILES = 64  # descriptors kept for all stacks together, however many files a data set has
_BUFFERS = 1024  # that one read may fill: what Linux and macOS take
_STATISTICS_BYTES = 1 << 24  # of float64 copies made for the header statistics at a time
_MODE_OF = {np.dtype(np.float32): 2, np.dtype(np.float16): 12}


class _OpenFiles:
    """A small pool of file descriptors shared by all readers; the longest unused one is closed first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._files: OrderedDict[tuple, list[int]] = OrderedDict()  # path and inode -> [descriptor, users]

    @contextlib.contextmanager
    def borrow(self, path: Path, inode: tuple[int, int]) -> Iterator[int]:
        """A descriptor of ``path`` that stays open at least until the block ends."""
        key = (str(path), *inode)  # a file written anew under the same name is another file
        with self._lock:
            entry = self._files.get(key)
            if entry is None:
                entry = [os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), 0]
                if _inode(entry[0]) != inode:
                    os.close(entry[0])
                    raise FileError(f"{path}: the file was replaced while it was in use")
                self._files[key] = entry
            entry[1] += 1
            self._files.move_to_end(key)
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1
                if self._files.get(key) is not entry:  # forgotten while in use
                    if entry[1] == 0:
                        os.close(entry[0])
                else:
                    self._shrink()

    def _shrink(self) -> None:
        for key in [key for key, entry in self._files.items() if entry[1] == 0]:
            if len(self._files) <= self.limit:
                break
            os.close(self._files.pop(key)[0])

    def forget(self, path: Path, inode: tuple[int, int]) -> None:
        """Close the descriptor of ``path``, now or when its last user is done."""
        with self._lock:
            entry = self._files.pop((str(path), *inode), None)
            if entry is not None and entry[1] == 0:
                os.close(entry[0])


_FILES = _OpenFiles(OPEN_FILES)


def _inode(file: int | Path) -> tuple[int, int]:
    """What tells a file from another of the same name: device and inode."""
    found = os.stat(file)
    return found.st_dev, found.st_ino


class StackReader:
    """Images of one MRC stack, read on demand as float32 (b, ny, nx).

    The header is read and checked when the reader is made (``check`` also asks for square images of even size), the
    file is opened when images are asked for. ``warn=False`` keeps quiet about odd but readable headers: thousands of
    files of one data set would say the same. Safe to use from several threads.
    """

    def __init__(self, path: str | os.PathLike, check: bool = False, warn: bool = True) -> None:
        self.header: MrcHeader = read_header(path)
        self.path = self.header.path
        self._inode = _inode(self.path)
        self.count, self.pixel_size = self.header.nz, self.header.pixel_size
        self.shape = (self.header.ny, self.header.nx)
        if self.header.compressed:
            raise InputError(f"{self.path}: a stack is read at random places: uncompress it first (gunzip)")
        if check:
            self.require_square()
        if warn:
            for problem in self.header.problems:
                notice(problem)

    @property
    def box_size(self) -> tuple[int, int]:
        """(ny, nx)."""
        return self.shape

    def require_square(self) -> int:
        """The box size; raises InputError unless the images are square with an even number of pixels."""
        ny, nx = self.shape
        if ny != nx:
            raise InputError(f"{self.path}: images are {nx} x {ny} pixels: they must be square")
        if nx % 2:
            raise InputError(f"{self.path}: images are {nx} pixels wide: the box size must be even; crop or pad them")
        return nx

    def read(
        self,
        rows: np.ndarray | list[int] | slice | None = None,
        out: np.ndarray | None = None,
        places: np.ndarray | None = None,
    ) -> np.ndarray:
        """Images ``rows`` (0-based, any order, repeats allowed; None for all) as float32 (b, ny, nx).

        Contiguous runs are read at once. ``out`` (n, ny, nx) takes the images when given, image i at ``places[i]``
        (default i); float32 images go there from the file without a copy between. Raises InputError for a row outside
        the stack or a file that became shorter.
        """
        rows = np.arange(self.count)[rows] if rows is None or isinstance(rows, slice) else np.asarray(rows)
        rows = rows.astype(np.int64).reshape(-1)
        bad = rows[(rows < 0) | (rows >= self.count)]
        if len(bad):
            raise InputError(f"{self.path}: {name_rows(bad, 'image')} (0-based) asked for, the stack has {self.count}")
        if out is None:
            out = np.empty((len(rows), *self.shape), np.float32)
        order = np.argsort(rows, kind="stable") if np.any(np.diff(rows) < 0) else np.arange(len(rows))
        ordered, to = rows[order], order if places is None else np.asarray(places)[order]
        starts = np.flatnonzero(np.diff(ordered, prepend=-2) != 1)
        ends = np.append(starts[1:], len(rows))[: len(starts)]
        same = out.dtype == self.header.dtype and out.flags.c_contiguous and out.shape[1:] == self.shape
        read = self._straight if same else self._converted
        try:
            with _FILES.borrow(self.path, self._inode) as descriptor:
                for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                    read(descriptor, int(ordered[start]), out, to[start:end])
        except OSError as error:
            raise FileError(f"{self.path}: cannot read this stack: {error.strerror or error}") from None
        return out

    def _straight(self, descriptor: int, first: int, out: np.ndarray, places: np.ndarray) -> None:
        """A run of images from ``first`` on, each read where it belongs in ``out``."""
        size, flat = out.itemsize * out[0].size, memoryview(out.reshape(-1).view(np.uint8))
        if places[-1] - places[0] == len(places) - 1 and (np.diff(places) == 1).all():
            self._fill(descriptor, first, [flat[places[0] * size : (places[-1] + 1) * size]])
            return
        starts = (places * size).tolist()
        for begin in range(0, len(starts), _BUFFERS):
            self._fill(descriptor, first + begin, [flat[at : at + size] for at in starts[begin : begin + _BUFFERS]])

    def _converted(self, descriptor: int, first: int, out: np.ndarray, places: np.ndarray) -> None:
        """The same for images of another type in the file."""
        images = np.empty((len(places), *self.shape), self.header.dtype)
        self._fill(descriptor, first, [memoryview(images.view(np.uint8).reshape(-1))])
        out[places] = images

    def _fill(self, descriptor: int, first: int, left: list[memoryview]) -> None:
        """Fill buffers, one after the other, with the bytes of the file from image ``first`` on."""
        position = self.header.data_offset + first * self.shape[0] * self.shape[1] * self.header.dtype.itemsize
        while left:
            done = os.preadv(descriptor, left, position)
            if done == 0:
                raise FileError(f"{self.path}: the file became shorter while it was read")
            position += done
            full = 0
            while full < len(left) and done >= len(left[full]):
                done -= len(left[full])
                full += 1
            left = left[full:]
            if done:
                left[0] = left[0][done:]

    def close(self) -> None:
        """Give the file back; the reader opens it again when needed."""
        _FILES.forget(self.path, self._inode)

    def __len__(self) -> int:
        return self.count

    def __enter__(self) -> StackReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StackWriter:
    """Write a stack of ``count`` images as a stream: a context manager with ``write(images)``.

    The file appears under its name only when all images were written; header statistics are those of what was
    written. ``pixel_size`` in A; ``dtype`` float32 (mode 2) or float16 (mode 12). Raises InputError for a full disk
    (with the space needed), a wrong image size, or a wrong number of images at the end.
    """

    first = 0  # number of the first image in the file

    def __init__(
        self,
        path: str | os.PathLike,
        count: int,
        box_size: int,
        pixel_size: float | None,
        dtype: np.dtype | type = np.float32,
    ) -> None:
        self.path, self.count, self.box_size = Path(path), int(count), int(box_size)
        self.pixel_size, self.dtype = pixel_size, np.dtype(dtype)
        if self.dtype not in _MODE_OF:
            raise InputError(f"{path}: stacks are written as float32 or float16, not {self.dtype}")
        if self.count < 1 or self.box_size < 1:
            raise InputError(f"{path}: cannot write a stack of {count} images of {box_size} pixels")
        self.image_bytes = self.box_size**2 * self.dtype.itemsize
        self.needed = HEADER_BYTES + self.count * self.image_bytes
        self.written, self._sum, self._squares, self._low, self._high = 0, 0.0, 0.0, np.inf, -np.inf

    def __enter__(self) -> StackWriter:
        with contextlib.ExitStack() as opened:
            self.temporary = opened.enter_context(atomic_path(self.path, needed=self.needed))
            self._file = opened.enter_context(open(self.temporary, "w+b", buffering=0))
            write_all(self._file, bytes(HEADER_BYTES))
            self._opened = opened.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.ExitStack() as opened:
            opened.push(self._opened)
            if error is not None:
                raise error.with_traceback(trace)  # through the file and atomic_path, which leave nothing behind
            if self.written != self.count:
                raise InputError(f"{self.path}: {self.written} of {self.count} images were written: file not kept")
            self._file.seek(0)
            write_all(self._file, self._header())

    def write(self, images: np.ndarray, numbers: np.ndarray | None = None) -> None:
        """Append images (b, D, D) or one image (D, D).

        ``numbers`` (b,): what a message calls the images; None: their places in this file. Raises InputError for a
        wrong size, too many images, and values that are not finite in the type of the file.
        """
        images = np.asarray(images)
        images = images[None] if images.ndim == 2 else images
        if images.shape[1:] != (self.box_size, self.box_size):
            raise InputError(f"{self.path}: expected images of {self.box_size} pixels, got shape {images.shape}")
        if self.written + len(images) > self.count:
            raise InputError(f"{self.path}: more images than the {self.count} announced")
        step = max(1, _STATISTICS_BYTES // (8 * self.box_size**2))
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            self._write_part(images[part], None if numbers is None else numbers[part])

    def _write_part(self, images: np.ndarray, numbers: np.ndarray | None) -> None:
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(images, self.dtype.newbyteorder("<"))
        wide = stored.astype(np.float64)
        low, high = wide.min(), wide.max()
        if not np.isfinite(low) or not np.isfinite(high):
            bad = np.flatnonzero(~np.isfinite(wide).all(axis=(1, 2)))
            bad = bad + self.first + self.written if numbers is None else np.asarray(numbers)[bad]
            raise InputError(
                f"{self.path}: {name_rows(bad, 'image')} (0-based) would hold NaN or infinity as {self.dtype}: leave "
                "such images out, or write float32"
            )
        self._count(low, high, wide.sum(), np.square(wide, out=wide).sum())
        try:
            write_all(self._file, stored.data)
        except OSError as error:
            raise write_error(self.path, error, self.needed) from error
        self.written += len(images)

    def _count(self, low: float, high: float, total: float, squares: float) -> None:
        """Take the statistics of a part into those of the stack."""
        self._low, self._high = min(self._low, low), max(self._high, high)
        self._sum, self._squares = self._sum + total, self._squares + squares

    def allocate(self) -> None:
        """Give the file its whole length, so that several processes can fill it, each a part (`StackPart`)."""
        try:
            self._file.truncate(self.needed)
        except OSError as error:
            raise write_error(self.path, error, self.needed) from error

    def put_together(self, parts: list[StackPart]) -> None:
        """Take over what parts have written, in their order: they are moved up to each other where images are left out.

        ``count`` becomes the number of images that are there.
        """
        for part in parts:
            self._move(part.first, self.written, part.written)
            self.written += part.written
            for statistics in part.statistics:
                self._count(*statistics)
        self.count = self.written
        self._file.truncate(HEADER_BYTES + self.count * self.image_bytes)

    def _move(self, first: int, to: int, count: int) -> None:
        """Bring ``count`` images from number ``first`` to number ``to``, which is not behind it."""
        step = max(1, _STATISTICS_BYTES // self.image_bytes)
        for start in range(0, count if first != to else 0, step):
            self._file.seek(HEADER_BYTES + (first + start) * self.image_bytes)
            data = self._file.read(min(step, count - start) * self.image_bytes)
            self._file.seek(HEADER_BYTES + (to + start) * self.image_bytes)
            write_all(self._file, data)

    def _header(self) -> bytes:
        header = np.zeros((), HEADER_DTYPE.newbyteorder("<"))
        size = float(self.pixel_size or 0.0)
        header["nx"] = header["ny"] = header["mx"] = header["my"] = self.box_size
        header["nz"], header["mz"], header["mode"] = self.count, 1, _MODE_OF[self.dtype]
        header["cella"] = (size * self.box_size, size * self.box_size, size)
        header["cellb"] = (90.0, 90.0, 90.0)
        header["mapc"], header["mapr"], header["maps"] = 1, 2, 3
        number = self.count * self.box_size**2
        mean = self._sum / number
        with np.errstate(over="ignore", invalid="ignore"):
            header["dmin"], header["dmax"], header["dmean"] = self._low, self._high, mean
            header["rms"] = np.sqrt(max(self._squares / number - mean * mean, 0.0))
        header["map"], header["machst"], header["nversion"] = b"MAP ", (0x44, 0x44, 0, 0), 20141
        header["nlabl"] = 1
        header["label"][0] = b"cryosuite"
        return header.tobytes()


class StackPart(StackWriter):
    """One process's part of a stack: images from number ``first`` on, into the file that ``allocate`` made.

    ``statistics`` and ``written`` are what the writer of the whole needs to know (``put_together``).
    """

    def __init__(
        self, path: str | os.PathLike, temporary: str | os.PathLike, first: int, count: int, box_size: int,
        dtype: np.dtype | type = np.float32,
    ) -> None:  # fmt: skip
        super().__init__(path, max(count, 1), box_size, None, dtype)
        self.temporary, self.first = Path(temporary), first
        self.statistics: list[tuple[float, float, float, float]] = []

    def __enter__(self) -> StackPart:
        self._file = open(self.temporary, "r+b", buffering=0)
        self._file.seek(HEADER_BYTES + self.first * self.image_bytes)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._file:
            if error is None:
                os.fsync(self._file.fileno())  # before another machine reads it

    def _count(self, low: float, high: float, total: float, squares: float) -> None:
        self.statistics.append((float(low), float(high), float(total), float(squares)))

    def __getstate__(self) -> dict:
        """Sent to the process that writes the header: without the file."""
        return {name: value for name, value in self.__dict__.items() if name != "_file"}
