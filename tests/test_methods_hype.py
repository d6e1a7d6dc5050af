"""CryoHype: published sizes, what the encoder and the loss see, volumes, sampling, resume."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hype_toy import blob_particles, blobs

from cryosuite.data.images import ArrayImages
from cryosuite.data.loader import BatchLoader
from cryosuite.data.spectra import Spectra, measure_spectra
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError
from cryosuite.kernels import fourier
from cryosuite.kernels.ball import half_ball
from cryosuite.kernels.ctf import ctf
from cryosuite.kernels.shells import fsc
from cryosuite.methods.hype import Hype, inclusion, slice_frequencies, systematic_sample
from cryosuite.methods.hype_input import turn, view_direction
from cryosuite.methods.hype_latent import TokensFromImages, nearest_rows
from cryosuite.methods.hype_model import HypeModel
from cryosuite.methods.hype_options import PRESETS, HypeOptions, preset
from cryosuite.training.loop import fit
from cryosuite.training.method import Step
from cryosuite.training.options import TrainOptions

TINY = HypeOptions(
    dim=32, depth=1, heads=2, patch=4, groups=2, inr_width=32, inr_layers=2, n_frequencies=16, march_from=0.5,
    encoder_input="hartley", encoder_align=False, knn=5, bank=8,
)  # fmt: skip


def flat(box_size: int, groups: int = 1) -> Spectra:
    return Spectra(torch.ones(groups, box_size // 2 + 1), torch.ones(box_size // 2 + 1))


def first_batch(particles, size: int = 64):
    return next(iter(BatchLoader(particles, size, shuffle=False, prefetch=0).epoch(0)))


@pytest.fixture(scope="module")
def tiny_set():
    return blob_particles([blobs(16, 0), blobs(16, 1)], 48, noise=0.3)


# sizes and presets ---------------------------------------------------------------------------------------------------


def test_paper_preset_has_the_published_number_of_parameters():
    options = preset("paper", gpu=False)[1].options
    with torch.device("meta"):
        model = HypeModel(128, options, flat(128))
    assert sum(p.numel() for p in model.parameters()) == 49_806_721
    assert sum(p.numel() for p in model.hyper.heads.parameters()) == 3_452_800
    assert sum(p.numel() for p in model.hyper.bases.parameters()) == 3_544_065
    with torch.device("meta"):
        deeper = HypeModel(128, replace(options, depth=8), flat(128))
    assert sum(p.numel() for p in deeper.parameters()) == 63_977_857


def test_auto_takes_the_small_preset_without_a_gpu():
    assert preset("auto", gpu=False)[0] == "small"
    assert preset("auto", gpu=True)[0] == "default"
    wide = preset("auto", gpu=False, box_size=64)[1].options
    assert (wide.inr_width, wide.groups, wide.n_frequencies) == (256, 8, 192)
    assert preset("small", gpu=False, box_size=64, inr_width=128)[1].options.inr_width == 128
    assert preset("small", gpu=False, box_size=32)[1].options == PRESETS["small"].options
    assert preset("small", gpu=False, groups=8)[1].options == replace(PRESETS["small"].options, groups=8)
    with pytest.raises(InputError, match="--preset huge: expected auto, small"):
        preset("huge", gpu=False)


@pytest.mark.parametrize(
    "change, message",
    [({"loss": "l1"}, "--loss l1: expected one of whitened, mse"), ({"heads": 5}, "--heads 5"), ({"knn": 0}, "--knn 0"),
     ({"groups": 5}, "--groups 5"), ({"march_from": 0.0}, "--march 0.0"),
     ({"inr_width": 0}, "--inr-dim 0"), ({"march_over": -1.0}, "--march-over -1.0"),
     ({"feat_sigma": 0.0}, "--feat-sigma 0.0"),
     ({"encoder_rmax": -4}, "--encoder-rmax -4"), ({"patch": -4}, "--patch -4")],
)  # fmt: skip
def test_impossible_options_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        replace(TINY, **change)


def test_missing_poses_and_patches_that_do_not_fit_are_refused(tiny_set):
    particles = tiny_set[0]
    with pytest.raises(InputError, match="--patch 5: must divide"):
        Hype(replace(TINY, patch=5)).check(particles)
    with pytest.raises(InputError, match="needs poses"):
        Hype(TINY).check(replace(particles, rotation=None))


# what goes in --------------------------------------------------------------------------------------------------------


def test_window_of_the_particles_is_the_published_one(golden):
    values = np.load(golden / "hartley" / "hartley.npz")
    window = fourier.window_mask(values["image"].shape[-1])
    assert np.allclose(window, values["window_mask_085_099"], atol=1e-5)


def test_shifted_particles_look_like_centred_ones():
    volume = [blobs(16, 0)]
    centred, _ = blob_particles(volume, 8, shift=0.0)
    shifted, _ = blob_particles(volume, 8, shift=0.08)
    model = Hype(replace(TINY, window=False)).build(centred)
    a, b = (model.prepare(first_batch(p))[0].values for p in (centred, shifted))
    inside = fourier.half_disc(16).radius < 7.5  # the Nyquist coefficients of a sub-pixel shift are not unique
    # the two sets are each scaled to unit variance: compare up to that scale
    scale = (b[:, inside].abs().sum() / a[:, inside].abs().sum()).item()
    assert torch.allclose(a[:, inside] * scale, b[:, inside], atol=2e-3 * b.abs().max().item())


def test_encoder_sees_the_phase_flipped_particle(tiny_set):
    """Flipping the sign of the CTF and of the data together changes nothing that the encoder sees."""
    particles = tiny_set[0]
    model = Hype(TINY).build(particles)
    batch = first_batch(particles)
    target, image = model.prepare(batch)
    disc = fourier.half_disc(16)
    for scale in ("noise", "total", "wiener"):
        model.input.options = replace(TINY, encoder_scale=scale)
        seen = model.input(target, disc, batch)
        target.values.neg_()
        target.ctf.neg_()
        assert torch.allclose(model.input(target, disc, batch), seen, atol=1e-5)
    assert image.shape == (48, 16, 16)


def test_noise_is_whitened():
    """Pure noise, coloured: values of unit variance in every shell, the encoder's image of order 1."""
    rng = np.random.default_rng(0)
    images = fourier.fourier_crop(torch.from_numpy(rng.normal(size=(400, 32, 32)).astype(np.float32)), 16)
    particles, _ = blob_particles([blobs(16, 0)], 400)
    disc = fourier.half_disc(16)
    colour = 1 + disc.radius / 4
    coloured = fourier.from_half_disc(fourier.to_half_disc(images, disc) * colour, disc)
    power = fourier.to_half_disc(images, disc).abs().square().mean()
    noise = (power * (1 + np.arange(9) / 4) ** 2)[None].numpy().astype(np.float32)
    particles = replace(particles, images=ArrayImages(coloured.numpy()), noise=noise)
    model = Hype(replace(TINY, window=False)).build(particles)
    target, image = model.prepare(first_batch(particles, 400))
    assert target.values.abs().square().mean() == pytest.approx(1, abs=0.08)
    assert image.std() == pytest.approx(1, abs=0.15)
    assert 0.0 < model.envelope.max() < model.noise_amplitude.max()


def test_in_plane_angle_and_hemisphere_are_taken_out():
    """Images of one axis of view look alike after the turn, at all in-plane angles and from both ends."""
    from cryosuite.kernels import rotations

    angles = [(40.0, 65.0, psi) for psi in (0.0, 50.0, 170.0, -100.0)] + [(220.0, 115.0, 30.0), (220.0, 115.0, -75.0)]
    rotation = rotations.euler_to_matrix(torch.tensor(angles))
    points = torch.tensor([[3.0, 1.0, -2.0], [-2.0, 4.0, 1.0], [0.0, -5.0, 3.0]])
    axis = torch.arange(32) - 16.0
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    seen = points @ rotation.transpose(1, 2)  # (n, 3, 3): R p
    images = sum(
        torch.exp(-((x - p[:, 0, None, None]) ** 2 + (y - p[:, 1, None, None]) ** 2) / 8) for p in seen.unbind(1)
    )
    turned = turn(images, rotation)
    assert (turned - turned[:1]).abs().max() < 0.1
    assert (images[1:] - images[:1]).abs().amax((1, 2)).min() > 0.3
    assert torch.allclose(turned[0], images[0], atol=1e-4)
    direction = view_direction(rotation)
    assert torch.allclose(direction, direction[:1].expand(6, -1), atol=1e-5)


def test_spectra_find_the_signal():
    particles, _ = blob_particles([blobs(16, 0), blobs(16, 1)], 400, noise=0.5)
    spectra = measure_spectra(particles, window=False)
    assert spectra.noise.shape == (1, 9)
    clean, _ = blob_particles([blobs(16, 0), blobs(16, 1)], 400, noise=0.0)
    truth = measure_spectra(replace(clean, noise=np.full((1, 9), 1e-6, np.float32)), window=False).signal
    assert torch.allclose(spectra.signal[1:5], truth[1:5], rtol=0.2)


def test_images_multiplied_by_their_ctf_give_the_same_target(tiny_set):
    particles = tiny_set[0]
    disc = fourier.half_disc(16)
    images = torch.from_numpy(particles.read(slice(None)))
    transfer = ctf(disc.frequency, particles.ctf_params())
    multiplied = fourier.from_half_disc(fourier.to_half_disc(images, disc) * transfer, disc)
    noise = particles.noise * float(transfer.square().mean())
    other = replace(particles, images=ArrayImages(multiplied.numpy()), noise=noise, ctf_premultiplied=True)
    method = Hype(replace(TINY, window=False))
    plain, undone = (method.build(p).prepare(first_batch(p))[0] for p in (particles, other))
    seen = transfer.abs() > 0.1
    inside = seen & (disc.radius < 7.5)
    scale = (plain.ctf[inside] / undone.ctf[inside]).median()
    assert scale == pytest.approx(1, abs=0.3)
    ratio = undone.values[inside] / undone.ctf[inside]
    assert torch.allclose(ratio, plain.values[inside] / plain.ctf[inside], rtol=1e-2, atol=1e-2)
    assert (undone.ctf[~seen] == 0).all() and (undone.values[~seen] == 0).all()


# the field and its volumes -------------------------------------------------------------------------------------------


def test_slices_lie_where_the_convention_says():
    from cryosuite.kernels import rotations

    rotation = rotations.random_rotations(3, dtype=torch.float32)
    frequency = fourier.half_disc(16).frequency
    padded = torch.cat([frequency, torch.zeros(len(frequency), 1)], dim=1)
    assert torch.allclose(slice_frequencies(frequency, rotation), padded @ rotation, atol=1e-6)


def test_half_ball_and_its_mirror_fill_the_ball():
    half = half_ball(16)
    both = {tuple(p) for p in half.tolist()} | {tuple(p) for p in (-half).tolist()}
    axis = torch.arange(-8, 9)
    radius2 = sum(a**2 for a in torch.meshgrid(axis, axis, axis, indexing="ij"))
    assert len(both) == 2 * len(half) == int((radius2 <= 64).sum()) - 1


@pytest.mark.parametrize("kind", ["complex", "hartley"])
@pytest.mark.parametrize("conditioning", ["hyper", "concat"])
def test_volumes_hold_the_values_of_the_field(kind, conditioning):
    """The transform of a decoded volume is what the network says, on a central slice too; background mean zero."""
    options = replace(TINY, field=kind, conditioning=conditioning)
    model = HypeModel(16, options, flat(16)).eval()
    tokens = torch.randn(2, sum(model.layer_tokens), 32)
    volumes = model.volumes(tokens)
    assert volumes.shape == (2, 16, 16, 16) and volumes.dtype == torch.float32
    disc = fourier.half_disc(16, 7)
    q = torch.cat([disc.frequency, torch.zeros(len(disc), 1)], dim=1).expand(2, -1, -1)
    with torch.no_grad():
        expected = torch.view_as_complex(model.values(q, disc.radius, model.condition(tokens)).contiguous())
    found = fourier.to_half_disc(volumes.sum(1), disc)  # projection along z = central slice
    assert torch.allclose(found, expected, atol=1e-3 * expected.abs().max().item())
    corner = volumes[:, :2, :2, :2]
    assert corner.mean().abs() < volumes.std()


def test_marching_uses_a_growing_prefix(tiny_set):
    method = Hype(replace(TINY, reading="halves"))
    model = method.build(tiny_set[0])
    seen = []
    values = model.values
    model.values = lambda q, radius, condition: (seen.append(float(radius.max())), values(q, radius, condition))[1]
    for index in (0, 20, 40, 99):
        method.loss(model, first_batch(tiny_set[0]), Step(index, 100))
    assert len(seen) == 8  # two readings a step
    seen = [max(two) for two in zip(seen[::2], seen[1::2], strict=True)]
    assert seen[0] == 4.0 and seen[2] == seen[3] == 8.0 and 4 < seen[1] < 8


@pytest.mark.parametrize(
    "change",
    [{"field": "hartley"}, {"loss": "mse"}, {"hyper": "lowrank"}, {"inr": "triplane"}, {"conditioning": "concat"},
     {"sample_coefficients": True}, {"low_memory": True}, {"encoder_input": "real"}, {"encoder_align": True},
     {"pose_context": True}, {"reading": "halves"}, {"reading": "halves", "sample_coefficients": True},
     {"encoder_rmax": 4, "encoder_lowpass": 3.0}, {"encoder_scale": "wiener"}],
    ids=str,
)  # fmt: skip
def test_every_option_trains_every_parameter(tiny_set, change):
    method = Hype(replace(TINY, **change))
    torch.manual_seed(0)
    model = method.build(tiny_set[0])
    method.loss(model, first_batch(tiny_set[0]), Step(60, 100))["loss"].backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    z = method.encode(model, first_batch(tiny_set[0]))
    assert z.shape[0] == 48 and z.ndim == 2 and z.dtype == torch.float32


# sampling of coefficients --------------------------------------------------------------------------------------------


def test_inclusion_chances_sum_up_and_follow_the_snr():
    snr = torch.logspace(2, -3, 200)
    always = torch.arange(200) < 20
    chance = inclusion(snr, always, 80)
    assert (chance[:20] == 1).all() and (chance > 0).all() and (chance <= 1).all()
    assert float(chance.sum()) == pytest.approx(80, rel=0.12)
    assert (chance[1:] <= chance[:-1] + 1e-6).all()


def test_systematic_sample_is_unbiased():
    torch.manual_seed(0)
    chance = inclusion(torch.logspace(1, -2, 100), torch.arange(100) < 10, 40)
    value = torch.rand(100)
    sums, counts = [], set()
    for _ in range(800):
        chosen = systematic_sample(chance)
        sums.append(float((value[chosen] / chance[chosen]).sum()))
        counts.add(len(chosen))
    assert np.mean(sums) == pytest.approx(float(value.sum()), rel=0.02)
    assert max(counts) - min(counts) <= 1


# training ------------------------------------------------------------------------------------------------------------

SHORT = TrainOptions(epochs=2, batch_size=16, lr=1e-3, log_every=1, save_every=2, accelerator="cpu", precision="32")


def test_resumed_training_gives_the_same_curve(tmp_path, tiny_set):
    particles = tiny_set[0]
    whole = fit(Hype(TINY), particles, RunDir(tmp_path / "whole"), SHORT)
    stop = replace(SHORT, max_minutes=1e-9)  # stops with a checkpoint after the first step
    for part in range(3):
        fit(Hype(TINY), particles, RunDir(tmp_path / "parts"), stop, resume=part > 0)
    resumed = fit(Hype(TINY), particles, RunDir(tmp_path / "parts"), SHORT, resume=True)
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
def test_two_volumes_are_learnt_and_told_apart(tmp_path):
    """256 clean images of two volumes, 300 steps: the loss falls below 5 % of the signal, volumes are right."""
    volumes = [blobs(32, 0), blobs(32, 1)]
    particles, labels = blob_particles(volumes, 256)
    options = replace(PRESETS["small"].options, knn=10, bank=16, march_from=0.6, march_over=0.2)
    method = Hype(options)
    training = TrainOptions(epochs=38, batch_size=32, lr=2e-3, ema=0.9, accelerator="cpu", save_every=38)
    model = fit(method, particles, RunDir(tmp_path / "run"), training).model
    with torch.no_grad():
        batch = first_batch(particles, 256)
        power = float(model.prepare(batch)[0].values.abs().square().mean())
        loss = float(method.loss(model, batch, Step(303, 304))["loss"])
        z = method.embed(model, particles, progress=False)
        centres = torch.from_numpy(np.stack([z[labels == k].mean(0) for k in (0, 1)]))
        decoded = method.decode(model, centres)
    assert loss < 0.05 * power
    for k in (0, 1):
        right, wrong = fsc(decoded[k], volumes[k])[:10].mean(), fsc(decoded[k], volumes[1 - k])[:10].mean()
        assert right > 0.9 and right > wrong + 0.2


def test_pixel_sizes_of_rows_reach_the_slices(tiny_set):
    """A point of an image with larger pixels lies nearer to the centre of the one volume."""
    particles = tiny_set[0]
    table = particles.ctf.copy()
    table[1::2, 1] = 7.5
    mixed = replace(particles, ctf=table, pixel_size=table[:, 1])
    method = Hype(replace(TINY, march_from=1.0, reading="whole"))
    model, seen = method.build(mixed), []
    model.values = lambda q, radius, condition: seen.append(q) or torch.zeros(*q.shape[:2], 2)
    method.loss(model, first_batch(mixed), Step(99, 100))
    radius = fourier.half_disc(model.box_size).radius / model.box_size
    found = seen[0].norm(dim=-1) / radius
    torch.testing.assert_close(found[::2], torch.ones_like(found[::2]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1::2], torch.full_like(found[1::2], 6.0 / 7.5), rtol=1e-5, atol=1e-5)


def test_options_without_effect_are_told():
    options = HypeOptions(inr="triplane", march_from=1.0)
    assert options.without_effect(["feat_sigma", "march_over", "knn"]) == {
        "feat_sigma": "with --inr triplane", "march_over": "with --march 1",
    }  # fmt: skip
    assert not HypeOptions().without_effect(["feat_sigma", "march_over", "knn", "hyper"])


def test_a_broken_image_is_near_to_nothing():
    """Its latent is NaN: it belongs to no volume, not even where all the others are asked for."""
    z = np.arange(6, dtype=np.float32)[:, None].repeat(2, 1)
    z[4] = np.nan
    assert sorted(nearest_rows(z, np.zeros((1, 2)), 6)[0]) == [0, 1, 2, 3, 5]
    read = []
    tokens = TokensFromImages(
        z, lambda rows: read.extend(rows) or [(rows, torch.zeros(len(rows), 1, 1))], "cluster", 1, 1
    )
    tokens(torch.zeros(1, 2))
    assert read == [0, 1, 2, 3, 5]
