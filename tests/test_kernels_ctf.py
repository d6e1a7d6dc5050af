"""The CTF: against cryoDRGN, torch-ctf and the formula written out, and the meaning of each term."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cryosuite.kernels import aberrations
from cryosuite.kernels.ctf import CtfParams, ctf, odd_phase, wavelength
from cryosuite.kernels.fourier import half_disc
from cryosuite.kernels.rotations import random_rotations

F64 = torch.float64


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, np.ndarray]:
    return dict(np.load(shared / "golden" / "ctf.npz"))


@pytest.fixture
def params() -> CtfParams:
    rows = [[64, 1.5, 15000, 14000, 30, 300, 2.7, 0.1, 0], [64, 2.0, 9000, 9600, 110, 200, 2.0, 0.07, 40]]
    return CtfParams.from_table(torch.tensor(rows, dtype=F64))


def grid(golden: dict[str, np.ndarray], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(golden["freqs_cyc_per_px_xy"]).reshape(-1, 2).to(dtype)


def test_agrees_with_cryodrgn_except_for_the_sign(golden):
    table, theirs = torch.from_numpy(golden["params"]), torch.from_numpy(golden["ctf_cryodrgn_f64"]).flatten(1)
    assert (ctf(grid(golden, F64), CtfParams.from_table(table)) + theirs).abs().max() < 1e-9
    single = ctf(grid(golden, torch.float32), CtfParams.from_table(table.float()))
    assert single.dtype == torch.float32
    assert (single + theirs).abs().max() < 5e-4


def test_agrees_with_torch_ctf_in_sign_angle_and_phase_shift(golden):
    theirs = torch.from_numpy(golden["ctf_torchctf_f32"]).flatten(1)
    params = CtfParams.from_table(torch.from_numpy(golden["torchctf_params"]))
    assert (ctf(grid(golden, F64), params) - theirs).abs().max() < 0.025


def test_b_factor_and_scale_agree_with_cryodrgn(golden):
    params = CtfParams.from_table(torch.from_numpy(golden["params"][:4]))
    params = replace(params, bfactor=torch.from_numpy(golden["bfactor_A2"]), scale=torch.from_numpy(golden["scale"]))
    theirs = torch.from_numpy(golden["ctf_cryodrgn_bfac_scale_f64"]).flatten(1)
    assert (ctf(grid(golden, F64), params) + theirs).abs().max() < 1e-9


def test_both_ways_of_summing_the_phase_agree(params):
    frequency = half_disc(64).frequency_as(F64)
    slow = replace(params, even_zernike=torch.zeros(2, 4, dtype=F64))
    assert (ctf(frequency, params) - ctf(frequency, slow)).abs().max() < 1e-10


def test_float32_survives_a_large_defocus(params):
    disc = half_disc(256)
    far = replace(params, defocus_u=params.defocus_u * 4, pixel_size=params.pixel_size * 0.5)
    exact = ctf(disc.frequency_as(F64), far)
    assert (ctf(disc.frequency, far.to(dtype=torch.float32)) - exact).abs().max() < 5e-4


def test_is_positive_at_low_frequency_and_crosses_zero_where_the_formula_does():
    table = torch.tensor([[64, 1.0, 20000, 20000, 0, 300, 0, 0, 0]], dtype=F64)
    params = CtfParams.from_table(table)
    lam = float(wavelength(params.voltage_kv))
    assert abs(lam - 0.0196875) < 1e-5
    first_zero = math.sqrt(1 / (lam * 20000))  # pi lambda df s^2 = pi
    at = ctf(torch.tensor([[0.1 * first_zero, 0], [first_zero, 0], [0, 1.2 * first_zero]], dtype=F64), params)[0]
    assert at[0] > 0
    assert abs(at[1]) < 1e-9
    assert at[2] < 0


def test_amplitude_contrast_is_the_value_at_zero(params):
    assert torch.allclose(
        ctf(torch.zeros(1, 2, dtype=F64), replace(params, phase_shift_deg=torch.zeros(2)))[:, 0],
        params.amplitude_contrast,
    )


def test_defocus_u_is_the_defocus_along_the_astigmatism_angle():
    table = torch.tensor([[64, 1.0, 20000, 15000, 30, 300, 2.7, 0.1, 0]], dtype=F64)
    angle = math.radians(30)
    along = torch.tensor([[0.1 * math.cos(angle), 0.1 * math.sin(angle)]], dtype=F64)
    across = torch.tensor([[-0.1 * math.sin(angle), 0.1 * math.cos(angle)]], dtype=F64)
    for defocus, frequency in ((20000.0, along), (15000.0, across)):
        round_table = table.clone()
        round_table[0, 2:4] = defocus
        assert torch.allclose(
            ctf(frequency, CtfParams.from_table(table)), ctf(frequency, CtfParams.from_table(round_table))
        )


def test_even_zernike_terms_are_defocus_and_spherical_aberration_when_they_should_be(params):
    frequency = half_disc(32).frequency_as(F64)
    lam = wavelength(params.voltage_kv)
    # r^4 = (Z40 + 3 Z20 + 2)/6 and RELION adds the sum to gamma = ... + pi/2 Cs lambda^3 r^4
    extra_cs = 0.8
    a = math.pi / 2 * extra_cs * 1e7 * lam**3 / 6
    coefficients = torch.zeros(2, 9, dtype=F64)
    coefficients[:, 0], coefficients[:, 2], coefficients[:, 6] = 2 * a, 3 * a, a
    with_terms = ctf(frequency, replace(params, even_zernike=coefficients))
    assert torch.allclose(with_terms, ctf(frequency, replace(params, cs_mm=params.cs_mm + extra_cs)), atol=1e-9)
    # astigmatism: Z22 = r^2 cos 2 phi; gamma holds -pi lambda (U - V)/2 r^2 cos 2(phi - 0)
    coefficients = torch.zeros(2, 4, dtype=F64)
    coefficients[:, 3] = -math.pi * lam * 500
    flat = replace(params, defocus_u=params.defocus_v, astigmatism_deg=torch.zeros(2, dtype=F64))
    stigmatic = replace(flat, defocus_u=flat.defocus_v + 500, defocus_v=flat.defocus_v - 500)
    with_terms = ctf(frequency, replace(flat, even_zernike=coefficients))
    assert torch.allclose(with_terms, ctf(frequency, stigmatic), atol=1e-9)


def test_tetrafoil_has_the_symmetry_of_its_name(params):
    angles = torch.linspace(0, 2 * math.pi, 25, dtype=F64)[:-1]
    ring = 0.2 * torch.stack([angles.cos(), angles.sin()], 1)
    flat = replace(params, defocus_u=params.defocus_v)
    fourfold = torch.tensor([[0, 0, 3e6, 1e6]], dtype=F64).expand(2, 4)
    values = ctf(ring, replace(flat, tetrafoil=fourfold))
    assert torch.allclose(values, values.roll(6, 1), atol=1e-9)
    assert (values - values.roll(3, 1)).abs().max() > 1e-3


def test_zernike_order_is_relions():
    assert [aberrations.odd_index(i) for i in range(7)] == [(-1, 1), (1, 1), (-3, 3), (-1, 3), (1, 3), (3, 3), (-5, 5)]
    even = [(0, 0), (-2, 2), (0, 2), (2, 2), (-4, 4), (-2, 4), (0, 4), (2, 4), (4, 4), (-6, 6)]
    assert [aberrations.even_index(i) for i in range(10)] == even


def test_zernike_polynomials_are_orthogonal_on_the_unit_disc():
    axis = torch.linspace(-1, 1, 801, dtype=F64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    inside = x * x + y * y <= 1
    terms = [aberrations.even_index(i) for i in range(9)] + [aberrations.odd_index(i) for i in range(6)]
    values = torch.stack([aberrations.zernike(m, n, x, y)[inside] for m, n in terms])
    gram = values @ values.T / inside.sum()
    assert (gram - torch.diag(gram.diag())).abs().max() < 2e-3
    expected = torch.tensor([(1 if m == 0 else 0.5) / (n + 1) for m, n in terms], dtype=F64)
    assert torch.allclose(gram.diag(), expected, atol=2e-3)


def test_beam_tilt_is_the_odd_zernike_sum_that_relion_makes_of_it(params):
    frequency = half_disc(64).frequency_as(F64)
    tilt = torch.tensor([[0.4, -0.3], [1.0, 0.2]], dtype=F64)
    z3 = -(params.cs_mm * 20000 * wavelength(params.voltage_kv) ** 2 * math.pi)[:, None] * tilt / 3
    odd = torch.zeros(2, 6, dtype=F64)
    odd[:, 1], odd[:, 0], odd[:, 4], odd[:, 3] = 2 * z3[:, 0], 2 * z3[:, 1], z3[:, 0], z3[:, 1]
    by_tilt = odd_phase(frequency, replace(params, beam_tilt=tilt))
    assert torch.allclose(by_tilt, odd_phase(frequency, replace(params, odd_zernike=odd)), atol=1e-9)
    assert torch.allclose(by_tilt.abs(), torch.ones_like(by_tilt.abs()))
    assert odd_phase(frequency, params) is None


def test_odd_terms_are_odd_and_do_not_touch_the_ctf(params):
    frequency = half_disc(64).frequency_as(F64)
    odd = replace(params, trefoil=torch.tensor([[900.0, -500.0], [0, 400.0]], dtype=F64), beam_tilt=torch.ones(2, 2))
    assert torch.allclose(odd_phase(-frequency, odd), odd_phase(frequency, odd).conj())
    assert torch.equal(ctf(frequency, odd), ctf(frequency, params))


def test_a_pure_linear_odd_term_is_a_shift(params):
    """Z11 = x: phase c x (x in 1/A) moves the image; undoing it moves the content by +c/(2 pi) A."""
    disc = half_disc(32)
    c = 2 * math.pi * 3.0  # three Angstrom
    odd = torch.tensor([[0, c], [0, c]], dtype=F64)
    factor = odd_phase(disc.frequency_as(F64), replace(params, odd_zernike=odd))
    shift = 3.0 / params.pixel_size[:, None]  # pixels
    expected = torch.exp(-2j * math.pi * disc.frequency_as(F64)[None, :, 0] * shift)
    assert torch.allclose(factor, expected, atol=1e-10)


def test_anisotropic_magnification_evaluates_at_the_particles_frequency(params):
    frequency = half_disc(32).frequency_as(F64)
    M = torch.tensor([[1.02, 0.01], [0.015, 0.98]], dtype=F64)
    stretched = replace(params, mag_matrix=M.expand(2, 2, 2), bfactor=torch.full((2,), 50.0, dtype=F64))
    plain = replace(params, bfactor=torch.full((2,), 50.0, dtype=F64))
    assert torch.allclose(ctf(frequency, stretched), ctf(frequency @ M.T, plain), atol=1e-9)
    R = random_rotations(3, dtype=F64)
    rows = frequency @ aberrations.magnified_rotation(R, M)[:, :2]
    assert torch.allclose(rows, (frequency @ M.T) @ R[:, :2])


def test_parameters_can_be_selected_and_moved(params):
    full = replace(params, beam_tilt=torch.zeros(2, 2, dtype=F64))
    row = full.rows(torch.tensor([1]))
    assert len(row) == 1 and row.beam_tilt.shape == (1, 2) and float(row.pixel_size) == 2.0
    assert full.to("cpu", torch.float32).defocus_u.dtype == torch.float32
    with pytest.raises(ValueError, match="9 columns"):
        CtfParams.from_table(torch.zeros(3, 8))


def test_gradients(params):
    frequency = half_disc(8).frequency_as(F64)[:7]

    def value(u, angle, w, b, tilt, tetra):
        p = replace(params, defocus_u=u, astigmatism_deg=angle, amplitude_contrast=w, bfactor=b, beam_tilt=tilt)
        return ctf(frequency, p), ctf(frequency, replace(p, tetrafoil=tetra)), odd_phase(frequency, p)

    extra = ([50.0, 80.0], [[0.1, 0.2], [0.3, -0.1]], [[100.0, -50, 30, 80], [10, 20, -90, 5]])
    inputs = [params.defocus_u, params.astigmatism_deg, params.amplitude_contrast]
    inputs += [torch.tensor(v, dtype=F64) for v in extra]
    assert torch.autograd.gradcheck(value, [v.clone().requires_grad_() for v in inputs], eps=1e-4, atol=1e-5)
