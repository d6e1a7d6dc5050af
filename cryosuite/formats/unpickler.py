"""A reader of pickles that builds numbers, text, containers and numpy arrays, and refuses everything else by name.

Nothing of the file is ever called: the few globals that numpy writes are replaced by small classes of our own that
only keep what they were given, and arrays are made at the end from plain bytes. Allowing "anything in numpy" would not
be safe: the package holds functions that run text as code.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cryosuite.errors import InputError
from cryosuite.formats.checks import printable, read_bytes

_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16|[SUV]\d{1,6}|O8?|\?)")
_MAX_DEPTH = 50


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
        if not isinstance(data, (bytes, bytearray)) or order not in ("C", "F"):
            raise ValueError("damaged array")
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 32:
            raise ValueError("damaged array shape")
        if math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"an array of shape {shape} does not fit its {len(data)} bytes")
        return np.frombuffer(data, dtype).reshape(shape, order=order).copy(order="K")


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


def _bytes(data: object = b"", *_: object) -> bytes:
    if not isinstance(data, (bytes, bytearray)):
        raise ValueError("damaged bytes")
    return bytes(data)


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


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, path: Path) -> None:
        super().__init__(stream, encoding="latin-1")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a global that numpy writes; every other global ends the reading."""
        module = "builtins" if module == "__builtin__" else module  # its name in protocols 0 to 2
        allowed = _ALLOWED.get((module, name))
        if allowed is None:
            raise InputError(
                f"{self._path}: refused: the pickle asks for {printable(f'{module}.{name}')}; only numpy arrays, "
                "numbers, text and containers of them are read, because anything else can run code"
            )
        return allowed

    def persistent_load(self, _: object) -> Any:
        raise InputError(f"{self._path}: refused: the pickle asks for objects outside the file (persistent id)")


def safe_load(path: str | os.PathLike, only_first: bool = False) -> list[Any]:
    """All objects pickled in a file, one after the other (cryoDRGN writes mu and logvar as two pickles).

    Admits numbers, text, bytes, None, tuples, lists, dicts, and numpy arrays and scalars of numbers or text in the
    forms that numpy 1 and 2 write with protocols 0 to 5. Nothing of the file is executed. Raises InputError for a
    missing, empty, truncated or damaged file, and for any other global, naming it. ``only_first``: what follows the
    first object is not looked at.
    """
    return load_bytes(Path(path), read_bytes(path, "pickle"), only_first)


def load_bytes(path: Path, data: bytes, only_first: bool = False) -> list[Any]:
    """``safe_load`` of bytes that were found in ``path``."""
    stream = io.BytesIO(data)
    loaded: list[Any] = []
    while stream.tell() < len(data) and not (only_first and loaded):
        start = stream.tell()
        _check_opcodes(path, stream, data)
        stream.seek(start)
        try:
            loaded.append(_Resolver(len(data)).resolve(_Unpickler(stream, path).load()))
        except InputError:
            raise
        except EOFError:
            raise _truncated(path) from None
        except Exception as error:  # the bytes are anybody's: whatever breaks, breaks because of them
            text = str(error)
            if "truncated" in text or "exhausted" in text:
                raise _truncated(path) from None
            raise InputError(f"{path}: damaged pickle: {printable(text) or type(error).__name__}") from None
    return loaded


def _truncated(path: Path) -> InputError:
    return InputError(f"{path}: truncated: the pickle ends early; copy or write the file again")


def _check_opcodes(path: Path, stream: io.BytesIO, data: bytes) -> None:
    """Walk through one pickle without running it: its end must be there, and no memo index may cost memory."""
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("PUT", "LONG_BINPUT") and argument > len(data):
                raise InputError(f"{path}: damaged pickle: memo index {argument}")
            if opcode.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                _Unpickler(stream, path).find_class(module, name)
    except InputError:
        raise
    except Exception as error:
        text = str(error)
        if any(word in text for word in ("exhausted", "not enough data", "expected", "only", "no newline", "EOF")):
            raise _truncated(path) from None
        raise InputError(f"{path}: not a pickle, or a damaged one: {printable(text)}") from None


class _Resolver:
    """Replaces the stand-ins in one loaded pickle by arrays; each shared object once.

    A few hundred bytes can hold lists of lists of the same list, 2^60 numbers to whoever walks through them: what is
    said over and over is counted, and bounded by the size of the file.
    """

    def __init__(self, file_bytes: int) -> None:
        self.limit = 2 * file_bytes + 100_000
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
        if isinstance(value, _Array):
            array = value.resolve()
            made: Any = array[()] if array.ndim == 0 else array
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
