"""Latents to classes for `polish`: groups small enough to be one shape, large enough to be a map."""

from __future__ import annotations

import numpy as np

from cryosuite.errors import InputError, notice
from cryosuite.reconstruct.weights import ClassWeights

PER_BIN = 100  # particles of a bin, when the number of bins is not given
FEWEST = 20  # below this a bin's half maps are too poor to tell signal from noise
MOST_BINS = 64
FIT_LIMIT = 50_000  # rows k-means is fitted on


def bin_count(n: int) -> int:
    """How many bins n particles give: about 100 particles each, 1 to 64 bins."""
    return int(np.clip(n // PER_BIN, 1, MOST_BINS))


def bins_of(z: np.ndarray, count: int | None = None, seed: int = 0) -> tuple[ClassWeights, np.ndarray]:
    """Groups of particles with similar latents (k-means): arcs of a loop, pieces of a line, clusters of a mixture.

    Splitting one shape into several bins costs little, because `polish` lends related bins what they share; putting two
    shapes into one bin loses both. Rows of ``z`` that are not finite belong to no bin.

    Args:
        z: (N, zdim) latents. count: bins, default about one per 100 particles.

    Returns:
        The table of shares (N, count) and the means (count, zdim) of the bins. Bins are numbered along a path through
        the latent space, so that neighbouring numbers are alike.

    Raises:
        InputError: no finite latents, or a senseless count.
    """
    z = np.asarray(z, np.float32)
    if z.ndim != 2 or not z.size:
        raise InputError(f"latents have the shape {z.shape}; expected (particles, zdim)")
    good = np.isfinite(z).all(1)
    if not good.any():
        raise InputError(f"none of the {len(z)} latents is a number: there is nothing to group")
    if not good.all():
        notice(f"{int((~good).sum())} of {len(z)} latents are not numbers; these particles are left out")
    if count is not None and count < 1:
        raise InputError(f"--classes {count}: expected 1 or more")
    count = bin_count(int(good.sum())) if count is None else count
    points = z[good]
    different = len(np.unique(points, axis=0))
    if different < count:
        notice(f"{count} classes were asked for, but there are {different} different latents: {different} classes")
        count = different
    labels = np.full(len(z), -1, np.int64)
    labels[good], means = _groups(points, count, seed)
    small = np.bincount(labels[good], minlength=count).min()
    if small < FEWEST and count > 1:
        notice(f"the smallest of {count} classes has {small} particles; below {FEWEST} a map is mostly its neighbours'")
    return ClassWeights.from_labels(labels, count), means


def class_means(z: np.ndarray, weights: ClassWeights) -> np.ndarray:
    """(K, zdim) mean latent of each class by its shares; a class without finite latents gets the mean of all."""
    good = np.isfinite(z).all(1)
    values = np.where(good[:, None], z, 0).astype(np.float64)
    p = weights.matrix.astype(np.float64)
    mass = p.T @ good.astype(np.float64)
    means = (p.T @ values) / np.maximum(mass, 1e-30)[:, None]
    means[mass <= 0] = values.sum(0) / max(int(good.sum()), 1)
    return means.astype(np.float32)


def _groups(points: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """k-means labels and means, numbered along the dendrogram of the means."""
    if count == 1:
        return np.zeros(len(points), np.int64), points.mean(0, keepdims=True)
    from scipy.cluster.hierarchy import leaves_list, linkage
    from sklearn.cluster import KMeans

    rows = np.random.default_rng(seed).permutation(len(points))[:FIT_LIMIT]
    model = KMeans(count, n_init=4, random_state=seed).fit(points[rows])
    order = np.arange(count)
    if count > 2:
        order = leaves_list(linkage(model.cluster_centers_.astype(np.float64), "average", optimal_ordering=True))
    place = np.empty(count, np.int64)
    place[order] = np.arange(count)
    return place[model.predict(points)], model.cluster_centers_[order]
