"""RELION particle tables of versions 3.0 to 5: which block is which, and values per particle.

Version 3.0 has one table, the pixel size from detector and magnification, shifts in pixels; 3.1 and later have a table
of optics groups beside it and shifts in Angstrom. Tilt series and subtomograms are recognised and refused.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from cryosuite.errors import InputError
from cryosuite.formats.star_text import read_star

_PARTICLE_BLOCKS = ("particles", "images", "")
_TOMOGRAPHY = re.compile(r"rlnTomo|wrp")  # in any block
_VOLUMETRIC = re.compile(r"rlnCtfImage$|rlnCoordinateZ$|rlnOriginZ(Angst)?$")  # in a table of images


@dataclass
class ParticleTables:
    """The tables of a particle STAR file.

    ``optics`` is None in version "3.0", else one row per optics group; ``group`` (N,) is the 0-based row of ``optics``
    (zeros without optics). ``other`` are the remaining blocks by name; ``order`` all block names as in the file.
    """

    path: Path
    particles: pd.DataFrame
    optics: pd.DataFrame | None
    other: dict[str, pd.DataFrame]
    version: str
    block: str
    order: list[str]
    group: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.particles)

    def has(self, name: str) -> bool:
        """True when the column is in the particle or the optics table."""
        return name in self.particles.columns or (self.optics is not None and name in self.optics.columns)

    def blocks(
        self, particles: pd.DataFrame | None = None, optics: pd.DataFrame | None = None
    ) -> dict[str, pd.DataFrame]:
        """All blocks in the order of the file, for ``write_star``; other particle and optics tables where given."""
        made = {**self.other, self.block: self.particles if particles is None else particles}
        if self.optics is not None or optics is not None:
            made["optics"] = self.optics if optics is None else optics
        order = self.order if "optics" in self.order or "optics" not in made else ["optics", *self.order]
        return {name: made[name] for name in order}

    def numbers(self, name: str, default: float | None = None) -> np.ndarray:
        """Column ``name`` per particle as float64 (N,), finite; the optics table is asked first, as RELION does.

        Raises InputError naming file, column, row (1-based) and line for a value that is no number, and the column when
        it is missing and no ``default`` is given.
        """
        if self.optics is not None and name in self.optics.columns:
            return self._finite(self.optics, name, "optics")[self.group]
        if name in self.particles.columns:
            return self._finite(self.particles, name, self.block)
        if default is None:
            raise InputError(
                f"{self.path}: column {name} is missing; it is in neither data_{self.block} nor the optics table"
            )
        return np.full(len(self), default)

    def _finite(self, frame: pd.DataFrame, name: str, block: str) -> np.ndarray:
        column = frame[name]
        values = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise InputError(
                f"{self.path}: column {name} of data_{block}: value '{column.iloc[bad[0]]}' in row {bad[0] + 1}"
                f"{self.line_of(frame, bad[0])} is not a finite number"
                f"{f' ({len(bad)} such rows)' if len(bad) > 1 else ''}"
            )
        return values

    @staticmethod
    def line_of(frame: pd.DataFrame, row: int) -> str:
        """' (line 34)' where the line of a row (0-based) is known, else ''."""
        first = frame.attrs.get("line", 0)
        known = first and not frame.attrs.get("gap") and not frame.attrs.get("simple")
        return f" (line {first + int(row)})" if known else ""


def particle_tables(path: str | os.PathLike) -> ParticleTables:
    """Read a particle STAR file of RELION 3.0 to 5.

    The particle table is the block data_particles, data_images or data_ that has image names, wherever it is and
    however small; all other blocks are carried along. Raises InputError as ``read_star`` does, for files without
    particles, for tilt series and subtomograms, and for optics groups that are not defined.
    """
    blocks = read_star(path)
    path = Path(path)
    _refuse_tomography(path, blocks)
    name = _particle_block(path, blocks)
    particles = blocks[name]
    if len(particles) == 0:
        raise InputError(f"{path}: 0 particles: block data_{name} has column names but no rows")
    optics = blocks.get("optics") if name != "optics" else None
    if optics is not None and len(optics) == 0:
        raise InputError(f"{path}: block data_optics has no rows")
    return ParticleTables(
        path=path,
        particles=particles,
        optics=optics,
        other={key: frame for key, frame in blocks.items() if key not in (name, "optics")},
        version="3.0" if optics is None else "3.1",
        block=name,
        order=list(blocks),
        group=_optics_rows(path, particles, optics, name),
    )


def _particle_block(path: Path, blocks: dict[str, pd.DataFrame]) -> str:
    with_images = [name for name, frame in blocks.items() if "rlnImageName" in frame.columns and name != "optics"]
    for name in _PARTICLE_BLOCKS:
        if name in with_images:
            return name
    if len(with_images) == 1:
        return with_images[0]
    if with_images:
        raise InputError(f"{path}: blocks {', '.join('data_' + n for n in with_images)} all have image names: keep one")
    for name in _PARTICLE_BLOCKS:
        if name in blocks:
            if "rlnMicrographName" in blocks[name].columns and "rlnCoordinateX" in blocks[name].columns:
                advice = "; these look like picked coordinates: extract the particles first"
            else:
                advice = ""
            raise InputError(
                f"{path}: block data_{name} has no column rlnImageName: it lists no particle images{advice}"
            )
    found = ", ".join("data_" + name for name in blocks)
    raise InputError(f"{path}: no particle table: no block has a column rlnImageName (found {found})")


def _refuse_tomography(path: Path, blocks: dict[str, pd.DataFrame]) -> None:
    """Say in plain words that tilt series are not read; a wrong result would look like a right one."""
    reason = ""
    for name, frame in blocks.items():
        images = "rlnImageName" in frame.columns
        found = [c for c in frame.columns if _TOMOGRAPHY.match(c) or (images and _VOLUMETRIC.match(c))]
        if found:
            reason = f"column {found[0]} in data_{name}"
        elif "rlnImageDimensionality" in frame.columns and "3" in {str(v) for v in frame["rlnImageDimensionality"]}:
            reason = "rlnImageDimensionality 3"
        elif _is_tilt_export(frame):
            reason = "one rlnGroupName per particle and a B-factor per tilt, as Warp and M export tilt series"
        if reason:
            raise InputError(
                f"{path}: this is a tilt-series or subtomogram set ({reason}). Tilt series are not supported yet: only "
                "single-particle images can be used"
            )


def _is_tilt_export(frame: pd.DataFrame) -> bool:
    """Warp/M particle series: every group name ends in a particle number, every tilt has its own negative B-factor."""
    if not {"rlnGroupName", "rlnCtfBfactor", "rlnCtfScalefactor"} <= set(frame.columns) or len(frame) == 0:
        return False
    bfactor = pd.to_numeric(frame["rlnCtfBfactor"], errors="coerce")
    return bool((bfactor < 0).any() and frame["rlnGroupName"].astype(str).str.contains(r"_\d{7}$", regex=True).all())


def _optics_rows(path: Path, particles: pd.DataFrame, optics: pd.DataFrame | None, block: str) -> np.ndarray:
    """For each particle the row of its optics group."""
    none = np.zeros(len(particles), np.int64)
    if optics is None:
        return none
    if "rlnOpticsGroup" not in optics.columns or "rlnOpticsGroup" not in particles.columns:
        if len(optics) == 1:
            return none
        where = "data_optics" if "rlnOpticsGroup" not in optics.columns else f"data_{block}"
        raise InputError(
            f"{path}: column rlnOpticsGroup is missing in {where}, and there are {len(optics)} optics groups"
        )
    known = optics["rlnOpticsGroup"]
    if known.duplicated().any():
        raise InputError(f"{path}: optics group {known[known.duplicated()].iloc[0]} is defined twice in data_optics")
    rows = pd.Index(known).get_indexer(particles["rlnOpticsGroup"])
    bad = np.flatnonzero(rows < 0)
    if len(bad):
        group = particles["rlnOpticsGroup"].iloc[bad[0]]
        raise InputError(
            f"{path}: optics group {group} in row {bad[0] + 1}{ParticleTables.line_of(particles, bad[0])} is not "
            f"defined in data_optics (defined: {', '.join(map(str, known))})"
        )
    return rows.astype(np.int64)
