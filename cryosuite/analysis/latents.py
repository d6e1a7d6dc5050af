"""Latents to pictures of themselves and to groups: PCA, UMAP, k-means, Gaussian mixtures. Seeded, and kind to bad days.

All functions take finite latents (M, zdim); ``finite_rows`` says which of the N particles these are. Labels count
from 0 everywhere.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from cryosuite.console import Progress, say
from cryosuite.errors import InputError, notice

UMAP_FIT_LIMIT = 100_000  # above this UMAP is fitted on that many particles and the others are placed into it
EXACT_NEIGHBOURS = 30_000  # up to here exact neighbours cost less than compiling the approximate search
UMAP_OWN_EXACT = 4096  # below this UMAP itself takes exact neighbours
EPOCHS = 300  # of the layout; beyond this it only breathes
MANY, EPOCHS_OF_MANY = 30_000, 200  # rows, and epochs above: each row then has more neighbours that place it
MIXTURE_FIT_LIMIT = 20_000
MIXTURE_DIMENSIONS = 10
SHOWN_ROWS = 5


@dataclass(frozen=True)
class Pca:
    """Principal components of latents.

    Attributes:
        mean: (zdim,). components: (c, zdim), orthonormal rows. ratio: (c,) share of the variance.
        scores: (M, c) coordinates of the particles.
    """

    mean: np.ndarray
    components: np.ndarray
    ratio: np.ndarray
    scores: np.ndarray

    @property
    def spread(self) -> bool:
        """False when all latents are equal."""
        return bool(len(self.ratio)) and bool(self.ratio[0] > 0)


@dataclass(frozen=True)
class Clusters:
    """Groups of particles.

    Attributes:
        labels: (M,) int64 from 0, neighbouring numbers are similar groups.
        centers: (k, zdim) float32, the latent of the particle of each group that is nearest to its mean.
        centers_index: (k,) int64, the row of that particle.
        confidence: (M,) float32, probability of the label, or None for k-means.
        scores: Bayesian information criterion of each number of groups tried; ``asked`` is the one taken (groups that
            no particle prefers are not counted in ``count``).
    """

    labels: np.ndarray
    centers: np.ndarray
    centers_index: np.ndarray
    confidence: np.ndarray | None = None
    scores: dict[int, float] | None = None
    asked: int = 0

    @property
    def count(self) -> int:
        """Number of groups."""
        return len(self.centers)

    @property
    def sizes(self) -> np.ndarray:
        """Particles per group, (k,)."""
        return np.bincount(self.labels, minlength=self.count)


def finite_rows(z: np.ndarray) -> np.ndarray:
    """Rows (M,) of the latents (N, zdim) that hold numbers; the others are named in a notice.

    Raises:
        InputError: no row is finite, or ``z`` is not (N, zdim).
    """
    if z.ndim != 2 or z.shape[0] == 0 or z.shape[1] == 0:
        raise InputError(f"latents have the shape {z.shape}; expected (particles, zdim) with at least one of each.")
    good = np.isfinite(z).all(axis=1)
    bad = np.flatnonzero(~good)
    if len(bad) == len(z):
        raise InputError(f"none of the {len(z)} latents is a number (NaN or infinite): this training went wrong.")
    if len(bad):
        shown = ", ".join(map(str, bad[:SHOWN_ROWS])) + (", ..." if len(bad) > SHOWN_ROWS else "")
        notice(f"{len(bad)} of {len(z)} latents are NaN or infinite and are left out (label -1): rows {shown}, from 0.")
    return np.flatnonzero(good)


def pca(z: np.ndarray, components: int | None = None) -> Pca:
    """Principal components by the eigenvectors of the covariance; the largest loading of each is positive."""
    z = np.asarray(z, np.float64)
    mean = z.mean(axis=0)
    centred = z - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / max(len(z) - 1, 1))
    values, vectors = np.clip(values[::-1], 0, None), vectors[:, ::-1].T
    # latents equal up to rounding have no direction
    if values.sum() <= 1e-12 * max(float(np.square(z).sum(axis=1).mean()), 1e-30):
        values = np.zeros_like(values)
    keep = slice(0, components or len(values))
    vectors = vectors[keep]
    peak = vectors[np.arange(len(vectors)), np.abs(vectors).argmax(axis=1)]
    vectors = vectors * np.where(peak < 0, -1.0, 1.0)[:, None]
    ratio = values[keep] / max(values.sum(), 1e-300)
    scores = centred @ vectors.T
    return Pca(mean.astype(np.float32), vectors.astype(np.float32), ratio, scores.astype(np.float32))


def all_scores(z: np.ndarray, most: int = 8) -> tuple[np.ndarray | None, np.ndarray]:
    """Principal components of latents (N, zdim) that may hold NaN.

    Returns:
        (N, c) float32 scores, c at most ``most``, NaN where the latent is not finite, or None for a single latent
        number or no finite row; (k,) share of the variance of all components.
    """
    good = np.flatnonzero(np.isfinite(z).all(axis=1))
    if z.shape[1] < 2 or not len(good):
        return None, np.ones(1)
    model = pca(z[good])
    scores = np.full((len(z), min(model.scores.shape[1], most)), np.nan, np.float32)
    scores[good] = model.scores[:, :most]
    return scores, model.ratio


def traversal(model: Pca, component: int, count: int, low: float = 5.0, high: float = 95.0) -> np.ndarray:
    """Latents (count, zdim) evenly spaced along a component (from 0) between two percentiles of its scores.

    The other components are held at the mean, as cryoDRGN's ``analyze`` does.
    """
    along = model.scores[:, component]
    steps = np.linspace(*np.percentile(along, [low, high]), count)
    return (model.mean + steps[:, None] * model.components[component]).astype(np.float32)


def umap(
    z: np.ndarray, seed: int = 0, limit: int = UMAP_FIT_LIMIT, neighbours: int = 15, components: int = 2
) -> np.ndarray | None:
    """UMAP coordinates (M, components) float32 (McInnes et al. 2018), fitted on at most ``limit`` rows.

    None when meaningless, with a notice: latents of one value or fewer than four particles have no neighbourhood.
    """
    count = len(z)
    if count < 4 or not pca(z).spread:
        notice("UMAP is left out: it needs at least 4 particles with different latents.")
        return None
    from umap import UMAP

    rng = np.random.default_rng(seed)
    fit = np.sort(rng.choice(count, limit, replace=False)) if count > limit else np.arange(count)
    # spectral initialisation fails on tiny graphs
    start = "spectral" if len(fit) > 50 else "random"
    near = min(neighbours, len(fit) - 1)
    if len(fit) < count:
        say(
            f"UMAP is fitted on {len(fit):,} of {count:,} particles (the same each time); the others are placed into it"
        )
    known = _exact_neighbours(z[fit], near) if UMAP_OWN_EXACT <= count <= EXACT_NEIGHBOURS else (None, None, None)
    epochs = EPOCHS if len(fit) <= MANY else EPOCHS_OF_MANY
    reducer = UMAP(near, components, n_epochs=epochs, random_state=seed, init=start, n_jobs=1, precomputed_knn=known)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        embedded = np.full((count, components), np.nan, np.float32)
        embedded[fit] = reducer.fit_transform(np.asarray(z[fit], np.float32))
        rest = np.setdiff1d(np.arange(count), fit, assume_unique=True)
        if len(rest):
            embedded[rest] = reducer.transform(np.asarray(z[rest], np.float32))
    # isolated points come out as NaN: put them at the centre of the rest rather than lose them
    lost = ~np.isfinite(embedded).all(axis=1)
    embedded[lost] = np.nanmean(embedded, axis=0) if not lost.all() else 0.0
    return embedded


def _exact_neighbours(z: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, None]:
    """Rows and distances of the nearest neighbours, each particle its own first, in the form UMAP takes."""
    from sklearn.neighbors import NearestNeighbors

    distance, row = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(z).kneighbors(z)
    return row.astype(np.int32), distance.astype(np.float32), None


def nearest(z: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Row of ``z`` (M, zdim) nearest to each of the ``centers`` (k, zdim): (k,) int64."""
    from scipy.spatial import cKDTree

    return np.atleast_1d(cKDTree(np.asarray(z, np.float64)).query(np.asarray(centers, np.float64))[1]).astype(np.int64)


def _tree_order(centers: np.ndarray) -> np.ndarray:
    """Order of the centres along their dendrogram, so that neighbouring numbers are alike."""
    if len(centers) < 3:
        return np.arange(len(centers))
    from scipy.cluster.hierarchy import leaves_list, linkage

    return leaves_list(linkage(np.asarray(centers, np.float64), method="average", optimal_ordering=True))


def ordered(z: np.ndarray, labels: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels renumbered along the dendrogram without empty groups, and of each group the row nearest to its mean.

    Among its own: the mean of a wide group may lie in the middle of another one.
    """
    used = np.flatnonzero(np.bincount(labels, minlength=len(means)))
    order = used[_tree_order(means[used])]
    new = np.full(len(means), -1, np.int64)
    new[order] = np.arange(len(order))
    rows = np.empty(len(order), np.int64)
    for number, group in enumerate(order):
        own = np.flatnonzero(labels == group)
        rows[number] = own[np.square(z[own] - means[group].astype(np.float64)).sum(axis=1).argmin()]
    return new[labels], rows


def kmeans(z: np.ndarray, count: int, seed: int = 0) -> Clusters:
    """k-means groups with centres snapped to the nearest particle, numbered along the dendrogram of the centres.

    Fewer different latents than ``count`` give as many groups as there are, with a notice.
    """
    from sklearn.cluster import KMeans

    if count < 1:
        raise InputError(f"--ksample is {count}; expected at least 1 cluster.")
    different = len(np.unique(np.asarray(z, np.float32), axis=0))
    if different < count:
        notice(f"{count} clusters were asked for, but there are {different} different latents: {different} clusters.")
        count = different
    # more starts where they are cheap: one start often splits one group and merges two others
    starts = int(np.clip(2e8 / (z.size * count), 3, 24))
    model = KMeans(n_clusters=count, random_state=seed, n_init=starts, max_iter=100).fit(np.asarray(z, np.float32))
    labels, rows = ordered(z, model.labels_.astype(np.int64), model.cluster_centers_)
    return Clusters(labels, np.asarray(z[rows], np.float32), rows)


def mixture(z: np.ndarray, model: Pca, count: int | None = None, most: int = 30, seed: int = 0) -> Clusters | None:
    """Gaussian mixture in the leading principal components (99 % of the variance, at most 10), full covariances.

    Args:
        z: latents (M, zdim). model: their PCA.
        count: number of groups; None: the number with the lowest Bayesian information criterion up to ``most``.

    Returns:
        Groups with the probability of each label; None (with a notice) when the latents are too few or all equal.
    """
    if not model.spread or len(z) < 10:
        notice("the Gaussian mixture is left out: it needs at least 10 particles with different latents.")
        return None
    kept = min(int(np.searchsorted(np.cumsum(model.ratio), 0.99)) + 1, MIXTURE_DIMENSIONS, len(model.ratio))
    scores = np.asarray(model.scores[:, :kept], np.float64)
    scores = scores / scores[:, 0].std()
    rng = np.random.default_rng(seed)
    fit = scores if len(scores) <= MIXTURE_FIT_LIMIT else scores[rng.choice(len(scores), MIXTURE_FIT_LIMIT, False)]
    different = min(len(np.unique(np.asarray(z, np.float32), axis=0)), len(fit)) if count is not None else 0
    if count is not None and different < count:
        notice(f"--gmm {count}: there are {different} different latents: {different} clusters.")
        count = different
    counts = [count] if count is not None else _candidates(min(most, len(fit) // 5))
    best, bic, rises = None, {}, 0
    with Progress(len(counts), "Gaussian mixture", "sizes") as progress:  # may end before all are tried
        for k in counts:
            fitted = _fit_mixture(fit, k, seed)
            bic[k] = float(fitted.bic(fit))
            rises = 0 if best is None or bic[k] < min(list(bic.values())[:-1]) else rises + 1
            best = fitted if rises == 0 else best
            progress.advance(1)
            if rises == 3:
                break
    asked = len(best.means_)
    probability = best.predict_proba(scores)
    labels = probability.argmax(axis=1)
    means = np.stack([z[labels == k].mean(axis=0) if (labels == k).any() else model.mean for k in range(asked)])
    new, rows = ordered(z, labels, means)
    confidence = probability.max(axis=1).astype(np.float32)
    return Clusters(new, np.asarray(z[rows], np.float32), rows, confidence, bic, asked)


def _candidates(most: int) -> list[int]:
    """Numbers of groups to try: all up to 10, then every second, so that a good one is within a tenth."""
    return [k for k in [*range(1, 11), *range(12, 21, 2), *range(24, 61, 4)] if k <= max(most, 1)]


def _fit_mixture(scores: np.ndarray, count: int, seed: int):
    from sklearn.mixture import GaussianMixture

    model = GaussianMixture(count, reg_covar=1e-5, max_iter=60, tol=1e-3, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(scores)
