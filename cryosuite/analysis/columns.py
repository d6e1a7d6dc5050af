"""Columns of a run's particles by name, as ``select --where`` asks for them; read or made when first wanted."""

from __future__ import annotations

import csv
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cryosuite.data.latents import read_umap
from cryosuite.data.source import Source
from cryosuite.errors import InputError
from cryosuite.formats.checks import printable
from cryosuite.formats.csv_text import unguarded
from cryosuite.formats.relion import ParticleTables

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 60  # names listed in a message
COUNTED = {"row", "index", "cluster", "gmm", "code", "half", "optics"}  # may be asked for with _from_0 behind or not


class Columns:
    """name -> values (N,), numbers or text.

    First the table that ``analyze`` left (particles.csv), then the latents (z1, z2, ...), then what can be made from
    latents, labels and the particle file, last that file's columns under their own names. ``cluster`` and
    ``cluster_from_0`` are the same column, whichever the table has (older ones have the short name).
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._values: dict[str, np.ndarray] = {}
        self._table = None if source.analysis is None else source.analysis.particles
        self._header = _header(self._table) if self._table is not None and self._table.is_file() else []
        self._made: dict[str, np.ndarray] | None = None
        self._file: dict[str, np.ndarray] | None = None

    def names(self) -> list[str]:
        """All names, the file's own last."""
        latents = [] if self.source.z is None else [f"z{i + 1}" for i in range(self.source.z.shape[1])]
        return list(dict.fromkeys([*self._header, *self._computed(), *latents, *self._own()]))

    def has(self, name: str) -> bool:
        """Whether there is such a column."""
        return _known(name, self._header) is not None or _known(name, self.names()) is not None

    def __call__(self, name: str) -> np.ndarray:
        """The values; InputError that lists the known names for another."""
        if name not in self._values:
            self._values[name] = self._find(name)
        return self._values[name]

    def _find(self, name: str) -> np.ndarray:
        z = self.source.z
        given = self.source.labels is not None and self.source.analysis is not None and (
            self.source.labels_from != self.source.analysis.labels
        )  # fmt: skip
        if _short(name) == "cluster" and given:  # --labels in place of those in the table
            return self.source.labels
        if name == "confidence" and given and z is not None:  # that of the table is of other clusters
            from cryosuite.analysis.particle_table import round_confidence

            return round_confidence(z, self.source.labels)
        known = _known(name, self._header)
        if known is not None:
            return self._from_table(known)
        if z is not None and name[:1] == "z" and name[1:].isdigit() and 1 <= int(name[1:]) <= z.shape[1]:
            return z[:, int(name[1:]) - 1]
        for place in (self._computed, self._own):
            known = _known(name, place())
            if known is not None:
                return place()[known]
        names = self.names()
        shown = ", ".join(map(printable, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
        raise InputError(f"--where: no column {printable(name)!r}. Known: {shown}")

    def _from_table(self, name: str) -> np.ndarray:
        import pandas as pd

        from cryosuite.analysis.particle_table import text_columns

        count = len(self.source.particles)
        row = _known("row", self._header)
        wanted = [name] if row in (None, name) else [row, name]
        try:
            as_text = {"dtype": {name: str}, "keep_default_na": False} if name in text_columns(self._table) else {}
            table = pd.read_csv(self._table, usecols=wanted, low_memory=False, encoding_errors="replace", **as_text)
        except (ValueError, csv.Error, pd.errors.ParserError) as error:
            raise InputError(f"{self._table}: cannot be read ({printable(error)}): run analyze again") from None
        rows = np.arange(len(table)) if row is None else table[row].to_numpy()
        if len(table) != count or not np.array_equal(rows, np.arange(count)):
            raise InputError(
                f"{self._table}: {len(table)} rows for {count} particles: it belongs to others; run analyze again"
            )
        values = table[name]
        if values.dtype.kind in "biuf":
            return values.to_numpy()
        return values.fillna("").astype(str).map(unguarded).to_numpy(object)

    def _computed(self) -> dict[str, np.ndarray]:
        """What can be made without the table."""
        if self._made is None:
            self._made = {} if self._header else _make(self.source)
        return self._made

    def _own(self) -> dict[str, np.ndarray]:
        """Columns of the particle file under their own names."""
        if self._file is None:
            self._file = _file_columns(self.source)
        return self._file


def _plain(name: str) -> str:
    """``ctf/exp_group_id`` as the table spells it."""
    return name.replace("/", "_")


def _short(name: str) -> str:
    """``cluster`` for ``cluster_from_0``."""
    short = name.removesuffix("_from_0")
    return short if short in COUNTED else name


def _known(name: str, names: Container[str]) -> str | None:
    """How ``names`` spell the column that was asked for, or None."""
    spelt = [name, _plain(name), _short(name), *([f"{name}_from_0"] if name in COUNTED else [])]
    return next((one for one in spelt if one in names), None)


def _header(path: Path) -> list[str]:
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        return next(csv.reader([file.readline(100_000)]), [])


def _make(source: Source) -> dict[str, np.ndarray]:
    """The columns of particles.csv, from latents, labels and particles."""
    from cryosuite.analysis.latents import all_scores
    from cryosuite.analysis.particle_table import particle_columns

    count, z = len(source.particles), source.z
    labels = np.full(count, -1, np.int64) if source.labels is None else source.labels
    scores = confidence = None
    if z is not None:
        scores = all_scores(z)[0]
    else:
        z, confidence = np.zeros((count, 0), np.float32), np.full(count, np.nan, np.float32)
    umap = None if source.analysis is None else read_umap(source.analysis, count)
    columns = particle_columns(z, labels, source.particles, pca_scores=scores, umap=umap, confidence=confidence)
    made = {}
    for column in columns:
        texts = np.array([*column.names, ""], object)  # -1 is the last
        made[column.header] = texts[column.values] if column.names else np.asarray(column.values)
    if source.labels is None:
        made = {name: values for name, values in made.items() if _short(name) not in ("cluster", "confidence")}
    return made


def _file_columns(source: Source) -> dict[str, np.ndarray]:
    from cryosuite.data.export import load_metadata, source_rows

    try:
        rows = source_rows(source.particles)
    except (InputError, OSError):
        rows = load_metadata(source.particles)
    if isinstance(rows, ParticleTables):
        return {str(name): _numbers_or_text(rows.particles[name]) for name in rows.particles.columns}
    if rows is None:
        return {}
    text = {
        name: np.char.lstrip(np.char.decode(rows[name], "utf-8", "replace"), ">")  # cryoSPARC's mark of exported paths
        for name in rows.dtype.names
        if rows[name].dtype.kind == "S"
    }
    return {name: text.get(name, rows[name]) for name in rows.dtype.names if rows[name].ndim == 1}


def _numbers_or_text(column: pd.Series) -> np.ndarray:
    return column.to_numpy() if column.dtype.kind in "biuf" else column.astype(str).to_numpy(object)
