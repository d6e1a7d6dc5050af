"""Refinement of poses by local projection matching: what it must reach, and what it must not see."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hype_toy import blob_particles, blobs

from cryosuite.data.particles import ParticleSet
from cryosuite.data.spectra import placed
from cryosuite.errors import InputError
from cryosuite.kernels import fourier
from cryosuite.kernels.ctf import ctf
from cryosuite.kernels.rotations import expmap, geodesic_deg
from cryosuite.kernels.slices import extract_slices, volume_transform
from cryosuite.reconstruct.refine import RefineOptions, ball, refine, search_everywhere

NOISE = np.sqrt(10.0)  # images of unit variance: a signal to noise ratio of 0.1


def sharp(box: int, seed: int = 0) -> torch.Tensor:
    """A map of many small Gaussians within 0.35 of the box, with signal up to Nyquist."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(60, 3, generator=generator), dim=1)
    centres = direction * torch.rand(60, 1, generator=generator) ** (1 / 3) * 0.35 * box
    axis = torch.arange(box) - box // 2
    x, y, z = (torch.exp(-((axis - c[:, None]) ** 2) / (2 * 0.9**2)) for c in centres.T)
    return torch.einsum("nz,ny,nx->zyx", z, y, x)


def shaken(particles: ParticleSet, degrees: float, shift: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Poses with turns of that median angle and shifts of that standard deviation (pixels) added."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(len(particles), 3, generator=generator) * np.deg2rad(degrees) / 1.538
    moved = torch.randn(len(particles), 2, generator=generator).numpy() * shift / particles.box_size
    return (expmap(vectors) @ torch.from_numpy(particles.rotation)).numpy(), particles.shift + moved


def degrees_off(found: np.ndarray, particles: ParticleSet) -> np.ndarray:
    """Error of each rotation in the frame of the truth."""
    return geodesic_deg(torch.from_numpy(found), torch.from_numpy(particles.rotation)).numpy()


def pixels_off(found: np.ndarray, particles: ParticleSet) -> np.ndarray:
    """Error of each shift."""
    return np.linalg.norm(found - particles.shift, axis=1) * particles.box_size


@pytest.mark.parametrize(("box", "count"), [(32, 900), (64, 300)])
def test_ten_degrees_become_less_than_three(box: int, count: int) -> None:
    """Poses 10 degrees and 1 pixel off, SNR 0.1 with CTF: refined with each half matched to its own half map."""
    particles, _ = blob_particles([sharp(box)], count, NOISE, seed=1)
    rotation, shift = shaken(particles, 10.0, 1.0)
    assert np.median(degrees_off(rotation, particles)) > 9
    found = refine(particles, rotation, shift)
    assert np.median(degrees_off(found.rotation, particles)) < 3.0
    assert np.median(pixels_off(found.shift, particles)) < 0.5
    assert found.rotation.dtype == np.float32 and found.half_maps[0].shape == (box,) * 3
    assert np.allclose(np.linalg.det(found.rotation), 1, atol=1e-4)
    moved = [record["moved_deg"] for record in found.history]
    assert len(moved) == 3 and moved[0] > moved[1] > moved[2]


def test_an_image_meets_the_map_of_its_own_half_only() -> None:
    """Another map for the second half set changes nothing for the first, and everything for the second."""
    particles, _ = blob_particles([blobs(32, 0)], 120, 1.0, seed=2)
    rotation, shift = shaken(particles, 8.0, 0.5)
    half = np.arange(120) % 2
    one, other = blobs(32, 0), blobs(32, 9)
    runs = [
        refine(particles, rotation, shift, half, maps=pair, options=RefineOptions(rounds=1))
        for pair in ((one, one), (one, other))
    ]
    same = np.abs(runs[0].rotation - runs[1].rotation).max((1, 2)) < 1e-6
    assert same[half == 0].all()
    assert not same[half == 1].any()


def test_noise_does_not_learn_to_agree() -> None:
    """Images without any particle: after three rounds the half maps still share nothing."""
    particles, _ = blob_particles([blobs(32, 0)], 300, 1.0, seed=3)
    noise = np.random.default_rng(0).standard_normal((300, 32, 32)).astype(np.float32)
    empty = ParticleSet.from_array(
        noise, 6.0, ctf=particles.ctf, noise=np.full((1, 17), 32.0**2, np.float32), half=np.arange(300) % 2
    )
    found = refine(empty, particles.rotation, particles.shift)
    assert float(found.fsc[3:].abs().mean()) < 0.12
    assert float(found.fsc[5:].max()) < 0.3


def test_given_maps_may_have_any_grey_scale() -> None:
    """The first round asks which pose fits, not how bright the map is."""
    particles, _ = blob_particles([blobs(32, 0)], 100, 1.0, seed=4)
    rotation, shift = shaken(particles, 8.0, 0.5)
    runs = [
        refine(particles, rotation, shift, maps=scale * blobs(32, 0), options=RefineOptions(rounds=1))
        for scale in (1.0, 37.0)
    ]
    assert np.median(geodesic_deg(*(torch.from_numpy(run.rotation) for run in runs)).numpy()) < 0.05
    assert np.median(degrees_off(runs[0].rotation, particles)) < 3


def test_particles_left_out_of_the_maps_get_poses_all_the_same() -> None:
    """Junk of weight 0 does not harm the map; a good particle of weight 0 is refined like the others."""
    particles, _ = blob_particles([blobs(32, 3, count=12)], 400, 1.5, seed=5)
    images = particles.read(slice(0, 400)).copy()
    images[300:] = 8 * np.random.default_rng(1).standard_normal((100, 32, 32))
    mixed = replace(particles, images=ParticleSet.from_array(images, 6.0).images)
    rotation, shift = shaken(particles, 10.0, 1.0)
    weights = np.ones(400, np.float32)
    weights[250:] = 0
    found = refine(mixed, rotation, shift, weights=weights, options=RefineOptions(rounds=2))
    error = degrees_off(found.rotation, particles)
    assert np.median(error[:250]) < 3 and np.median(error[250:300]) < 3
    assert found.reconstruction.count == 250


def test_images_of_larger_pixels_meet_the_map_at_its_own_scale() -> None:
    """Two fifths of the images have pixels 5 % larger: their poses end as near to the truth as those of the others."""
    box, count, noise = 48, 400, 0.7
    particles, _ = blob_particles([sharp(box)], count)
    large = np.arange(count) % 5 >= 3
    table = particles.ctf.copy()
    table[large, 1] *= 1.05
    spectrum = np.full((1, box // 2 + 1), noise**2 * box**2, np.float32)
    blank = np.zeros((count, box, box), np.float32)
    how = {"rotation": particles.rotation, "ctf": table, "noise": spectrum}
    pixel = table[:, 1].astype(np.float32)
    params = ParticleSet.from_array(blank, pixel, **how).ctf_params()
    disc, truth = fourier.half_disc(box), torch.from_numpy(particles.rotation)
    there = placed(truth, params, float(pixel[0]))
    slices = extract_slices(volume_transform(sharp(box)), there, disc) * ctf(disc.frequency, params)
    images = fourier.from_half_disc(slices, disc)
    images = images / images.std() + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    given = ParticleSet.from_array(images.numpy(), pixel, **how)
    rotation, _ = shaken(particles, 2.0, 0.0)
    found = refine(given, rotation, None, options=RefineOptions(rounds=2, cone=6.0))
    degrees = degrees_off(found.rotation, particles)
    same, other = np.median(degrees[~large]), np.median(degrees[large])
    assert same < 1.0 and other < 1.25 * same, (same, other)  # 1.8 times where the scale is not looked at
    shift = np.linalg.norm(found.shift, axis=1) * box
    assert np.median(shift[large]) < 1.6 * np.median(shift[~large])


def test_rivals_are_tried_too() -> None:
    """A third of the poses is 90 degrees off, and the right one stands second: it is found."""
    particles, _ = blob_particles([sharp(32)], 300, 1.0, seed=7)
    rotation, shift = shaken(particles, 8.0, 0.5)
    wrong = rotation.copy()
    turn = expmap(torch.tensor([[np.pi / 2, 0, 0]], dtype=torch.float32)).numpy()[0]
    wrong[::3] = turn @ wrong[::3]
    both = np.stack([wrong, rotation], 1)
    options = RefineOptions(rounds=2)
    alone = degrees_off(refine(particles, wrong, shift, options=options).rotation, particles)
    error = degrees_off(refine(particles, both, shift, options=options).rotation, particles)
    assert np.median(alone[::3]) > 45
    assert np.median(error[::3]) < 3 and (error < 10).mean() > 0.9


def test_search_over_all_orientations() -> None:
    """Without any pose, against a map of another grey scale: found; of some rows only, in their order."""
    volume = sharp(32)
    particles, _ = blob_particles([volume], 60, 1.5, seed=8)
    rows = np.array([50, 3, 20, 21, 9])
    done: list[int] = []
    rotation, shift, score = search_everywhere(particles, rows, 11.0 * volume, advance=done.append)
    assert rotation.shape == (5, 4, 3, 3) and shift.shape == (5, 2) and sum(done) == 5
    assert (degrees_off(rotation[:, 0], particles.subset(rows)) < 10).all()
    assert np.median(pixels_off(shift, particles.subset(rows))) < 0.5 and (score > 0).all()


def test_the_same_twice_and_progress() -> None:
    """Determinism; every image of every round is counted, whatever the batch."""
    particles, _ = blob_particles([blobs(24, 0)], 90, 1.0, seed=6)
    rotation, shift = shaken(particles, 8.0, 0.5)
    done: list[int] = []
    runs = [
        refine(particles, rotation, shift, options=RefineOptions(rounds=2, batch=batch), advance=done.append)
        for batch in (40, 40, 90)
    ]
    assert sum(done) == 3 * 2 * 90
    assert np.array_equal(runs[0].rotation, runs[1].rotation) and np.array_equal(runs[0].shift, runs[1].shift)
    assert np.median(geodesic_deg(*(torch.from_numpy(run.rotation) for run in runs[1:])).numpy()) < 0.01


def test_bad_input_is_named() -> None:
    """Poses of another set, half sets too small, a map of another box, impossible options."""
    particles, _ = blob_particles([blobs(24, 0)], 60, 1.0)
    with pytest.raises(InputError, match="do not belong to 60 particles"):
        refine(particles, particles.rotation[:50], None)
    with pytest.raises(InputError, match="at least 20 each"):
        refine(particles, particles.rotation, None, half=np.arange(60) < 10)
    with pytest.raises(InputError, match="box 24"):
        refine(particles, particles.rotation, None, maps=blobs(32, 0))
    with pytest.raises(InputError, match="at least one round"):
        RefineOptions(rounds=0)


def test_the_ball_of_turns() -> None:
    """The origin first, nothing outside, and as many as the volume of the ball holds."""
    vectors = ball(12.0, 4.0)
    assert float(vectors[0].abs().max()) == 0
    length = torch.rad2deg(vectors.norm(dim=1))
    assert float(length.max()) <= 12.001 and len(vectors) == 123
    assert len(torch.unique(vectors, dim=0)) == len(vectors)
