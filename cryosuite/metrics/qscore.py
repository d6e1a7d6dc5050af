"""Q-scores: how much the density around each atom looks like the Gaussian of an isolated, well resolved atom.

Pintilie et al., Nature Methods 17, 328 (2020). Around an atom, density is sampled on spheres of radius 0, .1, .. 2 A
at points that no other atom claims; Q is the correlation of these values with exp(-r^2 / (2 sigma^2)). It does not
change with the scale or the offset of the grey values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cryosuite.errors import InputError

SIGMAS = (0.4, 0.6)  # A: EMDB's and today's default; the paper of 2020
STEP, SHELLS = 0.1, 21  # radii 0, .1, .. 2 A
POINTS = 8  # wanted on each sphere
TRIES = 50  # sphere samplings of 8, 10, .. 106 points
CLAIM = 0.9  # a point belongs to another atom that is nearer than this share of its radius
NEIGHBOURS = 64  # at most, of one atom
CHUNK = 1024  # atoms at a time
# expected Q at a resolution of R A (sigma .6): slope, intercept
EXPECTED = {
    "protein": (-0.1775, 1.1192), "nucleic": (-0.1377, 0.9973), "ion": (-0.1103, 1.0795), "water": (-0.0895, 1.0001),
}  # fmt: skip

EXPECTED_TO = 6.0  # A: beyond, the lines soon fall below 0 and say nothing


def expected_q(kind: str, resolution: float) -> float | None:
    """Q (sigma .6) of well built protein, nucleic acid, ion or water in maps of a resolution (A).

    None for other molecules and beyond 6 A, where there are no such lines.
    """
    if kind not in EXPECTED or resolution > EXPECTED_TO:
        return None
    slope, intercept = EXPECTED[kind]
    return slope * resolution + intercept


@dataclass(frozen=True)
class RadialSamples:
    """Sums over the sampled points of each atom and sphere: ``count``, ``total`` and ``square`` (n, 21) float64."""

    count: np.ndarray
    total: np.ndarray
    square: np.ndarray

    def q(self, sigma: float) -> np.ndarray:
        """Q of each atom, (n,) float64: NaN without samples, 0 where the density is flat."""
        reference = np.exp(-0.5 * (np.arange(SHELLS) * STEP / sigma) ** 2)
        n = self.count.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_u, mean_v = self.total.sum(1) / n, self.count @ reference / n
            cross = self.total @ reference / n - mean_u * mean_v
            variance_u = self.square.sum(1) / n - mean_u**2
            variance_v = self.count @ reference**2 / n - mean_v**2
            q = cross / np.sqrt(variance_u * variance_v)
        flat = (n > 0) & ~(variance_u > 1e-14)
        return np.where(flat, 0.0, np.where(n > 0, q, np.nan))


@lru_cache(maxsize=TRIES)
def sphere_points(n: int) -> np.ndarray:
    """n points spread over the unit sphere along a spiral, (n, 3) float32 (Saff and Kuijlaars 1997)."""
    height = -1.0 + 2.0 * np.arange(n) / (n - 1)
    step = np.zeros(n)
    step[1:-1] = 3.6 / np.sqrt(n * (1.0 - height[1:-1] ** 2))
    angle = np.cumsum(step)
    angle[-1] = 0.0
    ring = np.sqrt(np.maximum(1.0 - height**2, 0.0))
    return np.stack([ring * np.cos(angle), ring * np.sin(angle), height], 1).astype(np.float32)


def q_scores(
    data: np.ndarray,  # (z, y, x)
    voxel: tuple[float, float, float],  # A, x y z
    origin: tuple[float, float, float],  # A, x y z
    xyz: np.ndarray,  # (n, 3) A
    sigmas: tuple[float, ...] = SIGMAS,
) -> np.ndarray:  # (n, len(sigmas)) float64
    """Q of every atom of a model; all atoms given count as neighbours, so give no hydrogens.

    Atoms outside the map get NaN; points outside the map are left out.

    Raises:
        InputError: the map is constant.
    """
    samples = sample_atoms(data, voxel, origin, xyz)
    return np.stack([samples.q(sigma) for sigma in sigmas], 1)


def sample_atoms(
    data: np.ndarray,  # (z, y, x)
    voxel: tuple[float, float, float],
    origin: tuple[float, float, float],
    xyz: np.ndarray,  # (n, 3) A
) -> RadialSamples:
    """Sample the density around all atoms; see ``q_scores``."""
    from scipy.spatial import cKDTree

    spread = float(data.std(dtype=np.float64))
    if not spread > 0:
        raise InputError("the map is constant: it has no Q-scores")
    sampler = _Sampler(data, voxel, origin, float(data.mean(dtype=np.float64)), spread)
    tree, reach = cKDTree(xyz), 2 * (SHELLS - 1) * STEP
    sums = np.zeros((3, len(xyz), SHELLS))
    for start in range(0, len(xyz), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(xyz)))
        rows = rows[sampler.inside(xyz[rows])]
        if not len(rows):
            continue
        offset, distance = _neighbours(tree, xyz, rows, reach)
        sums[:, rows, 0] = np.stack(sampler.sums(xyz[rows], np.arange(len(rows)), len(rows))) * POINTS
        for shell in range(1, SHELLS):
            sums[:, rows, shell] = _shell(sampler, xyz[rows], offset, distance, shell * STEP)
    return RadialSamples(*sums)


def _neighbours(tree: object, xyz: np.ndarray, rows: np.ndarray, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (a, k, 3) float32 from atoms to their neighbours, nearest first, and distances (a, k); padded by inf."""
    k = min(NEIGHBOURS, len(xyz) - 1) + 1
    distance, index = tree.query(xyz[rows], k=k, distance_upper_bound=reach)
    distance, index = distance.reshape(len(rows), k), index.reshape(len(rows), k)
    distance = np.where(index == rows[:, None], np.inf, distance)  # not the atom itself
    order = np.argsort(distance, 1, kind="stable")
    distance, index = np.take_along_axis(distance, order, 1), np.take_along_axis(index, order, 1)
    used = max(1, int(np.isfinite(distance).sum(1).max()))
    distance, index = distance[:, :used], index[:, :used]
    near = np.isfinite(distance)
    offset = np.where(near[..., None], xyz[np.where(near, index, 0)] - xyz[rows][:, None], 0.0)
    return offset.astype(np.float32), distance.astype(np.float32)


def _shell(
    sampler: _Sampler,
    xyz: np.ndarray,  # (a, 3)
    offset: np.ndarray,  # (a, k, 3)
    distance: np.ndarray,  # (a, k)
    radius: float,
) -> np.ndarray:  # (3, a)
    """Sums of one sphere: the first sampling that leaves at least 8 points free, all of those; none: no sums.

    A point p = r u is nearer than c r to a neighbour at d when u . d > ((1 - c^2) r^2 + d^2) / (2 r).
    """
    limit = ((1.0 - CLAIM**2) * radius**2 + distance**2) / (2.0 * radius)
    near = limit < distance  # only these neighbours can claim a point at all, since u . d <= d; nearest come first
    columns = int((near * np.arange(1, near.shape[1] + 1)).max(initial=0))
    limit, offset = limit[:, :columns], offset[:, :columns]
    out = np.zeros((3, len(xyz)))
    pending = np.arange(len(xyz))
    for n in range(POINTS, POINTS + 2 * TRIES, 2):
        points = sphere_points(n)
        free = np.ones((len(pending), n), bool)
        if columns:
            free = ~(offset[pending] @ points.T > limit[pending][..., None]).any(1)
        done = free.sum(1) >= POINTS
        atom, point = np.nonzero(free[done])
        chosen = pending[done]
        out[:, chosen] = sampler.sums(xyz[chosen[atom]] + radius * points[point], atom, len(chosen))
        pending = pending[~done]
        if not len(pending):
            break
    return out


@dataclass(frozen=True)
class _Sampler:
    """Trilinear values of a map, brought to mean 0 and deviation 1, which spares the sums their rounding."""

    data: np.ndarray
    voxel: tuple[float, float, float]
    origin: tuple[float, float, float]
    mean: float
    spread: float

    def _index(self, xyz: np.ndarray) -> np.ndarray:
        return ((xyz - self.origin) / self.voxel)[:, ::-1]

    def inside(self, xyz: np.ndarray) -> np.ndarray:
        """Whether positions (n, 3) lie in the map."""
        index = self._index(xyz)
        return ((index >= 0) & (index <= np.array(self.data.shape) - 1)).all(1)

    def sums(self, xyz: np.ndarray, group: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Count, sum and sum of squares of the values at positions (m, 3), by group."""
        index = self._index(xyz)
        keep = ((index >= 0) & (index <= np.array(self.data.shape) - 1)).all(1)
        index, group = index[keep], group[keep]
        low = np.minimum(index.astype(np.int64), np.maximum(np.array(self.data.shape) - 2, 0))
        part = index - low
        value = np.zeros(len(index))
        for corner in np.ndindex(2, 2, 2):
            weight = np.prod(np.where(corner, part, 1.0 - part), axis=1)
            at = np.minimum(low + corner, np.array(self.data.shape) - 1)
            value += weight * self.data[at[:, 0], at[:, 1], at[:, 2]]
        value = (value - self.mean) / self.spread
        return tuple(np.bincount(group, weights, n_groups) for weights in (np.ones(len(value)), value, value**2))
