"""Grey values of maps: the molecule is found, and neither contrast, offset nor empty space around it matter."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cryosuite.kernels.map_norm import NORMS, auto_mask, grey_range, occupied, quantile, to_unit


def blob(n=64, radius=12.0, centre=None, seed=0, noise=0.1):
    """A ball of random, blurred density (about 1) in noise."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(n) - (n // 2 if centre is None else centre)
    distance = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).float().sqrt()
    texture = 1 + 0.5 * F.avg_pool3d(torch.randn(1, n, n, n, generator=generator), 3, 1, 1)[0] * 3
    return (distance < radius) * texture + noise * torch.randn(n, n, n, generator=generator), distance


def test_mask_holds_the_molecule_and_little_else():
    volume, distance = blob()
    mask = auto_mask(volume, 1.0)
    assert mask[distance < 11].all()
    assert not mask[distance > 20].any()


@pytest.mark.parametrize("voxel", [0.5, 1.0, 2.0, 10.0])
def test_mask_at_any_voxel_size(voxel):
    volume, distance = blob(radius=16)
    mask = auto_mask(volume, voxel)
    assert mask.shape == volume.shape and mask[distance < 12].float().mean() > 0.99
    assert mask[distance > 28].float().mean() < 0.01


def test_small_molecule_in_a_large_noisy_box():
    """Otsu's threshold alone cuts the noise in two here."""
    volume, distance = blob(n=96, radius=8, noise=0.3)
    assert auto_mask(volume, 1.0).float().mean() < 0.05
    assert auto_mask(volume, 1.0)[distance < 6].all()


def test_contour_is_the_level_of_the_map_itself():
    volume, distance = blob(noise=0)
    mask = auto_mask(volume, 1.0, contour=0.2)
    assert mask[distance < 11].all() and not mask[distance > 18].any()
    assert not auto_mask(volume, 1.0, contour=100.0).any()


def test_constant_maps_have_no_mask_and_no_range():
    flat = torch.full((16, 16, 16), 3.0)
    assert not auto_mask(flat, 1.0).any() and not occupied(flat, 1.0).any()
    for norm in NORMS:
        with pytest.raises(ValueError, match="3"):
            grey_range(flat, 1.0, norm)
    with pytest.raises(ValueError, match="finite"):
        grey_range(torch.tensor([[[1.0, float("nan")]]]), 1.0)
    with pytest.raises(ValueError, match="softmax"):
        grey_range(torch.rand(4, 4, 4), 1.0, "softmax")


def test_weak_parts_are_occupied_though_outside_the_mask():
    volume, _ = blob(n=96, radius=14, noise=0.02)
    volume[10:20, 10:20, 10:20] += 0.2
    found, mask = occupied(volume, 1.0), auto_mask(volume, 1.0)
    assert found[13:17, 13:17, 13:17].all() and not mask[13:17, 13:17, 13:17].any()
    assert found[mask].all() and found.float().mean() < 0.15


def test_nothing_is_occupied_in_noise_alone():
    for seed in range(3):
        noise = torch.randn(72, 72, 72, generator=torch.Generator().manual_seed(seed))
        coarse = F.avg_pool3d(noise[None], 3, 1, 1)[0]
        assert not occupied(noise, 1.0).any() and not occupied(coarse, 1.0).any()
    assert occupied(blob(noise=0.3)[0], 1.0).any()


@pytest.mark.parametrize("norm", NORMS)
def test_contrast_does_not_matter(norm):
    volume, _ = blob()
    lo, hi = grey_range(volume, 1.0, norm)
    one = to_unit(volume, lo, hi)
    lo, hi = grey_range(1e-3 * volume, 1.0, norm)
    np.testing.assert_allclose(one, to_unit(1e-3 * volume, lo, hi), atol=2e-3)
    assert float(one.min()) >= 0 and float(one.max()) <= 1


def test_offset_does_not_matter():
    volume, _ = blob()
    lo, hi = grey_range(volume, 1.0)
    assert grey_range(50 * volume + 1e4, 1.0) == pytest.approx((50 * lo + 1e4, 50 * hi + 1e4), abs=0.1)


def test_padding_does_not_matter_but_for_the_papers_rule():
    volume, _ = blob(n=64, radius=20, noise=0.05)
    wide = torch.zeros(128, 128, 128)
    wide += 0.05 * torch.randn(wide.shape, generator=torch.Generator().manual_seed(1))
    wide[32:96, 32:96, 32:96] = volume
    (lo, hi), (low, high) = grey_range(volume, 1.0), grey_range(wide, 1.0)
    assert abs(lo - low) < 0.02 and abs(hi - high) < 0.05 * hi
    # the .99 quantile of the box falls where there is more solvent
    assert grey_range(wide, 1.0, "paper")[1] < 0.9 * grey_range(volume, 1.0, "paper")[1]


def test_dark_molecules_still_have_a_range():
    volume, _ = blob()
    lo, hi = grey_range(-volume, 1.0)
    assert hi > lo


def test_one_hot_voxel_does_not_set_the_scale():
    volume, _ = blob()
    _, hi = grey_range(volume, 1.0)
    volume[0, 0, 0] = 50.0
    assert grey_range(volume, 1.0)[1] < 1.5 * hi


def test_a_given_mask_is_used():
    volume, distance = blob(noise=0)
    lo, hi = grey_range(volume, 1.0, mask=distance < 5)
    assert lo == 0 and hi == pytest.approx(quantile(volume[distance < 5], 0.99))


def test_quantiles_are_those_of_torch():
    values = torch.randn(999)
    for q in (0.0, 0.01, 0.5, 0.99, 1.0):
        assert quantile(values, q) == float(torch.quantile(values, q, interpolation="nearest"))


def test_axes_of_one_voxel():
    volume = torch.rand(1, 20, 30)
    assert auto_mask(volume, 1.0).shape == volume.shape
    lo, hi = grey_range(volume, 1.0)
    assert hi > lo
