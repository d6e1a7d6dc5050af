"""Kernel mode of `polish`: maps at points of a continuous latent, with a bandwidth for every place and band.

At a point z* particle i counts w_i = max(0, 1 - d_i^2 / h^2), d_i^2 = (z_i - z*)^T P (z_i - z*) (Epanechnikov). A
narrow kernel blurs little and is noisy, a wide one the other way round. Rings h_1 < h_2 < ... are summed once, each
with its particles and its particles times d^2, because

    sum_{d < h_J} (1 - d^2 / h_J^2) x = sum_{j <= J} (S_j - Q_j / h_J^2),    S_j = sum x, Q_j = sum d^2 x over ring j,

and every bandwidth follows. In each 25 A window and band the bandwidth is the one whose half map predicts the narrowest
map of the OTHER half best (the scheme of RECOVAR, Gilles & Singer 2024; BENCHMARKS, sections 4 and 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryosuite.data.particles import ParticleSet
from cryosuite.errors import InputError
from cryosuite.kernels.slices import Accumulator
from cryosuite.reconstruct.class_sums import MEMORY_GIB, ClassSums, accumulate
from cryosuite.reconstruct.masks import gaussian_blur, soft_sphere
from cryosuite.reconstruct.polish_gain import WINDOW_A, bands, half_radius
from cryosuite.reconstruct.solve import solve
from cryosuite.reconstruct.weights import ClassWeights

RINGS = 8
NARROWEST = 50  # particles within the first bandwidth, on average over the centres
WIDEST = 0.5  # share of the particles within the last


@dataclass
class KernelMaps:
    """Maps (k, D, D, D) at k centres and those of the halves.

    bandwidth: (k, B) mean chosen bandwidth per band, in units of the latent's spread. counts: (k, 2) particles within
    the widest kernel of each half. pixel_size in Angstrom.
    """

    maps: Tensor
    half_a: Tensor
    half_b: Tensor
    bandwidth: Tensor
    counts: np.ndarray
    pixel_size: float


def squared_distances(z: np.ndarray, centres: np.ndarray, precision: np.ndarray | None = None) -> np.ndarray:
    """(N, k) d_i^2 from every centre.

    Args:
        z: (N, d); centres: (k, d). precision: (N, d, d) of each particle, (d, d) of all, or None: the inverse
            covariance of z, so that distances are in units of the latent's spread.
    """
    z, centres = np.asarray(z, np.float64), np.asarray(centres, np.float64)
    if precision is None:
        values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(z.T)))
        good = values > 1e-9 * values.max()
        precision = (vectors[:, good] / values[good]) @ vectors[:, good].T
    return np.stack([_distance(z - centre, precision) for centre in centres], 1)


def _distance(difference: np.ndarray, precision: np.ndarray) -> np.ndarray:
    each = "ni,nij,nj->n" if precision.ndim == 3 else "ni,ij,nj->n"
    return np.maximum(np.einsum(each, difference, precision, difference, optimize=True), 0)


def bandwidths(distances: np.ndarray, rings: int = RINGS) -> np.ndarray:
    """(J,) bandwidths from one that holds about 50 particles to one that holds half of them, in equal ratios of h^2."""
    n = len(distances)
    shares = np.clip([NARROWEST / n, max(WIDEST, 2 * NARROWEST / n)], 1 / n, 1)
    low, high = (float(np.median(np.quantile(distances, share, axis=0))) for share in shares)
    if not high > 0:
        raise InputError("the latents are all alike: a kernel has nothing to choose from. Use the default mode.")
    low = max(low, 1e-6 * high)
    return np.sqrt(np.geomspace(low, max(high, low * 1.01), rings))


def ring_weights(distances: np.ndarray, h: np.ndarray) -> ClassWeights:
    """Weights of particles in (centre, ring, moment): 1 and d^2 for every centre within the widest bandwidth."""
    n, k = distances.shape
    J = len(h)
    ring = np.searchsorted(h**2, distances, side="left")  # (N, k), J where too far
    particle, centre = np.nonzero(ring < J)
    d2 = distances[particle, centre].astype(np.float32)
    first = (centre * J + ring[particle, centre]) * 2
    classes = np.stack([first, first + 1], 1).reshape(-1)
    values = np.stack([np.ones_like(d2), d2], 1).reshape(-1)
    starts = np.concatenate([[0], np.cumsum(np.bincount(particle, minlength=n) * 2)])
    return ClassWeights(values, classes.astype(np.int32), starts.astype(np.int64), k * J * 2)


def kernel_maps(
    particles: ParticleSet,
    z: np.ndarray,
    centres: np.ndarray,
    precision: np.ndarray | None = None,
    half: np.ndarray | None = None,
    *,
    rings: int = RINGS,
    window_A: float = WINDOW_A,
    fixed: int | None = None,
    box: int | None = None,
    memory_gib: float = MEMORY_GIB,
    scratch: object = None,
    progress: str | None = None,
) -> KernelMaps:
    """Maps at points of a continuous latent.

    Args:
        z: (N, d) latents, finite; centres: (k, d). precision: see `squared_distances`. half: (N,) half sets.
        window_A: standard deviation of the windows, Angstrom. fixed: use this ring everywhere instead of choosing.
        box, memory_gib, scratch, progress: as `class_sums.accumulate`.

    Raises:
        InputError: latents that do not fit the particles or are all alike; a centre with an empty half set.
    """
    if len(z) != len(particles):
        raise InputError(f"{len(z)} latents for {len(particles)} particles: one row each is needed")
    distances = squared_distances(z, centres, precision)
    h = bandwidths(distances, rings)
    weights = ring_weights(distances, h)
    with accumulate(
        particles, weights, half, box=box, memory_gib=memory_gib, scratch=scratch, progress=progress
    ) as sums:
        counts = sums.counts[::2].reshape(len(centres), rings, 2).sum(1)
        if not (counts > 0).all():
            where = int(np.nonzero((counts == 0).any(1))[0][0])
            raise InputError(f"centre {where}: one half set has no particle near it: fewer or other centres are needed")
        found = [_one(sums, k, h, window_A / sums.pixel_size, fixed) for k in range(len(centres))]
        pixel_size = sums.pixel_size
    maps, a, b, chosen = (torch.stack(part) for part in zip(*found, strict=True))
    return KernelMaps(maps, a, b, chosen, counts, pixel_size)


def cumulated(sums: ClassSums, centre: int, half: int, h: np.ndarray, J: int) -> Accumulator:
    """The sums of one half set at bandwidth h_J around a centre."""
    rings = len(h)
    total = None
    for j in range(J + 1):
        first = (centre * rings + j) * 2
        if sums.counts[first, half] <= 0:
            continue
        plain, squared = sums.load(first, half), sums.load(first + 1, half)
        part = plain.data - squared.data / h[J] ** 2
        total = part if total is None else total + part
    if total is None:
        total = torch.zeros_like(sums.load(centre * rings * 2, half).data)
    total[..., 2].clamp_(min=0)
    return Accumulator(total, sums.box_size, 2)


def _one(sums: ClassSums, centre: int, h: np.ndarray, window: float, fixed: int | None):
    """Map, half maps and mean bandwidth per band of one centre."""
    D = sums.box_size
    halves = torch.stack(
        [torch.stack([solve(cumulated(sums, centre, half, h, J)) for J in range(len(h))]) for half in (0, 1)]
    )  # (2, J, D, D, D)
    weights = bands(D, half_radius(D))
    if fixed is not None:
        maps = halves[:, fixed]
        return maps.mean(0), maps[0], maps[1], torch.full((len(weights),), float(h[fixed]))
    sphere = soft_sphere(D)
    out, chosen = torch.zeros(2, D, D, D), torch.empty(len(weights))
    reference = next(J for J in range(len(h)) if all(float(halves[half, J].abs().max()) > 0 for half in (0, 1)))
    transforms = torch.fft.rfftn(halves, dim=(2, 3, 4))
    widths = torch.from_numpy(h).float()
    for b, band in enumerate(weights):
        x = torch.fft.irfftn(transforms * band, s=(D,) * 3, dim=(2, 3, 4))
        best = torch.full((D, D, D), torch.inf)
        which = torch.zeros(D, D, D, dtype=torch.long)
        for J in range(reference, len(h)):
            square = (x[0, J] - x[1, reference]).square() + (x[1, J] - x[0, reference]).square()
            error = gaussian_blur(square * sphere, window)
            better = error < best
            best, which = torch.where(better, error, best), torch.where(better, J, which)
        out += torch.gather(x, 1, which.expand(2, 1, D, D, D))[:, 0]
        chosen[b] = (widths[which] * sphere).sum() / sphere.sum()
    return out.mean(0), out[0], out[1], chosen
