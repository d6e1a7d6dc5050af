"""Fourier kernels: the half disc, round trips, shifts, crops, against closed forms and cryoDRGN's arrays."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from cryosuite.kernels import fourier


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def hartley(shared: Path) -> dict[str, np.ndarray]:
    return dict(np.load(shared / "golden" / "hartley" / "hartley.npz"))


@pytest.mark.parametrize("box_size", [32, 48, 64, 128, 256])
def test_half_disc_has_half_the_points_of_the_circle(box_size, hartley):
    assert 2 * len(fourier.half_disc(box_size)) == int(hartley[f"mask_count_D{box_size}"])


def test_half_disc_holds_one_of_each_friedel_pair_sorted_by_radius():
    disc = fourier.half_disc(48, 20)
    points = {tuple(p) for p in disc.xy.tolist()}
    assert len(points) == len(disc)
    assert not any((-x, -y) in points for x, y in points)
    circle = {(x, y) for x in range(-20, 21) for y in range(-20, 21) if 0 < x * x + y * y <= 400}
    assert points | {(-x, -y) for x, y in points} == circle
    assert (disc.radius.diff() >= 0).all()
    assert torch.equal(disc.shell, disc.radius.round().long())


def test_a_smaller_radius_is_a_prefix():
    disc = fourier.half_disc(64)
    for r in (1, 5, 5.5, 31, 32):
        n = disc.count(r)
        assert n == int((disc.radius <= r + 1e-6).sum())
    assert torch.equal(fourier.half_disc(64, 12).xy, disc.xy[: disc.count(12)])


def test_what_inference_cached_can_be_trained_on():
    disc = fourier.half_disc(20, 7)
    with torch.inference_mode():
        fourier.to_half_disc(torch.zeros(1, 20, 20), disc)
        assert disc.frequency.shape == (len(disc), 2)
    images = torch.randn(1, 20, 20, requires_grad=True)
    (fourier.to_half_disc(images, disc).abs().square().sum() + (images.sum() * disc.frequency).sum()).backward()
    assert torch.isfinite(images.grad).all()


def test_half_disc_is_cached_and_refuses_odd_boxes():
    assert fourier.half_disc(32) is fourier.half_disc(32, 16)
    with pytest.raises(ValueError, match="even"):
        fourier.half_disc(31)
    with pytest.raises(ValueError, match="between 1 and 16"):
        fourier.half_disc(32, 17)


def test_coefficients_agree_with_the_centred_transform():
    images = torch.randn(3, 32, 32, dtype=torch.float64)
    disc = fourier.half_disc(32)
    full = fourier.fft2c(images)
    rows, columns = (disc.xy[:, 1] + 16) % 32, (disc.xy[:, 0] + 16) % 32
    assert torch.allclose(fourier.to_half_disc(images, disc), full[:, rows, columns], atol=1e-10)
    assert torch.allclose(fourier.ifft2c(full).real, images, atol=1e-12)
    volume = torch.randn(16, 16, 16, dtype=torch.float64)
    assert torch.allclose(fourier.ifft3c(fourier.fft3c(volume)).real, volume, atol=1e-12)


def test_coefficient_is_the_defining_sum():
    image = torch.randn(16, 16, dtype=torch.float64)
    disc = fourier.half_disc(16)
    axis = torch.arange(-8, 8, dtype=torch.float64)
    kx, ky = disc.xy[:, 0, None, None], disc.xy[:, 1, None, None]
    phase = kx * axis[None, None, :] + ky * axis[None, :, None]
    expected = (image * torch.exp(-2j * torch.pi * phase / 16)).sum((-1, -2))
    assert torch.allclose(fourier.to_half_disc(image, disc), expected, atol=1e-10)


@pytest.mark.parametrize("r_max", [5, 12, 16])
def test_round_trip_of_a_band_limited_image(r_max):
    disc = fourier.half_disc(32, r_max)
    coeffs = torch.randn(4, len(disc), dtype=torch.complex128)
    nyquist = disc.radius == 16
    coeffs[:, nyquist] = coeffs[:, nyquist].real + 0j  # as in any real image
    images = fourier.from_half_disc(coeffs, disc)
    assert torch.allclose(fourier.to_half_disc(images, disc), coeffs, atol=1e-10)
    assert images.mean().abs() < 1e-14
    assert torch.allclose(fourier.from_half_disc(fourier.to_half_disc(images, disc), disc), images, atol=1e-12)


@pytest.mark.parametrize("size", [(6, 8), (6, 7), (4, 6, 8)])
def test_inverse_of_what_is_not_hermitian_hands_on_real_ends_and_is_numpys(size, monkeypatch):
    """The way taken on a GPU, whose transforms suppose what numpy's see to."""
    half = torch.randn(3, *size[:-1], size[-1] // 2 + 1, dtype=torch.complex128)
    expected = fourier.real_inverse(half, size)
    seen, back = [], torch.fft.irfft
    monkeypatch.setattr(torch.fft, "irfft", lambda x, n: seen.append(x) or back(x, n=n))
    torch.testing.assert_close(fourier._axis_by_axis(half, size), expected)
    ends = seen[0][..., 0], seen[0][..., -1] if size[-1] % 2 == 0 else seen[0][..., 0]
    assert all((end.imag == 0).all() and end.real.abs().min() > 0 for end in ends)


def test_a_crop_hands_on_real_ends(monkeypatch):
    seen, back = [], torch.fft.irfft
    monkeypatch.setattr(torch.fft, "irfft", lambda x, n, dim: seen.append((x, dim)) or back(x, n=n, dim=dim))
    image = torch.randn(16, 16, requires_grad=True)
    fourier.fourier_crop(image, 8).square().sum().backward()
    fourier.resize_axis(image.detach(), 6, 0)
    assert len(seen) == 3 and torch.isfinite(image.grad).all()
    for half, dim in seen:
        assert half.size(dim) > 3 and (half.select(dim, -1).imag == 0).all() and (half.select(dim, 0).imag == 0).all()


def test_loss_over_the_half_disc_is_half_the_loss_over_the_image():
    disc = fourier.half_disc(32, 12)
    coeffs = torch.randn(1, len(disc), dtype=torch.complex128)
    images = fourier.from_half_disc(coeffs, disc)
    assert torch.isclose(2 * coeffs.abs().square().sum() / 32**2, images.square().sum())


def test_gradients():
    disc = fourier.half_disc(8, 3)
    images = torch.randn(2, 8, 8, dtype=torch.float64, requires_grad=True)
    coeffs = torch.randn(2, len(disc), dtype=torch.complex128, requires_grad=True)
    shift = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fourier.to_half_disc(x, disc), images)
    assert torch.autograd.gradcheck(lambda x: fourier.from_half_disc(x, disc), coeffs)
    assert torch.autograd.gradcheck(lambda x, t: fourier.phase_shift(x, disc, t), (coeffs, shift))
    assert torch.autograd.gradcheck(lambda x: fourier.fourier_crop(x, 4), images)
    assert torch.autograd.gradcheck(fourier.hartley, images)


def test_shifting_a_delta_moves_it_by_plus_t():
    disc = fourier.half_disc(32)
    image = torch.zeros(1, 32, 32, dtype=torch.float64)
    image[0, 16 + 2, 16 - 5] = 1  # at x = -5, y = +2
    t = torch.tensor([[5 / 32, -2 / 32]], dtype=torch.float64)
    centred = fourier.from_half_disc(fourier.phase_shift(fourier.to_half_disc(image, disc), disc, t), disc)[0]
    assert divmod(int(centred.argmax()), 32) == (16, 16)


def test_shift_agrees_with_cryodrgn(hartley):
    disc = fourier.half_disc(32, 15)
    images = torch.from_numpy(hartley["image"])
    shift = torch.from_numpy(hartley["shift_px"]) / 32
    ours = fourier.phase_shift(fourier.to_half_disc(images, disc), disc, shift)
    theirs = torch.view_as_complex(torch.from_numpy(hartley["translate_ft_re_im"]).contiguous())
    theirs = theirs[:, disc.xy[:, 1] + 16, disc.xy[:, 0] + 16]
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_hartley_and_transform_agree_with_cryodrgn(hartley):
    images = torch.from_numpy(hartley["image"])
    ours, theirs = fourier.hartley(images), torch.from_numpy(hartley["ht2"])
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    full = torch.view_as_complex(torch.from_numpy(hartley["fft2_re_im"]).contiguous())
    assert (fourier.fft2c(images) - full).abs().max() < 1e-5 * full.abs().max()


def test_window_agrees_with_cryodrgn(hartley):
    ours = fourier.window_mask(32).numpy()
    assert np.abs(ours - hartley["window_mask_085_099"]).max() < 1e-5


def test_crop_keeps_the_mean_and_every_frequency_below_nyquist():
    image = torch.randn(2, 48, 48, dtype=torch.float64)
    small = fourier.fourier_crop(image, 32)
    disc = fourier.half_disc(48, 15)
    expected = fourier.to_half_disc(image, disc) * (32 / 48) ** 2
    assert torch.allclose(fourier.to_half_disc(small, fourier.half_disc(32, 15)), expected, atol=1e-10)
    assert torch.allclose(small.mean((-1, -2)), image.mean((-1, -2)))
    assert torch.allclose(fourier.fourier_crop(image, 48), image)
    volume = torch.randn(16, 16, 16, dtype=torch.float64)
    assert torch.isclose(fourier.fourier_crop_volume(volume, 8).mean(), volume.mean())
    with pytest.raises(ValueError, match="even size"):
        fourier.fourier_crop(image, 31)


def test_volume_crop_treats_all_axes_alike():
    volume = torch.randn(16, 16, 16, dtype=torch.float64)
    for axes in ((2, 1, 0), (1, 2, 0)):
        crop = fourier.fourier_crop_volume(volume.permute(axes), 10)
        assert torch.allclose(crop, fourier.fourier_crop_volume(volume, 10).permute(axes), atol=1e-12)


def test_crop_agrees_with_cryodrgn_below_nyquist(shared: Path):
    golden = shared / "golden"
    images = torch.tensor(mrcfile.read(golden / "relion" / "particles.mrcs"))
    theirs = torch.tensor(mrcfile.read(golden / "cryodrgn" / "particles.32.mrcs"))
    ours = fourier.fourier_crop(images, 32) * 2**2  # cryoDRGN multiplies images by (64/32)^2
    disc = fourier.half_disc(32, 15)
    first, second = fourier.to_half_disc(ours[: len(theirs)], disc), fourier.to_half_disc(theirs, disc)
    assert (first - second).abs().max() < 1e-5 * second.abs().max()


def test_float32_and_float64_agree():
    image = torch.randn(1, 64, 64, dtype=torch.float64)
    disc = fourier.half_disc(64)
    single = fourier.to_half_disc(image.float(), disc)
    assert single.dtype == torch.complex64
    assert (single - fourier.to_half_disc(image, disc)).abs().max() < 1e-4
