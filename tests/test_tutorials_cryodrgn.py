"""The page for users of cryoDRGN: every command and flag it names exists, there and here."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import typer
from tutorial_pages import TUTORIALS, run_page

from cryosuite.cli import COMMANDS, app

PAGE = (TUTORIALS / "from_cryodrgn.md").read_text()
WORD = re.compile(r"`(?:cryosuite |cryodrgn |cryodrgn_utils )?([A-Za-z_-]+)`")


def tables() -> list[tuple[list[str], list[str], list[tuple[list[str], list[str]]]]]:
    """(their commands, our commands, rows of (their flags, our flags)) of each section of flags."""
    found = []
    for section in re.split(r"^## ", PAGE, flags=re.M)[1:]:
        title, *lines = section.splitlines()
        if not title.startswith("Flags: "):
            continue
        theirs, ours = (WORD.findall(part) for part in title.split("->"))
        rows = [[WORD.findall(cell) for cell in line.split("|")[1:3]] for line in lines if line.startswith("| `")]
        found.append((theirs, ours, [(left, right) for left, right in rows]))
    return found


def our_flags(command: str) -> set[str]:
    built = typer.main.get_command(app).get_command(None, command)
    return {option for parameter in built.params for option in [*parameter.opts, *parameter.secondary_opts]}


def their_sources() -> dict[str, str]:
    """Source of each command of the installed cryoDRGN; read, not imported."""
    root = Path(os.environ.get("CRYODRGN_VENV", "/nonexistent"))
    folders = [
        path for kind in ("commands", "commands_utils") for path in root.glob(f"lib/*/site-packages/cryodrgn/{kind}")
    ]
    if not folders:
        pytest.skip("no cryoDRGN: set CRYODRGN_VENV to an environment with `pip install cryodrgn`")
    return {path.stem: path.read_text() for folder in folders for path in folder.glob("*.py")}


def test_the_page_has_a_table_for_each_command() -> None:
    listed = tables()
    assert len(listed) >= 10 and sum(len(rows) for _, _, rows in listed) > 45


def test_every_flag_of_ours_exists() -> None:
    for _, commands, rows in tables():
        known = set().union(*(our_flags(command) for command in commands))
        for _, flags in rows:
            assert set(flags) <= known, (commands, set(flags) - known)
    for line in re.findall(r"^(?: {4})?cryosuite (.*?)(?:#.*)?$", PAGE, flags=re.M):
        name, *words = line.split()
        assert {word for word in words if re.match(r"--?[A-Za-z]", word)} <= our_flags(name), line


def test_every_command_of_ours_exists() -> None:
    rows = re.findall(r"^\| `cryodrgn.*? \| (.*) \|$", PAGE, flags=re.M)
    named = {name for row in rows for name in WORD.findall(row)}
    assert len(rows) >= 11 and named <= set(COMMANDS) and len(named) >= 12


def test_every_command_and_flag_of_theirs_exists() -> None:
    sources = their_sources()
    rows = re.findall(r"^\| (`cryodrgn.*?) \|", PAGE, flags=re.M)
    assert {name for row in rows for name in WORD.findall(row)} <= set(sources)
    for commands, _, rows in tables():
        text = " ".join(sources[command] for command in commands)
        # a name in quotes among the arguments of add_argument, wherever the parser is built
        known = set(re.findall(r"""["'](--?[A-Za-z][\w-]*)["']""", text))
        for flags, _ in rows:
            assert set(flags) <= known, (commands, set(flags) - known)


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path) -> None:
    """Stack, poses and CTF as cryoDRGN has them, to clusters and a map of one of them."""
    import numpy as np
    from sklearn.metrics import adjusted_rand_score

    from cryosuite.formats.pickles import read_indices, read_labels

    run_page("from_cryodrgn.md", tmp_path)
    found = read_labels(tmp_path / "run" / "analyze.12" / "labels.pkl")
    assert adjusted_rand_score(read_labels(tmp_path / "project" / "labels.pkl"), found) > 0.8
    assert np.array_equal(np.sort(read_indices(tmp_path / "ind.pkl")), np.flatnonzero(found == 0))
    assert (tmp_path / "cluster0" / "fsc-vals.txt").exists() and (
        tmp_path / "run" / "analyze.12" / "report.html"
    ).exists()
