"""Processes that share work: rows, arrays, mistakes, and one stack written by several."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from forked import each

from cryosuite.cli import _take_part
from cryosuite.data.broken import Broken
from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.errors import FileError, InputError
from cryosuite.formats.stacks import StackPart, StackReader, StackWriter
from cryosuite.ranks import process_count, process_rank
from cryosuite.training.guard import TrainingDiverged


def _diverge() -> None:
    raise TrainingDiverged("the loss became nan")


@pytest.mark.parametrize("rows, step", [(10, 1), (10, 4), (3, 4), (0, 2), (301, 37)])
def test_parts_cover_all_rows_and_begin_at_steps(rows: int, step: int) -> None:
    parts = [Processes(rank, 3).mine(np.arange(rows), step) for rank in range(3)]
    assert np.array_equal(np.concatenate(parts), np.arange(rows))
    assert all(part[0] % step == 0 for part in parts if len(part))
    assert np.array_equal(ALONE.mine(np.arange(rows), step), np.arange(rows))


def test_arrays_and_mistakes_reach_all(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)

    def work(processes: Processes) -> None:
        mine = processes.mine(np.arange(7), 4)  # the first process has none
        assert np.array_equal(processes.joined(whole[mine]), whole)
        assert np.array_equal(processes.joined(whole[mine] > 0), whole > 0)
        kept = processes.joined(whole[mine], to_all=False)
        assert np.array_equal(kept, whole if processes.first else whole[mine])
        assert processes.everyone(lambda: processes.rank) == [0, 1, 2]
        assert processes.first_does(lambda: f"said by {processes.rank}") == "said by 0"

        def fail() -> None:
            if processes.rank == 1:
                raise InputError("row 5 is bad")

        def vanish() -> None:
            if processes.rank == 2:
                raise FileError("a.mrcs: the file is gone")

        for together in (lambda: processes.everyone(vanish), lambda: processes.first_does(Path("/no/such").read_bytes)):
            with pytest.raises(FileError, match="a.mrcs: the file is gone|/no/such"):
                together()
        with pytest.raises(TrainingDiverged, match="the loss"):
            processes.first_does(_diverge)
        with pytest.raises(InputError, match="row 5") as caught:
            processes.everyone(fail)
        assert type(caught.value) is InputError

    each(tmp_path, work)


def test_the_first_process_tells_broken_images_of_all(tmp_path: Path) -> None:
    particles = ParticleSet.from_array(np.ones((9, 4, 4), np.float32), 1.0)

    def work(processes: Processes) -> None:
        broken = Broken(particles)
        mine = processes.mine(np.arange(9))
        images = particles.read(mine)
        images[0] = np.nan  # rows 0, 3 and 6
        with pytest.warns(UserWarning) as told:
            broken.find(mine, images)
            broken.share(processes)
        assert np.flatnonzero(broken.rows).tolist() == [0, 3, 6]
        if processes.first:
            own, others = (str(one.message) for one in told)
            assert "image 0 (0-based)" in own and "images 3, 6 (0-based)" in others

    each(tmp_path, work)


def test_one_stack_by_several_writers(tmp_path: Path) -> None:
    """Parts that lack images are moved up to each other; the file is that of one writer, statistics included."""
    images = np.random.default_rng(0).normal(size=(11, 6, 6)).astype(np.float32)
    kept = np.delete(np.arange(11), [1, 2, 7])
    with StackWriter(tmp_path / "one.mrcs", len(kept), 6, 2.0) as writer:
        for part in (images[[0, 3]], images[[4, 5, 6]], images[[8, 9, 10]]):
            writer.write(part)
    with StackWriter(tmp_path / "two.mrcs", 11, 6, 2.0) as writer:
        writer.allocate()
        parts = []
        for first, rows in ((0, [0, 3]), (4, [4, 5, 6]), (8, [8, 9, 10])):
            with StackPart(tmp_path / "two.mrcs", writer.temporary, first, 4, 6) as part:
                part.write(images[rows])
            parts.append(part)
        writer.put_together(parts)
    assert (tmp_path / "two.mrcs").read_bytes() == (tmp_path / "one.mrcs").read_bytes()
    assert np.array_equal(StackReader(tmp_path / "two.mrcs").read(), images[kept])


def test_a_part_names_images_by_their_place_in_the_whole_stack(tmp_path: Path) -> None:
    images = np.zeros((3, 6, 6), np.float32)
    images[1] = 1e6  # too large for half precision
    with pytest.raises(InputError, match="image 9 "), StackWriter(tmp_path / "s.mrcs", 12, 6, 2.0, np.float16) as whole:
        whole.allocate()
        with StackPart(tmp_path / "s.mrcs", whole.temporary, 8, 4, 6, np.float16) as part:
            part.write(images)


def test_commands_of_one_process_leave_the_work_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from cryosuite import console

    names = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "RANK": "2"}
    assert (process_rank(names), process_count(names)) == (2, 4)
    assert (process_rank({"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "1"}), process_rank({})) == (1, 0)
    monkeypatch.setattr(console, "_hushed", False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert _take_part(["preprocess", "a.star"]) and not _take_part(["analyze", "run"])
    assert console._hushed
    monkeypatch.setenv("RANK", "0")
    assert _take_part(["analyze", "run"])
