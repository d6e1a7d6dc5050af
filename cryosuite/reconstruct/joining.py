"""Which classes are one: what they share of the images when all choose at a raised temperature.

Two classes of one state settle on a difference that is noise: each half set chooses by the other one's maps, so both
agree on it, and held-out images confirm it. It goes when the temperature rises. Images whose spread along the
difference of two maps has the variance v pull the maps apart below T = v, in units of the Bayes temperature. Noise
alone has v = 1 along a direction given beforehand, but 2.5 to 4 along the one that two classes of 100 images at D = 32
have picked; two states at a squared distance d2 have 1 + d2 / 4. The filter of the maps takes some of it away.

So there are two temperatures. At 2.5 classes that share more than .7 of their images are one, whatever else they share.
Related states would begin to flow together soon after that, but they come in families: each shares images with
several others. Two classes that share images with each other and with nobody else are therefore tried at 3.2 as well.
Measured on 100 structures with 200 images each (seed 0): twins share .43 to .57 at 2.5 and .75 to .93 at 3.2, the
next pair of two states .09 and .17.

With fewer images noise is worth more than these temperatures, and twins stay apart. They cost: each has a map of half
the images. So two classes are also one where held-out images are likelier under one map of both than under two
(`together`). That the images have chosen between the two speaks for two, so where one is likelier all the same, it is
by more than noise. Measured on 100 structures with 100 images each: four pairs of twins gain 1.1 to 1.9 per image, two
states lose 3.8. Two states that differ by less than the noise of their maps are joined too: told apart they predict
no image better.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from cryosuite.kernels import assignment
from cryosuite.reconstruct.weights import ClassWeights

JOIN_AT, JOIN_ITERATIONS = 2.5, 6  # temperature at which twins become one, and for how long
PAIRS_AT = 3.2  # temperature at which lonely pairs are tried as well
ROUNDS = 4  # of pairs tried together, at most
FAR = 20.0  # log units per image that one class loses with the map of another, above which nobody need try
OVERLAP = 0.7  # of the shares of two classes, above which they are one
PAIR_OVERLAP, ALONE = 0.25, 0.1  # of a lonely pair, at least; of its classes with any other, at most


def joined_groups(
    warm: ClassWeights, again: Callable[[ClassWeights, float], ClassWeights], count: int = 0
) -> np.ndarray:
    """(K,) int64 group of each class, numbered from 0.

    Args:
        warm: shares at JOIN_AT. again: shares of given classes after JOIN_ITERATIONS at a given temperature; asked only
            where there are lonely pairs. count: join until so many are left, whether alike or not (0: only twins).
    """
    groups = overlap_groups(warm, count)
    left = warm.merged(groups)
    pairs = [] if count else lonely_pairs(left)
    if pairs:
        shared = overlaps(again(left, PAIRS_AT))
        for j, k in pairs:
            if shared[j, k] > OVERLAP:
                groups[groups == k] = j
        groups = np.unique(groups, return_inverse=True)[1]
    return groups


def overlap_groups(p: ClassWeights, count: int = 0, least: int = 0) -> np.ndarray:
    """(K,) group of each class: classes that share more than .7 of their images (`overlaps`) are one.

    Shares at a raised temperature: what two classes tell apart by fewer log units than that is gone. With ``count``
    the pairs that overlap most are joined until so many classes are left, with ``least`` those of them that share
    more than .7.
    """
    overlap = overlaps(p)
    if not count and not least:
        return assignment.merge_groups(torch.from_numpy(overlap), OVERLAP).numpy()
    groups = np.arange(p.n_classes)
    above, right = np.triu_indices(len(overlap), 1)
    for pair in np.argsort(-overlap[above, right], kind="stable"):
        if len(np.unique(groups)) <= max(count, least) or (least and overlap[above[pair], right[pair]] <= OVERLAP):
            break
        groups[groups == groups[right[pair]]] = groups[above[pair]]
    return np.unique(groups, return_inverse=True)[1]


def overlaps(p: ClassWeights) -> np.ndarray:
    """(K, K) sum_i p_ij p_ik over the smaller of sum_i p_ij^2 and sum_i p_ik^2."""
    shared = (p.matrix.T @ p.matrix).toarray()
    own = np.maximum(shared.diagonal(), 1.0)  # less than one particle makes no twin of anything
    return shared / np.minimum.outer(own, own)


def lonely_pairs(p: ClassWeights) -> list[tuple[int, int]]:
    """Pairs (j, k), j < k, of classes that share images with each other and hardly any with all others."""
    overlap = overlaps(p)
    np.fill_diagonal(overlap, 0)
    pairs = []
    for j, k in zip(*np.nonzero(np.triu(overlap >= PAIR_OVERLAP)), strict=True):
        others = np.delete(overlap[[j, k]], [j, k], 1)
        if (others < ALONE).all():
            pairs.append((int(j), int(k)))
    return pairs


def together(
    p: ClassWeights,
    score: Callable[[ClassWeights], tuple[np.ndarray, np.ndarray]],
) -> np.ndarray:
    """(K,) int64 group of each class: those whose images are likelier under one map of both than under two are one.

    Args:
        p: shares of N images. score: of given shares the held-out log-likelihood (N,) of each image under all its
            classes, and (K, K) the mean one of the images of a class (rows) under each class alone.
    """
    groups, tried = np.arange(p.n_classes), set()
    own, table = score(p)
    for _ in range(ROUNDS):
        pairs = nearest_pairs(table, tried)
        if not pairs:
            break
        tried.update(pairs)
        kept = np.arange(p.n_classes)
        for j, k in pairs:
            kept[k] = j
        labels = p.labels()
        gain = score(p.merged(np.unique(kept, return_inverse=True)[1]))[0] - own
        apart = [(j, k) for j, k in pairs if gain[(labels == j) | (labels == k)].sum() <= 0]
        for _, k in apart:
            kept[k] = k
        if len(apart) == len(pairs):
            continue
        onto = np.unique(kept, return_inverse=True)[1]
        p, groups = p.merged(onto), onto[groups]
        tried = {(int(onto[j]), int(onto[k])) for j, k in apart}
        own, table = score(p)
    return groups


def nearest_pairs(table: np.ndarray, tried: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pairs (j, k), j < k, of classes that lose least, and at most FAR, when the images of one go to the other.

    No class is in two pairs, and no pair is one of ``tried``.

    Args:
        table: (K, K) mean log-likelihood of the images of a class (rows) under each class; NaN: no images.
    """
    loss = np.diagonal(table)[:, None] - table
    loss = np.where(np.isfinite(loss), loss, np.inf)
    np.fill_diagonal(loss, np.inf)
    nearest = loss.argmin(1)
    order = np.argsort(loss[np.arange(len(loss)), nearest], kind="stable")
    pairs, used = [], set()
    for j in order.tolist():
        k = int(nearest[j])
        pair = (min(j, k), max(j, k))
        if loss[j, k] < FAR and not used & {j, k} and pair not in tried:
            used |= {j, k}
            pairs.append(pair)
    return pairs
