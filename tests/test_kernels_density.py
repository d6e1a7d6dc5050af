"""Atoms to density: exact Gaussians in real space, exact sums over atoms in Fourier space, maps and images alike."""

from __future__ import annotations

import math

import pytest
import torch

from cryosuite.kernels import density
from cryosuite.kernels.density import (
    MOLMAP_SIGMA,
    crop_half,
    density_map,
    gaussian_transfer,
    half_frequencies,
    molmap,
    projection_spectrum,
    splat,
)
from cryosuite.kernels.fourier import fourier_crop
from cryosuite.kernels.rotations import random_rotations


def _atoms(n: int = 500, spread: float = 40.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    xyz = torch.randn(n, 3, generator=generator, dtype=torch.float64) * spread
    return xyz, torch.randint(6, 9, (n,), generator=generator).double()


def test_map_of_one_atom_is_its_gaussian():
    D, pixel, sigma = 32, 2.0, 3.0
    point = torch.tensor([[5.3, -7.1, 2.2]], dtype=torch.float64)
    volume = density_map(point, torch.tensor([7.0], dtype=torch.float64), D, pixel, sigma)
    axis = (torch.arange(D, dtype=torch.float64) - D // 2) * pixel
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    square = (x - 5.3) ** 2 + (y + 7.1) ** 2 + (z - 2.2) ** 2
    exact = 7.0 * pixel**3 * (2 * math.pi * sigma**2) ** -1.5 * torch.exp(-square / (2 * sigma**2))
    assert (volume - exact).abs().max() < 2e-3 * exact.max()
    assert volume.sum() == pytest.approx(7.0, rel=1e-3)


def _direct(xy: torch.Tensor, weight: torch.Tensor, D: int, pixel: float, sigma: float) -> torch.Tensor:
    """The textbook sum over atoms on the rfft grid, origin at pixel D//2."""
    ky, kx = (k.double() for k in half_frequencies(D, 2))
    phase = (kx[..., None] * xy[:, 0] + ky[..., None] * xy[:, 1]) / (D * pixel)
    total = torch.exp(-2j * math.pi * phase) @ weight.to(torch.complex128)
    envelope = torch.exp(-2 * math.pi**2 * sigma**2 * (kx**2 + ky**2) / (D * pixel) ** 2)
    return total * envelope * (1 - 2 * ((kx + ky) % 2))


def test_projection_equals_the_sum_over_atoms_up_to_nyquist():
    D, pixel, sigma = 32, 5.0, 1.1
    xyz, weight = _atoms()
    spectrum = projection_spectrum(xyz[None, :, :2], weight, 2 * D, pixel / 2, sigma)
    spectrum = crop_half(spectrum, 2 * D, D, 2)[0]
    exact = _direct(xyz[:, :2], weight, D, pixel, sigma)
    ky, kx = half_frequencies(D, 2)
    radius = (kx**2 + ky**2).sqrt()
    for r in range(1, D // 2):
        ring = radius.round() == r
        error = (spectrum - exact)[ring].abs().pow(2).sum() / exact[ring].abs().pow(2).sum()
        assert error.sqrt() < 1.5e-3, f"shell {r}"


def test_map_and_projection_agree_as_central_slice_theorem_says():
    D, pixel, sigma = 32, 4.0, 1.0
    xyz, weight = _atoms(spread=20.0)
    rotation = random_rotations(1, torch.Generator().manual_seed(1), torch.float64)[0]
    turned = xyz @ rotation.T
    volume = density_map(turned, weight, D, pixel, sigma)
    image = torch.fft.irfft2(
        crop_half(projection_spectrum(turned[None, :, :2], weight, 2 * D, pixel / 2, sigma), 2 * D, D, 2)[0], s=(D, D)
    )
    assert (volume.sum(0) - image).abs().max() < 1e-3 * image.abs().max()


def test_half_crop_is_the_centred_crop():
    images = torch.randn(3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    small = torch.fft.irfft2(crop_half(torch.fft.rfft2(images), 32, 20, 2), s=(20, 20))
    expected = fourier_crop(images, 20) * (32 / 20) ** 2  # that one keeps grey values, ours the sum
    assert torch.allclose(small, expected, atol=1e-10)


@pytest.mark.parametrize("ndim", [2, 3])
def test_splat_does_not_depend_on_how_the_work_is_cut(ndim, monkeypatch):
    points = torch.randn(5, 40, ndim, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 6
    weight = torch.rand(5, 40, dtype=torch.float64)
    whole = splat(points, weight, 16)
    monkeypatch.setattr(density, "CHUNK", 7 * density.TAPS**ndim)
    assert torch.allclose(splat(points, weight, 16), whole, atol=1e-12)
    one_by_one = torch.cat([splat(p[None], w[None], 16) for p, w in zip(points, weight, strict=True)])
    assert torch.allclose(one_by_one, whole, atol=1e-12)


def test_atoms_outside_come_in_from_the_other_side():
    inside = torch.tensor([[[3.25, -1.5]]], dtype=torch.float64)
    weight = torch.ones(1, dtype=torch.float64)
    assert torch.allclose(splat(inside, weight, 16), splat(inside + 16, weight, 16), atol=1e-12)


def test_float32_is_enough():
    xyz, weight = _atoms(5000)
    wide = projection_spectrum(xyz[None, :, :2], weight, 64, 5.0, 2.0)
    single = projection_spectrum(xyz[None, :, :2].float(), weight.float(), 64, 5.0, 2.0)
    assert (single - wide).abs().max() < 2e-5 * wide.abs().max()


def test_gradients():
    generator = torch.Generator().manual_seed(0)
    points = (torch.rand(2, 3, 2, dtype=torch.float64, generator=generator) * 6 - 3).requires_grad_()
    weight = torch.rand(3, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, w: splat(p, w, 8), (points, weight))


def test_transfer_of_a_wide_gaussian_is_the_gaussian():
    like = torch.zeros(1, dtype=torch.float64)
    ratio = gaussian_transfer(32, 2, 1.5, like) / gaussian_transfer(32, 2, 0.0, like)
    ky, kx = half_frequencies(32, 2)
    assert torch.allclose(ratio, torch.exp(-2 * math.pi**2 * 2.25 * (kx**2 + ky**2).double() / 32**2), atol=1e-12)


def _molmap(resolution: float = 4.0, step: float = 1.0):
    xyz, weight = _atoms(400, 8.0)
    sigma, pad = MOLMAP_SIGMA * resolution, 3 * resolution
    low = xyz.min(0).values - pad
    shape = tuple(int(n) for n in torch.ceil((xyz.max(0).values + pad - low) / step).flip(0))
    return xyz, weight, shape, tuple(low.tolist()), step, sigma


def test_molmap_holds_all_its_weight():
    xyz, weight, shape, origin, step, sigma = _molmap()
    volume = molmap(xyz, weight, shape, origin, step, sigma)
    assert volume.shape == shape
    assert float(volume.sum()) * step**3 == pytest.approx(float(weight.sum()), rel=1e-4)


def test_molmap_is_the_sum_of_gaussians_on_uneven_voxels():
    xyz, weight, *_ = _molmap()
    xyz, weight = xyz[:5] / 4, weight[:5]
    sigma = torch.tensor([0.9, 1.0, 1.3, 1.1, 2.0], dtype=torch.float64)
    shape, origin, voxel = (18, 20, 24), (-9.0, -8.5, -10.0), (0.8, 0.9, 1.1)
    volume = molmap(xyz, weight, shape, origin, voxel, sigma, cutoff=12.0)
    axes = [torch.arange(n, dtype=torch.float64) * v + o for n, v, o in zip(shape[::-1], voxel, origin, strict=True)]
    exact = torch.zeros(shape, dtype=torch.float64)
    for p, w, s in zip(xyz, weight, sigma, strict=True):
        x, y, z = (torch.exp(-((axis - c) ** 2) / (2 * s**2)) for axis, c in zip(axes, p, strict=True))
        exact += w * (2 * math.pi) ** -1.5 / s**3 * z[:, None, None] * y[None, :, None] * x
    assert torch.allclose(volume, exact, atol=1e-10)


def test_molmap_and_the_fourier_map_agree():
    xyz, weight, *_ = _molmap()
    D, step, sigma = 64, 1.2, 1.2
    near = molmap(xyz, weight, (D,) * 3, (-D / 2 * step,) * 3, step, sigma)
    smooth = density_map(xyz, weight, D, step, sigma) / step**3
    assert float((near - smooth).abs().max()) < 5e-3 * float(smooth.max())


def test_molmap_drops_what_is_outside():
    weight = torch.ones(2, dtype=torch.float64)
    points = torch.tensor([[4.0, 4, 4], [40, 4, 4]], dtype=torch.float64)
    both = molmap(points, weight, (9, 9, 9), (0.0, 0.0, 0.0), 1.0, 1.0)
    assert torch.equal(both, molmap(points[:1], weight[:1], (9, 9, 9), (0.0, 0.0, 0.0), 1.0, 1.0))
    assert float(molmap(points[:0], weight[:0], (3, 3, 3), (0.0, 0.0, 0.0), 1.0, 1.0).abs().sum()) == 0.0
