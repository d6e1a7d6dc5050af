"""From clean densities to maps as they are deposited: blurred, uneven, anisotropic, noisy. Batched, on the device.

Maps are (b, z, y, x) with one voxel size for the batch, any box. All randomness comes from one ``torch.Generator`` on
the maps' device, so a seed is a map. Fourier space is the half grid of ``rfftn``; s is in cycles per A. The order in
``degrade``: envelope (B-factor, anisotropy, low-pass) in one transform, local blur, solvent, noise.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cryosuite.kernels.shells import radial_mean

__all__ = [
    "frequencies",
    "soft_lowpass",
    "bfactor",
    "anisotropic",
    "random_spd",
    "smooth_field",
    "local_blur",
    "model_fsc",
    "coloured_noise",
    "Ranges",
    "degrade",
]

DIMS = (-3, -2, -1)
EDGE = 5  # shells of the low-pass filter's cosine
FSC_FLOOR = 0.02  # noise is never stronger than signals of this correlation would leave it
LEVELS = 4  # blurred copies between which a local B-factor interpolates

Shape = tuple[int, int, int]


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _axes(shape: Shape, voxel_size: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    z, y = (torch.fft.fftfreq(n, voxel_size, device=device, dtype=dtype) for n in shape[:2])
    x = torch.fft.rfftfreq(shape[2], voxel_size, device=device, dtype=dtype)
    return z[:, None, None], y[None, :, None], x[None, None, :]


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


def bfactor(maps: Tensor, voxel_size: float, b: float | Tensor) -> Tensor:
    """Maps whose amplitudes fall by exp(-B s^2 / 4); B in A^2, one or (b,), negative sharpens."""
    return _filtered(maps, torch.exp(-_column(b, maps) / 4 * _squared(maps, voxel_size)))


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


def anisotropic(
    maps: Tensor,  # (b, z, y, x)
    voxel_size: float,
    tensor: Tensor,  # (b, 3, 3) A^2, axes x y z
) -> Tensor:
    """Maps blurred differently along different directions: F exp(-s^T M s / 4), M symmetric and positive."""
    return _filtered(maps, anisotropy_gain(maps, voxel_size, tensor))


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


def local_blur(
    maps: Tensor,  # (b, z, y, x)
    voxel_size: float,
    field: Tensor,  # (b, z, y, x) B >= 0, A^2
    top: float | None = None,
    levels: int = LEVELS,
) -> Tensor:
    """Maps blurred by a B-factor that differs from place to place, linear between ``levels`` + 1 blurred copies.

    ``top``: the largest B of the field where it is known; B beyond it is treated as ``top``.
    """
    top = float(field.max()) if top is None else top
    if top <= 0:
        return maps
    spectrum, squared = torch.fft.rfftn(maps, dim=DIMS), _squared(maps, voxel_size)
    place = (field / top).clamp(0, 1) * levels
    out = maps * (1 - place).clamp(min=0)
    for level in range(1, levels + 1):
        weight = (1 - (place - level).abs()).clamp(min=0)
        gain = torch.exp(-(top * level / levels) / 4 * squared)
        out = out + weight * torch.fft.irfftn(spectrum * gain, s=maps.shape[-3:], dim=DIMS)
    return out


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
    reference: Tensor | None = None,
) -> Tensor:  # (b, z, y, x)
    """Noise as the mean of two half maps carries it at a resolution: sigma_n^2(s) = |F|^2 (1 - FSC) / (2 FSC).

    |F|^2 is the mean power of the signal per shell, over the whole box. Two half maps have twice this variance each.

    Args:
        centre: how much stronger the noise is in the middle of the box than far out, one or (b,); 1 for even noise.
        reference: (b, z, y, x) whose power is meant, where it is not that of ``maps``.
    """
    b, shape = maps.shape[0], tuple(maps.shape[-3:])
    radius = _squared(maps, voxel_size).sqrt() * (max(shape) * voxel_size)
    shell = radius.round().long()
    count = math.ceil(math.sqrt(3) * max(shape) / 2) + 2
    spectrum = torch.fft.rfftn(maps if reference is None else reference, dim=DIMS)
    power = radial_mean(spectrum.real.square() + spectrum.imag.square(), shell, count)  # (b, count)
    s = torch.arange(count, device=maps.device, dtype=maps.dtype) / (max(shape) * voxel_size)
    fsc = model_fsc(s, _column(resolution, maps).view(-1, 1)).clamp(min=FSC_FLOOR)
    ratio = (power * (1 - fsc) / (2 * fsc)).expand(b, -1)
    ratio[:, 0] = 0  # no noise in the mean
    white = torch.randn(maps.shape, device=maps.device, dtype=maps.dtype, generator=generator)
    gain = (ratio / math.prod(shape)).sqrt()[:, shell]
    noise = _filtered(white, gain)
    return noise * hill(maps, centre)


def hill(like: Tensor, centre: float | Tensor) -> Tensor:
    """1 far from the middle of the box, ``centre`` in it; a Gaussian of a quarter of the shortest side between."""
    axes = [torch.arange(n, device=like.device, dtype=like.dtype) - n // 2 for n in like.shape[-3:]]
    squared = axes[0][:, None, None] ** 2 + axes[1][None, :, None] ** 2 + axes[2] ** 2
    width = min(like.shape[-3:]) / 4
    return 1 + (_column(centre, like) - 1) * torch.exp(-squared / (2 * width**2))


@dataclass(frozen=True)
class Ranges:
    """Between what the properties of degraded maps are drawn, evenly; one draw per map.

    resolution: A, of the low-pass filter and the noise. b: global B-factor, A^2. local_b: largest B of the smooth
    field, over field_scale A. anisotropy: ratio of the largest to the smallest eigenvalue of M, whose smallest is
    anisotropy_b. noise: factor on the amplitude of the noise. centre: of the noise. solvent: grey value of the solvent
    as a share of the mean inside the mask. gain, offset: of the final grey values.
    """

    resolution: tuple[float, float] = (2.5, 8.0)
    b: tuple[float, float] = (30.0, 250.0)
    local_b: tuple[float, float] = (0.0, 150.0)
    field_scale: float = 20.0
    anisotropy: tuple[float, float] = (1.0, 4.0)
    anisotropy_b: tuple[float, float] = (0.0, 30.0)
    noise: tuple[float, float] = (0.0, 1.0)
    centre: tuple[float, float] = (1.0, 2.0)
    solvent: tuple[float, float] = (0.0, 0.5)
    gain: tuple[float, float] = (0.5, 2.0)
    offset: tuple[float, float] = (-0.2, 0.2)


def degrade(
    maps: Tensor,  # (b, z, y, x), clean
    voxel_size: float,
    generator: torch.Generator | None = None,
    ranges: Ranges | None = None,
    resolution: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clean maps -> maps as they are deposited, and what was drawn for each (b,).

    Args:
        resolution: (b,) A where it is given (targets at the same resolution need it); else drawn.
        mask: (b, z, y, x) in 0..1, the molecule; without it no solvent is added.

    Only what has a range other than a single neutral value costs time; ``Ranges`` of equal pairs fix a property.
    """
    ranges = ranges or Ranges()
    names = ("b", "local_b", "anisotropy", "anisotropy_b", "noise", "centre", "solvent", "gain", "offset")
    options = {"device": maps.device, "dtype": maps.dtype, "generator": generator}
    drawn = torch.rand(len(names) + 1, maps.shape[0], **options)
    draw = {name: _between(getattr(ranges, name), row) for name, row in zip(names, drawn, strict=False)}
    draw["resolution"] = _between(ranges.resolution, drawn[-1]) if resolution is None else resolution.to(maps)
    gain = lowpass_gain(maps, voxel_size, draw["resolution"])
    gain = gain * torch.exp(-_column(draw["b"], maps) / 4 * _squared(maps, voxel_size))
    if ranges.anisotropy_b[1] > 0:
        gain = gain * anisotropy_gain(maps, voxel_size, random_spd(draw["anisotropy_b"], draw["anisotropy"], generator))
    out = _filtered(maps, gain)
    if ranges.local_b[1] > 0:
        field = smooth_field(maps, voxel_size, ranges.field_scale, 0.0, draw["local_b"], generator)
        out = local_blur(out, voxel_size, field, ranges.local_b[1])
    signal = out
    if mask is not None and ranges.solvent[1] > 0:
        inside = (out * mask).sum(DIMS, keepdim=True) / mask.sum(DIMS, keepdim=True).clamp(min=1e-6)
        flat = soft_lowpass(1 - mask, voxel_size, draw["resolution"])
        out = out + _column(draw["solvent"], maps) * inside * flat
    if ranges.noise[1] > 0:
        noise = coloured_noise(signal, voxel_size, draw["resolution"], generator, draw["centre"])
        out = out + _column(draw["noise"], maps) * noise
    spread = out.std(DIMS, keepdim=True)
    return out * _column(draw["gain"], maps) + _column(draw["offset"], maps) * spread, draw


def _between(bounds: tuple[float, float], share: Tensor) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * share
