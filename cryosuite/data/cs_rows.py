"""cryoSPARC .cs files -> Rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cryosuite.data.orientations import from_cryosparc
from cryosuite.data.rows import Details, Given, Rows, chosen_pixel_size, group_codes, halves_of_tubes
from cryosuite.errors import InputError
from cryosuite.formats import cs


def cs_rows(
    path: Path,
    given: Given | None = None,
    need_poses: bool = True,
    need_ctf: bool = True,
    passthrough: Sequence[Path] = (),
) -> Rows:
    """The rows of a cryoSPARC particle file, joined by uid with its passthrough files.

    Shifts are stored in pixels of ``alignments3D/psize_A``; ``blob/sign`` is +1 for white, -1 for dark particles.
    Raises InputError naming the missing field when poses, CTF or images are not there.
    """
    given = given or Given()
    table = cs.read_cs(path, passthrough=tuple(passthrough))
    if len(table) == 0:
        raise InputError(f"{path}: 0 particles: the file has no rows")
    names = table.dtype.names
    files, file_id, slices = cs.images_from_cs(table, path)
    rows = Rows(Path(path), len(table), files, file_id.astype(np.int32), slices)
    rows.uid = table["uid"].astype(np.uint64) if "uid" in names else None
    rows.box = cs.box_sizes_from_cs(table, path)
    rows.own_pixel_size = cs.pixel_sizes_from_cs(table, path)
    rows.pixel_size = chosen_pixel_size(path, rows.own_pixel_size, given, rows.n)
    rows.signs = cs.sign_from_cs(table, path)
    rows.half = cs.half_from_cs(table, path)
    if rows.half is None:
        rows.half = halves_of_tubes(rows.path, cs.tubes_from_cs(table))
    rows.optics_group = _groups(rows, table)

    def details(box: np.ndarray, pixel_size: np.ndarray, in_file: np.ndarray | None = None) -> Details:
        return cs_details(table, path, given, box, pixel_size, need_poses, need_ctf, in_file)

    rows.details, rows.tables = details, table
    return rows


def cs_details(
    table: np.ndarray,
    path: Path,
    given: Given,
    box: np.ndarray | int | None,
    pixel_size: np.ndarray | float | None,
    need_poses: bool = True,
    need_ctf: bool = True,
    in_file: np.ndarray | None = None,
) -> Details:
    """Poses and CTF of a cs table for images of this box and pixel size (A); ``in_file``: as the table measures it."""
    names, found = table.dtype.names, Details()
    if need_poses or _has_poses(names):
        vector, shift = cs.poses_from_cs(table, path, box, pixel_size if in_file is None else in_file)
        found.rotation, found.shift = from_cryosparc(vector).astype(np.float32), shift.astype(np.float32)
    if need_ctf or "ctf/df1_A" in names:
        found.ctf, found.extras = cs.ctf_from_cs(
            table, path, box, pixel_size, given.voltage_kv, given.cs_mm, given.amplitude_contrast
        )
    return found


def _has_poses(names: Sequence[str]) -> bool:
    groups = {name.split("/")[0] for name in names if name.startswith("alignments") and name.endswith("/pose")}
    return any(not group.startswith("alignments2D") and f"{group}/shift" in names for group in groups)


def _groups(rows: Rows, table: np.ndarray) -> np.ndarray:
    """Optics group (N,) int32 from 0: exposure groups, split where voltage, Cs, contrast, box or pixel size differ."""
    names = ("ctf/exp_group_id", "ctf/accel_kv", "ctf/cs_mm", "ctf/amp_contrast")
    parts = [table[name] for name in names if name in table.dtype.names]
    parts.extend(part for part in (rows.box, rows.pixel_size) if part is not None)
    return group_codes(parts).astype(np.int32) if parts else np.zeros(rows.n, np.int32)
