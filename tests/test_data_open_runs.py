"""Runs named as particle sets: what they were trained on is opened, and no circle of them is walked for ever."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cryosuite.data.open import open_particles
from cryosuite.errors import InputError
from cryosuite.formats.config import write_yaml
from cryosuite.formats.pickles import write_pickle
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


def test_a_run_opens_its_particles_as_it_was_trained_and_as_the_user_says(tmp_path: Path) -> None:
    """Contrast and pixel size that a training was given belong to its particles; an option has the last word."""
    images = np.random.default_rng(0).standard_normal((5, 8, 8)).astype(np.float32)
    with StackWriter(tmp_path / "a.mrcs", 5, 8, None) as writer:
        writer.write(images)
    poses = {name: np.tile(np.eye(3, dtype=np.float32), (5, 1, 1)) for name in ("trained", "found", "given")}
    shifts = {name: np.full((5, 2), value, np.float32) for name, value in zip(poses, (0.01, 0.02, 0.03), strict=True)}
    for name in ("trained", "given"):
        write_pickle(tmp_path / f"{name}.pkl", (poses[name], shifts[name]))
    folder = tmp_path / "run"
    folder.mkdir()
    config = {"method": "deco", "particles": "../a.mrcs", "poses": "../trained.pkl", "pixel_size": 3.0, "sign": -1}
    write_yaml(folder / "config.yaml", config)
    found = open_particles(folder, need_ctf=False)
    assert np.array_equal(found.read(slice(None)), -images) and found.pixel_size[0] == 3.0
    assert np.array_equal(found.shift, shifts["trained"])
    own = open_particles(folder, need_ctf=False, poses=tmp_path / "given.pkl", pixel_size=2.0, sign=1)
    assert np.array_equal(own.read(slice(None)), images) and own.pixel_size[0] == 2.0
    assert np.array_equal(own.shift, shifts["given"])
    write_yaml(folder / "config.yaml", {**config, "poses_found": True})
    write_pickle(folder / "z.1.pkl", np.zeros((5, 2), np.float32))
    write_pickle(folder / "index.pkl", np.arange(5))
    write_pickle(folder / "poses.1.pkl", (poses["found"], shifts["found"]))
    assert np.array_equal(open_particles(folder, need_ctf=False).shift, shifts["found"])
    given = open_particles(folder, need_ctf=False, poses=tmp_path / "given.pkl")
    assert np.array_equal(given.shift, shifts["given"])
    for name, value in (("sign", 2), ("pixel_size", "large")):
        write_yaml(folder / "config.yaml", {**config, name: value})
        with pytest.raises(InputError, match=f"config.yaml: {name} is {value}"):
            open_particles(folder, need_ctf=False)
