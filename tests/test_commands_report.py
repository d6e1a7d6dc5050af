"""``cryosuite report`` as a user types it: the page of a run's analysis, and its selections given to ``select``."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from select_toy import Toy, make_run
from typer.testing import CliRunner

from cryosuite.cli import app
from cryosuite.data.open import open_particles
from cryosuite.data.preprocess import PreprocessOptions, preprocess
from cryosuite.data.workdir import AnalysisDir
from cryosuite.errors import InputError
from cryosuite.formats.config import write_yaml
from cryosuite.formats.pickles import read_indices, write_pickle


def run(*arguments: object) -> str:
    """Run a command; its output. InputError as it is."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def meta(page: Path) -> dict:
    """What the page's script reads first."""
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="meta">(.*?)</script>', text, re.S)[1])


@pytest.fixture(scope="module")
def toy(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A run on particles 20 to 199 of a star file, with its report."""
    folder = tmp_path_factory.mktemp("report")
    particles = open_particles(golden / "relion/particles.star", ind=np.arange(20, 200))
    preprocess(particles, folder / "work", PreprocessOptions(32))
    made = make_run(folder / "run", folder / "work", 180)
    run("report", made.run.path)
    return made


def test_the_page_and_the_table_of_a_run(toy: Toy) -> None:
    page = meta(toy.analysis.report)
    assert [c["size"] for c in page["clusters"]] == [60, 60, 60] and page["particles"] == 180
    assert page["selection"] == {"run": "run", "epoch": 2, "n_particles": 180}
    table = pd.read_csv(toy.analysis.particles)
    np.testing.assert_array_equal(table["index_from_0"], np.arange(20, 200))
    np.testing.assert_array_equal(table["cluster_from_0"], toy.labels)
    assert {"defocus", "rot", "tilt", "shift", "micrograph"} <= set(table.columns)
    assert toy.analysis.confounds.is_file()
    assert "Do the clusters follow the microscope?" in toy.analysis.report.read_text(encoding="utf-8")


def test_a_selection_of_the_page_is_what_select_writes(toy: Toy, tmp_path: Path) -> None:
    page = meta(toy.analysis.report)
    lasso = {"kind": "cryosuite selection", "version": 1, **page["selection"], "rows": [3, 50, 179]}
    (tmp_path / "lasso.json").write_text(json.dumps(lasso))
    command = page["commands"]["select"][0].split()
    assert command[:2] == ["cryosuite", "select"] and Path(command[2]).resolve() == toy.analysis.path.resolve()
    run("select", command[2], "--from", tmp_path / "lasso.json", "-o", tmp_path / "ind.pkl")
    assert read_indices(tmp_path / "ind.pkl").tolist() == [23, 70, 199]
    run("select", toy.run.path, "--where", "confidence > 0.5 and cluster == 2", "-o", tmp_path / "ind.pkl")
    table = pd.read_csv(toy.analysis.particles)
    wanted = table["index_from_0"][(table["confidence"] > 0.5) & (table["cluster_from_0"] == 2)]
    assert read_indices(tmp_path / "ind.pkl").tolist() == wanted.tolist()
    run("select", toy.run.path, "--where", "confidence > 0.5 and cluster_from_0 == 2", "-o", tmp_path / "long.pkl")
    assert read_indices(tmp_path / "long.pkl").tolist() == wanted.tolist()


def test_commands_of_a_cluster_mean_the_clusters_of_the_page(toy: Toy, tmp_path: Path) -> None:
    """An analysis that is not the newest one of its run: `select RUN --cluster 0` would be other particles."""
    look = AnalysisDir(tmp_path / "look")
    look.path.mkdir()
    write_pickle(look.labels, (np.arange(180) < 150).astype(int))
    write_yaml(look.summary, {"kind": "analysis", "run": str(toy.run.path), "epoch": 1})
    run("report", look.path)
    words = shlex.split(meta(look.report)["clusters"][0]["commands"][0][1])
    run(*words[1:-1], tmp_path / "zero.pkl")
    assert read_indices(tmp_path / "zero.pkl").tolist() == list(range(170, 200))


def test_a_moved_run_and_an_analysis_elsewhere(toy: Toy, tmp_path: Path) -> None:
    shutil.copytree(toy.run.path.parent, tmp_path / "moved")
    other = AnalysisDir(tmp_path / "moved" / "run" / "analyze.2")
    other.report.unlink()
    run("report", other.path)
    assert meta(other.report)["particles"] == 180


def test_what_cannot_be_shown_is_named(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--maps.*no such folder"):
        run("report", toy.run.path, "--maps", tmp_path / "absent")
    bare = make_run(tmp_path / "bare", toy.run.path.parent / "work", 180)
    bare.analysis.labels.unlink()
    bare.analysis.summary.unlink()
    with pytest.raises(InputError, match="no analysis yet"):
        run("report", bare.run.path)
