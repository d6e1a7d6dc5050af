"""Amplitudes of a map, made those of a molmap: B-factors vanish, phases stay, and the resolution is found."""

from __future__ import annotations

import math

import pytest
import torch

from cryosuite.kernels.density import MOLMAP_SIGMA
from cryosuite.kernels.map_norm import auto_mask
from cryosuite.kernels.map_spectrum import estimate_resolution, flattened, match_spectrum
from cryosuite.kernels.shells import fsc

SIZE = 72
RESOLUTION = 4.0


def half_squares(shape: tuple[int, ...], voxel: tuple[float, ...]) -> torch.Tensor:
    """s^2 on the half grid."""
    z, y = (torch.fft.fftfreq(n, size) for n, size in zip(shape[:2], voxel[:2], strict=True))
    x = torch.fft.rfftfreq(shape[2], voxel[2])
    return z[:, None, None] ** 2 + y[None, :, None] ** 2 + x**2


def gained(volume: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return torch.fft.irfftn(torch.fft.rfftn(volume) * gain, s=volume.shape)


def molmap(shape: tuple[int, ...] = (SIZE,) * 3, voxel: tuple[float, ...] = (1.0,) * 3) -> torch.Tensor:
    """A heap of atoms, 8 A of standard deviation, as molmap would draw it: but for the molmap's own fall its
    amplitudes are flat beyond 15 A, as a protein's nearly are."""
    places = 8 * torch.randn(3000, 3, generator=torch.Generator().manual_seed(0))
    points = torch.stack([places[:, d] / voxel[d] + shape[d] // 2 for d in range(3)], 1).round().long()
    volume = torch.zeros(shape)
    volume.index_put_(tuple(points.T), torch.ones(len(points)), accumulate=True)
    return gained(volume, torch.exp(-2 * math.pi**2 * (MOLMAP_SIGMA * RESOLUTION) ** 2 * half_squares(shape, voxel)))


def globule(size: int) -> torch.Tensor:
    """Atoms spread over an ellipsoid with nothing around it, drawn as molmap would."""
    generator = torch.Generator().manual_seed(1)
    places = torch.rand(200_000, 3, generator=generator) * 2 - 1
    places = places[places.square().sum(1) < 1][: round(0.02 * size**3)]
    points = (places * torch.tensor([0.3, 0.25, 0.22]) * size + size / 2).round().long()
    volume = torch.zeros((size,) * 3)
    volume.index_put_(tuple(points.T), torch.ones(len(points)), accumulate=True)
    squares = half_squares(volume.shape, (1.0,) * 3)
    return gained(volume, torch.exp(-2 * math.pi**2 * (MOLMAP_SIGMA * 3.0) ** 2 * squares))


def amplitudes(volume: torch.Tensor, voxel: tuple[float, ...] = (1.0,) * 3) -> torch.Tensor:
    """Mean |F| in ten bands from 1/15 to nearly 1/RESOLUTION."""
    s = half_squares(volume.shape, voxel).sqrt()
    magnitude = torch.fft.rfftn(volume).abs()
    edges = torch.linspace(1 / 15, 1 / RESOLUTION - 3 / SIZE, 11)  # the fit ends some shells before the resolution
    return torch.stack([magnitude[(s >= a) & (s < b)].mean() for a, b in zip(edges[:-1], edges[1:], strict=True)])


@pytest.mark.parametrize("b", [-60.0, 80.0, 250.0])
def test_a_b_factor_vanishes(b: float):
    """Whatever the B-factor was, each band comes back to the amplitudes of the molmap within 15 %."""
    truth = molmap()
    seen = gained(truth, torch.exp(-b / 4 * half_squares(truth.shape, (1.0,) * 3)))
    found = match_spectrum(seen, 1.0, auto_mask(truth, 1.0), RESOLUTION)[0]
    ratio = amplitudes(found) / amplitudes(truth)
    assert ((ratio / ratio.mean() - 1).abs() < 0.15).all()
    before = amplitudes(seen) / amplitudes(truth)
    assert float(before.max() / before.min()) > 1.5  # it was far off


def test_a_molmap_stays_as_it_is():
    truth = molmap()
    found = match_spectrum(truth, 1.0, auto_mask(truth, 1.0), RESOLUTION)[0]
    assert torch.corrcoef(torch.stack([found.flatten(), truth.flatten()]))[0, 1] > 0.98
    assert float(found.mean()) == pytest.approx(float(truth.mean()), rel=1e-4)  # low frequencies keep their scale


def test_scale_and_level_of_the_grey_values_change_nothing_else():
    truth = molmap()
    mask = auto_mask(truth, 1.0)
    plain, moved = (match_spectrum(v, 1.0, mask, RESOLUTION)[0] for v in (truth, 7 * truth + 3))
    torch.testing.assert_close(moved, 7 * plain + 3, rtol=1e-3, atol=1e-3)


def test_phases_are_kept_and_nothing_is_left_beyond():
    generator = torch.Generator().manual_seed(1)
    seen = molmap() + 0.01 * torch.randn(SIZE, SIZE, SIZE, generator=generator)
    found = match_spectrum(seen, 1.0, auto_mask(seen, 1.0), RESOLUTION)[0]
    curve = fsc(seen, found)
    shell = SIZE / RESOLUTION
    assert (curve[: int(shell) - 1] > 0.99).all()
    power = torch.fft.rfftn(found).abs().square()
    s = half_squares(found.shape, (1.0,) * 3).sqrt()
    assert power[s > 1.5 / RESOLUTION].sum() < 1e-6 * power.sum()


def test_boxes_and_voxels_of_any_shape():
    """Uneven voxels and boxes: the same amplitudes per frequency come out."""
    shape, voxel = (80, 72, 64), (0.9, 1.0, 1.1)
    truth = molmap(shape, voxel)
    seen = gained(truth, torch.exp(-150 / 4 * half_squares(shape, voxel)))
    found = match_spectrum(seen, voxel, auto_mask(truth, 1.0), RESOLUTION)[0]
    ratio = amplitudes(found, voxel) / amplitudes(truth, voxel)
    assert ((ratio / ratio.mean() - 1).abs() < 0.15).all()


def test_a_flattened_molmap_is_its_atoms_up_to_the_resolution_and_nothing_beyond():
    truth = molmap()
    gain = torch.fft.rfftn(flattened(truth, 1.0, RESOLUTION)) / torch.fft.rfftn(truth)
    s = half_squares(truth.shape, (1.0,) * 3).sqrt()
    inside = s < 1 / RESOLUTION
    expected = torch.exp(2 * math.pi**2 * (MOLMAP_SIGMA * RESOLUTION) ** 2 * s[inside] ** 2)
    torch.testing.assert_close(gain.real[inside], expected, rtol=1e-3, atol=1e-3)
    assert gain.abs()[(s > 1.25 / RESOLUTION) & (s < 0.4)].max() < 1e-3


def test_the_resolution_where_noise_takes_over():
    """White noise: the estimate lies where the power inside the mask is four times that outside."""
    truth = molmap()
    mask = auto_mask(truth, 1.0)
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(2))
    found = []
    for level in (0.3, 1.0, 3.0):
        seen = truth + level * float(truth.std()) * noise
        found.append(estimate_resolution(seen, 1.0, mask))
        s = 1 / found[-1]
        near = (half_squares(truth.shape, (1.0,) * 3).sqrt() - s).abs() < 0.02
        signal = torch.fft.rfftn(truth)[near].abs().square().mean() / mask.float().mean()
        expected = 3 * (level * float(truth.std())) ** 2 * truth.numel()  # signal + noise = 4 noise
        assert 0.3 < float(signal) / expected < 3
    assert found[0] < found[1] < found[2]


def test_a_filter_ends_a_map_without_noise():
    truth = molmap()
    s = half_squares(truth.shape, (1.0,) * 3).sqrt()
    seen = gained(truth, (s < 1 / 6.0).float())
    assert estimate_resolution(seen, 1.0, auto_mask(truth, 1.0)) == pytest.approx(6.0, rel=0.15)
    found = match_spectrum(seen, 1.0, auto_mask(truth, 1.0), RESOLUTION)[0]  # finer than the map is
    assert (
        torch.fft.rfftn(found)[s > 1.4 / 6.0].abs().square().sum() < 1e-6 * torch.fft.rfftn(found).abs().square().sum()
    )


@pytest.mark.parametrize(("size", "end"), [(72, 5.0), (120, 5.0), (120, 7.0)])
def test_a_filter_is_seen_beneath_what_masking_and_solvent_leave_beyond_it(end: float, size: int):
    """A filtered map, cut out with a hard mask or set into an even solvent, has power at every frequency."""
    truth = globule(size)
    s = half_squares(truth.shape, (1.0,) * 3).sqrt()
    beyond = (s - 1 / end) * size / 5  # edges of five shells
    seen = gained(truth, 0.5 - 0.5 * torch.cos(math.pi * (0.5 - beyond).clamp(0, 1)))
    mask = auto_mask(truth, 1.0)
    solvent = seen + 0.3 * float(seen[mask].mean()) * (1 - (truth / truth.mean()).clamp(0, 1))
    for spoilt in (seen * mask, solvent):
        assert (torch.fft.rfftn(spoilt)[s > 1.3 / end].abs() > 0).all()
        assert estimate_resolution(spoilt, 1.0, mask) == pytest.approx(end, rel=0.1)


@pytest.mark.parametrize("b", [-60.0, 0.0, 120.0])
@pytest.mark.parametrize("size", [48, 72, 120])
def test_a_b_factor_is_no_filter(b: float, size: int):
    """Nothing ends these maps but their voxels."""
    truth = globule(size)
    seen = gained(truth, torch.exp(-b / 4 * half_squares(truth.shape, (1.0,) * 3)))
    assert estimate_resolution(seen, 1.0, auto_mask(truth, 1.0)) == pytest.approx(2.2, rel=0.05)


@pytest.mark.parametrize("volume", [torch.zeros(24, 24, 24), torch.ones(24, 24, 24), torch.randn(8, 8, 8)])
def test_nothing_to_measure_is_no_accident(volume: torch.Tensor):
    for mask in (torch.zeros_like(volume, dtype=torch.bool), torch.ones_like(volume, dtype=torch.bool)):
        assert torch.isfinite(match_spectrum(volume, 1.0, mask, 4.0)[0]).all()
        assert math.isfinite(estimate_resolution(volume, 1.0, mask))
