"""The tutorials' commands, run as they are written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[1] / "tutorials"


def blocks(name: str) -> list[str]:
    """The shell blocks of a tutorial, in order."""
    return re.findall(r"^```bash\n(.*?)^```", (TUTORIALS / name).read_text(), flags=re.M | re.S)


@pytest.mark.slow
def test_particles_without_poses(tmp_path):
    """The whole page: simulate, find poses and classes, judge; the poses are right."""
    import json

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    for command in blocks("abinitio.md"):
        done = subprocess.run(
            ["bash", "-e", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    scores = json.loads((tmp_path / "run" / "eval.6" / "scores.json").read_text())
    assert scores["poses"]["rotation_median_deg"] < 5
    assert (tmp_path / "run" / "clusters.6" / "cluster_000.star").exists()


@pytest.mark.slow
def test_mixtures_sorted_and_polished(tmp_path):
    """The whole page: simulate, sort, polish, judge, look, export; the polished maps are the better ones."""
    import json

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    commands = blocks("mixtures.md")
    assert len(commands) == 6
    for command in commands:
        done = subprocess.run(
            ["bash", "-e", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    raw = json.loads((tmp_path / "run" / "eval.16" / "scores.json").read_text())
    polished = json.loads((tmp_path / "run" / "polish.16" / "scores" / "scores.json").read_text())
    assert raw["clustering"]["kmeans_ari"] > 0.95
    for name in ("auc_masked", "auc_unmasked"):
        assert polished["per_image"][name] > raw["per_image"][name]
    assert polished["polished"] and not raw["polished"]
    assert (tmp_path / "state0.star").exists()


@pytest.mark.slow
def test_poses_from_a_network(tmp_path):
    """The whole page: simulate, pose against the map, train on the poses; they are right."""
    import json

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    for command in blocks("fastar.md"):
        done = subprocess.run(
            ["bash", "-e", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    errors = json.loads((tmp_path / "posed" / "truth.json").read_text())
    assert errors["predicted"]["raw"]["median_deg"] < errors["predicted"]["chance_raw"]["median_deg"] / 3
    assert errors["refined"]["raw"]["median_deg"] < 3 and errors["refined"]["raw"]["shift_median_px"] < 1
