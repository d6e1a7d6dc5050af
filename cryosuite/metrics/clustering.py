"""How well latents separate known classes: ARI, AMI, k-nearest-neighbour accuracy (BENCHMARKS section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cryosuite.errors import InputError, notice

SIMILARITIES = 1 << 25  # held at a time


@dataclass
class ClusterScores:
    """Agreement of clusterings with the truth, one entry per seed in the arrays.

    `kmeans_*` and `gmm_*`: adjusted Rand index and adjusted mutual information (arithmetic mean) per seed.
    """

    n_classes: int
    kmeans_ari: np.ndarray
    kmeans_ami: np.ndarray
    gmm_ari: np.ndarray
    gmm_ami: np.ndarray
    knn_accuracy: float

    def summary(self) -> dict[str, float]:
        """Means (and standard deviations) over seeds under flat names, for tables and JSON."""
        out: dict[str, float] = {"n_classes": self.n_classes}
        for name in ("kmeans_ari", "kmeans_ami", "gmm_ari", "gmm_ami"):
            values = getattr(self, name)
            if len(values):
                out[name] = float(np.mean(values))
                out[f"{name}_std"] = float(np.std(values))
        out["knn10_accuracy"] = self.knn_accuracy
        return out


def cluster_scores(
    z: np.ndarray,
    labels: np.ndarray,
    seeds: int = 10,
    gmm_seeds: int | None = None,
    n_init: int = 20,
    gmm_n_init: int = 20,
    k: int = 10,
) -> ClusterScores:
    """ARI and AMI of k-means (best of ``n_init``) and of a full-covariance Gaussian mixture, and kNN accuracy.

    The number of clusters is the number of classes present. A Gaussian mixture is started from k-means; it is left
    out with a notice when a class would hold too few particles for a full covariance.

    Args:
        z: (N, zdim) latents.
        labels: (N,) integer classes.
        seeds: number of random starts whose mean is reported.
        gmm_seeds: the same for the mixture (default: seeds).
    """
    z = check_latents(z, labels)
    labels = np.asarray(labels)
    n_classes = len(np.unique(labels))
    seeds_gmm = seeds if gmm_seeds is None else gmm_seeds
    if len(z) < 2 * n_classes * (z.shape[1] + 1):
        notice("too few particles per class for a full-covariance Gaussian mixture: only k-means is reported")
        seeds_gmm = 0
    kmeans = [agreement(labels, kmeans_labels(z, n_classes, seed, n_init)) for seed in range(seeds)]
    gmm = [agreement(labels, gmm_labels(z, n_classes, seed, gmm_n_init)) for seed in range(seeds_gmm)]
    kmeans_scores, gmm_scores = np.array(kmeans).reshape(-1, 2), np.array(gmm).reshape(-1, 2)
    return ClusterScores(
        n_classes, kmeans_scores[:, 0], kmeans_scores[:, 1], gmm_scores[:, 0], gmm_scores[:, 1],
        knn_accuracy(z, labels, k),
    )  # fmt: skip


def kmeans_labels(z: np.ndarray, n_clusters: int, seed: int = 0, n_init: int = 20) -> np.ndarray:
    """Cluster of each row of z (N, zdim) by k-means, best of ``n_init`` starts."""
    from sklearn.cluster import KMeans

    return KMeans(n_clusters, n_init=n_init, random_state=seed).fit_predict(z)


def gmm_labels(z: np.ndarray, n_clusters: int, seed: int = 0, n_init: int = 20) -> np.ndarray:
    """Cluster of each row of z (N, zdim) by a full-covariance Gaussian mixture, best of ``n_init`` starts."""
    from sklearn.mixture import GaussianMixture

    scale = float(z.std(0).mean())
    z = (z - z.mean(0)) / (scale if scale > 1e-6 * np.abs(z).max() else 1.0)  # equal latents: one heap, not noise
    model = GaussianMixture(n_clusters, n_init=n_init, random_state=seed, reg_covar=1e-4, max_iter=200)
    return model.fit_predict(z)


def agreement(truth: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """(ARI, AMI with arithmetic averaging) of two labelings (N,)."""
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

    return (
        float(adjusted_rand_score(truth, found)),
        float(adjusted_mutual_info_score(truth, found, average_method="arithmetic")),
    )


def v_measure(truth: np.ndarray, found: np.ndarray) -> float:
    """Harmonic mean of homogeneity and completeness of two labelings (N,), for numbers of classes that differ."""
    from sklearn.metrics import v_measure_score

    return float(v_measure_score(truth, found))


def knn_accuracy(z: np.ndarray, labels: np.ndarray, k: int = 10) -> float:
    """Share of particles whose class is voted for by their k nearest neighbours.

    Latents are L2-normalised, similarity S is the cosine, the particle itself is left out, votes weigh exp(S); all
    particles are asked (published code samples 30 % per class and scores lower). Works in chunks of rows that keep
    the similarities under 128 MB however many particles there are.

    Args:
        z: (N, zdim); labels: (N,).

    Returns:
        top-1 accuracy in 0..1.
    """
    z = check_latents(z, labels)
    unit = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    unit = torch.from_numpy(unit.astype(np.float32))
    classes, target = np.unique(np.asarray(labels), return_inverse=True)
    k = min(k, len(z) - 1)
    right, chunk = 0, max(1, SIMILARITIES // len(z))
    for start in range(0, len(z), chunk):
        rows = np.arange(start, min(start + chunk, len(z)))
        similarity = unit[start : start + chunk] @ unit.T
        similarity[rows - start, rows] = -torch.inf
        nearest_similarity, nearest = (found.numpy() for found in similarity.topk(k, dim=1))
        weight = np.exp(nearest_similarity)
        votes = np.zeros((len(rows), len(classes)), np.float32)
        np.add.at(votes, (np.repeat(rows - start, k), target[nearest].ravel()), weight.ravel())
        right += int((votes.argmax(1) == target[rows]).sum())
    return right / len(z)


def check_latents(z: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """z as float64 (N, zdim); raises InputError when it does not fit the labels or is not finite."""
    z = np.asarray(z, dtype=np.float64)
    if z.ndim != 2 or len(z) != len(labels):
        raise InputError(f"latents of shape {z.shape} do not fit {len(labels)} labels: one row per particle expected")
    bad = np.nonzero(~np.isfinite(z).all(1))[0]
    if len(bad):
        raise InputError(f"latents are not finite in {len(bad)} rows, the first is row {bad[0]} (0-based)")
    if len(z) < 2:
        raise InputError("at least two particles are needed to judge latents")
    return z
