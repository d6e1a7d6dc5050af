"""What every reader asks of what it read: a file that exists, finite rows, rotations that rotate, a sane CTF table."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cryosuite.errors import FileError, InputError, notice

ROTATION_TOLERANCE = 1e-3  # float32 matrices written with few digits are still rotations
MAX_SHIFT = 1.0  # fraction of the box; anything larger is a shift in pixels or Angstrom
MAX_VOLTAGE_KV = 2000.0
MIN_DEFOCUS_A = 100.0  # a whole table below this is in micrometres, not Angstrom


def printable(text: object, limit: int = 200) -> str:
    """Text out of a file or a library's error, fit for one line of a message: no line breaks, no control characters."""
    words = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "?" for c in words[:limit])


def existing_file(path: str | os.PathLike, what: str = "file") -> Path:
    """Return ``path`` as a Path when it is a non-empty regular file.

    Raises InputError that says where a missing file was looked for, or that the path is a folder, or that it is empty.
    """
    path = Path(path)
    try:
        found = path.stat()  # once: data sets have thousands of files on network disks
    except (FileNotFoundError, NotADirectoryError):
        raise FileError(f"{path}: file not found (looked for {what} at {Path(os.path.abspath(path))})") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise FileError(f"{path}: cannot open this {what}: {error}") from None
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"{path}: is a folder, expected a {what}")
    if not stat.S_ISREG(found.st_mode):  # a pipe or device would be waited for, or read for ever
        raise InputError(f"{path}: is no regular file, expected a {what}")
    if found.st_size == 0:
        raise InputError(f"{path}: the {what} is empty (0 bytes)")
    return path


def read_bytes(path: str | os.PathLike, what: str = "file", most: int | None = None) -> bytes:
    """The bytes of a non-empty file; OSErrors become InputError, and so does a file of more than ``most`` bytes."""
    path = existing_file(path, what)
    try:
        size = path.stat().st_size
        if most is not None and size > most:
            raise InputError(f"{path}: {size} bytes: more than the {most} that a {what} may have")
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"{path}: cannot read this {what}: {error.strerror or error}") from None


def name_rows(rows: Sequence[int] | np.ndarray, unit: str = "row", shown: int = 8) -> str:
    """'row 2', 'rows 1 and 4', 'rows 0, 1, 2 and 97 more'."""
    rows = [int(row) for row in rows]
    if len(rows) == 1:
        return f"{unit} {rows[0]}"
    if len(rows) <= shown:
        return f"{unit}s {', '.join(map(str, rows[:-1]))} and {rows[-1]}"
    return f"{unit}s {', '.join(map(str, rows[:shown]))} and {len(rows) - shown} more"


def require_finite(values: np.ndarray, path: str | os.PathLike, what: str) -> None:
    """Raise InputError naming the rows (0-based) of ``values`` (N, ...) that hold NaN or infinity."""
    values = np.asarray(values)
    good = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    if not good.all():
        raise InputError(f"{path}: {what} is NaN or infinite in {name_rows(np.flatnonzero(~good))} (0-based)")


def check_rotations(rotation: np.ndarray, path: str | os.PathLike) -> None:
    """Raise InputError naming the rows (0-based) of ``rotation`` (N, 3, 3) that are not proper rotation matrices."""
    require_finite(rotation, path, "rotation")
    wide = rotation.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        off = np.abs(wide @ wide.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2), initial=0.0)
        bad = ~((off < ROTATION_TOLERANCE) & (np.linalg.det(wide) > 0))
    if bad.any():
        raise InputError(
            f"{path}: {name_rows(np.flatnonzero(bad))} (0-based) are not rotation matrices "
            "(expected orthonormal 3 x 3 with determinant +1)"
        )


def check_shifts(shift: np.ndarray, path: str | os.PathLike) -> None:
    """Raise InputError when shifts (N, 2) cannot be fractions of the box."""
    require_finite(shift, path, "shift")
    bad = np.flatnonzero(np.abs(shift).max(axis=1, initial=0.0) > MAX_SHIFT)
    if len(bad):
        x, y = shift[bad[0]]
        raise InputError(
            f"{path}: shift ({x:.4g}, {y:.4g}) in {name_rows(bad)} (0-based) is larger than the box: shifts are a "
            "fraction of the box; divide pixels by the box size"
        )


def check_ctf(table: np.ndarray, path: str | os.PathLike) -> None:
    """Check a CTF table (N, 9): D, pixel size (A), defocus U and V (A), angle (deg), kV, Cs (mm), amplitude contrast,
    phase shift (deg). Raises InputError naming rows (0-based) and the field; notices a defocus in micrometres."""
    require_finite(table, path, "CTF")
    limits = [
        (0, "box size", lambda v: v > 0, "a positive number of pixels"),
        (1, "pixel size", lambda v: v > 0, "a positive number of Angstrom"),
        (5, "voltage", lambda v: (v > 0) & (v <= MAX_VOLTAGE_KV), "kV, such as 200 or 300"),
        (6, "spherical aberration", lambda v: (v >= -100) & (v <= 100), "mm, such as 2.7"),
        (7, "amplitude contrast", lambda v: (v >= 0) & (v <= 1), "a fraction between 0 and 1, such as 0.1"),
    ]
    for column, name, good, expected in limits:
        bad = np.flatnonzero(~good(table[:, column]))
        if len(bad):
            value = f"{float(table[bad[0], column]):.10g}"
            raise InputError(f"{path}: {name} {value} in {name_rows(bad)} (0-based): expected {expected}")
    size = np.abs(table[:, 2:4]).max(axis=1, initial=0.0)
    if len(table) and 0 < size.max() < MIN_DEFOCUS_A:
        notice(
            f"{path}: the largest defocus is {size.max():.4g} A: defocus is expected in Angstrom "
            "(10000 = 1 micrometre); these values look like micrometres"
        )


def users_value(path: str | os.PathLike, name: str, found: np.ndarray | None, given: float, count: int) -> np.ndarray:
    """The user's value for all rows, float64 (N,); a notice where the file says otherwise."""
    if found is not None and np.abs(found - given).max(initial=0.0) > 1e-3 * max(abs(given), 1e-3):
        first = found[np.abs(found - given).argmax()]
        notice(f"{path}: says {first:.5g} ({name}); your value {given:g} is used instead")
    return np.full(count, float(given))
