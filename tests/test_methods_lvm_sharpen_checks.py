"""What a user hears about a map before a network enhances it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sharpen_toy import toy_map

from cryosuite.kernels.density import molmap
from cryosuite.methods.lvm_sharpen_checks import MapFacts, guinier_b, warn


def changed(grid, data):
    return replace(grid, data=np.ascontiguousarray(data, np.float32))


def protein(b: float, resolution: float = 2.5, voxel: float = 1.0) -> np.ndarray:
    """Random atoms with a B factor, molmap's Gaussians."""
    rng = np.random.default_rng(1)
    points = torch.from_numpy(rng.uniform(18, 46, (900, 3))).float()
    sigma = float(np.sqrt((0.225 * resolution) ** 2 + b / (8 * np.pi**2)))
    n = round(64 / voxel)
    return molmap(points, torch.full((900,), 6.0), (n, n, n), (0, 0, 0), voxel, sigma).numpy()


@pytest.mark.parametrize("b", [50.0, 150.0, 300.0])
def test_guinier_slope_is_the_b_factor(b):
    """Of random atoms the amplitudes are flat, so the fall is all B."""
    own = 8 * np.pi**2 * (0.225 * 2.5) ** 2  # of molmap's own Gaussian
    assert guinier_b(protein(b), (1.0, 1.0, 1.0)) == pytest.approx(b + own, rel=0.25, abs=20)


def said(data, task="sharpen", voxel=1.1, resolution=None, network=1.0):
    grid = replace(changed(toy_map(), data), voxel=(voxel,) * 3)
    return " ".join(warn(MapFacts(grid), grid, task, network, resolution))


def test_a_good_map_is_met_with_silence():
    noise = np.random.default_rng(0).normal(size=(64, 64, 64))
    data = protein(120.0)
    assert said(data + 0.03 * data.max() * noise) == ""


def test_sharpened_maps_are_noticed():
    data = torch.from_numpy(protein(100.0))
    s = torch.fft.fftfreq(64), torch.fft.fftfreq(64), torch.fft.rfftfreq(64)
    square = s[0][:, None, None] ** 2 + s[1][:, None] ** 2 + s[2] ** 2
    gain = torch.exp(200 * square / 4) * (square < 1 / 3.2**2)
    sharp = torch.fft.irfftn(torch.fft.rfftn(data) * gain, s=data.shape).numpy()
    assert "sharpened" in said(sharp)
    assert "sharpened" not in said(data.numpy())


def test_masked_maps_are_noticed():
    data = protein(120.0)
    noise = np.random.default_rng(0).normal(size=data.shape) * 0.03 * data.max()
    masked = np.where(data > 0.1 * data.max(), data + noise, 0)
    assert "exactly 0" in said(masked) and "exactly 0" not in said(data + noise)


def test_inverted_contrast_and_unset_voxels_are_noticed():
    data = protein(120.0)
    assert "multiply by -1" in said(-data)
    assert "exactly 1 A" in said(data, voxel=1.0) and "exactly 1 A" not in said(data, voxel=1.001)


def test_coarse_maps_are_told_that_nothing_can_be_gained():
    assert "trust none of it" in said(protein(600.0, resolution=20.0)) and "30 A" in said(protein(0.0), resolution=30.0)
    assert "trust none of it" in said(protein(0.0, voxel=1.0), voxel=6.0)
    assert "nothing finer than 5 A" in said(protein(0.0, voxel=1.0), voxel=2.5)


def test_tomograms_finer_than_the_network_are_told():
    noise = np.random.default_rng(0).normal(size=(64, 64, 64))
    data = protein(0.0) + noise
    assert "adds nothing finer" in said(data, task="wedge", voxel=4.0, network=10.0)
    assert said(data, task="wedge", voxel=8.0, network=10.0) == ""


def test_maps_too_thin_for_spectra_have_facts_all_the_same():
    grid = changed(toy_map(), np.random.default_rng(0).normal(size=(1, 20, 20)))
    facts = MapFacts(grid)
    assert np.isnan(facts.b) and np.isnan(facts.detail)
