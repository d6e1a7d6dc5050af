"""Learning-rate curve and frequency marching: pure functions of how far the training has come."""

from __future__ import annotations

import math


def lr_factor(step: int, total: int, warmup: float, floor: float) -> float:
    """Factor on the peak learning rate at optimiser step ``step`` of ``total``.

    Linear warm-up over the first ``warmup`` (fraction of all steps) that is never zero (the first step already
    learns), then a cosine that reaches ``floor`` at the last step.
    """
    rising = min(round(warmup * total), total - 1)
    if step < rising:
        return (step + 1) / (rising + 1)
    progress = (step - rising) / max(total - 1 - rising, 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def march(fraction: float, start: float, end: float, over: float) -> float:
    """A value that goes linearly from ``start`` to ``end`` over the first ``over`` of the training and stays there.

    For frequency marching: ``r_max = march(step.fraction, D / 8, D / 2, 0.4)``.
    """
    if over <= 0:
        return end
    return start + (end - start) * min(max(fraction / over, 0.0), 1.0)
