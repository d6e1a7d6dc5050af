"""How unlike two maps look, differentiable: correlation, structural similarity, Fourier shells of crops."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["masked_correlation", "ssim", "shell_loss"]

K1, K2 = 0.01, 0.03  # of SSIM, for grey values in 0..1
DIMS = (-3, -2, -1)


def masked_correlation(
    a: Tensor,  # (b, ...)
    b: Tensor,  # (b, ...)
    mask: Tensor,  # (b, ...) bool
    least: int = 64,
) -> Tensor:  # ()
    """Pearson correlation inside the mask, the mean over crops whose mask holds ``least`` voxels (1 if none does)."""
    with torch.autocast(a.device.type, enabled=False):
        a, b, w = (x.flatten(1).float() for x in (a, b, mask))
        count = w.sum(1, keepdim=True)
        a, b = (w * (x - (w * x).sum(1, keepdim=True) / count.clamp(min=1)) for x in (a, b))
        cc = (a * b).sum(1) * torch.rsqrt(((a * a).sum(1) * (b * b).sum(1)).clamp(min=1e-12))
        good = count[:, 0] >= least
        return torch.where(good, cc, torch.zeros_like(cc)).sum() / good.sum().clamp(min=1) + (~good.any()).float()


def ssim(
    a: Tensor,  # (b, 1, z, y, x), grey values in 0..1
    b: Tensor,  # (b, 1, z, y, x)
    window: int = 7,
) -> Tensor:  # (b,)
    """Structural similarity (Wang et al. 2004), mean over cubic windows: 1 for equal maps. float32 inside."""
    with torch.autocast(a.device.type, enabled=False):
        a, b = a.float(), b.float()
        window = min(window, *a.shape[-3:])
        mean_a, mean_b, aa, bb, ab = (F.avg_pool3d(x, window, 1) for x in (a, b, a * a, b * b, a * b))
        var_a, var_b, cov = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
        c1, c2 = K1**2, K2**2
        luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        structure = (2 * cov + c2) / (var_a.clamp(min=0) + var_b.clamp(min=0) + c2)
        return (luminance * structure).flatten(1).mean(1)


def shell_loss(
    a: Tensor,  # (b, 1, e, e, e)
    b: Tensor,  # (b, 1, e, e, e)
) -> Tensor:  # (b,)
    """1 - the mean Fourier shell correlation over shells 1 .. e/2 of crops under a Hann window, float32: 0 .. 2.

    Shells in which the second map has nothing count as correlated: nothing can be learnt there.
    """
    e = a.shape[-1]
    if tuple(a.shape[-3:]) != (e, e, e) or a.shape != b.shape:
        raise ValueError(f"two batches of cubic crops of one size, not {tuple(a.shape)} and {tuple(b.shape)}")
    shell, weight, window = _shells(e, a.device)
    with torch.autocast(a.device.type, enabled=False):
        fa, fb = (torch.fft.rfftn(x.float() * window, dim=DIMS).flatten(1) for x in (a, b))

        def sums(values: Tensor) -> Tensor:  # (b, n) -> (b, e // 2)
            total = values.new_zeros(len(values), e // 2 + 2)
            return total.index_add(1, shell, values * weight)[:, 1 : e // 2 + 1]

        cross = sums((fa * fb.conj()).real)
        power_a, power_b = sums(fa.abs().square()), sums(fb.abs().square())
        known = power_b > 1e-8 * power_b.sum(1, keepdim=True).clamp(min=1e-12)
        curve = cross * torch.rsqrt((power_a * power_b).clamp(min=1e-20))
        return torch.where(known, 1 - curve, torch.zeros_like(curve)).mean(1)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _shells(e: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Shell of every point of the half grid, how often the point occurs, and the window of the crop."""
    full = torch.fft.fftfreq(e, 1 / e, device=device)
    half = torch.arange(e // 2 + 1, device=device, dtype=full.dtype)
    radius = (full[:, None, None] ** 2 + full[None, :, None] ** 2 + half**2).sqrt().round()
    weight = torch.full((e, e, e // 2 + 1), 2.0, device=device)
    weight[..., 0] = 1
    if e % 2 == 0:
        weight[..., -1] = 1
    hann = torch.hann_window(e + 2, periodic=False, device=device)[1:-1]
    window = hann[:, None, None] * hann[:, None] * hann
    return radius.clamp(max=e // 2 + 1).long().reshape(-1), weight.reshape(-1), window
