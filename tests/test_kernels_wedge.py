"""Missing wedge: how much is missing, symmetry, physical frequencies, what is kept is kept."""

from __future__ import annotations

import pytest
import torch
from sharpen_toy import apply_wedge

from cryosuite.kernels.wedge import data_consistency, wedge_mask


def _full(mask: torch.Tensor, x: int) -> torch.Tensor:
    """The mask (z, y, x//2 + 1) on the full grid (z, y, x), by Friedel symmetry."""
    other = torch.roll(mask.flip(0, 1, 2), (1, 1), (0, 1))  # value at -k, columns x//2 .. 0
    start = 1 if x % 2 == 0 else 0
    return torch.cat([mask, other[..., start : x - mask.shape[-1] + start]], -1)


def _ball(n: int) -> torch.Tensor:
    k = torch.fft.fftfreq(n)
    radius = (k[:, None, None] ** 2 + k[None, :, None] ** 2 + k**2).sqrt()
    return (radius < 0.5) & (radius > 0)


@pytest.mark.parametrize("soft", [0.0, 1.5])
@pytest.mark.parametrize("limits", [(-60.0, 60.0), (-40.0, 65.0), (10.0, 80.0)])
def test_fraction_of_a_ball_that_is_missing(soft, limits):
    n = 64
    full = _full(wedge_mask((n, n, n), limits, soft=soft), n)
    missing = 1 - float(full[_ball(n)].mean())
    assert missing == pytest.approx(1 - (limits[1] - limits[0]) / 180, abs=0.012)  # 1/3 at +-60


@pytest.mark.parametrize("shape", [(16, 12, 20), (15, 12, 21), (16, 13, 17)])
@pytest.mark.parametrize("axis", ["x", "y"])
def test_filtering_twice_by_a_sharp_wedge_is_filtering_once(shape, axis):
    """Only a Friedel-symmetric mask of zeros and ones is a projection."""
    volume = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = wedge_mask(shape, (-50.0, 60.5), axis, (1.0, 1.1, 1.3), 0.0, dtype=torch.float64)
    nyquist = (mask > 0) & (mask < 1)
    assert float(nyquist.double().mean()) < 0.2  # both signs of a Nyquist frequency share one coefficient
    mask = (mask == 1).double()
    once = apply_wedge(volume, mask)
    assert torch.allclose(apply_wedge(once, mask), once, atol=1e-12)
    spectrum = torch.fft.rfftn(once)
    assert torch.allclose(spectrum * (1 - mask), torch.zeros_like(spectrum), atol=1e-10)


def test_rule_at_single_frequencies():
    mask = wedge_mask((32, 32, 32), soft=0.0)
    assert bool((mask[0, :, :] == 1).all())  # kz = 0 is measured, whatever kx and ky
    assert bool((mask[1:, :, 0] == 0).all())  # kx = 0 only at kz = 0
    assert float(mask[3, 7, 2]) == 1.0 and float(mask[4, 7, 2]) == 0.0  # kz / kx = 1.5 and 2, tan 60 = 1.73
    tilted = wedge_mask((32, 32, 32), (0.0, 60.0), soft=0.0)
    assert float(tilted[1, 0, 1]) == 1.0 and float(tilted[-1, 0, 1]) == 0.0  # signs count


def test_axes_exchange():
    shape = (16, 16, 16)
    volume = torch.randn(shape, dtype=torch.float64)
    along_y = apply_wedge(volume, wedge_mask(shape, tilt_axis="y", dtype=torch.float64))
    along_x = apply_wedge(volume.transpose(1, 2), wedge_mask(shape, tilt_axis="x", dtype=torch.float64))
    assert torch.allclose(along_x.transpose(1, 2), along_y, atol=1e-12)


def test_frequencies_are_physical():
    """A box twice as long along z, and one with voxels half as long: the same direction, another index."""
    cube = wedge_mask((32, 8, 32), soft=1.5)
    long = wedge_mask((64, 8, 32), soft=1.5)
    assert torch.allclose(long[::2][1:16], cube[1:16], atol=1e-6)
    fine = wedge_mask((64, 8, 32), soft=1.5, voxel_size=(0.5, 1.0, 1.0))
    assert torch.allclose(fine[1:16], cube[1:16], atol=1e-6)


def test_series_in_a_batch():
    low, high = torch.tensor([-60.0, -40.0]), torch.tensor([60.0, 50.0])
    both = wedge_mask((12, 12, 12), (low, high))
    assert both.shape == (2, 12, 12, 7)
    assert torch.equal(both[1], wedge_mask((12, 12, 12), (-40.0, 50.0)))


def test_whole_range_measures_everything_and_nonsense_is_refused():
    assert bool((wedge_mask((8, 8, 8), (-90.0, 90.0)) == 1).all())
    for limits in ((60.0, -60.0), (-100.0, 60.0)):
        with pytest.raises(ValueError, match="tilt range"):
            wedge_mask((8, 8, 8), limits)
    with pytest.raises(ValueError, match="axis"):
        wedge_mask((8, 8, 8), tilt_axis="z")


def test_measured_coefficients_are_kept_and_missing_ones_are_the_networks():
    torch.manual_seed(0)
    truth, made = torch.randn(2, 1, 16, 16, 16, dtype=torch.float64)
    mask = wedge_mask((16, 16, 16), soft=0.0, dtype=torch.float64)
    mask = (mask == 1).double()
    out = torch.fft.rfftn(data_consistency(apply_wedge(truth, mask), made, mask), dim=(-3, -2, -1))
    kept, left = (torch.fft.rfftn(v, dim=(-3, -2, -1)) for v in (truth, made))
    assert torch.allclose(out[:, mask == 1], kept[:, mask == 1], atol=1e-9)
    assert torch.allclose(out[:, mask == 0], left[:, mask == 0], atol=1e-9)


def test_a_perfect_prediction_stays():
    volume = torch.randn(12, 14, 16, dtype=torch.float64)
    mask = wedge_mask((12, 14, 16), dtype=torch.float64)
    assert torch.allclose(data_consistency(volume, volume, mask), volume, atol=1e-12)
