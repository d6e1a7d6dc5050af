"""Central slices of a volume's Fourier transform and their adjoint, insertion: the heart of reconstruction.

A slice of rotation R samples the transform at `(kx, ky, 0) @ R` (projection-slice theorem; Bracewell 1956). The volume
is padded (factor 2) so that trilinear interpolation is accurate, and what interpolation does to it in real space, a
multiplication by sinc^2 along each axis, is divided out before (extraction) or after (reconstruction).

Layout (opaque to callers): only x >= 0 is stored, a point q with qx < 0 is read at -q and conjugated. The grid holds
z and y from -N to N and x from 0 to N with N = pad D/2 + 1, as real numbers interleaved per voxel: (re, im) in a
transform, (re, im, weight) in an accumulator, so that the two x-neighbours of a corner share a cache line.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import slices_cpu
from .fourier import HalfDisc

__all__ = [
    "Accumulator",
    "volume_transform",
    "extract_slices",
    "new_accumulator",
    "insert_slices",
]


@dataclass
class Accumulator:
    """Sums of a reconstruction: data (2N+1, 2N+1, N+1, 3) real = (re, im, weight) per voxel of the padded half grid."""

    data: Tensor
    box_size: int
    pad: int

    @property
    def radius(self) -> int:
        """Largest radius N - 1 = pad D/2 that slices reach, in padded Fourier pixels."""
        return self.pad * self.box_size // 2

    def __add__(self, other: Accumulator) -> Accumulator:
        """The sums of both sets of images (two halves make the whole)."""
        if (self.box_size, self.pad) != (other.box_size, other.pad):
            raise ValueError("only accumulators of one box size and padding can be added")
        return Accumulator(self.data + other.data, self.box_size, self.pad)


def volume_transform(
    volume: Tensor,  # (..., D, D, D)
    pad: int = 2,
    correct_gridding: bool = True,
) -> Tensor:  # (..., 2N+1, 2N+1, N+1, 2) real, N = pad D/2 + 1
    """Padded half transform of volumes, for `extract_slices`. Differentiable.

    With `correct_gridding` the volume is first divided by the sinc^2 that trilinear interpolation will multiply it by.
    """
    D = volume.shape[-1]
    if D % 2 or volume.shape[-3:] != (D, D, D):
        raise ValueError(f"a cubic volume with an even box is needed, not {tuple(volume.shape)}")
    if correct_gridding:
        volume = volume / _gridding(D, pad, volume.device, volume.dtype)
    size = pad * D
    before = size // 2 - D // 2
    half = torch.fft.rfftn(F.pad(volume, (before, size - D - before) * 3), dim=(-3, -2, -1))
    N = size // 2 + 1
    axis = torch.arange(-N, N + 1, device=volume.device)
    column = torch.arange(0, N + 1, device=volume.device)
    # index N = size/2 + 1 lies beyond Nyquist; it is only ever read with weight zero, so its column may hold anything
    half = half.index_select(-3, axis % size).index_select(-2, axis % size).index_select(-1, column.clamp(max=N - 1))
    sign = _alternate(axis, volume.dtype)
    signs = sign[:, None, None] * sign[None, :, None] * _alternate(column, volume.dtype)
    return torch.view_as_real(half * signs)


def _alternate(index: Tensor, dtype: torch.dtype) -> Tensor:
    """(-1)^index: moves the origin from the corner to the centre of the box."""
    return (1 - 2 * (index % 2)).to(dtype)


def _gridding(box_size: int, pad: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(D, D, D): product over axes of sinc^2(x / (pad D)), the transform of the trilinear kernel."""
    axis = torch.arange(-(box_size // 2), box_size - box_size // 2, device=device, dtype=torch.float64)
    kernel = (torch.sinc(axis / (pad * box_size)) ** 2).to(dtype)
    return kernel[:, None, None] * kernel[None, :, None] * kernel


def extract_slices(
    transform: Tensor,  # (2N+1, 2N+1, N+1, 2) or (k, ...) of volume_transform
    rotation: Tensor,  # (b, 3, 3)
    disc: HalfDisc,
    pad: int = 2,
    volume_index: Tensor | None = None,  # (b,) which of k volumes each slice is taken from
) -> Tensor:  # (b, P) complex
    """Fourier slices of volumes, i.e. transforms of projections, unnormalised like `to_half_disc`.

    Differentiable in volume and rotation. Without gradients on the CPU compiled loops do the work. `rotation` may hold
    anisotropic magnification (`aberrations.magnified_rotation`); frequencies beyond Nyquist read zero.
    """
    n, nx = transform.shape[-4], transform.shape[-2]
    _check_reach(disc, pad, nx)
    if volume_index is None and transform.ndim == 5 and transform.shape[0] != 1:
        raise ValueError("several volumes: say by volume_index which one each slice is taken from")
    rotation = rotation.to(transform.dtype)
    if _use_loops(transform, rotation):
        which = torch.zeros(rotation.shape[0], dtype=torch.int64) if volume_index is None else volume_index.long()
        stack = transform.reshape(-1, *transform.shape[-4:])
        if which.numel() and not (int(which.min()) >= 0 and int(which.max()) < stack.shape[0]):
            raise ValueError(f"volume_index must lie between 0 and {stack.shape[0] - 1}")
        arrays = [v.contiguous().numpy() for v in (stack, which, disc.xy, rotation)]
        return torch.view_as_complex(torch.from_numpy(slices_cpu.extract(*arrays, pad)))
    corners, weights, conjugate = _corners(rotation, disc, pad, nx - 1)
    flat = transform.reshape(-1, 2)
    if volume_index is not None:
        corners = corners + (volume_index.to(corners.device) * (n * n * nx))[:, None, None]
    values = (flat[corners.reshape(-1)].reshape(*corners.shape, 2) * weights[..., None]).sum(-2)
    real, imag = values.unbind(-1)
    return torch.complex(real, imag * conjugate)


def _use_loops(*tensors: Tensor) -> bool:
    """Compiled loops serve plain CPU tensors; torch does what needs a GPU or gradients."""
    if any(t.device.type != "cpu" for t in tensors):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)) and slices_cpu.available()


def _check_reach(disc: HalfDisc, pad: int, columns: int) -> None:
    if disc.r_max * pad > columns - 2:
        raise ValueError(f"a disc of radius {disc.r_max} does not fit a transform of radius {(columns - 2) // pad}")


def _corners(rotation: Tensor, disc: HalfDisc, pad: int, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """Voxels and weights of trilinear interpolation: (b, P, 8) int64, (b, P, 8), and (b, P) -1 where conjugated."""
    plane = disc.xy.to(rotation.dtype) * pad
    with torch.autocast(rotation.device.type, enabled=False):  # frequencies keep their digits
        q = plane @ rotation[..., :2, :]  # (b, P, 3) as x, y, z
    inside = (q.detach() ** 2).sum(-1, keepdim=True) <= (N - 1 + 0.01) ** 2
    q = torch.where(inside, q, torch.zeros_like(q))
    conjugate = torch.where(q[..., 0] < 0, -1.0, 1.0).to(rotation.dtype)
    q = q * conjugate[..., None]
    low = torch.floor(q.detach())
    fx, fy, fz = (q - low).unbind(-1)
    n, nx = 2 * N + 1, N + 1
    base = low.long()
    start = ((base[..., 2] + N) * n + base[..., 1] + N) * nx + base[..., 0]
    corners, weights = [], []
    for dz, wz in ((0, 1 - fz), (1, fz)):
        for dy, wy in ((0, 1 - fy), (1, fy)):
            for dx, wx in ((0, 1 - fx), (1, fx)):
                corners.append(start + ((dz * n + dy) * nx + dx))
                weights.append(wz * wy * wx)
    return torch.stack(corners, -1), torch.stack(weights, -1) * inside, conjugate


def new_accumulator(
    box_size: int, pad: int = 2, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Accumulator:
    """An empty reconstruction of an even box."""
    if box_size % 2:
        raise ValueError(f"the box size must be even, not {box_size}")
    N = pad * box_size // 2 + 1
    return Accumulator(wide_zeros((2 * N + 1, 2 * N + 1, N + 1, 3), device, dtype), box_size, pad)


def wide_zeros(shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros for sums that slices touch in no order: numpy asks the system for large pages, torch does not."""
    if torch.device(device).type == "cpu" and dtype == torch.float32:
        return torch.from_numpy(np.zeros(shape, np.float32))
    return torch.zeros(shape, device=device, dtype=dtype)


def insert_slices(
    acc: Accumulator,
    values: Tensor,  # (b, P) complex
    weights: Tensor,  # (b, P) real
    rotation: Tensor,  # (b, 3, 3)
    disc: HalfDisc,
) -> Accumulator:
    """Add slices to a reconstruction, in place: the exact adjoint of `extract_slices`, for values and weights at once.

    For images y = CTF * slice + noise of variance sigma^2, values = CTF y / sigma^2 and weights = CTF^2 / sigma^2.
    Returns the accumulator.
    """
    nx = acc.data.shape[2]
    _check_reach(disc, acc.pad, nx)
    dtype = acc.data.dtype
    rotation, weights = rotation.detach().to(dtype), weights.detach().to(dtype)
    values = torch.view_as_real(values.detach().resolve_conj()).to(dtype)
    if _use_loops(acc.data, values, weights, rotation):
        if weights.shape != values.shape[:2] or values.shape[:2] != (rotation.shape[0], len(disc)):
            raise ValueError(f"values {tuple(values.shape[:2])}, weights {tuple(weights.shape)}, disc of {len(disc)}")
        arrays = [v.contiguous().numpy() for v in (values, weights, disc.xy, rotation)]
        slices_cpu.insert(acc.data.numpy(), *arrays, acc.pad)
        return acc
    corners, shares, conjugate = _corners(rotation, disc, acc.pad, nx - 1)
    point = torch.stack([values[..., 0], values[..., 1] * conjugate, weights], -1)
    rows = (shares[..., None] * point[..., None, :]).reshape(-1, 3)
    acc.data.view(-1, 3).index_add_(0, corners.reshape(-1), rows)
    return acc
