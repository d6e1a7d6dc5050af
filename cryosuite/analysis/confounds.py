"""Do the latents or the clusters follow something that is not the molecule: the defocus, the view, the micrograph?

Two questions per column, each with a null of shuffled columns:

    clusters   mutual information of the labels and the column (in bins), less what shuffled columns give by chance;
               and for each cluster how far its particles are from all particles (total variation over the bins).
    latents    share of the column that the neighbours in latent space tell (their mean rank for numbers, their mean
               direction and axis for views and angles, their category for names), and the mutual information of the
               column and the best of the leading principal components by nearest neighbours (Kraskov et al. 2004 for
               numbers, Ross 2014 for categories, both scikit-learn's).

A warning needs both: better than all of 99 shuffled columns, and large. A small effect in a large set is no
reason to distrust a state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cryosuite.analysis.latents import pca
from cryosuite.console import Progress

LEAST = 50  # particles: fewer say nothing
SHUFFLES = 99
RARE = 0.01
LARGE_LATENTS = 0.25  # share of the column that latents tell
LARGE_CLUSTER = 0.4  # share of a cluster's particles that would have to be others
CLUSTER_ROWS, LATENT_ROWS, ESTIMATOR_ROWS = 30_000, 4_000, 1_000  # particles each test looks at
NEIGHBOURS = 15
MATES = 2 * NEIGHBOURS  # particles of one category that the latent test looks at, where categories are rare
ESTIMATOR_NULLS = 3
COMPONENTS = 4  # principal components whose mutual information is estimated
NUMBER_BINS, VIEW_BINS = 12, 32  # angles have as many bins as numbers
FEW_VALUES = 64  # whole numbers of at most so many different values are categories
SMALL = 10  # particles: a smaller cluster is not judged
NAMED = 3  # clusters spelt out in one warning
NEAR = 30.0  # degrees: what counts as one view


@dataclass(frozen=True)
class Confound:
    """What one column has to do with the latents or with the clusters.

    Attributes:
        name: of the column. of: "latents" or "clusters".
        bits: mutual information; of the best principal component, or of the labels. NaN where not estimated.
        share: 0 to 1: of the column that latents tell, or of the labels that the column tells (bits over entropy).
        p: share of shuffled columns that do as well (1/100 at least). chance: share that one in a hundred reaches.
        warning: plain words, or "". clusters: those a warning is about. each: one row per cluster (of "clusters").
    """

    name: str
    of: str
    bits: float
    share: float
    p: float
    chance: float
    warning: str = ""
    clusters: tuple[int, ...] = ()
    each: list[dict[str, float | int | str]] = field(default_factory=list, repr=False)


def confounds(
    z: np.ndarray,  # (N, zdim)
    labels: np.ndarray | None,  # (N,) int, -1: left out
    columns: Mapping[str, np.ndarray],
    seed: int = 0,
) -> list[Confound]:
    """Test every column against the latents and the clusters; rows that are not known are left out of a column.

    Args:
        columns: (N,) numbers (NaN unknown), (N,) text or few whole numbers (categories; "" unknown), or (N, 3) unit
            vectors (view directions in the molecule's frame), or (N, 2) ones (cosine and sine of an angle). Columns of
            one value are left out.

    Returns:
        One or two findings per column (clusters only where there are two), the largest share first within each kind.
        Empty for fewer than 50 particles or latents of one value.
    """
    z = np.asarray(z, np.float32)
    usable = np.isfinite(z).all(axis=1)
    if usable.sum() < LEAST or not pca(z[usable]).spread:
        return []
    rng = np.random.default_rng(seed)
    found = []
    latents = _Latents(z, np.flatnonzero(usable), rng)
    with Progress(len(columns), "confounds", unit="columns") as progress:
        for name, values in columns.items():
            column = _Column(name, values, usable)
            if column.kind:
                found.append(latents.test(column, rng))
                if labels is not None:
                    found += _clusters(column, np.asarray(labels), rng)
            progress.advance(note=name)
    return sorted(found, key=lambda one: (one.of, -one.share))


class _Column:
    """A column with its known rows and its bins.

    kind: "number", "view", "angle", "category", or "" for a column that says nothing. values: of the known rows; of
    text the number of the name in ``names``.
    """

    names: np.ndarray | None = None

    def __init__(self, name: str, values: np.ndarray, usable: np.ndarray) -> None:
        self.name, values = name, np.asarray(values)
        if values.ndim == 2:
            known, self.kind = np.isfinite(values).all(axis=1), "view" if values.shape[1] == 3 else "angle"
        elif values.dtype.kind in "fiub":
            known, self.kind = np.isfinite(values), "number"
            if values.dtype.kind in "iub" and len(np.unique(values)) <= FEW_VALUES:
                self.kind = "category"
        else:
            values, self.names = _numbered(values)
            known, self.kind = values >= 0, "category"
        self.rows = np.flatnonzero(known & usable)
        self.values = values[self.rows]
        self.bins, self.count = self._binned() if len(self.rows) >= LEAST else (np.zeros(len(self.rows), np.int64), 1)
        if self.count < 2:
            self.kind = ""

    def _binned(self) -> tuple[np.ndarray, int]:
        """Bin of each known row, from 0, and how many there are."""
        if self.kind == "view":
            bins = (self.values @ fibonacci_sphere(VIEW_BINS).T).argmax(axis=1)
        elif self.kind == "angle":
            bins = np.floor(NUMBER_BINS * (np.arctan2(self.values[:, 1], self.values[:, 0]) / (2 * np.pi) % 1.0))
        elif self.kind == "number":
            bins = np.floor(NUMBER_BINS * (_ranks(self.values) - 0.5) / len(self.values))  # ties share a bin
        else:
            bins = self.values
        different, bins = np.unique(bins, return_inverse=True)
        return bins.astype(np.int64), len(different)

    def features(self, at: np.ndarray) -> np.ndarray:
        """What neighbours are compared by: categories (n,), ranks (n, 1), or directions and axes: of views (n, 8), of
        angles (n, 4)."""
        if self.kind == "category":
            return self.bins[at]
        values = self.values[at].astype(np.float32)
        if self.kind == "number":
            return _ranks(values)[:, None].astype(np.float32)
        if self.kind == "angle":
            x, y = values.T
            return np.stack([x, y, x * y, (x * x - y * y) / 2], axis=-1)
        x, y, z = values.T  # products: a view and its back look alike
        return np.stack([x, y, z, x * y, x * z, y * z, x * x - y * y, z * z - (x * x + y * y) / 2], axis=-1)


def _numbered(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Text (N,) as numbers of its sorted different values, -1 for "", and these values."""
    import pandas as pd

    codes, names = pd.factorize(np.asarray(values, object))
    names = np.asarray(names, str)
    order = np.argsort(names, kind="stable")
    place = np.empty(len(names), np.int64)
    place[order] = np.arange(len(names))
    place[names == ""] = -1
    return np.append(place, -1)[codes], names[order]


def fibonacci_sphere(count: int) -> np.ndarray:
    """Unit vectors (count, 3) spread evenly over the sphere."""
    at = np.arange(count) + 0.5
    height, angle = 1 - 2 * at / count, np.pi * (1 + 5**0.5) * at
    ring = np.sqrt(1 - height**2)
    return np.stack([ring * np.cos(angle), ring * np.sin(angle), height], axis=-1)


def _p_value(found: float, null: np.ndarray) -> float:
    return float((1 + (null >= found).sum()) / (1 + len(null)))


def _above(found: float | np.ndarray, null: float | np.ndarray) -> np.ndarray:
    """A share less what chance gives: 0 at chance, 1 stays 1."""
    return np.clip((found - null) / np.maximum(1.0 - null, 1e-9), 0.0, 1.0)


class _Latents:
    """Neighbours of a sample of the particles in latent space."""

    def __init__(self, z: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> None:
        self.z, self.all = z, rows
        chosen = rng.choice(rows, LATENT_ROWS, replace=False) if len(rows) > LATENT_ROWS else rows
        self.sample = np.sort(chosen)
        self.known: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def _neighbours(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in ``rows`` of the nearest neighbours (n, k), and leading components (n, c); kept."""
        key = rows.tobytes()
        if key not in self.known:
            from sklearn.neighbors import NearestNeighbors

            points = self.z[rows]
            near = min(NEIGHBOURS, len(rows) - 1)
            model = NearestNeighbors(n_neighbors=near, algorithm="brute").fit(points)
            self.known = {key: (model.kneighbors(return_distance=False), pca(points, COMPONENTS).scores)}
        return self.known[key]

    def test(self, column: _Column, rng: np.random.Generator) -> Confound:
        """What the neighbours of a particle tell about the column."""
        rows, at, _ = np.intersect1d(column.rows, self.sample, assume_unique=True, return_indices=True)
        if len(rows) < LEAST:  # a column known of few particles: all of them
            at = np.sort(rng.choice(len(column.rows), min(LATENT_ROWS, len(column.rows)), replace=False))
        elif column.kind == "category" and len(at) < len(column.rows) and _mates(column.bins[at]) < MATES:
            at = _with_mates(column.bins, rng)
        rows = column.rows[at]
        near, scores = self._neighbours(rows)
        features = column.features(at)
        told = _told(features, near)
        null = np.array([_told(features[order], near) for order in _shuffles(len(rows), rng)])
        share = float(_above(told, null.mean()))
        chance = float(_above(np.quantile(null, 1 - RARE), null.mean()))
        p = _p_value(told, null)
        bits, best = _bits(column, at, scores, rng)
        text = ""
        if p <= RARE and share >= LARGE_LATENTS:
            where = f", most along principal component {best + 1}" if np.isfinite(bits) else ""
            text = (
                f"the latents follow {column.name}: particles that are neighbours in latent space share "
                f"{100 * share:.0f} % of it (by chance 0 %){where}."
            )
        return Confound(column.name, "latents", bits, share, p, chance, text)


def _mates(bins: np.ndarray) -> float:
    """Particles in the bin of a particle, mean over all particles."""
    return float(np.bincount(bins)[bins].mean())


def _with_mates(bins: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Places (n,) in the bins of whole categories drawn at random, at most ``MATES`` of each.

    Of a plain sample of a large set most micrographs have a particle or two: no neighbour could share theirs, however
    closely the latents follow the micrograph.
    """
    mixed = rng.permutation(len(bins))
    mixed = mixed[np.argsort(rng.permutation(bins.max() + 1)[bins[mixed]], kind="stable")]
    first = np.flatnonzero(np.diff(bins[mixed], prepend=-1))
    rank = np.arange(len(bins)) - np.repeat(first, np.diff(np.append(first, len(bins))))
    return np.sort(mixed[rank < MATES][:LATENT_ROWS])


def _shuffles(count: int, rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.permutation(count) for _ in range(SHUFFLES)]


def _ranks(values: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return rankdata(values)


def _told(features: np.ndarray, near: np.ndarray) -> float:
    """Share that the neighbours (n, k) tell: of categories (n,), or of the variance of numbers (n, c).

    Of several numbers the mixture that is told best counts: latents that know the tilt of a view know the view.
    """
    if features.ndim == 1:
        return float((features[near] == features[:, None]).mean())
    whole = features - features.mean(axis=0)
    left = sum(features[near[:, i]] for i in range(near.shape[1])) / near.shape[1] - features
    if features.shape[1] == 1:
        return float(1.0 - np.square(left).sum() / max(np.square(whole).sum(), 1e-30))
    from scipy.linalg import eigh

    spread = (whole.T @ whole).astype(np.float64)
    ridge = 1e-3 * np.trace(spread) / len(spread) * np.eye(len(spread))
    return float(1.0 - eigh((left.T @ left).astype(np.float64) + ridge, spread + ridge, eigvals_only=True)[0])


def _bits(column: _Column, at: np.ndarray, scores: np.ndarray, rng: np.random.Generator) -> tuple[float, int]:
    """Mutual information in bits of the column and its best principal component (from 0); NaN for rare categories."""
    from sklearn import config_context
    from sklearn.feature_selection import mutual_info_classif, mutual_info_regression

    few = rng.choice(len(at), min(len(at), ESTIMATOR_ROWS), replace=False)
    spread = scores.std(axis=0)
    points = scores[few][:, spread > 1e-6 * spread.max()]
    if column.kind == "number":
        values = _ranks(column.values[at][few])
        estimate = mutual_info_regression
    else:
        bins = column.bins[at][few]
        common = (np.bincount(bins) >= SMALL)[bins]
        if common.sum() < LEAST or len(np.unique(bins[common])) < 2:
            return float("nan"), 0
        points, values, estimate = points[common], bins[common], mutual_info_classif
    with config_context(assume_finite=True, skip_parameter_validation=True):  # a third of the time otherwise
        nats = estimate(points, values, random_state=0)
        # the largest of several estimates is not 0 by chance: as large as for shuffled columns
        nulls = [estimate(points, rng.permutation(values), random_state=0).max() for _ in range(ESTIMATOR_NULLS)]
    return max(float(nats.max() - np.mean(nulls)), 0.0) / float(np.log(2)), int(nats.argmax())


def _clusters(column: _Column, labels: np.ndarray, rng: np.random.Generator) -> list[Confound]:
    """What the column tells about the clusters, and which cluster is a part of the column."""
    at = np.flatnonzero(labels[column.rows] >= 0)
    if len(at) > CLUSTER_ROWS:
        at = np.sort(rng.choice(at, CLUSTER_ROWS, replace=False))
    present, own = np.unique(labels[column.rows[at]], return_inverse=True)
    if len(present) < 2 or len(at) < LEAST:
        return []
    bins, size = column.bins[at], np.bincount(own)
    table = _counts(own, bins, len(present), column.count)
    by_chance = []
    for order in _shuffles(len(at), rng):  # one table at a time: with many micrographs each is large
        one = _counts(own, bins[order], len(present), column.count)
        by_chance.append((_information(one), _moved(one)))
    nats, null = _information(table), np.array([one[0] for one in by_chance])
    entropy = -float((size / len(at) * np.log(size / len(at))).sum())
    moved, moved_null = _moved(table), np.array([one[1] for one in by_chance])  # (k,), (shuffles, k)
    typical = moved_null.mean(axis=0)
    judged = size >= SMALL
    part = np.where(judged, _above(moved, typical), 0.0)
    highest = np.where(judged, _above(moved_null, typical), 0.0).max(
        axis=1
    )  # over all clusters: many clusters are many chances
    each, blamed = [], []
    for k, label in enumerate(present):
        p = _p_value(float(part[k]), highest)
        words = _words(column, at, own == k)
        each.append({
            "cluster_from_0": int(label), "column": column.name, "particles_looked_at": int(size[k]),
            "share_that_differs": float(part[k]), "p": p, "where": words,
        })  # fmt: skip
        if p <= RARE and part[k] >= LARGE_CLUSTER:
            blamed.append(k)
    blamed.sort(key=lambda k: -part[k])
    text = "" if not blamed else _warning(column, [each[k] for k in blamed])
    chance = max(float(np.quantile(null, 1 - RARE) - null.mean()), 0.0) / entropy
    bits = max(nats - float(null.mean()), 0.0)
    return [Confound(column.name, "clusters", bits / np.log(2), min(bits / entropy, 1.0), _p_value(nats, null), chance,
                     text, tuple(int(present[k]) for k in blamed), each)]  # fmt: skip


def _counts(own: np.ndarray, bins: np.ndarray, groups: int, count: int) -> np.ndarray:
    return np.bincount(own * count + bins, minlength=groups * count).reshape(groups, count)


def _information(table: np.ndarray) -> float:
    """Mutual information in nats of the two sides of a contingency table."""
    from sklearn.metrics import mutual_info_score

    return float(mutual_info_score(None, None, contingency=table))


def _moved(table: np.ndarray) -> np.ndarray:
    """Share (k,) of each row's counts that would have to change bins to be distributed as all rows together."""
    whole = table.sum(axis=0) / table.sum()
    return 0.5 * np.abs(table / table.sum(axis=1, keepdims=True) - whole).sum(axis=1)


def _words(column: _Column, at: np.ndarray, own: np.ndarray) -> str:
    """Where a cluster's particles lie in the column, beside all particles."""
    values = column.values[at]
    if column.kind == "number":
        low, middle, high = (f"{v:.4g}" for v in np.percentile(values[own], [10, 50, 90]))
        first, last = (f"{v:.4g}" for v in np.percentile(values, [10, 90]))
        return (
            f"most of its particles lie between {low} and {high} (median {middle}), of all between {first} and {last}"
        )
    if column.kind in ("view", "angle"):
        bins = column.bins[at]
        # the direction with the most particles of the cluster around it, whichever way a mean of both ends would point
        best = values[own & (bins == np.bincount(bins[own]).argmax())].mean(axis=0)
        best /= max(np.linalg.norm(best), 1e-9)
        close = values @ best > np.cos(np.deg2rad(NEAR))
        if column.kind == "angle":
            return (
                f"{100 * close[own].mean():.0f} % of its particles are within {NEAR:.0f} degrees of {column.name} "
                f"{np.rad2deg(np.arctan2(best[1], best[0])):.0f}, of all {100 * close.mean():.0f} %"
            )
        rot, tilt = np.rad2deg(np.arctan2(best[1], best[0])), np.rad2deg(np.arccos(np.clip(best[2], -1, 1)))
        return (
            f"{100 * close[own].mean():.0f} % of its particles are seen from within {NEAR:.0f} degrees of "
            f"rot {rot:.0f}, tilt {tilt:.0f}, of all {100 * close.mean():.0f} %"
        )
    mine = np.bincount(column.bins[at][own], minlength=column.count)
    best = int(mine.argmax())
    there = column.bins[at] == best
    share, name = 100 * mine[best] / own.sum(), values[there][0]
    name = name if column.names is None else column.names[name]
    return f"{share:.0f} % of its particles have {column.name} {name}, of all {100 * there.mean():.0f} %"


def _warning(column: _Column, blamed: Sequence[dict[str, float | int | str]]) -> str:
    """The clusters that are a part of the column, in words."""
    span = f"a range of {column.name}"
    kind = {"number": span, "angle": span, "view": "a view", "category": f"a {column.name}"}[column.kind]
    spelt = "; ".join(f"cluster {one['cluster_from_0']}: {one['where']}" for one in blamed[:NAMED])
    more = f"; and {len(blamed) - NAMED} more" if len(blamed) > NAMED else ""
    what = f"a cluster may be {kind} rather than" if len(blamed) == 1 else f"clusters may be {kind} each rather than"
    return f"{what} a state of the molecule. {spelt}{more}."
