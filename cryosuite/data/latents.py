"""Latents of a run on disk: the last epoch whose file is whole, while a training or a copy is still writing."""

from __future__ import annotations

import zlib

import numpy as np

from cryosuite.data.workdir import AnalysisDir, RunDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.config import read_yaml
from cryosuite.formats.pickles import read_array, read_latent


def last_latents(run: RunDir, epoch: int | None = None) -> tuple[int, np.ndarray]:
    """The epoch asked for (None or -1: the last one that is whole) and its latents (N, zdim) float32, NaN admitted.

    Epochs whose file is cut short or damaged are told and left out. Raises InputError where none is whole.
    """
    if epoch not in (None, -1):
        wanted = run.epoch(epoch)
        return wanted, read_latent(run.z(wanted), finite=False)[0]
    epochs, problem = run.epochs() or [run.last_epoch()], None
    for wanted in reversed(epochs):
        try:
            return wanted, read_latent(run.z(wanted), finite=False)[0]
        except InputError as error:
            problem = problem or error
            notice(f"epoch {wanted} is left out: {error}")
    raise problem


def last_whole_epoch(run: RunDir) -> int:
    """The last epoch whose latents are whole (see ``last_latents``)."""
    return last_latents(run)[0]


def fingerprint(z: np.ndarray) -> str:
    """A short text that is the same for the same latents (N, zdim): an analysis notes which ones it was made of."""
    return f"{zlib.crc32(np.ascontiguousarray(z, '<f4').tobytes()):08x}"


def read_umap(analysis: AnalysisDir, count: int, z: np.ndarray | None = None) -> np.ndarray | None:
    """UMAP coordinates (count, 2) of an analysis, NaN where left out; None where there are none, or of other particles.

    With ``z`` (count, zdim) also None, with a notice, where the analysis notes that it was made of other latents.
    Raises InputError for a file that is no array.
    """
    if not analysis.umap.is_file():
        return None
    noted = read_yaml(analysis.summary).get("latents") if z is not None and analysis.summary.is_file() else None
    if noted is not None and noted != fingerprint(z):
        notice(f"{analysis.umap}: of other latents than the run has now (trained anew?): left out; run analyze again")
        return None
    found = read_array(analysis.umap, (None, 2), "UMAP coordinates", "f")
    return found.astype(np.float32) if len(found) == count else None
