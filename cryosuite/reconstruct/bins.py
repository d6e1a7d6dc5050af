"""Latents to classes for `polish`: groups small enough to be one shape, large enough to be a map."""

from __future__ import annotations

import numpy as np

from cryosuite.errors import InputError, notice
from cryosuite.reconstruct.weights import ClassWeights

PER_BIN = 100  # particles of a bin, when the number of bins is not given
FEWEST = 20  # below this a bin's half maps are too poor to tell signal from noise
MOST_BINS = 64
FIT_LIMIT = 50_000  # rows k-means is fitted on
WAYS = ("auto", "loop", "kmeans")
SECTORS = 12  # of a loop, each with particles
RING_SPREAD = 0.25  # standard deviation of the radius over its mean: 0.35 for a full disc, 0.52 for a normal cloud


def bin_count(n: int) -> int:
    """How many bins n particles give: about 100 particles each, 1 to 64 bins."""
    return int(np.clip(n // PER_BIN, 1, MOST_BINS))


def bins_of(
    z: np.ndarray, count: int | None = None, seed: int = 0, how: str = "auto"
) -> tuple[ClassWeights, np.ndarray]:
    """Groups of particles with similar latents: arcs of a loop, pieces of a line, clusters of a mixture.

    Splitting one shape into a few bins costs little, because `polish` lends related bins what they share (.002 to .003
    AUC for 1.5 times as many as states, .02 for four times; a mixture of 16); two shapes in one bin lose both. Rows of
    ``z`` that are not finite belong to no bin.

    Args:
        z: (N, zdim) latents. count: bins, default about one per 100 particles.
        how: "loop": arcs with equal numbers of particles; "kmeans": clusters, which are pieces where the latent is a
            line; "auto": arcs if the latents lie on a ring in the plane of their two largest components.

    Returns:
        The table of shares (N, count) and the means (count, zdim) of the bins (of arcs: points of the ring). Bins are
        numbered along a path through the latent space, so that neighbouring numbers are alike.

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
    if how not in WAYS:
        raise InputError(f"bins by {how!r}: expected one of {', '.join(WAYS)}")
    count = bin_count(int(good.sum())) if count is None else count
    points = z[good]
    different = len(np.unique(points, axis=0))
    if different < count:
        notice(f"{count} classes were asked for, but there are {different} different latents: {different} classes")
        count = different
    labels = np.full(len(z), -1, np.int64)
    angle = None if how == "kmeans" or count < 3 else loop_angle(points, anyway=how == "loop")
    labels[good], means = _groups(points, count, seed) if angle is None else _arcs(points, angle, count)
    count = len(means)
    small = np.bincount(labels[good], minlength=count).min()
    if small < FEWEST and count > 1:
        notice(f"the smallest of {count} classes has {small} particles; below {FEWEST} a map is mostly its neighbours'")
    return ClassWeights.from_labels(labels, count), means


def loop_angle(points: np.ndarray, anyway: bool = False) -> np.ndarray | None:
    """(N,) angle in radians of latents (N, zdim) that lie on a ring, None where they do not.

    The two largest principal components, scaled to equal spread, must have a nearly constant radius, and no sector of
    30 degrees may hold less than a quarter of its due. ``anyway``: the angle whatever the shape, if there is a plane.
    """
    centred = points.astype(np.float64) - points.mean(0)
    if centred.shape[1] < 2:
        return None
    values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    if values[-2] <= 1e-9 * max(values[-1], 1e-30):
        return None
    x, y = (centred @ vectors[:, -2:] / np.sqrt(values[-2:])).T
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    if anyway:
        return angle
    sector = np.clip(((angle + np.pi) / (2 * np.pi) * SECTORS).astype(int), 0, SECTORS - 1)
    filled = np.bincount(sector, minlength=SECTORS).min() >= len(angle) / SECTORS / 4
    return angle if filled and radius.std() < RING_SPREAD * radius.mean() else None


def class_means(z: np.ndarray, weights: ClassWeights) -> np.ndarray:
    """(K, zdim) mean latent of each class by its shares; a class without finite latents gets the mean of all."""
    good = np.isfinite(z).all(1)
    values = np.where(good[:, None], z, 0).astype(np.float64)
    p = weights.matrix.astype(np.float64)
    mass = p.T @ good.astype(np.float64)
    means = (p.T @ values) / np.maximum(mass, 1e-30)[:, None]
    means[mass <= 0] = values.sum(0) / max(int(good.sum()), 1)
    return means.astype(np.float32)


def _arcs(points: np.ndarray, angle: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Arcs with equal numbers of particles, from the widest gap of the ring on; latents that are equal stay together.

    The mean of an arc is pushed out to the ring: the mean of points on an arc lies inside it.
    """
    order = np.argsort(angle, kind="stable")
    turned = angle[order]
    gap = np.diff(turned, append=turned[0] + 2 * np.pi)
    start = (int(gap.argmax()) + 1) % len(order)
    rank = np.empty(len(order))
    rank[np.roll(order, -start)] = np.arange(len(order)) + 0.5
    # particles of one latent (states of a simulation) share the middle of their ranks
    _, same = np.unique(np.round(angle, 5), return_inverse=True)
    rank = (np.bincount(same, rank) / np.bincount(same))[same]
    labels = np.minimum((rank * count / len(order)).astype(np.int64), count - 1)
    _, labels = np.unique(labels, return_inverse=True)  # an arc may have come out empty
    sizes = np.bincount(labels)[:, None]
    means = np.stack([np.bincount(labels, column) for column in points.T.astype(np.float64)], 1) / sizes
    centre = points.mean(0)
    reach = np.bincount(labels, np.linalg.norm(points - centre, axis=1))[:, None] / sizes
    out = means - centre
    means = centre + out * reach / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-30)
    return labels, means.astype(np.float32)


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
