"""Atoms on a grid: against the sum over atoms, and form factors from two grids."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cryosuite.formats.form_factors import electron_factors
from cryosuite.kernels.atom_grid import splat_correction, splat_many, squared_frequency, two_factors

N = 32


def exact(points: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The transform of points about voxel N//2, summed atom by atom, float64."""
    full, half = torch.fft.fftfreq(N, 1 / N).double(), torch.arange(N // 2 + 1).double()
    at = points.double() + N // 2
    phase = full[:, None, None, None] * at[:, 2] + full[None, :, None, None] * at[:, 1] + half[:, None] * at[:, 0]
    phase = -2 * math.pi / N * phase
    return (torch.polar(torch.ones_like(phase), phase) * weights.double()).sum(-1)


def test_splat_is_the_sum_over_atoms() -> None:
    torch.manual_seed(0)
    points, weights = (torch.rand(50, 3) - 0.5) * N * 0.9, torch.rand(2, 50)
    found = torch.fft.rfftn(splat_many(points, weights, N), dim=(-3, -2, -1)) * splat_correction(N)
    radius = squared_frequency(N, 1.0).sqrt()
    for row, limit, allowed in ((0, 0.3, 2e-3), (1, 0.35, 5e-3), (1, 0.4, 1e-2)):
        inside = radius <= limit
        wanted = exact(points, weights[row])
        error = (found[row] - wanted)[inside].abs().square().mean().sqrt()
        assert error < allowed * wanted[inside].abs().square().mean().sqrt()


def test_points_beyond_a_face_come_in_at_the_other() -> None:
    inside = splat_many(torch.tensor([[0.3, 0.0, -15.9]]), torch.ones(1, 1), N)
    beyond = splat_many(torch.tensor([[0.3 + N, 0.0, -15.9]]), torch.ones(1, 1), N)
    assert torch.allclose(inside, beyond, atol=1e-5)
    assert float(inside[0, 0, 16, 16]) == float(inside.max())  # x y z of points, z y x of the grid


def test_frequencies_are_those_of_the_voxel() -> None:
    squared = squared_frequency(N, 2.0)
    assert math.isclose(float(squared[0, 0, 3]), (3 / 64) ** 2, rel_tol=1e-6)
    assert math.isclose(float(squared[-2, 1, 0]), 5 / 64**2, rel_tol=1e-6)


def test_form_factors() -> None:
    s = np.linspace(0, 0.5, 26)
    factors = electron_factors(np.array([6, 7, 8, 16, 15]), s)
    assert factors[0, 0] == pytest.approx(2.509, abs=2e-3)  # International Tables, carbon, forward
    assert (np.diff(factors, axis=1) < 0).all()
    assert np.array_equal(electron_factors(np.array([0]), s), factors[:1])  # unknown: as carbon


def test_two_grids_hold_the_form_factors_of_proteins_and_nucleic_acids() -> None:
    s, numbers = np.linspace(0, 0.5, 26), np.array([6, 7, 8, 16, 15])
    factors = electron_factors(numbers, s)
    ratio = factors / factors[0]
    p, q, w = two_factors(ratio, numbers, np.array([0.63, 0.17, 0.19, 0.02, 0.02]))
    error = np.abs(numbers[:, None] * p + w[:, None] * q - ratio) / ratio
    assert error[:3].max() < 0.05
    assert error.max() < 0.2  # phosphorus, at high frequencies
