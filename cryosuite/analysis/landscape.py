"""A landscape of volumes: principal components of decoded maps, states among them, and how many particles each has.

Latents are a network's own language: two of them far apart may give the same map. So the latents are sketched (k-means,
a particle per centre), the maps of the sketch decoded and masked, and everything after that happens among maps:

    pca          of the masked maps, each weighted by the particles it stands for
    particles    get coordinates among the maps by interpolating those of the sketch over the latents (linear radial
                 basis functions, exact at the sketch); how well that works is said by leaving parts of it out
    states       agglomerative, of the sketch; a particle has the state of its centre
    landscape    -ln of the density of particles over the first two components, in units of kT
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cryosuite.analysis.latents import nearest, ordered
from cryosuite.console import Progress
from cryosuite.errors import InputError, notice

LINKAGES = ("ward", "average", "complete")
BOOTSTRAPS = 2000
INTERVAL = (2.5, 97.5)  # percent
FIT_ROWS = 200_000  # particles k-means is fitted on
GRID = 90  # cells on a side of the landscape
WIDTH_ROWS = 5_000  # particles whose neighbours say how loose the crowd is
HIGHEST = 7.0  # kT: above, there are too few particles to tell
FOLDS = 5


@dataclass(frozen=True)
class Sketch:
    """Latents that stand for all: rows (s,) of particles, counts (s,), cell (M,) of each particle."""

    rows: np.ndarray
    counts: np.ndarray
    cell: np.ndarray


@dataclass(frozen=True)
class VolumePca:
    """Principal components of maps.

    Attributes:
        mean: (v,) mean of the masked voxels, weighted. components: (c, v) orthonormal. ratio: (c,) of the variance.
        scores: (s, c) of the sketch, in grey values x square root of voxels.
    """

    mean: np.ndarray
    components: np.ndarray
    ratio: np.ndarray
    scores: np.ndarray


def sketch(z: np.ndarray, count: int, seed: int = 0) -> Sketch:
    """Choose ``count`` particles that stand for all: those nearest to the centres of k-means of z (M, zdim).

    Fewer where there are fewer different latents.
    """
    from sklearn.cluster import MiniBatchKMeans

    if count < 2:
        raise InputError(f"-N {count}: a landscape needs at least 2 volumes.")
    different = np.unique(z, axis=0, return_index=True)[1]
    if len(different) <= count:
        rows = np.sort(different)
    else:
        rng = np.random.default_rng(seed)
        fit = z if len(z) <= FIT_ROWS else z[rng.choice(len(z), FIT_ROWS, replace=False)]
        model = MiniBatchKMeans(count, random_state=seed, n_init=1, batch_size=4096, max_iter=30).fit(fit)
        rows = np.unique(nearest(z, model.cluster_centers_))
        rows = np.sort(rows[np.unique(z[rows], axis=0, return_index=True)[1]])  # equal latents: one map, one point
    cell = nearest(z[rows], z)
    counts = np.bincount(cell, minlength=len(rows))
    return Sketch(rows, counts, cell)


def volume_pca(maps: np.ndarray, counts: np.ndarray, components: int) -> VolumePca:
    """Weighted principal components of masked maps (s, v) by the s x s matrix of their products."""
    share = counts / counts.sum()
    mean = share @ maps
    weighted = (maps - mean) * np.sqrt(share)[:, None].astype(maps.dtype)
    values, vectors = np.linalg.eigh((weighted @ weighted.T).astype(np.float64))
    values, vectors = np.clip(values[::-1], 0, None), vectors[:, ::-1]
    real = int((values > 1e-10 * max(values[0], 1e-300)).sum()) if values[0] > 0 else 0
    kept = min(components, real)
    axes = (vectors[:, :kept] / np.sqrt(values[:kept])).T.astype(np.float32) @ weighted
    peak = axes[np.arange(kept), np.abs(axes).argmax(axis=1)] if kept else np.zeros(0)
    axes = axes * np.where(peak < 0, -1.0, 1.0)[:, None].astype(axes.dtype)
    scores = (maps - mean) @ axes.T
    return VolumePca(mean, axes, values[:kept] / max(values.sum(), 1e-300), scores.astype(np.float32))


def place_particles(z: np.ndarray, found: Sketch, scores: np.ndarray) -> tuple[np.ndarray, float]:
    """Coordinates (M, c) of all particles among the maps, and how well left-out maps are placed (share of variance).

    Args:
        z: (M, zdim). scores: (s, c) of the sketch.
    """
    points = z[found.rows]
    if len(points) < 3:
        return scores[found.cell], float("nan")
    held = np.arange(len(points)) % min(FOLDS, len(points))
    held = np.random.default_rng(0).permutation(held)
    guess = np.empty_like(scores)
    for fold in range(held.max() + 1):
        out = held == fold
        guess[out] = _interpolated(points[~out], scores[~out], points[out])
    spread = np.square(scores - scores.mean(axis=0)).sum()
    told = 1.0 - float(np.square(guess - scores).sum() / max(spread, 1e-30))
    return _interpolated(points, scores, z), told


def _interpolated(points: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    from scipy.interpolate import RBFInterpolator

    model = RBFInterpolator(points, values, kernel="linear", degree=0)
    blocks = [model(at[start : start + 20_000]) for start in range(0, len(at), 20_000)]
    return np.concatenate(blocks).astype(np.float32)


def states(scores: np.ndarray, found: Sketch, count: int, linkage: str) -> np.ndarray:
    """States (s,) int64 from 0 of the sketch by agglomeration in the space of maps; numbers follow their dendrogram."""
    from scipy.cluster.hierarchy import fcluster
    from scipy.cluster.hierarchy import linkage as agglomerate

    if linkage not in LINKAGES:
        raise InputError(f"--linkage {linkage}: expected one of {', '.join(LINKAGES)}.")
    if count < 1:
        raise InputError(f"-M {count}: expected at least 1 state.")
    if count > len(scores):
        notice(f"-M {count}: there are {len(scores)} volumes, so {len(scores)} states at most.")
        count = len(scores)
    if count == 1 or scores.shape[1] == 0:
        return np.zeros(len(scores), np.int64)
    tree = agglomerate(scores.astype(np.float64), method=linkage)
    labels = fcluster(tree, count, criterion="maxclust") - 1
    weight = found.counts.astype(np.float64)
    means = [np.average(scores[labels == k], axis=0, weights=weight[labels == k]) for k in range(labels.max() + 1)]
    return ordered(scores, labels.astype(np.int64), np.stack(means))[0]


def medoids(scores: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Number of the sketch point nearest to the mean of each state, among its own."""
    found = []
    for k in range(labels.max() + 1):
        own = np.flatnonzero(labels == k)
        mean = np.average(scores[own], axis=0, weights=counts[own])
        found.append(own[np.square(scores[own] - mean).sum(axis=1).argmin()])
    return np.array(found)


def count_intervals(
    labels: np.ndarray,  # (M,) from 0
    count: int,
    blocks: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Bootstrap intervals (count, 2) of the particles per state: 95 % of sets drawn again have so many.

    Args:
        blocks: (M,) int: what is drawn again is a block (a micrograph) with all its particles, because particles of one
            micrograph resemble each other; None: single particles.
    """
    rng, total = np.random.default_rng(seed), len(labels)
    if blocks is None or len(np.unique(blocks)) < 2:
        drawn = rng.multinomial(total, np.bincount(labels, minlength=count) / total, size=BOOTSTRAPS).astype(float)
    else:
        number, own = np.unique(blocks, return_inverse=True)
        table = np.bincount(own * count + labels, minlength=len(number) * count).reshape(-1, count).astype(float)
        even = np.full(len(number), 1 / len(number))
        parts = [rng.multinomial(len(number), even, size=BOOTSTRAPS // 20) @ table for _ in range(20)]  # less memory
        drawn = np.concatenate(parts)
        drawn *= total / drawn.sum(axis=1, keepdims=True)
    return np.percentile(drawn, INTERVAL, axis=0).T


@dataclass(frozen=True)
class Landscape:
    """-ln(density) over a plane in kT above its lowest point: edges (g + 1,) of both axes, energy (g, g) [y, x].

    NaN where there are hardly any particles. smooth: width of the kernel, in units of each axis.
    """

    x: np.ndarray
    y: np.ndarray
    energy: np.ndarray
    smooth: tuple[float, float]

    def at(self, points: np.ndarray) -> np.ndarray:
        """Energy (k,) at points (k, 2); NaN outside."""
        column = np.searchsorted(self.x, points[:, 0]) - 1
        row = np.searchsorted(self.y, points[:, 1]) - 1
        size = len(self.x) - 1
        inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
        found = np.full(len(points), np.nan)
        found[inside] = self.energy[row[inside], column[inside]]
        return found


def landscape(xy: np.ndarray, grid: int = GRID) -> Landscape:
    """-ln of the density of points (M, 2), smoothed with a Gaussian as wide as the crowd is loose.

    The width is the typical distance to a near neighbour (the 8th to the 40th, by the number of points), one cell at
    least; a width from the variance would melt separate states into one.
    """
    from scipy.ndimage import gaussian_filter
    from scipy.spatial import cKDTree

    low, high = np.percentile(xy, [0.1, 99.9], axis=0)
    span = np.maximum(high - low, 1e-6 + 1e-6 * np.abs(high))
    scaled = xy / span
    few = np.random.default_rng(0).choice(len(xy), min(len(xy), WIDTH_ROWS), replace=False)
    near = int(min(np.clip(len(xy) // 25, 8, 40), len(xy) - 1))
    loose = float(np.median(cKDTree(scaled).query(scaled[few], [near + 1])[0]))
    width = np.clip(loose, 1.0 / grid, 0.1) * span
    edges = [np.linspace(low[i] - 3.5 * width[i], high[i] + 3.5 * width[i], grid + 1) for i in (0, 1)]
    counts = np.histogram2d(xy[:, 1], xy[:, 0], bins=(edges[1], edges[0]))[0]
    cell = np.array([edge[1] - edge[0] for edge in edges])
    smooth = np.maximum(width, cell)
    dense = gaussian_filter(counts, (smooth / cell)[::-1], mode="constant")
    with np.errstate(divide="ignore"):
        energy = -np.log(dense / max(dense.max(), 1e-300))
    # a cell that the kernel of less than one particle reaches says nothing
    area = 2 * np.pi * float(np.prod(smooth / cell))
    energy[(dense < 0.5 / area) | (energy > HIGHEST)] = np.nan
    return Landscape(edges[0], edges[1], energy, (float(smooth[0]), float(smooth[1])))


def state_maps(maps: Any, labels: np.ndarray, counts: np.ndarray, progress: Progress | None = None) -> Any:
    """Mean and standard deviation (k, D, D, D) of the maps of each state, weighted by particles.

    Args:
        maps: (s, D, D, D), an array or a memory map; read one by one.
    """
    total = labels.max() + 1
    mean = np.zeros((total, *maps.shape[1:]), np.float64)
    square = np.zeros_like(mean)
    weight = np.bincount(labels, counts, minlength=total)
    for i, label in enumerate(labels):
        one = np.asarray(maps[i], np.float64)
        mean[label] += counts[i] / weight[label] * one
        square[label] += counts[i] / weight[label] * one**2
        if progress is not None:
            progress.advance()
    return mean.astype(np.float32), np.sqrt(np.clip(square - mean**2, 0, None)).astype(np.float32)
