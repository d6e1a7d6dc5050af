"""Poses of a particle set into the rows it came from: angles and origins of a star file, alignments3D of a cs file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cryosuite.data.orientations import from_euler, to_cryosparc, to_euler
from cryosuite.data.particles import ParticleSet
from cryosuite.data.star_rows import EULER
from cryosuite.errors import InputError
from cryosuite.formats.star import ParticleTables, pixel_sizes_from_star

SAME = 1e-5  # of a matrix element: the source's own angles are kept
GROUP = "alignments3D"


def with_poses(
    metadata: ParticleTables | np.ndarray, particles: ParticleSet, width: np.ndarray, pixel_size: float | None = None
) -> ParticleTables | np.ndarray:
    """The same rows, in the order of ``particles``, with the set's rotations and shifts in place of their own.

    Origins are converted through Angstrom, so the rows may be those of larger, un-binned images. ``width`` (N,): of the
    set's images in the Angstrom of the rows. ``pixel_size`` (A): what the user said where a star file of RELION 3.0
    says none.

    Raises:
        InputError: the set has no poses; a star file of RELION 3.0 or a cs file gives no pixel size.
    """
    if particles.rotation is None:
        raise InputError(f"{particles.path}: these particles have no poses to write")
    shift = np.zeros((len(particles), 2)) if particles.shift is None else particles.shift.astype(np.float64)
    angstrom = shift * width[:, None]
    if isinstance(metadata, ParticleTables):
        return _into_star(metadata, particles.rotation, angstrom, pixel_size)
    return _into_cs(metadata, particles.rotation, angstrom, particles)


def _into_star(
    tables: ParticleTables, rotation: np.ndarray, angstrom: np.ndarray, pixel_size: float | None
) -> ParticleTables:
    table = tables.particles.copy()
    own = all(tables.has(name) for name in EULER)
    found = np.stack([tables.numbers(name) for name in EULER], axis=1) if own else None
    if found is None or not np.abs(from_euler(found) - rotation).max(initial=0.0) < SAME:
        for name, angle in zip(EULER, to_euler(rotation).T, strict=True):
            table[name] = np.round(angle, 5)
    in_pixels, names = ("rlnOriginX", "rlnOriginY"), ("rlnOriginXAngst", "rlnOriginYAngst")
    stale = names if tables.optics is None else in_pixels
    table = table.drop(columns=[name for name in stale if name in table.columns])
    if tables.optics is None:  # RELION 3.0: pixels, and Angstrom would not be read
        pixel = pixel_sizes_from_star(tables)
        if pixel is None and pixel_size is not None:
            pixel = np.full(len(tables), pixel_size)
        if pixel is None:
            raise InputError(f"{tables.path}: has no pixel size, so origins cannot be written in its pixels")
        angstrom, names = angstrom / np.asarray(pixel)[:, None], in_pixels
    for axis, name in enumerate(names):
        table[name] = np.round(angstrom[:, axis], 5)
    return replace(tables, particles=table)


def _into_cs(rows: np.ndarray, rotation: np.ndarray, angstrom: np.ndarray, particles: ParticleSet) -> np.ndarray:
    names = rows.dtype.names
    size = f"{GROUP}/psize_A"
    if size in names:
        pixel = rows[size].astype(np.float64)
    elif "blob/psize_A" in names:
        pixel = rows["blob/psize_A"].astype(np.float64)
    else:
        raise InputError(f"{particles.path}: its cs rows have no blob/psize_A, so shifts cannot be written")
    if "ctf/shift_A" in names:
        angstrom = angstrom + rows["ctf/shift_A"]
    columns = {
        f"{GROUP}/pose": to_cryosparc(rotation),
        f"{GROUP}/shift": (angstrom / pixel[:, None]).astype(np.float32),
        size: pixel.astype(np.float32),
    }
    new = [(name, value.dtype.str, value.shape[1:]) for name, value in columns.items() if name not in names]
    out = np.zeros(len(rows), rows.dtype.descr + new)
    for name in names:
        out[name] = rows[name]
    for name, value in columns.items():
        out[name] = value
    return out
