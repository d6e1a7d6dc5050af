"""Slices of many volumes at once: what an image says about each of K classes, and its insertion into them by shares.

For an image y = C S_k + noise of variance sigma^2 on the half disc, with values v = C y / sigma^2 and weights
w = C^2 / sigma^2 (the operands of `slices.insert_slices`), the sums over the whole disc

    h_k = 2 Re sum_p conj(S_k) v,    g_k = 2 sum_p w |S_k|^2

give the log-likelihood h_k - g_k / 2 and the cosine h_k / sqrt(n g_k), n = 2 sum |y|^2 / sigma^2. All K come from one
gather per point; slices are not stored. `insert_classes` is the adjoint: each image goes into the classes it has a
share in, sum_i p_ik v_i and sum_i p_ik w_i on the padded grid of class k.

Layout: the half grid of `slices` (pad 2, x >= 0, N = pad r_max + 1), cut to the radius in use. In transforms the K real
parts of a voxel lie side by side, then the K imaginary ones; accumulators hold one class after the other, since an
image goes into few of them. A transform takes 8 K and an accumulator 12 K bytes per voxel, about 4 N^3 voxels.
"""

from __future__ import annotations

import math
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import class_slices_cpu
from .fourier import HalfDisc
from .slices import wide_zeros

__all__ = [
    "ClassTransforms",
    "ClassAccumulator",
    "class_transforms",
    "class_sums",
    "class_gram",
    "new_class_accumulator",
    "insert_classes",
    "disc_power",
    "padded_origin",
    "grid_bytes",
]

CHUNK = 1 << 25  # values gathered at once without compiled loops


@dataclass
class ClassTransforms:
    """Padded half transforms of K volumes: data (2N+1, 2N+1, N+1, 2, K) float32."""

    data: Tensor
    r_max: int
    pad: int

    @property
    def n_classes(self) -> int:
        """K."""
        return self.data.shape[-1]


@dataclass
class ClassAccumulator:
    """Sums of K reconstructions: data (K, 2N+1, 2N+1, N+1, 3) float32 = (re, im, weight) per voxel."""

    data: Tensor
    r_max: int
    pad: int

    @property
    def n_classes(self) -> int:
        """K."""
        return self.data.shape[0]


def grid_bytes(r_max: int, pad: int = 2) -> int:
    """Bytes per class of a transform and an accumulator together."""
    N = pad * r_max + 1
    return (2 * N + 1) ** 2 * (N + 1) * 4 * (2 + 3)


def class_transforms(
    volumes: Tensor,  # (K, D, D, D)
    r_max: int | None = None,
    pad: int = 2,
) -> ClassTransforms:
    """Transforms of K volumes up to radius r_max (default D/2), ready for `class_sums`; gridding is corrected.

    The volume is padded axis by axis, so that lines of zeros are never transformed.
    """
    D = volumes.shape[-1]
    r_max = D // 2 if r_max is None else r_max
    if D % 2 or volumes.shape[1:] != (D, D, D) or not 1 <= r_max <= D // 2:
        raise ValueError(f"K cubic volumes with an even box and a radius up to half of it are needed, not {D}, {r_max}")
    device, size, N = volumes.device, pad * D, pad * r_max + 1
    axis = torch.arange(-N, N + 1, device=device)
    column = torch.arange(N + 1, device=device)
    data = wide_zeros((2 * N + 1, 2 * N + 1, N + 1, 2, len(volumes)), device)
    kernel = torch.sinc((torch.arange(D, device=device, dtype=torch.float64) - D // 2) / size).square().float()
    for k, volume in enumerate(volumes):
        values = volume.float() / (kernel[:, None, None] * kernel[None, :, None] * kernel)
        half = torch.fft.rfft(values, n=size, dim=2)[:, :, column.clamp(max=size // 2)] * padded_origin(column, pad)
        half = torch.fft.fft(half, n=size, dim=1)[:, axis % size] * padded_origin(axis, pad)[:, None]
        half = torch.fft.fft(half, n=size, dim=0)[axis % size] * padded_origin(axis, pad)[:, None, None]
        data[..., 0, k], data[..., 1, k] = half.real, half.imag
    return ClassTransforms(data, r_max, pad)


def padded_origin(index: Tensor, pad: int) -> Tensor:
    """exp(i pi k / pad): moves the origin from the first voxel of a D-box to voxel D//2, in padded Fourier pixels."""
    angle = (index.double() % (2 * pad)) * (math.pi / pad)
    return torch.complex(torch.cos(angle), torch.sin(angle)).to(torch.complex64)


def new_class_accumulator(
    n_classes: int, r_max: int, pad: int = 2, device: torch.device | str = "cpu"
) -> ClassAccumulator:
    """Empty reconstructions of K classes up to radius r_max."""
    N = pad * r_max + 1
    return ClassAccumulator(wide_zeros((n_classes, 2 * N + 1, 2 * N + 1, N + 1, 3), device), r_max, pad)


def class_sums(
    transforms: ClassTransforms,
    values: Tensor,  # (b, P) complex, C y / sigma^2
    weights: Tensor,  # (b, P) real, C^2 / sigma^2
    rotation: Tensor,  # (b, 3, 3)
    disc: HalfDisc,
    pool: Executor | None = None,
    threads: int = 1,
) -> tuple[Tensor, Tensor]:  # (b, K), (b, K) float64
    """h and g of every image with every class (see the module). No gradients.

    With ``pool`` the images are shared among ``threads`` threads (CPU); the result does not depend on their number.
    Points beyond the radius of the transforms read zero, as in `slices`.
    """
    _check(transforms, disc)
    shape = (len(rotation), transforms.n_classes)
    values, weights, rotation = _operands(values, weights, rotation, disc)
    if transforms.data.device.type != "cpu" or not class_slices_cpu.available():
        return _sums_torch(transforms, values, weights, rotation, disc)
    h, g = np.empty(shape), np.empty((shape[0], 1, shape[1]))
    data, arrays = transforms.data.numpy(), [v.numpy() for v in (values, weights, rotation)]
    xy = disc.xy.numpy()

    def part(begin: int, end: int) -> None:
        v, w, R = (array[begin:end] for array in arrays)
        class_slices_cpu.sums(data, v, w, xy, R, transforms.pad, h[begin:end], g[begin:end])

    _share(part, shape[0], pool, threads)
    return torch.from_numpy(h), torch.from_numpy(g[:, 0])


def class_gram(
    transforms: ClassTransforms,
    values: Tensor,  # (b, P) complex, C y / sigma^2
    weights: Tensor,  # (b, P) real, C^2 / sigma^2
    rotation: Tensor,  # (b, 3, 3)
    disc: HalfDisc,
    pool: Executor | None = None,
    threads: int = 1,
) -> tuple[Tensor, Tensor]:  # (b, K, K), (b, K) float64
    """G_jk = 2 Re sum_p w conj(S_j) S_k and h_k = 2 Re sum_p conj(S_k) v: the system of a mixture of the K volumes."""
    _check(transforms, disc)
    K, b = transforms.n_classes, len(rotation)
    values, weights, rotation = _operands(values, weights, rotation, disc)
    if transforms.data.device.type != "cpu" or not class_slices_cpu.available():
        return _gram_torch(transforms, values, weights, rotation, disc)
    G, h = np.empty((b, K, K)), np.empty((b, K))
    data, arrays = transforms.data.numpy(), [v.numpy() for v in (values, weights, rotation)]
    xy = disc.xy.numpy()

    def part(begin: int, end: int) -> None:
        v, w, R = (array[begin:end] for array in arrays)
        class_slices_cpu.sums(data, v, w, xy, R, transforms.pad, h[begin:end], G[begin:end])

    _share(part, b, pool, threads)
    return torch.from_numpy(G), torch.from_numpy(h)


def insert_classes(
    acc: ClassAccumulator,
    values: Tensor,  # (b, P) complex
    weights: Tensor,  # (b, P) real
    rows: tuple[Tensor, Tensor, Tensor],  # shares (nnz,), classes (nnz,) ascending in a row, row starts (b + 1,)
    rotation: Tensor,  # (b, 3, 3)
    disc: HalfDisc,
    pool: Executor | None = None,
    threads: int = 1,
) -> ClassAccumulator:
    """Add every image to the classes it has a share in, in place: the exact adjoint of slicing, for values and weights.

    With ``pool`` the classes are shared among threads, each class summed in the order of the images.
    """
    _check(acc, disc)
    values, weights, rotation = _operands(values, weights, rotation, disc)
    shares, classes, starts = rows
    if len(classes) and not (int(classes.min()) >= 0 and int(classes.max()) < acc.n_classes):
        raise ValueError(f"classes must lie between 0 and {acc.n_classes - 1}")
    if acc.data.device.type != "cpu" or not class_slices_cpu.available():
        return _insert_torch(acc, values, weights, (shares, classes, starts), rotation, disc)
    table = [np.ascontiguousarray(v.numpy(), t) for v, t in zip(rows, (np.float32, np.int32, np.int64), strict=True)]
    arrays = [v.numpy() for v in (values, weights, disc.xy, rotation)]
    data = acc.data.numpy()
    _share(
        lambda first, last: class_slices_cpu.insert(data, *arrays, acc.pad, *table, first, last),
        acc.n_classes, pool, threads,
    )  # fmt: skip
    return acc


def disc_power(
    values: Tensor,  # (b, P) complex
    weights: Tensor,  # (b, P)
) -> Tensor:  # (b,) float64
    """n = 2 sum |y|^2 / sigma^2 of the images, from v and w: |v|^2 / w, zero where the CTF is."""
    square = values.real.square() + values.imag.square()
    return 2 * torch.where(weights > 0, square / weights.clamp_min(1e-30), 0).sum(1, dtype=torch.float64)


def _operands(values: Tensor, weights: Tensor, rotation: Tensor, disc: HalfDisc) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous float32 (b, P, 2), (b, P), (b, 3, 3); ValueError where the shapes do not fit."""
    if not values.shape == weights.shape == (len(rotation), len(disc)):
        raise ValueError(
            f"values {tuple(values.shape)}, weights {tuple(weights.shape)} and {len(rotation)} rotations "
            f"do not fit a disc of {len(disc)} points"
        )
    values = torch.view_as_real(values.detach().resolve_conj().to(torch.complex64))
    return values.contiguous(), weights.detach().float().contiguous(), rotation.detach().float().contiguous()


def _share(work, count: int, pool: Executor | None, threads: int) -> None:
    """Run ``work(begin, end)`` over 0 .. count in equal parts, one per thread."""
    threads = min(threads, count) if pool is not None else 1
    if threads <= 1:
        work(0, count)
        return
    edges = [count * i // threads for i in range(threads + 1)]
    for task in [pool.submit(work, a, b) for a, b in zip(edges, edges[1:], strict=False)]:
        task.result()


def _check(grid: ClassTransforms | ClassAccumulator, disc: HalfDisc) -> None:
    if disc.r_max > grid.r_max:
        raise ValueError(f"a disc of radius {disc.r_max} does not fit transforms of radius {grid.r_max}")


def _corners(rotation: Tensor, xy: Tensor, pad: int, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """Voxels (b, P, 8) int64, trilinear weights (b, P, 8), zero beyond the radius, (b, P) -1 where conjugated."""
    q = (xy.to(rotation.dtype) * pad) @ rotation[:, :2]
    inside = q.square().sum(-1, keepdim=True) <= (N - 1 + 0.01) ** 2
    q = torch.where(inside, q, 0)
    conjugate = torch.where(q[..., 0] < 0, -1.0, 1.0).to(q)
    q = q * conjugate[..., None]
    low = q.floor()
    f, low = q - low, low.long()
    n, nx = 2 * N + 1, N + 1
    step = torch.tensor([[dx, dy, dz] for dz in (0, 1) for dy in (0, 1) for dx in (0, 1)], device=q.device)
    weight = torch.where(step.bool(), f[..., None, :], 1 - f[..., None, :]).prod(-1) * inside
    place = ((low[..., 2] + N) * n + low[..., 1] + N) * nx + low[..., 0]
    return place[..., None] + (step[:, 2] * n + step[:, 1]) * nx + step[:, 0], weight, conjugate


def _sums_torch(transforms, values, weights, rotation, disc):
    """`class_sums` by torch, in chunks of points: for the GPU, and where numba is missing."""
    K, N = transforms.n_classes, transforms.data.shape[2] - 1
    table = transforms.data.view(-1, 2 * K)
    h, g = (torch.zeros(len(rotation), K, dtype=torch.float64, device=table.device) for _ in range(2))
    for points, real, imag in _slices_torch(table, rotation, disc, transforms.pad, N):
        v = values[:, points]
        h += 2 * (torch.einsum("bpk,bp->bk", real, v[..., 0]) + torch.einsum("bpk,bp->bk", imag, v[..., 1]))
        g += 2 * torch.einsum("bpk,bp->bk", real.square().add_(imag.square()), weights[:, points])
    return h, g


def _gram_torch(transforms, values, weights, rotation, disc):
    """`class_gram` by torch."""
    K, N, b = transforms.n_classes, transforms.data.shape[2] - 1, len(rotation)
    table = transforms.data.view(-1, 2 * K)
    G, h = (torch.zeros(b, *shape, dtype=torch.float64, device=table.device) for shape in ((K, K), (K,)))
    for points, real, imag in _slices_torch(table, rotation, disc, transforms.pad, N):
        v, w = values[:, points], weights[:, points, None]
        h += 2 * (torch.einsum("bpk,bp->bk", real, v[..., 0]) + torch.einsum("bpk,bp->bk", imag, v[..., 1]))
        G += 2 * (real.transpose(1, 2) @ (real * w) + imag.transpose(1, 2) @ (imag * w))
    return G, h


def _slices_torch(table: Tensor, rotation: Tensor, disc: HalfDisc, pad: int, N: int):
    """Points and the real and imaginary parts (b, points, K) of the slices there, piece by piece."""
    K, xy = table.shape[1] // 2, disc.xy.to(table.device)
    step = max(1, CHUNK // (2 * K * max(1, len(rotation))))
    for begin in range(0, len(disc), step):
        points = slice(begin, begin + step)
        corners, share, conjugate = _corners(rotation, xy[points], pad, N)
        part = torch.zeros(*conjugate.shape, 2 * K, device=table.device)
        for corner in range(8):
            part.addcmul_(table[corners[..., corner]], share[..., corner, None])
        yield points, part[..., :K], part[..., K:] * conjugate[..., None]


def _insert_torch(acc, values, weights, rows, rotation, disc):
    """`insert_classes` by torch: one scattered sum per chunk of (image, class) pairs."""
    shares, classes, starts = (v.to(acc.data.device) for v in rows)
    N, voxels = acc.data.shape[3] - 1, acc.data[0].numel() // 3
    image = torch.repeat_interleave(torch.arange(len(rotation), device=shares.device), starts.diff())
    flat, xy = acc.data.view(-1, 3), disc.xy.to(shares.device)
    step = max(1, CHUNK // (24 * len(disc)))
    for begin in range(0, len(image), step):
        i, k, p = (v[begin : begin + step] for v in (image, classes, shares))
        corners, share, conjugate = _corners(rotation[i], xy, acc.pad, N)
        v = values[i]
        point = torch.stack([v[..., 0], v[..., 1] * conjugate, weights[i]], -1)
        amount = (share * p.float()[:, None, None])[..., None] * point[..., None, :]
        flat.index_add_(0, (corners + (k.long() * voxels)[:, None, None]).reshape(-1), amount.reshape(-1, 3))
    return acc
