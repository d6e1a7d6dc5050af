"""Polish: noise goes, signal stays, states help each other, nothing is made up."""

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
from cryosuite.reconstruct import polish_gain
from cryosuite.reconstruct.class_sums import accumulate
from cryosuite.reconstruct.masks import soft_sphere, union_mask
from cryosuite.reconstruct.polish import PolishOptions, polish, raw_fsc, raw_maps
from cryosuite.reconstruct.views import LARGE, view_share
from cryosuite.reconstruct.weights import ClassWeights

D = 32
MOVED = toy.CENTRES + np.array([[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [-3, 3, 4]])


def two_states(n: int = 400, noise: float = 4.0, seed: int = 0) -> tuple[ParticleSet, np.ndarray, torch.Tensor]:
    """Particles of two states that differ in one blob, interleaved; labels; the true maps."""
    sets = [toy.particles(n // 2, D, noise, seed + s, centres=c) for s, c in enumerate((toy.CENTRES, MOVED))]
    images = np.concatenate([s.read(np.arange(len(s))) for s in sets])
    order = np.random.default_rng(seed).permutation(n)
    stack = [np.concatenate([getattr(s, name) for s in sets])[order] for name in ("rotation", "shift", "ctf")]
    particles = ParticleSet.from_array(
        images[order], toy.PIXEL, rotation=stack[0], shift=stack[1], ctf=stack[2]
    )  # fmt: skip
    labels = np.repeat([0, 1], n // 2)[order]
    return particles, labels, torch.stack([toy.volume(D, c) for c in (toy.CENTRES, MOVED)])


def score(maps: torch.Tensor, truth: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    return np.array([float(shells.fsc(a, b, mask).mean()) for a, b in zip(maps, truth, strict=True)])


@pytest.fixture(scope="module")
def noisy():
    return two_states()


def test_polish_beats_class_maps_and_consensus(noisy):
    particles, labels, truth = noisy
    mask = union_mask(truth)
    sums = accumulate(particles, ClassWeights.from_labels(labels))
    found = polish(sums)
    raw = torch.stack([raw_maps(sums, k)[0] for k in (0, 1)])
    consensus = raw_maps(accumulate(particles, ClassWeights.from_labels(np.zeros(len(labels), int))), 0)[0]
    ours, own = score(found.maps, truth, mask), score(raw, truth, mask)
    common = score(torch.stack([consensus, consensus]), truth, mask)
    assert (ours > np.maximum(own, common) + 0.02).all(), (ours, own, common)
    assert found.basis == "modal"  # two states that share most of their mass
    assert found.counts.sum() == len(labels) and not found.from_mean
    # each polished map is nearer to its own state than to the other
    other = score(found.maps, truth.flip(0), mask)
    assert (ours > other).all()


def test_grey_values_survive_where_the_data_are_good():
    particles, labels, truth = two_states(noise=0.3)
    found = polish(accumulate(particles, ClassWeights.from_labels(labels)))
    for ours, true in zip(found.maps, truth, strict=True):
        assert float((ours * true).sum() / true.square().sum()) == pytest.approx(1, abs=0.05)
        assert float(torch.corrcoef(torch.stack([ours.flatten(), true.flatten()]))[0, 1]) > 0.98


def test_pure_noise_returns_almost_nothing():
    generator = np.random.default_rng(5)
    blank = toy.particles(600, D, 0.0)
    images = generator.standard_normal((600, D, D)).astype(np.float32)
    particles = ParticleSet.from_array(images, toy.PIXEL, rotation=blank.rotation, shift=blank.shift, ctf=blank.ctf)
    sums = accumulate(particles, ClassWeights.from_labels(generator.integers(0, 6, 600)))
    found = polish(sums, PolishOptions(passes=1))
    raw = torch.stack([raw_maps(sums, k)[0] for k in range(6)]) * soft_sphere(D)
    assert float(found.gain[0].mean()) < 0.1
    assert float(found.maps.square().sum() / raw.square().sum()) < 0.05


def test_images_ten_times_as_bright_give_maps_ten_times_as_bright(noisy):
    particles, labels, _ = noisy
    weights = ClassWeights.from_labels(labels)
    images = particles.read(np.arange(len(labels))) * 10
    bright = ParticleSet.from_array(
        images, toy.PIXEL, rotation=particles.rotation, shift=particles.shift, ctf=particles.ctf
    )  # fmt: skip
    one, ten = (polish(accumulate(p, weights), PolishOptions(passes=1)).maps for p in (particles, bright))
    torch.testing.assert_close(ten / 10, one, rtol=1e-2, atol=1e-3 * float(one.max()))


def test_bands_sum_to_one_and_are_those_of_the_design():
    assert polish_gain.band_centres(64) == [0, 2, 4, 6, 8, 10, 12, 14, 17, 20, 23, 26, 29, 32]
    for size in (16, 30, 64, 96):
        total = polish_gain.bands(size, polish_gain.half_radius(size)).sum(0)
        torch.testing.assert_close(total, torch.ones_like(total))


def test_without_noise_both_bases_give_the_maps_back():
    generator = torch.Generator().manual_seed(0)
    smooth = torch.stack([toy.volume(D, toy.CENTRES + k) for k in range(3)])
    a = smooth + 1e-4 * torch.randn(smooth.shape, generator=generator)
    b = smooth + 1e-4 * torch.randn(smooth.shape, generator=generator)
    mask = soft_sphere(D)
    a, b = a * mask, b * mask
    for basis in polish_gain.bases(polish_gain.shell_covariance(a, b)).values():
        found = polish_gain.apply_gains(torch.stack([a, b]), mask, basis, 2.5)
        wanted = (a + b) / 2
        assert float((found.maps - wanted).square().sum() / wanted.square().sum()) < 1e-3


def test_score_alone_leaves_the_halves_as_they_are():
    generator = torch.Generator().manual_seed(4)
    signal = torch.randn(3, D, D, D, generator=generator)
    halves = signal + torch.randn(2, 3, D, D, D, generator=generator)
    basis = polish_gain.bases(polish_gain.shell_covariance(*halves))["modal"]
    before, mask = halves.clone(), soft_sphere(D)
    score = polish_gain.apply_gains(halves, mask, basis, 2.5, keep=False)
    assert score.maps is None
    torch.testing.assert_close(halves, before, rtol=1e-4, atol=1e-4)
    kept = polish_gain.apply_gains(halves, mask, basis, 2.5)
    assert kept.score == pytest.approx(score.score, rel=1e-3)
    assert float(halves.square().sum()) < 0.9 * float(before.square().sum())


def test_a_wrong_first_guess_of_the_basis_changes_nothing(noisy, monkeypatch):
    particles, labels, _ = noisy
    sums = accumulate(particles, ClassWeights.from_labels(labels))
    maps = []
    for guess in (True, False):
        monkeypatch.setattr(polish_gain, "related", lambda covariance, guess=guess: guess)
        maps.append(polish(sums, PolishOptions(passes=0)))
    assert maps[0].basis == maps[1].basis
    torch.testing.assert_close(maps[0].maps, maps[1].maps, rtol=1e-3, atol=1e-4)


def test_shell_covariance_of_independent_noise_is_diagonal_and_right():
    generator = torch.Generator().manual_seed(1)
    sigma = torch.tensor([1.0, 2.0, 0.5])
    signal = torch.randn(D, D, D, generator=generator)
    a, b = (signal + sigma[:, None, None, None] * torch.randn(3, D, D, D, generator=generator) for _ in range(2))
    found = polish_gain.shell_covariance(a, b)
    # half the variance of one half: that of the mean of both; D^3 from the unnormalised transform
    N = (found.noise_matrix[8:16] / D**3).mean(0)
    torch.testing.assert_close(N, torch.diag(sigma**2 / 2), atol=0.05, rtol=0.05)
    torch.testing.assert_close(found.signal[8:16].mean(0) / D**3, torch.ones(3, 3), atol=0.08, rtol=0)


def test_chance_level_is_the_spread_of_the_cross_power_of_noise():
    generator = torch.Generator().manual_seed(6)
    weights = polish_gain.bands(D, polish_gain.half_radius(D))
    blur = polish_gain._blur_window(D, 2.0)
    told = polish_gain.chance_level(weights, blur)
    for b in (1, 3, 6):
        spread = []
        for _ in range(6):
            noise = torch.randn(2, D, D, D, generator=generator)
            x = torch.fft.irfftn(torch.fft.rfftn(noise, dim=(1, 2, 3)) * weights[b], s=(D,) * 3)
            x /= x.square().mean((1, 2, 3), keepdim=True).sqrt()
            spread.append(torch.fft.irfftn(torch.fft.rfftn(x[0] * x[1]) * blur, s=(D,) * 3).square().mean())
        assert float(told[b]) == pytest.approx(float(torch.stack(spread).mean().sqrt()), rel=0.2)


def test_gain_minimises_the_held_out_error():
    """In white signal and noise of known power the gain is Wiener's, and any other constant does worse."""
    generator = torch.Generator().manual_seed(2)
    signal = torch.randn(1, D, D, D, generator=generator)
    a, b = (signal + 1.5 * torch.randn(1, D, D, D, generator=generator) for _ in range(2))
    found = polish_gain.apply_gains(torch.stack([a, b]), torch.ones(D, D, D), torch.eye(1), 3.0)
    wiener = 1 / (1 + 1.5**2 / 2)
    assert float(found.mean_gain[5:].mean()) == pytest.approx(wiener, abs=0.05)
    error = float((found.maps - signal).square().mean())
    best = min(float((g * (a + b) / 2 - signal).square().mean()) for g in np.linspace(0, 1, 21))
    assert error < best * 1.15


def test_classes_without_a_half_get_the_mean_of_the_others(noisy):
    particles, labels, truth = noisy
    labels = labels.copy()
    labels[0] = 2  # one image: one half set only
    weights = ClassWeights.from_labels(labels, 4)  # the fourth has none
    with pytest.warns(UserWarning, match="classes 2, 3 have no particles in one of the half sets"):
        found = polish(accumulate(particles, weights), PolishOptions(passes=1))
    assert found.from_mean == [2, 3] and found.maps.shape[0] == 4
    assert bool(torch.isfinite(found.maps).all())
    share = torch.tensor(found.counts[:2].sum(1) / found.counts[:2].sum()).float()
    torch.testing.assert_close(found.maps[3], torch.tensordot(share, found.maps[:2], 1))


def test_classes_that_are_views_of_one_shape_get_its_map():
    particles = toy.particles(900, D, 3.0)
    axis = particles.rotation[:, 2] ** 2
    views = axis.argmax(1)  # seen mostly along x, along y, along z
    truth = toy.volume(D, toy.CENTRES)[None].expand(3, -1, -1, -1)
    mask = union_mask(truth)
    found = {}
    for name, classes in (("views", views), ("random", np.random.default_rng(0).permutation(views))):
        weights = ClassWeights.from_labels(classes)
        found[name] = score(polish(accumulate(particles, weights)).maps, truth, mask).min()
        assert (view_share(weights, particles.rotation) > LARGE) == (name == "views")
    assert found["views"] > found["random"] - 0.02, found


def test_view_share_of_soft_shares_and_of_one_class():
    rotation = toy.particles(600, D, 1.0).rotation
    front = (rotation[:, 2, 2] > 0).astype(np.float32)
    # two caps: the mean direction of a half sphere is 1/2, of a variance of 1/3 in z and 1 in all
    hard = view_share(ClassWeights.from_labels(front.astype(int)), rotation)
    assert hard == pytest.approx(0.25, abs=0.02)
    half = np.stack([0.25 + 0.5 * front, 0.75 - 0.5 * front], 1)
    assert view_share(ClassWeights.from_dense(half), rotation) == pytest.approx(hard / 4, abs=0.01)
    assert view_share(ClassWeights.from_labels(np.zeros(600, int)), rotation) == 0


def test_one_half_set_only_is_refused_in_words(noisy):
    particles, labels, _ = noisy
    sums = accumulate(particles, ClassWeights.from_labels(labels), np.zeros(len(labels), np.int8))
    with pytest.raises(InputError, match="no class has particles in both half sets"):
        polish(sums)
    assert raw_fsc(*raw_maps(sums, 0)[1:], torch.ones(D, D, D)) is None


def test_half_sets_of_the_same_images_are_refused_in_words(noisy):
    particles, labels, _ = noisy
    twice = particles.subset(np.repeat(np.arange(len(particles)), 2))  # every row once in each half set
    half = np.tile([0, 1], len(particles)).astype(np.int8)
    with pytest.raises(InputError, match="the two half maps of every class are the same"):
        polish(accumulate(twice, ClassWeights.from_labels(np.repeat(labels, 2)), half))


def test_bad_options_name_the_flag():
    for wrong, flag in (({"basis": "wavelet"}, "--basis"), ({"passes": -1}, "--passes"), ({"prior": 0}, "--prior")):
        with pytest.raises(InputError, match=flag):
            PolishOptions(**wrong)


def test_maps_do_not_depend_on_the_number_of_threads(noisy):
    particles, labels, _ = noisy
    more = 2 * labels + np.random.default_rng(1).integers(0, 2, len(labels))
    sums = accumulate(particles, ClassWeights.from_labels(more))
    one, three = (polish(sums, threads=threads) for threads in (1, 3))
    assert torch.equal(one.maps, three.maps) and torch.equal(one.half_a, three.half_a)
    assert torch.equal(one.gain, three.gain) and one.basis == three.basis
