"""From weight tokens to a latent per particle and back: pooling, PCA, and a bank of averaged tokens.

The latent of a particle is what its weight tokens tell each layer, averaged over the groups and reduced to 64 numbers
by PCA. Pooling cannot be undone, so volumes at a latent z come from the tokens of the particles nearest to z: read from
their images where the stack is at hand, else from a bank of averaged tokens that is written with every epoch kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryosuite.training.checkpoint import FORMAT, load_state, save_state

if TYPE_CHECKING:
    from cryosuite.data.particles import ParticleSet

COMPONENTS = 64
FIT_ROWS = 16384  # rows the principal axes are found from; more do not change them
NEAREST = 3  # bank entries averaged for one volume

TokenReader = Callable[[np.ndarray], Iterator[tuple[np.ndarray, Tensor]]]  # sorted rows -> (rows, tokens (b, t, dim))


@dataclass
class LatentSpace:
    """The principal axes of the pooled scales, and the bank.

    mean (d,), components (k, d), variances (k,): z = (pooled - mean) @ components.T. bank_z (n, k): centres;
    bank_tokens (n, t, dim) float16: the mean tokens of the particles around each.
    """

    mean: Tensor
    components: Tensor
    variances: Tensor
    bank_z: Tensor
    bank_tokens: Tensor

    def project(self, pooled: Tensor) -> Tensor:  # (b, d) -> (b, k)
        """Latents of pooled tokens, float32."""
        return (pooled.float() - self.mean.to(pooled.device)) @ self.components.T.to(pooled.device)

    def tokens_at(self, z: Tensor) -> Tensor:  # (n, k) -> (n, t, dim)
        """Kernel-weighted mean of the bank entries nearest to each z; Gaussian, as wide as the nearest is far."""
        distance = torch.cdist(z.float(), self.bank_z.to(z.device))
        near, index = distance.topk(min(NEAREST, distance.shape[1]), largest=False)
        width = near.mean(1, keepdim=True).clamp_min(1e-12)
        weight = torch.softmax(-0.5 * (near / width).square() * 4, dim=1)
        return torch.einsum("nm,nmtd->ntd", weight, self.bank_tokens.to(z.device)[index].float())

    def save(self, path: Path) -> None:
        """Write atomically."""
        save_state(path, {"format": FORMAT, **asdict(self)})

    @staticmethod
    def load(path: Path) -> LatentSpace:
        """Read what ``save`` wrote; InputError for a missing or damaged file."""
        state = load_state(path, "the latent space of a run")
        return LatentSpace(**{name: state[name] for name in LatentSpace.__dataclass_fields__})


def principal_axes(pooled: np.ndarray, components: int = COMPONENTS) -> LatentSpace:
    """PCA of pooled tokens (n, d), float64 inside; each axis points where its largest entry is positive. Rows that are
    NaN (of broken images) are left out."""
    pooled = _finite(pooled)
    mean = pooled.mean(0, dtype=np.float64)
    centred = pooled - mean
    covariance = centred.T @ centred / max(len(pooled) - 1, 1)
    values, vectors = np.linalg.eigh(covariance)
    k = min(components, len(values))
    axes = vectors[:, ::-1][:, :k].T
    axes *= np.sign(axes[np.arange(k), np.abs(axes).argmax(1)])[:, None]
    return LatentSpace(
        mean=_float(mean),
        components=_float(axes),
        variances=_float(values[::-1][:k].clip(min=0)),
        bank_z=torch.zeros(0, k),
        bank_tokens=torch.zeros(0, 0, 0, dtype=torch.float16),
    )


def _finite(rows: np.ndarray) -> np.ndarray:
    """The rows (n, d) that are numbers throughout."""
    return rows[np.isfinite(rows).all(1)]


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def nearest_rows(z: np.ndarray, targets: np.ndarray, k: int, chunk: int = 64) -> np.ndarray:
    """Rows of z (n, d) nearest to each target (m, d), exact, nearest first: (m, k). Rows with NaN (of broken
    images) are near to nothing: where fewer than k are left, so many."""
    cloud = torch.from_numpy(np.ascontiguousarray(z, np.float32))
    k = min(k, int(cloud.isfinite().all(1).sum()))
    found = []
    for part in torch.from_numpy(np.ascontiguousarray(targets, np.float32)).split(chunk):
        found.append(torch.cdist(part, cloud).nan_to_num(nan=torch.inf).topk(k, largest=False).indices)
    return torch.cat(found).numpy()


def centres(z: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """k-means centres of z (n, d) with at most ``count`` clusters, from at most FIT_ROWS rows without NaN: (m, d)."""
    from sklearn.cluster import MiniBatchKMeans

    z = _finite(z)
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(z), min(len(z), FIT_ROWS), replace=False)
    count = max(1, min(count, len(rows) // 4))
    return MiniBatchKMeans(count, n_init=1, random_state=seed, batch_size=4096).fit(z[rows]).cluster_centers_


def mean_tokens(groups: list[np.ndarray], read: TokenReader) -> Tensor:
    """Mean weight tokens (m, t, dim) float32 of m groups of rows, every image read once."""
    rows = np.unique(np.concatenate(groups))
    owners: dict[int, list[int]] = {}
    for number, group in enumerate(groups):
        for row in group:
            owners.setdefault(int(row), []).append(number)
    total: Tensor | None = None
    for found, tokens in read(rows):
        if total is None:
            total = torch.zeros(len(groups), *tokens.shape[1:])
        pairs = [(number, i) for i, row in enumerate(found) for number in owners[int(row)]]
        number, source = torch.tensor(pairs).T
        total.index_add_(0, number, tokens.float().cpu()[source])
    sizes = torch.tensor([len(group) for group in groups])
    return total / sizes[:, None, None]


class TokensFromImages:
    """Weight tokens at a latent z, from the images of the particles there: better than the bank, needs the stack.

    Args:
        z: (N, k) latents of all particles.
        read: gives the tokens of rows.
        volume_from: "knn" averages the ``knn`` nearest particles, "image" takes the nearest alone, "cluster" all
            (at most 500) particles of the k-means cluster that z lies in.
    """

    def __init__(self, z: np.ndarray, read: TokenReader, volume_from: str, knn: int, clusters: int = 20) -> None:
        self.z, self.read, self.volume_from, self.knn = np.asarray(z, np.float32), read, volume_from, knn
        self.clusters, self._members = clusters, None

    def __call__(self, z: Tensor) -> Tensor:  # (n, k) -> (n, t, dim)
        """Mean tokens at each z."""
        points = z.detach().float().cpu().numpy()
        if self.volume_from == "cluster":
            groups = [self._cluster(point) for point in points]
        else:
            groups = list(nearest_rows(self.z, points, self.knn if self.volume_from == "knn" else 1))
        return mean_tokens(groups, self.read)

    def _cluster(self, point: np.ndarray) -> np.ndarray:
        if self._members is None:
            middle = centres(self.z, self.clusters)
            member = np.where(np.isfinite(self.z).all(1), nearest_rows(middle, self.z, 1)[:, 0], -1)
            self._middle, self._members = middle, member
        rows = np.flatnonzero(self._members == nearest_rows(self._middle, point[None], 1)[0, 0])
        return np.random.default_rng(0).permutation(rows)[:500]


def build_bank(space: LatentSpace, z: np.ndarray, read: TokenReader, size: int, knn: int) -> None:
    """Fill the bank: k-means representatives of z, each the mean tokens of the ``knn`` particles nearest to it."""
    middle = centres(z, size)
    groups = list(nearest_rows(z, middle, knn))
    space.bank_z = _float(np.stack([z[group].mean(0) for group in groups]))
    space.bank_tokens = mean_tokens(groups, read).half()


def subset_rows(particles: ParticleSet, seed: int = 0) -> np.ndarray:
    """Sorted rows from which the principal axes are found."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(len(particles), min(len(particles), FIT_ROWS), replace=False))
