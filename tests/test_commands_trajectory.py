"""``cryosuite trajectory`` as a user types it, on a run made up for the test."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cryosuite import methods
from cryosuite.cli import app
from cryosuite.data.latents import fingerprint
from cryosuite.data.particles import ParticleSet
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, UserNotice
from cryosuite.formats.config import write_yaml
from cryosuite.formats.pickles import write_pickle
from cryosuite.methods import LoadedRun

D = 12


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run folder of epoch 3 whose decoder draws a ball."""
    folder = RunDir(tmp_path / "run")
    z = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    z[4] = np.nan
    axis = np.arange(D) - D // 2
    ball = axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None] ** 2 < 12

    def decode(latents: np.ndarray) -> np.ndarray:
        return ball.astype(np.float32) * (1 + 0.1 * np.tanh(latents[:, :1, None, None]))

    def load(path: Path, epoch: int | None = None) -> LoadedRun:
        particles = ParticleSet.from_array(np.zeros((60, D, D), np.float32), 2.5)
        return LoadedRun("fake", particles, z, 3, 2.5, D, decode, {})

    monkeypatch.setattr("cryosuite.methods.load_run", load)
    analysis = folder.analysis(3)
    analysis.path.mkdir(parents=True)
    write_pickle(analysis.umap, z.copy())
    return folder


def test_between_particles_with_a_table_of_what_lies_where(run: RunDir) -> None:
    done = CliRunner().invoke(
        app, ["trajectory", str(run.path), "--from", "0", "--through", "7,9", "--to", "2", "-n", "5", "--no-movie"]
    )
    assert done.exit_code == 0, done.output
    folder = run.analysis(3).trajectories / "graph_0_7_9_2"
    assert len(list(folder.glob("vol_*.mrc"))) == 5 and (folder / "umap_traversal.png").is_file()
    assert "trajectory.cxc" in done.stdout and "movie" not in done.stdout


def test_loop_direct_and_film(run: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "else where"
    words = ["--from", "0", "--to", "2", "--loop", "--how", "direct", "-n", "4", "-o", str(out)]
    done = CliRunner().invoke(app, ["trajectory", str(run.path), *words])
    assert done.exit_code == 0, done.output
    assert (out / "movie.gif").is_file() and (out / "morph.cxc").read_text().count("open vol_000.mrc") == 2


def test_volumes_of_others_stay(run: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "vol_011.mrc").write_text("mine")
    words = ["trajectory", str(run.path), "--from", "0", "--to", "2", "-n", "3", "--no-movie", "-o", str(out)]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, InputError) and "holds vol_011.mrc" in str(done.exception)
    assert (out / "vol_011.mrc").read_text() == "mine"
    (out / "vol_011.mrc").rename(out / "other.mrc")
    for _ in range(2):
        assert CliRunner().invoke(app, words).exit_code == 0
    assert (out / "other.mrc").exists() and not (out / ".unfinished").exists()


def test_components_and_files(run: RunDir, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["trajectory", str(run.path), "--pc", "2", "-n", "3", "--no-movie"])
    assert done.exit_code == 0 and (run.analysis(3).trajectories / "pc2" / "vol_002.mrc").is_file()
    (tmp_path / "my path.txt").write_text("0 0\n1 1\n")
    done = CliRunner().invoke(app, ["trajectory", str(run.path), "--z", str(tmp_path / "my path.txt"), "--no-movie"])
    assert done.exit_code == 0 and (run.analysis(3).trajectories / "my_path" / "vol_001.mrc").is_file()


def test_the_umap_of_other_latents_is_not_drawn_on(run: RunDir) -> None:
    analysis, z = run.analysis(3), methods.load_run(run.path).z
    words = ["trajectory", str(run.path), "--pc", "1", "-n", "2", "--no-movie"]
    picture = analysis.trajectories / "pc1" / "umap_traversal.png"
    write_yaml(analysis.summary, {"latents": fingerprint(z)})
    assert CliRunner().invoke(app, words).exit_code == 0 and picture.is_file()
    write_yaml(analysis.summary, {"latents": fingerprint(z + 1)})
    with pytest.warns(UserNotice, match="other latents"):
        assert CliRunner().invoke(app, words).exit_code == 0
    assert not picture.exists()


def test_the_images_are_looked_for_in_datadir(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, load = [], methods.load_run
    monkeypatch.setattr(methods, "load_run", lambda *given, **more: asked.append(more) or load(*given))
    done = CliRunner().invoke(
        app, ["trajectory", str(run.path), "--pc", "1", "-n", "2", "--no-movie", "--datadir", str(tmp_path)]
    )
    assert done.exit_code == 0 and asked == [{"datadir": tmp_path}], done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pc", "1", "--how", "direct"], "--how direct"), (["--pc", "1", "--seed", "0"], "--seed 0.*graph"),
        (["--z", "x.txt", "--neighbours", "5"], "--neighbours 5"),
        (["--z", "x.txt", "-n", "5"], "-n 5: each line of --z is one volume"),
        (["--from", "1", "--to", "2", "--how", "direct", "--neighbours", "5"], "--neighbours 5"),
        ([], "say which way"), (["--from", "1", "--to", "2", "--pc", "1"], "say which way"),
        (["--from", "1"], "two particles"),
        (["--from", "1", "--to", "60"], "row 60"), (["--from", "1", "--to", "4"], "row 4.*NaN"),
        (["--from", "1", "--to", "2", "--how", "round"], "--how round"), (["--pc", "3"], "--pc 3.*1 to 2"),
        (["--from", "1", "--to", "2", "-n", "1"], "-n 1"),
        (["--from", "1", "--through", "x", "--to", "2"], "--through x"),
        (["--from", "1", "--to", "2", "-d", "13"], "-d 13"), (["--pc", "1", "--loop"], "--loop"),
        (["--from", "1", "--to", "2", "--neighbours", "0"], "--neighbours 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(run: RunDir, words: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["trajectory", str(run.path), *words])
    assert done.exit_code != 0
    assert re.search(message, str(done.exception) + done.output)
    assert not run.analysis(3).trajectories.exists()
