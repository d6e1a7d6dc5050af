"""Grids of SO(3): against healpy and the Hopf formula, children, covering."""

from __future__ import annotations

import healpy
import numpy as np
import pytest
import torch

from cryosuite.kernels import so3_grid
from cryosuite.kernels.rotations import geodesic_deg, random_rotations


def hopf_quaternions(order: int) -> np.ndarray:
    """(n, 4) of the published grid: (cos th/2 cos ps/2, cos th/2 sin ps/2, sin th/2 cos(ph + ps/2), sin .. sin ..).

    Its in-plane angle turns the other way round than ours.
    """
    theta, phi = healpy.pix2ang(2**order, np.arange(12 * 4**order), nest=True)
    n_psi = 6 * 2**order
    psi = -(np.arange(n_psi) + 0.5) * 2 * np.pi / n_psi
    th, ph, ps = theta[:, None] / 2, phi[:, None], psi[None] / 2
    rows = [
        np.cos(th) * np.cos(ps),
        np.cos(th) * np.sin(ps),
        np.sin(th) * np.cos(ph + ps),
        np.sin(th) * np.sin(ph + ps),
    ]
    return np.stack(rows, -1).reshape(-1, 4)


@pytest.mark.parametrize("order", range(7))
def test_directions_are_healpix_nested(order: int) -> None:
    frames = so3_grid.view_frames(order, torch.float64)
    vectors = np.stack(healpy.pix2vec(2**order, np.arange(12 * 4**order), nest=True), 1)
    assert so3_grid.n_directions(order) == len(frames) == len(vectors)
    np.testing.assert_allclose(frames[:, 2].numpy(), vectors, atol=1e-12)
    eye = frames @ frames.transpose(1, 2) - torch.eye(3, dtype=torch.float64)
    assert eye.abs().max() < 1e-12
    assert torch.linalg.det(frames).min() > 0.999


def test_sizes_and_steps() -> None:
    assert [so3_grid.n_rotations(r) for r in range(5)] == [72, 576, 4608, 36864, 294912]
    assert so3_grid.spacing_deg(2) == 15
    assert so3_grid.n_in_plane(6) == 384
    with pytest.raises(ValueError, match="between 0 and 8"):
        so3_grid.n_directions(9)
    with pytest.raises(ValueError, match="rotations_at"):
        so3_grid.grid_rotations(5)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_grid_is_the_published_one_up_to_a_relabelling(order: int) -> None:
    """Angles between all pairs of points, which no change of frame alters, are those of the Hopf quaternions."""
    mine = so3_grid.grid_rotations(order, torch.float64)
    pick = torch.randperm(len(mine), generator=torch.Generator().manual_seed(order))[:300]
    quaternions = torch.from_numpy(hopf_quaternions(order))[pick]
    theirs = (quaternions @ quaternions.T).abs()  # cosine of half the angle
    angles = torch.deg2rad(geodesic_deg(mine[pick][:, None], mine[pick]))
    torch.testing.assert_close(torch.cos(angles / 2), theirs, atol=1e-6, rtol=0)


def test_a_turn_by_180_degrees_is_half_the_angles_further() -> None:
    grid = so3_grid.grid_rotations(2).unflatten(0, (192, 24))
    flip = torch.diag(torch.tensor([-1.0, -1.0, 1.0]))
    torch.testing.assert_close(grid[:, 12:], flip @ grid[:, :12], atol=1e-6, rtol=0)


@pytest.mark.parametrize("order", range(4))
def test_every_point_is_the_child_of_one_parent(order: int) -> None:
    table = so3_grid.children(order)
    assert table.shape == (so3_grid.n_rotations(order), 8)
    assert torch.equal(table.flatten().sort().values, torch.arange(so3_grid.n_rotations(order + 1)))


def test_children_on_the_fly_equal_the_table_and_go_deeper() -> None:
    some = torch.randint(0, so3_grid.n_rotations(3), (5, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(so3_grid.children_at(some, 3), so3_grid.children(3)[some])
    deep = so3_grid.children_at(torch.tensor([0, so3_grid.n_rotations(5) - 1]), 5)
    assert deep.max() < so3_grid.n_rotations(6)
    parents = so3_grid.rotations_at(torch.tensor([0, so3_grid.n_rotations(5) - 1]), 5)
    assert geodesic_deg(so3_grid.rotations_at(deep, 6), parents[:, None]).max() < so3_grid.spacing_deg(5)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_children_lie_within_a_step_and_mostly_equal_the_8_nearest_of_16(order: int) -> None:
    parents = so3_grid.grid_rotations(order)
    children = so3_grid.children(order)
    distance = geodesic_deg(so3_grid.rotations_at(children, order + 1), parents[:, None])
    assert distance.max() < 0.72 * so3_grid.spacing_deg(order)
    # the usual rule: 4 sub-pixels times angles 2m - 1 .. 2m + 2
    n_psi = so3_grid.n_in_plane(order)
    node = torch.arange(len(parents))
    child = (node // n_psi * 4)[:, None, None] + torch.arange(4)[:, None]
    angle = (2 * (node % n_psi)[:, None, None] + torch.arange(-1, 3)) % (2 * n_psi)
    sixteen = (child * 2 * n_psi + angle).flatten(1)
    trace = (so3_grid.rotations_at(sixteen, order + 1) * parents[:, None]).sum((-1, -2))
    usual = sixteen.gather(1, trace.topk(8).indices)
    orphans = 1 - usual.unique().numel() / so3_grid.n_rotations(order + 1)
    theirs = geodesic_deg(so3_grid.rotations_at(usual, order + 1), parents[:, None])
    assert distance.mean() <= theirs.mean() + 1e-3
    assert orphans > 0.01  # what the usual rule loses
    same = (children.sort(1).values == usual.sort(1).values).all(1).float().mean()
    assert same > 0.5


@pytest.mark.parametrize(("order", "mean", "largest"), [(0, 29, 60), (1, 15, 30), (2, 7.5, 14), (3, 3.75, 7)])
def test_covering(order: int, mean: float, largest: float) -> None:
    """Distance of random rotations to the nearest grid point."""
    some = random_rotations(300, torch.Generator().manual_seed(1))
    trace = (some.flatten(1) @ so3_grid.grid_rotations(order).flatten(1).T).amax(1)
    angle = torch.rad2deg(torch.arccos(((trace - 1) / 2).clamp(-1, 1)))
    assert angle.mean() < mean
    assert angle.max() < largest
