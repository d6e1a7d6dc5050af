"""What two half maps and a filtered map say about each place: local resolution and local gain."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cryosuite.reconstruct.masks import gaussian_blur
from cryosuite.reconstruct.polish_gain import band_centres, bands, half_radius

WINDOW_A = 12.5  # standard deviation of the Gaussian window, Angstrom


def local_resolution(
    half_a: Tensor, half_b: Tensor, mask: Tensor, pixel_size: float, window_A: float = WINDOW_A, threshold: float = 0.5
) -> Tensor:
    """Resolution in Angstrom at every voxel: where the windowed correlation of the halves' bands falls below 0.5.

    The correlation of band r at x is G[a_r b_r] / sqrt(G[a_r^2] G[b_r^2]) with a Gaussian window G (the local FSC of
    Cardone, Heymann & Steven 2013, with bands for shells), interpolated between the bands' centres. Waves longer than
    four windows do not fit into one and are not judged: four windows is the coarsest value, also outside the mask.

    Args:
        half_a, half_b, mask: (D, D, D).

    Returns:
        (D, D, D) float32.
    """
    D = half_a.shape[-1]
    sigma = window_A / pixel_size
    weights, centres = bands(D, half_radius(D)), band_centres(D)
    transforms = [torch.fft.rfftn(half * mask) for half in (half_a, half_b)]
    found = torch.full((D,) * 3, math.nan)
    before = torch.ones(D, D, D)
    coarsest = min(4 * window_A, D * pixel_size / 2)
    first = next((i for i, centre in enumerate(centres) if centre >= D * pixel_size / coarsest), len(centres))
    for number in range(max(first, 1), len(centres)):
        a, b = (torch.fft.irfftn(one * weights[number], s=(D,) * 3) for one in transforms)
        powers = [gaussian_blur(one.square(), sigma).clamp(min=0) for one in (a, b)]
        scale = (powers[0] * powers[1]).sqrt()
        now = gaussian_blur(a * b, sigma) / scale.clamp(min=1e-12 * float(scale.max()) + 1e-30)
        share = ((before - threshold) / (before - now).clamp(min=1e-6)).clamp(0, 1)
        radius = centres[number - 1] + share * (centres[number] - centres[number - 1])
        crossed = found.isnan() & (now < threshold)
        found[crossed] = D * pixel_size / radius[crossed].clamp(min=1.0)
        before = now
    found[found.isnan()] = 2 * pixel_size
    return torch.where(mask > 0.5, found.clamp(2 * pixel_size, coarsest), torch.tensor(coarsest)).float()


def local_gain(raw: Tensor, filtered: Tensor, mask: Tensor, pixel_size: float, window_A: float = WINDOW_A) -> Tensor:
    """How much of a map a filter kept, place by place: G[raw filtered] / G[raw^2], 0 to 1, (D, D, D) float32."""
    sigma = window_A / pixel_size
    raw = raw * mask
    power = gaussian_blur(raw.square(), sigma)
    kept = gaussian_blur(raw * filtered, sigma) / power.clamp(min=1e-6 * float(power.max()) + 1e-30)
    return (kept.clamp(0, 1) * (mask > 0.5)).float()
