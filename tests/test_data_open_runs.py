"""Runs named as particle sets: what they were trained on is opened, and no circle of them is walked for ever."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cryosuite.data.open import open_particles
from cryosuite.errors import InputError
from cryosuite.formats.config import write_yaml
from cryosuite.formats.stacks import StackWriter


def run(folder: Path, particles: str) -> Path:
    folder.mkdir()
    write_yaml(folder / "config.yaml", {"method": "hype", "particles": particles})
    return folder


def test_runs_that_name_runs_end_at_the_images(tmp_path: Path) -> None:
    with StackWriter(tmp_path / "a.mrcs", 5, 8, 2.0) as writer:
        writer.write(np.random.default_rng(0).standard_normal((5, 8, 8)).astype(np.float32))
    run(tmp_path / "one", "../a.mrcs")
    run(tmp_path / "two", "../one")
    found = open_particles(run(tmp_path / "three", "../two"), need_poses=False, need_ctf=False)
    assert len(found) == 5 and found.path == tmp_path / "three" / ".." / "two" / ".." / "one" / ".." / "a.mrcs"


@pytest.mark.parametrize("links", [["."], ["../b", "../a"], ["../b", "../c", "../b"]])
def test_runs_that_name_each_other_are_refused(links: list[str], tmp_path: Path) -> None:
    folders = [run(tmp_path / name, link) for name, link in zip("abc", links, strict=False)]
    with pytest.raises(InputError, match=r"config.yaml: its particles .* lead back to a run"):
        open_particles(folders[0], need_poses=False)
