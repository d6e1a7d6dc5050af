"""A disk that is full in the middle of a write: the old file stays whole, one sentence says what is needed and free."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import training_toy

from cryosuite.analysis import plots
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError
from cryosuite.formats.atomic import append_text, atomic_path, remove_leftovers, reserve, write_text
from cryosuite.formats.config import write_yaml
from cryosuite.formats.mrc import StackWriter, write_map
from cryosuite.formats.pickles import write_pickle
from cryosuite.formats.safetensors import write_safetensors
from cryosuite.formats.star import write_star
from cryosuite.training.checkpoint import load_state, save_state
from cryosuite.training.logs import MetricsLog, read_metrics, write_scores

DISK = 256 * 1024  # bytes


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB in memory; skips where this process may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no small disk to fill: mounting a tmpfs needs root ({done.stderr.decode().strip()[:100]})")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def stack(path: Path, values: np.ndarray) -> None:
    images = values.reshape(-1, 8, 8)
    with StackWriter(path, len(images), 8, 1.0) as writer:
        writer.needed = 0  # so that the disk fills on the way
        writer.write(images)


def html(path: Path, values: np.ndarray) -> None:
    """As the report and tables are written: line by line into an open file."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for value in values:
            file.write(f"<td>{value:.17f}</td>\n")


def picture(path: Path, values: np.ndarray) -> None:
    side = int(len(values) ** 0.5)
    with plots.figure(path, 1 + side / 100, 1 + side / 100) as page:
        noise = np.random.default_rng(0).random((side, side))
        page.add_axes((0, 0, 1, 1)).imshow(noise, interpolation="nearest")


WRITERS: dict[str, Callable[[Path, np.ndarray], None]] = {
    "checkpoint.pt": lambda path, values: save_state(path, {"format": 1, "w": torch.from_numpy(values)}),
    "particles.star": lambda path, values: write_star(path, {"particles": pd.DataFrame({"rlnX": values})}),
    "vol_000.mrc": lambda path, values: write_map(path, values[: len(values) // 64 * 64].reshape(-1, 8, 8), 1.0),
    "particles.mrcs": lambda path, values: stack(path, values[: len(values) // 64 * 64]),
    "z.3.pkl": lambda path, values: write_pickle(path, values),
    "classes.csv": lambda path, values: plots.write_csv(path, {"x": values}),
    "report.html": html,
    "umap.png": picture,
    "config.yaml": lambda path, values: write_yaml(path, {"values": values.tolist()}),
    "encoder.safetensors": lambda path, values: write_safetensors(path, {"w": values}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_old_file_stays_whole(small_disk: Path, name: str) -> None:
    path, few, many = small_disk / name, np.arange(256, dtype=np.float32), np.arange(90_000, dtype=np.float32)
    WRITERS[name](path, few)
    before = path.read_bytes()
    with pytest.raises(InputError) as caught:
        WRITERS[name](path, many)
    said = str(caught.value)
    assert str(path) in said and "need" in said and "are free" in said, said
    assert path.read_bytes() == before
    assert os.listdir(small_disk) == [name], "no temporary file is left"
    WRITERS[name](path, few)  # and the room it took is given back


def test_logs_are_appended_whole_or_not_at_all(small_disk: Path) -> None:
    log = MetricsLog(small_disk / "metrics.jsonl", 0)
    with pytest.raises(InputError, match=r"metrics\.jsonl: the disk is full; it needs .*are free"):
        for step in range(100_000):
            log.write({"step": step, "loss": step / 7, "padding": 10**6 / 7, "more": 10**6 / 9, "seconds": 1e6 / 3})
    lines = (small_disk / "metrics.jsonl").read_text().splitlines()
    assert len(lines) > 100 and [json.loads(line)["step"] for line in lines] == list(range(len(lines)))
    with pytest.raises(InputError, match=r"run\.log: .*disk is full"):
        append_text(small_disk / "run.log", "x" * DISK)
    assert (small_disk / "run.log").read_text() == ""


def test_a_mapped_file_is_refused_before_it_could_kill(small_disk: Path) -> None:
    """A page of a sparse file that has no place on the disk ends the process by SIGBUS."""
    with pytest.raises(InputError, match=r"pool\.bin.*disk is full; it needs 1\.0 MiB.*are free"):
        reserve(small_disk / "pool.bin", 1 << 20)
    reserve(small_disk / "pool.bin", 1 << 16)
    np.memmap(small_disk / "pool.bin", np.uint8, "r+")[:] = 1
    assert (small_disk / "pool.bin").stat().st_size == 1 << 16


def test_volumes_that_are_compared_need_their_place(small_disk: Path) -> None:
    from cryosuite.analysis.landscape_files import LandscapeDir, VolumeOptions, _decoded

    z = np.zeros((20, 2), np.float32)
    where = (LandscapeDir(small_disk), z, lambda some: np.ones((len(some), 16, 16, 16), np.float32), 1.0, 16)
    with pytest.raises(InputError, match=r"disk is full; it needs 320\.0 KiB"), _decoded(*where, VolumeOptions()):
        raise AssertionError("must not get here")
    assert os.listdir(small_disk) == []


def test_a_training_goes_on_once_there_is_room(small_disk: Path, tmp_path: Path) -> None:
    """The disk fills up under a training: one sentence, the checkpoint of before, and the same end after --resume."""
    undisturbed = training_toy.train(tmp_path / "undisturbed", epochs=4)
    ballast = small_disk / "ballast"

    class Filling(training_toy.Toy):
        def loss(self, model, batch, step):
            if step.index == 12:
                ballast.write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
            return super().loss(model, batch, step)

    run = small_disk / "run"
    with pytest.raises(InputError, match=r"run/.*(needs|are free)"):
        training_toy.train(run, Filling(), epochs=4, checkpoint_every_minutes=0)
    assert load_state(RunDir(run).checkpoint, "a checkpoint")["place"]["step"] == 12
    assert not list(run.glob(".*"))
    ballast.unlink()
    again = training_toy.train(run, resume=True, epochs=4, checkpoint_every_minutes=0)
    for name, tensor in undisturbed.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    steps = [line["step"] for line in read_metrics(RunDir(run).metrics)]
    assert steps == [line["step"] for line in read_metrics(RunDir(tmp_path / "undisturbed").metrics)]


@pytest.mark.slow
def test_a_command_leaves_with_code_2_and_one_line(small_disk: Path) -> None:
    words = ["simulate", "--structures", "phantom:2", "-n", "120", "-D", "24", "-o", str(small_disk / "sim")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    done = subprocess.run(
        [sys.executable, "-m", "cryosuite", *words], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and str(small_disk / "sim") in said[0] and "need" in said[0] and "are free" in said[0]
    assert not list((small_disk / "sim").glob(".*")) and not (small_disk / "sim" / "dataset.yaml").exists()


def test_a_limit_on_file_sizes_is_said_too(tmp_path: Path) -> None:
    """`ulimit -f`, for those who may not mount: the checkpoint of before stays, the message names file and sizes."""
    path = tmp_path / "checkpoint.pt"
    save_state(path, {"format": 1, "w": torch.zeros(10)})
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        for name in ("checkpoint.pt", "labels.pkl", "report.html"):
            with pytest.raises(InputError, match=rf"{name}: .*needs .*are free"):
                WRITERS.get(name, WRITERS["z.3.pkl"])(tmp_path / name, np.arange(90_000, dtype=np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate 2.00 GiB.", "CUDA error: unspecified failure"])
def test_a_gpu_that_fails_is_not_taken_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match=said[:15]):
        save_state(tmp_path / "checkpoint.pt", {"format": 1})
    assert not os.listdir(tmp_path)


def test_leftovers_of_killed_writers_go_and_those_of_live_ones_stay(tmp_path: Path) -> None:
    path = tmp_path / "z.3.pkl"
    code = (
        "import os, signal, sys\n"
        "from cryosuite.formats.atomic import atomic_path\n"
        "with atomic_path(sys.argv[1]) as t:\n"
        "    t.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for name in ("z.3.pkl", "z.30.pkl"):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False)
        assert done.returncode == -9
    (tmp_path / ".z.3.pkl.part0").write_text("of somebody else")
    assert len(os.listdir(tmp_path)) == 3
    with atomic_path(path) as mine:
        mine.write_text("one")
        with atomic_path(path) as other:
            assert mine.exists() and mine != other
            other.write_text("two")
        assert path.read_text() == "two"
    assert path.read_text() == "one"
    left = sorted(os.listdir(tmp_path))
    assert len(left) == 3 and left[0] == ".z.3.pkl.part0" and left[1].startswith(".z.30.pkl.") and left[2] == "z.3.pkl"
    remove_leftovers(tmp_path / "z.30.pkl")
    assert sorted(os.listdir(tmp_path)) == [".z.3.pkl.part0", "z.3.pkl"]


def test_a_folder_is_listed_once_however_many_files_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (".z.1.pkl.abcdefgh.pkl", ".z.2.pkl.abcdefgh.pkl", ".z.1.pkl.abcdefgh.pkl.mine"):
        (tmp_path / name).write_text("left by a writer that was killed")
    listed, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scan(folder))
    for number in (1, 3, 1, 2):
        with atomic_path(tmp_path / f"z.{number}.pkl", suffix=".pkl") as temporary:
            temporary.write_text("new")
    assert len(listed) == 1
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == [".z.1.pkl.abcdefgh.pkl.mine", "z.1.pkl", "z.2.pkl", "z.3.pkl"]


def test_scores_of_an_epoch_done_again_replace_the_old_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_text(path, '{"step": 5, "loss": 2.0}\n')
    for value in (1.0, 1.23456):
        write_scores(path, 1, {"cc": value}, 3)
    append_text(path, '{"step": 6, "loss": 1.0}\n')
    write_scores(path, 2, {"cc": 2.0}, 3)
    found = read_metrics(path)
    assert [(line["step"], line.get("cc")) for line in found] == [(5, None), (5, 1.235), (6, None), (6, 2.0)]
