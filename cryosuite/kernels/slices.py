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
    "finish_reconstruction",
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
    return Accumulator(torch.zeros(2 * N + 1, 2 * N + 1, N + 1, 3, device=device, dtype=dtype), box_size, pad)


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


def finish_reconstruction(
    acc: Accumulator,
    lam: float = 1e-3,
    tau: Tensor | None = None,  # (D//2 + 1,) prior precision per shell
    gridding_iterations: int = 0,
    mask_edge: float | None = 3.0,
) -> Tensor:  # (D, D, D)
    """The volume of the inserted slices: B / (W + regulariser), inverse transform, crop, gridding correction.

    Grey values are right: projections of V without CTF give V back. The mean cannot be measured (the half disc has no
    DC) and is set so that the surroundings of the particle are zero.

    Args:
        lam: regulariser relative to the mean weight of each shell.
        tau: instead, 1 / E|F|^2 of the volume's (unpadded, unnormalised) transform at shells 0 .. D/2, in the units of
            the weights (Wiener filter; RELION's 1/tau^2).
        gridding_iterations: rounds of density compensation (Pipe & Menon 1999; RELION's default is 10), which help when
            views are few (hundreds) and leave holes between slices. Each costs two transforms of the padded box.
        mask_edge: the map falls to zero over this many pixels outside the inscribed sphere (its corners hold only
            aliasing); None keeps the corners.
    """
    D, pad = acc.box_size, acc.pad
    size = pad * D
    values, weight, squared = _uncentred(acc)
    inside = squared <= acc.radius**2
    total = weight + _regulariser(weight, squared, D, pad, lam, tau)
    if gridding_iterations > 0:
        density = _density_compensation(total, inside, D, pad, gridding_iterations)
    else:
        density = torch.where(inside & (total > 0), 1 / total, torch.zeros_like(total))
    padded = torch.fft.irfftn(values * density, s=(size, size, size))
    index = torch.arange(-(D // 2), D // 2, device=weight.device) % size
    volume = padded.index_select(0, index).index_select(1, index).index_select(2, index)
    return _soften(volume, size, mask_edge) / _gridding(D, pad, volume.device, volume.dtype)


def _uncentred(acc: Accumulator) -> tuple[Tensor, Tensor, Tensor]:
    """Values, weights and squared radius on the rfftn grid (size, size, size//2 + 1) of the padded box.

    Points with qx < 0 were inserted at -q only, so the plane x = 0 still needs the conjugates of its mates.
    """
    R, N = acc.radius, acc.data.shape[2] - 1
    axis = torch.cat([torch.arange(0, R), torch.arange(-R, 0)]).to(acc.data.device)
    data = acc.data[:, :, : R + 1].index_select(0, axis + N).index_select(1, axis + N)
    plane = acc.data[:, :, 0]
    mate = plane.flip((0, 1)) * plane.new_tensor([1.0, -1.0, 1.0])
    data[:, :, 0] = (plane + mate).index_select(0, axis + N).index_select(1, axis + N)
    squared = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2).int() + (axis.new_tensor(range(R + 1)) ** 2).int()
    return torch.complex(data[..., 0], data[..., 1]), data[..., 2].contiguous(), squared


def _regulariser(weight: Tensor, squared: Tensor, D: int, pad: int, lam: float, tau: Tensor | None) -> Tensor:
    """What is added to the weights: a share of each shell's mean, or the prior precision."""
    n = pad * D // 2
    shell = squared.to(torch.float32).sqrt_().round_().clamp_(max=n).long().reshape(-1)
    if tau is None:
        sums = torch.bincount(shell, weights=weight.reshape(-1).double(), minlength=n + 1)
        table = lam * sums / torch.bincount(shell, minlength=n + 1).clamp(min=1)
    else:
        if tau.shape != (D // 2 + 1,):
            raise ValueError(f"tau needs {D // 2 + 1} shells, not shape {tuple(tau.shape)}")
        shells = (torch.arange(n + 1, device=tau.device) / pad).round().long()
        # a padded voxel collects 1/pad^3 of the samples that a voxel of the box would
        table = tau[shells] / pad**3
    return table.to(weight)[shell].reshape(weight.shape)


def _density_compensation(total: Tensor, inside: Tensor, D: int, pad: int, iterations: int) -> Tensor:
    """Factors d with (total d) convolved with a blob = 1 inside the sphere: d <- d / blob * (total d).

    The blob is the Kaiser-Bessel window of radius 1.9 pixels, alpha 15, order 0 (Matej & Lewitt 1992), applied as its
    transform in real space.
    """
    size = pad * D
    axis = torch.fft.fftfreq(size, 1 / size, device=total.device).round().int() ** 2
    radius = torch.arange(int(axis.max()) * 3 + 1, dtype=torch.float64, device=total.device).sqrt()
    # transform of a blob of radius 1.9 pad at r/(pad D): cosh(s)/s^2 - sinh(s)/s^3, s^2 = 15^2 - (2 pi 1.9 r/D)^2
    s = (15.0**2 - (2 * torch.pi * 1.9 / D * radius) ** 2).clamp(min=1e-3).sqrt()
    blob = torch.cosh(s) / s**2 - torch.sinh(s) / s**3
    table = (blob / blob[0]).to(total.dtype)
    window = table[(axis[:, None, None] + axis[None, :, None] + axis).long()]
    mean = total[inside].mean().clamp(min=torch.finfo(total.dtype).tiny)
    density = inside.to(total.dtype)
    for _ in range(iterations):
        spread = torch.fft.irfftn(torch.complex(total * density / mean, torch.zeros_like(total)), s=(size,) * 3)
        density = density / torch.fft.rfftn(spread * window).abs().clamp(min=1e-6)
    return density / mean


def _soften(volume: Tensor, size: int, mask_edge: float | None) -> Tensor:
    """Set the surroundings to zero: subtract their mean (the padded box, having no DC, sums to 0), mask corners."""
    D = volume.shape[-1]
    axis = torch.arange(-(D // 2), D // 2, device=volume.device, dtype=volume.dtype) ** 2
    radius = (axis[:, None, None] + axis[None, :, None] + axis).sqrt()
    sphere = radius <= D // 2
    background = -volume[sphere].double().sum() / (size**3 - int(sphere.sum()))
    volume = volume - background.to(volume.dtype)
    if mask_edge is None:
        return volume
    edge = ((radius - D // 2) / max(mask_edge, 1e-6)).clamp(0, 1)
    return volume * (0.5 + 0.5 * torch.cos(torch.pi * edge))
