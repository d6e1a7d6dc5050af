"""Has an embedding collapsed? Numbers that say so, cheap enough to be logged, and what they must stay above.

A predictor of embeddings can win by making all embeddings equal. Then their standard deviation over tokens falls to
zero, they span few directions, or always predicting their mean is as good as the predictor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cryosuite.nets.jepa import smooth_l1

__all__ = ["feature_std", "effective_rank", "mean_ratio", "linear_probe", "guards", "collapsed"]

LOW_STD = 0.3
LOW_RANK = 4.0
HIGH_RATIO = 0.9


def feature_std(tokens: Tensor) -> Tensor:  # (..., E) -> ()
    """Standard deviation over all tokens, the mean over dimensions."""
    return tokens.float().flatten(0, -2).std(0, correction=0).mean()


def effective_rank(tokens: Tensor) -> Tensor:  # (..., E) -> ()
    """exp of the entropy of the normalised singular values of the centred tokens (Roy and Vetterli 2007): 1 .. E.

    1 for equal tokens as well, which span nothing.
    """
    rows = tokens.float().flatten(0, -2)
    rows = rows - rows.mean(0)
    values = torch.linalg.eigvalsh(rows.T @ rows / len(rows)).clamp(min=0)
    singular = (values / values.sum().clamp(min=1e-12)).sqrt()
    share = singular / singular.sum().clamp(min=1e-12)
    return torch.exp(-torch.xlogy(share, share.clamp(min=1e-12)).sum())


def mean_ratio(predicted: Tensor, targets: Tensor) -> Tensor:  # (..., E) twice -> ()
    """Loss of the predictor over that of always predicting the mean target; 1 or more: it has learnt nothing."""
    mean = targets.float().flatten(0, -2).mean(0).expand_as(targets)
    best = smooth_l1(mean, targets)
    return smooth_l1(predicted, targets) / best.clamp(min=1e-8)


def linear_probe(tokens: Tensor, values: Tensor, ridge: float = 1e-3) -> Tensor:  # (n, E), (n, c) -> (c,)
    """R^2 of a linear map from tokens to values (local mean density, mask fraction), fitted on half, tested on half.

    Even rows fit, odd rows test; below 0 where the fit is worse than the mean. Values (n,) give a scalar.
    """
    x, y = tokens.double().flatten(0, -2), values.double().reshape(tokens.flatten(0, -2).shape[0], -1)
    x = (x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-9)
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    fit, test = slice(0, None, 2), slice(1, None, 2)
    gram = x[fit].T @ x[fit] + ridge * len(x[fit]) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(gram, x[fit].T @ y[fit])
    left = (y[test] - x[test] @ weight).square().sum(0)
    total = (y[test] - y[test].mean(0)).square().sum(0).clamp(min=1e-12)
    score = (1 - left / total).float()
    return score[0] if score.numel() == 1 else score


@torch.no_grad()
def guards(predicted: Tensor, targets: Tensor) -> dict[str, Tensor]:  # (..., E) twice
    """All that can be told from a batch: target_std, target_rank, mean_ratio."""
    return {
        "target_std": feature_std(targets),
        "target_rank": effective_rank(targets),
        "mean_ratio": mean_ratio(predicted, targets),
    }


def collapsed(values: dict[str, Tensor | float]) -> list[str]:
    """Names of the guards that fire: std below .3, rank below 4, ratio above .9."""
    signs = {
        "target_std": float(values["target_std"]) < LOW_STD,
        "target_rank": float(values["target_rank"]) < LOW_RANK,
        "mean_ratio": float(values["mean_ratio"]) > HIGH_RATIO,
    }
    return [name for name, fired in signs.items() if fired]
