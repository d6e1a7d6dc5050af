"""Likelihood of poses: scores of many rotations and shifts per image, whitened, exact for astigmatic CTFs.

With y the whitened half transform of an image, c its CTF over sigma, S the slice of a rotation and T_t the move of the
content by the shift t, the gain in log-likelihood over an empty image is, summed over the half disc,

    gain(R, t) = 2 sum Re conj(T_t g) S - sum w |S|^2,     g = c y,  w = c^2

(a coefficient of white noise has E|n|^2 = 1). The CTF stays on the image's side, so that slices are shared by images.
With `fit_scale` the gain at the best positive scale of the slice, max(0, sum Re conj(T_t g) S)^2 / sum w |S|^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fourier import HalfDisc

__all__ = ["fold_ctf", "shift_phases", "shift_grid", "gain", "correlations", "best_base", "base_power"]

_CHUNK = 1 << 27  # numbers held at once in the larger temporaries


def fold_ctf(images: Tensor, ctf_over_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(b, P) complex images and (b, P) real CTF / sigma -> g = c y (b, P) complex and w = c^2 (b, P)."""
    return images * ctf_over_sigma, ctf_over_sigma.square()


def shift_phases(shift: Tensor, disc: HalfDisc) -> Tensor:
    """exp(-2 pi i k.t / D) for shifts (..., 2) in pixels: (..., P) complex; T_t g = phase * g."""
    angle = (shift / disc.box_size) @ disc.xy.to(shift.dtype).T * (-2 * torch.pi)
    return torch.polar(torch.ones_like(angle), angle)


def shift_grid(half_width: float, n: int, device: torch.device | str = "cpu") -> Tensor:  # (n * n, 2)
    """Cell-centred square grid of shifts within +- half_width, in the unit given."""
    axis = ((torch.arange(n, device=device, dtype=torch.float64) + 0.5) * (2 / n) - 1) * half_width
    return torch.cartesian_prod(axis, axis).float().reshape(-1, 2)


def gain(corr: Tensor, power: Tensor, fit_scale: bool) -> Tensor:
    """Log-likelihood gain from corr = sum Re conj(T g) S and power = sum w |S|^2."""
    if fit_scale:
        return corr.clamp(min=0).square() / power.clamp(min=torch.finfo(power.dtype).tiny)
    return 2 * corr - power


def correlations(
    slices: Tensor,  # (b, q, P) complex
    g: Tensor,  # (b, k, P) complex, already moved to its shift; q is a multiple of k, q / k slices for each
    w: Tensor,  # (b, P)
    steps: Tensor,  # (T, P) complex phases of shifts around it
) -> tuple[Tensor, Tensor]:
    """corr (b, q, T) and power (b, q) of every slice with its image at every small shift."""
    g = g.repeat_interleave(slices.shape[1] // g.shape[1], 1)
    z = g.conj() * slices
    corr = z.real @ steps.real.T + z.imag @ steps.imag.T
    power = (torch.view_as_real(slices).square().sum(-1) @ w[..., None]).squeeze(-1)
    return corr, power


def base_power(slices: Tensor, w: Tensor, slot: Tensor | None) -> Tensor:
    """sum w |S|^2 of the half grid: slices (G, H, P) complex, w (b, P), slot (b,) or None for one group -> (b, H)."""
    squares = torch.view_as_real(slices).square().sum(-1)
    if slot is None:
        return w @ squares[0].T
    return torch.bmm(squares[slot], w[..., None]).squeeze(-1)


def best_base(
    slices: Tensor,  # (G, H, P) complex, in-plane angles of half a turn
    g: Tensor,  # (b, P) complex
    phases: Tensor,  # (T, P) complex
    slot: Tensor | None,  # (b,) group of each image
) -> tuple[Tensor, Tensor]:
    """Best shift of every rotation: corr (b, 2, H) and its number (b, 2, H); entry 1 is the slice turned by 180 deg.

    A turn by 180 degrees conjugates the slice, so two real products serve both: sum of Re parts +- sum of Im parts.
    """
    G, H, _ = slices.shape
    T = phases.shape[0]
    step = max(1, _CHUNK // (T * H * 2 + (0 if slot is None else 2 * slices[0].numel())))
    corr, which = [], []
    for start in range(0, g.shape[0], step):
        moved = g[start : start + step, None] * phases
        if slot is None:
            real = (moved.real.flatten(0, 1) @ slices[0].real.T).unflatten(0, (-1, T))
            imag = (moved.imag.flatten(0, 1) @ slices[0].imag.T).unflatten(0, (-1, T))
        else:
            own = slices[slot[start : start + step]]
            real = torch.bmm(moved.real, own.real.transpose(1, 2))
            imag = torch.bmm(moved.imag, own.imag.transpose(1, 2))
        for sign in (1, -1):
            best, place = (real + sign * imag).max(1)
            corr.append(best)
            which.append(place)
    pairs = [torch.cat([torch.stack(two[i : i + 2], 1) for i in range(0, len(two), 2)]) for two in (corr, which)]
    return pairs[0], pairs[1]
