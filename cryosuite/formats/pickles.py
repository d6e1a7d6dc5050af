"""cryoDRGN's pickles: poses, CTF tables, indices, latents and labels, in and out, and torch checkpoints of others."""

from __future__ import annotations

import io
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from cryosuite.errors import InputError, notice
from cryosuite.formats.atomic import atomic_path
from cryosuite.formats.checks import (
    check_ctf,
    check_rotations,
    check_shifts,
    existing_file,
    name_rows,
    printable,
    require_finite,
)
from cryosuite.formats.pickle_pieces import array_pieces
from cryosuite.formats.unpickler import safe_load

__all__ = [
    "checked_indices",
    "read_array",
    "read_ctf",
    "read_indices",
    "read_labels",
    "read_latent",
    "read_poses",
    "read_torch",
    "safe_load",
    "torch_source",
    "write_pickle",
]


def _one(path: str | os.PathLike, what: str) -> Any:
    """The only object in a pickle file."""
    objects = safe_load(path)
    if len(objects) != 1:
        raise InputError(f"{path}: expected one object ({what}), found {len(objects)} pickles in the file")
    return objects[0]


def _numbers(value: Any, path: str | os.PathLike, what: str) -> np.ndarray:
    """An array of numbers, from an array or a list of numbers."""
    if isinstance(value, (list, tuple)):
        try:
            value = np.array(value)
        except ValueError:
            raise InputError(f"{path}: {what} is a ragged list, expected an array of numbers") from None
    if not isinstance(value, np.ndarray):
        raise InputError(f"{path}: expected {what} as an array, found {type(value).__name__}")
    if value.dtype.kind not in "biuf":
        raise InputError(f"{path}: expected {what} as numbers, found type {value.dtype}")
    return value


def read_array(path: str | os.PathLike, shape: tuple[int | None, ...], what: str, kinds: str = "fiu") -> np.ndarray:
    """The first array of numbers in a pickle, of this shape (None: any length) and of these kinds of numpy type.

    What follows the first object is not looked at. Raises InputError for anything else.
    """
    values = _numbers(safe_load(path, only_first=True)[0], path, what)
    fits = values.ndim == len(shape) and all(
        want in (None, have) for want, have in zip(shape, values.shape, strict=True)
    )
    if not fits or values.dtype.kind not in kinds:
        wanted = " x ".join("any" if n is None else str(n) for n in shape)
        raise InputError(
            f"{path}: expected {what} as numbers of shape {wanted}, found {values.dtype} of shape {values.shape}"
        )
    return values


def read_poses(path: str | os.PathLike, n: int | None = None, checked: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Poses in cryoDRGN's form: the pickled tuple (R, t), (R,) or R alone.

    Returns rotations float32 (N, 3, 3) and shifts float32 (N, 2) as a fraction of the box (zeros where the file has
    none). ``n`` is the number of images expected. Raises InputError naming rows (0-based) for NaN, matrices that are no
    rotations, shifts that are no fractions of the box, and for lengths that disagree. Without ``checked`` the values
    are taken as they are: poses that a run wrote itself, of which some may be unknown.
    """
    value = _one(path, "the tuple (R, t)")
    parts = list(value) if isinstance(value, (tuple, list)) else [value]
    if not 1 <= len(parts) <= 2:
        raise InputError(f"{path}: expected the tuple (R, t), found {len(parts)} parts")
    rotation = _numbers(parts[0], path, "rotations R (N, 3, 3)")
    if rotation.ndim != 3 or rotation.shape[1:] != (3, 3):
        raise InputError(f"{path}: rotations have shape {rotation.shape}, expected (N, 3, 3)")
    shift = np.zeros((len(rotation), 2), np.float32)
    if len(parts) == 2 and parts[1] is not None:
        shift = _numbers(parts[1], path, "shifts t (N, 2)")
        if shift.ndim != 2 or shift.shape[1] != 2:
            raise InputError(f"{path}: shifts have shape {shift.shape}, expected (N, 2)")
    if len(shift) != len(rotation):
        raise InputError(
            f"{path}: {len(rotation)} rotations but {len(shift)} shifts: one of each per image is expected"
        )
    _require_count(path, len(rotation), n, "poses")
    if checked:
        check_rotations(rotation, path)
        check_shifts(shift, path)
    return _float32(rotation), _float32(shift)


def _float32(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32)


def _require_count(path: str | os.PathLike, found: int, n: int | None, what: str) -> None:
    if n is not None and found != n:
        raise InputError(f"{path}: {found} {what} for {n} images: one per image of the stack is expected")


def read_ctf(path: str | os.PathLike, n: int | None = None) -> np.ndarray:
    """CTF table in cryoDRGN's form, float32 (N, 9): D, pixel size (A), defocus U and V (A), astigmatism angle (deg),
    voltage (kV), Cs (mm), amplitude contrast, phase shift (deg). Raises InputError naming the field and rows."""
    table = _numbers(_one(path, "an N x 9 table"), path, "CTF parameters")
    if table.ndim != 2 or table.shape[1] != 9:
        raise InputError(
            f"{path}: the CTF table has shape {table.shape}, expected N x 9: D, pixel size, defocus U, defocus V, "
            "angle, voltage, Cs, amplitude contrast, phase shift"
        )
    _require_count(path, len(table), n, "CTF rows")
    with np.errstate(over="ignore"):
        table = _float32(table)
    check_ctf(table, path)
    return table


def read_indices(path: str | os.PathLike, n_total: int | None = None) -> np.ndarray:
    """Indices (0-based, into the original stack) as int64, order kept; an array or list of integers.

    ``n_total`` is the number of images of the stack. A boolean mask of that length is read as the positions where it is
    true, with a notice. Raises InputError for other types, negative indices and indices beyond the stack; notices
    duplicates.
    """
    return checked_indices(_one(path, "a list of indices"), path, n_total)


def checked_indices(value: Any, path: str | os.PathLike, n_total: int | None = None) -> np.ndarray:
    """``read_indices`` of what was loaded from ``path``, or given by a program."""
    index = _numbers(value, path, "indices")
    if index.ndim != 1:
        raise InputError(f"{path}: indices have shape {index.shape}, expected one dimension")
    if index.dtype.kind == "b":
        if n_total is None or len(index) != n_total:
            known = "is not known here" if n_total is None else f"is {n_total}"
            raise InputError(
                f"{path}: holds a bool mask of {len(index)} values, and the number of images {known}: "
                "give integer indices"
            )
        notice(f"{path}: a bool mask of {n_total} values, read as the {int(index.sum())} positions where it is true")
        return np.flatnonzero(index).astype(np.int64)
    if index.dtype.kind == "f" and len(index):
        raise InputError(f"{path}: indices must be integers, found type {index.dtype}")
    if len(index) and index.max() > np.iinfo(np.int64).max:
        raise InputError(f"{path}: index {index.max()} is beyond any stack")
    index = index.astype(np.int64)
    if len(index) and index.min() < 0:
        raise InputError(f"{path}: negative index {index.min()}: indices count from 0 into the original stack")
    if n_total is not None and len(index) and index.max() >= n_total:
        raise InputError(f"{path}: index {index.max()} is beyond the stack of {n_total} images (indices count from 0)")
    repeats = len(index) - len(np.unique(index))
    if repeats:
        notice(f"{path}: {repeats} duplicate indices: those images are used more than once")
    return index


def read_latent(path: str | os.PathLike, finite: bool = True) -> list[np.ndarray]:
    """Latents: [mu] or [mu, logvar], each float32 (N, zdim).

    Raises InputError for wrong shapes, and for NaN (naming rows) unless ``finite`` is False.
    """
    objects = safe_load(path)
    if len(objects) == 1 and isinstance(objects[0], (tuple, list)) and len(objects[0]) in (1, 2):
        first = objects[0][0]
        objects = list(objects[0]) if isinstance(first, np.ndarray) else objects
    if len(objects) > 2:
        raise InputError(f"{path}: expected one latent array or two (mu, logvar), found {len(objects)} pickles")
    latents = []
    for value in objects:
        array = _numbers(value, path, "latents (N, zdim)")
        array = array[:, None] if array.ndim == 1 else array
        if array.ndim != 2:
            raise InputError(f"{path}: latents have shape {array.shape}, expected (N, zdim)")
        if finite:
            require_finite(array, path, "latent")
        latents.append(_float32(array))
    if len(latents) == 2 and latents[0].shape != latents[1].shape:
        raise InputError(f"{path}: mu has shape {latents[0].shape} but logvar {latents[1].shape}")
    return latents


def read_labels(path: str | os.PathLike, n: int | None = None, unlabelled: bool = False) -> np.ndarray:
    """Class labels (0-based) as int64 (N,). Raises InputError for anything but whole numbers >= 0.

    ``unlabelled`` admits -1 too: a particle that ``analyze`` left out.
    """
    labels = _numbers(_one(path, "a list of labels"), path, "labels")
    labels = labels.reshape(-1) if labels.ndim == 2 and 1 in labels.shape else labels
    if labels.ndim != 1:
        raise InputError(f"{path}: labels have shape {labels.shape}, expected one dimension")
    require_finite(labels, path, "label")
    if labels.dtype.kind == "f" and not np.array_equal(labels, np.round(labels)):
        raise InputError(f"{path}: labels must be whole numbers")
    bad = np.flatnonzero((labels < (-1 if unlabelled else 0)) | (labels > 2**53))
    if len(bad):
        raise InputError(f"{path}: label {labels[bad[0]]} in {name_rows(bad)} (0-based): labels count from 0")
    _require_count(path, len(labels), n, "labels")
    return labels.astype(np.int64)


def write_pickle(path: str | os.PathLike, *objects: Any) -> None:
    """Write each object as one pickle after the other, atomically: what ``safe_load`` reads, and nothing else.

    An array is written in pieces: memory does not grow with it.
    """
    for value in objects:
        _require_plain(value)
    needed = sum(value.nbytes for value in objects if isinstance(value, np.ndarray))
    with atomic_path(path, needed=needed) as temporary, open(temporary, "wb") as file:
        for value in objects:
            pieces = isinstance(value, np.ndarray) and value.ndim > 0 and value.nbytes > 0
            file.writelines(array_pieces(value) if pieces else [pickle.dumps(value, protocol=4)])


def _require_plain(value: Any) -> None:
    """TypeError for what would not be read back."""
    if isinstance(value, (list, tuple)):
        for item in value:
            _require_plain(item)
    elif isinstance(value, dict):
        for item in value.values():
            _require_plain(item)
    elif isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufcSU":
            raise TypeError(f"cannot pickle an array of type {value.dtype}")
    elif not isinstance(value, (str, bytes, int, float, complex, np.generic, type(None))):
        raise TypeError(f"cannot pickle a {type(value).__name__}: only numpy arrays, numbers, text and containers")


def torch_source(path: str | os.PathLike) -> Path | io.BytesIO:
    """What ``torch.load`` is to be given for a file: a zip archive by its path, a pickle (the form before 2020) by its
    bytes, because of a file torch takes at once as much memory as any length in it asks for.

    Raises ValueError for what is neither, OSError for a file that cannot be read.
    """
    with open(path, "rb") as stream:
        start = stream.read(4)
        if start == b"PK\x03\x04":
            return Path(path)
        if start[:1] != pickle.PROTO:
            raise ValueError("it begins neither as a zip archive nor as a pickle")
        return io.BytesIO(start + stream.read())


def read_torch(path: str | os.PathLike, map_location: str = "cpu") -> Any:
    """A torch checkpoint, through ``torch.load(weights_only=True)``.

    Raises InputError for a missing or damaged file, and for one that asks for anything but tensors and plain
    containers: the refused global is named.
    """
    path = existing_file(path, "checkpoint")
    import torch

    try:
        return torch.load(torch_source(path), map_location=map_location, weights_only=True)
    except MemoryError:  # of the machine, not of the file
        raise
    except Exception as error:  # torch raises a dozen types for damaged files
        text = str(error)
        refused = re.search(r"GLOBAL (\S+)", text) or re.search(r"global[: ]+`?([\w.]+)", text)
        if refused:
            raise InputError(
                f"{path}: refused: the checkpoint asks for {printable(refused.group(1))}; only tensors and plain "
                "containers are loaded, because anything else can run code"
            ) from None
        reason = printable(text.strip().split("\n")[0]) or type(error).__name__
        raise InputError(f"{path}: not a readable torch checkpoint: {reason}") from None
