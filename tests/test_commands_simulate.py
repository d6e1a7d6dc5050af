"""The simulate command: one flag is enough, presets give way to what is typed, errors are one sentence."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from cryosuite.cli import app
from cryosuite.errors import InputError
from cryosuite.formats.config import read_yaml
from cryosuite.formats.mrc import read_header


def _run(*arguments: str):
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)], catch_exceptions=False)


def test_minimal_call(tmp_path):
    result = _run("-o", tmp_path / "sim", "-n", 40, "-D", 32)
    assert result.exit_code == 0
    assert "phantom15" in result.output and "SNR at D" in result.output
    record = read_yaml(tmp_path / "sim" / "dataset.yaml")
    assert record["n_states"] == 16 and record["pixel_size"] == 10.0 and record["recipe"] == "mix"
    assert record["kind"] == "simulated" and record["simulation"]["render_box"] == 64
    header = read_header(tmp_path / "sim" / "particles.mrcs")
    assert (header.nz, header.ny, header.nx) == (40, 32, 32) and header.pixel_size == pytest.approx(10.0)
    assert not (tmp_path / "sim" / "clean.mrcs").exists()


@pytest.mark.parametrize(("recipe", "states"), [("loop", 10), ("assembly", 16), ("homogeneous", 1)])
def test_every_recipe_without_further_flags(tmp_path, recipe, states):
    assert _run("-o", tmp_path, "--recipe", recipe, "-n", 32, "-D", 32).exit_code == 0
    record = read_yaml(tmp_path / "dataset.yaml")
    assert record["n_states"] == states == len(record["truth"]["volumes"])
    if recipe == "loop":
        assert np.allclose(np.hypot(*np.array(record["truth"]["embedding"]).T), 1, atol=1e-5)


def test_what_is_typed_wins_over_compat(tmp_path):
    _run("-o", tmp_path, "--structures", "phantom:2", "-n", 8, "--compat", "cryobench", "-D", 32)
    record = read_yaml(tmp_path / "dataset.yaml")
    assert record["box_size"] == 32 and record["pixel_size"] == 3.0
    assert record["simulation"]["bfactor"] == 100.0 and record["snr_nominal"] == 0.01


def test_the_maps_imaged_are_not_replaced_by_those_written(tmp_path):
    _run("-o", tmp_path / "sim", "-n", 8, "-D", 16, "--structures", "phantom:2")
    maps = {path: path.read_bytes() for path in (tmp_path / "sim" / "volumes").iterdir()}
    with pytest.raises(InputError, match="would write over vol_00.*which it reads from"):
        _run("-o", tmp_path / "sim", "-n", 8, "-D", 16, "--structures", tmp_path / "sim" / "volumes", "--overwrite")
    assert all(path.read_bytes() == data for path, data in maps.items())


def test_preset(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("CRYOSUITE_SHARED", str(shared))
    assert _run("-o", tmp_path, "--preset", "mini-igg10", "-n", 20, "-D", 32).exit_code == 0
    record = read_yaml(tmp_path / "dataset.yaml")
    assert record["n_states"] == 10 and record["n_particles"] == 20 and record["states"]["structures"] == ["1igy"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [(["--recipe", "soup"], "soup"), (["--structures", "no/such.pdb"], "no/such.pdb"), (["-D", "31"], "even"),
     (["--compat", "x"], "cryobench"), (["--preset", "x"], "mini-mix16"), (["--noise-at", "3D"], "2D or D"),
     (["--occupancies", "1,2"], "16 states"), (["--recipe", "loop", "--states", "-1"], "--states -1"),
     (["--recipe", "assembly", "--states", "0"], "--states 0"), (["--seed", "-1"], "--seed -1")],
)  # fmt: skip
def test_bad_input_is_one_error(tmp_path, arguments, match):
    with pytest.raises(InputError, match=match):
        _run("-o", tmp_path / "x", *arguments)
    assert not (tmp_path / "x").exists()


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys, cryosuite.commands.simulate; "
        "print([m for m in ('torch', 'scipy', 'pandas', 'gemmi', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
