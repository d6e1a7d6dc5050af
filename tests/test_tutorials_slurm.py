"""The batch scripts of the tutorials: bash parses them, and every command in them takes its options."""

from __future__ import annotations

import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
import typer

SCRIPTS = sorted((Path(__file__).parent.parent / "tutorials" / "slurm").glob("*.sbatch"))
ARRAYS = {"$SET": "Tomotwin-100", "$K": "3", "$SEED": "1", "$TASK": "sharpen", "${RESUME[@]}": "--resume"}


def commands(text: str) -> list[list[str]]:
    """The words of every cryosuite command of a script, with the shell's variables filled in."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        line = "" if line.startswith("#") else line
        at = re.search(r"\bcryosuite (?=[a-z])", line)
        if at:
            words = line[at.end() :]
            for name, value in ARRAYS.items():
                words = words.replace(f'"{name}"', value).replace(name, value)
            assert "$" not in words, words
            found.append(shlex.split(words))
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script(path: Path) -> None:
    text = path.read_text()
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))
    assert {"job-name", "cpus-per-task", "mem", "time", "output"} <= set(options)
    assert commands(text)
    for name, *arguments in commands(text):
        single = typer.Typer(add_completion=False)
        single.command(name)(import_module(f"cryosuite.commands.{name.replace('-', '_')}").main)
        with typer.main.get_command(single).make_context(name, list(arguments)) as context:
            values = context.params
        if "--devices" in arguments:
            assert values["devices"] == int(options["ntasks-per-node"]) == int(options["gpus-per-node"])
            assert values["num_nodes"] == int(options.get("nodes", "1"))
        if values.get("requeue"):
            assert options["signal"].startswith("USR1@") and "requeue" in options


def test_every_script_is_told_of() -> None:
    said = (SCRIPTS[0].parent.parent / "slurm.md").read_text()
    assert len(SCRIPTS) >= 10
    for path in SCRIPTS:
        assert path.name in said
