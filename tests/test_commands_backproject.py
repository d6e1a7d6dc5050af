"""``cryosuite backproject`` and ``eval-fsc`` on its output, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cryosuite.cli import app
from cryosuite.data.results import MapsDir
from cryosuite.errors import InputError
from cryosuite.formats.config import write_yaml
from cryosuite.formats.mrc import read_map, write_map
from cryosuite.formats.pickles import read_labels, safe_load, write_pickle

RUNNER = CliRunner()


def run(*arguments: object) -> str:
    """The output of a command that must succeed."""
    result = RUNNER.invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def star(golden) -> Path:
    return golden / "relion" / "particles.star"


@pytest.fixture(scope="module")
def maps(star, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("maps") / "bp"
    output = run("backproject", star, "-o", out)
    assert "200" in output
    assert "100 + 100" in output  # rlnRandomSubset
    return out


def test_files_have_the_names_cryodrgn_users_expect(maps):
    names = {entry.name for entry in maps.iterdir()}
    assert names == {
        "backproject.mrc", "half_map_a.mrc", "half_map_b.mrc", "mask.mrc", "fsc-vals.txt", "fsc.png",
    }  # fmt: skip
    found = read_map(maps / "backproject.mrc")
    assert found.data.shape == (64, 64, 64)
    assert found.pixel_size == pytest.approx(3.0)
    table = np.loadtxt(maps / "fsc-vals.txt", skiprows=1)
    assert (maps / "fsc-vals.txt").read_text().splitlines()[0] == "pixres unmasked masked random corrected"
    assert table.shape == (32, 5)
    mask = read_map(maps / "mask.mrc").data
    assert mask.min() >= 0
    assert 0.01 < mask.mean() < 0.5


def test_eval_fsc_takes_the_folder(maps, tmp_path):
    output = run("eval-fsc", maps, "-o", tmp_path / "scores")
    assert "corrected" in output
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert [row["curve"] for row in scores["curves"]] == ["unmasked", "masked", "random", "corrected"]
    assert {entry.name for entry in (tmp_path / "scores").iterdir()} == {"fsc.csv", "fsc.txt", "fsc.png", "scores.json"}


def test_nothing_is_replaced_unless_asked(star, maps):
    with pytest.raises(InputError, match="--overwrite"):
        run("backproject", star, "-o", maps)
    run("backproject", star, "-o", maps, "--overwrite", "--first", 150)


def test_a_mask_of_the_users_is_not_replaced_unless_asked(star, tmp_path):
    (tmp_path / "mask.mrc").write_bytes(b"mine")
    with pytest.raises(InputError, match="mask.mrc: is already there.*--overwrite"):
        run("backproject", star, "-o", tmp_path)
    assert (tmp_path / "mask.mrc").read_bytes() == b"mine"


def test_classes_clusters_and_selections(star, tmp_path):
    labels = tmp_path / "labels.pkl"
    write_pickle(labels, np.arange(200) % 2)
    run("backproject", star, "-o", tmp_path / "all", "--labels", labels, "--no-half-maps")
    noted = MapsDir(tmp_path / "all")
    assert {entry.name for entry in noted.path.iterdir()} == {
        "class_000", "class_001", noted.labels.name, noted.index.name,
    }  # fmt: skip
    np.testing.assert_array_equal(read_labels(noted.labels), np.arange(200) % 2)
    np.testing.assert_array_equal(safe_load(noted.index)[0], np.arange(200))
    one = ("--labels", labels, "--cluster", 1, "--no-half-maps", "--flip", "-d", 32)
    run("backproject", star, "-o", tmp_path / "one", *one)
    small = read_map(tmp_path / "one" / "backproject.mrc")
    np.testing.assert_array_equal(
        read_labels(MapsDir(tmp_path / "one").labels, unlabelled=True), np.where(np.arange(200) % 2, 1, -1)
    )
    assert small.data.shape == (32, 32, 32)
    assert small.pixel_size == pytest.approx(6.0)
    with pytest.raises(InputError, match="classes here: 0, 1"):
        run("backproject", star, "-o", tmp_path / "no", "--labels", labels, "--cluster", 7)
    with pytest.raises(InputError, match="has no column rlnClassNumber"):
        run("backproject", star, "-o", tmp_path / "no", "--class-column", "rlnClassNumber")
    by_column = tmp_path / "column"
    run("backproject", star, "-o", by_column, "--class-column", "rlnRandomSubset", "--no-half-maps")
    assert sorted(entry.name for entry in by_column.glob("class_*")) == ["class_001", "class_002"]
    write_pickle(labels, np.arange(7))
    with pytest.raises(InputError, match="7 labels"):
        run("backproject", star, "-o", tmp_path / "no", "--labels", labels)
    assert not (tmp_path / "no").exists()


def test_maps_of_before_go_with_what_is_replaced(star, tmp_path):
    """Neither classes nor half maps of an earlier call are left beside the new maps, where they would be judged."""
    labels, out = tmp_path / "labels.pkl", tmp_path / "maps"
    small = ("--no-plot", "-d", 16)
    write_pickle(labels, np.arange(200) % 3)
    run("backproject", star, "-o", out, "--labels", labels, *small)
    with pytest.raises(InputError, match="--overwrite"):
        run("backproject", star, "-o", out, "--labels", labels, *small)
    (out / "class_001" / "notes.txt").write_text("of the user")
    write_pickle(labels, np.zeros(200, int))
    run("backproject", star, "-o", out, "--labels", labels, *small, "--no-half-maps", "--overwrite")
    assert {path.name for path in (out / "class_000").iterdir()} == {"backproject.mrc"}
    assert {path.name for path in (out / "class_001").iterdir()} == {"notes.txt"}
    assert not (out / "class_002").exists()
    run("backproject", star, "-o", out, *small, "--overwrite")
    run("backproject", star, "-o", out, *small, "--overwrite", "--no-half-maps", "--mask", out / "mask.mrc")
    assert {path.name for path in out.iterdir()} == {"backproject.mrc", "mask.mrc", "class_001"}


def test_the_mask_of_a_simulated_set_is_not_replaced(star, tmp_path):
    write_yaml(tmp_path / "dataset.yaml", {"kind": "simulated", "truth": {"mask": "mask.mrc"}})
    with pytest.raises(InputError, match="simulated set"):
        run("backproject", star, "-o", tmp_path, "--overwrite")


def test_mistakes_are_named(star, tmp_path):
    write_map(tmp_path / "flat.mrc", np.ones((32, 64, 64), np.float32), 3.0)
    for options, words in (
        (["--regularise", "much"], "positive number"),
        (["--first", "0"], "at least 1"),
        (["--cluster", "1"], "needs --labels"),
        (["-d", "63"], "even box"),
        (["--mask", str(tmp_path / "flat.mrc")], "this mask has 64 x 64 x 32 voxels, expected a cube"),
    ):
        with pytest.raises(InputError, match=words):
            run("backproject", star, "-o", tmp_path / "no", *options)
