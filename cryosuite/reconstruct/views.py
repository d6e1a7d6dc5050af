"""Do the classes of a particle set hold different shapes, or the same shape seen from different sides?"""

from __future__ import annotations

import numpy as np

from cryosuite.reconstruct.weights import ClassWeights

LARGE = 0.25  # share of the view that classes tell, from which on a user is told


def view_share(weights: ClassWeights, rotation: np.ndarray) -> float:
    """Share of the view that the class of a particle tells: 0 for classes seen from all sides alike, 1 for views.

    Variance of the viewing direction v, or of its axis (v v^T: the same from in front and behind), whichever is told
    better, between the classes over that of all particles, less what as many classes tell by chance.

    Args:
        weights: shares of N particles in K classes. rotation: (N, 3, 3) of the particles; v is the last row.

    Returns:
        0 to 1; 0 with fewer than two classes.
    """
    p = weights.matrix.astype(np.float64)
    used = np.asarray(p.sum(1)).ravel() > 0
    if weights.n_classes < 2 or used.sum() <= weights.n_classes:
        return 0.0
    mass = np.asarray(p.sum(0)).ravel()
    v = np.asarray(rotation, np.float64)[:, 2]
    chance = (np.count_nonzero(mass) - 1) / (used.sum() - 1)
    told = max(_told(p, mass, values) for values in (v, (v[:, :, None] * v[:, None]).reshape(-1, 9)))
    return float(np.clip((told - chance) / (1 - chance), 0, 1))


def _told(p: object, mass: np.ndarray, values: np.ndarray) -> float:
    """Variance of the class means over that of the values; p: (N, K) shares with the sums ``mass`` over particles."""
    share = np.asarray(p.sum(1)).ravel()
    mean = share @ values / share.sum()
    around = (share[:, None] * (values - mean) ** 2).sum()
    means = (p.T @ values) / np.maximum(mass, 1e-30)[:, None] - mean
    return float((mass[:, None] * means**2).sum() / max(around, 1e-30))
