"""``cryosuite analyze`` as a user types it, on a run made up for the test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cryosuite.cli import app
from cryosuite.data.map_weights import save_map_weights
from cryosuite.data.particles import ParticleSet
from cryosuite.data.workdir import RunDir
from cryosuite.formats.mrc import read_map
from cryosuite.formats.pickles import safe_load, write_pickle
from cryosuite.methods import LoadedRun
from cryosuite.nets.scunet import Scunet, ScunetSpec

D = 16


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run folder of two epochs whose decoder draws a ball."""
    folder = RunDir(tmp_path / "run")
    folder.path.mkdir()
    z = np.repeat(np.eye(3, 4, dtype=np.float32) * 5, 8, axis=0)
    z += np.random.default_rng(0).normal(size=z.shape).astype(np.float32) * 0.1
    for epoch in (1, 2):
        write_pickle(folder.z(epoch), z * epoch)
    lines = [json.dumps({"step": step, "epoch": 1 + step // 5, "loss": 1.0 / (1 + step)}) for step in range(10)]
    folder.metrics.write_text("\n".join(lines) + '\n{"step": 10, "lo')

    def decode(latents: np.ndarray) -> np.ndarray:
        axis = np.arange(D) - D // 2
        ball = axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None] ** 2 < 20
        return np.broadcast_to(ball.astype(np.float32), (len(latents), D, D, D)) * latents[:, :1, None, None]

    def load(path: Path, epoch: int | None = None) -> LoadedRun:
        number = RunDir(path).epoch(epoch)
        loaded = safe_load(RunDir(path).z(number))[0]
        particles = ParticleSet.from_array(np.zeros((len(loaded), D, D), np.float32), 2.5)
        return LoadedRun("fake", particles, loaded, number, 2.5, D, decode, {})

    monkeypatch.setattr("cryosuite.methods.load_run", load)
    monkeypatch.setattr("cryosuite.analysis.run.PREVIEW", 48)
    monkeypatch.setattr("cryosuite.analysis.report_clusters.FRAMES", 2)
    return folder


QUICK = ["--skip-umap", "--ksample", "3", "--pc", "1", "--n-per-pc", "2"]


def test_the_last_epoch_by_default_and_a_table_of_what_lies_where(run: RunDir) -> None:
    done = CliRunner().invoke(app, ["analyze", str(run.path), *QUICK])
    assert done.exit_code == 0, done.output
    out = run.analysis(2)
    assert out.chimerax.is_file() and out.learning_curve(2).is_file()
    assert out.report.is_file() and out.particles.is_file()
    shown = "".join(done.stdout.replace("│", " ").split())  # long paths are broken over lines of the table
    assert "view.cxc" in shown and "labels.pkl" in shown and "report.html" in shown
    assert "next:" in done.output


@pytest.mark.parametrize("how", [["1"], ["--epoch", "1"]])
def test_epoch_as_cryodrgn_takes_it_and_as_an_option(run: RunDir, how: list[str]) -> None:
    done = CliRunner().invoke(app, ["analyze", str(run.path), *how, *QUICK, "--skip-vol", "--no-report"])
    assert done.exit_code == 0, done.output
    assert not run.analysis(1).report.exists() and run.analysis(1).particles.is_file()
    assert run.analysis(1).labels.is_file() and not run.analysis(2).path.exists()
    assert not run.analysis(1).chimerax.exists()


def test_options_of_volumes_reach_the_files(run: RunDir, tmp_path: Path) -> None:
    options = ["--Apix", "2", "-d", "8", "--vol-start-index", "1", "--invert", "-o", str(tmp_path / "else where")]
    done = CliRunner().invoke(app, ["analyze", str(run.path), *QUICK, *options])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "else where" / "kmeans3"
    assert not (folder / "vol_000.mrc").exists() and not run.analysis(2).path.exists()
    volumes = [read_map(folder / f"vol_{number:03d}.mrc") for number in (1, 2, 3)]
    assert all(volume.data.shape == (8, 8, 8) and volume.pixel_size == pytest.approx(4.0) for volume in volumes)
    brightest = max(volumes, key=lambda volume: np.abs(volume.data).max())
    assert brightest.data.min() < -5


def test_two_different_epochs_are_refused(run: RunDir) -> None:
    done = CliRunner().invoke(app, ["analyze", str(run.path), "1", "--epoch", "2"])
    assert done.exit_code != 0 and "two epochs" in str(done.exception)


def test_sharpened_volumes_lie_beside_the_others_and_are_told(run: RunDir, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("cryosuite.data.map_weights.WEIGHTS", tmp_path)
    done = CliRunner().invoke(app, ["analyze", str(run.path), *QUICK, "--sharpen"])
    assert "train-lvm --task sharpen" in str(done.exception) and not run.analysis(2).path.exists()
    torch.manual_seed(0)
    network = Scunet(ScunetSpec(d=2, bottleneck=2, mlp=1))
    save_map_weights(tmp_path / "lvm-sharpen.safetensors", network, task="sharpen", voxel=2.5, norm="robust")
    done = CliRunner().invoke(app, ["analyze", str(run.path), *QUICK, "--sharpen"])
    assert done.exit_code == 0, done.output
    out = run.analysis(2)
    folder = out.kmeans(3)
    assert [path.name for path in folder.volumes()] == [f"vol_{k:03d}.mrc" for k in range(3)]
    made = folder.sharpened()
    assert made and read_map(made[0]).data.shape == (D, D, D) and b"not a measurement" in read_map(made[0]).header
    assert "Predictions" in done.output
    assert "sharpened by a network" in (out.path / "report.html").read_text()
    CliRunner().invoke(app, ["analyze", str(run.path), *QUICK])
    assert not folder.sharpened() and "sharpened by a network" not in (out.path / "report.html").read_text()
