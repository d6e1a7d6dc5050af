"""cryoSPARC .cs files: one numpy structured array in npy form, rows known by ``uid``.

``read_cs`` gives the array; the other functions give its columns in the units that the rest of the program uses, with
one message naming the field when it is missing. Field meanings: cryosparc-tools documentation and pyem.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cryosuite.errors import InputError, notice
from cryosuite.formats.atomic import atomic_path
from cryosuite.formats.checks import check_ctf, check_shifts, existing_file, name_rows, printable, require_finite
from cryosuite.formats.unpickler import load_bytes

_MAX_HEADER = 1 << 20

_ADVICE = {
    "blob": "this is a passthrough file: give the particles .cs of the extraction as well, they are joined by uid",
    "alignments3D": "give the .cs of a refinement or ab-initio job, or its passthrough file",
    "ctf": "give the passthrough .cs of the same job or the .cs of a CTF estimation, they are joined by uid",
}


def read_cs(path: str | os.PathLike, passthrough: Iterable[str | os.PathLike] = ()) -> np.ndarray:
    """Read a .cs file as a structured array (N,), with the fields of ``passthrough`` files joined by uid.

    Rows and their order are those of ``path``; fields present in both keep the values of ``path``. Raises InputError
    for a missing, empty, truncated or damaged file, for Python objects inside (named, nothing is run), and for rows
    that a passthrough file lacks. Notices uids that occur twice.
    """
    array = _read_npy(path)
    _notice_duplicates(path, array)
    for extra in passthrough:
        array = _join(path, array, extra)
    return array


def _read_npy(path: str | os.PathLike) -> np.ndarray:
    path = existing_file(path, ".cs file")
    try:
        with open(path, "rb") as stream:
            dtype, shape, offset = _npy_header(path, stream)
            found, expected = path.stat().st_size - offset, int(np.prod(shape, dtype=object)) * dtype.itemsize
            if found < expected:
                raise InputError(
                    f"{path}: truncated: {shape[0]} rows need {expected} bytes, found {found}; copy the file again"
                )
            if found > expected:
                notice(f"{path}: {found - expected} bytes behind the last row are ignored")
            array = np.empty(shape[0], dtype)
            if stream.readinto(memoryview(array.view(np.uint8))) != expected:
                raise InputError(f"{path}: the file became shorter while it was read")
    except OSError as error:
        raise InputError(f"{path}: cannot read this .cs file: {error.strerror or error}") from None
    return array


def _npy_header(path: Path, stream: io.BufferedReader) -> tuple[np.dtype, tuple[int, ...], int]:
    """Type, shape and start of the data of an npy stream that holds one table of plain fields."""
    start = stream.read(12)
    if start[:2] == b"PK":
        raise InputError(f"{path}: is an npz archive, not a .cs table")
    if not start.startswith(b"\x93NUMPY"):
        raise InputError(f"{path}: not a .cs file (it does not start as a numpy table); export it again from cryoSPARC")
    stream.seek(0)
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(stream, max_header_size=_MAX_HEADER)
        else:  # 3.0 differs in names that are not ASCII, which cryoSPARC does not write
            header = np.lib.format.read_array_header_2_0(stream, max_header_size=_MAX_HEADER)
    except Exception as error:  # the header is text that numpy parses; its errors are of many kinds
        raise InputError(f"{path}: damaged or truncated .cs header: {printable(error)}") from None
    shape, _, dtype = header
    if dtype.hasobject:
        _refuse_objects(path, stream)
    if dtype.names is None or len(shape) != 1 or shape[0] < 0:
        raise InputError(
            f"{path}: not a .cs table: expected rows of named fields, found shape {shape} of {printable(dtype)}"
        )
    if dtype.itemsize == 0:
        raise InputError(f"{path}: damaged .cs header: rows of 0 bytes")
    return dtype, shape, stream.tell()


def _refuse_objects(path: Path, stream: io.BufferedReader) -> None:
    """End with the name of what the pickled objects ask for; they are looked at, never built."""
    load_bytes(path, stream.read())
    raise InputError(f"{path}: refused: holds Python objects (pickled); a .cs file holds numbers and text only")


def _notice_duplicates(path: str | os.PathLike, array: np.ndarray) -> None:
    if "uid" in (array.dtype.names or ()) and len(np.unique(array["uid"])) != len(array):
        repeats = len(array) - len(np.unique(array["uid"]))
        notice(
            f"{path}: {repeats} rows repeat the uid of another row: joining other files by uid is ambiguous for them"
        )


def _join(path: str | os.PathLike, array: np.ndarray, extra: str | os.PathLike) -> np.ndarray:
    """``array`` with the fields that only ``extra`` has, matched by uid."""
    other = _read_npy(extra)
    for name, table in ((path, array), (extra, other)):
        if "uid" not in table.dtype.names:
            raise InputError(f"{name}: has no field uid: it cannot be joined with another .cs file")
    new = [name for name in other.dtype.names if name not in array.dtype.names]
    _notice_duplicates(extra, other)
    order = np.argsort(other["uid"], kind="stable")
    sorted_uid = other["uid"][order]
    place = np.searchsorted(sorted_uid, array["uid"])
    found = place < len(sorted_uid)
    found[found] = sorted_uid[place[found]] == array["uid"][found]
    if not found.all():
        missing = np.flatnonzero(~found)
        raise InputError(
            f"{extra}: lacks {len(missing)} of the {len(array)} particles of {path} (by uid; first uid "
            f"{int(array['uid'][missing[0]])}): the passthrough file must be of the same job"
        )
    rows = order[place]
    joined = np.empty(len(array), array.dtype.descr + [_describe(other.dtype, name) for name in new])
    for name in array.dtype.names:
        joined[name] = array[name]
    for name in new:
        joined[name] = other[name][rows]
    return joined


def _describe(dtype: np.dtype, name: str) -> tuple:
    field = dtype[name]
    return (name, field.base.str, field.shape) if field.shape else (name, field.str)


def write_cs(path: str | os.PathLike, array: np.ndarray) -> None:
    """Write a structured array as .cs (npy, no Python objects), atomically; uid and unknown fields stay as they are."""
    array = np.ascontiguousarray(array)
    if array.dtype.names is None or array.dtype.hasobject:
        raise TypeError("a .cs file holds a structured array of numbers and text")
    with atomic_path(path, needed=array.nbytes + 4096) as temporary, open(temporary, "wb") as stream:
        np.lib.format.write_array(stream, array, allow_pickle=False)


def has_fields(array: np.ndarray, *names: str) -> bool:
    """True when the table has all these fields."""
    return all(name in array.dtype.names for name in names)


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
    if array["blob/path"].dtype.kind not in "SU":
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
    size = field(array, "blob/psize_A", path)
    bad = np.flatnonzero(size <= 0)
    if len(bad):
        raise InputError(f"{path}: blob/psize_A is {size[bad[0]]:g} in {name_rows(bad)} (0-based): must be positive")
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


def _alignment(array: np.ndarray, path: str | os.PathLike) -> tuple[str, np.ndarray, np.ndarray, np.ndarray | None]:
    """(group name, rotation vectors (N, 3), shifts (N, 2) in alignment pixels, their pixel size (N,) A or None).

    From alignments3D; else, of several classes, each particle takes the pose of its most probable one:
    alignments3D_multi (one field for all classes, cryoSPARC 4.5 on) or alignments_class_0, _1, ... (before).
    """
    names = array.dtype.names
    if "alignments3D/pose" not in names and "alignments3D/shift" not in names:
        if "alignments3D_multi/pose" in names:
            return _most_probable(array, path)
        classes = sorted({m.group(1) for m in (re.match(r"(alignments_class_\d+)/pose$", n) for n in names) if m})
        if classes:
            parts = [_one_alignment(array, path, name) for name in classes]
            best = np.zeros(len(array), np.int64)
            if len(classes) > 1:
                probability = [field(array, f"{name}/class_posterior", path) for name in classes]
                best = np.stack(probability).argmax(axis=0)
                notice(f"{path}: {len(classes)} classes: each particle takes the pose of its most probable one")
            rows = np.arange(len(array))
            vector, shift = (np.stack([part[k] for part in parts])[best, rows] for k in (1, 2))
            sizes = [part[3] for part in parts]
            known = all(size is not None for size in sizes)
            return classes[0], vector, shift, np.stack(sizes)[best, rows] if known else None
    return _one_alignment(array, path, "alignments3D")


def _one_alignment(
    array: np.ndarray, path: str | os.PathLike, group: str
) -> tuple[str, np.ndarray, np.ndarray, np.ndarray | None]:
    """Pose, shift and pixel size of one alignment group."""
    vector, shift = field(array, f"{group}/pose", path, 3), field(array, f"{group}/shift", path, 2)
    psize = f"{group}/psize_A"
    return group, vector, shift, field(array, psize, path) if psize in array.dtype.names else None


def _most_probable(array: np.ndarray, path: str | os.PathLike) -> tuple[str, np.ndarray, np.ndarray, np.ndarray | None]:
    """The same from alignments3D_multi, whose fields have one more dimension: the classes."""
    group = "alignments3D_multi"
    parts = {}
    for name, width in (("class_posterior", ()), ("pose", (3,)), ("shift", (2,))):
        if f"{group}/{name}" not in array.dtype.names:
            raise InputError(f"{path}: has no field {group}/{name}: {_ADVICE['alignments3D']}")
        parts[name] = array[f"{group}/{name}"]
        if parts[name].ndim != 2 + len(width) or parts[name].shape[2:] != width or parts[name].dtype.kind != "f":
            raise InputError(f"{path}: field {group}/{name} has shape {parts[name].shape}, expected (N, classes, ...)")
    best, rows = parts["class_posterior"].argmax(axis=1), np.arange(len(array))
    if max(part.shape[1] for part in parts.values()) != min(part.shape[1] for part in parts.values()):
        raise InputError(f"{path}: the fields of {group} differ in their number of classes")
    vector, shift = (parts[name][rows, best].astype(np.float64) for name in ("pose", "shift"))
    require_finite(vector, path, f"{group}/pose")
    require_finite(shift, path, f"{group}/shift")
    psize = None
    if f"{group}/psize_A" in array.dtype.names:
        psize = np.asarray(array[f"{group}/psize_A"], np.float64)
        psize = psize[rows, best] if psize.ndim == 2 else psize
        require_finite(psize, path, f"{group}/psize_A")
    notice(f"{path}: {parts['pose'].shape[1]} classes: each particle takes the pose of its most probable one")
    return group, vector, shift, psize


def poses_from_cs(
    array: np.ndarray,
    path: str | os.PathLike,
    box_sizes: np.ndarray | int | None = None,
    pixel_sizes: np.ndarray | float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Poses: rotation vectors float64 (N, 3) in rad and shifts float64 (N, 2) as a fraction of the box.

    The rotation is R = expmap(vector).T. Shifts in the file are pixels of the alignment:
    t = shift x psize(alignment) / (psize(blob) x D). ``box_sizes`` and ``pixel_sizes`` (A) of the images, one or per
    row, are taken instead of blob/shape and blob/psize_A when given. Raises InputError naming a missing field or rows
    with NaN.
    """
    box = box_sizes_from_cs(array, path) if box_sizes is None else np.broadcast_to(box_sizes, len(array))
    pixel = pixel_sizes_from_cs(array, path) if pixel_sizes is None else np.broadcast_to(pixel_sizes, len(array))
    group, vector, shift, psize = _alignment(array, path)
    if box is None:
        raise InputError(f"{path}: has no field blob/shape: shifts need the box size; {_ADVICE['blob']}")
    if psize is not None and pixel is not None:
        shift = shift * (psize / pixel)[:, None]
    else:
        missing = "blob/psize_A" if pixel is None else f"{group}/psize_A"
        notice(f"{path}: has no field {missing}: shifts are taken as pixels of the images")
    shift = shift / box[:, None]
    check_shifts(shift, path)
    return vector, shift


def ctf_from_cs(
    array: np.ndarray,
    path: str | os.PathLike,
    box_sizes: np.ndarray | int | None = None,
    pixel_sizes: np.ndarray | float | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """CTF table float32 (N, 9) in cryoDRGN's columns, and a dict of further terms per row where any is in use.

    Extras: bfactor (A^2), scale, beam_tilt (N, 2) mrad, trefoil (N, 2) A, tetrafoil (N, 4) A, mag_matrix (N, 2, 2).
    Terms that are zero (or one, for scale) in all rows are left out. Raises InputError naming a missing field.
    """
    box = box_sizes_from_cs(array, path) if box_sizes is None else np.broadcast_to(box_sizes, len(array))
    pixel = pixel_sizes_from_cs(array, path) if pixel_sizes is None else np.broadcast_to(pixel_sizes, len(array))
    u, v = field(array, "ctf/df1_A", path), field(array, "ctf/df2_A", path)
    if box is None or pixel is None:
        missing = "blob/shape" if box is None else "blob/psize_A"
        raise InputError(f"{path}: has no field {missing}: {_ADVICE['blob']}, or give the box and pixel size")
    degrees = np.rad2deg(field(array, "ctf/df_angle_rad", path))
    phase = np.zeros(len(array))
    if "ctf/phase_shift_rad" in array.dtype.names:
        phase = np.rad2deg(field(array, "ctf/phase_shift_rad", path))
    kv, cs = field(array, "ctf/accel_kv", path), field(array, "ctf/cs_mm", path)
    contrast = field(array, "ctf/amp_contrast", path)
    table = np.stack([box.astype(np.float64), pixel, u, v, degrees, kv, cs, contrast, phase], axis=1).astype(np.float32)
    check_ctf(table, path)
    return table, _aberrations(array, path, cs)


def _aberrations(array: np.ndarray, path: str | os.PathLike, cs_mm: np.ndarray) -> dict[str, np.ndarray]:
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
            # a path difference in Angstrom over the spherical aberration (1 mm = 1e7 A) is the sine of the tilt
            ratio = tilt / np.where(cs_mm > 0, cs_mm * 1e7, np.inf)[:, None]
            extras["beam_tilt"] = (np.arcsin(np.clip(ratio, -1, 1)) * 1e3).astype(np.float32)
    if "ctf/anisomag" in array.dtype.names:
        anisotropy = field(array, "ctf/anisomag", path, 4)
        if np.any(anisotropy):
            extras["mag_matrix"] = (np.eye(2) + anisotropy.reshape(-1, 2, 2)).astype(np.float32)
    return extras
