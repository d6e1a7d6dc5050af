"""Degraded maps: every step does to the spectrum what its formula says, in batches, repeatably, in any box."""

from __future__ import annotations

import math

import pytest
import torch

from cryosuite.kernels.degrade import (
    anisotropy_gain,
    coloured_noise,
    frequencies,
    model_fsc,
    random_spd,
    smooth_field,
    soft_lowpass,
)
from cryosuite.kernels.shells import fsc

DIMS = (-3, -2, -1)
VOXEL = 1.3


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _gain(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    return (torch.fft.rfftn(after, dim=DIMS) / torch.fft.rfftn(before, dim=DIMS)).real


def test_lowpass_passes_half_at_the_resolution_and_ends():
    maps = _noise(1, 32, 32, 32)
    resolution = 32 * VOXEL / 10  # shell 10
    gain = _gain(soft_lowpass(maps, VOXEL, resolution), maps)[0]
    z, y, x = frequencies(maps, VOXEL)
    radius = (z**2 + y**2 + x**2).sqrt() * 32 * VOXEL
    assert torch.allclose(gain[radius <= 7.5], torch.ones(1, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(gain[radius >= 12.5], torch.zeros(1, dtype=torch.float64), atol=1e-9)
    assert float(gain[0, 0, 10]) == pytest.approx(0.5, abs=1e-9)


def test_anisotropy_blurs_along_its_axis():
    maps = _noise(1, 16, 16, 16)
    tensor = torch.diag(torch.tensor([80.0, 20.0, 0.0], dtype=torch.float64))[None]
    gain = anisotropy_gain(maps, VOXEL, tensor)[0]
    s2 = (4 / (16 * VOXEL)) ** 2
    for where, b in (((0, 0, 4), 80), ((0, 4, 0), 20), ((4, 0, 0), 0)):
        assert float(gain[where]) == pytest.approx(math.exp(-b * s2 / 4), abs=1e-9)


def test_random_tensors_have_the_eigenvalues_asked_for():
    smallest, ratio = torch.full((200,), 5.0), torch.linspace(1, 4, 200)
    tensors = random_spd(smallest, ratio, _rng())
    values, vectors = torch.linalg.eigh(tensors)
    assert torch.allclose(values[:, 0], smallest, atol=1e-4) and torch.allclose(values[:, 2], 5 * ratio, atol=1e-3)
    assert torch.allclose(tensors, tensors.transpose(1, 2), atol=1e-5)
    along = vectors[100:, :, 2].abs().mean(0)  # the frames favour no axis: the mean of |cos| is a half
    assert bool((along > 0.4).all()) and bool((along < 0.6).all())


def test_field_is_smooth_and_evenly_spread():
    field = smooth_field(
        torch.zeros(4, 32, 32, 32), VOXEL, 12.0, 0.0, torch.tensor([100.0, 100.0, 100.0, 10.0]), _rng()
    )
    assert float(field.min()) >= 0 and float(field[:3].max()) <= 100 and float(field[3].max()) <= 10
    assert float(field[:3].mean()) == pytest.approx(50, abs=8) and float(field[:3].std()) == pytest.approx(29, abs=5)
    step = (field[:3, 1:] - field[:3, :-1]).abs().mean()
    assert float(step) < 0.15 * float(field[:3].std())


def test_noise_gives_half_maps_of_the_resolution():
    """Two half maps have twice the variance of their mean each; their FSC must be the model curve."""
    n, resolution = 48, 6.0
    z, y, x = frequencies(torch.zeros(n, n, n, dtype=torch.float64), VOXEL)
    blurred = torch.fft.rfftn(_noise(n, n, n)) * torch.exp(-60 / 4 * (z**2 + y**2 + x**2))
    signal = torch.fft.irfftn(blurred, s=(n,) * 3)[None]
    halves = [signal + math.sqrt(2) * coloured_noise(signal, VOXEL, resolution, _rng(seed)) for seed in (1, 2)]
    curve = fsc(halves[0][0], halves[1][0])
    shells = torch.arange(1, n // 2 + 1, dtype=torch.float64)
    expected = model_fsc(shells / (n * VOXEL), torch.tensor(resolution))
    for r in range(4, 14):
        assert float(curve[r - 1]) == pytest.approx(float(expected[r - 1]), abs=0.12), f"shell {r}"
    assert float(model_fsc(torch.tensor(1 / resolution), torch.tensor(resolution))) == pytest.approx(1 / 7)


def test_noise_is_stronger_in_the_middle():
    signal = _noise(8, 24, 24, 24)
    even, hill = (coloured_noise(signal, VOXEL, 5.0, _rng(3), centre) for centre in (1.0, 2.0))
    ratio = (hill / even)[0]
    assert float(ratio[12, 12, 12]) == pytest.approx(2.0) and float(ratio[0, 0, 0]) == pytest.approx(1.0, abs=0.01)


def test_a_map_without_signal_gets_no_noise():
    assert float(coloured_noise(torch.zeros(1, 8, 8, 8), VOXEL, 4.0, _rng()).abs().max()) == 0.0
