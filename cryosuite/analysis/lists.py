"""Particles of each cluster as lists that other programs take: original indices, and star files."""

from __future__ import annotations

import numpy as np

from cryosuite.data.particles import ParticleSet
from cryosuite.data.workdir import AnalysisDir
from cryosuite.formats.pickles import write_pickle


def write_lists(out: AnalysisDir, particles: ParticleSet, labels: np.ndarray, count: int) -> None:
    """Write cluster_000.ind.pkl (positions in the ORIGINAL stack, as cryoDRGN's --ind takes them) for each cluster.

    Args:
        labels: (N,) cluster of each particle of the set, -1 for none.
    """
    out.cluster_indices(0).parent.mkdir(parents=True, exist_ok=True)
    for label in range(count):
        write_pickle(out.cluster_indices(label), particles.index[labels == label])
