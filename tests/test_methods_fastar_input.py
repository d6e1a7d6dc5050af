"""What a pose network is given and what its answers come to: images, references, templates, cells, confidence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fastar_toy import SPEC
from hype_toy import blob_particles, blobs
from scipy import ndimage

from cryosuite.data.loader import BatchLoader
from cryosuite.data.particles import ParticleSet
from cryosuite.errors import InputError
from cryosuite.formats.mrc import write_map
from cryosuite.kernels import fourier
from cryosuite.kernels.ctf import ctf
from cryosuite.kernels.rotations import geodesic_deg, random_rotations
from cryosuite.methods.fastar_images import Preparation, Window, choose_window
from cryosuite.methods.fastar_output import judge
from cryosuite.methods.fastar_predict import Cells, MatchPredictor, TargetPredictor, quarter_turns
from cryosuite.methods.fastar_reference import (
    Reference,
    Views,
    gyration,
    load_reference,
    resampled,
    template_views,
)
from cryosuite.nets.multiview import Multiview

NO_CTF = Window(32, 32, 32)


def gaussian(box: int, x: float, y: float, sigma: float = 2.0) -> np.ndarray:
    """An image of one blob, pixels from the origin box // 2."""
    axis = np.arange(box) - box // 2
    return np.exp(-((axis[None] - x) ** 2 + (axis[:, None] - y) ** 2) / (2 * sigma**2)).astype(np.float32)


def plain_set(images: np.ndarray, **values) -> ParticleSet:
    box = images.shape[-1]
    return ParticleSet.from_array(images, 3.0, noise=np.full((1, box // 2 + 1), box**2, np.float32), **values)


def batch_of(particles: ParticleSet):
    return next(iter(BatchLoader(particles, len(particles), shuffle=False, prefetch=0).epoch(0)))


# --- network input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("box", "width", "size"), [(64, 64, 32), (64, 40, 32), (32, 32, 64), (48, 48, 48)])
def test_content_stays_in_its_place(box: int, width: int, size: int) -> None:
    """Cropped, padded or cut: a blob lies where it lay, as a fraction of the field, to a fifth of a pixel."""
    place = (0.09 * width, -0.12 * width)
    particles = plain_set(gaussian(box, *place, sigma=width / 16)[None])
    images, good = Preparation(particles, Window(box, width, size))(batch_of(particles))
    assert good.all() and images.shape == (1, 2, size, size)
    picture = (images[0, 0] - images[0, 0].amin()).clamp(min=0)
    picture = torch.where(picture > 0.5 * picture.amax(), picture, 0)
    axis = (torch.arange(size) - size // 2) / size * width
    x, y = (float((picture.sum(d) * axis).sum() / picture.sum()) for d in (0, 1))
    assert (x, y) == pytest.approx(place, abs=0.2 * width / size)
    assert not images[0, 1].any()  # no CTF is known: the second channel is empty


def test_coloured_noise_becomes_white() -> None:
    """Noise three times stronger at low frequency than at high, its spectrum known: flat afterwards."""
    generator = torch.Generator().manual_seed(0)
    box = 32
    ky, kx = torch.fft.fftfreq(box, 1 / box), torch.arange(box // 2 + 1)
    r = (ky[:, None].square() + kx.square()).sqrt()
    amplitude = 3 - 2 * (r / 16).clamp(max=1)
    noise = torch.fft.irfft2(torch.fft.rfft2(torch.randn(400, box, box, generator=generator)) * amplitude, s=(box, box))
    spectrum = ((3 - 2 * torch.arange(box // 2 + 1) / 16).square() * box**2)[None].numpy()
    particles = ParticleSet.from_array(noise.numpy(), 3.0, noise=spectrum)
    images, _ = Preparation(particles, Window(box, box, box))(batch_of(particles))
    power = torch.fft.rfft2(images[:, 0]).abs().square().mean(0)
    low, high = power[(r > 3) & (r < 6)].mean(), power[(r > 11) & (r < 15)].mean()
    assert float(low / high) == pytest.approx(1, abs=0.12)


def test_the_second_channel_undoes_the_signs_of_the_ctf() -> None:
    """It resembles what is seen times the CTF, which the image itself does not; premultiplied images are left alone."""
    generator = np.random.default_rng(0)
    table = np.zeros((40, 9), np.float32)
    table[:] = [32, 3.0, 20000, 19000, 30, 300, 2.7, 0.1, 0]
    rough = ndimage.gaussian_filter(generator.standard_normal((40, 32, 32)).astype(np.float32), (0, 1, 1))
    particles = plain_set(rough, ctf=table)
    disc = fourier.half_disc(32)
    spectra = fourier.to_half_disc(torch.from_numpy(rough), disc) * ctf(disc.frequency, particles.ctf_params()).sign()
    goal, _ = Preparation(plain_set(rough), NO_CTF)(batch_of(plain_set(fourier.from_half_disc(spectra, disc).numpy())))
    images, _ = Preparation(particles, NO_CTF)(batch_of(particles))
    alike = [float((images[:, c] * goal[:, 0]).mean() / goal[:, 0].square().mean()) for c in (0, 1)]
    assert alike[1] > 0.95 and alike[0] < 0.6
    multiplied = replace(particles, ctf_premultiplied=True)
    images, _ = Preparation(multiplied, NO_CTF)(batch_of(multiplied))
    assert torch.allclose(images[:, 0], images[:, 1], atol=1e-5)


def test_images_that_hold_nothing_are_told() -> None:
    """Zeros and NaN: finite input for the network, and a word."""
    images = np.random.default_rng(0).standard_normal((4, 32, 32)).astype(np.float32)
    images[1], images[2, 3, 4] = 0, np.nan
    particles = plain_set(images)
    found, good = Preparation(particles, NO_CTF)(batch_of(particles))
    assert good.tolist() == [True, False, False, True]
    assert torch.isfinite(found).all() and not found[1].any()


def test_a_small_particle_is_cut_out() -> None:
    """The window never falls below the network's size, nor changes for particles that fill the box."""
    assert choose_window(128, 32, 0.05).width == 38
    assert choose_window(64, 32, 0.02).width == 32
    assert choose_window(64, 32, 0.2).width == 64
    assert choose_window(64, 32, None).width == 64
    assert choose_window(32, 64, 0.05).width == 32


# --- references ------------------------------------------------------------------------------------------------------


def test_a_map_on_the_same_grid_is_taken_as_it_is(tmp_path) -> None:
    volume = blobs(32, 0)
    write_map(tmp_path / "v.mrc", volume.numpy(), 6.0)
    found = load_reference(32, 6.0, tmp_path / "v.mrc", low_pass=0)
    assert torch.equal(found.volume, volume)
    smooth = load_reference(32, 6.0, tmp_path / "v.mrc", low_pass=30).volume
    spectrum, low = torch.fft.rfftn(volume).abs(), torch.fft.rfftn(smooth).abs()
    # molmap's Gaussian: exp(-1) at the resolution itself
    k = 32 * 6 / 30
    near = [int(k), int(k) + 1]
    ratio = torch.stack([low[0, 0, n] / spectrum[0, 0, n] for n in near])
    wanted = torch.exp(-torch.tensor([(n / k) ** 2 for n in near]))
    assert torch.allclose(ratio, wanted, rtol=0.02)


@pytest.mark.parametrize(("own_box", "own"), [(64, 3.0), (40, 5.0), (48, 6.0), (20, 6.0), (33, 6.0)])
def test_maps_of_other_boxes_and_pixels(tmp_path, own_box: int, own: float) -> None:
    """The same blobs sampled on another grid come out the same on the particles' grid."""

    def sampled(box: int, pixel: float) -> torch.Tensor:
        axis = (torch.arange(box) - box // 2) * pixel
        out = torch.zeros(box, box, box)
        for x, y, z in ((20.0, -15, 6), (-24, 3, -18), (2, 21, 12)):
            gauss = [torch.exp(-((axis - c) ** 2) / (2 * 12.0**2)) for c in (z, y, x)]
            out += torch.einsum("i,j,k->ijk", *gauss)
        return out

    write_map(tmp_path / "v.mrc", sampled(own_box, own).numpy(), own)
    found, wanted = load_reference(32, 6.0, tmp_path / "v.mrc", low_pass=0).volume, sampled(32, 6.0)
    inner = slice(8, 24)  # a smaller box does not hold the tails
    assert float((found - wanted)[inner, inner, inner].abs().max()) < 0.03 * float(wanted.max())


def test_details_that_the_voxels_cannot_hold_are_left_out() -> None:
    axis = torch.arange(64) - 32
    coarse, fine = (torch.cos(2 * torch.pi * axis * k / 64).expand(64, 64, 64).contiguous() for k in (6, 20))
    wanted = torch.cos(2 * torch.pi * (torch.arange(32) - 16) * 2 * 6 / 64)
    found = resampled(coarse + fine, 1.0, 32, 2.0)  # 20 of 64 per A: beyond 1 / (2 x 2 A)
    assert float((found[16, 16, 4:28] - wanted[4:28]).abs().max()) < 0.1


def test_references_that_cannot_be_used(tmp_path) -> None:
    """Two at once, no pixel size, no cube, nothing in it."""
    write_map(tmp_path / "zero.mrc", np.zeros((32, 32, 32), np.float32), 6.0)
    write_map(tmp_path / "flat.mrc", np.ones((32, 32, 16), np.float32), 6.0)
    with pytest.raises(InputError, match="either a map"):
        load_reference(32, 6.0, tmp_path / "zero.mrc", tmp_path / "zero.mrc")
    with pytest.raises(InputError, match="empty"):
        load_reference(32, 6.0, tmp_path / "zero.mrc")
    with pytest.raises(InputError, match="cubic"):
        load_reference(32, 6.0, tmp_path / "flat.mrc")


def test_templates_show_the_map_from_their_directions() -> None:
    """A single blob off the centre appears where its rotation projects it to."""
    box, place = 32, np.array([5.0, -3.0, 4.0])
    axis = torch.arange(box) - box // 2
    gauss = [torch.exp(-((axis - c) ** 2) / (2 * 2.0**2)) for c in place[::-1]]
    volume = torch.einsum("i,j,k->ijk", *gauss)
    images, rotation = template_views(volume, Window(box, box, box), 12)
    assert images.shape == (12, 2, box, box) and torch.equal(images[:, 0], images[:, 1])
    for image, R in zip(images[:, 0], rotation, strict=True):
        y, x = np.unravel_index(int(image.argmax()), (box, box))
        assert np.abs(np.array([x, y]) - box // 2 - (R.numpy() @ place)[:2]).max() < 1
    small, _ = template_views(volume, Window(box, 24, 48), 4)
    assert small.shape == (4, 2, 48, 48)


def test_radius_of_gyration_of_a_ball() -> None:
    """sqrt(3/5) of its radius."""
    axis = torch.arange(64) - 32
    inside = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt() < 20
    assert gyration(inside.float()) == pytest.approx(20 * np.sqrt(0.6) / 64, rel=0.02)


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> Multiview:
    torch.manual_seed(0)
    return Multiview(SPEC).eval()


def test_an_answer_depends_on_its_image_alone(network) -> None:
    """In a batch of one or of many, with the templates of one map."""
    particles, _ = blob_particles([blobs(32, 0)], 9, 1.0)
    images, _ = Preparation(particles, NO_CTF)(batch_of(particles))
    reference = Reference(blobs(32, 0), 20.0, "map", 0.17)
    predictor = TargetPredictor(network, reference, NO_CTF)
    whole = predictor(images, torch.arange(9))
    alone = predictor(images[4:5], torch.arange(4, 5))
    assert float(geodesic_deg(whole.rotation[4], alone.rotation[0])) < 0.05
    assert torch.allclose(whole.score[4:5], alone.score, atol=1e-5)
    assert whole.rivals.shape == (9, 4, 3, 3) and torch.equal(whole.rivals[:, 0], whole.rotation)
    assert set(predictor.clock.totals()) >= {"templates", "encode", "decode", "Kabsch", "grid"}


def test_looking_finds_the_view_of_a_clean_picture(network) -> None:
    """Even with random weights an image's vector is nearest to that of the same view; the answer lies between cells."""
    volume = blobs(32, 3, count=12)
    reference = Reference(volume, 20.0, "map", 0.17)
    predictor = MatchPredictor(network, reference, NO_CTF, order=1)
    assert predictor.bank.shape == (576, SPEC.match_dim)
    images = Views(volume, NO_CTF)(predictor.cells[100:104])
    with torch.no_grad():
        network.matcher.log_scale.fill_(np.log(100.0))
    answer = predictor(images, torch.arange(4))
    with torch.inference_mode():
        scores = network.match_scores(network.match(network.encode(images)).vector, predictor.bank)
    assert scores.argmax(1).tolist() == [100, 101, 102, 103]
    assert answer.rotation.shape == (4, 3, 3) and answer.rivals.shape == (4, 4, 3, 3)
    assert (geodesic_deg(answer.rotation, predictor.cells[100:104]) < 25).all()
    assert torch.linalg.det(answer.rotation).allclose(torch.ones(4), atol=1e-4)
    assert ((answer.score > 0) & (answer.score <= 1)).all()
    rivals = geodesic_deg(answer.rivals[:, 1, None], answer.rivals[:, 2:])
    assert float(rivals.min()) > 19.9


def test_quarter_turns_go_with_the_grid(network) -> None:
    """A turned picture is that of a cell on the same fibre; shifts are turned back; pixel D // 2 stays."""
    volume = blobs(32, 3, count=12)
    reference = Reference(volume, 20.0, "map", 0.17)
    plain = MatchPredictor(network, reference, NO_CTF, order=1)
    views, cells, around = Views(volume, NO_CTF), plain.cells, plain.around
    turned = quarter_turns(views(cells[:around]), 1)
    assert torch.allclose(turned, views(cells[:around].roll(around // 4, 0)), atol=1e-3)
    assert torch.equal(quarter_turns(turned, 3), views(cells[:around]))
    place = np.unravel_index(int(quarter_turns(torch.from_numpy(gaussian(32, 5, 2)), 1).argmax()), (32, 32))
    assert (place[1] - 16, place[0] - 16) == (-2, 5)  # from x towards y
    both = MatchPredictor(network, reference, NO_CTF, order=1, turns=4)
    images = views(cells[100:103])
    answers = [p(images, torch.arange(3)) for p in (plain, both)]
    again = both(quarter_turns(images, 1), torch.arange(3))
    turn = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # of the image frame, x towards y
    assert torch.allclose(again.rotation, turn @ answers[1].rotation, atol=1e-3)
    assert torch.allclose(again.shift, answers[1].shift @ turn[:2, :2].T, atol=1e-4)


class Peaked:
    """A grid head whose scores fall off with the angle from planted rotations."""

    def __init__(self, peaks: torch.Tensor) -> None:
        self.peaks = peaks

    def cell_codes(self, cells: torch.Tensor) -> torch.Tensor:
        return cells.flatten(1)

    def grid_scores(self, pooled: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return pooled @ codes.T * codes.shape[-1] ** -0.5


def test_regression_and_cells_come_to_one_answer() -> None:
    """The regression where it is near the best cell, else that cell one level finer; sureness from the cells."""
    truth = random_rotations(2, torch.Generator().manual_seed(0))
    far = random_rotations(2, torch.Generator().manual_seed(9))
    cells = Cells(Peaked(truth), torch.device("cpu"))
    pooled = 120 * truth.flatten(1)  # a von Mises-Fisher around the truth
    near = torch.stack([truth[0], far[1]])
    answer = cells.answer(pooled, near, torch.zeros(2, 2))
    assert torch.equal(answer.rotation[0], truth[0])
    assert float(geodesic_deg(answer.rotation[1], truth[1])) < 8
    assert answer.score.min() > 0.9 and answer.margin.min() > 0
    unsure = cells.answer(0.01 * pooled, truth, torch.zeros(2, 2))
    assert unsure.score.max() < 0.05
    gaps = geodesic_deg(answer.rivals[:, 0, None], answer.rivals[:, 2:])
    assert gaps.shape == (2, 2)


def test_who_is_left_out() -> None:
    """A tenth of each cone of views, although one side of the particle is harder than the other; junk always."""
    rotation = random_rotations(4000, torch.Generator().manual_seed(0)).numpy()
    generator = np.random.default_rng(0)
    hard = rotation[:, 2, 2] > 0
    score = np.where(hard, 0.3, 0.8) + 0.05 * generator.standard_normal(4000)
    good = np.ones(4000, bool)
    good[:50] = False
    judged = judge(score, 5 * score, rotation, good, 0.1)
    out = judged.rejected
    assert out[:50].all() and abs(out[50:].mean() - 0.1) < 0.02
    assert abs(out[50:][hard[50:]].mean() - 0.1) < 0.03  # not only the hard side
    assert abs(judged.confidence[50:, 1].mean()) < 0.05 and judged.confidence[:50, 0].max() == 0
    few = judge(score[:30], score[:30], rotation[:30], good[100:130], 0.1)
    assert few.rejected.sum() == 3
    assert not judge(score, score, rotation, np.ones(4000, bool), 0.0).rejected.any()
