"""The batch script of ``cryosuite slurm``: complete, checked before the queue, and nothing breaks out of it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cryosuite import cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["cryosuite", *arguments])
    try:
        cli.main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def directives(text: str) -> dict[str, str]:
    """The #SBATCH options of a script."""
    found = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    return {line.partition("=")[0]: line.partition("=")[2] for line in found}


def last_words(text: str) -> list[str]:
    """The words of the script's last line."""
    return shlex.split(text.splitlines()[-1])


def is_bash(text: str) -> bool:
    """Whether bash can parse it."""
    return subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0


def test_a_training_saves_before_the_limit_and_comes_back(monkeypatch, capsys):
    assert run(monkeypatch, "slurm", "--gpus", "4", "--nodes", "2", "-p", "gpu", "train-hype", "work", "-o", "run") == 0
    text = capsys.readouterr().out
    options = directives(text)
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "4" and options["nodes"] == "2"
    assert options["signal"] == "USR1@180" and "requeue" in options and options["partition"] == "gpu"
    words = last_words(text)
    start = words.index("cryosuite")
    assert words[0] == "exec" and words[1] == "srun"
    assert words[start:] == ["cryosuite", "train-hype", "work", "-o", "run", "--devices", "4", "--num-nodes", "2",
                             "--requeue"]  # fmt: skip
    assert is_bash(text)


def test_commands_that_are_no_training_ask_for_no_gpu(monkeypatch, capsys):
    assert run(monkeypatch, "slurm", "--cpus", "32", "preprocess", "a b.star", "-D", "64", "-o", "work") == 0
    text = capsys.readouterr().out
    options = directives(text)
    assert "gpus-per-node" not in options and "requeue" not in options and options["cpus-per-task"] == "32"
    assert last_words(text)[-5:] == ["a b.star", "-D", "64", "-o", "work"]


@pytest.mark.parametrize("limit", ["2880", "90", "7-12", "1-00:30:00", "200:00:00"])
def test_time_limits_as_slurm_takes_them(monkeypatch, capsys, limit):
    assert run(monkeypatch, "slurm", "--time", limit, "train-hype", "work", "-o", "run") == 0
    assert directives(capsys.readouterr().out)["time"] == limit


def test_what_is_typed_cannot_leave_its_line(monkeypatch, capsys, tmp_path):
    evil = "x; touch " + str(tmp_path / "owned") + " $(id) 'y"
    assert run(monkeypatch, "slurm", "train-hype", evil, "-o", "run") == 0
    text = capsys.readouterr().out
    assert is_bash(text) and evil in last_words(text)
    for option, value in (("--job-name", "a\nb"), ("-p", "x y"), ("--setup", "a\nrm b"), ("--mem", "64 G"),
                          ("--time", "soon"), ("--sbatch", "")):  # fmt: skip
        assert run(monkeypatch, "slurm", option, value, "train-hype", "work", "-o", "run") == 2, option
        assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train-everything", "work"], "no command"),
        (["options", "work"], "no command"),
        (["slurm", "check"], "no command"),
        (["train-hype", "work", "-o", "run", "--epocs", "3"], "epocs"),
        (["train-hype", "work"], "--outdir"),
        (["--gpus", "2", "analyze", "run"], "one process"),
        (["train-hype", "work", "-o", "run", "--devices", "2"], "--gpus"),
        (["--nodes", "0", "train-hype", "work", "-o", "run"], "--nodes 0"),
    ],
)
def test_mistakes_are_found_before_the_queue(monkeypatch, capsys, arguments, told):
    assert run(monkeypatch, "slurm", *arguments) == 2
    shown = capsys.readouterr()
    assert told in shown.err and "#SBATCH" not in shown.out


def test_submit_hands_the_script_to_sbatch(monkeypatch, capsys, tmp_path: Path):
    kept = tmp_path / "script"
    fake = tmp_path / "sbatch"
    fake.write_text(f"#!/bin/bash\n/bin/cat > {kept}\necho Submitted batch job 7\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(monkeypatch, "slurm", "--submit", "train-kraqen", "work", "-o", "run") == 0
    assert "job 7" in capsys.readouterr().err
    assert "train-kraqen work -o run" in kept.read_text()
    fake.write_text("#!/bin/bash\necho no such partition >&2\nexit 1\n")
    assert run(monkeypatch, "slurm", "--submit", "train-kraqen", "work", "-o", "run") == 2
    assert "no such partition" in capsys.readouterr().err
    fake.unlink()
    assert run(monkeypatch, "slurm", "--submit", "train-kraqen", "work", "-o", "run") == 2
    assert "sbatch is not on this machine" in capsys.readouterr().err


def test_help_of_the_other_command_is_shown(monkeypatch, capsys):
    assert run(monkeypatch, "slurm", "train-hype", "--help") == 0
    shown = capsys.readouterr().out
    assert "--batch-size" in shown and "#SBATCH" not in shown


def test_commands_that_share_their_work_may_have_several_nodes(monkeypatch, capsys):
    assert run(monkeypatch, "slurm", "--nodes", "3", "preprocess", "a.star", "-o", "w") == 0
    text = capsys.readouterr().out
    assert "--nodes=3" in text and "--ntasks-per-node=1" in text and "--devices" not in text
