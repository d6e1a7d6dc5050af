"""The end of a pose search: Gauss-Newton steps on rotation and shift, off the grid.

The gain is |y|^2 - |T_t y - c S(R)|^2; its normal equations need the slice's derivatives along three turns of the image
frame, taken as central differences of slices (any source can give them), and along the shift, which is 2 pi i k / D S.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fourier import HalfDisc
from .pose_levels import Candidates
from .pose_scores import correlations, gain, shift_phases
from .pose_sources import SliceSource
from .rotations import expmap

__all__ = ["gauss_newton"]

_REACH = 0.25  # Fourier pixels that the outermost point moves by in a central difference
_LIMIT = 0.5  # and at most in a step


def gauss_newton(
    source: SliceSource,
    g: Tensor,  # (b, P) complex, CTF folded in
    w: Tensor,  # (b, P)
    disc: HalfDisc,
    index: Tensor,  # (b,)
    poses: Candidates,  # (b, k)
    steps: int,
    fit_scale: bool = False,
) -> Candidates:
    """Improve every pose by a few steps; a step that does not raise the score is not taken. Scores are exact after."""
    poses = _evaluate(source, g, w, disc, index, poses.rotation, poses.shift, fit_scale)
    for _ in range(steps):
        turn, move = _step(source, g, w, disc, index, poses, fit_scale)
        trial = _evaluate(source, g, w, disc, index, expmap(turn) @ poses.rotation, poses.shift + move, fit_scale)
        better = trial.score > poses.score
        poses = Candidates(
            torch.where(better[..., None, None], trial.rotation, poses.rotation),
            torch.where(better[..., None], trial.shift, poses.shift),
            torch.where(better, trial.score, poses.score),
        )
    return poses


def _evaluate(source, g, w, disc, index, rotation, shift, fit_scale) -> Candidates:
    slices = source.slices(rotation, disc.r_max, index)
    one = torch.ones(1, len(disc), dtype=slices.dtype, device=slices.device)
    corr, power = correlations(slices, g[:, None] * shift_phases(shift, disc), w, one)
    return Candidates(rotation, shift, gain(corr.squeeze(-1), power, fit_scale))


def _step(
    source: SliceSource, g: Tensor, w: Tensor, disc: HalfDisc, index: Tensor, poses: Candidates, fit_scale: bool
) -> tuple[Tensor, Tensor]:
    """Turns (b, k, 3) in radians and moves (b, k, 2) in pixels that solve the normal equations."""
    b, k = poses.score.shape
    delta = _REACH / disc.r_max
    eye = torch.eye(3, dtype=w.dtype, device=w.device)
    turns = expmap(torch.cat([torch.zeros_like(eye[:1]), delta * eye, -delta * eye]))
    slices = source.slices((turns @ poses.rotation[:, :, None]).flatten(1, 2), disc.r_max, index)
    slices = slices.unflatten(1, (k, 7))
    S = slices[:, :, 0]
    moved = g[:, None] * shift_phases(poses.shift, disc)
    along = (2j * torch.pi / disc.box_size) * disc.xy.to(w.dtype).T  # (2, P)
    J = torch.cat([(slices[:, :, 1:4] - slices[:, :, 4:]) / (2 * delta), along * S[:, :, None]], 2)  # (b, k, 5, P)
    if fit_scale:
        corr, power = (moved.conj() * S).real.sum(-1), (w[:, None] * torch.view_as_real(S).square().sum(-1)).sum(-1)
        scale = (corr.clamp(min=0) / power.clamp(min=torch.finfo(power.dtype).tiny))[..., None]
        S, J = S * scale, J * scale[..., None]
    residual = moved - w[:, None] * S
    J, residual = torch.view_as_real(J).flatten(-2), torch.view_as_real(residual).flatten(-2)
    weight = w.repeat_interleave(2, 1)[:, None, None]
    gradient = (J * residual[:, :, None]).sum(-1)
    H = (J * weight) @ J.transpose(-1, -2)
    ridge = 1e-3 * torch.diagonal(H, dim1=-2, dim2=-1) + torch.finfo(w.dtype).tiny
    step = torch.linalg.solve_ex(H + torch.diag_embed(ridge), gradient[..., None])[0].squeeze(-1)
    turn, move = step[..., :3], step[..., 3:]
    turn = turn * (_LIMIT / disc.r_max / turn.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
    reach = disc.box_size * _LIMIT / disc.r_max
    return turn.nan_to_num(), move.clamp(-reach, reach).nan_to_num()
