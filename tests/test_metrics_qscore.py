"""Q-scores: toy atoms with known answers, a plain reference, invariance, what an origin error costs."""

from __future__ import annotations

import numpy as np
import pytest

from cryosuite.errors import InputError
from cryosuite.metrics.qscore import EXPECTED, expected_q, q_scores, sample_atoms, sphere_points

VOXEL = (0.5, 0.4, 0.6)  # x, y, z
ORIGIN = (-4.0, 7.0, 2.5)
RNG = np.random.default_rng(1)


def molecule(n: int = 60, seed: int = 0) -> np.ndarray:
    """A chain of atoms 1.5 A apart in a blob, none nearer than 1.2 A to another: (n, 3) A."""
    rng = np.random.default_rng(seed)
    atoms = [np.zeros(3)]
    while len(atoms) < n:
        step = rng.normal(size=3) - 0.25 * atoms[-1]
        new = atoms[-1] + 1.5 * step / np.linalg.norm(step)
        if min(np.linalg.norm(new - old) for old in atoms) > 1.2:
            atoms.append(new)
        elif rng.random() < 0.1:
            atoms.append(atoms[0] + rng.normal(size=3) * 8)
    atoms = np.array(atoms)
    return atoms - atoms.min(0) + np.array(ORIGIN) + 3.0


def gaussians(xyz: np.ndarray, sigma: float, voxel=VOXEL, margin: float = 3.0) -> np.ndarray:
    """Sum of normalised-height Gaussians on a grid from ORIGIN, (z, y, x)."""
    shape = np.ceil((xyz.max(0) + margin - ORIGIN) / voxel).astype(int)
    axes = [ORIGIN[i] + np.arange(shape[i]) * voxel[i] for i in range(3)]
    parts = [np.exp(-((axes[i] - xyz[:, i, None]) ** 2) / (2 * sigma**2)) for i in range(3)]
    return np.einsum("nx,ny,nz->zyx", *parts)


def plain_q(data: np.ndarray, xyz: np.ndarray, atom: int, sigma: float) -> float:
    """The definition, atom by atom and point by point, with no cleverness."""
    from scipy.interpolate import RegularGridInterpolator

    axes = [ORIGIN[i] + np.arange(n) * VOXEL[i] for i, n in zip((2, 1, 0), data.shape, strict=True)]
    value = RegularGridInterpolator(axes, data)
    others = np.delete(xyz, atom, 0)
    u, v = [float(value(xyz[atom][::-1])[0])] * 8, [1.0] * 8
    for k in range(1, 21):
        r = 0.1 * k
        for n in range(8, 107, 2):
            height = -1 + 2 * np.arange(n) / (n - 1)
            angle = np.zeros(n)
            for i in range(1, n - 1):
                angle[i] = angle[i - 1] + 3.6 / np.sqrt(n * (1 - height[i] ** 2))
            ring = np.sqrt(np.maximum(1 - height**2, 0))
            points = xyz[atom] + r * np.stack([ring * np.cos(angle), ring * np.sin(angle), height], 1)
            free = [p for p in points if not (np.linalg.norm(others - p, axis=1) < 0.9 * r).any()]
            if len(free) >= 8:
                u += value(np.array(free)[:, ::-1]).tolist()
                v += [np.exp(-(r**2) / (2 * sigma**2))] * len(free)
                break
    return float(np.corrcoef(u, v)[0, 1])


@pytest.mark.parametrize("sigma", [0.4, 0.6])
def test_an_exact_gaussian_scores_one(sigma):
    fine = (0.15, 0.12, 0.18)
    atom = np.array([[-0.43, 10.21, 6.02]])
    found = q_scores(gaussians(atom, sigma, fine), fine, ORIGIN, atom, (sigma,))
    assert found[0, 0] == pytest.approx(1.0, abs=1e-3)
    wide = q_scores(gaussians(atom, 2 * sigma, fine), fine, ORIGIN, atom, (sigma,))
    assert wide[0, 0] < 0.95  # twice as wide is another shape
    assert q_scores(-gaussians(atom, sigma, fine), fine, ORIGIN, atom, (sigma,))[0, 0] < -0.99


def test_noise_scores_nothing():
    xyz = molecule(200)
    data = RNG.normal(size=gaussians(xyz, 0.5).shape)
    found = q_scores(data, VOXEL, ORIGIN, xyz)
    assert np.abs(found.mean(0)).max() < 0.06  # the mean over 200 atoms


def test_all_atoms_agree_with_the_plain_definition():
    xyz = molecule(60)
    data = gaussians(xyz, 0.7) + 0.2 * RNG.normal(size=gaussians(xyz, 0.7).shape)
    found = q_scores(data, VOXEL, ORIGIN, xyz)
    for column, sigma in enumerate((0.4, 0.6)):
        plain = [plain_q(data, xyz, atom, sigma) for atom in range(0, 60, 10)]
        np.testing.assert_allclose(found[::10, column], plain, atol=2e-5)


def test_grey_values_and_places_do_not_matter():
    """An affine change of the grey values, or a move of map and model together, changes nothing."""
    xyz = molecule()
    data = gaussians(xyz, 0.6) + 0.1 * RNG.normal(size=gaussians(xyz, 0.6).shape)
    found = q_scores(data, VOXEL, ORIGIN, xyz)
    np.testing.assert_allclose(q_scores((3e4 * data - 1e5).astype(np.float32), VOXEL, ORIGIN, xyz), found, atol=1e-4)
    moved = np.add(ORIGIN, (100.0, -50.0, 3.0))
    np.testing.assert_allclose(q_scores(data, VOXEL, tuple(moved), xyz + (100.0, -50.0, 3.0)), found, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(xyz))
    np.testing.assert_allclose(q_scores(data, VOXEL, ORIGIN, xyz[order]), found[order], atol=1e-9)


def test_the_score_is_a_sharp_test_of_the_origin():
    """A map a fifth of a voxel off scores less, one and a half voxels off much less."""
    xyz = molecule()
    data = gaussians(xyz, 0.6)
    means = [q_scores(data, VOXEL, tuple(np.add(ORIGIN, shift)), xyz).mean() for shift in (0.0, 0.1, 0.4, 0.8)]
    assert means[0] > 0.9 and all(np.diff(means) < -0.005) and means[3] < means[0] - 0.25


def test_atoms_outside_and_flat_maps():
    xyz = molecule(20)
    data = gaussians(xyz, 0.6)
    far = np.concatenate([xyz, [[1000.0, 0.0, 0.0]]])
    found = q_scores(data, VOXEL, ORIGIN, far)
    assert np.isnan(found[-1]).all() and np.isfinite(found[:-1]).all()
    edge = np.array(ORIGIN) + 0.2  # most of its spheres lie outside: what is left is judged
    assert np.isfinite(q_scores(data, VOXEL, ORIGIN, np.concatenate([xyz, [edge]]))[-1]).all()
    hollow = data.copy()
    hollow[:, :, : data.shape[2] - 2] = 0.0  # a map without density where the atoms are
    assert (q_scores(hollow, VOXEL, ORIGIN, xyz[xyz[:, 0] < xyz[:, 0].max() - 2.0]) == 0).all()
    with pytest.raises(InputError, match="constant"):
        q_scores(np.ones((9, 9, 9)), VOXEL, ORIGIN, xyz)


def test_buried_atoms_skip_spheres():
    """An atom in a cage of neighbours has no free points on its outer spheres: they are left out, not invented."""
    cage = sphere_points(60) * 1.3
    xyz = np.concatenate([[[0.0, 0.0, 0.0]], cage]).astype(np.float64) + np.array(ORIGIN) + 5.0
    samples = sample_atoms(gaussians(xyz, 0.5), VOXEL, ORIGIN, xyz)
    assert samples.count[0, :8].min() == 8
    assert samples.count[0, 12:15].max() == 0
    assert np.isfinite(samples.q(0.4)[0])


def test_points_are_even():
    for n in (8, 20, 106):
        points = sphere_points(n)
        np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1.0, atol=1e-6)
        assert np.linalg.norm(points.mean(0)) < 0.12
        gap = np.linalg.norm(points[:, None] - points[None], axis=2) + 9 * np.eye(n)
        assert gap.min() > 1.5 / np.sqrt(n)


def test_published_lines():
    assert expected_q("protein", 3.0) == pytest.approx(0.5867)
    assert expected_q("nucleic", 3.0) == pytest.approx(0.5842)
    assert expected_q("water", 2.0) > expected_q("water", 3.0)
    assert expected_q("protein", 12.0) is None  # the line would say -1
    assert expected_q("other", 3.0) is None and set(EXPECTED) == {"protein", "nucleic", "ion", "water"}
