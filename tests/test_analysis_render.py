"""Pictures of volumes and colours: geometry, levels, distances; never pixels of a snapshot."""

from __future__ import annotations

import numpy as np
import pytest

from cryosuite.analysis import render
from cryosuite.analysis.palette import FIRST, distances, hex_to_rgb, oklab, palette, rgb_to_hex

FRONT = (0.0, 0.0, 0.0)


def ball(size: int = 32, radius: float = 6.0, at: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    """A soft ball; ``at`` is (x, y, z) from voxel size // 2, in voxels."""
    axis = np.arange(size) - size // 2
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    distance = np.sqrt((x - at[0]) ** 2 + (y - at[1]) ** 2 + (z - at[2]) ** 2)
    return (1 / (1 + np.exp(2 * (distance - radius)))).astype(np.float32)


def test_a_ball_is_a_disc_of_its_radius() -> None:
    picture = render.isosurface(ball(), 0.5, pixels=128, view=FRONT)
    area = picture[..., 3].astype(float).sum() / 255
    assert np.sqrt(area / np.pi) == pytest.approx(6.0 * 128 / 32, rel=0.02)


def test_axes_of_the_picture() -> None:
    """Seen from +z: +x is to the right, +y is up."""
    picture = render.isosurface(ball(radius=3, at=(8, 4, 0)), 0.5, pixels=128, view=FRONT)
    row, column = (axis.mean() for axis in np.nonzero(picture[..., 3] > 127))
    assert (column - 63.5) / 4 == pytest.approx(8, abs=0.1)
    assert (63.5 - row) / 4 == pytest.approx(4, abs=0.1)


def test_the_nearer_one_hides_the_farther_one() -> None:
    """Two balls on the line of sight: the one at +z is in front, so the picture looks the same without the other."""
    near, far = ball(radius=5, at=(0, 0, 8)), ball(radius=3, at=(0, 0, -8))
    both = render.isosurface(near + far, 0.5, pixels=64, view=FRONT).astype(int)
    alone = render.isosurface(near, 0.5, pixels=64, view=FRONT).astype(int)
    inside = alone[..., 3] == 255
    np.testing.assert_array_equal(both[..., 3], alone[..., 3])
    assert np.abs(both - alone)[inside].mean() < 6


def test_zoom_enlarges() -> None:
    near, far = (render.isosurface(ball(), 0.5, pixels=64, view=FRONT, zoom=zoom)[..., 3] for zoom in (1.5, 1.0))
    assert (near > 127).sum() / (far > 127).sum() == pytest.approx(2.25, rel=0.06)


def test_light_comes_from_above_left_and_the_colour_is_kept() -> None:
    picture = render.isosurface(ball(radius=10), 0.5, colour="#2a9d77", pixels=64, view=FRONT).astype(int)
    assert picture[18, 22, :3].sum() > picture[46, 42, :3].sum() + 60
    middle = picture[32, 32, :3]
    assert middle[1] > middle[2] > middle[0], "green, blue, red as in the colour"


def test_nothing_above_the_level_is_transparent() -> None:
    for volume in (np.zeros((16, 16, 16), np.float32), np.full((16, 16, 16), np.nan, np.float32)):
        assert render.isosurface(volume, 0.5, pixels=32)[..., 3].max() == 0


def test_specks_are_left_out() -> None:
    speck = ball(radius=0.9, at=(12, 0, 0))
    assert speck.max() > 0.5
    cleaned = render.without_dust(ball(radius=6) + speck, 0.5)
    assert cleaned[:, :, 25:].max() < 0.1
    np.testing.assert_array_equal(cleaned[:, :, :23], (ball(radius=6) + speck)[:, :, :23])
    np.testing.assert_array_equal(render.without_dust(ball(), 0.5), ball())


def test_level_lies_in_the_density_whatever_the_scale() -> None:
    rng = np.random.default_rng(0)
    for gain, offset in ((1.0, 0.0), (40.0, -7.0)):
        noisy = gain * (ball() + 0.03 * rng.normal(size=(32, 32, 32))) + offset
        level = (render.contour_level(noisy) - offset) / gain
        assert 0.15 < level < 0.7
    assert render.contour_level(np.full((8, 8, 8), 3.0)) == 0.0


def test_level_by_mass_encloses_that_volume() -> None:
    """100 kDa of protein take 121,000 A^3."""
    rng = np.random.default_rng(0)
    volume = rng.normal(size=(48, 48, 48))
    level = render.contour_level(volume, pixel_size=2.5, mass_kda=100)
    assert (volume > level).sum() * 2.5**3 == pytest.approx(121_000, rel=0.01)


def test_slices_show_the_three_planes() -> None:
    picture = render.slices(ball(radius=3, at=(8, 0, 0)), pixels=64)
    assert picture.shape == (64, 64 * 3 + 2)
    across_z, across_x = picture[:, :64], picture[:, -64:]
    assert across_z.argmax() % 64 == pytest.approx((16 + 8 + 0.5) * 2, abs=4)
    assert across_x.max() < 40, "the plane x = 0 does not meet the ball"


def test_reach_and_common_zoom() -> None:
    reaches = [render.reach(ball(radius=radius), 0.5) for radius in (4.0, 8.0)]
    np.testing.assert_allclose(reaches, [0.25, 0.5], atol=0.03)
    assert render.common_zoom(reaches) == pytest.approx(0.92 / reaches[1])
    assert render.common_zoom([0.0]) == 1.0


def test_palette_is_distinct_for_all_eyes_and_longer_ones_begin_alike() -> None:
    assert palette(5) == list(FIRST[:5]) and palette(30)[: len(FIRST)] == list(FIRST)
    colours = palette(30)
    assert len(set(colours)) == 30
    rgb = np.array([hex_to_rgb(colour) for colour in colours])
    apart = distances(rgb, rgb) + np.eye(30)
    assert apart[:12, :12].min() > 0.07
    assert apart.min() > 0.045
    lightness = oklab(rgb)[:, 0]
    assert lightness.min() > 0.4 and lightness.max() < 0.9, "all are seen on white"
    assert rgb_to_hex(hex_to_rgb("#0a7fb2")) == "#0a7fb2"
    assert len(palette(200)) == 200
