"""``cryosuite check``: exit codes and what the table says."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.lib.recfunctions import repack_fields
from typer.testing import CliRunner

from cryosuite.cli import app
from cryosuite.errors import InputError
from cryosuite.formats.cs import read_cs, write_cs
from cryosuite.formats.mrc import read_map, write_map
from cryosuite.formats.pickles import read_poses, write_pickle

RUNNER = CliRunner()
FAST = ("--no-probe", "--sample", 200)


def run(*arguments: object, code: int = 0) -> str:
    result = RUNNER.invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    out = tmp_path_factory.mktemp("sim") / "sim"
    options = ("--structures", "phantom:1", "-n", 1000, "-D", 32, "--snr", 0.5, "--seed", 4)
    run("simulate", "-o", out, *options)
    return out


def test_a_good_set_passes(simulated):
    output = run("check", simulated, "--sample", 500)
    assert "FAIL" not in output
    assert "particles are white" in output
    assert "images/s" in output  # the estimate of the training


def test_mistakes_give_exit_code_1_and_advice(simulated, tmp_path):
    rotation, shift = read_poses(simulated / "poses.pkl")
    write_pickle(tmp_path / "transposed.pkl", (rotation.transpose(0, 2, 1).copy(), shift))
    stack = simulated / "particles.mrcs"
    pickles = ("--ctf", simulated / "ctf.pkl")
    output = run("check", stack, "--poses", tmp_path / "transposed.pkl", *pickles, "--no-probe", code=1)
    assert "rotations transposed" in output
    dark = run("check", stack, "--poses", simulated / "poses.pkl", *pickles, "--invert-data", *FAST, code=1)
    assert "inverted" in dark
    assert "poses" in run("check", stack, *pickles, *FAST, code=1)


def test_errors_of_shifts_are_told(simulated, tmp_path):
    rotation, shift = read_poses(simulated / "poses.pkl")
    wrong = shift + np.random.default_rng(0).normal(0, 0.5 / 32, shift.shape).astype(np.float32)
    write_pickle(tmp_path / "wrong.pkl", (rotation, wrong))
    given = (simulated / "particles.mrcs", "--ctf", simulated / "ctf.pkl", "--no-probe", "--sample", 600)
    assert "not measurably wrong" in run("check", *given, "--poses", simulated / "poses.pkl")
    assert "off by 0.5" in run("check", *given, "--poses", tmp_path / "wrong.pkl")


def test_hand_against_a_reference(golden, tmp_path):
    star, truth = golden / "relion" / "particles.star", golden / "relion" / "volume.mrc"
    run("check", star, "--reference", truth, *FAST)
    data = np.roll(read_map(truth).data[::-1], 1, 0)
    write_map(tmp_path / "mirrored.mrc", data, 3.0)
    assert "Opposite hand" in run("check", star, "--reference", tmp_path / "mirrored.mrc", *FAST, code=1)
    write_map(tmp_path / "narrow.mrc", data, 1.0)
    with pytest.raises(InputError, match="A wide"):
        run("check", star, "--reference", tmp_path / "narrow.mrc", *FAST)


def test_sets_that_cannot_be_opened(golden):
    with pytest.raises(InputError, match="absent.mrcs"):
        run("check", golden / "adversarial" / "wrong_counts_stack_missing.star")
    output = run("check", golden / "adversarial" / "duplicate_particles.star", "--no-probe", "--sample", 50)
    assert "2 of 10 rows show an image again" in output


def test_a_cryosparc_job_in_two_files(golden, tmp_path):
    whole = read_cs(golden / "adversarial/good.cs")
    for name, prefixes in (("main.cs", ("uid", "align", "ctf")), ("pass.cs", ("uid", "blob"))):
        fields = [field for field in whole.dtype.names if field.startswith(prefixes)]
        write_cs(tmp_path / name, repack_fields(whole[fields]))
    with pytest.raises(InputError, match="main.cs: has no field blob/path.*--passthrough"):
        run("check", tmp_path / "main.cs", *FAST)
    source = (tmp_path / "main.cs", "--passthrough", tmp_path / "pass.cs", "--datadir", golden / "adversarial")
    output = RUNNER.invoke(app, [str(one) for one in ("check", *source, *FAST)]).output
    assert "dark" in output or "white" in output
    write_pickle(tmp_path / "ind.pkl", np.array([5, 2]))
    run("export", *source, "--ind", tmp_path / "ind.pkl", "-o", tmp_path / "two.cs")
    assert read_cs(tmp_path / "two.cs")["uid"].tolist() == whole["uid"][[5, 2]].tolist()


def test_the_users_values_are_those_of_preprocess(golden):
    """What preprocess takes, check takes, in the same words; a value that the file contradicts is told."""
    output = RUNNER.invoke(app, ["check", str(golden / "adversarial/good.star"), *map(str, FAST), "--kv", "200"]).output
    assert "your value 200 is used" in " ".join(output.replace("│", " ").split())
