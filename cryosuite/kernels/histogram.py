"""Soft histograms of grey values and how far two of them are apart.

    h_j = 1/N sum_i exp(-((x_i - c_j) / s)^2 / 2);   p = (h + eps) / sum(h + eps);
    JS(p, q) = (KL(p | m) + KL(q | m)) / 2, m = (p + q) / 2, in nats: 0 for equal ones, at most ln 2

The loss of CryoLVM is a part of mean square error and a part of this divergence; without the normalisation of p it is
no divergence at all (its value would depend on how many voxels are counted).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["soft_histogram", "jensen_shannon", "histogram_divergence"]

BINS = 64
EPS = 1e-6  # added to every bin, so that an empty one has a logarithm
CHUNK = 1 << 14  # values whose bins are held at once where no gradient is wanted


def soft_histogram(
    values: Tensor,  # (..., n), grey values, mostly in 0..1
    bins: int = BINS,
    width: float | None = None,
    weight: Tensor | None = None,  # (..., n) >= 0, how much each value counts
) -> Tensor:  # (..., bins), float32 or wider, sums to 1
    """Normalised histogram with Gaussian bins, centres at (j + 1/2) / bins: smooth in the values.

    Args:
        width: standard deviation s of a bin, default 1 / bins. Values farther than some s outside 0..1 are not seen.
        weight: default 1. Rows without any weight give the uniform histogram.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    centres = (torch.arange(bins, dtype=values.dtype, device=values.device) + 0.5) / bins
    scale = 1.0 / (width or 1.0 / bins)
    if torch.is_grad_enabled() and (values.requires_grad or (weight is not None and weight.requires_grad)):
        total = _sums(values, centres, scale, weight)
    else:
        parts = range(0, values.shape[-1], CHUNK)
        pieces = [(values[..., i : i + CHUNK], None if weight is None else weight[..., i : i + CHUNK]) for i in parts]
        total = sum(_sums(piece, centres, scale, part) for piece, part in pieces)
    count = values.shape[-1] if weight is None else weight.to(values.dtype).sum(-1, keepdim=True).clamp(min=1e-12)
    h = total / count + EPS
    return h / h.sum(-1, keepdim=True)


def _sums(values: Tensor, centres: Tensor, scale: float, weight: Tensor | None) -> Tensor:
    distance = (values.unsqueeze(-1) - centres) * scale
    kernel = torch.exp(distance.square() * -0.5)
    if weight is None:
        return kernel.sum(-2)
    return (kernel * weight.unsqueeze(-1)).sum(-2)


def jensen_shannon(
    p: Tensor,  # (..., bins), sums to 1
    q: Tensor,  # (..., bins), sums to 1
) -> Tensor:  # (...)
    """Jensen-Shannon divergence in nats, between 0 and ln 2 (Lin 1991). Bins may be exactly zero."""
    tiny = torch.finfo(p.dtype).tiny
    m = ((p + q) / 2).clamp(min=tiny)
    return (torch.xlogy(p, (p / m).clamp(min=tiny)) + torch.xlogy(q, (q / m).clamp(min=tiny))).sum(-1) / 2


def histogram_divergence(
    predicted: Tensor,  # (b, ...) grey values
    target: Tensor,  # (b, ...)
    mask: Tensor | None = None,  # (b, ...) >= 0
    sample: int = 16384,
    bins: int = BINS,
    generator: torch.Generator | None = None,
) -> Tensor:  # (b,)
    """Jensen-Shannon divergence of the grey values of each crop, from a random subset of voxels.

    Args:
        mask: counts voxels; a crop without any gives 0 and no gradient.
        sample: voxels per crop, the same places in both maps and in all crops of the batch; 0 for all voxels.
        generator: of the subset, on the device of the maps.
    """
    a, b = predicted.flatten(1), target.flatten(1)
    weight = None if mask is None else mask.flatten(1)
    n = a.shape[1]
    if 0 < sample < n:
        chosen = torch.randint(n, (sample,), device=a.device, generator=generator)
        a, b = a[:, chosen], b[:, chosen]
        weight = None if weight is None else weight[:, chosen]
    return jensen_shannon(soft_histogram(a, bins, weight=weight), soft_histogram(b, bins, weight=weight))
