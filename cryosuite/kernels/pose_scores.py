"""Likelihood of poses: scores of many rotations and shifts per image, whitened, exact for astigmatic CTFs.

With y the whitened half transform of an image, c its CTF over sigma, S the slice of a rotation and T_t the move of the
content by the shift t, the gain in log-likelihood over an empty image is, summed over the half disc,

    gain(R, t) = 2 sum Re conj(T_t g) S - sum w |S|^2,     g = c y,  w = c^2

(a coefficient of white noise has E|n|^2 = 1). The CTF stays on the image's side, so that slices are shared by images.
With `fit_scale` the gain at the best positive scale of the slice, max(0, sum Re conj(T_t g) S)^2 / sum w |S|^2.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .fourier import HalfDisc, half_disc
from .pose_sources import SliceSource, VolumeSource

__all__ = [
    "fold_ctf",
    "shift_phases",
    "shift_grid",
    "local_shifts",
    "gain",
    "correlations",
    "score_shifts",
    "loops",
]

REACH = 1 << 32  # numbers of one transform that the loops can count: radii up to about 400


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


def local_shifts(spacing: float, n: int, like: Tensor) -> Tensor:  # (n * n, 2)
    """Shifts around zero on an n x n grid, n odd, in pixels: zero, then +t_1, -t_1, +t_2, -t_2 and so on."""
    axis = (torch.arange(n, device=like.device, dtype=like.dtype) - n // 2) * spacing
    grid = torch.cartesian_prod(axis, axis)
    middle = n * n // 2
    pairs = torch.stack([grid[middle + 1 :], grid[:middle].flip(0)], 1)
    return torch.cat([grid[middle : middle + 1], pairs.flatten(0, 1)])


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


def score_shifts(
    source: SliceSource,
    g: Tensor,  # (b, P) complex
    w: Tensor,  # (b, P)
    index: Tensor,  # (b,)
    radius: int,
    rotation: Tensor,  # (b, q, 3, 3)
    shift: Tensor,  # (b, k, 2) px, q / k rotations for each
    local: Tensor,  # (T, 2) px, of `local_shifts`
) -> tuple[Tensor, Tensor, Tensor]:
    """Best small shift of every rotation: corr, power and its number, (b, q) each, of the points up to `radius`.

    Voxel volumes on the CPU take the compiled loops.
    """
    disc = half_disc(source.box_size, radius, g.device)
    g, w = g[:, : len(disc)], w[:, : len(disc)]
    if use_loops(source, g):
        return _score_by_loops(source, g, w, index, disc, rotation, shift, local)
    slices = source.slices(rotation, radius, index)
    moved = g[:, None] * shift_phases(shift, disc)
    corr, power = correlations(slices, moved, w, shift_phases(local, disc))
    corr, best = corr.max(-1)
    return corr, power, best


@functools.cache
def loops():
    """The compiled loops, or None where numba cannot be imported."""
    try:
        from . import pose_search_cpu
    except ImportError:
        return None
    return pose_search_cpu


def use_loops(source: SliceSource, g: Tensor) -> bool:
    """Whether the compiled loops serve this source and these images."""
    plain = g.device.type == "cpu" and g.dtype == torch.complex64 and isinstance(source, VolumeSource)
    if not plain or source.transform.dtype != torch.float32 or source.transform[0].numel() > REACH:
        return False
    return loops() is not None


def loop_arrays(source: VolumeSource, g: Tensor, w: Tensor, index: Tensor, disc: HalfDisc) -> list:
    """What the loops take first: the transforms and their shape, volumes, images, weights, points."""
    if disc.r_max > source.r_max:
        raise ValueError(f"these volumes were transformed up to radius {source.r_max}, not {disc.r_max}")
    volume = source.which(index)
    if volume.numel() and not (int(volume.min()) >= 0 and int(volume.max()) < len(source)):
        raise ValueError(f"volume numbers must lie between 0 and {len(source) - 1}")
    n, nx = source.transform.shape[-4], source.transform.shape[-2]
    values = (volume.long(), torch.view_as_real(g.resolve_conj()), w, disc.xy.T.float())
    arrays = [v.contiguous().numpy() for v in values]
    return [source.transform.view(-1).numpy(), n, nx, source.pad, *arrays, disc.r_max]


def _score_by_loops(source, g, w, index, disc, rotation, shift, local) -> tuple[Tensor, Tensor, Tensor]:
    angle = (local[1::2] / disc.box_size) @ disc.xy.to(w.dtype).T * (2 * torch.pi)
    angle = torch.cat([torch.zeros(1, len(disc)), angle])
    corr, power = torch.empty(rotation.shape[:2]), torch.empty(rotation.shape[:2])
    best = torch.empty(rotation.shape[:2], dtype=torch.int64)
    rest = [rotation.float().contiguous(), (shift.float() / disc.box_size).contiguous(), angle.cos(), angle.sin()]
    arrays = [v.numpy() for v in (*rest, corr, power, best)]
    loops().score(*loop_arrays(source, g, w, index, disc), *arrays)
    return corr, power, best
