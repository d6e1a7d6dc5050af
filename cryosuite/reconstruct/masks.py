"""Soft masks around a particle: spheres, and masks found in a map by itself."""

from __future__ import annotations

import math

import torch

PERCENTILE = 99.9  # the "highest" density of a map, robust against a few hot voxels
FRACTION = 0.1  # of that density: the level at which a blurred map becomes mask (BENCHMARKS, sections 5 and 6)


def radius_grid(box_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Distance of each voxel from the centre voxel box_size // 2, in voxels, shape (D, D, D)."""
    axis = torch.arange(box_size, dtype=dtype) - box_size // 2
    square = axis**2
    return (square[:, None, None] + square[None, :, None] + square[None, None, :]).sqrt()


def soft_sphere(box_size: int, radius: float | None = None, soft: float = 3.0) -> torch.Tensor:
    """A ball around the centre voxel with a raised-cosine edge.

    Args:
        box_size: D, voxels.
        radius: where the edge starts to fall, voxels; default 0.47 D - soft, so that the mask ends at 0.47 D.
        soft: width of the edge, voxels.

    Returns:
        (D, D, D) float32 in 0..1.
    """
    if radius is None:
        radius = 0.47 * box_size - soft
    return _raised_cosine(radius_grid(box_size) - radius, soft)


def soft_mask(inside: torch.Tensor, dilate: float = 3.0, soft: float = 3.0) -> torch.Tensor:
    """Grow a binary volume by ``dilate`` voxels and give it a raised-cosine edge of ``soft`` voxels.

    Args:
        inside: (D, D, D) bool.
        dilate: voxels added all round, measured as Euclidean distance.
        soft: width of the edge beyond, voxels.

    Returns:
        (D, D, D) float32 in 0..1.
    """
    if not bool(inside.any()):
        return torch.zeros(inside.shape, dtype=torch.float32)
    return _raised_cosine(distance_to(inside, math.ceil(dilate + soft)) - dilate, soft)


def auto_mask(
    volume: torch.Tensor,
    blur: float = 1.0,
    fraction: float = FRACTION,
    dilate: float = 3.0,
    soft: float = 3.0,
) -> torch.Tensor:
    """A soft mask from the map itself: blur, threshold, dilate, soften.

    The level is ``fraction`` of the 99.9th percentile of the blurred map (at least three standard deviations of the
    corners of the box, so that noise does not become mask).

    Args:
        volume: (D, D, D) or (K, D, D, D) for the union of K maps; density positive.
        blur: standard deviation of the Gaussian blur, voxels.

    Returns:
        (D, D, D) float32 in 0..1.
    """
    volumes = volume.float()
    if volumes.ndim == 3:
        volumes = volumes[None]
    size = volumes.shape[-1]
    corners = radius_grid(size) > 0.5 * size
    inside = torch.zeros(volumes.shape[-3:], dtype=torch.bool)
    for one in volumes:
        smooth = gaussian_blur(one, blur)
        noise = 3.0 * smooth[corners].std() if corners.any() else 0.0
        inside |= smooth > max(fraction * float(percentile(smooth, PERCENTILE)), float(noise))
    return soft_mask(inside, dilate, soft)


def half_map_mask(volume: torch.Tensor, fsc: torch.Tensor | None) -> torch.Tensor:
    """The mask for the FSC of half maps, from their joint map (D, D, D).

    The map is blurred to the shell where the unmasked half-map FSC falls below 0.5, so that what is left is signal,
    and then masked as `auto_mask` does. Falls back to the soft sphere when nothing stands out.
    """
    size = volume.shape[-1]
    blur = 1.0
    if fsc is not None:
        below = torch.nonzero(fsc < 0.5).flatten()
        shell = max(int(below[0]), 2) if len(below) else size // 2
        blur = max(blur, size / (2 * math.pi * shell))
    sphere = soft_sphere(size)
    mask = auto_mask(volume * sphere, blur) * sphere
    return mask if float(mask.mean()) > 1e-3 else sphere


def union_mask(volumes: torch.Tensor, dilate: float = 2.0, soft: float = 3.0) -> torch.Tensor:
    """One mask around all of K noise-free maps (K, D, D, D): > 0.1 of the 99.9th percentile of each, dilated, soft.

    The union mask of BENCHMARKS section 6 (no blur: ground-truth maps are clean).
    """
    inside = torch.zeros(volumes.shape[-3:], dtype=torch.bool)
    for one in volumes:
        inside |= one > FRACTION * percentile(one, PERCENTILE)
    return soft_mask(inside, dilate, soft)


def percentile(values: torch.Tensor, percent: float) -> torch.Tensor:
    """The percentile of all values (nearest rank; torch.quantile refuses maps of 256^3)."""
    flat = values.flatten()
    rank = min(max(math.ceil(percent / 100 * flat.numel()), 1), flat.numel())
    return torch.kthvalue(flat, rank).values


def gaussian_blur(volume: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur (D, D, D) by a Gaussian of standard deviation ``sigma`` voxels (periodic, by the Fourier transform)."""
    if sigma <= 0:
        return volume
    size = volume.shape[-1]
    full = torch.fft.fftfreq(size, dtype=volume.dtype)
    half = torch.fft.rfftfreq(size, dtype=volume.dtype)
    gain_full, gain_half = (torch.exp(-2 * (math.pi * sigma * f) ** 2) for f in (full, half))
    transform = torch.fft.rfftn(volume)
    transform = transform * gain_full[:, None, None] * gain_full[None, :, None] * gain_half[None, None, :]
    return torch.fft.irfftn(transform, s=volume.shape)


def distance_to(inside: torch.Tensor, reach: int) -> torch.Tensor:
    """Euclidean distance of every voxel to the nearest True one, exact up to ``reach`` voxels, larger beyond.

    Separable: the squared distance is a minimum of parabolas along one axis after another.
    """
    far = float(4 * (reach + 1) ** 2)
    square = torch.where(inside, 0.0, far)
    for axis in range(3):
        best = square.clone()
        size = square.shape[axis]
        for step in range(1, min(reach, size - 1) + 1):
            ahead = square.narrow(axis, step, size - step) + step * step
            behind = square.narrow(axis, 0, size - step) + step * step
            low, high = best.narrow(axis, 0, size - step), best.narrow(axis, step, size - step)
            torch.minimum(low, ahead, out=low)
            torch.minimum(high, behind, out=high)
        square = best
    return square.sqrt()


def _raised_cosine(beyond: torch.Tensor, soft: float) -> torch.Tensor:
    """1 where ``beyond`` <= 0, 0 where >= soft, half a cosine between."""
    if soft <= 0:
        return (beyond <= 0).float()
    return 0.5 + 0.5 * torch.cos(math.pi * (beyond / soft).clamp(0, 1))
