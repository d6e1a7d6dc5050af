"""``cryosuite landscape`` as a user types it, on a run made up for the test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cryosuite import methods
from cryosuite.cli import app
from cryosuite.data.particles import ParticleSet
from cryosuite.data.workdir import RunDir
from cryosuite.formats.pickles import read_labels
from cryosuite.methods import LoadedRun

D = 12


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run folder whose decoder draws a body and a ball on one of two sides."""
    z = np.random.default_rng(0).normal(size=(80, 2)).astype(np.float32) * 0.1
    z[:, 0] += np.where(np.arange(80) < 20, -2, 2)
    axis = np.arange(D) - D // 2.0
    zz, yy, xx = np.meshgrid(axis, axis, axis, indexing="ij")

    def decode(latents: np.ndarray) -> np.ndarray:
        at = 2.5 * np.tanh(latents[:, 0])[:, None, None, None]
        return (np.exp(-(zz**2 + yy**2 + xx**2) / 6) + np.exp(-(zz**2 + yy**2 + (xx - at) ** 2) / 2)).astype(np.float32)

    def load(path: Path, epoch: int | None = None) -> LoadedRun:
        particles = ParticleSet.from_array(np.zeros((80, D, D), np.float32), 2.5)
        return LoadedRun("fake", particles, z, 3, 2.5, D, decode, {})

    monkeypatch.setattr("cryosuite.methods.load_run", load)
    return RunDir(tmp_path / "run")


def test_states_and_what_to_do_next(run: RunDir) -> None:
    done = CliRunner().invoke(app, ["landscape", str(run.path), "-N", "10", "-M", "2"])
    assert done.exit_code == 0, done.output
    out = run.analysis(3).landscape
    labels = read_labels(out.labels)
    assert len(set(labels[:20])) == len(set(labels[20:])) == 1 and labels[0] != labels[20]
    assert "polish" in done.output and "95 % interval" in done.stdout and "25.0 %" in done.stdout


def test_the_images_are_looked_for_in_datadir(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, load = [], methods.load_run
    monkeypatch.setattr(methods, "load_run", lambda *given, **more: asked.append(more) or load(*given))
    done = CliRunner().invoke(app, ["landscape", str(run.path), "-N", "8", "-M", "2", "--datadir", str(tmp_path)])
    assert done.exit_code == 0 and asked == [{"datadir": tmp_path}], done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [(["-N", "1"], "-N 1"), (["-M", "0"], "-M 0"), (["--linkage", "best"], "--linkage best"), (["-d", "14"], "-d 14")],
)
def test_what_cannot_be_done_is_said(run: RunDir, words: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["landscape", str(run.path), *words])
    assert done.exit_code != 0 and message in str(done.exception)
