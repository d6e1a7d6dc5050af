"""The endless stream of views: a pure function of seed and number, with the noise and poses that it says."""

from dataclasses import fields, replace

import pytest
import torch

from cryosuite.kernels import fourier
from cryosuite.kernels.rotations import geodesic_deg, random_rotations
from cryosuite.simulate.beads import phantom_beads, project_beads
from cryosuite.simulate.view_sets import (
    ViewOptions,
    ViewSets,
    network_input,
    soft_disc,
    template_input,
    template_rotations,
)

SMALL = ViewOptions(images=16, views=(8, 8), templates=4, beads=24, curriculum=1000)


def same(a: object, b: object) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


def test_batches_are_a_function_of_seed_and_number():
    one, two = ViewSets(SMALL, seed=1), ViewSets(SMALL, seed=1)
    list(map(one.batch, range(3)))  # what was made before does not matter
    assert same(one.batch(5), two.batch(5))
    assert not same(one.batch(5), one.batch(6))
    assert not same(one.batch(5), ViewSets(SMALL, seed=2).batch(5))
    assert not same(one.batch(5), one.batch(5, part=1))


def test_shapes_and_poses():
    batch = ViewSets(SMALL).batch(0)
    assert len(batch) == 2
    assert batch.images.shape == (2, 8, 2, 32, 32) and batch.candidates.shape == (2, 16, 2, 32, 32)
    assert batch.templates.shape == (2, 4, 2, 32, 32) and batch.template_rotation.shape == (2, 4, 3, 3)
    assert batch.rotation.shape == (2, 8, 3, 3) and batch.shift.abs().max() <= SMALL.shift
    assert torch.allclose(torch.linalg.det(batch.rotation), torch.ones(2, 8), atol=1e-5)
    right, hard = batch.candidate_rotation.split(8, 1)
    assert geodesic_deg(right, batch.rotation).max() < 25 and geodesic_deg(right, batch.rotation).median() < 10
    assert geodesic_deg(hard, batch.rotation).median() > 20
    assert bool(batch.known.all()) and torch.isfinite(batch.images).all()


def test_the_picture_is_that_of_the_pose():
    """Without noise to speak of, a particle centred by its shift is the projection at its rotation."""
    options = replace(SMALL, snr=(1e6, 1e6), ctf=0.0, coloured=0.0, neighbours=0.0, jitter_deg=0.0, shift=0.05)
    batch = ViewSets(options).batch(0)
    disc = fourier.half_disc(32, 10)
    images = fourier.to_half_disc(batch.images[0, :, 0], disc)
    centred = fourier.from_half_disc(fourier.phase_shift(images, disc, batch.shift[0]), disc)
    views = fourier.from_half_disc(fourier.to_half_disc(batch.candidates[0, :8, 0], disc), disc)
    for found, wanted in zip(centred, views, strict=True):
        assert torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1] > 0.85  # the view is low-passed


def test_the_curriculum_follows_the_images_seen():
    options = replace(SMALL, views=(2, 8), snr=(10.0, 0.1), ctf_from=0.5)
    stream = ViewSets(options)
    assert stream.snr_floor(0) == pytest.approx(10) and stream.snr_floor(10**9) == pytest.approx(0.1)
    assert stream.snr_floor(500) == pytest.approx(1.0)
    assert stream.view_count(0) == 2 and stream.view_count(10**9) == 8
    assert len(stream.batch(0, seen=0)) == 8 and len(stream.batch(0, seen=1000)) == 2
    late = stream.batch(3, seen=1000)
    assert late.snr.min() >= 0.1 and late.snr.max() <= 1.0
    assert len(stream.batch(7)) == 8  # batch 7 comes after 7 x 16 images


def test_signal_and_noise_are_as_strong_as_said():
    options = replace(SMALL, images=256, views=(256, 256), ctf=0.0, coloured=0.0)
    stream = ViewSets(options)
    generator = torch.Generator().manual_seed(0)
    beads = phantom_beads(1, generator, 24)
    turns = random_rotations(256, generator)
    clean = project_beads(beads, torch.zeros(256, dtype=torch.int64), turns, torch.zeros(256, 2), 32)[None]
    images, _ = stream._exposed(clean, torch.tensor([200.0]), torch.tensor([9.0]), False, generator)
    contrast = 1.03  # mean square of contrasts between 0.7 and 1.3
    assert float(images.var()) - 1 == pytest.approx(9.0 * contrast, rel=0.06)
    noise, _ = stream._exposed(1e-12 * clean, torch.tensor([200.0]), torch.tensor([1e-12]), False, generator)
    assert float(noise.var()) == pytest.approx(1, rel=0.03)


def test_flipping_phases_undoes_the_sign_of_the_ctf():
    options = replace(SMALL, images=32, views=(32, 32), ctf=1.0, ctf_from=0.0, blind=0.0, coloured=0.0, snr=(50, 50))
    batch = ViewSets(replace(options, neighbours=0.0, shift=0.0, jitter_deg=0.0, low_pass=(8, 8))).batch(0)
    views = batch.candidates[0, :32, 0]
    raw, flipped = (
        torch.stack(
            [torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] for a, b in zip(x, views, strict=True)]
        )
        for x in batch.images[0].unbind(1)
    )
    assert flipped.mean() > raw.mean()
    blind = ViewSets(replace(options, blind=1.0)).batch(0)
    assert blind.images[:, :, 1].abs().max() == 0


def test_junk_is_marked_and_holds_no_particle():
    batch = ViewSets(replace(SMALL, junk=0.25, snr=(100, 100), neighbours=0.0)).batch(0)
    assert batch.known.sum(1).tolist() == [6, 6] and not batch.known[:, 6:].any()


def test_structures_take_the_place_of_some_phantoms():
    library = phantom_beads(3, torch.Generator().manual_seed(9), 36).scaled(torch.full((3,), 200.0))
    stream = ViewSets(replace(SMALL, structures=1.0, images=64), library)
    beads, edge = stream.molecules(8, stream.generator(0))
    assert beads.xyz.shape == (8, 36, 3)  # padded to the larger
    radius = (beads.xyz.square().sum(-1) * beads.weight).sum(1).sqrt()
    assert radius.min() > 0.12 and radius.max() < 0.23
    assert edge.min() > 100 and edge.max() < 2000  # Angstrom
    assert torch.isfinite(stream.batch(0).images).all()


def test_templates_cover_all_rotations():
    made = template_rotations(48)
    assert torch.allclose(made @ made.transpose(1, 2), torch.eye(3).expand(48, 3, 3), atol=1e-5)
    assert torch.allclose(torch.linalg.det(made), torch.ones(48), atol=1e-5)
    nearest = geodesic_deg(random_rotations(2000, torch.Generator().manual_seed(0))[:, None], made[None]).amin(1)
    assert nearest.max() < 66 and nearest.mean() < 36


def test_what_the_network_sees_does_not_depend_on_grey_values():
    images = torch.randn(5, 32, 32, generator=torch.Generator().manual_seed(0))
    first = network_input(images)
    assert torch.allclose(first, network_input(7 * images + 3), atol=1e-4)
    assert first.shape == (5, 2, 32, 32) and first[:, 1].abs().max() == 0
    disc = soft_disc(32)
    assert (first[:, 0] * (disc == 0)).abs().max() == 0
    middle = first[:, 0][:, disc == 1]
    assert middle.std() == pytest.approx(1, abs=0.1)
    both = template_input(images)
    assert torch.equal(both[:, 0], both[:, 1]) and torch.isfinite(network_input(torch.zeros(1, 32, 32))).all()
