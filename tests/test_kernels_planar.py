"""Planar maps: what they say of a slice, and that Kabsch's algorithm reads the rotation back out of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cryosuite.kernels import planar
from cryosuite.kernels.fourier import fft2c, half_disc
from cryosuite.kernels.rotations import euler_to_matrix, expmap, geodesic_deg, kabsch, random_rotations
from cryosuite.kernels.slices import extract_slices, volume_transform
from cryosuite.kernels.so3_grid import grid_rotations

SIZES = [(32, 8), (64, 8), (128, 16), (24, 6), (16, 1)]
J = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))


def rotations(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return random_rotations(n, torch.Generator().manual_seed(seed), dtype)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_svd(H: Tensor) -> Tensor:
    """The textbook: U diag(1, 1, det UV^T) V^T."""
    U, _, Vh = torch.linalg.svd(H)
    sign = torch.linalg.det(U @ Vh)
    return U @ torch.diag_embed(torch.stack([torch.ones_like(sign), torch.ones_like(sign), sign], -1)) @ Vh


def test_grids_have_their_origin_at_the_middle_pixel_and_nyquist_one() -> None:
    grid = planar.pixel_grid(8)
    assert torch.equal(grid[4, 4], torch.zeros(3)) and torch.equal(grid[4, 0], torch.tensor([-1.0, 0, 0]))
    assert torch.equal(grid[6, 5], torch.tensor([0.25, 0.5, 0]))  # row 6 is y, column 5 is x
    tokens = planar.patch_grid(8, 4)
    assert torch.equal(tokens[1], grid[:4, 4:].mean((0, 1)))  # row-major: the second patch lies to the right
    for size, patch in ((10, 4), (9, 3), (8, 0)):
        with pytest.raises(ValueError, match="multiple of the patch"):
            planar.patch_grid(size, patch)


@pytest.mark.parametrize(("size", "patch"), SIZES)
def test_a_map_by_patches_is_the_map_by_pixels(size: int, patch: int) -> None:
    R = rotations(3)
    dense = planar.dense_map(*planar.token_map(R, size, patch), size, patch)
    assert torch.allclose(dense, planar.pixel_grid(size, dtype=torch.float64) @ R[:, None], atol=1e-14)


def test_the_map_says_where_the_house_takes_its_slices() -> None:
    """Slice and map of the same R: reading the transform at X D/2 gives the slice, for a point scatterer."""
    D, point = 32, torch.tensor([3.0, -5.0, 7.0])  # x, y, z from the origin
    volume = torch.zeros(D, D, D)
    volume[int(point[2]) + D // 2, int(point[1]) + D // 2, int(point[0]) + D // 2] = 1
    disc = half_disc(D, 8)
    R = rotations(5, dtype=torch.float32)
    X = planar.pixel_grid(D) @ R[:, None] * (D / 2)
    column, row = (disc.xy + D // 2).unbind(1)
    expected = torch.exp(-2j * torch.pi * (X[:, row, column] @ point) / D)
    assert (extract_slices(volume_transform(volume), R, disc) - expected).abs().max() < 0.1  # interpolation


def test_the_slice_at_identity_has_its_dc_where_the_map_is_zero() -> None:
    image = torch.rand(16, 16)
    X = planar.pixel_grid(16) @ torch.eye(3)
    row, column = torch.nonzero(X.abs().sum(-1) == 0)[0].tolist()
    assert torch.isclose(fft2c(image)[row, column].real, image.sum())


def test_a_view_and_its_mirror_show_the_same_image() -> None:
    D, R = 24, rotations(4, dtype=torch.float32)
    volume = torch.rand(D, D, D, generator=torch.Generator().manual_seed(2))
    volume[0] = 0  # the plane z = -D/2 has no mate in the box
    flipped = torch.roll(volume.flip(0), 1, 0)  # z reversed, voxel D // 2 stays
    disc = half_disc(D)
    ours = extract_slices(volume_transform(volume), R, disc)
    theirs = extract_slices(volume_transform(flipped), planar.mirror(R), disc)
    assert (ours - theirs).abs().max() < 1e-3 * ours.abs().max()
    wide = R.double()
    assert torch.allclose(planar.mirror(wide), J @ wide @ J) and torch.equal(planar.mirror(planar.mirror(R)), R)
    c, a, b = planar.token_map(wide, 32, 8)
    assert all(
        torch.allclose(part @ J, other)
        for part, other in zip((c, a, b), planar.token_map(planar.mirror(wide), 32, 8), strict=True)
    )


def test_relative_is_the_pose_in_the_frame_of_the_first_view() -> None:
    R = rotations(10).view(2, 5, 3, 3)
    found = planar.relative(R)
    assert torch.allclose(found[:, 0], torch.eye(3, dtype=R.dtype).expand(2, 3, 3), atol=1e-15)
    grid = planar.pixel_grid(8, dtype=R.dtype)
    in_volume = grid @ R[:, :, None]
    in_view_0 = in_volume @ R[:, :1, None].transpose(-1, -2)
    assert torch.allclose(grid @ found[:, :, None], in_view_0, atol=1e-14)
    turned = planar.relative(R @ rotations(1, seed=9))  # another frame of the volume
    assert torch.allclose(turned, found, atol=1e-14)


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("weighted", [False, True])
def test_an_exact_map_gives_the_exact_pose(dtype: torch.dtype, accuracy: float, weighted: bool) -> None:
    R = rotations(200).to(dtype)
    for size, patch in SIZES[:3]:
        c, a, b = planar.token_map(R, size, patch)
        conf = 0.1 + torch.rand(c.shape[:-1], dtype=dtype) if weighted else None
        assert (planar.kabsch_tokens(c, a, b, conf, size, patch) - R).abs().max() < accuracy
    X = planar.pixel_grid(32, dtype=dtype) @ R[:, None]
    conf = 0.1 + torch.rand(X.shape[:-1], dtype=dtype) if weighted else None
    assert (planar.kabsch_dense(X, conf) - R).abs().max() < accuracy


@pytest.mark.parametrize(("size", "patch"), SIZES)
def test_kabsch_of_patches_is_kabsch_of_pixels(size: int, patch: int) -> None:
    """On maps far from any rotation, weights constant in each patch."""
    c, a, b = random(3, 2, 3, (size // patch) ** 2, 3)
    conf = 1 + random(2, 3, (size // patch) ** 2).exp()
    n = size // patch
    pixels = conf.unflatten(-1, (n, n)).repeat_interleave(patch, -1).repeat_interleave(patch, -2)
    dense = planar.kabsch_dense(planar.dense_map(c, a, b, size, patch), pixels)
    assert torch.allclose(planar.kabsch_tokens(c, a, b, conf, size, patch), dense, atol=4e-9)
    plain = planar.kabsch_dense(planar.dense_map(c, a, b, size, patch))
    assert torch.allclose(planar.kabsch_tokens(c, a, b, None, size, patch), plain, atol=4e-9)


def test_kabsch_agrees_with_the_house_and_with_weights_put_in_by_hand() -> None:
    R, noise = rotations(1)[0], random(16, 16, 3, seed=3)
    grid = planar.pixel_grid(16, dtype=torch.float64)
    X, conf = grid @ R + 0.2 * noise, 1 + random(16, 16, seed=4).square()
    points, values = grid.reshape(-1, 3), X.reshape(-1, 3)
    root = conf.reshape(-1, 1).sqrt()
    by_hand = kabsch(points * root, values * root).T  # the house's acts on columns
    assert torch.allclose(planar.kabsch_dense(X, conf), by_hand, atol=1e-10)


def test_the_best_rotation_is_the_textbook_one_and_never_a_reflection() -> None:
    H = torch.cat([random(500, 3, 3), 1e-6 * random(50, 3, 3), 1e6 * random(50, 3, 3)])
    assert (torch.linalg.det(H) < 0).any()
    found = planar.best_rotation(H)
    assert torch.allclose(found, by_svd(H), atol=1e-8)
    reflected = planar.best_rotation(-rotations(100))  # three axes reversed: any turn about one axis is as good
    for R in (found, reflected, planar.best_rotation(torch.zeros(2, 3, 3))):
        assert torch.allclose(torch.linalg.det(R), torch.ones(len(R), dtype=R.dtype), atol=1e-6)
        assert torch.allclose(R @ R.transpose(-1, -2), torch.eye(3, dtype=R.dtype).expand_as(R), atol=1e-6)
    assert torch.equal(planar.best_rotation(torch.zeros(3, 3)), torch.eye(3))


def test_half_turns_are_read_back() -> None:
    """Quaternions with w = 0: no sign is preferred, no digit lost."""
    axis = torch.nn.functional.normalize(random(50, 3), dim=-1)
    R = expmap(torch.pi * axis)
    assert torch.allclose(planar.kabsch_tokens(*planar.token_map(R, 32, 8), None, 32, 8), R, atol=1e-12)


def test_doubtful_patches_are_outvoted() -> None:
    R = rotations(20)
    c, a, b = (part.clone() for part in planar.token_map(R, 64, 8))
    for part in (c, a, b):
        part[:, :24] = random(20, 24, 3, seed=5)
    conf = torch.full(c.shape[:-1], 1000.0, dtype=c.dtype)
    conf[:, :24] = 1
    trusting = geodesic_deg(planar.kabsch_tokens(c, a, b, None, 64, 8), R)
    weighing = geodesic_deg(planar.kabsch_tokens(c, a, b, conf, 64, 8), R)
    assert weighing.max() < 0.2 < 5 < trusting.median()


def test_the_error_of_a_map_is_the_mean_over_its_pixels() -> None:
    size, patch = 32, 8
    found, wanted = tuple(random(3, 2, 16, 3)), planar.token_map(rotations(2), size, patch)
    difference = planar.dense_map(*found, size, patch) - planar.dense_map(*wanted, size, patch)
    dense = difference.square().sum(-1).unflatten(1, (4, 8)).unflatten(3, (4, 8)).mean((2, 4)).flatten(1)
    assert torch.allclose(planar.map_error(found, wanted, size, patch), dense, atol=1e-13)


def test_gradients_are_right_and_finite_where_svd_has_none() -> None:
    H = random(6, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(planar.best_rotation, (H,), atol=1e-5)
    exact = [part.clone().requires_grad_() for part in planar.token_map(rotations(4), 32, 8)]
    fitted = planar.kabsch_tokens(*exact, None, 32, 8)  # equal singular values
    (fitted * random(4, 3, 3)).sum().backward()
    assert all(part.grad.isfinite().all() and 0 < part.grad.abs().max() < 10 for part in exact)
    for H in (torch.zeros(3, 3), torch.diag(torch.tensor([1.0, 0, 0])), -torch.eye(3), 1e-25 * torch.eye(3)):
        H.requires_grad_()
        planar.best_rotation(H).square().sum().backward()
        assert H.grad.isfinite().all()


def test_a_step_along_the_gradient_turns_the_pose_towards_the_truth() -> None:
    truth, start = rotations(2, seed=6)
    maps = [part.clone().requires_grad_() for part in planar.token_map(start, 32, 8)]
    before = None
    for _ in range(60):
        fitted = planar.kabsch_tokens(*maps, None, 32, 8)
        error = (fitted - truth).square().sum()
        before = error.item() if before is None else before
        for part, step in zip(maps, torch.autograd.grad(error, maps), strict=True):
            part.data -= 3 * step
    assert error.item() < 0.05 * before


@pytest.mark.parametrize("weighted", [False, True])
def test_the_released_dialect_is_read_as_its_authors_export_it(weighted: bool) -> None:
    """X = X0 R + h, h = (row, column, 0) / D un-rotated; poses are J R J and minus the shift, column first."""
    D, R = 128, rotations(3)
    pixels = torch.tensor([[10.0, -10.0], [-7.3, 4.0], [0.0, 0.5]], dtype=R.dtype)  # row, column
    h = torch.cat([pixels / D, torch.zeros(3, 1, dtype=R.dtype)], 1)
    X = planar.released_grid(D, dtype=R.dtype) @ R[:, None] + h[:, None, None]
    conf = 1 + torch.rand(3, D, D, generator=torch.Generator().manual_seed(0)).double()
    rotation, shift = planar.released_pose(X, conf, weighted)
    assert torch.allclose(rotation, J @ R @ J, atol=1e-12)
    assert torch.allclose(shift * D, -pixels.flip(1), atol=1e-10)
    with pytest.raises(ValueError, match="needs the confidence"):
        planar.released_pose(X, None, weighted=True)


def test_the_released_grid_straddles_the_origin() -> None:
    grid = planar.released_grid(128)
    assert grid[0, 0].tolist() == [-1, -1, 0] and grid[127, 0].tolist() == [-1, 1, 0]  # first component: column
    assert grid.abs().sum(-1).min() > 0.015 and grid.mean((0, 1)).abs().max() < 1e-7


def test_maps_of_many_leading_dimensions_keep_them() -> None:
    R = euler_to_matrix(360 * torch.rand(2, 3, 4, 3))
    c, a, b = planar.token_map(R, 32, 8)
    assert c.shape == a.shape == b.shape == (2, 3, 4, 16, 3)
    assert planar.dense_map(c, a, b, 32, 8).shape == (2, 3, 4, 32, 32, 3)
    assert torch.allclose(planar.kabsch_tokens(c, a, b, None, 32, 8), R, atol=1e-5)
    assert torch.allclose(planar.kabsch_dense(planar.dense_map(c, a, b, 32, 8)), R, atol=1e-5)


def test_the_local_mean_is_finer_than_the_grid_and_deaf_to_rivals_far_away() -> None:
    cells = grid_rotations(2)
    truth, rival = random_rotations(2 * 40, torch.Generator().manual_seed(3)).view(2, 40, 3, 3)
    keep = geodesic_deg(truth, rival) > 60
    truth, rival = truth[keep], rival[keep]

    def peak(R: Tensor) -> Tensor:
        return (R.flatten(-2) @ cells.flatten(-2).T - 3) * 30

    scores = torch.logaddexp(peak(truth), peak(rival) - 1)
    found, mass = planar.local_mean(scores, cells)
    best = cells[scores.argmax(-1)]
    assert geodesic_deg(found, truth).median() < 3 < 5 < geodesic_deg(best, truth).median()
    share = 1 / (1 + math.exp(-1))
    assert (mass < share + 0.02).all() and mass.mean() == pytest.approx(share, abs=0.1)


def test_autocast_does_not_touch_rotations() -> None:
    R, cells = rotations(20, dtype=torch.float32), grid_rotations(1)
    with torch.autocast("cpu", torch.bfloat16):
        c, a, b = planar.token_map(R, 32, 8)
        found = planar.kabsch_tokens(c, a, b, None, 32, 8)
        X = planar.dense_map(c, a, b, 32, 8)
        others = planar.kabsch_dense(X), planar.relative(R.view(2, 10, 3, 3)), planar.released_pose(X)[0]
        mean, _ = planar.local_mean(torch.randn(20, len(cells)), cells)
    assert (found - R).abs().max() < 1e-5 and (others[0] - R).abs().max() < 1e-5
    assert all(part.dtype == torch.float32 for part in (c, *others, mean))


def test_three_points_by_hand() -> None:
    """A quarter turn about z read from three weighted vectors: H summed with pencil and paper."""
    X = torch.zeros(2, 2, 3, dtype=torch.float64)
    X[0, 0], X[0, 1], X[1, 0] = (torch.tensor(v, dtype=X.dtype) for v in ([1, -1, 0], [1, 0, 0], [0, -1, 0]))
    # grid: (-1, -1), (0, -1), (-1, 0), (0, 0); k R with R = [[0, 1, 0], [-1, 0, 0], [0, 0, 1]]
    turn = torch.tensor([[0, 1, 0], [-1, 0, 0], [0, 0, 1]], dtype=X.dtype)
    conf = torch.tensor([[2.0, 1.0], [0.5, 9.0]], dtype=X.dtype)
    assert torch.allclose(planar.kabsch_dense(X, conf), turn, atol=1e-12)
