"""Which codes show the same state: decided by images that had no part in the maps they are scored with.

Twins share a state's images among them, often by view, so that their maps differ more than those of two similar states
(measured on 16 complexes at D = 32: twins correlate .91 to .99 after correction for noise, two different complexes
.95). Images tell better. Every image is scored with maps of the other half set: with the maps of codes j and k as a
mixture of two, and with the one map of their images together,

    gain = sum_i  log (pi_j + pi_k) + l_i(jk) - log( pi_j exp l_i(j) + pi_k exp l_i(k) )      over images of j and k

Twins gain, since one map of more images is less noisy; different states lose by far more than noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse

from cryosuite.reconstruct.weights import ClassWeights

if TYPE_CHECKING:
    from cryosuite.methods.kraqen_voxel import VoxelEM

SAMPLE = 100  # images of a code that are asked, at most
PARTNERS = 2  # other codes tried with each code: those that explain its images best
ROUNDS = 6


def twin_groups(engine: VoxelEM, p: ClassWeights, seed: int = 0) -> np.ndarray:
    """(K,) int64 group of each code, numbered from 0; codes without images keep a group of their own."""
    groups = np.arange(p.n_classes)
    for number in range(ROUNDS):
        pairs = _gains(engine, p.merged(groups), np.random.default_rng([seed, 3, number]))
        taken: set[int] = set()
        onto = np.arange(groups.max() + 1)
        for gain, j, k in sorted(pairs, reverse=True):
            if gain > 0 and not {j, k} & taken:
                taken |= {j, k}
                onto[max(j, k)] = min(j, k)
        if not taken:
            break
        groups = np.unique(onto[groups], return_inverse=True)[1]
    return groups


def _gains(engine: VoxelEM, p: ClassWeights, generator: np.random.Generator) -> list[tuple[float, int, int]]:
    """(gain, j, k) of the pairs that are worth a look."""
    labels, half, r_max = p.labels(), engine.particles.half_sets(), engine.box // 2
    counts = np.bincount(labels[labels >= 0], minlength=p.n_classes)
    share = np.log(np.maximum(p.usage(), 1e-3) / max(p.usage().sum(), 1e-3))
    parts = [np.flatnonzero(labels == k) for k in range(p.n_classes)]
    rows = np.sort(np.concatenate([generator.permutation(part)[:SAMPLE] for part in parts]))
    own = labels[rows]
    asked = np.bincount(own, minlength=p.n_classes)
    scores = _held_out(engine, p, rows, half, r_max)
    total = np.stack([scores[own == k].sum(0) for k in range(p.n_classes)])  # of the images of each code
    np.fill_diagonal(total, -np.inf)
    total[:, counts == 0] = -np.inf
    pairs = set()
    for j in np.flatnonzero(counts):
        for k in np.argsort(-total[j], kind="stable")[:PARTNERS]:
            if np.isfinite(total[j, k]):
                pairs.add((int(min(j, k)), int(max(j, k))))
    pairs = sorted(pairs)
    if not pairs:
        return []
    row, column = np.array(pairs).ravel(), np.repeat(np.arange(len(pairs)), 2)
    onto = sparse.csr_array((np.ones(len(row), np.float32), (row, column)), shape=(p.n_classes, len(pairs)))
    table = sparse.csr_array(p.matrix @ onto)
    table.sort_indices()
    joint = ClassWeights(table.data, table.indices.astype(np.int32), table.indptr.astype(np.int64), len(pairs))
    together = _held_out(engine, joint, rows, half, r_max)
    found = []
    for number, (j, k) in enumerate(pairs):
        pick = (own == j) | (own == k)
        weight = (counts / np.maximum(asked, 1))[own[pick]]
        apart = np.logaddexp(scores[pick, j] + share[j], scores[pick, k] + share[k])
        gain = together[pick, number] + np.logaddexp(share[j], share[k]) - apart
        found.append((float((weight * gain).sum()), j, k))
    return found


def _held_out(engine: VoxelEM, p: ClassWeights, rows: np.ndarray, half: np.ndarray, r_max: int) -> np.ndarray:
    """Log-likelihood (n, K) of rows under maps of the other half set."""
    out = np.zeros((len(rows), p.n_classes))
    for h, maps in enumerate(engine.halves(p, r_max)):
        pick = half[rows] != h
        if pick.any():
            out[pick] = engine.scores(maps, rows[pick], r_max)
        del maps
    return out


def correlation_groups(engine: VoxelEM, p: ClassWeights, threshold: float, radius: float, agreement: float):
    """(K,) group of each code by the half-map corrected correlation within ``radius`` D (KRAQEN.md, section 5).

    A code whose own half maps correlate less than ``agreement`` is no measurement of anything and never a twin.
    """
    from cryosuite.kernels import assignment

    r_max = max(2, int(radius * engine.box))
    a, b = (_coefficients(half, r_max) for half in engine.halves(p, r_max))
    correlation = assignment.corrected_correlation(a, b)
    own = (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt().clamp_min(1e-30)
    unsure = ~(own >= agreement)
    correlation[unsure], correlation[:, unsure] = 0, 0
    return assignment.merge_groups(correlation, threshold).numpy()


def _coefficients(maps: torch.Tensor, r_max: int) -> torch.Tensor:  # (K, d, d, d) -> (K, n) real
    """Fourier coefficients of maps within a radius, real and imaginary parts side by side; without the mean."""
    D = maps.shape[-1]
    axis = torch.fft.fftfreq(D, 1 / D) ** 2
    square = axis[:, None, None] + axis[None, :, None] + axis[: D // 2 + 1]
    inside = (square <= r_max**2) & (square > 0)
    return torch.stack([torch.view_as_real(torch.fft.rfftn(volume)[inside]).flatten() for volume in maps])
