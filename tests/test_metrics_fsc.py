"""FSC tables: RELION's and cryoDRGN's own curves, random phases, thresholds, areas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cryosuite.formats.mrc import read_map
from cryosuite.formats.star import read_star
from cryosuite.metrics import fsc


@pytest.fixture(scope="module")
def half_maps(golden):
    a, b, mask = (read_map(golden / "relion" / f"{name}.mrc") for name in ("half1", "half2", "mask"))
    return *(torch.from_numpy(one.data) for one in (a, b, mask)), a.pixel_size


def test_agrees_with_relion_postprocess(golden, half_maps):
    a, b, mask, pixel_size = half_maps
    table = fsc.fsc_table(a, b, pixel_size, mask, corrected=True)
    star = read_star(golden / "relion" / "postprocess_masked.star")
    relion = star["fsc"].iloc[1:]
    for ours, theirs in (
        ("unmasked", "rlnFourierShellCorrelationUnmaskedMaps"),
        ("masked", "rlnFourierShellCorrelationMaskedMaps"),
    ):
        # RELION counts the plane kx = 0 twice (MANIFEST 3): 0.0073 apart, hence the tolerance
        assert np.abs(table.curves[ours] - relion[theirs].to_numpy(float)).max() < 0.015
    box = 64
    assert box * pixel_size / table.randomised_from == pytest.approx(21.3333, abs=1e-3)
    below = table.randomised_from + fsc.CORRECT_AFTER - 1
    assert (table.curves["corrected"][:below] == table.curves["masked"][:below]).all()
    assert (table.curves["corrected"][below:] != table.curves["masked"][below:]).all()
    # RELION used other random numbers: its final resolution is one shell or less away
    assert table.resolution("corrected", 0.143) == pytest.approx(14.77, abs=1.6)


@pytest.mark.parametrize("name", ["unmasked", "masked"])
def test_compat_agrees_with_cryodrgn(golden, half_maps, name):
    a, b, mask, pixel_size = half_maps
    table = fsc.fsc_table(a, b, pixel_size, mask, compat=True)
    theirs = np.loadtxt(golden / "cryodrgn" / f"fsc_{name}.txt", skiprows=1)
    assert np.abs(table.frequency - theirs[:, 0]).max() < 1e-6
    assert np.abs(table.curves[name] - theirs[:, 1]).max() < 2e-6


def test_random_phases_keep_amplitudes_and_low_shells():
    volume = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    random = fsc.randomise_phases(volume, 4, torch.Generator().manual_seed(2))
    before, after = torch.fft.fftn(volume), torch.fft.fftn(random)
    axis = torch.fft.fftfreq(16) * 16
    radius = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis**2).sqrt().round()
    assert torch.allclose(before[radius < 4], after[radius < 4])
    assert torch.allclose(before.abs(), after.abs())
    beyond = (before * after.conj())[radius >= 4]
    assert abs(float(beyond.real.sum() / beyond.abs().sum())) < 0.1
    again = fsc.randomise_phases(volume, 4, torch.Generator().manual_seed(2))
    assert torch.equal(random, again)


def test_noise_under_a_tight_mask_is_corrected_away():
    """Two maps of pure noise that share low frequencies only: the mask alone correlates nothing after correction."""
    generator = torch.Generator().manual_seed(0)
    D = 48
    axis = torch.arange(D) - D // 2
    radius = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis**2).sqrt()
    mask = (radius < 8).float()
    shared = torch.exp(-((radius / 4) ** 2)) * 30
    a, b = (shared + torch.randn(D, D, D, generator=generator) for _ in range(2))
    table = fsc.fsc_table(a, b, 2.0, mask, corrected=True)
    high = slice(16, None)
    assert abs(table.curves["corrected"][high].mean()) < 0.1


def test_resolution_and_area():
    curve = np.concatenate([np.ones(8), np.zeros(8)])
    table = fsc.FscTable(32, 2.0, {"unmasked": curve, "perfect": np.ones(16)})
    assert table.resolution("unmasked", 0.5) == pytest.approx(32 * 2.0 / 8.5)
    assert table.resolution("perfect", 0.143) == 4.0  # Nyquist
    assert table.auc("perfect") == pytest.approx(fsc.auc_maximum(32)) == pytest.approx(15 / 32)
    assert table.auc_normalised("perfect") == pytest.approx(1.0)
    compat = fsc.FscTable(32, 2.0, {"inverted": -np.ones(16)}, compat=True)
    assert compat.auc("inverted") == pytest.approx(15 / 32)  # absolute, as that benchmark has it


def test_text_forms(tmp_path):
    table = fsc.FscTable(8, 2.0, {"unmasked": np.array([1.0, 0.9, 0.2, 0.1]), "masked": np.ones(4)})
    lines = table.as_text().splitlines()
    assert lines[0] == "pixres unmasked masked"
    assert lines[1].split() == ["0.125000", "1.000000", "1.000000"]
    assert table.as_csv().splitlines()[0].startswith("shell,cycles_per_pixel,per_angstrom,resolution_A,unmasked")
    fsc.write_png(tmp_path / "fsc.png", table, "title")
    assert (tmp_path / "fsc.png").read_bytes().startswith(b"\x89PNG")
