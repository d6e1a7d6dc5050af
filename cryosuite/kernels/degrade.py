"""What maps are spoilt by: filters, anisotropy, uneven blur, and the noise of half maps. Batched, on the device.

Maps are (b, z, y, x) with one voxel size for the batch, any box. All randomness comes from one ``torch.Generator`` on
the maps' device, so a seed is a map. Fourier space is the half grid of ``rfftn``; s is in cycles per A. How much of
each a map gets is drawn in ``simulate.map_volume``.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from cryosuite.kernels.shells import radial_mean

__all__ = [
    "frequencies",
    "soft_lowpass",
    "anisotropy_gain",
    "random_spd",
    "smooth_field",
    "model_fsc",
    "coloured_noise",
    "hill",
]

DIMS = (-3, -2, -1)
EDGE = 5  # shells of the low-pass filter's cosine
FSC_FLOOR = 0.02  # noise is never stronger than signals of this correlation would leave it

Shape = tuple[int, int, int]


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _axes(shape: Shape, voxel_size: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    z, y = (torch.fft.fftfreq(n, voxel_size, device=device, dtype=dtype) for n in shape[:2])
    x = torch.fft.rfftfreq(shape[2], voxel_size, device=device, dtype=dtype)
    return z[:, None, None], y[None, :, None], x[None, None, :]


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)
def _shells(shape: Shape, device: torch.device) -> Tensor:
    """Index of the shell, as wide as 1 / longest side, of every point of the half grid, int64. Do not write to it."""
    return (sum(axis * axis for axis in _axes(shape, 1.0, device, torch.float64)).sqrt() * max(shape)).round().long()


def frequencies(like: Tensor, voxel_size: float) -> tuple[Tensor, Tensor, Tensor]:
    """sz, sy, sx of the half grid of maps (..., z, y, x), cycles per A, each broadcastable. Do not write to them."""
    return _axes(tuple(like.shape[-3:]), float(voxel_size), like.device, like.dtype)


def _squared(like: Tensor, voxel_size: float) -> Tensor:
    z, y, x = frequencies(like, voxel_size)
    return z * z + y * y + x * x


def _filtered(maps: Tensor, gain: Tensor) -> Tensor:
    return torch.fft.irfftn(torch.fft.rfftn(maps, dim=DIMS) * gain, s=maps.shape[-3:], dim=DIMS)


def _column(value: float | Tensor, like: Tensor) -> Tensor:
    """A number, or one per map (b,), so that it broadcasts against (b, z, y, x)."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(-1, 1, 1, 1)


def lowpass_gain(like: Tensor, voxel_size: float, resolution: float | Tensor, edge: int = EDGE) -> Tensor:
    """Gain of ``soft_lowpass`` on the half grid, (b or 1, z, y, x//2 + 1)."""
    shell = 1.0 / (max(like.shape[-3:]) * voxel_size)
    beyond = (_squared(like, voxel_size).sqrt() - 1.0 / _column(resolution, like)) / (edge * shell)
    return 0.5 - 0.5 * torch.cos(math.pi * (0.5 - beyond).clamp(0, 1))


def soft_lowpass(
    maps: Tensor,  # (b, z, y, x)
    voxel_size: float,  # A
    resolution: float | Tensor,  # A, one or (b,)
    edge: int = EDGE,  # shells
) -> Tensor:
    """Low-pass filter with a cosine edge of ``edge`` shells (1 / longest side), half way at 1 / resolution."""
    return _filtered(maps, lowpass_gain(maps, voxel_size, resolution, edge))


def anisotropy_gain(like: Tensor, voxel_size: float, tensor: Tensor) -> Tensor:
    """exp(-s^T M s / 4) on the half grid for M (b, 3, 3) in A^2, axes x y z."""
    sz, sy, sx = frequencies(like, voxel_size)
    axes = (sx, sy, sz)
    total = sum(
        tensor[:, i, j].reshape(-1, 1, 1, 1) * ((1 if i == j else 2) * axes[i] * axes[j])
        for i in range(3)
        for j in range(i, 3)
    )
    return torch.exp(-total / 4)


def random_spd(smallest: Tensor, ratio: Tensor, generator: torch.Generator | None = None) -> Tensor:  # (b, 3, 3)
    """Symmetric matrices in random frames with eigenvalues from ``smallest`` (b,) to that times ``ratio`` (b,) >= 1.

    The middle eigenvalue lies anywhere between, evenly.
    """
    b, options = len(smallest), {"device": smallest.device, "dtype": smallest.dtype, "generator": generator}
    frame, upper = torch.linalg.qr(torch.randn(b, 3, 3, **options))
    frame = frame * torch.sign(torch.diagonal(upper, dim1=-2, dim2=-1))[:, None]  # evenly over all rotations
    share = torch.rand(b, **options)
    values = torch.stack([torch.ones_like(ratio), 1 + share * (ratio - 1), ratio], 1) * smallest[:, None]
    return (frame * values[:, None]) @ frame.transpose(1, 2)


def smooth_field(
    like: Tensor,  # (b, z, y, x): shape, device and dtype
    voxel_size: float,
    scale: float,  # A
    low: float | Tensor,
    high: float | Tensor,  # one or (b,)
    generator: torch.Generator | None = None,
) -> Tensor:  # (b, z, y, x)
    """Random fields that vary over about ``scale`` A, their values evenly distributed between ``low`` and ``high``."""
    noise = torch.randn(like.shape, device=like.device, dtype=like.dtype, generator=generator)
    gain = torch.exp(-2 * (math.pi * scale / 2) ** 2 * _squared(like, voxel_size))
    gain[0, 0, 0] = 0  # the mean of a small box would push the whole field to one end
    field = _filtered(noise, gain)
    field = field / field.std(DIMS, keepdim=True).clamp(min=1e-12)
    even = 0.5 + 0.5 * torch.erf(field / math.sqrt(2.0))
    return _column(low, like) + (_column(high, like) - _column(low, like)) * even


def model_fsc(
    s: Tensor,  # any shape, cycles per A
    resolution: Tensor,  # A, broadcastable: where the curve is .143
    steepness: float = 6.0,
) -> Tensor:
    """A smooth half-map FSC, 1 / (1 + 6 (s d)^steepness): 1 at low s, exactly .143 (= 1/7) at s = 1/d."""
    return 1.0 / (1.0 + 6.0 * (s * resolution) ** steepness)


def coloured_noise(
    maps: Tensor,  # (b, z, y, x), the signal
    voxel_size: float,
    resolution: float | Tensor,  # A, one or (b,): half-map FSC .143
    generator: torch.Generator | None = None,
    centre: float | Tensor = 1.0,
) -> Tensor:  # (b, z, y, x)
    """Noise as the mean of two half maps carries it at a resolution: sigma_n^2(s) = |F|^2 (1 - FSC) / (2 FSC).

    |F|^2 is the mean power of the signal per shell, over the whole box. Two half maps have twice this variance each.

    Args:
        centre: how much stronger the noise is in the middle of the box than far out, one or (b,); 1 for even noise.
    """
    b, shape = maps.shape[0], tuple(maps.shape[-3:])
    shell = _shells(shape, maps.device)
    count = math.ceil(math.sqrt(3) * max(shape) / 2) + 2
    spectrum = torch.fft.rfftn(maps, dim=DIMS)
    power = radial_mean(spectrum.real.square() + spectrum.imag.square(), shell, count)  # (b, count)
    s = torch.arange(count, device=maps.device, dtype=maps.dtype) / (max(shape) * voxel_size)
    fsc = model_fsc(s, _column(resolution, maps).view(-1, 1)).clamp(min=FSC_FLOOR)
    ratio = (power * (1 - fsc) / (2 * fsc)).expand(b, -1)
    ratio[:, 0] = 0  # no noise in the mean
    drawn_on = maps.device if generator is None else generator.device
    white = torch.randn(maps.shape, device=drawn_on, dtype=maps.dtype, generator=generator).to(maps.device)
    gain = (ratio / math.prod(shape)).sqrt()[:, shell]
    noise = _filtered(white, gain)
    return noise * hill(maps, centre)


def hill(like: Tensor, centre: float | Tensor) -> Tensor:
    """1 far from the middle of the box, ``centre`` in it; a Gaussian of a quarter of the shortest side between."""
    axes = [torch.arange(n, device=like.device, dtype=like.dtype) - n // 2 for n in like.shape[-3:]]
    squared = axes[0][:, None, None] ** 2 + axes[1][None, :, None] ** 2 + axes[2] ** 2
    width = min(like.shape[-3:]) / 4
    return 1 + (_column(centre, like) - 1) * torch.exp(-squared / (2 * width**2))
