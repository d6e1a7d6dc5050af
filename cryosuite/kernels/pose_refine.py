"""The end of a pose search: Gauss-Newton steps on rotation and shift, off the grid.

The gain is |y|^2 - |T_t y - c S(R)|^2; its normal equations need the slice's derivatives along three turns of the image
frame, taken as central differences of slices (any source can give them), and along the shift, which is 2 pi i k / D S.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fourier import HalfDisc, half_disc
from .pose_options import Candidates
from .pose_scores import gain, loop_arrays, loops, score_shifts, shift_phases, use_loops
from .pose_sources import SliceSource
from .rotations import expmap

__all__ = ["gauss_newton"]

_REACH = 0.25  # Fourier pixels that the outermost point moves by in a central difference
_LIMIT = 0.5  # and at most in a step


def gauss_newton(
    source: SliceSource,
    g: Tensor,  # (b, P) complex, CTF folded in
    w: Tensor,  # (b, P)
    index: Tensor,  # (b,)
    radius: int,
    poses: Candidates,  # (b, k)
    steps: int,
    fit_scale: bool = False,
) -> Candidates:
    """Improve every pose by a few steps; a step that does not raise the score is undone and the next one is halved."""
    disc = half_disc(source.box_size, radius, g.device)
    g, w = g[:, : len(disc)], w[:, : len(disc)]
    best = trial = Candidates(poses.rotation, poses.shift, torch.full_like(poses.score, -torch.inf))
    turn, move = torch.zeros_like(poses.rotation[..., 0]), torch.zeros_like(poses.shift)
    for _ in range(steps):
        sums = _normal_equations(source, g, w, index, disc, trial.rotation, trial.shift)
        trial = Candidates(trial.rotation, trial.shift, gain(sums[..., 0], sums[..., 1], fit_scale))
        better = trial.score > best.score
        best = _better(better, trial, best)
        steps_now = _solve(sums, disc, fit_scale)
        turn, move = (
            torch.where(better[..., None], new, old / 2) for new, old in zip(steps_now, (turn, move), strict=True)
        )
        trial = Candidates(expmap(turn) @ best.rotation, best.shift + move, best.score)
    still = torch.zeros(1, 2, dtype=w.dtype, device=w.device)
    corr, power, _ = score_shifts(source, g, w, index, radius, trial.rotation, trial.shift, still)
    trial = Candidates(trial.rotation, trial.shift, gain(corr, power, fit_scale))
    return _better(trial.score > best.score, trial, best)


def _better(choice: Tensor, a: Candidates, b: Candidates) -> Candidates:
    return Candidates(
        torch.where(choice[..., None, None], a.rotation, b.rotation),
        torch.where(choice[..., None], a.shift, b.shift),
        torch.where(choice, a.score, b.score),
    )


def _turns(disc: HalfDisc, like: Tensor) -> tuple[Tensor, float]:
    """(6, 3, 3) turns by +delta about x, y, z of the image, then by -delta, and delta in radians."""
    delta = _REACH / disc.r_max
    eye = torch.eye(3, dtype=like.dtype, device=like.device) * delta
    return expmap(torch.cat([eye, -eye])), delta


def _normal_equations(
    source: SliceSource, g: Tensor, w: Tensor, index: Tensor, disc: HalfDisc, rotation: Tensor, shift: Tensor
) -> Tensor:  # (b, k, 27)
    """Sums of the normal equations with the five unknowns a = three turns and two moves (pixels).

    sum Re conj(T g) S; sum w |S|^2; sum Re conj(T g) dS_a (5); sum w Re conj(S) dS_a (5); the lower triangle of
    sum w Re conj(dS_a) dS_b, row by row (15).
    """
    turns, delta = _turns(disc, w)
    if use_loops(source, g):
        sums = torch.empty(*shift.shape[:2], 27)
        rest = [v.float().contiguous().numpy() for v in (rotation, shift / disc.box_size, turns)]
        arrays = loop_arrays(source, g, w, index, disc)
        loops().normal_equations(*arrays, disc.box_size, *rest, delta, sums.numpy())
        return sums
    k = rotation.shape[1]
    around = torch.cat([rotation[:, :, None], turns @ rotation[:, :, None]], 2)
    slices = source.slices(around.flatten(1, 2), disc.r_max, index).unflatten(1, (k, 7))
    S = slices[:, :, 0]
    along = (2j * torch.pi / disc.box_size) * disc.xy.to(w.dtype).T  # (2, P)
    J = torch.cat([(slices[:, :, 1:4] - slices[:, :, 4:]) / (2 * delta), along * S[:, :, None]], 2)  # (b, k, 5, P)
    columns = torch.view_as_real(torch.cat([S[:, :, None], J], 2)).flatten(-2)  # (b, k, 6, 2 P)
    moved = torch.view_as_real(g[:, None] * shift_phases(shift, disc)).flatten(-2)
    data = (columns @ moved[..., None]).squeeze(-1)
    gram = (columns * w.repeat_interleave(2, 1)[:, None, None]) @ columns.transpose(-1, -2)
    rows, cols = torch.tril_indices(5, 5, device=w.device)
    parts = [data[..., :1], gram[..., 0, :1], data[..., 1:], gram[..., 0, 1:], gram[..., rows + 1, cols + 1]]
    return torch.cat(parts, -1)


def _solve(sums: Tensor, disc: HalfDisc, fit_scale: bool) -> tuple[Tensor, Tensor]:
    """Turns (b, k, 3) in radians and moves (b, k, 2) in pixels, no longer than half a Fourier pixel at the rim."""
    corr, power, data, model, triangle = sums.split([1, 1, 5, 5, 15], -1)
    if fit_scale:  # the slice and its derivatives at the best scale
        scale = corr.clamp(min=0) / power.clamp(min=torch.finfo(power.dtype).tiny)
        data, model, triangle = data * scale, model * scale**2, triangle * scale**2
    rows, cols = torch.tril_indices(5, 5, device=sums.device)
    H = sums.new_zeros(*sums.shape[:-1], 5, 5)
    H[..., rows, cols] = triangle
    H[..., cols, rows] = triangle
    ridge = 1e-3 * torch.diagonal(H, dim1=-2, dim2=-1) + torch.finfo(sums.dtype).tiny
    step = torch.linalg.solve_ex(H + torch.diag_embed(ridge), (data - model)[..., None])[0].squeeze(-1)
    step = torch.where(step.isfinite(), step, torch.zeros_like(step))
    turn, move = step[..., :3], step[..., 3:]
    turn = turn * (_LIMIT / disc.r_max / turn.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
    reach = disc.box_size * _LIMIT / disc.r_max / torch.pi
    return turn, move.clamp(-reach, reach)
