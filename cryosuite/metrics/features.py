"""Are features of images any good, without training anything on them? Neighbours' labels, collapse, effective rank."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

ROWS = 512  # images whose distances to all are held at once
PIECE = 1 << 14  # features of a million images are looked at so many at a time
SAMPLE = 50_000  # of more images, neighbours are looked for among so many of them


def knn_accuracy(z: np.ndarray, labels: np.ndarray, k: int = 10, cosine: bool = True) -> float:
    """Share of images whose label is the one most of their k nearest others have (themselves left out).

    Args:
        z: (N, d) features.
        labels: (N,) int, from 0.
        k: neighbours that vote, weighted by rank so that ties go to the nearer; 1 is the nearest alone.
        cosine: compare directions only; else Euclidean distances.

    Raises ValueError for fewer than two images or another number of labels.
    """
    if len(z) < 2 or len(z) != len(labels):
        raise ValueError(f"{len(z)} features and {len(labels)} labels: at least two of each are needed")
    x = torch.from_numpy(np.ascontiguousarray(z, np.float32))
    x = torch.nn.functional.normalize(x, dim=1) if cosine else x
    known = torch.from_numpy(np.unique(labels, return_inverse=True)[1].astype(np.int64))
    k, right = min(k, len(x) - 1), 0
    vote = 1 - 1e-3 * torch.arange(k)
    for start in range(0, len(x), ROWS):
        part = x[start : start + ROWS]
        near = part @ x.T if cosine else -torch.cdist(part, x)
        near[torch.arange(len(part)), torch.arange(start, start + len(part))] = -torch.inf
        found = known[near.topk(k, dim=1).indices]
        votes = torch.zeros(len(part), int(known.max()) + 1).scatter_add_(1, found, vote.expand(len(part), -1))
        right += int((votes.argmax(1) == known[start : start + len(part)]).sum())
    return right / len(x)


def feature_spread(z: Tensor | Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """(spread, effective rank) of features (n, c), whole or in pieces, as scalars on their device.

    spread: standard deviation of the components of the normalised features times sqrt(c): near 1 for features in all
    directions, near 0 when all images get the same one (below 0.3: collapse). Effective rank: participation ratio of
    the covariance's eigenvalues, (sum)^2 / sum of squares, from 1 to c.
    """
    first: Tensor | None = None
    for piece in z.split(PIECE) if isinstance(z, Tensor) else z:
        x = torch.nn.functional.normalize(piece.float(), dim=1)
        if first is None:
            first, count = x.mean(0), 0
            total, products = torch.zeros_like(first), torch.zeros(x.shape[1], x.shape[1], device=x.device)
        x = x - first  # relative to a mean that is nearly right: alike features would cancel
        count, total, products = count + len(x), total + x.sum(0), products + x.T @ x
    covariance = products - torch.outer(total, total) / count
    trace = covariance.diagonal().sum()
    return (trace.clamp(min=0) / (count - 1)).sqrt(), trace.square() / covariance.square().sum().clamp(min=1e-20)


def neighbour_sample(count: int) -> np.ndarray | None:
    """Rows (SAMPLE,), in order and always the same, among which neighbours are looked for in a large set; None: all.

    The time that ``knn_accuracy`` takes grows with the square of the number of images.
    """
    return np.sort(np.random.default_rng(0).choice(count, SAMPLE, replace=False)) if count > SAMPLE else None


def pixel_components(images: np.ndarray, count: int = 64) -> np.ndarray:
    """The baseline any encoder must beat: (N, count) principal components of the pixels (N, s, s)."""
    flat = torch.from_numpy(np.ascontiguousarray(images.reshape(len(images), -1), np.float32))
    flat = flat - flat.mean(0)
    count = min(count, *flat.shape)
    with torch.random.fork_rng(devices=[]):  # of the CPU alone: asking after the GPUs' would wake them all
        torch.default_generator.manual_seed(0)
        u, s, _ = torch.svd_lowrank(flat, q=min(count + 8, *flat.shape), niter=3)
    return (u * s)[:, :count].numpy()
