"""Particles to groups by their latents, and how many groups there are (CryoDECO's clustering and ours).

    gmm-umap16   Gaussian mixture, full covariances, on a 16-dimensional UMAP of the latents (as published; seeded here)
    gmm-direct   the same on the leading principal components (whitened or not is one for a mixture); covariances of the
                 groups are one and the same where the criterion prefers that
    kmeans       (mini-batch) k-means on latents scaled to length 1 (the published alternative); a latent of one number
                 is left as it is

The number of groups, where it is not given, is the most stable one (agreement of five seeds) among those whose Bayesian
information criterion is almost the lowest. All functions take finite latents (M, zdim); labels count from 0.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cryosuite.analysis.latents import Pca, ordered, pca, umap
from cryosuite.console import Progress
from cryosuite.errors import InputError, notice

KINDS = ("gmm-umap16", "gmm-direct", "kmeans")
UMAP_DIMENSIONS = 16
MOST_DIMENSIONS = 32  # of gmm-direct: a full covariance of more needs more particles than groups have
FEWEST, MOST = 2, 50  # groups tried by ``auto``
SCAN_ROWS = 4_000  # particles that the choice of the number rests on
SEEDS = 5  # whose agreement is the stability
JUDGED = 6  # numbers whose stability is looked at
ALMOST = 0.05  # of the fall of the criterion: numbers this close to the lowest are judged by stability
LEVEL = 0.02  # stabilities this close are equal: the criterion decides
FIT_ROWS = 1_000_000
STARTS = 20
WHOLE_KMEANS = 3e8  # values x groups
REGULAR = 1e-5
NEIGHBOURS, OVERLAP, OVERLAP_ROWS = 10, 0.9, 1_500


@dataclass(frozen=True)
class Clusters:
    """Groups of particles and how they were found.

    Attributes:
        labels: (M,) int64 from 0, neighbouring numbers are similar groups. k: number of groups.
        centres: (k, zdim) float32, the latent of the particle of each group nearest to its mean. centres_index: (k,)
            its row.
        bic: criterion of each number of groups that was tried (lower is better); empty where the number was given.
        stability: mean adjusted Rand index between five seeds, for the numbers that were judged by it.
        confidence: (M,) float32, probability of the label, None for k-means.
        how: one of ``KINDS``. dimensions: of the space that was clustered.
        asked: number of groups that was fitted; ``k`` leaves out those that no particle prefers.
    """

    labels: np.ndarray
    k: int
    bic: dict[int, float]
    stability: dict[int, float]
    centres: np.ndarray
    centres_index: np.ndarray
    confidence: np.ndarray | None = None
    how: str = ""
    dimensions: int = 0
    asked: int = 1

    @property
    def sizes(self) -> np.ndarray:
        """Particles per group, (k,)."""
        return np.bincount(self.labels, minlength=self.k)


def cluster(z: np.ndarray, how: str = "gmm-umap16", k: int | str = "auto", seed: int = 0) -> Clusters:
    """Group particles by latents z (M, zdim).

    Args:
        how: one of ``KINDS``. k: number of groups, or ``auto``. seed: same seed, same groups.

    Raises:
        InputError: another ``how``, a number below 1, or latents that are not numbers.
    """
    z = np.ascontiguousarray(z, np.float32)
    if how not in KINDS:
        raise InputError(f"clustering {how!r} is not known: expected one of {', '.join(KINDS)}.")
    if k != "auto" and (isinstance(k, str) or k < 1):
        raise InputError(f"number of clusters {k}: expected auto or a whole number from 1.")
    if z.ndim != 2 or not len(z) or not np.isfinite(z).all():
        raise InputError("the latents to be clustered must be numbers, one row per particle.")
    different = len(np.unique(z, axis=0))
    if different < 2 or k == 1 or (k == "auto" and different < 10):
        if k != 1:
            notice(f"{different} different latents of {len(z)} particles: there is nothing to divide, one cluster.")
        return _grouping(z, np.zeros(len(z), np.int64), np.ones(len(z), np.float32), how, 0)
    if k != "auto" and k > different:
        notice(f"{k} clusters were asked for, but there are {different} different latents: {different} clusters.")
        k = different
    points = space(z, how, seed)
    kinds = {"kmeans": [_fit_sphere], "gmm-direct": [_fit_tied, _fit_full]}.get(how, [_fit_full])
    scores, stability = None, {}
    if k == "auto":
        k, scores, stability, kinds = choose(points, kinds, seed)
    return _final(z, points, kinds, k, how, seed, scores, stability)


def space(z: np.ndarray, how: str, seed: int = 0) -> np.ndarray:
    """The coordinates (M, c) in which ``how`` looks for groups."""
    if how == "kmeans":
        if z.shape[1] == 1:  # of a single number its length is all there is
            return z
        return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    if how == "gmm-umap16":
        embedded = umap(z, seed, components=UMAP_DIMENSIONS) if z.shape[1] > UMAP_DIMENSIONS else z
        return (z if embedded is None else embedded).astype(np.float64)
    model = pca(z)
    kept = leading_dimension(z, model, seed)
    return model.scores[:, :kept] / np.float64(max(model.scores[:, 0].std(), 1e-12))


def leading_dimension(z: np.ndarray, model: Pca | None = None, seed: int = 0) -> int:
    """How many principal components of the latents (M, zdim) carry more than noise and the neighbourhoods.

    The smallest number whose nearest neighbours agree to 90 % with those of the whole latents, but no component whose
    variance equal noise in all of them would explain (Marchenko-Pastur edge over the median), at least 2, at most 32.
    """
    model = model or pca(z)
    variance = np.asarray(model.ratio, np.float64)
    edge = np.median(variance) * (1 + np.sqrt(len(variance) / len(z))) ** 2
    real = int((variance > edge).sum()) if len(variance) > 8 else len(variance)
    most = int(np.clip(real, min(2, len(variance)), MOST_DIMENSIONS))
    curve = overlap_curve(model, range(1, most + 1), seed)
    return next((c for c, overlap in curve.items() if overlap > OVERLAP and c >= min(2, most)), most)


def overlap_curve(model: Pca, dimensions: range | list[int], seed: int = 0) -> dict[int, float]:
    """Share of the 10 nearest neighbours in all components that are so in the first c too, for each c."""
    rng = np.random.default_rng(seed)
    count = len(model.scores)
    scores = model.scores[rng.choice(count, min(count, OVERLAP_ROWS), replace=False)]
    near = min(NEIGHBOURS, len(scores) - 1)
    whole = _neighbours(scores, near)
    return {c: float((_neighbours(scores[:, :c], near) & whole).sum() / whole.sum()) for c in dimensions}


def participation_ratio(z: np.ndarray) -> float:
    """(sum of the variances)^2 / sum of their squares along the principal components: how many directions are used."""
    ratio = pca(z).ratio
    return float(np.square(ratio.sum()) / np.maximum(np.square(ratio).sum(), 1e-300))


def _neighbours(scores: np.ndarray, near: int) -> np.ndarray:
    """(n, n) bool: whether a row is among the nearest of another one."""
    squares = np.square(scores).sum(axis=1)
    distance = squares[:, None] + squares - 2 * scores @ scores.T
    np.fill_diagonal(distance, np.inf)
    limit = np.partition(distance, near - 1, axis=1)[:, near - 1 : near]
    return distance <= limit


def regrouped(found: Clusters, z: np.ndarray, labels: np.ndarray) -> Clusters:
    """Other labels (M,) in the place of those that were found, numbered and centred in the same way.

    The criterion of the numbers that were tried stays; the probabilities of the labels go with the old labels.
    """
    _, labels = np.unique(labels, return_inverse=True)
    new = _grouping(z, labels, None, found.how, found.dimensions, int(labels.max()) + 1)
    return replace(new, bic=found.bic, stability=found.stability, asked=found.asked)


# how many -----------------------------------------------------------------------------------------------------------


def choose(points: np.ndarray, kinds: list, seed: int = 0) -> tuple[int, dict[int, float], dict[int, float], list]:
    """Number of groups of points (M, c), the criterion of each number tried, the stability of those close to the best,
    and the kind of fit (in a list) with the lowest criterion.

    Numbers from 2 to 50 are tried in steps of about a tenth until the criterion has risen four times (twice where
    another kind was already better), then all between the neighbours of the best one.
    """
    rng = np.random.default_rng(seed)
    some = points[rng.choice(len(points), min(len(points), SCAN_ROWS), replace=False)]
    most = max(FEWEST, min(MOST, len(some) // 5))
    best, fit = None, kinds[0]
    for kind in kinds:
        scores: dict[int, float] = {}
        with Progress(len(_steps(most)), "numbers of clusters", "numbers") as progress:  # may end before all are tried
            for k in _steps(most):
                scores[k] = kind(some, k, seed)[2]
                progress.advance(1)
                behind = best is not None and min(scores.values()) > min(best.values())
                if list(scores).index(min(scores, key=scores.get)) < len(scores) - (2 if behind else 4):
                    break
        if best is None or min(scores.values()) < min(best.values()):
            best, fit = scores, kind
    scores = best
    tried = sorted(scores)
    place = tried.index(min(scores, key=scores.get))
    between = range(tried[max(place - 1, 0)] + 1, tried[min(place + 1, len(tried) - 1)])
    scores = dict(sorted((scores | {k: fit(some, k, seed)[2] for k in between if k not in scores}).items()))
    lowest = min(scores.values())
    fall = max(scores.values()) - lowest
    close = sorted((k for k, score in scores.items() if score <= lowest + ALMOST * fall), key=scores.get)[:JUDGED]
    stability = {}
    with Progress(len(close), "found again by other seeds", "numbers") as progress:
        for k in sorted(close):
            stability[k] = stability_of(some, fit, k, seed)
            progress.advance(1)
    level = max(stability.values()) - LEVEL
    return min((k for k in close if stability[k] >= level), key=scores.get), scores, stability, [fit]


def _steps(most: int) -> list[int]:
    return [k for k in [*range(2, 13), *range(14, 25, 2), *range(27, 37, 3), *range(40, 51, 5)] if k <= most]


def stability_of(points: np.ndarray, fit, k: int, seed: int = 0) -> float:
    """Mean adjusted Rand index between the groups that five seeds find, each from nine tenths of the points."""
    from sklearn.metrics import adjusted_rand_score

    found = []
    for number in range(SEEDS):
        rng = np.random.default_rng([seed, number])
        part = points[rng.choice(len(points), max(len(points) * 9 // 10, k), replace=False)]
        found.append(fit(part, k, seed + number + 1)[0](points).argmax(axis=1))
    pairs = [(a, b) for a in range(SEEDS) for b in range(a)]
    return float(np.mean([adjusted_rand_score(found[a], found[b]) for a, b in pairs]))


# fits: points, number, seed -> (points -> memberships (M, k)), log likelihood per point, criterion ------------------


def _fit_full(points: np.ndarray, k: int, seed: int, starts: int = 1):
    """Gaussian mixture, each group with a covariance of its own."""
    return _fit_mixture(points, k, seed, starts, "full")


def _fit_tied(points: np.ndarray, k: int, seed: int, starts: int = 1):
    """Gaussian mixture, one covariance for all groups: far fewer parameters in many dimensions."""
    return _fit_mixture(points, k, seed, starts, "tied")


def _fit_mixture(points: np.ndarray, k: int, seed: int, starts: int, kind: str):
    """Gaussian mixture, the best of EM from k-means and, with ``starts`` > 1, from as many random starts.

    k-means sees the points as they are and scaled to variance 1 along each axis: a mixture does not depend on scales,
    k-means does.
    """
    from sklearn.cluster import KMeans
    from sklearn.mixture import GaussianMixture

    points = np.asarray(points, np.float64)
    deviation = points.std(axis=0) + 1e-12
    scales = (1.0, deviation) if starts > 1 and deviation.max() > 1.5 * deviation.min() else (1.0,)
    look = {"n_components": k, "covariance_type": kind, "reg_covar": REGULAR * points.var(axis=0).mean()}
    look |= {"max_iter": 100 if starts > 1 else 30, "random_state": seed}
    models = []
    for scale in scales:
        labels = KMeans(k, n_init=3 if starts == 1 else 10, max_iter=50, random_state=seed).fit_predict(points / scale)
        models.append(GaussianMixture(**look, **_start(points, labels, k, look["reg_covar"], kind)))
    if starts > 1:
        models.append(GaussianMixture(**look, init_params="k-means++", n_init=starts))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a start that had not converged is as good as its likelihood
        best = max((model.fit(points) for model in models), key=lambda model: model.lower_bound_)
    return best.predict_proba, best.lower_bound_, float(best.bic(points))


def _start(points: np.ndarray, labels: np.ndarray, k: int, regular: float, kind: str) -> dict:
    """Weights, means and precisions of the groups of k-means."""
    size = points.shape[1]
    counts = np.maximum(np.bincount(labels, minlength=k), 1)
    means = np.stack(
        [points[labels == g].mean(axis=0) if (labels == g).any() else points.mean(axis=0) for g in range(k)]
    )
    centred = points - means[labels]
    within = centred.T @ centred / len(points) + (regular + 1e-12) * np.eye(size)
    precisions = np.linalg.inv(within)
    if kind == "full":
        each = []
        for label in range(k):
            own = centred[labels == label]
            share = size / (size + len(own))  # a small group's covariance leans on that within all groups
            each.append(np.linalg.inv((1 - share) * own.T @ own / counts[label] + share * within))
        precisions = np.stack(each)
    precisions = (precisions + np.swapaxes(precisions, -1, -2)) / 2
    given = {"weights_init": counts / counts.sum(), "means_init": means, "precisions_init": precisions}
    return given | {"init_params": "random_from_data"}


def _fit_sphere(points: np.ndarray, k: int, seed: int, starts: int = 1):
    """k-means (of many particles in mini-batches); criterion of equal round Gaussians (Pelleg and Moore 2000)."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    points = np.asarray(points, np.float32)
    if points.size * k <= WHOLE_KMEANS:  # mini-batches save time only where there is much to save
        model = KMeans(k, n_init=max(starts, 5), max_iter=100, random_state=seed).fit(points)
    else:
        model = MiniBatchKMeans(k, n_init=STARTS, batch_size=4096, random_state=seed).fit(points)
    n, size = points.shape
    variance = max(float(model.inertia_) / (size * max(n - k, 1)), 1e-12)
    shares = np.bincount(model.labels_, minlength=k) / n
    entropy = float(np.sum(shares * np.log(np.maximum(shares, 1e-12))))
    likelihood = entropy - size / 2 * np.log(2 * np.pi * variance) - size * (n - k) / (2 * n)
    criterion = -2 * n * likelihood + (k * (size + 1)) * np.log(n)

    def members(rows: np.ndarray) -> np.ndarray:
        return np.eye(k, dtype=np.float32)[model.predict(np.asarray(rows, np.float32))]

    return members, likelihood, float(criterion)


# result -------------------------------------------------------------------------------------------------------------


def _final(z, points, kinds: list, k: int, how: str, seed: int, scores, stability) -> Clusters:
    """The groups from all particles (at most a million to fit)."""
    rng = np.random.default_rng(seed)
    few = points[rng.choice(len(points), FIT_ROWS, replace=False)] if len(points) > FIT_ROWS else points
    # twenty starts as published, fewer where that would take long
    starts = int(np.clip(4e8 / (len(few) * k * points.shape[1]), 2, STARTS))
    fits = [kind(few, k, seed, starts) for kind in kinds]
    members = min(fits, key=lambda fit: fit[2])[0](points)
    confidence = None if how == "kmeans" else members.max(axis=1).astype(np.float32)
    return _grouping(z, members.argmax(axis=1), confidence, how, points.shape[1], k, scores, stability)


def _grouping(z, labels, confidence, how: str, dimensions: int, asked=1, scores=None, stability=None) -> Clusters:
    """Groups in the order of their dendrogram, centres at the particle of each nearest to its mean."""
    means = np.stack([z[labels == g].mean(axis=0) if (labels == g).any() else z.mean(axis=0) for g in range(asked)])
    labels, rows = ordered(z, labels, means)
    bic = scores or {}
    return Clusters(labels, len(rows), bic, stability or {}, z[rows], rows, confidence, how, dimensions, asked)


def plot_choice(path: Path, found: Clusters) -> None:
    """Criterion and stability against the number of groups, PNG and CSV; no file when the number was given."""
    from cryosuite.analysis import plots

    if len(found.bic) < 2:
        return
    plots.model_choice(path, found.bic, found.asked, found.stability)
    stable = [found.stability.get(k, np.nan) for k in found.bic]
    columns = {"groups": list(found.bic), "bic": list(found.bic.values()), "stability": stable}
    plots.write_csv(path.with_suffix(".csv"), columns)
