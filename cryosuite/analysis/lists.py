"""Particles of each cluster as lists that other programs take: original indices, and star files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd

from cryosuite.data.export import load_metadata, take_rows
from cryosuite.data.particles import ParticleSet
from cryosuite.data.workdir import AnalysisDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.pickles import write_pickle
from cryosuite.formats.star import ParticleTables, write_star

IMAGE = "rlnImageName"


def write_lists(out: AnalysisDir, particles: ParticleSet, labels: np.ndarray, count: int) -> None:
    """Write cluster_000.ind.pkl and, for sets that come from a star file, cluster_000.star for each cluster.

    The .ind.pkl holds positions in the ORIGINAL stack (as cryoDRGN's --ind takes them); the .star holds the rows of the
    star file the set was opened from, with all their columns and the other tables (``export`` writes un-binned rows).

    Args:
        labels: (N,) cluster of each particle of the set, -1 for none.
    """
    folder = out.cluster_indices(0).parent
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("cluster_*.ind.pkl"), *folder.glob("cluster_*.star")]:
        old.unlink()  # of an earlier analysis with more clusters
    tables = _tables(particles)
    names = None if tables is None else _moved_names(tables, out.cluster_star(0).parent)
    for label in range(count):
        own = np.flatnonzero(labels == label)
        write_pickle(out.cluster_indices(label), particles.index[own])
        if tables is not None:
            chosen = take_rows(tables, own)
            if names is not None:
                chosen.particles[IMAGE] = names[own]
            write_star(out.cluster_star(label), chosen.blocks())


def _tables(particles: ParticleSet) -> ParticleTables | None:
    """The star tables behind a set, a row per particle, or None when it did not come from a star file still there."""
    try:
        tables = load_metadata(particles)
    except InputError as error:
        notice(f"no star files per cluster: {error}")
        return None
    return tables if isinstance(tables, ParticleTables) else None


def _moved_names(tables: ParticleTables, folder: Path) -> np.ndarray | None:
    """Image names as seen from ``folder``; names that are not relative to the star file's own folder stay."""
    if IMAGE not in tables.particles.columns:
        return None
    names = tables.particles[IMAGE].astype(str)
    parts = names.str.split("@", n=1)
    stacks = parts.str[-1]
    seen = {stack: _seen_from(stack, tables.path.parent, folder) for stack in pd.unique(stacks)}
    moved = stacks.map(seen)
    numbered = parts.str.len() > 1
    return np.where(numbered, parts.str[0] + "@" + moved, moved)


def _seen_from(stack: str, home: Path, folder: Path) -> str:
    if Path(stack).is_absolute() or not (home / stack).is_file():
        return stack
    return Path(os.path.relpath((home / stack).resolve(), folder.resolve())).as_posix()
