"""The command line as a user meets it: help at once, one clear message, the right exit code."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from cryosuite.cli import COMMANDS, _describe_os_error
from cryosuite.console import complain

HEAVY = ("torch", "matplotlib", "sklearn", "umap", "scipy", "pandas", "timm", "numba")


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cryosuite", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy(command: str) -> None:
    """Help is fast because the numeric libraries stay out of it; their absence is what can be tested anywhere."""
    arguments = [command, "--help"] if command else ["--help"]
    script = f"import sys; sys.argv = ['cryosuite', *{arguments!r}]\nfrom cryosuite.cli import main\n"
    script += "try:\n    main()\nexcept SystemExit as stop:\n    code = stop.code\n"
    script += f"found = [name for name in {HEAVY!r} if name in sys.modules]\n"
    script += "sys.exit(f'imported {found}' if found else code)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_every_command_is_listed_with_a_sentence() -> None:
    text = run("--help").stdout
    for name in COMMANDS:
        line = next(line for line in text.splitlines() if f" {name} " in line)
        assert len(line.replace("│", "").split(name, 1)[1].split()) >= 3, line


def test_help_answers_quickly() -> None:
    """Not a benchmark, only a guard against importing torch by accident: three times the promised half second."""
    began = time.monotonic()
    run("--help")
    assert time.monotonic() - began < 1.5 * 3  # CI machines are shared


def test_missing_file_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run("backproject", "not_there.star", "-o", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "not_there.star" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = run("backproject", "not_there.star", "-o", "out", "--debug", cwd=tmp_path)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_unknown_command_and_option_end_with_2() -> None:
    assert run("no-such-command").returncode == 2
    assert run("simulate", "--no-such-option").returncode == 2


def test_version() -> None:
    assert run("--version").stdout.startswith("cryosuite ")


def test_full_disk_is_named() -> None:
    message = _describe_os_error(OSError(28, "No space left on device", "maps/vol.mrc"))
    assert message.startswith("maps/vol.mrc:") and "full" in message


def test_an_error_does_not_move_the_terminals_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    """The name of a file, told by the system as it is, may hold escape sequences."""
    told = _describe_os_error(OSError(13, "Permission denied", "a\x1b[2Jb.mrc"))
    complain(f"error: {told}")
    assert capsys.readouterr().err == "error: a?[2Jb.mrc: Permission denied\n"
