"""A reader of pickles that builds numbers, text, containers and numpy arrays, and refuses everything else by name.

Nothing of the file is ever called: the few globals that numpy writes are replaced by small classes of our own that
only keep what they were given, and arrays are made at the end from plain bytes. Allowing "anything in numpy" would not
be safe: the package holds functions that run text as code.

Long byte strings, the data of large arrays, do not pass through Python's unpickler, which would keep a copy: they are
cut out of what it is given, and read from the file into the array that they belong to.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cryosuite.errors import FileError, InputError
from cryosuite.formats.checks import existing_file, printable

_LONG = 1 << 16  # bytes: strings from this length on are read where they belong
_BYTES = ("BINBYTES", "BINBYTES8", "BYTEARRAY8")
_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16|[SUV]\d{1,6}|O8?|\?)")
_MAX_DEPTH = 50


class _Cut:
    """A long byte string that stays in the file until it is asked for."""

    __slots__ = ("_begin", "_size", "_stream")

    def __init__(self, stream: BinaryIO, begin: int, size: int) -> None:
        self._stream, self._begin, self._size = stream, begin, size

    def __setstate__(self, _: object) -> None:
        raise ValueError("bytes with a state")

    def __len__(self) -> int:
        return self._size

    def read_into(self, buffer: memoryview) -> None:
        """Fill a buffer of this length. Raises EOFError where the file has become shorter."""
        self._stream.seek(self._begin)
        while len(buffer):
            count = self._stream.readinto(buffer)
            if not count:
                raise EOFError
            buffer = buffer[count:]

    def read(self) -> bytes:
        """The bytes themselves."""
        found = bytearray(self._size)
        self.read_into(memoryview(found))
        return bytes(found)


class _Dtype:
    """Stands in for numpy.dtype: remembers its text and byte order."""

    def __init__(self, spec: object, *_: object) -> None:
        if not isinstance(spec, str) or not _DTYPE.fullmatch(spec):
            raise ValueError(f"array type {spec!r} is not a plain number type")
        self.spec, self.order = spec, "="

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "="):
            raise ValueError("damaged array type")
        if state[2] is not None or state[3] is not None or state[4] is not None:
            raise ValueError("arrays with named fields are not expected here")
        self.order = state[1]

    def resolve(self) -> np.dtype:
        """The numpy type; objects are refused here, after the whole file was looked through."""
        if "O" in self.spec:
            raise ValueError("an array of Python objects is refused: only arrays of numbers or text are read")
        dtype = np.dtype(self.spec)
        return dtype.newbyteorder(self.order) if self.order in "<>" else dtype


class _Array:
    """Stands in for an array under construction."""

    def __init__(self, *_: object) -> None:
        self.parts: tuple | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("damaged array")
        _, shape, dtype, fortran, data = state
        self.parts = (data, dtype, shape, "F" if fortran else "C")

    def __len__(self) -> int:
        data = self.parts[0] if self.parts else b""
        return len(data) if isinstance(data, (bytes, bytearray, str, _Cut)) else 0

    def resolve(self) -> np.ndarray:
        """The array; the bytes must be exactly those that shape and type ask for."""
        if self.parts is None:
            raise ValueError("damaged array")
        data, dtype, shape, order = self.parts
        if not isinstance(dtype, _Dtype):
            raise ValueError("damaged array type")
        dtype = dtype.resolve()
        if isinstance(data, str):  # pickles of Python 2 read as Latin-1
            data = data.encode("latin-1")
        if not isinstance(data, (bytes, bytearray, _Cut)) or order not in ("C", "F"):
            raise ValueError("damaged array")
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 32:
            raise ValueError("damaged array shape")
        if math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"an array of shape {shape} does not fit its {len(data)} bytes")
        if not isinstance(data, _Cut):
            return np.frombuffer(data, dtype).reshape(shape, order=order).copy(order="K")
        flat = np.empty(len(data) // dtype.itemsize, dtype)
        data.read_into(memoryview(flat.view(np.uint8)))
        return flat.reshape(shape, order=order)


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _frombuffer(data: object, dtype: object, shape: object, order: object, *_: object) -> _Array:
    array = _Array()
    array.parts = (data, dtype, shape, order)
    return array


def _scalar(dtype: object, data: object = b"") -> _Array:
    array = _Array()
    array.parts = (data, dtype, (), "C")
    return array


def _latin1(text: object, encoding: object = "latin1") -> bytes:
    """What ``_codecs.encode`` is used for in pickles of protocol 0 to 2: bytes written as text."""
    if not isinstance(text, str) or str(encoding).replace("-", "") != "latin1":
        raise ValueError("damaged bytes")
    return text.encode("latin-1")


def _bytes(data: object = b"", *_: object) -> bytes | _Cut:
    if not isinstance(data, (bytes, bytearray, _Cut)):
        raise ValueError("damaged bytes")
    return data if isinstance(data, _Cut) else bytes(data)


def _ordered(pairs: object = (), *_: object) -> dict:
    return OrderedDict(pairs)


class _Global:
    """A stand-in as the pickle sees it: it can be called and nothing else.

    A pickle may set attributes of whatever it was given; on a bare function that would outlast the file.
    """

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: object) -> Any:
        return self._make(*arguments)

    def __setstate__(self, _: object) -> None:
        raise ValueError("a global with a state")


_ALLOWED: dict[tuple[str, str], _Global] = {
    ("numpy", "ndarray"): _Global(_Array),
    ("numpy", "dtype"): _Global(_Dtype),
    ("_codecs", "encode"): _Global(_latin1),
    ("builtins", "bytes"): _Global(_bytes),
    ("builtins", "bytearray"): _Global(_bytes),
    ("collections", "OrderedDict"): _Global(_ordered),
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[_core + ".multiarray", "_reconstruct"] = _Global(_reconstruct)
    _ALLOWED[_core + ".multiarray", "scalar"] = _Global(_scalar)
    _ALLOWED[_core + ".numeric", "_frombuffer"] = _Global(_frombuffer)


def _stand_in(path: Path, module: str, name: str) -> _Global:
    """The stand-in for a global that numpy writes; every other global ends the reading."""
    module = "builtins" if module == "__builtin__" else module  # its name in protocols 0 to 2
    allowed = _ALLOWED.get((module, name))
    if allowed is None:
        raise InputError(
            f"{path}: refused: the pickle asks for {printable(f'{module}.{name}')}; only numpy arrays, "
            "numbers, text and containers of them are read, because anything else can run code"
        )
    return allowed


class _Unpickler(pickle.Unpickler):
    """Of a pickle whose long byte strings were cut out, each replaced by its number as a persistent id."""

    def __init__(self, stream: BinaryIO, path: Path, cuts: list[_Cut]) -> None:
        super().__init__(stream, encoding="latin-1")
        self._path, self._cuts = path, cuts

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a global."""
        return _stand_in(self._path, module, name)

    def persistent_load(self, number: object) -> Any:
        """A byte string that was cut out: ids of the file's own were refused before."""
        if type(number) is int and 0 <= number < len(self._cuts):
            return self._cuts[number]
        raise _outside(self._path)


def _outside(path: Path) -> InputError:
    return InputError(f"{path}: refused: the pickle asks for objects outside the file (persistent id)")


class _Bounded:
    """A stream of so many bytes that gives no more than it has: one asked for 2^60 bytes would first make room."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size = stream, size
        self.tell, self.readline = stream.tell, stream.readline

    def read(self, count: int) -> bytes:
        return self._stream.read(min(count, self._size - self._stream.tell()))


def safe_load(path: str | os.PathLike, only_first: bool = False) -> list[Any]:
    """All objects pickled in a file, one after the other (cryoDRGN writes mu and logvar as two pickles).

    Admits numbers, text, bytes, None, tuples, lists, dicts, and numpy arrays and scalars of numbers or text in the
    forms that numpy 1 and 2 write with protocols 0 to 5. Nothing of the file is executed. Arrays take the memory that
    they need and hardly more (protocols 3 and 4). Raises InputError for a missing, empty, truncated or damaged file,
    and for any other global, naming it. ``only_first``: what follows the first object is not looked at.
    """
    path = existing_file(path, "pickle")
    try:
        with open(path, "rb") as stream:
            return _load(path, stream, os.fstat(stream.fileno()).st_size, only_first)
    except OSError as error:
        raise FileError(f"{path}: cannot read this pickle: {error.strerror or error}") from None


def load_bytes(path: Path, data: bytes, only_first: bool = False) -> list[Any]:
    """``safe_load`` of bytes that were found in ``path``."""
    return _load(path, io.BytesIO(data), len(data), only_first)


def _load(path: Path, stream: BinaryIO, size: int, only_first: bool) -> list[Any]:
    """The objects in a stream of ``size`` bytes that can be sought in."""
    loaded: list[Any] = []
    while stream.tell() < size and not (only_first and loaded):
        pickled, cuts = _without_long(path, stream, size)
        end = stream.tell()
        try:
            loaded.append(_Resolver(size).resolve(_Unpickler(io.BytesIO(pickled), path, cuts).load()))
        except (InputError, OSError):
            raise
        except EOFError:
            raise _truncated(path) from None
        except Exception as error:  # the bytes are anybody's: whatever breaks, breaks because of them
            text = str(error)
            if "truncated" in text or "exhausted" in text:
                raise _truncated(path) from None
            raise InputError(f"{path}: damaged pickle: {printable(text) or type(error).__name__}") from None
        stream.seek(end)
    return loaded


def _truncated(path: Path) -> InputError:
    return InputError(f"{path}: truncated: the pickle ends early; copy or write the file again")


def _without_long(path: Path, stream: BinaryIO, size: int) -> tuple[bytes, list[_Cut]]:
    """One pickle from where the stream stands, without its long byte strings; the stream then stands behind it.

    The pickle is walked through and not run: its end must be there, and no memo index may cost memory. Frames are left
    out where something was cut, as their lengths are no longer right.
    """
    cuts: list[_Cut] = []
    left_out: list[tuple[int, int, bytes]] = []  # begin, end, what stands there instead
    start = stream.tell()
    try:
        for opcode, argument, begin in pickletools.genops(_Bounded(stream, size)):
            end = stream.tell()
            if opcode.name in _BYTES and len(argument) >= _LONG:
                left_out.append((begin, end, pickle.BININT + struct.pack("<i", len(cuts)) + pickle.BINPERSID))
                cuts.append(_Cut(stream, end - len(argument), len(argument)))
            elif opcode.name == "FRAME":
                left_out.append((begin, end, b""))
            elif opcode.name in ("PUT", "LONG_BINPUT") and argument > size:
                raise InputError(f"{path}: damaged pickle: memo index {argument}")
            elif opcode.name in ("PERSID", "BINPERSID"):
                raise _outside(path)
            elif opcode.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                _stand_in(path, module, name)
    except (InputError, OSError):
        raise
    except Exception as error:
        text = str(error)
        if any(word in text for word in ("exhausted", "not enough data", "expected", "only", "no newline", "EOF")):
            raise _truncated(path) from None
        raise InputError(f"{path}: not a pickle, or a damaged one: {printable(text)}") from None
    del argument  # may be as large as the file
    return _cut_out(stream, start, stream.tell(), left_out if cuts else []), cuts


def _cut_out(stream: BinaryIO, start: int, end: int, left_out: list[tuple[int, int, bytes]]) -> bytes:
    """The bytes from ``start`` to ``end`` but for the parts left out; the stream then stands at ``end``."""
    stream.seek(start)
    if not left_out:
        return stream.read(end - start)
    kept = io.BytesIO()
    for begin, behind, instead in [*left_out, (end, end, b"")]:
        stream.seek(start)
        kept.write(stream.read(begin - start))
        kept.write(instead)
        start = behind
    stream.seek(end)
    return kept.getvalue()


class _Resolver:
    """Replaces the stand-ins in one loaded pickle by arrays; each shared object once.

    A few hundred bytes can hold lists of lists of the same list, 2^60 numbers to whoever walks through them, or
    thousands of arrays of the same bytes: what is said over and over is counted, and bounded by the size of the file.
    """

    def __init__(self, file_bytes: int) -> None:
        self.limit = 2 * file_bytes + 100_000
        self.bytes_left = file_bytes  # for arrays: each has its own bytes in the file
        self.seen: dict[
            int, tuple[Any, Any, int]
        ] = {}  # id -> stand-in (kept, so that the id stays its own), made, size

    def resolve(self, value: Any) -> Any:
        """The value with arrays in place of their stand-ins. Raises ValueError for what is no data."""
        return self._resolve(value, 0)[0]

    def _resolve(self, value: Any, depth: int) -> tuple[Any, int]:
        """What stands for ``value``, and the number of values in it, shared ones counted each time."""
        if isinstance(value, (str, bytes, bytearray, int, float, complex, type(None))):
            return value, 1
        if depth > _MAX_DEPTH:
            raise ValueError("containers are nested too deeply")
        if id(value) in self.seen:
            return self.seen[id(value)][1:]
        size = 1
        if isinstance(value, (_Array, _Cut)):
            self.bytes_left -= len(value)
            if self.bytes_left < 0:
                raise ValueError("its arrays repeat the same bytes")
            made: Any = value.read() if isinstance(value, _Cut) else value.resolve()
            made = made[()] if isinstance(made, np.ndarray) and made.ndim == 0 else made
        elif isinstance(value, (tuple, list)):
            parts = [self._resolve(item, depth + 1) for item in value]
            made, size = type(value)(part for part, _ in parts), 1 + sum(count for _, count in parts)
        elif isinstance(value, dict):
            parts = [(self._resolve(k, depth + 1), self._resolve(v, depth + 1)) for k, v in value.items()]
            made = {key: item for (key, _), (item, _) in parts}
            size = 1 + sum(a + b for (_, a), (_, b) in parts)
        else:
            name = "global" if isinstance(value, _Global) else type(value).__name__
            raise ValueError(f"a bare {name} is not data")
        if size > self.limit:
            raise ValueError("its containers repeat each other without end")
        self.seen[id(value)] = value, made, size
        return made, size
