"""One row per particle, everything known of it: ``particles.csv``, which the report shows and ``select --where`` reads.

Columns have short names that are words of Python's grammar (``defocus``, ``rlnClassNumber``, ``ctf_exp_group_id``), so
that they can be typed in a condition; ``particles_columns.csv`` says the unit and meaning of each. What counts from 0
says so in the header (``cluster_from_0``); ``select --where`` takes ``cluster`` for it too.
"""

from __future__ import annotations

import csv
import keyword
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cryosuite.data.export import load_metadata, source_rows
from cryosuite.data.orientations import to_euler
from cryosuite.data.particles import ParticleSet
from cryosuite.errors import InputError, notice, one_line
from cryosuite.formats.atomic import atomic_path
from cryosuite.formats.csv_text import guarded
from cryosuite.formats.relion import ParticleTables

BLOCK = 20_000  # rows formatted at once
FROM_0 = "_from_0"  # ends the header of what counts from 0
MOST_COMPONENTS = 8
WIDTH_ROWS = 50_000  # particles that the width of clusters is measured on
FEW = 64  # text columns with more different values than this are not kept (micrographs always are)
# what has a column of our own, or says nothing about the particle
KNOWN = {
    "rlnImageName", "rlnImageOriginalName", "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginX", "rlnOriginY",
    "rlnOriginXAngst", "rlnOriginYAngst", "rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnRandomSubset",
    "rlnMicrographName", "rlnOpticsGroup", "uid", "blob/idx", "alignments3D/split", "alignments3D/cross_cor",
    "location/micrograph_path", "location/micrograph_uid", "location/exp_group_id", "ctf/df1_A", "ctf/df2_A",
    "ctf/df_angle_rad", "ctf/exp_group_id", "blob/path",
}  # fmt: skip
# columns that come from the latents themselves or count the rows; a column of the file never has such a name
OWN = {"row", "index", "z", "umap1", "umap2", "cluster", "confidence", "gmm", "gmm_confidence", "code",
       *(f"pc{i + 1}" for i in range(MOST_COMPONENTS))}  # fmt: skip
MICROGRAPH = ("rlnMicrographName", "location/micrograph_path", "location/micrograph_uid")


@dataclass(frozen=True)
class Column:
    """One column: values (N,) numbers, NaN where unknown; or, with ``names``, codes into them, -1 where unknown.

    ``unit`` and ``about`` in plain words; ``cyclic`` for angles that end where they begin; ``from_0`` for labels and
    positions, whose header says that they count from 0.
    """

    name: str
    values: np.ndarray
    unit: str = ""
    about: str = ""
    names: tuple[str, ...] = ()
    cyclic: bool = False
    from_0: bool = False

    @property
    def header(self) -> str:
        """The name in particles.csv."""
        return f"{self.name}{FROM_0}" if self.from_0 else self.name

    @property
    def constant(self) -> bool:
        """True when all known values are the same, or none is known."""
        known = self.values[self.values >= 0] if self.names else self.values[np.isfinite(self.values)]
        return not len(known) or bool((known == known[0]).all())


def particle_columns(
    z: np.ndarray,  # (N, zdim)
    labels: np.ndarray,  # (N,) int, -1: left out
    particles: ParticleSet | None,
    *,
    pca_scores: np.ndarray | None = None,  # (N, c), NaN where left out
    umap: np.ndarray | None = None,  # (N, 2), NaN where left out
    confidence: np.ndarray | None = None,  # (N,)
    groups: tuple[np.ndarray, np.ndarray] | None = None,  # labels and confidence of the Gaussian mixture
    codes: np.ndarray | None = None,  # (N,) the run's own classes
) -> list[Column]:
    """All columns of a run's particles, in the order of the table; those of the star or cs file come last."""
    count = len(labels)
    index = np.arange(count) if particles is None else particles.index
    found = [
        Column("row", np.arange(count), about="row of the run's particle set, from 0", from_0=True),
        Column("index", index, about="position in the original particle set, from 0", from_0=True),
    ]
    if pca_scores is not None:
        for i in range(min(pca_scores.shape[1], MOST_COMPONENTS)):
            found.append(Column(f"pc{i + 1}", pca_scores[:, i], about=f"principal component {i + 1} of the latents"))
    elif z.shape[1] == 1:
        found.append(Column("z", z[:, 0], about="the latent number"))
    if umap is not None:
        found += [Column(f"umap{i + 1}", umap[:, i], about="place on the UMAP (no unit)") for i in (0, 1)]
    found.append(Column("cluster", labels, about="cluster, from 0; -1: left out", from_0=True))
    if confidence is None:
        confidence = round_confidence(z, labels)
    found.append(Column("confidence", confidence, about="probability of the cluster, 0 to 1"))
    if groups is not None:
        found.append(Column("gmm", groups[0], about="group of the Gaussian mixture, from 0; -1: left out", from_0=True))
        found.append(Column("gmm_confidence", groups[1], about="probability of that group, 0 to 1"))
    if codes is not None:
        found.append(Column("code", codes, about="the run's own class or code, from 0; -1: none", from_0=True))
    if particles is not None:
        found += _from_set(particles)
        found += _from_file(particles, OWN | {name for column in found for name in (column.name, column.header)})
    return found


def round_confidence(z: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Probability (N,) float32 of each label if every cluster were a round cloud of the same width about its mean.

    p_k proportional to exp(-|z - m_k|^2 / 2 s^2). s^2 is the variance within clusters along the directions in which
    their means differ (weighted by how much they differ): other directions tell nothing and would only make it look
    sure. NaN where the label is -1 or the latent is not a number.
    """
    used = np.flatnonzero((labels >= 0) & np.isfinite(z).all(axis=1))
    result = np.full(len(labels), np.nan, np.float32)
    if not len(used):
        return result
    own, points = labels[used], np.asarray(z[used], np.float32)
    count = int(own.max()) + 1
    size = np.bincount(own, minlength=count)
    sums = np.stack([np.bincount(own, points[:, i], count) for i in range(points.shape[1])], axis=1)
    means = (sums / np.maximum(size, 1)[:, None]).astype(np.float32)
    width = _width(points, means, own, size)
    for start in range(0, len(used), BLOCK):
        rows = slice(start, start + BLOCK)
        part = points[rows]
        power = (part @ means.T - 0.5 * np.square(means).sum(axis=1)) / width
        power[:, size == 0] = -np.inf
        power -= power.max(axis=1, keepdims=True)
        share = np.exp(power)
        result[used[rows]] = share[np.arange(len(part)), own[rows]] / share.sum(axis=1)
    return result


def _width(points: np.ndarray, means: np.ndarray, own: np.ndarray, size: np.ndarray) -> float:
    """Variance of points (M, d) about the means (K, d) of their clusters along the directions between these."""
    apart = np.sqrt(size)[:, None] * (means - np.average(means, axis=0, weights=size))
    _, spread, ways = np.linalg.svd(apart.astype(np.float64), full_matrices=False)
    some = np.random.default_rng(0).permutation(len(points))[:WIDTH_ROWS]
    within = np.square((points[some] - means[own[some]]) @ ways.T).mean(axis=0)
    total = float(np.square(spread).sum())
    return max(float((np.square(spread) * within).sum() / total) if total > 0 else float(within.mean()), 1e-12)


def _from_set(particles: ParticleSet) -> list[Column]:
    """What the particle set itself knows: defocus, pose, shift, half set, optics group."""
    found = []
    box = particles.box_size * particles.pixel_size.astype(np.float64)
    if particles.ctf is not None:
        u, v = particles.ctf[:, 2], particles.ctf[:, 3]
        found.append(Column("defocus", (u + v) / 2, "A", "mean of the two defocus values"))
        found.append(Column("astigmatism", np.abs(u - v), "A", "difference of the two defocus values"))
    if particles.rotation is not None:
        angles = _angles(particles.rotation)
        found += [
            Column("rot", angles[:, 0], "degrees", "view direction: angle about the vertical (RELION's rot)", (), True),
            Column("tilt", angles[:, 1], "degrees", "view direction: angle from the vertical (RELION's tilt)"),
            Column("psi", angles[:, 2], "degrees", "turn of the image in its plane (RELION's psi)", (), True),
        ]
    if particles.shift is not None:
        shift = particles.shift.astype(np.float64) * box[:, None]
        found.append(Column("shift", np.hypot(shift[:, 0], shift[:, 1]), "A", "length of the shift to the centre"))
        found += [Column(f"shift_{axis}", shift[:, i], "A", f"shift along {axis}") for i, axis in enumerate("xy")]
    if particles.half is not None:
        found.append(Column("half", np.asarray(particles.half), about="half set, 0 or 1", from_0=True))
    found.append(Column("optics", np.asarray(particles.optics_group), about="optics group, from 0", from_0=True))
    return found


def _angles(rotation: np.ndarray) -> np.ndarray:
    """Euler angles (N, 3) in degrees, in blocks; NaN where the matrix is none."""
    angles = np.full((len(rotation), 3), np.nan, np.float32)
    for start in range(0, len(rotation), BLOCK):
        part = rotation[start : start + BLOCK]
        good = np.flatnonzero(np.isfinite(part).all(axis=(1, 2)) & (np.linalg.det(part) > 0.5))
        angles[start + good] = to_euler(part[good])
    return angles


def _from_file(particles: ParticleSet, taken: set[str]) -> list[Column]:
    """Columns of the star or cs file the particles were first taken from, where it is still there."""
    rows, trouble = None, ""
    for read in (source_rows, load_metadata):  # the first file, or else the work directory's own
        try:
            rows = read(particles) if rows is None else rows
        except (InputError, OSError) as error:
            trouble = str(error)
    if rows is None and trouble:
        notice(f"particles.csv has no columns of the particle file: {trouble}")
    if rows is None or len(rows) != len(particles):
        return []
    found = []
    for name, values in _file_columns(rows):
        column = _micrograph(values) if name in MICROGRAPH else None if name in KNOWN else _column(name, values, taken)
        if column is not None and column.name not in taken:
            taken.add(column.name)
            found.append(column)
    return found


def _file_columns(rows: ParticleTables | np.ndarray) -> Iterator[tuple[str, np.ndarray | pd.Series]]:
    """Names and values of all columns with one value per particle."""
    if isinstance(rows, ParticleTables):
        yield from ((str(name), rows.particles[name]) for name in rows.particles.columns)
    else:
        yield from ((name, rows[name]) for name in rows.dtype.names if rows[name].ndim == 1)


def _micrograph(values: np.ndarray | pd.Series) -> Column:
    values = np.asarray(values)
    values = np.char.decode(values, "utf-8", "replace") if values.dtype.kind == "S" else values
    if values.dtype.kind in "OU":  # cryoSPARC marks paths in exported groups with a >, which is no part of the name
        values = pd.Series(values, dtype=object).str.lstrip(">").to_numpy()
    codes, names = _codes(values)
    return Column("micrograph", codes, about="micrograph the particle was picked from", names=names)


def _column(name: str, values: np.ndarray | pd.Series, taken: set[str]) -> Column | None:
    """A numeric or few-valued column under a name that can be typed; None for what is neither."""
    short = re.sub(r"\W", "_", name)
    short = short if short.isidentifier() and not keyword.iskeyword(short) else f"c_{short}"
    short = f"file_{short}" if short in taken else short
    about = one_line(f"column {name} of the particle file")
    kind = getattr(values.dtype, "kind", "O")
    if kind in "fiub":
        return Column(short, np.asarray(values), about=about)
    numbers = pd.to_numeric(pd.Series(values), errors="coerce").to_numpy(np.float64) if kind == "O" else None
    if numbers is not None and np.isfinite(numbers).all():
        return Column(short, numbers, about=about)
    codes, names = _codes(values)
    return Column(short, codes, about=about, names=names) if len(names) <= FEW else None


def _codes(values: np.ndarray | pd.Series) -> tuple[np.ndarray, tuple[str, ...]]:
    """Text as numbers (N,) int32 of its sorted different values, and these."""
    values = np.asarray(values)
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8", "replace")
    codes, names = pd.factorize(values.astype(str) if values.dtype.kind != "O" else values, sort=False)
    order = np.argsort(np.asarray(names, dtype=str), kind="stable")
    place = np.empty(len(names), np.int32)
    place[order] = np.arange(len(names), dtype=np.int32)
    new = np.where(codes >= 0, place[codes], -1) if len(names) else np.full(len(codes), -1)
    return new.astype(np.int32), tuple(one_line(names[i]) for i in order)


def write_particle_table(path: Path, columns: Sequence[Column]) -> None:
    """Write the columns as CSV, a row per particle, and beside it (``particles_columns.csv``) unit and kind of each.

    Unknown values are empty. Text that a spreadsheet would calculate gets an apostrophe in front (``guarded``), which
    ``select --where`` takes off again. Streamed: memory does not grow with the number of particles.
    """
    count = len(columns[0].values)
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(",".join(column.header for column in columns) + "\n")
        texts = [tuple(_quoted(guarded(name)) for name in column.names) for column in columns]
        for start in range(0, count, BLOCK):
            block = slice(start, start + BLOCK)
            parts = [_texts(column, known, block) for column, known in zip(columns, texts, strict=True)]
            file.write("\n".join(map(",".join, zip(*parts, strict=True))) + "\n")
    meaning = pd.DataFrame({
        "column": [column.header for column in columns],
        "unit": [column.unit for column in columns],
        "kind": ["text" if column.names else "number" for column in columns],
        "meaning": [column.about for column in columns],
    })  # fmt: skip
    with atomic_path(columns_file(path)) as temporary:
        meaning.to_csv(temporary, index=False)


def columns_file(path: Path) -> Path:
    """The file beside a table of particles that says what its columns are."""
    return path.with_name(f"{path.stem}_columns.csv")


def text_columns(path: Path) -> set[str]:
    """Names of the columns of a table that hold text, though it may look like numbers ("001")."""
    known = {"micrograph"}  # of tables without kinds
    if columns_file(path).is_file():
        with open(columns_file(path), encoding="utf-8", errors="replace", newline="") as file:
            known |= {str(row.get("column")) for row in csv.DictReader(file) if row.get("kind") == "text"}
    return known


def _texts(column: Column, names: tuple[str, ...], block: slice) -> Iterable[str]:
    """The cells of a block of rows."""
    values = column.values[block]
    if names:
        known = [*names, ""]  # -1 is the last
        return [known[code] for code in values.tolist()]
    if values.dtype.kind in "iub":
        return map(str, (values.astype(np.int64) if values.dtype.kind == "b" else values).tolist())
    cells = list(map("%.6g".__mod__, values.tolist()))
    for row in np.flatnonzero(~np.isfinite(values)):
        cells[row] = ""
    return cells


def _quoted(text: str) -> str:
    """A cell of text; quoted where the comma, quotes or line ends would break the row."""
    return '"' + text.replace('"', '""') + '"' if re.search(r'[",\r\n]', text) else text
