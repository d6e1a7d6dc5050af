"""A particle set as RELION 3.1 tables; columns and blocks that we do not know are carried along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cryosuite.data.orientations import from_euler, to_euler
from cryosuite.data.particles import ParticleSet
from cryosuite.data.rows import group_codes
from cryosuite.data.star_rows import EULER, PREMULTIPLIED
from cryosuite.formats.zernike import even_zernike, odd_zernike, wavelength_a

if TYPE_CHECKING:
    import pandas as pd

# columns of the particle table that we write ourselves or that moved to the optics table
OURS = {
    "rlnImageName", "rlnOpticsGroup", *EULER, "rlnOriginXAngst", "rlnOriginYAngst", "rlnOriginX", "rlnOriginY",
    "rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnPhaseShift", "rlnCtfBfactor", "rlnCtfScalefactor",
    "rlnRandomSubset", "rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast", "rlnMagnification",
    "rlnDetectorPixelSize", "rlnPixelSize", "rlnImagePixelSize", "rlnImageSize", "rlnImageDimensionality",
    "rlnBeamTiltX", "rlnBeamTiltY", "rlnOddZernike", "rlnEvenZernike",
    "rlnMagMat00", "rlnMagMat01", "rlnMagMat10", "rlnMagMat11", PREMULTIPLIED,
}  # fmt: skip
OPTICS_TERMS = ("beam_tilt", "trefoil", "tetrafoil", "odd_zernike", "even_zernike", "mag_matrix")  # one per group
PRIVATE = "_"  # names of other programs' internal columns (cryoDRGN's __mrc_index) start with it


def star_tables(
    particles: ParticleSet,
    image_names: Sequence[str],
    box_size: int | np.ndarray,
    pixel_size: np.ndarray,
    carried: Any = None,
) -> dict[str, pd.DataFrame]:
    """Blocks for ``write_star``: optics, particles, then the blocks carried from the source.

    Args:
        particles: poses, CTF, half sets and optics groups come from here.
        image_names: (N,) NUMBER@STACK.
        box_size, pixel_size: of the images named, pixels (N,) or of all, and Angstrom (N,).
        carried: the particle tables (formats.star.ParticleTables) of the source, its rows in the order of the set.
    """
    import pandas as pd

    box_size = np.broadcast_to(box_size, len(particles))
    group, first = _groups(particles, box_size, pixel_size)
    table: dict[str, Any] = {"rlnImageName": pd.array(image_names, dtype="str", copy=False)}
    table |= _poses(particles, box_size, pixel_size, carried)
    if particles.ctf is not None:
        for column, name in ((2, "rlnDefocusU"), (3, "rlnDefocusV"), (4, "rlnDefocusAngle"), (8, "rlnPhaseShift")):
            table[name] = particles.ctf[:, column]
    for key, name in (("bfactor", "rlnCtfBfactor"), ("scale", "rlnCtfScalefactor")):
        if key in particles.extras:
            table[name] = particles.extras[key]
    table["rlnOpticsGroup"] = group + 1
    if particles.half is not None:
        table["rlnRandomSubset"] = particles.half.astype(np.int64) + 1
    blocks = {"optics": _optics(particles, first, box_size, pixel_size, carried)}
    if carried is not None:
        source = carried.particles
        kept = [name for name in source.columns if name not in OURS and not name.startswith(PRIVATE)]
        table |= {name: source[name].array for name in kept}
        table.setdefault("rlnImageOriginalName", source["rlnImageName"].array)
    blocks["particles"] = pd.DataFrame(table, copy=False)
    if carried is not None:
        blocks |= {name: frame for name, frame in carried.other.items() if name not in blocks}
    return blocks


def _groups(particles: ParticleSet, box_size: np.ndarray, pixel_size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Optics group (N,) from 0 of the table we write, and a row of the set for each: the set's groups, split where
    voltage, Cs, amplitude contrast, box, pixel size or aberrations differ within one."""
    parts = [particles.optics_group, box_size, np.asarray(pixel_size)]
    if particles.ctf is not None:
        parts += [particles.ctf[:, 5:8]]
        parts += [particles.extras[name] for name in OPTICS_TERMS if name in particles.extras]
    group = group_codes(parts)
    return group, np.unique(group, return_index=True)[1]


def _poses(particles: ParticleSet, box_size: np.ndarray, pixel_size: np.ndarray, carried: Any) -> dict[str, np.ndarray]:
    """Euler angles (the source's own numbers where they mean the same rotations) and origins in Angstrom."""
    if particles.rotation is None:
        return {}
    euler = None
    if carried is not None and all(carried.has(name) for name in EULER):
        found = np.stack([carried.numbers(name) for name in EULER], axis=1)
        euler = found if np.abs(from_euler(found) - particles.rotation).max() < 1e-5 else None
    euler = to_euler(particles.rotation) if euler is None else euler
    columns = dict(zip(EULER, euler.T, strict=True))
    if particles.shift is not None:
        origin = particles.shift.astype(np.float64) * (box_size * np.asarray(pixel_size, np.float64))[:, None]
        columns |= {"rlnOriginXAngst": np.round(origin[:, 0], 5), "rlnOriginYAngst": np.round(origin[:, 1], 5)}
    return columns


def _optics(
    particles: ParticleSet, first: np.ndarray, box_size: np.ndarray, pixel_size: np.ndarray, carried: Any
) -> pd.DataFrame:
    """One row per optics group; columns of the source's optics table that we do not know stay."""
    import pandas as pd

    source = None if carried is None else carried.optics
    rows = None if source is None else carried.group[first]
    names = [f"opticsGroup{number + 1}" for number in range(len(first))]
    if source is not None and "rlnOpticsGroupName" in source and len(np.unique(rows)) == len(rows):
        names = list(source["rlnOpticsGroupName"].iloc[rows])
    table: dict[str, Any] = {"rlnOpticsGroup": np.arange(len(first)) + 1, "rlnOpticsGroupName": names}
    if particles.ctf is not None:
        for column, name in ((5, "rlnVoltage"), (6, "rlnSphericalAberration"), (7, "rlnAmplitudeContrast")):
            table[name] = particles.ctf[first, column]
    table["rlnImagePixelSize"] = np.round(np.asarray(pixel_size, np.float64)[first], 6)
    table["rlnImageSize"] = box_size[first]
    table["rlnImageDimensionality"] = np.full(len(first), 2)
    if particles.ctf_premultiplied:
        table[PREMULTIPLIED] = np.ones(len(first), np.int64)
    table |= _aberrations(particles, first)
    if source is not None:
        ours = OURS | {"rlnOpticsGroupName"}
        table |= {name: source[name].to_numpy()[rows] for name in source.columns if name not in ours}
    return pd.DataFrame(table)


def _aberrations(particles: ParticleSet, first: np.ndarray) -> dict[str, Any]:
    """Aberrations as columns of the optics table; cryoSPARC's trefoil and tetrafoil as Zernike coefficients."""
    columns: dict[str, Any] = {}
    extras = {name: particles.extras[name][first].astype(np.float64) for name in particles.extras}
    if "trefoil" in extras or "tetrafoil" in extras:
        wavelength = wavelength_a(particles.ctf[first, 5])
    if "trefoil" in extras:
        terms = odd_zernike(wavelength, trefoil_a=extras["trefoil"])
        extras["odd_zernike"] = _sum_of_lists(terms, extras.get("odd_zernike"))
    if "tetrafoil" in extras:
        extras["even_zernike"] = _sum_of_lists(
            even_zernike(wavelength, extras["tetrafoil"]), extras.get("even_zernike")
        )
    if "beam_tilt" in extras:
        columns |= {f"rlnBeamTilt{axis}": extras["beam_tilt"][:, i] for i, axis in enumerate("XY")}
    for key, name in (("odd_zernike", "rlnOddZernike"), ("even_zernike", "rlnEvenZernike")):
        if key in extras:
            columns[name] = ["[" + ",".join(f"{value:.9g}" for value in values) + "]" for values in extras[key]]
    if "mag_matrix" in extras:
        columns |= {f"rlnMagMat{i}{j}": extras["mag_matrix"][:, i, j] for i in (0, 1) for j in (0, 1)}
    return columns


def _sum_of_lists(a: np.ndarray, b: np.ndarray | None) -> np.ndarray:
    """Sum of two tables of coefficients (G, m) and (G, n), the shorter one filled with zeros."""
    if b is None:
        return a
    total = np.zeros((len(a), max(a.shape[1], b.shape[1])))
    total[:, : a.shape[1]] += a
    total[:, : b.shape[1]] += b
    return total
