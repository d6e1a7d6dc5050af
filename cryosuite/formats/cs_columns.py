"""Columns of cryoSPARC tables in the units of the rest of the program: images, pixel sizes, poses, CTF.

A missing field is one message that names it. Field meanings: cryosparc-tools documentation and pyem. Of the terms that
Global CTF Refinement fits the makers publish no formula: theirs (tilt_A, trefoil_A, tetra_A, shift_A) are as other
readers have them (specter by J. Yeo, which compared the polynomials with cryoSPARC's simulator; pyem for the tilt).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from cryosuite.errors import InputError, notice
from cryosuite.formats.checks import check_ctf, check_shifts, name_rows, printable, require_finite, users_value
from cryosuite.formats.zernike import odd_zernike, wavelength_a

_LARGEST_TILT = 0.05  # rad; microscopes are aligned to better than 0.005

# not every command has --passthrough
_JOIN = "cryosuite preprocess THIS.cs --passthrough OTHER.cs -o work"
_ADVICE = {
    "blob": f"it lists no images: join it with the job's other .cs file, or the extraction's ({_JOIN})",
    "alignments3D": f"give the .cs of a refinement or ab-initio job, or join it with the other .cs file ({_JOIN})",
    "ctf": f"join it with the job's other .cs file, or that of a CTF estimation ({_JOIN})",
}


def field(array: np.ndarray, name: str, path: str | os.PathLike, width: int | None = None) -> np.ndarray:
    """Numeric field ``name`` as float64 (N,) or (N, width), finite. Raises InputError naming a missing field."""
    if name not in array.dtype.names:
        group = "alignments3D" if name.startswith("alignments") else name.split("/")[0]
        raise InputError(f"{path}: has no field {name}: {_ADVICE.get(group, 'export the particles again')}")
    values = array[name]
    shape = (len(array),) if width is None else (len(array), width)
    if values.dtype.kind not in "biuf" or values.shape != shape:
        raise InputError(
            f"{path}: field {name} has type {printable(values.dtype)} and shape {values.shape}, expected numbers of "
            f"shape {shape}"
        )
    values = values.astype(np.float64)
    require_finite(values, path, name)
    return values


def images_from_cs(array: np.ndarray, path: str | os.PathLike) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Where the images lie: (stack names, code (N,) into them, index (N,) 0-based in the stack).

    The '>' that cryoSPARC puts before paths inside its project is removed.
    """
    if "blob/path" not in array.dtype.names:
        raise InputError(f"{path}: has no field blob/path: {_ADVICE['blob']}")
    if array["blob/path"].dtype.kind not in "SU" or array["blob/path"].ndim != 1:
        raise InputError(f"{path}: field blob/path is not text")
    if len(array) == 0:
        raise InputError(f"{path}: holds 0 particles")
    index = field(array, "blob/idx", path).astype(np.int64)
    raw, code = np.unique(array["blob/path"], return_inverse=True)
    try:
        names = [(name.decode("utf-8") if isinstance(name, bytes) else str(name)).lstrip(">") for name in raw]
    except UnicodeDecodeError:
        raise InputError(f"{path}: field blob/path is not UTF-8 text") from None
    if any(not name for name in names):
        empty = np.flatnonzero(np.isin(code, [i for i, name in enumerate(names) if not name]))
        raise InputError(f"{path}: blob/path is empty in {name_rows(empty)} (0-based)")
    if len(index) and index.min() < 0:
        raise InputError(f"{path}: blob/idx is negative in {name_rows(np.flatnonzero(index < 0))} (0-based)")
    return names, code.reshape(-1).astype(np.int64), index


def box_sizes_from_cs(array: np.ndarray, path: str | os.PathLike) -> np.ndarray | None:
    """Box size per row from blob/shape, int64 (N,), or None without that field. Raises InputError unless square."""
    if "blob/shape" not in array.dtype.names:
        return None
    shape = field(array, "blob/shape", path, 2).astype(np.int64)
    bad = np.flatnonzero((shape[:, 0] != shape[:, 1]) | (shape[:, 0] < 1))
    if len(bad):
        ny, nx = shape[bad[0]]
        raise InputError(f"{path}: blob/shape is {nx} x {ny} in {name_rows(bad)} (0-based): images must be square")
    return shape[:, 0]


def pixel_sizes_from_cs(array: np.ndarray, path: str | os.PathLike) -> np.ndarray | None:
    """Pixel size per row (A) from blob/psize_A, float64 (N,), or None without that field."""
    if "blob/psize_A" not in array.dtype.names:
        return None
    return _positive(field(array, "blob/psize_A", path), "blob/psize_A", path)


def _positive(size: np.ndarray, name: str, path: str | os.PathLike) -> np.ndarray:
    bad = np.flatnonzero(size <= 0)
    if len(bad):
        raise InputError(f"{path}: {name} is {size[bad[0]]:g} in {name_rows(bad)} (0-based): must be positive")
    return size


def sign_from_cs(array: np.ndarray, path: str | os.PathLike) -> np.ndarray | None:
    """blob/sign per row, +1 or -1 as int8 (N,): what the images are to be multiplied with so that particles are white.
    None without that field."""
    if "blob/sign" not in array.dtype.names:
        return None
    sign = field(array, "blob/sign", path)
    bad = np.flatnonzero(np.abs(sign) != 1)
    if len(bad):
        raise InputError(f"{path}: blob/sign is {sign[bad[0]]:g} in {name_rows(bad)} (0-based): expected +1 or -1")
    return sign.astype(np.int8)


def half_from_cs(array: np.ndarray, path: str | os.PathLike) -> np.ndarray | None:
    """Half set per row (0 or 1, int8) from alignments3D/split, or None without that field or with one set only."""
    if "alignments3D/split" not in array.dtype.names:
        return None
    split = field(array, "alignments3D/split", path)
    return split.astype(np.int8) if set(np.unique(split)) == {0.0, 1.0} else None


def tubes_from_cs(array: np.ndarray) -> list[np.ndarray] | None:
    """What tells one filament from another: codes (N,) of stack and filament/filament_uid; None without filaments."""
    if "filament/filament_uid" not in array.dtype.names:
        return None
    names = ("blob/path", "filament/filament_uid")
    names = [name for name in names if name in array.dtype.names and array[name].ndim == 1]
    return [np.unique(array[name], return_inverse=True)[1].reshape(-1) for name in names]


@dataclass(frozen=True)
class _Alignment:
    """One pose per particle: rotation vectors (N, 3), shifts (N, 2) in pixels of ``psize`` (N,) A, or None."""

    group: str
    vector: np.ndarray
    shift: np.ndarray
    psize: np.ndarray | None


def _alignment(array: np.ndarray, path: str | os.PathLike) -> _Alignment:
    """Poses from alignments3D; else, of several classes, each particle takes the pose of its most probable one.

    Classes are in alignments3D_multi (one field for all, cryoSPARC 4.5 on) or alignments_class_0, _1, ... (before).
    """
    names = array.dtype.names
    found = {m.group(1): int(m.group(2)) for m in (re.match(r"(alignments_class_(\d+))/pose$", n) for n in names) if m}
    classes = sorted(found, key=found.__getitem__)
    several = "alignments3D_multi" if "alignments3D_multi/pose" in names else classes[0] if classes else None
    if several is None or "alignments3D/pose" in names or "alignments3D/shift" in names:
        if several is not None:
            notice(
                f"{path}: has poses of classes ({several}) and of one refinement (alignments3D): the latter are used"
            )
        return _one_alignment(array, path, "alignments3D")
    if several == "alignments3D_multi":
        return _most_probable(path, several, *_stacked(array, path))
    parts = [_one_alignment(array, path, name) for name in classes]
    if len(parts) == 1:
        return parts[0]
    posterior = np.stack([field(array, f"{name}/class_posterior", path) for name in classes], axis=1)
    vector, shift = np.stack([part.vector for part in parts], 1), np.stack([part.shift for part in parts], 1)
    sizes = [part.psize for part in parts]
    psize = None if any(size is None for size in sizes) else np.stack(sizes, axis=1)
    return _most_probable(path, several, posterior, vector, shift, psize)


def _one_alignment(array: np.ndarray, path: str | os.PathLike, group: str) -> _Alignment:
    """Pose, shift and pixel size of one alignment group."""
    vector, shift = field(array, f"{group}/pose", path, 3), field(array, f"{group}/shift", path, 2)
    psize = f"{group}/psize_A"
    return _Alignment(group, vector, shift, field(array, psize, path) if psize in array.dtype.names else None)


def _stacked(
    array: np.ndarray, path: str | os.PathLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """alignments3D_multi: posterior (N, K), rotation vectors (N, K, 3), shifts (N, K, 2), pixel sizes (N, K) if any."""
    group, parts = "alignments3D_multi", []
    for name, width in (("class_posterior", ()), ("pose", (3,)), ("shift", (2,))):
        if f"{group}/{name}" not in array.dtype.names:
            raise InputError(f"{path}: has no field {group}/{name}: {_ADVICE['alignments3D']}")
        values = array[f"{group}/{name}"]
        if values.ndim != 2 + len(width) or values.shape[2:] != width or values.dtype.kind != "f":
            raise InputError(f"{path}: field {group}/{name} has shape {values.shape}, expected (N, classes, ...)")
        parts.append(values)
    if len({part.shape[1] for part in parts}) != 1:
        raise InputError(f"{path}: the fields of {group} differ in their number of classes")
    psize = None
    if f"{group}/psize_A" in array.dtype.names:
        psize = np.asarray(array[f"{group}/psize_A"], np.float64)
        psize = np.broadcast_to(psize[:, None] if psize.ndim == 1 else psize, parts[0].shape)
    return (*parts, psize)


def _most_probable(
    path: str | os.PathLike,
    group: str,
    posterior: np.ndarray,  # (N, K)
    vector: np.ndarray,  # (N, K, 3)
    shift: np.ndarray,  # (N, K, 2)
    psize: np.ndarray | None,  # (N, K)
) -> _Alignment:
    """The pose of each particle's most probable class; finite values are asked for in that class only."""
    require_finite(posterior, path, f"{group}/class_posterior")
    best, rows = posterior.argmax(axis=1), np.arange(len(posterior))
    vector, shift = vector[rows, best].astype(np.float64), shift[rows, best].astype(np.float64)
    psize = None if psize is None else psize[rows, best]
    for values, name in ((vector, "pose"), (shift, "shift"), (psize, "psize_A")):
        if values is not None:
            require_finite(values, path, f"{group}/{name}")
    notice(f"{path}: {posterior.shape[1]} classes: each particle takes the pose of its most probable one")
    return _Alignment(group, vector, shift, psize)


def _box_and_pixel(
    array: np.ndarray,
    path: str | os.PathLike,
    box_sizes: np.ndarray | int | None,
    pixel_sizes: np.ndarray | float | None,
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Box (N,) pixels and pixel size (N,) A of the images: as given, else as blob/shape and blob/psize_A say."""
    box = box_sizes_from_cs(array, path) if box_sizes is None else np.broadcast_to(box_sizes, len(array))
    pixel = pixel_sizes_from_cs(array, path) if pixel_sizes is None else np.broadcast_to(pixel_sizes, len(array))
    return box, pixel


def poses_from_cs(
    array: np.ndarray,
    path: str | os.PathLike,
    box_sizes: np.ndarray | int | None = None,
    pixel_sizes: np.ndarray | float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Poses: rotation vectors float64 (N, 3) in rad and shifts float64 (N, 2) as a fraction of the box.

    The rotation is R = expmap(vector).T. Shifts in the file are pixels of the alignment; Global CTF Refinement keeps a
    further shift of the image in ctf/shift_A (the first-order term beside beam tilt: phase -2 pi k . shift_A):
    t = (shift x psize(alignment) - shift_A) / (psize(blob) x D). ``box_sizes`` and ``pixel_sizes`` (A, as
    the file measures them) of the images, one or per row, are taken instead of blob/shape and blob/psize_A when given.
    Raises InputError naming a missing field or rows with NaN.
    """
    box, pixel = _box_and_pixel(array, path, box_sizes, pixel_sizes)
    found = _alignment(array, path)
    if box is None:
        raise InputError(f"{path}: has no field blob/shape: shifts need the box size; {_ADVICE['blob']}")
    shift = found.shift
    if found.psize is not None and pixel is not None:
        shift = shift * (_positive(found.psize, f"{found.group}/psize_A", path) / pixel)[:, None]
    else:
        missing = "blob/psize_A" if pixel is None else f"{found.group}/psize_A"
        notice(f"{path}: has no field {missing}: shifts are taken as pixels of the images")
    shift = (shift - _image_shift(array, path, pixel)) / box[:, None]
    check_shifts(shift, path)
    return found.vector, shift


def _image_shift(array: np.ndarray, path: str | os.PathLike, pixel: np.ndarray | None) -> np.ndarray | float:
    """ctf/shift_A in pixels of the images (N, 2), or 0 where there is none."""
    if "ctf/shift_A" not in array.dtype.names:
        return 0.0
    shift = field(array, "ctf/shift_A", path, 2)
    if not shift.any():
        return 0.0
    if pixel is None:
        raise InputError(f"{path}: ctf/shift_A, in Angstrom, needs the pixel size: no field blob/psize_A; give --Apix")
    notice(f"{path}: the image shift of CTF refinement (ctf/shift_A, up to {np.abs(shift).max():.2g} A) is corrected")
    return shift / pixel[:, None]


def ctf_from_cs(
    array: np.ndarray,
    path: str | os.PathLike,
    box_sizes: np.ndarray | int | None = None,
    pixel_sizes: np.ndarray | float | None = None,
    voltage_kv: float | None = None,
    cs_mm: float | None = None,
    amplitude_contrast: float | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """CTF table float32 (N, 9) in cryoDRGN's columns, and a dict of further terms per row where any is in use.

    The last three arguments are the user's word: taken where given, with a notice where the file says otherwise.
    Extras: bfactor (A^2), scale, beam_tilt (N, 2) mrad, odd_zernike (N, 6), trefoil (N, 2) A, tetrafoil (N, 4) A,
    mag_matrix (N, 2, 2). Terms that are zero (or one, for scale) in all rows are left out. Raises InputError naming a
    missing field.
    """
    box, pixel = _box_and_pixel(array, path, box_sizes, pixel_sizes)
    u, v = field(array, "ctf/df1_A", path), field(array, "ctf/df2_A", path)
    if box is None or pixel is None:
        missing = "blob/shape" if box is None else "blob/psize_A"
        raise InputError(f"{path}: has no field {missing}: {_ADVICE['blob']}, or give the box and pixel size")
    degrees = np.rad2deg(field(array, "ctf/df_angle_rad", path))
    phase = np.zeros(len(array))
    if "ctf/phase_shift_rad" in array.dtype.names:
        phase = np.rad2deg(field(array, "ctf/phase_shift_rad", path))

    def chosen(name: str, given: float | None) -> np.ndarray:
        found = field(array, name, path) if given is None or name in array.dtype.names else None
        return found if given is None else users_value(path, name, found, given, len(array))

    kv, cs = chosen("ctf/accel_kv", voltage_kv), chosen("ctf/cs_mm", cs_mm)
    contrast = chosen("ctf/amp_contrast", amplitude_contrast)
    with np.errstate(over="ignore"):
        table = np.stack([box.astype(np.float64), pixel, u, v, degrees, kv, cs, contrast, phase], axis=1)
        table = table.astype(np.float32)
    check_ctf(table, path)
    return table, _aberrations(array, path, kv, cs)


def _aberrations(array: np.ndarray, path: str | os.PathLike, kv: np.ndarray, cs_mm: np.ndarray) -> dict[str, Any]:
    """The higher-order terms that differ from nothing in at least one row."""
    extras: dict[str, np.ndarray] = {}
    plain = [("ctf/bfactor", "bfactor", None, 0), ("ctf/scale", "scale", None, 1)]
    plain += [("ctf/trefoil_A", "trefoil", 2, 0), ("ctf/tetra_A", "tetrafoil", 4, 0)]
    for name, key, width, neutral in plain:
        if name in array.dtype.names:
            values = field(array, name, path, width)
            if key == "scale" and not values.any():
                notice(f"{path}: {name} is 0 in all rows: taken as 1")
            elif np.any(values != neutral):
                extras[key] = values.astype(np.float32)
    if "ctf/tilt_A" in array.dtype.names:
        tilt = field(array, "ctf/tilt_A", path, 2)
        if np.any(tilt):
            extras |= _coma(tilt, kv, cs_mm)
    if "ctf/anisomag" in array.dtype.names:
        anisotropy = field(array, "ctf/anisomag", path, 4)
        if np.any(anisotropy):
            extras["mag_matrix"] = (np.eye(2) + anisotropy.reshape(-1, 2, 2)).astype(np.float32)
    return extras


def _coma(tilt_a: np.ndarray, kv: np.ndarray, cs_mm: np.ndarray) -> dict[str, np.ndarray]:
    """ctf/tilt_A (N, 2), the coma as a length: the beam tilt in mrad that makes it, tilt_A / Cs (1 mm = 1e7 A).

    Where Cs is 0 (a corrected microscope) or refined to a small or negative value no sensible tilt makes it; then the
    same phase as odd Zernike coefficients.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        tilt = np.nan_to_num(tilt_a / (cs_mm * 1e7)[:, None], nan=0.0, posinf=np.inf, neginf=-np.inf)
    if (cs_mm > 0).all() and np.abs(tilt).max() < _LARGEST_TILT:
        return {"beam_tilt": (tilt * 1e3).astype(np.float32)}
    return {"odd_zernike": odd_zernike(wavelength_a(kv), tilt_a=tilt_a).astype(np.float32)}
