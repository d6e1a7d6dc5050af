"""Kernel and prior-mean modes of polish."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import reconstruct_toy as toy

from cryosuite.data.particles import ParticleSet
from cryosuite.errors import InputError
from cryosuite.kernels import shells
from cryosuite.reconstruct.class_sums import accumulate
from cryosuite.reconstruct.masks import union_mask
from cryosuite.reconstruct.polish_kernel import bandwidths, cumulated, kernel_maps, ring_weights, squared_distances
from cryosuite.reconstruct.polish_prior import TAUS, prior_mean
from cryosuite.reconstruct.weights import ClassWeights

D, N = 32, 600


def centres_at(t: float) -> np.ndarray:
    """One blob swings out with t in -1 .. 1."""
    moved = toy.CENTRES.copy()
    moved[0] = [6 * np.cos(1.5 * t), 6 * np.sin(1.5 * t), 0]
    return moved


@pytest.fixture(scope="module")
def swing() -> tuple[ParticleSet, np.ndarray]:
    """Particles of a swinging molecule, 60 places, and their latent (t with a little error)."""
    t = np.repeat(np.linspace(-1, 1, 60), N // 60)
    sets = [toy.particles(N // 60, D, 2.0, seed, centres=centres_at(x)) for seed, x in enumerate(np.unique(t))]
    images = np.concatenate([s.read(np.arange(len(s))) for s in sets])
    order = np.random.default_rng(0).permutation(N)
    parts = [np.concatenate([getattr(s, name) for s in sets])[order] for name in ("rotation", "shift", "ctf")]
    particles = ParticleSet.from_array(images[order], toy.PIXEL, rotation=parts[0], shift=parts[1], ctf=parts[2])
    return particles, (t[order] + 0.02 * np.random.default_rng(1).standard_normal(N))[:, None]


def test_cumulated_rings_equal_direct_kernels(swing):
    particles, z = swing
    half = particles.half_sets()
    distances = squared_distances(z, np.array([[0.2]]))
    h = bandwidths(distances, 5)
    sums = accumulate(particles, ring_weights(distances, h), half)
    grown = {side: list(cumulated(sums, 0, side, h)) for side in (0, 1)}
    for J in (0, 2, 4):
        w = np.maximum(1 - distances / h[J] ** 2, 0).astype(np.float32)
        direct = accumulate(particles, ClassWeights.from_dense(w, cut=0), half)
        for side in (0, 1):
            ours, theirs = grown[side][J].data, direct.load(0, side).data
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4 * float(theirs.abs().max()))


def test_choosing_bandwidths_beats_the_narrowest_and_the_widest(swing):
    particles, z = swing
    points = np.array([[-0.6], [0.0], [0.6]])
    truth = torch.stack([toy.volume(D, centres_at(float(t))) for t in points[:, 0]])
    mask = union_mask(truth)

    def score(fixed: int | None) -> float:
        found = kernel_maps(particles, z, points, fixed=fixed)
        return float(np.mean([float(shells.fsc(a, b, mask).mean()) for a, b in zip(found.maps, truth, strict=True)]))

    chosen, narrow, wide = score(None), score(0), score(7)
    assert chosen > max(narrow, wide)


def test_halves_of_a_kernel_never_mix(swing):
    """Images of half b changed: the plain map of half a at a fixed bandwidth stays as it is."""
    particles, z = swing
    half = particles.half_sets()
    images = particles.read(np.arange(N))
    images[half == 1] *= -3
    other = ParticleSet.from_array(
        images, toy.PIXEL, rotation=particles.rotation, shift=particles.shift, ctf=particles.ctf
    )  # fmt: skip
    one, two = (kernel_maps(p, z, np.array([[0.0]]), half=half, fixed=3) for p in (particles, other))
    torch.testing.assert_close(one.half_a, two.half_a)
    assert float((one.half_b - two.half_b).abs().max()) > 0.1 * float(one.half_b.abs().max())


def test_distances_use_each_particles_precision():
    z = np.array([[1.0, 0.0], [0.0, 2.0]])
    precision = np.array([np.diag([4.0, 1.0]), np.diag([1.0, 0.25])])
    found = squared_distances(z, np.zeros((1, 2)), precision)
    np.testing.assert_allclose(found[:, 0], [4.0, 1.0])
    generated = np.random.default_rng(0).standard_normal((5000, 2)) @ np.array([[3.0, 0], [1.0, 0.1]])
    own = squared_distances(generated, generated.mean(0, keepdims=True))
    assert own.mean() == pytest.approx(2, rel=0.01)  # chi-squared of two degrees


def test_bad_days_of_the_kernel(swing):
    particles, z = swing
    with pytest.raises(InputError, match="all alike"):
        kernel_maps(particles, np.zeros_like(z), np.zeros((1, 1)))
    with pytest.raises(InputError, match="3 latents for 600"):
        kernel_maps(particles, z[:3], np.zeros((1, 1)))
    with pytest.raises(InputError, match="no particle"):
        kernel_maps(particles, z, np.array([[0.0], [0.1], [50.0]]))


@pytest.fixture(scope="module")
def sums():
    particles = toy.particles(300, D, noise=3.0)
    return accumulate(particles, ClassWeights.from_labels(np.zeros(300, int)))


def test_a_right_prior_is_trusted_and_a_wrong_one_is_not(sums):
    truth = toy.volume(D)
    right = prior_mean(sums, 7 * truth[None])  # in another grey scale
    wrong = prior_mean(sums, toy.volume(D, -toy.CENTRES)[None])
    signal = slice(2, 9)
    assert float(right.tau[signal].min()) >= 3
    assert float(wrong.tau[signal].median()) <= 0.1 < max(TAUS)
    mask = union_mask(truth[None])
    plain = prior_mean(sums, torch.zeros(1, D, D, D), mask)
    best, none, bad = (float(shells.fsc(m.maps[0], truth, mask).mean()) for m in (right, plain, wrong))
    assert best > none + 0.05
    assert bad > none - 0.05
    assert float((right.maps[0] * truth).sum() / truth.square().sum()) == pytest.approx(1, abs=0.1)


def test_prior_maps_must_fit(sums):
    with pytest.raises(InputError, match="prior maps of shape"):
        prior_mean(sums, torch.zeros(2, D, D, D))
