"""Are the rows of a file still those that ``preprocess`` read? A number per row tells, kept in the work directory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from cryosuite.errors import InputError
from cryosuite.formats.star import ParticleTables

AGAIN = "Run preprocess again, or export the rows of the work directory itself with --binned."


def row_keys(metadata: ParticleTables | np.ndarray | None) -> np.ndarray | None:
    """A hash (N,) uint32 of what names each particle; None for bare stacks and cs files without uid.

    Of a star row the image's number and the name of its stack without folders, which change when a project moves; of a
    cs row its uid. Two different rows agree once in four thousand million times.
    """
    if isinstance(metadata, ParticleTables):
        if "rlnImageName" not in metadata.particles:
            return None
        parts = metadata.particles["rlnImageName"].astype(str).str.partition("@")
        names = (parts[0] + "@" + parts[2].str.rpartition("/")[2]).to_numpy(object)
    elif metadata is not None and "uid" in (metadata.dtype.names or ()):
        names = metadata["uid"].astype(np.uint64)
    else:
        return None
    return pd.util.hash_array(names, categorize=False).astype(np.uint32)


def require_rows(table: Path, count: int, rows: np.ndarray) -> None:
    """InputError when ``table`` with ``count`` particles has not all ``rows`` any more."""
    last = int(rows.max(initial=-1))
    if last >= count:
        raise InputError(
            f"{table}: has {count} particles, but particle {last} of it (from 0) was read by preprocess: the file has "
            f"changed since. {AGAIN}"
        )


def require_same_rows(table: Path, found: np.ndarray | None, rows: np.ndarray, keys: np.ndarray | None) -> None:
    """InputError when the hashes ``found`` (n,) of ``rows`` (n,) of ``table`` are not those of preprocess, ``keys``."""
    if keys is None or found is None:
        return
    other = np.flatnonzero(found != keys)
    if len(other):
        raise InputError(
            f"{table}: particle {rows[other[0]]} (from 0) is not the one that preprocess read there ({len(other)} of "
            f"{len(keys)} differ): the file has changed since. {AGAIN}"
        )
