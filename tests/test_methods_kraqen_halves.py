"""Half sets held apart: nothing fine crosses over, and states survive."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

sys.path.insert(0, str(Path(__file__).parent))
import reconstruct_toy as toy

from cryosuite.data.noise import noise_spectrum
from cryosuite.data.particles import ParticleSet
from cryosuite.errors import InputError
from cryosuite.methods.kraqen_codes import finish
from cryosuite.methods.kraqen_halves import shares_apart
from cryosuite.methods.kraqen_options import KraqenOptions
from cryosuite.reconstruct.class_images import ClusterImages
from cryosuite.reconstruct.weights import ClassWeights

D, N = 24, 400
OPTIONS = KraqenOptions(n_codes=2, em_finish=4)


def two_states(noise: float) -> tuple[ParticleSet, np.ndarray]:
    """Two mirrored molecules, shuffled, and which one each image shows."""
    sets = [toy.particles(N // 2, D, noise, seed, 1.0, centres=c) for seed, c in enumerate((toy.CENTRES, -toy.CENTRES))]
    images = np.concatenate([s.read(np.arange(len(s))) for s in sets])
    order = np.random.default_rng(0).permutation(N)
    parts = [np.concatenate([getattr(s, name) for s in sets])[order] for name in ("rotation", "shift", "ctf")]
    particles = ParticleSet.from_array(images[order], toy.PIXEL, rotation=parts[0], shift=parts[1], ctf=parts[2])
    return particles, np.repeat([0, 1], N // 2)[order]


def test_what_half_b_holds_beyond_the_common_start_never_reaches_half_a(monkeypatch):
    particles, truth = two_states(10.0)
    half = particles.half_sets()
    images = particles.read(np.arange(N))
    fine = torch.fft.fftshift(torch.fft.fft2(torch.randn(N, D, D, generator=torch.Generator().manual_seed(0))))
    axis = torch.arange(D) - D // 2
    fine = torch.fft.ifft2(torch.fft.ifftshift(fine * ((axis[:, None] ** 2 + axis**2) > 7.5**2))).real.numpy()
    images[half == 1] += images.std() * fine[half == 1]
    other = ParticleSet.from_array(
        images, toy.PIXEL, rotation=particles.rotation, shift=particles.shift, ctf=particles.ctf
    )  # fmt: skip
    with pytest.warns(UserWarning, match="no noise spectrum"):
        particles.noise = other.noise = noise_spectrum(particles, np.arange(N))
    # the set's own signal power sets the strength of the Wiener filter of both halves: it is held fixed here
    measured = ClusterImages._measure(ClusterImages(particles))
    monkeypatch.setattr(ClusterImages, "_measure", lambda self: measured)
    start = ClassWeights.from_labels(truth, 2)
    apart = [shares_apart(one, start, OPTIONS).dense()[half == 0] for one in (particles, other)]
    joint = [finish(one, start, OPTIONS).p.dense()[half == 0] for one in (particles, other)]
    assert apart[0].min(1).mean() > 0.05  # the choice is not clear, so it would show
    np.testing.assert_allclose(*apart, atol=2e-3)
    assert np.abs(joint[0] - joint[1]).mean() > 20 * np.abs(apart[0] - apart[1]).mean()


def test_states_survive():
    particles, truth = two_states(1.0)
    start = truth.copy()
    start[::5] = 1 - start[::5]  # a fifth is wrong
    start[7] = -1
    found = shares_apart(particles, ClassWeights.from_labels(start, 2), OPTIONS)
    labels = found.labels()
    assert labels[7] == -1
    keep = labels >= 0
    assert adjusted_rand_score(truth[keep], labels[keep]) > 0.95
    # a code is the same state in both halves
    half = particles.half_sets()
    for h in (0, 1):
        assert (labels == truth)[keep & (half == h)].mean() > 0.95


def test_one_half_set_is_refused():
    particles = toy.particles(20, D)
    particles.half = np.zeros(20, np.int8)
    with pytest.raises(InputError, match="--half-sets"):
        shares_apart(particles, ClassWeights.from_labels(np.zeros(20, int)), OPTIONS)
