"""Tiles cover a volume once, blend without seams, and the rotations of a cube are rotations."""

import pytest
import torch

from cryosuite.kernels.tiles import TURNS, Tiling, blend_weight, mirrored, turned, turned_back


def blended(volume, tiling, what=lambda tiles: tiles, corners=None):
    corners = tiling.corners() if corners is None else corners
    total = torch.zeros(volume.shape)
    for some in corners.split(5):
        tiling.add(total, what(tiling.cut(volume, some)), some)
    return tiling.divide(total)


@pytest.mark.parametrize(
    ("shape", "edge", "stride", "offset"),
    [((50, 31, 47), 16, 8, 0), ((50, 31, 47), 16, 8, 4), ((20, 20, 20), 16, 5, 3), ((1, 5, 40), 16, 8, 0)],
)
def test_cutting_and_blending_is_the_identity(shape, edge, stride, offset):
    volume = torch.randn(shape)
    tiling = Tiling(shape, edge, stride, offset)
    assert len(tiling) == len(tiling.corners())
    torch.testing.assert_close(blended(volume, tiling), volume, atol=1e-5, rtol=1e-5)


def test_counts_of_tiles():
    assert len(Tiling((300,) * 3, 48, 24)) == 13**3  # ceil(300 / 24)
    assert 24**3 <= len(Tiling((300,) * 3, 48, 12)) <= 25**3


def test_voxels_near_a_tiles_faces_count_little():
    w = blend_weight(48)
    assert w[0] < 0.01 and w.max() < 1.01 and torch.allclose(w, w.flip(0))
    middle = w[:24] + w[24:]  # of two tiles half an edge apart
    assert float(middle.max() - middle.min()) < 1e-6
    # what is wrong at the faces of all tiles hardly shows
    volume = torch.ones(60, 60, 60)

    def spoilt(tiles):
        tiles = tiles.clone()
        tiles[:, 0] = tiles[:, -1] = 2
        return tiles

    assert float((blended(volume, Tiling((60,) * 3, 16, 8), spoilt) - 1).abs().max()) < 0.05


def test_mirrored_ends():
    assert mirrored(torch.arange(-3, 8), 4).tolist() == [3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1]
    assert mirrored(torch.tensor([-5, 0, 7]), 1).tolist() == [0, 0, 0]


def test_occupied_tiles_are_those_with_a_voxel_of_the_mask():
    tiling = Tiling((40, 30, 35), 16, 8)
    mask = torch.zeros(40, 30, 35, dtype=torch.bool)
    assert not tiling.occupied(mask).any()
    mask[7, 22, 34] = True
    for corner, found in zip(tiling.corners().tolist(), tiling.occupied(mask).tolist(), strict=True):
        assert found == all(a <= p < a + 16 for a, p in zip(corner, (7, 22, 34), strict=True))


def test_gaps_are_refused():
    for edge, stride, offset in ((16, 9, 0), (16, 0, 0), (16, 8, 8), (2, 1, 0)):
        with pytest.raises(ValueError, match="stride"):
            Tiling((20, 20, 20), edge, stride, offset)


def test_the_24_rotations_of_a_cube():
    cube = torch.arange(2 * 27.0).view(2, 3, 3, 3)
    seen = {tuple(turned(cube, i).reshape(-1).tolist()) for i in range(24)}
    assert len(TURNS) == len(seen) == 24
    for i in range(24):
        assert torch.equal(turned_back(turned(cube, i), i), cube)
    assert torch.equal(turned(cube, 0), cube)


def test_no_rotation_is_a_reflection():
    grid = torch.stack(torch.meshgrid(*[torch.arange(3.0) - 1] * 3, indexing="ij"))  # z, y, x of every voxel
    points = grid.reshape(3, -1)
    for i in range(24):
        moved = turned(grid, i).reshape(3, -1)
        matrix = moved @ points.T @ torch.linalg.inv(points @ points.T)
        assert abs(float(torch.linalg.det(matrix)) - 1) < 1e-5
        assert torch.allclose(matrix @ matrix.T, torch.eye(3), atol=1e-5)


@pytest.mark.parametrize("count", [1, 4, 12, 24])
def test_beginnings_of_the_list_are_groups(count):
    cube = torch.arange(27.0).view(3, 3, 3)
    mine = {tuple(turned(cube, i).reshape(-1).tolist()) for i in range(count)}
    for i in range(count):
        for j in range(count):
            assert tuple(turned(turned(cube, i), j).reshape(-1).tolist()) in mine
