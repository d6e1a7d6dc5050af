"""Latents to bins: arcs of a ring, clusters otherwise."""

from __future__ import annotations

import numpy as np
import pytest

from cryosuite.errors import InputError
from cryosuite.reconstruct.bins import bins_of, loop_angle


def ring(n: int, noise: float, zdim: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """A tilted ellipse in zdim dimensions with noise all around, and its angle."""
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, n)
    axes = np.linalg.qr(rng.standard_normal((zdim, 2)))[0].T * [[5.0], [2.0]]
    z = np.stack([np.cos(angle), np.sin(angle)], 1) @ axes + noise * rng.standard_normal((n, zdim)) + 3
    return z.astype(np.float32), angle


def test_bins_of_a_noisy_ring_follow_its_angle_and_are_equally_large():
    z, angle = ring(2000, 0.15)
    weights, means = bins_of(z)
    labels = weights.labels()
    assert weights.n_classes == 20 and np.ptp(np.bincount(labels)) <= 1
    phase = np.array([np.mean(np.exp(1j * angle[labels == k])) for k in range(20)])
    assert np.abs(phase).min() > 0.97
    steps = np.diff(np.unwrap(np.angle(phase)))
    assert (np.sign(steps) == np.sign(steps[0])).all()  # once around, in order
    distance = np.linalg.norm(z[None] - means[:, None], axis=2).min(1)
    assert distance.max() < 1  # the point of a bin lies among the particles, not inside the ring


def test_states_of_a_ring_are_not_cut():
    """24 states of exactly one latent each stay whole."""
    state = np.random.default_rng(0).integers(24, size=2400)
    z = np.stack([np.cos(state * np.pi / 12), np.sin(state * np.pi / 12)], 1)
    labels = bins_of(z, 24)[0].labels()
    for s in range(24):
        assert len(np.unique(labels[state == s])) == 1
    assert len(np.unique(labels)) >= 20


@pytest.mark.parametrize("shape", ["cloud", "disc", "line", "clusters", "half ring"])
def test_other_shapes_are_no_ring(shape):
    rng = np.random.default_rng(1)
    angle = rng.uniform(0, 2 * np.pi, 3000)
    on_ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    z = {
        "cloud": rng.standard_normal((3000, 5)),
        "disc": on_ring * np.sqrt(rng.uniform(size=3000))[:, None],
        "line": rng.uniform(size=(3000, 1)) * [[1.0, 2.0]] + 0.01 * rng.standard_normal((3000, 2)),
        "clusters": rng.integers(2, size=(3000, 2)) + 0.05 * rng.standard_normal((3000, 2)),
        "half ring": on_ring[on_ring[:, 1] > 0],
    }[shape]
    assert loop_angle(z) is None
    weights, _ = bins_of(z, 4)
    assert weights.n_classes == 4
    if shape == "clusters":
        corner = np.round(z).astype(int) @ [1, 2]
        assert all(len(np.unique(weights.labels()[corner == c])) == 1 for c in range(4))


def test_a_ring_can_be_asked_for_or_refused():
    z, _ = ring(600, 0.1)
    sizes = [np.bincount(bins_of(z, 6, how=how)[0].labels()) for how in ("loop", "kmeans")]
    assert np.ptp(sizes[0]) == 0 < np.ptp(sizes[1])
    with pytest.raises(InputError, match="expected one of auto, loop, kmeans"):
        bins_of(z, 6, how="arcs")
