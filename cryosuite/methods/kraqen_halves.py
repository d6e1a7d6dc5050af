"""Shares decided within each half set, so that the half maps of a code share nothing but a coarse start.

A particle that chose its code by maps made from all particles carries a little of the noise of both half sets into its
own: the half maps' FSC is then too high. Here all particles choose again, those of each half by maps of their own half
alone. Both halves start from the joint maps cut at a coarse radius, as gold-standard refinements do, so that code k
means the same in both.
"""

from __future__ import annotations

import numpy as np

from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.errors import InputError
from cryosuite.methods.kraqen_options import KraqenOptions
from cryosuite.methods.kraqen_voxel import VoxelEM
from cryosuite.reconstruct.weights import ClassWeights

COARSE = 0.5  # radius of the common start, in units of D/2 of the cluster box
ITERATIONS = 4


def shares_apart(
    particles: ParticleSet, p: ClassWeights, options: KraqenOptions, seed: int = 0, processes: Processes = ALONE
) -> ClassWeights:
    """New shares (N, K) of all particles that have any, each half set judged by its own maps.

    Args:
        p: shares of a finished run. options: its options (cluster box, prior, sparse are used).
        processes: that share the images; all get the shares of all.

    Raises:
        InputError: all particles belong to one half set.
    """
    half, used = particles.half_sets(), np.diff(p.indptr) > 0
    rows = [np.flatnonzero(used & (half == h)) for h in (0, 1)]
    if not all(len(part) for part in rows):
        raise InputError(
            "--half-sets: all particles belong to one half set (rlnRandomSubset): nothing can be held apart"
        )
    engine = VoxelEM(particles, options.changed(n_codes=p.n_classes), seed, processes=processes)
    full = engine.box // 2
    coarse = max(2, round(COARSE * full))
    with engine.threads_of_torch():
        maps = [engine.maps(p, coarse)] * 2
        for number in range(ITERATIONS):
            last = number == ITERATIONS - 1
            r_max = coarse if number == 0 else full
            dense = np.zeros((len(particles), p.n_classes), np.float32)
            for h in (0, 1):
                dense[rows[h]] = _posterior(engine.scores(maps[h], rows[h], r_max), p.rows(rows[h]).usage())
            p = ClassWeights.from_dense(dense, options.sparse)
            if not last:
                maps = list(engine.halves(p, full))
    return p


def _posterior(likelihood: np.ndarray, usage: np.ndarray) -> np.ndarray:
    """Shares from log-likelihoods (n, K) and the codes' sizes in this half set."""
    values = likelihood + np.log(np.maximum(usage, 1e-3 * max(usage.sum(), 1e-30)))
    values = np.exp(values - values.max(1, keepdims=True))
    return (values / values.sum(1, keepdims=True)).astype(np.float32)
