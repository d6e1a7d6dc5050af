"""Rotations: RELION's and cryoSPARC's conventions, round trips, singular points, uniform sampling, alignment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cryosuite.kernels import rotations as rot

F64 = torch.float64


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def rotations(n: int, seed: int = 0) -> torch.Tensor:
    return rot.random_rotations(n, torch.Generator().manual_seed(seed), F64)


def test_euler_angles_agree_with_relion(shared: Path):
    golden = np.load(shared / "golden" / "poses" / "euler.npz")
    euler, R = torch.from_numpy(golden["euler_deg"]), torch.from_numpy(golden["R_cryodrgn"])
    assert (rot.euler_to_matrix(euler) - R).abs().max() < 1e-12
    assert (rot.euler_to_matrix(euler.float()) - R).abs().max() < 1e-6
    assert (rot.euler_to_matrix(rot.matrix_to_euler(R)) - R).abs().max() < 1e-9


def test_points_project_where_relion_projects_them(shared: Path):
    golden = np.load(shared / "golden" / "poses" / "relion_centroids.npz")
    R = rot.euler_to_matrix(torch.from_numpy(golden["euler_deg"]))
    points, centroids = torch.from_numpy(golden["points_px_xyz"]), torch.from_numpy(golden["centroid_px_xy"])
    ours = torch.einsum("bij,pj->pbi", R, points)[..., :2]
    assert (ours - centroids).abs().max() < 0.06


def test_gimbal_lock_and_its_neighbourhood():
    tilts = torch.tensor([0.0, 180.0, 1e-12, 1e-9, 1e-6, 180 - 1e-9], dtype=F64)
    euler = torch.stack([torch.full_like(tilts, 77.0), tilts, torch.full_like(tilts, -31.0)], 1)
    R = rot.euler_to_matrix(euler)
    back = rot.matrix_to_euler(R)
    assert (rot.euler_to_matrix(back) - R).abs().max() < 1e-12
    assert back[0, 0] == 0
    R = torch.eye(3, dtype=F64)[None].requires_grad_()
    rot.matrix_to_euler(R).sum().backward()
    assert torch.isfinite(R.grad).all()


def test_expmap_agrees_with_scipy_and_gives_the_identity_for_zero(shared: Path):
    golden = np.load(shared / "golden" / "poses" / "expmap.npz")
    ours = rot.expmap(torch.from_numpy(golden["rotvec_rad"]))
    assert torch.equal(ours[0], torch.eye(3))
    assert (ours - torch.from_numpy(golden["R_scipy"])).abs().max() < 1e-6


def test_expmap_has_a_finite_gradient_at_zero():
    w = torch.zeros(1, 3, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(rot.expmap(w)[0, 2, 1], w)
    assert torch.allclose(gradient, torch.tensor([[1.0, 0, 0]], dtype=F64))
    assert torch.autograd.gradcheck(rot.expmap, w)
    assert torch.autograd.gradcheck(rot.expmap, torch.randn(4, 3, dtype=F64, requires_grad=True))


@pytest.mark.parametrize("length", [0.0, 1e-9, 1e-5, 1e-3, 0.5, 3.0, np.pi - 1e-7, np.pi])
def test_logmap_inverts_expmap(length):
    direction = torch.nn.functional.normalize(torch.randn(20, 3, dtype=F64), dim=1)
    R = rot.expmap(direction * length)
    w = rot.logmap(R)
    assert (rot.expmap(w) - R).abs().max() < 1e-12
    assert (w.norm(dim=1) - length).abs().max() < 1e-7
    if length < 3.1:
        assert (w - direction * length).abs().max() < 1e-12


def test_quaternions_round_trip_and_turn_as_their_rotation_vector():
    half_turns = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=F64)
    R = torch.cat([rotations(200), torch.diag_embed(half_turns)])
    q = rot.matrix_to_quaternion(R)
    assert torch.allclose(q.norm(dim=1), torch.ones(len(q), dtype=F64))
    assert (q[:, 0] >= 0).all()
    assert (rot.quaternion_to_matrix(q) - R).abs().max() < 1e-12
    assert (rot.quaternion_to_matrix(-3 * q) - R).abs().max() < 1e-12
    about_z = rot.quaternion_to_matrix(torch.tensor([[np.cos(0.3), 0, 0, np.sin(0.3)]], dtype=F64))
    assert torch.allclose(about_z, rot.expmap(torch.tensor([[0, 0, 0.6]], dtype=F64)))


def test_six_d_round_trip_and_gradient():
    R = rotations(50)
    six = rot.matrix_to_six_d(R)
    assert (rot.six_d_to_matrix(six) - R).abs().max() < 1e-12
    skew = six + 0.3 * torch.randn_like(six)
    M = rot.six_d_to_matrix(skew)
    assert torch.allclose(M @ M.mT, torch.eye(3, dtype=F64).expand_as(M), atol=1e-12)
    assert torch.allclose(torch.linalg.det(M), torch.ones(50, dtype=F64))
    assert torch.autograd.gradcheck(rot.six_d_to_matrix, skew[:3].clone().requires_grad_())


def test_gradients_of_the_other_forms():
    R = rotations(4).requires_grad_()
    assert torch.autograd.gradcheck(rot.matrix_to_quaternion, R)
    assert torch.autograd.gradcheck(rot.logmap, R)
    assert torch.autograd.gradcheck(rot.matrix_to_euler, R)
    assert torch.autograd.gradcheck(rot.euler_to_matrix, torch.randn(4, 3, dtype=F64, requires_grad=True) * 50)
    assert torch.autograd.gradcheck(rot.quaternion_to_matrix, torch.randn(4, 4, dtype=F64, requires_grad=True))
    other = rotations(4, seed=1)
    assert torch.autograd.gradcheck(lambda a: rot.geodesic_deg(a, other), R)


def test_random_rotations_are_uniform():
    R = rotations(40_000)
    assert torch.allclose(R @ R.mT, torch.eye(3, dtype=F64).expand_as(R), atol=1e-12)
    assert R.mean(0).abs().max() < 0.015  # every element has mean 0 and variance 1/3: sd of the mean 0.003
    assert (R.square().mean(0) - 1 / 3).abs().max() < 0.01
    # the angle between uniform rotations has density (1 - cos a)/pi: mean pi/2 + 2/pi
    angle = torch.deg2rad(rot.geodesic_deg(R[::2], R[1::2]))
    assert abs(angle.mean() - (np.pi / 2 + 2 / np.pi)) < 0.02
    ordered = angle.sort().values
    cumulative = (ordered - ordered.sin()) / np.pi
    assert (cumulative - torch.linspace(0, 1, len(ordered), dtype=F64)).abs().max() < 0.015


def test_random_rotations_follow_the_generator_in_both_precisions():
    single = rot.random_rotations(5, torch.Generator().manual_seed(3))
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), rotations(5, seed=3), atol=1e-6)


@pytest.mark.parametrize(("order", "spacing"), [(0, 60), (1, 30)])
def test_healpix_rotations_cover_the_group_evenly(order, spacing):
    grid = rot.healpix_rotations(order)
    assert len(grid) == 12 * 4**order * 6 * 2**order
    trials = rotations(200).float()
    distance = rot.geodesic_deg(trials[:, None], grid[None]).min(1).values
    assert distance.max() < spacing
    assert grid.mean(0).abs().max() < 1e-5
    with pytest.raises(ValueError, match="between 0 and 5"):
        rot.healpix_rotations(9)


def test_kabsch_finds_the_rotation_and_never_a_reflection():
    points, R = torch.randn(5, 30, 3, dtype=F64), rotations(5)
    assert (rot.kabsch(points, points @ R.mT) - R).abs().max() < 1e-10
    mirrored = points * torch.tensor([1.0, 1, -1], dtype=F64)
    assert torch.allclose(torch.linalg.det(rot.kabsch(points, mirrored)), torch.ones(5, dtype=F64))


@pytest.mark.parametrize("angle", [0.0, 1e-6, 1.0, 90.0, 179.999999, 180.0])
def test_geodesic_angle(angle):
    axis = torch.tensor([0.6, 0.0, 0.8], dtype=F64)
    R = rotations(1)[0]
    turned = R @ rot.expmap(axis * np.deg2rad(angle))
    tolerance = 1e-6 if angle < 179 else 1e-5  # the cosine of half the angle is rounded near 180
    assert abs(float(rot.geodesic_deg(R, turned)) - angle) < tolerance
