"""Confounds: what was planted is found and said, what is independent stays silent, over several seeds."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cryosuite.analysis.confound_files import columns_to_test, view_directions, write_confounds
from cryosuite.analysis.confounds import Confound, confounds, fibonacci_sphere
from cryosuite.analysis.particle_table import Column
from cryosuite.data.orientations import from_euler
from cryosuite.data.particles import ParticleSet
from cryosuite.errors import UserNotice

COUNT = 1200


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def experiment(seed: int, count: int = COUNT) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Latents in 12 groups, their labels, and columns that have nothing to do with them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 12, count)
    z = (3 * rng.normal(size=(12, 6))[labels] + rng.normal(size=(count, 6))).astype(np.float32)
    columns = {
        "defocus": rng.uniform(8000, 25000, count),
        "view": unit(rng.normal(size=(count, 3))),
        "shift": rng.exponential(3.0, count),
        "micrograph": np.array([f"mic_{i:03d}.mrc" for i in rng.integers(0, 200, count)]),
        "optics": rng.integers(0, 3, count),
        "score": rng.normal(size=count).round(1),
    }
    return z, labels, columns


def of(found: list[Confound], name: str, kind: str) -> Confound:
    return next(one for one in found if one.name == name and one.of == kind)


@pytest.mark.parametrize("seed", range(3))
def test_independent_columns_are_silent(seed: int) -> None:
    z, labels, columns = experiment(seed)
    found = confounds(z, labels, columns, seed)
    assert len(found) == 2 * len(columns)
    assert not [one.warning for one in found if one.warning]
    assert max(one.share for one in found) < 0.06
    assert max(one.bits for one in found) < 0.15


@pytest.mark.parametrize("seed", range(3))
def test_a_latent_that_is_the_defocus(seed: int) -> None:
    """Even where the rest of the latents is real and the dependence is not monotonous."""
    z, labels, columns = experiment(seed)
    rng = np.random.default_rng(100 + seed)
    z[:, 2] = 8 * np.cos((columns["defocus"] - 8000) / 17000 * 2 * np.pi) + 0.5 * rng.normal(size=COUNT)
    z[:, 3] = 8 * np.sin((columns["defocus"] - 8000) / 17000 * 2 * np.pi) + 0.5 * rng.normal(size=COUNT)
    found = confounds(z, labels, columns, seed)
    one = of(found, "defocus", "latents")
    assert "follow defocus" in one.warning and one.share > 0.5 and one.bits > 1.0 and one.p <= 0.01
    assert [other.name for other in found if other.warning] == ["defocus"]


@pytest.mark.parametrize("seed", range(3))
def test_a_cluster_that_is_a_view_and_one_that_is_a_defocus(seed: int) -> None:
    z, labels, columns = experiment(seed)
    labels = labels + 2
    labels[columns["view"] @ unit(np.array([[1.0, 1.0, 0.3]]))[0] > 0.9] = 0
    labels[columns["defocus"] > 24000] = 1
    found = confounds(z, labels, columns, seed)
    view, defocus = of(found, "view", "clusters"), of(found, "defocus", "clusters")
    assert view.clusters == (0,) and "cluster 0" in view.warning and "a view" in view.warning
    assert defocus.clusters == (1,) and "cluster 1" in defocus.warning and "range of defocus" in defocus.warning
    rot, tilt = map(int, re.search(r"rot (-?\d+), tilt (\d+)", view.warning).groups())
    assert abs(rot - 45) < 20 and abs(tilt - 78) < 20, "where the view is"
    assert {one.name for one in found if one.warning} == {"view", "defocus"}


def test_an_axis_seen_from_both_ends_counts_as_a_view() -> None:
    """A latent that tells a view from others but not from its back has no mean direction."""
    z, labels, columns = experiment(5)
    z[:, 0] = 12 * np.abs(columns["view"][:, 2])
    assert "follow view" in of(confounds(z, labels, columns), "view", "latents").warning


def test_micrographs_and_optics_groups() -> None:
    z, labels, columns = experiment(6)
    labels = np.where(np.isin(columns["micrograph"], ["mic_003.mrc", "mic_004.mrc"]), 12, labels)
    z[:, 1] += 20 * columns["optics"]
    found = confounds(z, labels, columns)
    assert of(found, "micrograph", "clusters").clusters == (12,)
    assert "mic_00" in of(found, "micrograph", "clusters").warning
    assert "follow optics" in of(found, "optics", "latents").warning


def test_latents_that_are_the_micrograph_of_a_large_set() -> None:
    """A sample of the particles has few of each micrograph: whole micrographs have to be looked at."""
    rng = np.random.default_rng(11)
    micrograph = rng.integers(0, 1600, 20_000)
    names = np.array([f"mic_{i:04d}.mrc" for i in range(1600)], object)
    z = rng.normal(size=(1600, 4))[micrograph] + 0.01 * rng.normal(size=(20_000, 4))
    one = of(confounds(z, None, {"micrograph": names[micrograph]}), "micrograph", "latents")
    assert "follow micrograph" in one.warning and one.share > 0.6 and one.p <= 0.01
    assert np.isnan(one.bits) and "principal component" not in one.warning, "of no component where none was estimated"
    other = of(confounds(rng.permutation(z), None, {"micrograph": names[micrograph]}), "micrograph", "latents")
    assert not other.warning and other.share < 0.06


def test_numbers_of_few_values() -> None:
    """Two voltages, or a column that is almost always 0 (or almost always 1), have bins too."""
    z, labels, _ = experiment(12)
    rare = labels == 3
    for name, values in (("voltage", np.where(labels < 6, 200.0, 300.0)), ("zeros", rare * 1.0), ("ones", 1.0 - rare)):
        one = of(confounds(z, labels, {name: values}), name, "clusters")
        entropy = -sum(p * np.log2(p) for p in np.bincount((values == values.max()).astype(int)) / COUNT)
        assert one.bits == pytest.approx(entropy, abs=0.02) and one.p <= 0.01, "the labels tell all of it"
    assert one.clusters == (3,)


def test_a_turn_in_the_plane() -> None:
    """psi is a confound of its own, which no view direction tells; 359 and 1 degrees are neighbours."""
    z, labels, columns = experiment(13)
    psi = np.random.default_rng(13).uniform(-180, 180, COUNT)
    found = columns_to_test([Column("psi", psi, "degrees", cyclic=True)], None)
    assert not any(one.warning for one in confounds(z, labels, columns | found))
    labels = np.where(np.abs(psi) > 165, 12, labels)
    z[:, 0] += 30 * np.cos(np.deg2rad(psi))
    z[:, 1] += 30 * np.sin(np.deg2rad(psi))
    tested = confounds(z, labels, columns | found)
    assert "follow psi" in of(tested, "psi", "latents").warning
    one = of(tested, "psi", "clusters")
    assert one.clusters == (12,) and "a range of psi" in one.warning
    middle = re.search(r"100 % of its particles are within 30 degrees of psi (-?\d+)", one.warning)
    assert abs(int(middle.group(1))) > 170


def test_information_has_the_right_size() -> None:
    """Labels that are two of four equal categories: one bit of two; latents that are the rank: many bits."""
    rng = np.random.default_rng(0)
    category = rng.integers(0, 4, 4000)
    z = rng.normal(size=(4000, 2)).astype(np.float32)
    one = of(confounds(z, category // 2, {"a": category}), "a", "clusters")
    assert one.bits == pytest.approx(1.0, abs=0.01) and one.share == pytest.approx(1.0, abs=0.01)
    one = of(confounds(z, category, {"a": category // 2}), "a", "clusters")
    assert one.bits == pytest.approx(1.0, abs=0.01) and one.share == pytest.approx(0.5, abs=0.01)
    # a Gaussian channel: correlation r has -log2(1 - r^2) / 2 bits
    column = 0.8 * z[:, 0] * 2 + 0.6 * 2 * rng.normal(size=4000)
    z[:, 0] *= 3  # the first component
    assert of(confounds(z, None, {"b": column}), "b", "latents").bits == pytest.approx(0.737, abs=0.12)


def test_unknown_values_and_useless_columns() -> None:
    z, labels, columns = experiment(7)
    z[3] = np.nan
    labels[4] = -1
    columns["defocus"][::7] = np.nan
    columns["micrograph"][::5] = ""
    columns["view"][11] = np.nan
    columns |= {"constant": np.ones(COUNT), "unknown": np.full(COUNT, np.nan), "few": np.full(COUNT, np.nan)}
    columns["few"][:30] = np.arange(30)
    found = confounds(z, labels, columns)
    assert not {one.name for one in found} & {"constant", "unknown", "few"}
    assert not any(one.warning for one in found)


def test_bad_days() -> None:
    rng = np.random.default_rng(0)
    assert confounds(rng.normal(size=(20, 3)), np.zeros(20, int), {"a": rng.normal(size=20)}) == []
    assert confounds(np.ones((200, 3)), np.zeros(200, int), {"a": rng.normal(size=200)}) == []
    one_number = confounds(rng.normal(size=(200, 1)), np.zeros(200, int), {"a": rng.normal(size=200)})
    assert [one.of for one in one_number] == ["latents"], "one cluster has no labels to tell"


def test_same_seed_same_numbers() -> None:
    z, labels, columns = experiment(8, 600)
    assert repr(confounds(z, labels, columns, 3)) == repr(confounds(z, labels, columns, 3))


def test_bins_of_the_sphere_are_equal() -> None:
    points, views = fibonacci_sphere(32), unit(np.random.default_rng(0).normal(size=(64_000, 3)))
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1)
    share = np.bincount((views @ points.T).argmax(axis=1), minlength=32) / 64_000 * 32
    assert share.min() > 0.85 and share.max() < 1.15


def test_view_is_the_direction_of_rot_and_tilt() -> None:
    """RELION's rot and tilt are the azimuth and the polar angle of the direction a particle is seen from."""
    view = view_directions(from_euler(np.array([[45.0, 78.0, 13.0]])))[0]
    rot, tilt = np.deg2rad(45), np.deg2rad(78)
    np.testing.assert_allclose(view, [np.cos(rot) * np.sin(tilt), np.sin(rot) * np.sin(tilt), np.cos(tilt)], atol=1e-9)


def test_files_and_notices(tmp_path: Path) -> None:
    z, labels, columns = experiment(9)
    labels[columns["view"][:, 2] > 0.8] = 12
    with pytest.warns(UserNotice, match="may be a view"):
        found = write_confounds(tmp_path, z, labels, columns)
    table = pd.read_csv(tmp_path / "confounds.csv")
    assert list(table["column"]) == [one.name for one in found]
    assert table[(table["column"] == "view") & (table["of"] == "clusters")]["clusters_from_0"].item() == 12
    each = pd.read_csv(tmp_path / "confounds_clusters.csv")
    assert len(each) == 13 * len(columns)
    worst = each.sort_values("share_that_differs").iloc[-1]
    assert (worst["cluster_from_0"], worst["column"]) == (12, "view")
    assert (tmp_path / "confounds.png").stat().st_size > 5000
    assert write_confounds(tmp_path, z[:10], labels[:10], columns) == []
    assert not (tmp_path / "confounds.png").exists(), "of an earlier analysis"


def test_columns_of_a_particle_set() -> None:
    """Columns made of the latents are not tested; angles become directions, names text."""
    rotation = from_euler(np.random.default_rng(0).uniform(0, 170, (60, 3)))
    particles = ParticleSet.from_array(np.zeros((60, 4, 4), np.float32), 1.0, rotation=rotation)
    columns = [
        Column("row", np.arange(60)), Column("pc1", np.arange(60.0)), Column("cluster", np.arange(60) % 3),
        Column("rot", np.arange(60.0), cyclic=True), Column("same", np.ones(60)), Column("defocus", np.arange(60.0)),
        Column("micrograph", np.arange(60) % 3 - 1, names=("a", "b")), Column("pcfScore", np.arange(60.0)),
        Column("tilt", np.arange(60.0)), Column("psi", np.arange(60.0), cyclic=True),
    ]  # fmt: skip
    found = columns_to_test(columns, particles)
    assert set(found) == {"view", "psi", "defocus", "micrograph", "pcfScore"}
    assert list(found["micrograph"][:3]) == ["", "a", "b"]
