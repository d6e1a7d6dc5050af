"""Classes settled by the images when the first partition may hold fewer classes than there are states.

`held_out.settle` joins classes that are one but cannot part a class that holds two states: from a start with too few,
or with classes so mixed that they flow together, it ends in too few. So each is cut in two at random and the images
choose again. A class of one state comes out whole (its halves are twins); one of two states comes out as two, and both
are cut once more. Where a class held many states, its halves may flow together with others: then other halves are
tried.
"""

from __future__ import annotations

import numpy as np
import torch

from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.reconstruct.held_out import Settled, settle
from cryosuite.reconstruct.weights import ClassWeights

LEAST = 50  # particles of a class on average, once some were cut in two
CUTS, TIMES = 4, 4  # cuts at most, and times as many classes as to begin with: a continuous motion has no last class
AGAIN = 2  # cuts that are tried once more with other halves, in all, because classes flowed together


def settle_and_cut(
    particles: ParticleSet,
    start: np.ndarray,
    seed: int,
    *,
    count: int = 0,
    device: torch.device | str = "cpu",
    progress: str | None = None,
    processes: Processes = ALONE,
) -> np.ndarray:
    """Classes (N,) int64 that the images of N particles choose, from a first partition.

    Args:
        particles: N with poses and CTF. start: (N,) int64 >= 0, the first partition, in too many classes or in too few.
        seed: of the cuts. count: classes that shall be left; 0: as many as the images tell apart.
        progress: label of a progress display, None for silence. processes: that share the images; all get the same.

    A cut is kept only if it makes held-out images likelier. Particles without a readable image stay with the class that
    most of their first one became.

    Raises:
        InputError: as `held_out.settle`.
    """

    def settled_from(labels: np.ndarray, classes: int) -> tuple[Settled, np.ndarray]:
        result = settle(
            particles, ClassWeights.from_labels(labels, classes), count=count,
            progress=progress, device=device, processes=processes,
        )  # fmt: skip
        chosen, own = result.p.labels(), result.groups[labels]
        return result, np.where(chosen >= 0, chosen, np.where(own >= 0, own, 0))

    many = int(start.max()) + 1
    most = min(len(start) // LEAST, TIMES * many)
    result, labels = settled_from(start, many)
    cut = np.arange(0 if count else result.p.n_classes)
    again = AGAIN
    for _ in range(CUTS):
        before = result.p.n_classes
        if not len(cut) or before + len(cut) > most:
            break
        other, chosen = settled_from(in_two(labels, before, cut, seed), before + len(cut))
        flown = flown_together(other.groups, before, cut)
        while flown.any() and again:
            seed, again = seed + 1, again - 1
            one, its = settled_from(in_two(labels, before, cut, seed), before + len(cut))
            if one.likelihood[-1] > other.likelihood[-1]:
                other, chosen, flown = one, its, flown_together(one.groups, before, cut)
        if other.likelihood[-1] <= result.likelihood[-1]:
            break
        cut = np.union1d(halved(other.groups, before, cut), np.flatnonzero(flown))
        result, labels = other, chosen
    return labels


def in_two(labels: np.ndarray, count: int, cut: np.ndarray, seed: int) -> np.ndarray:
    """Labels (N,) int64 of ``count`` classes once some were cut in two at random (latents would part strangers from
    the rest): of class cut[i] one half keeps its number and the other gets count + i."""
    found = labels.copy()
    other = np.random.default_rng(seed).random(len(labels)) < 0.5
    for at, k in enumerate(cut.tolist()):
        found[other & (labels == k)] = count + at
    return found


def halved(groups: np.ndarray, count: int, cut: np.ndarray) -> np.ndarray:
    """The new classes that are one half of an old class: the others of those that were cut held one state.

    Args:
        groups: (count + len(cut),) int64 new class of each old one, then of the other half of each cut one; -1: none.
    """
    halves = np.stack([groups[cut], groups[count : count + len(cut)]])
    found = np.unique(halves[:, halves[0] != halves[1]])
    return found[found >= 0]


def flown_together(groups: np.ndarray, count: int, cut: np.ndarray) -> np.ndarray:
    """(k,) bool, new classes that hold parts of several old ones.

    The old ones had just been told apart. Where parts of them become one, these held the same few states, not parted
    yet, and means of related states differ by little.
    """
    old, own = np.concatenate([np.arange(count), cut]), groups >= 0
    pairs = np.unique(np.stack([old, groups])[:, own], axis=1)
    return np.bincount(pairs[1]) > 1
