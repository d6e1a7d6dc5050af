"""Paths through latent space: where they lead, how their points are spread, and what cannot be walked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cryosuite.analysis import trajectory
from cryosuite.analysis.latents import pca
from cryosuite.analysis.path_files import loop_colours, make_trajectory, path_table
from cryosuite.analysis.volumes import VolumeFile, VolumeOptions, write_volumes
from cryosuite.data.latents import fingerprint
from cryosuite.data.workdir import VolumeDir
from cryosuite.errors import InputError, UserNotice
from cryosuite.formats.config import read_yaml
from cryosuite.formats.mrc import read_map

D = 16


def decode(z: np.ndarray) -> np.ndarray:
    """Balls whose radius grows with the first latent number."""
    axis = np.arange(D) - D // 2
    square = axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2
    radius = 4.0 + np.tanh(z[:, 0])
    return (1 / (1 + np.exp(2 * (np.sqrt(square) - radius[:, None, None, None])))).astype(np.float32)


def horseshoe(count: int = 600, noise: float = 0.02, seed: int = 0) -> np.ndarray:
    """Latents (count, 3) along three quarters of a circle of radius 1, in order; no particle near its middle."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 1.5 * np.pi, count)
    z = np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=-1)
    return (z + noise * rng.normal(size=z.shape)).astype(np.float32)


def every(z: np.ndarray) -> np.ndarray:
    return np.arange(len(z))


def test_the_straight_line_visits_every_particle_evenly() -> None:
    z = np.array([[0, 0], [3, 0], [3, 1], [9, 9]], np.float32)
    path = trajectory.direct(z, np.array([0, 1, 2]), 9)
    np.testing.assert_allclose(path.z[path.anchors], z[:3], atol=1e-6)
    steps = np.linalg.norm(np.diff(path.z, axis=0), axis=1)
    np.testing.assert_allclose(steps, 0.5, atol=1e-6)
    np.testing.assert_allclose(path.at, 0.5 * np.arange(9), atol=1e-6)
    assert np.all(np.isclose(path.z[:, 0], 3) | np.isclose(path.z[:, 1], 0)), "it stays on the two lines"


def test_a_loop_comes_back_without_repeating_the_first_point() -> None:
    z = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    path = trajectory.direct(z, every(z), 8, loop=True)
    assert path.loop and len(path.z) == 8
    steps = np.linalg.norm(np.roll(path.z, -1, axis=0) - path.z, axis=1)
    np.testing.assert_allclose(steps, 0.5, atol=1e-6)
    np.testing.assert_array_equal(path.anchors, [0, 2, 4, 6])


def test_neighbours_lead_round_the_gap() -> None:
    """The straight line crosses the empty middle; the path of neighbours stays on the horseshoe."""
    z = horseshoe()
    ends = np.array([0, len(z) - 1])
    straight = trajectory.direct(z, ends, 15)
    round_it = trajectory.through_neighbours(z, ends, 15, every(z))
    assert np.linalg.norm(straight.z, axis=1).min() < 0.75
    radius = np.linalg.norm(round_it.z[:, :2], axis=1)
    assert radius.min() > 0.93 and radius.max() < 1.07
    angle = np.unwrap(np.arctan2(round_it.z[:, 1], round_it.z[:, 0]))
    assert (np.diff(angle) > 0).all() and angle[-1] - angle[0] == pytest.approx(1.5 * np.pi, abs=0.1)
    assert np.linalg.norm(np.diff(round_it.z, axis=0), axis=1).std() < 0.05, "even steps"
    assert round_it.through[0] == 0 and round_it.through[-1] == len(z) - 1


def test_stops_between_are_visited_in_order() -> None:
    z = horseshoe()
    rows = np.array([100, 500, 300])
    path = trajectory.through_neighbours(z, rows, 12, every(z))
    np.testing.assert_allclose(path.z[path.anchors], z[rows], atol=1e-5)
    assert list(path.anchors) == sorted(path.anchors) and path.anchors[0] == 0 and path.anchors[-1] == 11
    back = trajectory.through_neighbours(z, rows, 12, every(z), loop=True)
    np.testing.assert_allclose(back.z[back.anchors], z[rows], atol=1e-5)
    assert len(back.z) == 12 and not np.allclose(back.z[-1], back.z[0])


def test_a_large_set_is_thinned_and_the_ends_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory, "GRAPH_LIMIT", 150)
    z = horseshoe(2000)
    with pytest.warns(UserNotice, match="150 of 2,000"):
        path = trajectory.through_neighbours(z, np.array([3, 1990]), 9, every(z))
    np.testing.assert_allclose(path.z[[0, -1]], z[[3, 1990]], atol=1e-6)
    assert np.linalg.norm(path.z[:, :2], axis=1).min() > 0.9
    with pytest.warns(UserNotice):
        again = trajectory.through_neighbours(z, np.array([3, 1990]), 9, every(z))
    np.testing.assert_array_equal(path.z, again.z)


def test_islands_are_joined_with_a_word_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.normal(size=(30, 2)), rng.normal(size=(30, 2)) + 50]).astype(np.float32)
    with pytest.warns(UserNotice, match="crosses a gap"):
        path = trajectory.through_neighbours(z, np.array([0, 59]), 5, every(z))
    np.testing.assert_allclose(path.z[-1], z[59], atol=1e-5)
    monkeypatch.setattr(trajectory, "MOST_NEIGHBOURS", 10)
    with pytest.raises(InputError, match="islands"):
        trajectory.through_neighbours(z, np.array([0, 59]), 5, every(z))


def test_equal_latents_on_the_way_do_no_harm() -> None:
    z = np.repeat(horseshoe(60, noise=0.0), 20, axis=0)
    path = trajectory.through_neighbours(z, np.array([0, len(z) - 1]), 6, every(z), neighbours=45)
    assert np.linalg.norm(path.z[:, :2], axis=1).min() > 0.95


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([5], "two particles"),
        ([4, 4], "not one twice"),
        ([0, 40], "row 40 is not there.*0 to 39"),
        ([-1, 3], "row -1"),
        ([2, 7], "row 7.*NaN"),
    ],
)
def test_rows_that_cannot_be_walked_to_are_named(rows: list[int], words: str) -> None:
    z = horseshoe(40)
    z[7] = np.nan
    with pytest.raises(InputError, match=words):
        trajectory.check_rows(rows, z, np.flatnonzero(np.isfinite(z).all(axis=1)))


def test_paths_that_are_none_are_refused() -> None:
    z = horseshoe(40)
    with pytest.raises(InputError, match="at least 3"):
        trajectory.direct(z, np.array([0, 5, 9]), 2)
    with pytest.raises(InputError, match="one and the same latent"):
        trajectory.direct(z, np.array([4, 4]), 5)
    with pytest.raises(InputError, match="one and the same latent"):
        trajectory.through_neighbours(np.ones((9, 2), np.float32), np.array([0, 5]), 5, np.arange(9))


def test_one_latent_number_and_two_particles() -> None:
    z = np.array([[1.0], [3.0]], np.float32)
    for path in (trajectory.direct(z, every(z), 5), trajectory.through_neighbours(z, every(z), 5, every(z))):
        np.testing.assert_allclose(path.z[:, 0], [1, 1.5, 2, 2.5, 3], atol=1e-6)


def test_points_of_a_text_file(tmp_path: Path) -> None:
    file = tmp_path / "path.txt"
    file.write_text("# two numbers each\n0 1\n\n2.5, -3e-1\n")
    np.testing.assert_allclose(trajectory.read_points(file, 2), [[0, 1], [2.5, -0.3]])
    for text, words in (("1 2 3", "line 1: expected 2"), ("1 x", "line 1"), ("", "no latents"), ("1 nan", "line 1")):
        file.write_text(text)
        with pytest.raises(InputError, match=words):
            trajectory.read_points(file, 2)
    with pytest.raises(InputError, match="cannot be read"):
        trajectory.read_points(tmp_path / "absent.txt", 2)


def test_colours_of_a_loop_come_back() -> None:
    for count in (2, 3, 4, 7, 10):
        colours = loop_colours(count)
        assert len(colours) == count
        assert colours[1:] == colours[:0:-1], "the way back has the colours of the way there"
    assert loop_colours(1) == [loop_colours(4)[0]]


def test_table_names_the_nearest_particle_and_the_components() -> None:
    z = horseshoe(200)
    rows = np.arange(200)[50:]  # the first 50 are left out
    path = trajectory.direct(z, np.array([60, 150]), 4)
    files = [VolumeFile(i, Path(f"vol_{i:03d}.mrc"), "#000000", 0.5, 0.4) for i in range(4)]
    model = pca(z[rows])
    table = path_table(path, files, model, rows)
    assert table["nearest_row_from_0"][0] == 60 and table["nearest_row_from_0"][-1] == 150
    np.testing.assert_allclose(table["pc1"][0], model.scores[10, 0], atol=1e-5)
    assert table["asked_for"] == [1, 0, 0, 1]


def test_files_of_a_trajectory(tmp_path: Path) -> None:
    z = horseshoe(120)
    z[5] = np.nan
    rows = np.flatnonzero(np.isfinite(z).all(axis=1))
    path = trajectory.through_neighbours(z, np.array([0, 119]), 4, rows)
    folder = VolumeDir(tmp_path / "way")
    umap = np.where(np.isfinite(z[:, :2]), z[:, :2], np.nan)
    files = make_trajectory(folder, path, z, decode, 3.0, D, VolumeOptions(start_index=1), umap=umap, pixels=40)
    names = """vol_001.mrc vol_004.mrc vol_001.png volumes.png movie.gif trajectory.cxc morph.cxc trajectory.csv
        particles.csv z_values.txt pca_traversal.png umap_traversal.png"""
    assert all((folder.path / name).is_file() for name in names.split())
    assert len({file.level for file in files}) == 1
    np.testing.assert_allclose(np.loadtxt(folder.z_values), path.z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(read_map(files[2].path).data, decode(path.z[2:3])[0], atol=1e-5)
    table = pd.read_csv(folder.path / "trajectory.csv")
    assert list(table["number"]) == [1, 2, 3, 4] and table["colour"][0] == files[0].colour
    assert (folder.path / "trajectory.cxc").read_text().count(f"level {files[0].level:.6g} color") == 4
    assert read_yaml(folder.summary)["latents"] == fingerprint(z) and read_yaml(folder.summary)["how"] == "graph"
    make_trajectory(folder, path, z, decode, 3.0, D, VolumeOptions(), film=False, pixels=40)
    assert not (folder.path / "movie.gif").exists(), "of an earlier walk"
    with pytest.raises(InputError, match="no volumes"):
        make_trajectory(folder, path, z, None, 3.0, D, VolumeOptions())


def test_volumes_of_other_names_stay(tmp_path: Path) -> None:
    """A folder given with -o may hold maps of the user's own."""
    for name in ("vol_mean.mrc", "vol_best.png", "vol_007.mrc", "vol_007.png"):
        (tmp_path / name).touch()
    write_volumes(np.zeros((2, 1)), decode, VolumeDir(tmp_path), 2.0, VolumeOptions(), ["#000000"] * 2, D)
    left = {path.name for path in tmp_path.glob("vol_*")}
    assert left == {"vol_mean.mrc", "vol_best.png", "vol_000.mrc", "vol_001.mrc"}
