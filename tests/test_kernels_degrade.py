"""Degraded maps: every step does to the spectrum what its formula says, in batches, repeatably, in any box."""

from __future__ import annotations

import math

import pytest
import torch

from cryosuite.kernels.degrade import (
    Ranges,
    anisotropic,
    bfactor,
    coloured_noise,
    degrade,
    frequencies,
    local_blur,
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


def _blob(n: int, sigma: float = 3.0) -> torch.Tensor:
    axis = torch.arange(n, dtype=torch.float64) - n // 2
    squared = axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis**2
    return torch.exp(-squared / (2 * sigma**2))[None]


def test_bfactor_is_a_gaussian_in_angstrom():
    maps = _noise(2, 12, 16, 20)
    z, y, x = frequencies(maps, VOXEL)
    s2 = z**2 + y**2 + x**2
    gain = _gain(bfactor(maps, VOXEL, torch.tensor([40.0, -15.0])), maps)
    assert torch.allclose(gain[0], torch.exp(-10 * s2), atol=1e-9)
    assert torch.allclose(gain[1], torch.exp(15 / 4 * s2), atol=1e-9)


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
    gain = _gain(anisotropic(maps, VOXEL, tensor), maps)[0]
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


def test_local_blur_of_an_even_field_is_a_bfactor():
    maps = _noise(2, 16, 16, 16)
    for b in (0.0, 75.0, 150.0):
        field = torch.full_like(maps, b)
        assert torch.allclose(local_blur(maps, VOXEL, field, 150.0), bfactor(maps, VOXEL, b), atol=1e-9)
    between = local_blur(maps, VOXEL, torch.full_like(maps, 131.0), 150.0)
    exact = bfactor(maps, VOXEL, 131.0)
    assert float((between - exact).norm() / exact.norm()) < 0.05


def test_local_blur_is_local():
    maps = _noise(1, 24, 24, 24)
    field = torch.zeros_like(maps)
    field[..., 12:] = 150.0
    out = local_blur(maps, VOXEL, field)
    assert torch.allclose(out[..., :12], maps[..., :12], atol=1e-9)
    assert float(out[..., 12:].std()) < 0.5 * float(maps[..., 12:].std())


def test_noise_gives_half_maps_of_the_resolution():
    """Two half maps have twice the variance of their mean each; their FSC must be the model curve."""
    n, resolution = 48, 6.0
    signal = bfactor(_noise(1, n, n, n), VOXEL, 60.0)
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


def test_a_seed_is_a_map():
    maps = _blob(20).float().repeat(3, 1, 1, 1)
    first, second, other = (degrade(maps, VOXEL, _rng(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.allclose(first, other)
    assert not torch.allclose(first[0], first[1])  # one draw per map
    assert bool(torch.isfinite(first).all())


def test_neutral_ranges_leave_the_map():
    off = Ranges(
        (0.1, 0.1), (0, 0), (0, 0), 20.0, (1, 1), (0, 0), (0, 0), (1, 1), (0, 0), (1, 1), (0, 0)
    )  # fmt: skip
    maps = _noise(2, 12, 14, 10)
    out, draw = degrade(maps, VOXEL, _rng(), off)
    assert torch.allclose(out, maps, atol=1e-9)
    assert all(value.shape == (2,) for value in draw.values())


def test_solvent_lies_outside_the_molecule_only():
    off = {"b": (0, 0), "local_b": (0, 0), "anisotropy_b": (0, 0), "noise": (0, 0), "gain": (1, 1), "offset": (0, 0)}
    maps = _blob(32, 4.0)
    mask = (maps > 0.05).double()
    out, draw = degrade(maps, 1.0, _rng(), Ranges(**off, solvent=(0.5, 0.5)), torch.tensor([2.5]), mask)
    mean = float((maps * mask).sum() / mask.sum())
    assert float(out[0, 0, 0, 0] - maps[0, 0, 0, 0]) == pytest.approx(0.5 * mean, rel=0.02)
    assert float(out[0, 16, 16, 16]) == pytest.approx(float(maps[0, 16, 16, 16]), abs=0.02)


def test_resolution_given_is_resolution_used():
    _, draw = degrade(_blob(16), VOXEL, _rng(), resolution=torch.tensor([4.5]))
    assert float(draw["resolution"]) == 4.5
