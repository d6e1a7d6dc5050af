"""Turning volumes: geometry of the turn, colours, scale bars, and surfaces that are hard to draw."""

from __future__ import annotations

import numpy as np
import pytest

from cryosuite.analysis import mesh, render
from cryosuite.analysis.turntable import bar_length, strip, turntable

FRONT = (0.0, 0.0, 0.0)


def ball(size: int = 32, radius: float = 4.0, at: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    """A soft ball; ``at`` is (x, y, z) from voxel size // 2, in voxels."""
    axis = np.arange(size) - size // 2
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    distance = np.sqrt((x - at[0]) ** 2 + (y - at[1]) ** 2 + (z - at[2]) ** 2)
    return (1 / (1 + np.exp(2 * (distance - radius)))).astype(np.float32)


def column(frame: np.ndarray) -> float:
    """Where the drawn pixels lie on average, in voxels of a box of 32 from the middle."""
    drawn = np.nonzero((frame < 240).any(axis=-1))[1]
    return float((drawn.mean() - (frame.shape[1] - 1) / 2) * 32 / frame.shape[1])


def test_a_ball_off_the_axis_goes_round() -> None:
    """A quarter turn about the vertical brings x to -z: seen from the front it passes 8, 0, -8, 0."""
    frames = turntable(ball(at=(8, 0, 0)), 0.5, "#0072b2", frames=4, size=128, zoom=1.0, view=FRONT)
    assert [column(frame) for frame in frames] == pytest.approx([8, 0, -8, 0], abs=0.15)
    assert all(frame.shape == (128, 128, 3) and frame.dtype == np.uint8 for frame in frames)


def test_the_turn_is_that_of_the_still_preview() -> None:
    volume = ball(at=(5, 2, 3)) + ball(at=(-6, 0, 0), radius=3)
    first = turntable(volume, 0.5, "#c8553d", frames=3, size=64, zoom=1.2)[0]
    still = render.on_white(render.isosurface(volume, 0.5, "#c8553d", pixels=64, zoom=1.2))
    np.testing.assert_array_equal(first, still)


def test_frames_fill_the_picture_and_keep_one_zoom() -> None:
    frames = turntable(ball(at=(9, 0, 0), radius=2), 0.5, "#0072b2", frames=6, size=96)
    drawn = [(frame < 240).any(axis=-1) for frame in frames]
    assert all(one.any() for one in drawn)
    assert max(one.sum() for one in drawn) < 1.15 * min(one.sum() for one in drawn), "a ball is as large on every side"
    assert max(np.abs(column(frame)) for frame in frames) > 11, "the farthest point comes close to the edge"


def test_nothing_above_the_level_is_white() -> None:
    for volume in (np.zeros((16, 16, 16)), np.full((16, 16, 16), np.nan), np.ones((16, 16, 16))):
        assert (np.array(turntable(volume, 2.0, "#0072b2", frames=2, size=32)) == 255).all()


def test_density_that_leaves_the_box_is_closed() -> None:
    """A rod through the whole box, seen along its length, is a disc and no hole."""
    volume = np.zeros((24, 24, 24), np.float32)
    axis = np.arange(24) - 12
    volume[:] = (np.hypot(*np.meshgrid(axis, axis)) < 5)[None]
    frame = turntable(volume, 0.5, "#0072b2", frames=1, size=72, zoom=1.0, view=FRONT)[0]
    assert (frame[36, 24:48] < 240).any(axis=-1).all()


def test_scale_bar_has_the_length_it_says() -> None:
    assert [bar_length(width) for width in (100, 320, 17, 7)] == [20, 50, 5, 2]
    plain = turntable(ball(), 0.5, "#0072b2", frames=2, size=160, zoom=1.0)
    barred = turntable(ball(), 0.5, "#0072b2", 2.5, frames=2, size=160, zoom=1.0)
    changed = (np.array(plain) != np.array(barred)).any(axis=-1)[0]
    line = changed[160 - 160 // 32 - 1]
    assert line.sum() / 160 * 32 * 2.5 == pytest.approx(20, abs=1.0), "20 A of a box of 80 A"
    assert changed.sum() > line.sum() * 2, "and a text"


@pytest.mark.parametrize("width", [300 / 0.9, 1000 / 3.0, 1e-3 / 0.3])
def test_a_bar_for_widths_beside_a_power_of_ten(width: float) -> None:
    """0.3 x 333.33... is 99.999..., whose logarithm is that of 100."""
    assert 0.35 < bar_length(width) / (0.3 * width) <= 1


def test_strip_and_bad_arguments() -> None:
    frames = turntable(ball(16, 3), 0.5, "#0072b2", frames=5, size=24)
    assert strip(frames).shape == (24, 120, 3)
    np.testing.assert_array_equal(strip(frames)[:, 48:72], frames[2])
    with pytest.raises(ValueError, match="at least one"):
        turntable(ball(), 0.5, "#0072b2", frames=0)
    with pytest.raises(ValueError, match="cube"):
        turntable(np.zeros((4, 4, 5)), 0.5, "#0072b2")


@pytest.mark.parametrize("size", [12, 31, 96, 130])
def test_maps_of_all_sizes_are_drawn_to_scale(size: int) -> None:
    """The surface lies where it lies in the map, whatever the map is resampled to."""
    shape = mesh.surface(ball(size, 0.2 * size, at=(0.1 * size, 0, 0)), 0.5)
    points = shape.points / shape.size
    middle = points.mean(axis=0)
    np.testing.assert_allclose(middle, [0.1, 0, 0], atol=0.004)
    assert np.linalg.norm(points - middle, axis=1).mean() == pytest.approx(0.2, rel=0.03)
    outwards = ((points - middle) * shape.normals).sum(axis=1)
    assert (outwards > 0).mean() > 0.99
