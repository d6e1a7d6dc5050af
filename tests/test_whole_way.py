"""From real particle images, straight from their RELION star or cryoSPARC .cs, to volumes and back to star.

The sets are tiny (five and seven particles of two microscopes): what is tested is that every step takes what the step
before wrote, that nothing is lost on the way, and that so few particles break nothing. No claim about structure.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cryosuite.formats.mrc import read_map
from cryosuite.formats.pickles import read_labels, read_latent, write_pickle
from cryosuite.formats.star import particle_tables

pytestmark = pytest.mark.slow


def cryosuite(*arguments: object, cwd: Path) -> str:
    command = [sys.executable, "-m", "cryosuite", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1) if arguments[0] == "check" else done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def whole_way(folder: Path, particles: Path, n: int, original_box: int, pixel_size: float, *given: object) -> None:
    """preprocess, check, train-hype, analyze, backproject, eval-fsc on half maps, export."""
    binned = pixel_size * original_box / 32
    cryosuite("preprocess", particles, *given, "-D", 32, "-o", "work", cwd=folder)
    report = cryosuite("check", "work", cwd=folder)
    assert str(n) in report and "ok" in report
    cryosuite("train-hype", "work", "-o", "run", "-n", 3, "-b", 4, cwd=folder)
    (z,) = read_latent(folder / "run" / "z.3.pkl")
    assert len(z) == n and np.isfinite(z).all()

    cryosuite("analyze", "run", "--ksample", 2, "--pc", 1, "--n-per-pc", 2, cwd=folder)
    analysis = folder / "run" / "analyze.3"
    volume = read_map(analysis / "kmeans2" / "vol_000.mrc")
    assert volume.data.shape == (32, 32, 32) and np.isfinite(volume.data).all() and volume.data.std() > 0
    assert volume.pixel_size == pytest.approx(binned, rel=1e-3)
    for name in ("umap.png", "view.cxc", "overview.png"):
        assert (analysis / name).stat().st_size > 0
    labels = read_labels(analysis / "labels.pkl")
    assert len(labels) == n and set(labels) <= {0, 1}

    cryosuite("backproject", "work", "-o", "bp", cwd=folder)
    halves = [folder / "bp" / f"half_map_{letter}.mrc" for letter in "ab"]
    assert read_map(halves[0]).pixel_size == pytest.approx(binned, rel=1e-3)
    assert "0.143" in cryosuite("eval-fsc", *halves, "-o", "fsc", cwd=folder)

    cluster = int(labels[0])
    cryosuite("export", "run", "--labels", analysis / "labels.pkl", "--cluster", cluster, "-o", "out.star", cwd=folder)
    assert len(particle_tables(folder / "out.star").particles) == int((labels == cluster).sum())


def test_relion_star(shared: Path, tmp_path: Path) -> None:
    """Five particles of 256 pixels with RELION 3.1's star; the stack lies where the star says, below --datadir."""
    source = shared / "data" / "metadata" / "opusDSD" / "relion31.star"
    names = particle_tables(source).particles["rlnImageName"]
    stack = tmp_path / "project" / str(names.iloc[0]).split("@")[1]
    stack.parent.mkdir(parents=True)
    stack.symlink_to(shared / "data" / "stacks" / "cryodrgn" / "relion31.mrcs")
    whole_way(tmp_path, source, 5, 256, 2.806, "--datadir", tmp_path / "project")
    exported = particle_tables(tmp_path / "out.star")
    original = particle_tables(source).particles
    kept = original[original["rlnImageName"].isin(set(exported.particles["rlnImageName"]))]
    assert len(kept) == len(exported.particles)
    assert set(original.columns) <= set(exported.particles.columns)


def test_cryosparc_cs(shared: Path, tmp_path: Path) -> None:
    """Seven particles of EMPIAR-10076 with cryoSPARC's .cs, which has no poses: they come from a pickle."""
    source = shared / "data" / "metadata" / "cryodrgn" / "empiar_10076_7.cs"
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.standard_normal((7, 3, 3)))
    rotation *= np.linalg.det(rotation)[:, None, None]
    write_pickle(tmp_path / "poses.pkl", (rotation.astype(np.float32), np.zeros((7, 2), np.float32)))
    stacks = shared / "data" / "stacks" / "cryodrgn"
    whole_way(tmp_path, source, 7, 320, 1.31, "--datadir", stacks, "--poses", tmp_path / "poses.pkl")
    exported = particle_tables(tmp_path / "out.star").particles
    assert exported["rlnDefocusU"].between(15000, 15400).all()
