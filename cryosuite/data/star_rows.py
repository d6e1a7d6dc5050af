"""RELION star files -> Rows: the 3.0 form (all in one table) and the 3.1, 4 and 5 form (optics groups)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cryosuite.data.orientations import from_euler
from cryosuite.data.rows import Details, Given, Rows, chosen_pixel_size, halves_of_tubes
from cryosuite.errors import InputError

EULER = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
CTF = ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast")
PREMULTIPLIED = "rlnCtfDataAreCtfPremultiplied"


def star_rows(path: Path, given: Given | None = None, need_poses: bool = True, need_ctf: bool = True) -> Rows:
    """The rows of a RELION particle star file.

    A missing column is an InputError when poses or CTF are needed, else the value is None; nothing is invented.
    Missing origins are zero, with a notice.
    """
    from cryosuite.formats import star

    given = given or Given()
    tables = star.particle_tables(path)
    files, file_id, slices = star.images_from_star(tables)
    rows = Rows(Path(path), len(tables), files, file_id.astype(np.int32), slices)
    rows.box = star.box_sizes_from_star(tables)
    rows.own_pixel_size = star.pixel_sizes_from_star(tables)
    rows.pixel_size = chosen_pixel_size(path, rows.own_pixel_size, given, rows.n)
    rows.optics_group = tables.group.astype(np.int32)
    rows.half = star.half_from_star(tables)
    if rows.half is None:
        rows.half = halves_of_tubes(rows.path, star.tubes_from_star(tables))
    rows.ctf_premultiplied = _premultiplied(tables)
    from_user = (None, None, None, given.voltage_kv, given.cs_mm, given.amplitude_contrast)
    has_poses = all(tables.has(name) for name in EULER)
    has_ctf = all(tables.has(name) or value is not None for name, value in zip(CTF, from_user, strict=True))

    def details(box: np.ndarray, pixel_size: np.ndarray, in_file: np.ndarray | None = None) -> Details:
        found = Details()
        if need_poses or has_poses:
            euler, shift = star.poses_from_star(tables, box, pixel_size if in_file is None else in_file)
            found.rotation, found.shift = from_euler(euler).astype(np.float32), shift.astype(np.float32)
        if need_ctf or has_ctf:
            found.ctf, found.extras = star.ctf_from_star(
                tables, box, pixel_size, given.voltage_kv, given.cs_mm, given.amplitude_contrast
            )
            found.extras.pop("premultiplied", None)
        return found

    rows.details, rows.tables = details, tables
    return rows


def _premultiplied(tables: object) -> bool:
    """True when all images were multiplied by their CTF; a mixture is refused."""
    flags = tables.numbers(PREMULTIPLIED, 0.0) != 0
    if flags.any() and not flags.all():
        raise InputError(
            f"{tables.path}: {PREMULTIPLIED} is 1 in some optics groups and 0 in others: split the set, or extract all "
            "particles the same way"
        )
    return bool(flags.any())
