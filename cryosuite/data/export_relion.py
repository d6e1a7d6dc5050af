"""Star tables in the form of RELION 3.0 or of 3.1 and later, and what a cs file says that RELION has columns for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cryosuite.errors import InputError, notice
from cryosuite.formats.star import ParticleTables, pixel_sizes_from_star

if TYPE_CHECKING:
    import pandas as pd

VERSIONS = {"3.0": "3.0", "3": "3.0", "3.1": "3.1", "4": "3.1", "4.0": "3.1", "5": "3.1", "5.0": "3.1"}
DETECTOR_UM = 5.0  # of the made-up detector whose magnification gives the pixel size
# columns of an optics table that a particle of RELION 3.0 has too
ALSO_IN_30 = ("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast", "rlnBeamTiltX", "rlnBeamTiltY")
# ... and those that say what 3.0 knows otherwise or does not need
SAID_OTHERWISE = {
    "rlnOpticsGroup", "rlnOpticsGroupName", "rlnImagePixelSize", "rlnImageSize", "rlnImageDimensionality",
    "rlnMicrographOriginalPixelSize", "rlnMicrographPixelSize", "rlnMtfFileName",
}  # fmt: skip


def relion_form(version: str | None) -> str | None:
    """The form a version of RELION reads, "3.0" or "3.1" (4 and 5 read it too); None: that of the source."""
    if version is None:
        return None
    if version not in VERSIONS:
        raise InputError(f"--relion {version}: expected 3.0, 3.1, 4 or 5")
    return VERSIONS[version]


def as_relion_30(tables: ParticleTables) -> ParticleTables:
    """Tables of RELION 3.1 as the one table of 3.0: optics per particle, origins in pixels, and no optics table.

    The pixel size becomes a magnification on a detector of 5 um. Optics columns that 3.0 has no name for (Zernike
    terms, magnification matrix) are left out, with a notice. Raises InputError where there is no pixel size.
    """
    if tables.optics is None:
        return tables
    pixel = pixel_sizes_from_star(tables)
    if pixel is None:
        raise InputError(f"{tables.path}: has no pixel size, which RELION 3.0 needs as a magnification")
    pixel = np.asarray(pixel, np.float64)
    table, optics = tables.particles.copy(), tables.optics
    for axis in "XY":
        if f"rlnOrigin{axis}Angst" in table:
            table[f"rlnOrigin{axis}"] = np.round(tables.numbers(f"rlnOrigin{axis}Angst") / pixel, 6)
    table["rlnMagnification"] = np.round(DETECTOR_UM * 1e4 / pixel, 6)
    table["rlnDetectorPixelSize"] = DETECTOR_UM
    lost = []
    for name in optics.columns:
        if name in ALSO_IN_30:
            table[name] = optics[name].to_numpy()[tables.group]
        elif name not in SAID_OTHERWISE and name not in table and not _neutral(optics[name]):
            lost.append(str(name))
    if lost:
        notice(f"{tables.path}: RELION 3.0 has no column for {', '.join(lost)}: left out")
    table = table.drop(
        columns=[name for name in ("rlnOriginXAngst", "rlnOriginYAngst", "rlnOpticsGroup") if name in table]
    )
    order = [
        tables.block,
        *(name for name in tables.order if name not in ("optics", tables.block)),
    ]  # 3.0 reads the first
    return replace(
        tables, particles=table, optics=None, version="3.0", order=order, group=np.zeros(len(table), np.int64)
    )


def _neutral(column: pd.Series) -> bool:
    """Whether an optics column says nothing: zeros, empty lists, an identity's elements are not looked at."""
    return all(str(value).strip("[]").replace(",", "").replace("0", "").replace(".", "") == "" for value in column)


def columns_of_cs(rows: np.ndarray) -> dict[str, Any]:
    """Columns of a particle table that a cs file knows: micrograph, coordinates in its pixels, class, merit.

    Coordinates are ``location/center_*_frac`` times the micrograph's shape (rows, columns).
    """
    names, found = rows.dtype.names, {}
    if "location/micrograph_path" in names:
        found["rlnMicrographName"] = _text(rows["location/micrograph_path"])
    if {"location/center_x_frac", "location/center_y_frac", "location/micrograph_shape"} <= set(names):
        shape = rows["location/micrograph_shape"].astype(np.float64)
        for axis, column in (("x", 1), ("y", 0)):
            fraction = rows[f"location/center_{axis}_frac"].astype(np.float64)
            found[f"rlnCoordinate{axis.upper()}"] = np.round(fraction * shape[:, column], 3)
    return found


def _text(values: np.ndarray) -> np.ndarray:
    """Bytes or text as text, without the > of cryoSPARC's imported paths."""
    text = np.char.decode(values, "utf-8", "replace") if values.dtype.kind == "S" else values.astype(str)
    return np.char.lstrip(text, ">").astype(object)
