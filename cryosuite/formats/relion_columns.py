"""Columns of RELION particle tables in the units of the rest of the program: images, pixel sizes, poses, CTF."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd

from cryosuite.errors import InputError, notice
from cryosuite.formats.checks import check_ctf, check_shifts, name_rows, read_bytes, users_value
from cryosuite.formats.relion import ParticleTables

_EULER = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
MAX_TERMS = 64  # Zernike coefficients; RELION fits a dozen


def images_from_star(tables: ParticleTables) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Where the images lie: (stack names, code (N,) into them, index (N,) 0-based in the stack).

    Raises InputError naming the row and line of an image name that is not NUMBER@STACK with a number from 1. Notices
    images that are named more than once.
    """
    names = tables.particles["rlnImageName"].astype(object)
    parts = names.str.partition("@")
    plain = (parts[1] == "").to_numpy()
    stack = parts[2].where(~plain, parts[0])
    number = parts[0].where(~plain, "1")
    good = number.str.fullmatch(r"[0-9]{1,9}").fillna(False).astype(bool).to_numpy()
    index = np.zeros(len(names), np.int64)
    index[good] = number[good].astype(np.int64)
    good = good & (index >= 1) & (stack != "").to_numpy()
    bad = np.flatnonzero(~good)
    if len(bad):
        line = tables.line_of(tables.particles, bad[0])
        raise InputError(
            f"{tables.path}: column rlnImageName: '{names.iloc[bad[0]]}' in row {bad[0] + 1}{line}: expected "
            "NUMBER@STACK with numbers from 1, such as 000001@stack.mrcs"
        )
    code, stacks = pd.factorize(stack)
    repeats = len(index) - len(np.unique(code.astype(np.int64) * (index.max() + 1) + index))
    if repeats:
        notice(
            f"{tables.path}: {repeats} duplicate image names: the same image is used again (symmetry expansion?); keep "
            "its copies in one half set"
        )
    return [str(name) for name in stacks], code.astype(np.int64), index - 1


def pixel_sizes_from_star(tables: ParticleTables) -> np.ndarray | None:
    """Pixel size per particle (A), float64 (N,), or None where the file has none.

    rlnImagePixelSize, else rlnPixelSize, else rlnDetectorPixelSize (micrometres) x 1e4 / rlnMagnification.
    """
    for name in ("rlnImagePixelSize", "rlnPixelSize"):
        if tables.has(name):
            return _positive(tables, tables.numbers(name), name)
    if tables.has("rlnDetectorPixelSize") and tables.has("rlnMagnification"):
        magnification = _positive(tables, tables.numbers("rlnMagnification"), "rlnMagnification")
        size = tables.numbers("rlnDetectorPixelSize") * 1e4 / magnification
        return _positive(tables, size, "rlnDetectorPixelSize")
    return None


def _positive(tables: ParticleTables, values: np.ndarray, name: str) -> np.ndarray:
    bad = np.flatnonzero(~(values > 0))
    if len(bad):
        raise InputError(
            f"{tables.path}: {name} is {values[bad[0]]:g} in {name_rows(bad + 1)} of the particles: it must be positive"
        )
    return values


def box_sizes_from_star(tables: ParticleTables) -> np.ndarray | None:
    """rlnImageSize per particle (pixels), int64 (N,), or None where the file has none; the stack has the last word."""
    if not tables.has("rlnImageSize"):
        return None
    return _positive(tables, tables.numbers("rlnImageSize"), "rlnImageSize").astype(np.int64)


def half_from_star(tables: ParticleTables) -> np.ndarray | None:
    """Half set per particle (0 or 1, int8) from rlnRandomSubset (1 or 2), or None where there are not two sets.

    Rows without a half set (0, as after joining two files) make all of them unusable, with a notice.
    """
    name = "rlnRandomSubset"
    if not tables.has(name):
        return None
    frame = tables.particles if name in tables.particles.columns else tables.optics
    values = pd.to_numeric(frame[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)
    subset = values if frame is tables.particles else values[tables.group]
    known = np.isin(subset, (1, 2))
    if known.all():
        return (subset - 1).astype(np.int8) if len(np.unique(subset)) == 2 else None
    if known.any():
        notice(
            f"{tables.path}: {name} is neither 1 nor 2 in {int((~known).sum())} of {len(subset)} rows: the half sets "
            "of the refinement cannot be kept, new ones are made"
        )
    return None


def tubes_from_star(tables: ParticleTables) -> list[np.ndarray] | None:
    """What tells one helix from another: codes (N,) of micrograph and rlnHelicalTubeID; None without helices."""
    frame = tables.particles
    if "rlnHelicalTubeID" not in frame.columns:
        return None
    names = [name for name in ("rlnMicrographName", "rlnHelicalTubeID") if name in frame.columns]
    return [pd.factorize(frame[name])[0] for name in names]


def poses_from_star(
    tables: ParticleTables, box_sizes: np.ndarray | int, pixel_sizes: np.ndarray | float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Euler angles (rot, tilt, psi) float64 (N, 3) in degrees and shifts float64 (N, 2) as a fraction of the box.

    Shifts are rlnOriginX/YAngst / (pixel size x box), else rlnOriginX/Y in pixels of the file's own size, else zero
    with a notice. ``box_sizes`` (pixels) and ``pixel_sizes`` (A, as the file measures them) are those of the images,
    one or per row. Raises InputError naming a missing column.
    """
    missing = [name for name in _EULER if not tables.has(name)]
    if missing:
        raise InputError(f"{tables.path}: no column {', '.join(missing)}: poses need {', '.join(_EULER)}")
    euler = np.stack([tables.numbers(name) for name in _EULER], axis=1)
    box = np.broadcast_to(np.asarray(box_sizes, np.float64), len(tables))
    for x, y, angstrom in (("rlnOriginXAngst", "rlnOriginYAngst", True), ("rlnOriginX", "rlnOriginY", False)):
        present = [name for name in (x, y) if tables.has(name)]
        if len(present) == 1:
            raise InputError(
                f"{tables.path}: column {present[0]} is there but {y if present[0] == x else x} is missing"
            )
        if present:
            shift = np.stack([tables.numbers(x), tables.numbers(y)], axis=1)
            if angstrom and pixel_sizes is None:
                raise InputError(
                    f"{tables.path}: no pixel size: shifts in Angstrom ({x}) need one; give it as an option"
                )
            own = None if angstrom else pixel_sizes_from_star(tables)  # the A of one unit of the columns
            if angstrom or (own is not None and pixel_sizes is not None):
                box = box * np.asarray(pixel_sizes, np.float64) / (1.0 if own is None else own)
            shift /= box[:, None]
            check_shifts(shift, tables.path)
            return euler, shift
    notice(
        f"{tables.path}: no columns rlnOriginXAngst and rlnOriginYAngst (or rlnOriginX/Y): all shifts are taken as zero"
    )
    return euler, np.zeros((len(tables), 2))


def ctf_from_star(
    tables: ParticleTables,
    box_sizes: np.ndarray | int,
    pixel_sizes: np.ndarray | float | None,
    voltage_kv: float | None = None,
    cs_mm: float | None = None,
    amplitude_contrast: float | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """CTF table float32 (N, 9) in cryoDRGN's columns, and a dict of further terms per particle where any is in use.

    The last three arguments are the user's word: taken where given, with a notice where the file says otherwise.
    Extras: bfactor (A^2), scale, beam_tilt (N, 2) mrad, odd_zernike and even_zernike (N, K), mag_matrix (N, 2, 2),
    premultiplied (N,) bool. Raises InputError naming a missing column: no defocus is ever made up.
    """
    if pixel_sizes is None:
        raise InputError(f"{tables.path}: no pixel size (column rlnImagePixelSize); give it as an option")
    count = len(tables)
    columns = [np.broadcast_to(np.asarray(box_sizes, np.float64), count)]
    columns.append(np.broadcast_to(np.asarray(pixel_sizes, np.float64), count))
    columns += [tables.numbers(name) for name in ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")]
    users = (voltage_kv, cs_mm, amplitude_contrast)
    for name, given in zip(("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast"), users, strict=True):
        found = tables.numbers(name) if given is None or tables.has(name) else None
        columns.append(found if given is None else users_value(tables.path, name, found, given, count))
    columns.append(tables.numbers("rlnPhaseShift", 0.0))
    with np.errstate(over="ignore"):
        table = np.stack(columns, axis=1).astype(np.float32)
    check_ctf(table, tables.path)
    return table, _aberrations(tables)


def _aberrations(tables: ParticleTables) -> dict[str, np.ndarray]:
    """The terms beyond defocus and spherical aberration that differ from nothing in at least one row."""
    extras: dict[str, np.ndarray] = {}
    for name, key, neutral in (("rlnCtfBfactor", "bfactor", 0.0), ("rlnCtfScalefactor", "scale", 1.0)):
        values = tables.numbers(name, neutral)
        if key == "scale" and not values.any():
            notice(f"{tables.path}: {name} is 0 in all rows: taken as 1")
        elif np.any(values != neutral):
            extras[key] = values.astype(np.float32)
    tilt = np.stack([tables.numbers("rlnBeamTilt" + axis, 0.0) for axis in "XY"], axis=1)
    if np.any(tilt):
        extras["beam_tilt"] = tilt.astype(np.float32)
    entries = [tables.numbers(f"rlnMagMat{i}{j}", float(i == j)) for i in (0, 1) for j in (0, 1)]
    matrix = np.stack(entries, axis=1).reshape(-1, 2, 2)
    if np.any(matrix != np.eye(2)):
        extras["mag_matrix"] = matrix.astype(np.float32)
    for name, key in (("rlnOddZernike", "odd_zernike"), ("rlnEvenZernike", "even_zernike")):
        values = _zernike(tables, name)
        if values is not None and np.any(values):
            extras[key] = values.astype(np.float32)
    premultiplied = tables.numbers("rlnCtfDataAreCtfPremultiplied", 0.0) != 0
    if premultiplied.any():
        extras["premultiplied"] = premultiplied
        notice(
            f"{tables.path}: {int(premultiplied.sum())} images are premultiplied with their CTF "
            "(rlnCtfDataAreCtfPremultiplied): the model is weighted with CTF^2 for them"
        )
    return extras


def _zernike(tables: ParticleTables, name: str) -> np.ndarray | None:
    """Bracketed lists '[0.1,0,2.5]' as (N, K), shorter ones filled with zeros; None without the column."""
    in_optics = tables.optics is not None and name in tables.optics.columns
    frame = tables.optics if in_optics else tables.particles
    if name not in frame.columns:
        return None
    code, texts = pd.factorize(frame[name].astype(object).map(str))
    lists = []
    for text in texts:
        try:
            lists.append([float(word) for word in text.strip("[]").replace(",", " ").split()])
        except ValueError:
            raise InputError(
                f"{tables.path}: column {name}: '{text[:60]}' is no list of numbers such as [0.1,0,2.5]"
            ) from None
    longest = max((len(item) for item in lists), default=0)
    if longest > MAX_TERMS:  # every other row would be filled up to it
        raise InputError(f"{tables.path}: column {name} has a list of {longest} numbers, expected at most {MAX_TERMS}")
    values = np.zeros((len(lists), longest))
    for row, item in enumerate(lists):
        values[row, : len(item)] = item
    if not np.isfinite(values).all():
        raise InputError(f"{tables.path}: column {name} holds NaN or infinity")
    rows = values[code]
    return rows[tables.group] if in_optics else rows


def read_stack_list(path: str | os.PathLike) -> list[str]:
    """The stack names in a .txt list, one a line, in order; blank lines and lines that start with # are skipped."""
    data = read_bytes(path, "list of stacks")
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file: a list of stack names, one a line, is expected") from None
    names = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if any("\0" in name for name in names):
        raise InputError(f"{path}: not a text file: a list of stack names, one a line, is expected")
    if not names:
        raise InputError(f"{path}: the list of stacks is empty")
    return names
