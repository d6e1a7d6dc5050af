"""The base level of a pose search: every rotation of a coarse grid at every shift.

Three ways. "gemm": images of one volume share its slices, and all products of images, shifts and slices are matrix
products; exact. "polar": a volume of its own per image (a decoder with a latent); only one slice per direction is taken
from the source, and its turns in the plane are interpolated from it by a fixed linear operator, the best one for
content within 0.45 of the box (error .4 % rms of the slice). "exact": plain, for tests and small things. The CTF is
folded into the image in all of them, so astigmatism is exact.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import so3_grid
from .fourier import HalfDisc, half_disc
from .pose_options import SearchOptions
from .pose_scores import correlations, loops, shift_phases
from .pose_sources import MagnifiedSource, SliceSource, VolumeSource, in_autocast

__all__ = ["Prepared", "prepare", "base_scores", "best_shifts", "turn_operators"]

_CHUNK = 1 << 26  # numbers held at once in the larger temporaries
_ROWS = 256  # images times shifts multiplied at once on the CPU
_SUPPORT = 0.45  # of the box: radius of the content that turned slices are interpolated for
_MARGIN = 2  # Fourier pixels beyond the disc that the interpolation sees


@dataclass
class Prepared:
    """Base slices, computed once and used by many batches: real and imaginary parts (G, H, P) of half of the grid.

    Half of the in-plane angles are enough: a turn by 180 degrees conjugates a slice.
    """

    real: Tensor
    imag: Tensor
    groups: Tensor | None  # (G,) ascending, None for one shared volume

    def slot(self, groups: Tensor | None) -> Tensor | None:
        """Which of the G sets of slices each image takes; None: all the first."""
        if self.groups is None or groups is None or len(self.groups) == 1:
            return None
        return torch.searchsorted(self.groups, groups)

    @functools.cached_property
    def squares(self) -> Tensor:
        """|S|^2 (G, H, P)."""
        return self.real.square() + self.imag.square()


@torch.no_grad()
def prepare(
    source: SliceSource,
    options: SearchOptions,
    index: Tensor | None = None,  # (n,) int64, all particles that will be searched; not needed for one shared volume
    device: torch.device | str | None = None,
) -> Prepared:
    """Slices of every group of particles at the base level, on the device of `index`, of the volumes, or as given."""
    if index is None:
        device = (source.transform.device if isinstance(source, VolumeSource) else "cpu") if device is None else device
        index = torch.zeros(1, dtype=torch.int64, device=device)
    kind = index.device.type
    source = in_autocast(source, kind)
    with torch.autocast(kind, enabled=False):
        return _prepare(source, options.clipped(source.box_size), index)


def _prepare(source: SliceSource, options: SearchOptions, index: Tensor) -> Prepared:
    groups = source.groups(index)
    if groups is None:
        kinds, first = None, index[:1]
    else:
        kinds, back = torch.unique(groups, return_inverse=True)
        first = torch.full_like(kinds, index.numel()).scatter_reduce_(
            0, back, torch.arange(index.numel(), device=index.device), "amin"
        )
        first = index[first]
    n_psi = so3_grid.n_in_plane(options.base_order)
    grid = so3_grid.grid_rotations(options.base_order, torch.float32, index.device)
    half = grid.unflatten(0, (-1, n_psi))[:, : n_psi // 2].flatten(0, 1)
    real, imag = [], []
    for one in first:
        slices = source.slices(half[None], options.radius(0), one[None])[0]
        real.append(slices.real)
        imag.append(slices.imag)
    return Prepared(torch.stack(real), torch.stack(imag), kinds)


def base_scores(
    source: SliceSource,
    g: Tensor,  # (b, P) complex, CTF folded in
    w: Tensor,  # (b, P)
    index: Tensor,  # (b,)
    options: SearchOptions,
    shifts: Tensor,  # (T, 2) px
    prepared: Prepared | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """corr, power and the number of the best shift of every rotation of the base grid: (b, n_rotations) each."""
    disc = half_disc(source.box_size, options.radius(0), g.device)
    g, w = g[:, : len(disc)], w[:, : len(disc)]
    phases = shift_phases(shifts, disc)
    if options.base == "exact":
        return _exact(source, g, w, index, options, phases)
    if options.base == "gemm":
        half = so3_grid.n_rotations(options.base_order) // 2
        if prepared is None or prepared.real.shape[1:] != (half, len(disc)):
            raise ValueError("the base slices must be prepared with the options of the search")
        return _in_grid_order(*_half_scores(prepared, g, w, phases, prepared.slot(source.groups(index))), options)
    step = max(1, _CHUNK // (so3_grid.n_rotations(options.base_order) * len(disc)))
    rows = []
    for start in range(0, g.shape[0], step):
        part = slice(start, start + step)
        own = Prepared(*_turned(source, index[part], disc, options, w.dtype), None)
        slot = torch.arange(len(own.real), device=g.device)
        rows.append(_half_scores(own, g[part], w[part], phases, slot))
    return _in_grid_order(*(torch.cat(parts) for parts in zip(*rows, strict=True)), options)


def _half_scores(
    prepared: Prepared, g: Tensor, w: Tensor, phases: Tensor, slot: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """corr (b, 2, H), power (b, H) and shift number (b, 2, H) with the slices that each image's slot names."""
    corr, which = best_shifts(prepared, g, phases, slot)
    return corr, _power(prepared.squares, w, slot), which


def _power(squares: Tensor, w: Tensor, slot: Tensor | None) -> Tensor:  # (b, H)
    """sum w |S|^2 of each image with the slices of its slot, (G, H, P)."""
    if slot is None:
        return w @ squares[0].T
    if w.device.type != "cpu":
        step = max(1, _CHUNK // squares[0].numel())
        parts = [slice(i, i + step) for i in range(0, len(w), step)]
        return torch.cat([torch.bmm(squares[slot[p]], w[p, :, None]).squeeze(-1) for p in parts])
    power = w.new_empty(len(w), squares.shape[1])
    for kind in slot.unique().tolist():
        mine = slot == kind
        power[mine] = w[mine] @ squares[kind].T
    return power


def _in_grid_order(corr: Tensor, power: Tensor, which: Tensor, options: SearchOptions) -> tuple[Tensor, Tensor, Tensor]:
    """From (turned, direction, half angle) to the order of the grid."""
    n_half = so3_grid.n_in_plane(options.base_order) // 2
    power = power[:, None].expand_as(corr)
    ordered = [v.unflatten(2, (-1, n_half)).transpose(1, 2).flatten(1) for v in (corr, power, which)]
    return ordered[0], ordered[1], ordered[2]


def _exact(
    source: SliceSource, g: Tensor, w: Tensor, index: Tensor, options: SearchOptions, phases: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Every slice of every image taken from the source."""
    n = so3_grid.n_rotations(options.base_order)
    step = max(1, _CHUNK // (g.shape[0] * g.shape[1] * 4))
    found = []
    for start in range(0, n, step):
        node = torch.arange(start, min(start + step, n), device=g.device)
        rotation = so3_grid.rotations_at(node, options.base_order, w.dtype)
        rotation = rotation.expand(g.shape[0], -1, 3, 3)
        slices = source.slices(rotation, options.radius(0), index)
        corr, power = correlations(slices, g[:, None], w, phases)
        found.append((*corr.max(-1), power))
    corr, which, power = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return corr, power, which


def _turned(
    source: SliceSource, index: Tensor, disc: HalfDisc, options: SearchOptions, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Half grid of base slices of every image's own volume, from one slice per direction: parts (b, H, P)."""
    if isinstance(source, MagnifiedSource):  # anisotropy moves points by less than the grid's step does
        source = source.round()
    frames = so3_grid.view_frames(options.base_order, dtype, index.device)
    radius = min(disc.r_max + _MARGIN, source.box_size // 2)
    slices = source.slices(frames.expand(len(index), -1, 3, 3), radius, index)  # (b, directions, P')
    n_psi = so3_grid.n_in_plane(options.base_order)
    even, odd = turn_operators(source.box_size, disc.r_max, radius, n_psi, dtype, index.device)
    real = torch.einsum("bnp,akp->bnak", slices.real, even)
    imag = torch.einsum("bnp,akp->bnak", slices.imag, odd)
    return real.flatten(1, 2), imag.flatten(1, 2)


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)
def turn_operators(
    box_size: int, r_max: int, r_seen: int, n_psi: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """(n_psi / 2, P, P') real operators on real and imaginary parts of a slice: it as seen after a turn by psi.

    The least-squares interpolation of transforms of images of independent pixels within the support: the covariance of
    two frequencies d Fourier pixels apart is 2 J1(x) / x, x = 2 pi support d (the transform of a disc).
    """
    to = half_disc(box_size, r_max).xy.double()
    seen = half_disc(box_size, r_seen).xy.double()
    both = torch.cat([seen, -seen])
    covariance = _disc_transform(torch.cdist(both, both)) + 1e-4 * torch.eye(len(both), dtype=torch.float64)
    psi = (torch.arange(n_psi // 2, dtype=torch.float64) + 0.5) * (2 * math.pi / n_psi)
    c, s = torch.cos(psi), torch.sin(psi)
    turn = torch.stack([torch.stack([c, s], -1), torch.stack([-s, c], -1)], -2)
    where = to @ turn  # (a, P, 2): k Rz(psi), the place of point k in the slice that is not turned
    cross = _disc_transform(torch.cdist(where.flatten(0, 1), both))
    weights = torch.linalg.solve(covariance, cross.T).T.unflatten(0, (len(psi), len(to)))
    one, mate = weights.split(len(seen), -1)  # the values at -k are the conjugates of those at k
    return (one + mate).to(dtype=dtype, device=device), (one - mate).to(dtype=dtype, device=device)


def _disc_transform(distance: Tensor) -> Tensor:
    x = 2 * math.pi * _SUPPORT * distance
    small = x < 1e-6
    x = torch.where(small, torch.ones_like(x), x)
    return torch.where(small, torch.ones_like(x), 2 * torch.special.bessel_j1(x) / x)


def best_shifts(
    prepared: Prepared,
    g: Tensor,  # (b, P) complex
    phases: Tensor,  # (T, P) complex
    slot: Tensor | None,  # (b,) which slices each image takes
) -> tuple[Tensor, Tensor]:
    """Best shift of every rotation: corr (b, 2, H) and its number (b, 2, H); entry 1 is the slice turned by 180 deg.

    A turn by 180 degrees conjugates the slice, so two real products serve both: sum of Re parts +- sum of Im parts.
    """
    if g.device.type == "cpu" and g.dtype == torch.complex64 and loops() is not None:
        return _best_by_loops(prepared, g, phases, slot)
    real, imag = prepared.real, prepared.imag
    H, T = real.shape[1], phases.shape[0]
    step = max(1, _CHUNK // (T * H * 2 + (0 if slot is None else 2 * real[0].numel())))
    found = []
    for start in range(0, g.shape[0], step):
        moved = g[start : start + step, None] * phases
        if slot is None:
            a = (moved.real.flatten(0, 1) @ real[0].T).unflatten(0, (-1, T))
            b = (moved.imag.flatten(0, 1) @ imag[0].T).unflatten(0, (-1, T))
        else:
            own = slot[start : start + step]
            a = torch.bmm(moved.real, real[own].transpose(1, 2))
            b = torch.bmm(moved.imag, imag[own].transpose(1, 2))
        plus, minus = (a + b).max(1), (a - b).max(1)
        found.append([torch.stack(pair, 1) for pair in zip(plus, minus, strict=True)])
    corr, which = (torch.cat(parts) for parts in zip(*found, strict=True))
    return corr, which


def _best_by_loops(prepared: Prepared, g: Tensor, phases: Tensor, slot: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `best_shifts`: products of a few images at a time, whose best shift is taken while they are in the cache."""
    parts = prepared.real, prepared.imag
    b, H, T = g.shape[0], parts[0].shape[1], phases.shape[0]
    corr, which = torch.empty(b, 2, H), torch.empty(b, 2, H, dtype=torch.int32)
    slots = torch.zeros(b, dtype=torch.int64) if slot is None else slot
    order = slots.argsort(stable=True)
    kinds, begin = slots[order].tolist(), 0
    while begin < b:
        end = begin + 1
        while end < b and kinds[end] == kinds[begin] and (end - begin + 1) * T <= _ROWS:
            end += 1
        rows = order[begin:end]
        moved = (g[rows, None] * phases).flatten(0, 1)
        pairs = zip((moved.real, moved.imag), parts, strict=True)
        real, imag = (_product(one.contiguous(), all_[kinds[begin]]).view(-1, T, H) for one, all_ in pairs)
        own = torch.empty(len(rows), 2, H), torch.empty(len(rows), 2, H, dtype=torch.int32)
        loops().best_of_shifts(*(v.numpy() for v in (real, imag, *own)))
        corr[rows], which[rows] = own
        begin = end
    return corr, which.long()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T of float32 matrices on the CPU, by oneDNN where torch has it: twice MKL's speed on AMD (measured)."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "") if _has_onednn() else a @ b.T


@functools.cache
def _has_onednn() -> bool:
    a = torch.arange(6.0).view(2, 3)
    try:
        return bool((torch.ops.mkldnn._linear_pointwise(a, a, None, "none", [], "") == a @ a.T).all())
    except (AttributeError, RuntimeError):
        return False
