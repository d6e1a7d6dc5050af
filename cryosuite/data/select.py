"""Which particles: rows from a lasso, clusters, conditions, neighbours in latent space, at random; joined by AND."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cryosuite.data.particles import ParticleSet
from cryosuite.data.rows import rows_of_indices
from cryosuite.errors import InputError, notice
from cryosuite.formats.checks import name_rows, printable, read_bytes
from cryosuite.formats.pickles import read_indices

LASSO = "cryosuite selection"
INDICES = re.compile(r"\s*#\s*original indices", re.IGNORECASE)  # the first line of the report's list of them


@dataclass
class Selection:
    """Particles that fulfil every condition put to them so far; ``steps`` says how many fulfil each."""

    count: int
    chosen: np.ndarray = field(init=False)
    steps: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chosen = np.ones(self.count, bool)

    def add(self, what: str, rows: np.ndarray) -> None:
        """Keep those that are also in ``rows``: positions, or a mask (count,)."""
        mask = rows if rows.dtype == bool else np.isin(np.arange(self.count), rows)
        self.chosen &= mask
        self.steps.append((what, int(mask.sum())))

    def complement(self) -> None:
        """All others instead."""
        self.chosen = ~self.chosen
        self.steps.append(("--not", int(self.chosen.sum())))

    def at_random(self, number: int, seed: int) -> None:
        """Keep a random part of them; all, with a notice, where there are not that many."""
        if number < 1:
            raise InputError(f"--random {number}: expected at least 1")
        if seed < 0:
            raise InputError(f"--seed {seed}: expected 0 or more")
        rows = np.flatnonzero(self.chosen)
        if 0 < len(rows) < number:
            notice(f"--random {number}: there are only {len(rows)} particles to choose from: all of them are taken")
        kept = np.random.default_rng(seed).choice(rows, min(number, len(rows)), replace=False)
        self.chosen = np.isin(np.arange(self.count), kept)
        self.steps.append((f"--random {number}", len(kept)))

    def rows(self) -> np.ndarray:
        """The rows chosen, in their order; InputError with the count of each step where there are none."""
        rows = np.flatnonzero(self.chosen)
        if not len(rows):
            each = "; ".join(f"{what}: {count:,}" for what, count in self.steps)
            together = " Together they leave none." if len(self.steps) > 1 else ""
            raise InputError(f"no particle of {self.count:,} is selected, nothing is written ({each}).{together}")
        return rows


def rows_in_clusters(labels: np.ndarray, clusters: list[int], source: Path | None) -> np.ndarray:
    """Rows whose label is one of the clusters; InputError for a cluster that has no particle."""
    present, size = np.unique(labels[labels >= 0], return_counts=True)
    absent = [number for number in clusters if number not in present]
    if absent:
        known = ", ".join(f"{label} ({count:,})" for label, count in zip(present[:40], size[:40], strict=True))
        raise InputError(
            f"{source}: no particle in cluster {', '.join(map(str, absent))}. Clusters (particles): {known or 'none'}"
        )
    return np.flatnonzero(np.isin(labels, clusters))


def rows_by_index(particles: ParticleSet, path: Path) -> np.ndarray:
    """Rows of the particles whose original index a .pkl lists, in its order; a notice for those that are not here."""
    wanted = read_indices(path)
    rows, missing = rows_of_indices(particles.index, wanted)
    if not len(rows):
        raise InputError(f"{path}: none of its {len(wanted)} original indices is among these particles")
    if missing:
        notice(f"{path}: {missing} of {len(wanted)} original indices are not among these particles")
    return rows


def rows_from(path: Path, count: int, run: str = "", epoch: int | None = None) -> np.ndarray:
    """Rows of a lasso saved by the report (.json), of a text file of rows from 0 (anything else).

    Raises:
        InputError: another kind of file, rows that are not whole numbers from 0 to ``count`` - 1, a lasso of another
            number of particles. A lasso of another run or epoch with as many particles is told and taken.
    """
    data = read_bytes(path, "selection")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(
            f"{path}: is neither a lasso.json nor a text file of rows (original indices: --with)"
        ) from None
    if text.lstrip()[:1] in ("{", "["):
        return _whole(path, _lasso(path, text, count, run, epoch), count)
    if INDICES.match(text):
        raise InputError(f"{path}: holds original indices, not rows: save the selection as lasso.json, or as a .pkl")
    words = re.sub(r"#[^\n]*", "", text).replace(",", " ").split()
    bad = next((word for word in words if not re.fullmatch(r"\d{1,18}", word)), None)
    if bad is not None:
        raise InputError(f"{path}: {printable(bad)!r} is no row: rows are whole numbers that count from 0")
    return _whole(path, [int(word) for word in words], count)


def _lasso(path: Path, text: str, count: int, run: str, epoch: int | None) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {printable(error)}") from None
    if isinstance(found, list):
        return found
    if found.get("kind") != LASSO or found.get("version") != 1:
        raise InputError(f"{path}: is not a selection saved by the report (kind {LASSO!r}, version 1)")
    if found.get("n_particles") != count:
        raise InputError(
            f"{path}: was drawn among {printable(found.get('n_particles'))} particles, not {count}: give the run it "
            f"was drawn in ({printable(found.get('run'))})"
        )
    for what, was, now in (("run", found.get("run"), run), ("epoch", found.get("epoch"), epoch)):
        if was not in (None, "") and now not in (None, "") and was != now:
            notice(
                f"{path}: was drawn in {what} {printable(was)}, this is {what} {now}; its rows are taken as they are"
            )
    return found.get("rows")


def _whole(path: Path, rows: Any, count: int) -> np.ndarray:
    if not isinstance(rows, list) or any(type(row) is not int for row in rows):
        raise InputError(f"{path}: its rows are not a list of whole numbers")
    beyond = [row for row in rows if not 0 <= row < count]
    if beyond:
        raise InputError(f"{path}: row {beyond[0]} is not among the {count} particles (rows 0 to {count - 1})")
    array = np.array(rows, np.int64)
    repeats = len(array) - len(np.unique(array))
    if repeats:
        notice(f"{path}: {repeats} rows are listed more than once")
    return array


def nearest_rows(z: np.ndarray, point: np.ndarray, number: int) -> np.ndarray:
    """The ``number`` rows of latents (N, zdim) nearest to a point (zdim,), Euclidean; NaN rows are never among them."""
    if number < 1:
        raise InputError(f"--count {number}: expected at least 1")
    distance = np.square(z.astype(np.float64) - point).sum(axis=1)
    good = np.flatnonzero(np.isfinite(distance))
    if len(good) < number:
        notice(f"--count {number}: there are only {len(good)} particles with latents")
    return good[np.argsort(distance[good], kind="stable")[:number]]


def latent_of_row(z: np.ndarray, row: int) -> np.ndarray:
    """The latent of a row; InputError for a row that is not there or is not a number."""
    if not 0 <= row < len(z):
        raise InputError(f"--near-row {row}: rows go from 0 to {len(z) - 1}")
    if not np.isfinite(z[row]).all():
        raise InputError(f"--near-row {row}: the latent of {name_rows([row])} is NaN or infinite")
    return z[row]


def latent_of_cluster(z: np.ndarray, labels: np.ndarray, cluster: int) -> np.ndarray:
    """The latent of the particle nearest to the mean of a cluster: where ``analyze`` decodes the cluster's volume."""
    own = np.flatnonzero((labels == cluster) & np.isfinite(z).all(axis=1))
    if not len(own):
        raise InputError(f"--near-volume {cluster}: no particle in cluster {cluster}")
    mean = z[own].astype(np.float64).mean(axis=0)
    return z[nearest_rows(z, mean, 1)[0]]
