"""Do latents keep the neighbours of a continuous truth? Neighbourhood similarity and information imbalance.

Both (BENCHMARKS section 3) compare who is near whom in two spaces, never the distances themselves. Equal coordinates,
such as those of images of one state, would order their neighbours by row: a tiny seeded jitter orders them at random.
"""

from __future__ import annotations

import numpy as np
import torch

from cryosuite.errors import InputError

EVERY = 5  # one particle in so many is asked for its neighbours
MOST_ASKED = 2000  # but no more than so many
NEIGHBOURHOODS = tuple(range(200, 4001, 200))
FIRST_NEIGHBOURS = (1, 3, 10, 30, 100, 300)
IMBALANCE_ROWS = 2000
DISTANCES = 1 << 25  # held at a time


def neighbourhood_similarity(
    z: np.ndarray,  # (N, d)
    truth: np.ndarray,  # (N, e)
    sizes: tuple[int, ...] = NEIGHBOURHOODS,
    seed: int = 0,
) -> dict[int, float]:
    """Mean share of the k nearest particles that are the same in both spaces, for each k of ``sizes`` below N / 2.

    The particle itself counts as its first neighbour. Every 5th particle is asked, at most 2,000. Unrelated spaces give
    k / N, equal ones 1.

    Returns:
        k -> share in 0..1; for fewer than 400 particles the one k = N // 4.
    """
    a, b = _pair(z, truth, seed)
    count = len(a)
    sizes = tuple(k for k in sizes if 2 * k <= count) or (max(count // 4, 1),)
    most = max(sizes)
    asked = np.arange(seed % EVERY, count, EVERY)
    asked = asked[np.linspace(0, len(asked) - 1, min(len(asked), MOST_ASKED)).round().astype(int)]
    found, place = np.zeros(most), torch.arange(most).expand(1, -1)
    step = max(1, DISTANCES // count)
    for start in range(0, len(asked), step):
        rows = torch.from_numpy(asked[start : start + step])
        near_a, near_b = (_nearest(x, rows, most) for x in (a, b))
        rank = torch.full((len(rows), count), most, dtype=torch.int64)
        rank.scatter_(1, near_b, place.expand(len(rows), -1))
        # a particle is shared by all neighbourhoods larger than its later place in the two
        shared_from = torch.maximum(rank.gather(1, near_a), place)
        found += torch.bincount(shared_from.flatten(), minlength=most + 1)[:most].numpy()
    shared = np.cumsum(found) / len(asked)
    return {k: float(shared[k - 1] / k) for k in sizes}


def information_imbalance(
    a: np.ndarray,  # (N, d)
    b: np.ndarray,  # (N, e)
    sizes: tuple[int, ...] = FIRST_NEIGHBOURS,
    rows: int = IMBALANCE_ROWS,
    seed: int = 0,
) -> dict[int, float]:
    """Information imbalance Delta(A -> B) = 2 / N <rank in B of the k nearest neighbours in A> (Glielmo et al. 2022).

    About 0: A says who is near in B; about 1: A says nothing of B. Ask both ways: Delta(A -> B) small and Delta(B -> A)
    large means that A knows more than B. At most ``rows`` random particles take part; ranks count from 1 and leave the
    particle itself out.

    Returns:
        k -> Delta, for each k of ``sizes`` below N.
    """
    first, second = _pair(a, b, seed)
    count = len(first)
    if count > rows:
        chosen = torch.from_numpy(np.sort(np.random.default_rng(seed).choice(count, rows, replace=False)))
        first, second, count = first[chosen], second[chosen], rows
    sizes = tuple(k for k in sizes if k < count)
    everyone = torch.arange(count)
    near = _nearest(first, everyone, max(sizes) + 1)[:, 1:]
    order = _nearest(second, everyone, count)
    rank = torch.empty_like(order)
    rank.scatter_(1, order, everyone.expand(count, -1).contiguous())
    ranks = rank.gather(1, near).double()
    return {k: float(2 / count * ranks[:, :k].mean()) for k in sizes}


def _pair(a: np.ndarray, b: np.ndarray, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both spaces with jitter, float64; InputError when their rows do not fit or are not finite."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (a, b))
    if len(a) != len(b) or len(a) < 4:
        raise InputError(f"{len(a)} and {len(b)} rows: two spaces of the same 4 or more particles are needed")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("coordinates that are not finite (NaN or infinite) have no neighbours")
    generator = np.random.default_rng([seed, 1])
    return tuple(torch.from_numpy(_jittered(x, generator)) for x in (a, b))


def _jittered(x: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Centred coordinates plus noise of a hundred-millionth of their spread."""
    x = x - x.mean(0)
    spread = float(x.std()) or 1.0
    return x / spread + 1e-8 * generator.standard_normal(x.shape)


def _nearest(x: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` nearest rows of x (N, d) to each of ``rows``, nearest first, the row itself always first."""
    distance = torch.cdist(x[rows], x, compute_mode="donot_use_mm_for_euclid_dist")
    distance[torch.arange(len(rows)), rows] = -1
    return distance.topk(count, dim=1, largest=False).indices
