"""The bidirectional triplet loss over codes and its alignment term (Gao et al., CVPR 2026; gaps filled by us).

Gradient flows to the codes only: a particle's own code f and its shares p enter as numbers. Once p is one-hot the mixed
code equals the best one and the positive part is constant: the loss acts while assignments are soft.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["triplet_loss", "alignment_loss", "triplet_margin"]


def triplet_loss(
    f: Tensor,  # (b, M) the particle's own code
    codes: Tensor,  # (K, M)
    p: Tensor,  # (b, K) shares
    p_negative: Tensor,  # (b, K) shares of the reversed logits
    margin: Tensor | float,
    unit: Tensor | float | None = None,
) -> Tensor:  # (b,)
    """L_pos + L_neg = [|f - c*|^2 - |f - f~|^2 + m]_+ + [|c* - f|^2 - |c* - f~-|^2 + m]_+.

    c* is the code with the largest share, f~ = sum p c, f~- = sum p_negative c. Distances are divided by M and by the
    mean square of the codes' offsets from their mean (a number; or by ``unit``), and ``margin`` is in the same units.
    """
    f, p, p_negative = f.detach(), p.detach(), p_negative.detach()
    best = codes[p.argmax(1)]
    unit = _unit(codes) if unit is None else unit
    near = (f - best).square().sum(1) / unit
    positive = near - (f - p @ codes).square().sum(1) / unit + margin
    negative = near - (best - p_negative @ codes).square().sum(1) / unit + margin
    return positive.relu() + negative.relu()


def alignment_loss(
    f: Tensor,  # (b, M)
    codes: Tensor,  # (K, M)
    p: Tensor,  # (b, K)
    commitment: float = 0.25,
    unit: Tensor | float | None = None,
) -> Tensor:  # (b,)
    """commitment |f~ - sg[c*]|^2 + |sg[f] - c*|^2 (the form of VQ-VAE), in the units of `triplet_loss`."""
    f, p = f.detach(), p.detach()
    best = codes[p.argmax(1)]
    mixed = (p @ codes - best.detach()).square().sum(1)
    return (commitment * mixed + (f - best).square().sum(1)) / (_unit(codes) if unit is None else unit)


@torch.no_grad()
def triplet_margin(codes: Tensor, share: float) -> Tensor:  # (K, M) -> ()
    """m = share x mean pairwise |c_j - c_k|^2, in the units of `triplet_loss`."""
    K, M = codes.shape
    offsets = (codes - codes.mean(0)).square().sum()
    pairs = 2 * offsets / max(K - 1, 1)  # mean over j != k of |c_j - c_k|^2
    return share * pairs / _unit(codes)


def _unit(codes: Tensor) -> Tensor:
    """M times the mean square of the offsets of the codes from their mean; no gradient."""
    fixed = codes.detach()
    return (codes.shape[1] * (fixed - fixed.mean(0)).square().mean()).clamp_min(1e-12)
