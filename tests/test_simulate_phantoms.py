"""Procedural proteins: a protein's mass, density and shapes, distinct and reproducible."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from cryosuite.kernels.density import density_map
from cryosuite.simulate import phantoms
from cryosuite.simulate.phantoms import MASS_RANGE, MAX_RADIUS, make_phantom, make_phantoms, turn_about


@pytest.fixture(scope="module")
def sixteen() -> list[phantoms.Phantom]:
    return make_phantoms(16, np.random.default_rng(0))


def test_masses_sizes_and_centres(sixteen):
    masses = [p.mass for p in sixteen]
    assert min(masses) >= MASS_RANGE[0] and max(masses) <= MASS_RANGE[1]
    assert max(masses) > 3 * min(masses), "a mixture spans light and heavy molecules"
    for p in sixteen:
        assert np.linalg.norm(p.xyz, axis=1).max() <= MAX_RADIUS
        assert np.allclose(np.average(p.xyz, axis=0, weights=p.atomic_number), 0, atol=1e-6)
        assert len(p.xyz) == len(p.domain) == len(p.atomic_number) == round(p.mass / 110) * 8


def test_sixteen_take_less_than_two_seconds():
    start = time.process_time()
    make_phantoms(16, np.random.default_rng(5))
    assert time.process_time() - start < 2.0


def test_the_seed_decides_everything():
    a, b, c = (make_phantoms(3, np.random.default_rng(s)) for s in (1, 1, 2))
    assert all(np.array_equal(x.xyz, y.xyz) for x, y in zip(a, b, strict=True))
    assert a[0].xyz.shape != c[0].xyz.shape or not np.allclose(a[0].xyz, c[0].xyz)


@pytest.mark.parametrize("seed", [0, 1])
def test_pairwise_distinct(seed):
    maps = [
        density_map(torch.from_numpy(p.xyz).float(), torch.from_numpy(p.atomic_number).float(), 32, 10.0, 2.25)
        for p in make_phantoms(16, np.random.default_rng(seed))
    ]
    correlation = torch.corrcoef(torch.stack(maps).flatten(1))
    off = correlation[~torch.eye(16, dtype=torch.bool)]
    assert off.max() < 0.8 and off.mean() < 0.5


def test_domains_have_the_density_of_protein():
    """About 0.81 Da/A^3 within the ellipsoid, whatever the fold."""
    densities = []
    for seed in range(20):
        residues, semi_axes = phantoms._domain(60e3, np.random.default_rng(seed))
        densities.append(len(residues) * 110 / (4 / 3 * np.pi * semi_axes.prod()))
    assert np.mean(densities) == pytest.approx(0.81, rel=0.12)
    assert min(densities) > 0.55 and max(densities) < 1.05


def test_helix_geometry():
    alpha_carbon = phantoms._helix(12, 0.0)[:, 1]
    assert np.allclose(np.linalg.norm(np.diff(alpha_carbon, axis=0), axis=1), 3.8, atol=0.1)
    strand = phantoms._strand(8, 1)[:, 1]
    assert np.allclose(np.linalg.norm(np.diff(strand, axis=0), axis=1), 3.75, atol=0.15)


def test_domains_do_not_overlap(sixteen):
    p = sixteen[1]
    alpha_carbon, domain = p.xyz[1::8], p.domain[1::8]
    for d in range(1, domain.max() + 1):
        distance, _ = cKDTree(alpha_carbon[domain < d]).query(alpha_carbon[domain == d])
        assert phantoms.CLASH - 1e-6 < distance.min() < 8.0, "in contact, without overlap"


@pytest.mark.parametrize("n", [2, 3, 4])
def test_symmetry(n):
    p = make_phantom(np.random.default_rng(n), 300e3, n)
    turned = p.xyz @ turn_about(np.array([0.0, 0.0, 1.0]), 2 * np.pi / n).T
    distance, _ = cKDTree(p.xyz).query(turned)
    assert distance.max() < 1e-6


def test_helices_show_at_the_scale_of_their_spacing():
    """Packed rods 8.8-10.2 A apart scatter more at about 10 A than atoms put at random into the same domain."""
    rng = np.random.default_rng(3)
    while True:
        residues, semi_axes = phantoms._domain(60e3, rng)
        if np.linalg.norm(residues[1, 1] - residues[0, 1]) > 3.7 and len(residues) > 300:
            break
    points = torch.from_numpy(residues.reshape(-1, 3)).float()
    ball = rng.normal(size=points.shape)
    ball = ball / np.linalg.norm(ball, axis=1, keepdims=True) * rng.uniform(0, 1, (len(ball), 1)) ** (1 / 3)
    random = torch.from_numpy(ball * semi_axes).float()
    power = []
    for xyz in (points, random):
        volume = density_map(xyz, torch.ones(len(xyz)), 48, 2.5, 1.0)
        spectrum = torch.fft.rfftn(volume).abs().pow(2)
        k = torch.fft.fftfreq(48, 2.5)
        radius = (k[:, None, None] ** 2 + k[None, :, None] ** 2 + torch.fft.rfftfreq(48, 2.5) ** 2).sqrt()
        power.append(float(spectrum[(radius > 1 / 12) & (radius < 1 / 8)].mean()))
    assert power[0] > 1.5 * power[1]
