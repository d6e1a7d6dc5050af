"""Kernel mode of `polish`: maps at points of a continuous latent, with a bandwidth for every place and band.

At a point z* particle i counts w_i = max(0, 1 - d_i^2 / h^2), d_i^2 = (z_i - z*)^T P (z_i - z*) (Epanechnikov). A
narrow kernel blurs little and is noisy, a wide one the other way round. Rings h_1 < h_2 < ... are summed once, each
with its particles and its particles times d^2, because

    sum_{d < h_J} (1 - d^2 / h_J^2) x = sum_{j <= J} (S_j - Q_j / h_J^2),    S_j = sum x, Q_j = sum d^2 x over ring j,

and every bandwidth follows. In each 25 A window and band the bandwidth is the one whose half map predicts the narrowest
map of the OTHER half best (the scheme of RECOVAR, Gilles & Singer 2024; BENCHMARKS, sections 4 and 5).
"""

from __future__ import annotations

from collections.abc import Iterator
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
FLAT = 4.0  # the last h^2, in units of the one that holds all particles: weights are nearly equal
STEP = 1.05  # least ratio of h^2 between neighbours


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
    """(J,) rising bandwidths, J <= rings: from one that holds about 50 particles to one that holds all, nearly equal.

    In between they hold numbers of particles in equal ratios (the median over the centres). Where many particles have
    the very same latent the first one holds these alone, and there are fewer of them.
    """
    n = len(distances)
    shares = np.geomspace(min(NARROWEST, n), n, rings - 1) / n
    square = np.median(np.quantile(distances, shares, axis=0), axis=1)
    square = np.append(square, FLAT * square[-1])
    beyond = distances[distances > 1e-9 * max(square[-1], 1e-30)]
    if not (square[-1] > 0 and len(beyond)):
        raise InputError("the latents are all alike: a kernel has nothing to choose from. Use the default mode.")
    square = np.maximum(square, 0.5 * float(beyond.min()))
    kept = [square[-1]]
    for value in square[-2::-1]:
        if value < kept[-1] / STEP:
            kept.append(value)
    return np.sqrt(np.array(kept[::-1]))


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
        counts = sums.counts[::2].reshape(len(centres), len(h), 2).sum(1)
        if not (counts > 0).all():
            where = int(np.nonzero((counts == 0).any(1))[0][0])
            raise InputError(f"centre {where}: one half set has no particle near it: fewer or other centres are needed")
        found = []
        for k in range(len(centres)):
            steps = ladder(sums, k, h)
            found.append(choose(steps, h, window_A / sums.pixel_size) if fixed is None else _plain(steps, h, fixed))
        pixel_size = sums.pixel_size
    maps, a, b, chosen = (torch.stack(part) for part in zip(*found, strict=True))
    return KernelMaps(maps, a, b, chosen, counts, pixel_size)


def cumulated(sums: ClassSums, centre: int, half: int, h: np.ndarray) -> Iterator[Accumulator]:
    """The sums of one half set around a centre at every bandwidth in turn; every ring is read once."""
    plain = squared = None
    for j in range(len(h)):
        first = (centre * len(h) + j) * 2
        if plain is None or sums.counts[first, half] > 0:
            ring = [sums.load(first + moment, half).data for moment in (0, 1)]
            plain, squared = ring if plain is None else (plain + ring[0], squared + ring[1])
        total = plain - squared / float(h[j]) ** 2
        total[..., 2].clamp_(min=0)
        yield Accumulator(total, sums.box_size, 2)


def ladder(sums: ClassSums, centre: int, h: np.ndarray) -> Tensor:
    """Maps (3, J, D, D, D) of one centre at every bandwidth: half a, half b, and of both halves' particles together."""
    steps = []
    for a, b in zip(*(cumulated(sums, centre, half, h) for half in (0, 1)), strict=True):
        steps.append(torch.stack([solve(acc) for acc in (a, b, a + b)]))
    return torch.stack(steps, 1)


def choose(steps: Tensor, h: np.ndarray, window: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Map, half maps and mean bandwidth per band of one centre, the bandwidth chosen for every window and band.

    Args:
        steps: (3, J, D, D, D) of `ladder`. h: (J,). window: standard deviation in voxels.
    """
    D, J = steps.shape[-1], len(h)
    sphere, weights = soft_sphere(D), bands(D, half_radius(D))
    out, chosen = torch.zeros(3, D, D, D), torch.empty(len(weights))
    filled = [j for j in range(J) if all(float(steps[half, j].abs().max()) > 0 for half in (0, 1))]
    if not filled:
        raise InputError("polish --mode kernel: a centre whose half sets hold no data (empty or zero images?)")
    reference = filled[0]
    transforms = torch.fft.rfftn(steps, dim=(2, 3, 4))
    widths = torch.from_numpy(h).float()
    for b, band in enumerate(weights):
        x = torch.fft.irfftn(transforms * band, s=(D,) * 3, dim=(2, 3, 4))
        best = torch.full((D, D, D), torch.inf)
        which = torch.full((D, D, D), reference, dtype=torch.long)
        for j in range(reference, J):
            square = (x[0, j] - x[1, reference]).square() + (x[1, j] - x[0, reference]).square()
            error = gaussian_blur(square * sphere, window)
            better = error < best
            best, which = torch.where(better, error, best), torch.where(better, j, which)
        out += torch.gather(x, 1, which.expand(3, 1, D, D, D))[:, 0]
        chosen[b] = (widths[which] * sphere).sum() / sphere.sum()
    return out[2], out[0], out[1], chosen


def _plain(steps: Tensor, h: np.ndarray, J: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for one bandwidth everywhere."""
    J = min(J, len(h) - 1)
    bands_count = len(bands(steps.shape[-1], half_radius(steps.shape[-1])))
    return steps[2, J], steps[0, J], steps[1, J], torch.full((bands_count,), float(h[J]))
