"""CryoHype's two readings of an image: each from half of its coefficients, judged by the other half."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from hype_toy import blob_particles, blobs
from test_methods_hype import TINY, first_batch

from cryosuite.data.particles import ParticleSet
from cryosuite.data.spectra import measure_spectra
from cryosuite.errors import UserNotice
from cryosuite.kernels import fourier
from cryosuite.methods.hype import Hype, two_halves
from cryosuite.training.method import Step


@pytest.mark.parametrize("sample", [False, True], ids=["all", "sampled"])
@pytest.mark.parametrize("cross", [False, True], ids=["whole", "halves"])
def test_loss_of_the_right_volume_is_one(cross: bool, sample: bool):
    """With the field replaced by the true slices the whitened loss of noisy images is 1, without noise 0."""
    torch.manual_seed(0)
    for noise, expected in ((0.0, 0.0), (1.0, 1.0)):
        particles, _ = blob_particles([blobs(16, 0)], 64, noise=noise, shift=0.0)
        clean, _ = blob_particles([blobs(16, 0)], 64, noise=0.0, shift=0.0)
        changes = {"reading": "halves" if cross else "whole", "sample_coefficients": sample}
        method = Hype(replace(TINY, window=False, march_from=1.0, **changes))
        model = method.build(particles)
        truth = fourier.to_half_disc(first_batch(clean).images, fourier.half_disc(16))
        white = model.noise_amplitude[0, fourier.half_disc(16).shell]
        transfer = model.prepare(first_batch(particles))[0].ctf * white
        rotation = first_batch(clean).rotation
        model.values = lambda q, *_, v=truth / transfer, r=rotation: torch.view_as_real(at_points(v, q, r))
        draws = [float(method.loss(model, first_batch(particles), Step(0, 1))["loss"]) for _ in range(50)]
        assert sum(draws) / len(draws) == pytest.approx(expected, abs=0.05)  # one drawn sample varies by 0.1


def at_points(slices: torch.Tensor, q: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Those values (b, m) of slices (b, P) of 16 pixels, taken at rotations, that lie at frequencies q (b, m, 3)."""
    distance = torch.cdist((q[0] @ rotation[0].T)[:, :2], fourier.half_disc(16).frequency)
    assert float(distance.min(1)[0].max()) < 1e-3
    return slices[:, distance.argmin(1)]


def test_images_that_tell_little_are_read_as_halves():
    """By the signal of a whole image, which neither a window nor the size of its box changes."""
    for noise, halves in ((0.3, False), (12.0, True)):
        particles, _ = blob_particles([blobs(16, 0)], 300, noise=noise)
        method = Hype(TINY)
        with pytest.warns(UserNotice, match="read as two halves") if halves else nullcontext():
            model = method.build(particles)
        assert method.halves is halves and (model.other_views is None) is halves
    particles, _ = blob_particles([blobs(16, 0)], 1000, noise=2.0)
    images = particles.read(np.arange(1000))
    clean = blob_particles([blobs(16, 0)], 1000, noise=0.0)[0].read(np.arange(1000))
    expected = float((clean**2).sum((1, 2)).mean()) / 4
    wide = np.random.default_rng(1).normal(0, 2.0, (1000, 32, 32)).astype(np.float32)
    wide[:, 8:24, 8:24] = images
    noise = np.full((1, 17), 4.0 * 32**2, np.float32)
    padded = ParticleSet.from_array(wide, 6.0, rotation=particles.rotation, noise=noise)
    assert measure_spectra(particles, window=False).seen == pytest.approx(expected, rel=0.2)
    assert measure_spectra(padded, window=False).seen == pytest.approx(expected, rel=0.25)
    assert measure_spectra(padded, window=True).seen == pytest.approx(expected, rel=0.25)


def test_cross_halves_see_one_half_and_are_judged_by_the_other():
    torch.manual_seed(0)
    points = torch.arange(0, 90, 2)  # 45 of them: one is left out
    (seen, judged), (other, judged_other) = two_halves(points, 120)
    assert torch.equal(seen, ~other) and 40 < int(seen.sum()) < 80
    assert not seen[judged].any() and not other[judged_other].any()
    both = torch.cat([judged, judged_other]).sort()[0]
    assert len(judged) == len(judged_other) == 22 and len(both.unique()) == 44 and torch.isin(both, points).all()


def test_an_image_is_not_judged_by_what_was_read_of_it():
    """The gradient with respect to what the encoder is shown ends at the coefficients that do not judge it."""
    particles, _ = blob_particles([blobs(16, 0)], 48, noise=1.0)
    method = Hype(replace(TINY, reading="halves"))
    model, batch = method.build(particles), first_batch(particles)
    shown, image = [], model.image

    def keep(target, batch, seen):
        values = target.values.clone().requires_grad_()
        shown.append((values, seen))
        return image(replace(target, values=values), batch, seen)

    model.image = keep
    method.loss(model, batch, Step(99, 100))["loss"].backward()
    (first, seen), (second, other) = shown
    for values, used in ((first, seen), (second, other)):
        assert values.grad[:, used].abs().amax() > 0 and not values.grad[:, ~used].any()
    assert torch.equal(seen, ~other)
