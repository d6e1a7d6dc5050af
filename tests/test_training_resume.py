"""Killed, stopped and continued: the same weights as a run nobody disturbed, or a sentence that says why not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import training_toy
from training_toy import Toy, ToyOptions, options, toy_particles, train

from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, UserNotice
from cryosuite.training.checkpoint import load_state
from cryosuite.training.logs import read_metrics
from cryosuite.training.loop import fit
from cryosuite.training.signals import REQUEUE_EXIT_CODE, StopNow, requeue_job

PROGRAM = [sys.executable, training_toy.__file__]
BUSY = {"epochs": 4, "checkpoint_every_minutes": 0}  # a checkpoint at every step


def start(run: Path, *more: str, **changed) -> subprocess.Popen:
    """The toy training in a process of its own, 10 ms per step."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*PROGRAM, str(run), json.dumps({**BUSY, **changed}), "--slow", "0.01", *more]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_step(run: Path, step: int) -> None:
    """Wait until metrics.jsonl says so many steps are done."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = read_metrics(RunDir(run).metrics)
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.005)
    raise TimeoutError(f"step {step} was not reached")


def finish(process: subprocess.Popen) -> int:
    """Wait for the end of a process; its exit code."""
    process.communicate(timeout=60)
    return process.returncode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the same options that nothing disturbs."""
    run = tmp_path_factory.mktemp("undisturbed")
    train(run, epochs=4)
    return run


def same_run(one: Path, other: Path) -> None:
    """Weights, latents and learning curve of two runs are equal, bit for bit."""
    a, b = RunDir(one), RunDir(other)
    for epoch in range(1, 5):
        first, second = load_state(a.weights(epoch), "weights"), load_state(b.weights(epoch), "weights")
        for name, tensor in first["model_state_dict"].items():
            assert torch.equal(tensor, second["model_state_dict"][name])
        assert np.array_equal(np.load(one / f"z{epoch}.npy"), np.load(other / f"z{epoch}.npy"))
    timeless = [
        [
            {key: line[key] for key in line if key not in ("seconds", "images_per_s")}
            for line in read_metrics(run.metrics)
        ]
        for run in (a, b)
    ]
    assert timeless[0] == timeless[1]
    last = [load_state(run.checkpoint, "a checkpoint") for run in (a, b)]
    assert torch.equal(last[0]["rng"][0]["torch"], last[1]["rng"][0]["torch"])


@pytest.mark.slow
@pytest.mark.parametrize("steps", [[5], [10, 20]])
def test_kill_9_in_mid_epoch_and_resume(tmp_path: Path, undisturbed: Path, steps: list[int]) -> None:
    for number, step in enumerate(steps):
        process = start(tmp_path, *(["--resume"] if number else []))
        wait_for_step(tmp_path, step)
        process.send_signal(signal.SIGKILL)
        assert finish(process) == -signal.SIGKILL
    place = load_state(RunDir(tmp_path).checkpoint, "a checkpoint")["place"]
    assert steps[-1] - 1 <= place["step"] < 28
    assert finish(start(tmp_path, "--resume")) == 0
    same_run(undisturbed, tmp_path)
    assert not list(tmp_path.glob(".*")), "temporary files of killed processes are removed"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signals_leave_a_checkpoint_at_the_next_step(tmp_path: Path, undisturbed: Path, name: str) -> None:
    process = start(tmp_path, checkpoint_every_minutes=60, save_every=1)
    wait_for_step(tmp_path, 10)
    process.send_signal(signal.Signals[name])
    assert finish(process) == {"SIGINT": 130}.get(name, REQUEUE_EXIT_CODE)
    state = load_state(RunDir(tmp_path).checkpoint, "a checkpoint")
    assert state["place"]["batch"] > 0, "in mid-epoch"
    assert f"stopped by {name} at step {state['place']['step']}" in RunDir(tmp_path).log.read_text()
    assert finish(start(tmp_path, "--resume")) == 0
    same_run(undisturbed, tmp_path)


def test_a_signal_in_this_process(tmp_path: Path, undisturbed: Path) -> None:
    """SIGUSR1 in the middle of a step: the step is finished, the handlers of before are put back."""

    class Stopped(Toy):
        def loss(self, model, batch, step):
            if step.index == 9:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().loss(model, batch, step)

    before = signal.getsignal(signal.SIGUSR1)
    result = train(tmp_path, Stopped(), epochs=4)
    assert result.stopped == "SIGUSR1" and result.exit_code == REQUEUE_EXIT_CODE and result.epochs_done == 1
    assert signal.getsignal(signal.SIGUSR1) is before
    assert load_state(RunDir(tmp_path).checkpoint, "a checkpoint")["place"]["step"] == 10
    assert train(tmp_path, resume=True, epochs=4).stopped == ""
    same_run(undisturbed, tmp_path)


def test_a_signal_while_encoding_leaves_at_once_and_the_encoding_is_done_on_resume(
    tmp_path: Path, undisturbed: Path
) -> None:
    class Interrupted(Toy):
        def encode(self, model, batch):
            if not (tmp_path / "weights.2.pkl").exists() and (tmp_path / "weights.1.pkl").exists():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
            return super().encode(model, batch)

    result = train(tmp_path, Interrupted(), epochs=4)
    assert result.stopped == "SIGTERM" and not (tmp_path / "z2.npy").exists()
    assert train(tmp_path, resume="auto", epochs=4).epochs_done == 4
    same_run(undisturbed, tmp_path)


def test_max_minutes_stops_at_a_checkpoint_without_an_error(tmp_path: Path, undisturbed: Path) -> None:
    result = train(tmp_path, epochs=4, max_minutes=1e-9)
    assert result.stopped == "max_minutes" and result.exit_code == 0
    assert load_state(RunDir(tmp_path).checkpoint, "a checkpoint")["place"]["step"] == 1
    for _ in range(40):
        if not train(tmp_path, resume=True, epochs=4, max_minutes=1e-9).stopped:
            break
    same_run(undisturbed, tmp_path)


def test_lines_beyond_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    train(tmp_path, epochs=4, max_minutes=1e-9)
    metrics = RunDir(tmp_path).metrics
    metrics.write_text('{"step": 1, "loss": 1.0}\n{"step": 7, "loss": 1.0}\n{"step": 12, "lo')
    train(tmp_path, resume=True, epochs=4)
    steps = [line["step"] for line in read_metrics(metrics)]
    assert steps == [1, 5, 10, 15, 20, 25, 28]


def test_other_options_or_particles_are_refused_by_name(tmp_path: Path) -> None:
    train(tmp_path)
    run = RunDir(tmp_path)
    with pytest.raises(InputError, match=r"--lr was 0.01, now 0.001; --seed was 0, now 5"):
        train(tmp_path, resume=True, lr=1e-3, seed=5)
    with pytest.raises(InputError, match=r"--zdim was 3, now 4"):
        train(tmp_path, Toy(ToyOptions(zdim=4)), resume=True)
    with pytest.raises(InputError, match=r"particles differ \(was 100, now 90\)"):
        train(tmp_path, n=90, resume=True)
    with pytest.raises(InputError, match="the images differ"):
        fit(Toy(), toy_particles(seed=2), run, options(), resume=True)
    other = Toy()
    other.name = "kraqen"
    with pytest.raises(InputError, match="belongs to toy, not to kraqen"):
        train(tmp_path, other, resume=True)


def test_more_epochs_may_be_added(tmp_path: Path) -> None:
    train(tmp_path, epochs=2)
    with pytest.warns(UserNotice, match="--num-epochs was 2 and is 3 now"):
        assert train(tmp_path, resume=True, epochs=3, log_every=2, devices=1).epochs_done == 3
    with pytest.raises(InputError, match="--num-epochs 1: .* already at epoch 3"):
        train(tmp_path, resume=True, epochs=1)


def test_a_stream_is_as_long_as_its_images(tmp_path: Path) -> None:
    particles, run = toy_particles(), RunDir(tmp_path)
    particles.epoch_images = 100
    fit(Toy(), particles, run, options(epochs=2))
    with pytest.warns(UserNotice, match="--images was 200 and is 300 now"):
        fit(Toy(), particles, run, options(epochs=3), resume=True)
    with pytest.raises(InputError, match="--images 100: .* already at 300 images"):
        fit(Toy(), particles, run, options(epochs=1), resume=True)


def test_a_training_that_ended_early_stays_ended(tmp_path: Path) -> None:
    """Its epoch is judged again on resume, and it does not train on until the next one."""

    def judge(epoch: int, model: torch.nn.Module) -> None:
        if epoch >= 2:
            raise StopNow("enough")

    for resume in (False, True):
        result = fit(Toy(), toy_particles(), RunDir(tmp_path), options(epochs=4), resume=resume, on_epoch=judge)
        assert (result.stopped, result.epochs_done) == ("enough", 2)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "pickle", "foreign"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    train(tmp_path, epochs=1)
    path = RunDir(tmp_path).checkpoint
    data = path.read_bytes()
    if damage == "foreign":
        torch.save({"state": 1}, path)
    elif damage == "pickle":
        torch.save(Path("/bin/sh"), path)
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "garbage": b"\x80\x02}q" + b"x" * 99, "empty": b""}[damage])
    with pytest.raises(InputError, match=r"checkpoint.pt: (damaged|not a checkpoint)"):
        train(tmp_path, resume=True)


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: a sentence with the space needed, the old file as it was."""
    program = (
        "import resource, sys, signal; sys.path.insert(0, sys.argv[2]); import training_toy as t\n"
        "from cryosuite.errors import InputError\n"
        "t.train(sys.argv[1], epochs=4, max_minutes=1e-9)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"
        "try:\n    t.train(sys.argv[1], epochs=4, resume=True)\n"
        "except InputError as error:\n    print(error)\n"
    )
    folder = str(Path(training_toy.__file__).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), folder], env=environment, capture_output=True, text=True
    )
    path = RunDir(tmp_path).checkpoint
    assert str(path) in done.stdout and "bytes" in done.stdout and "disk" in done.stdout, done.stderr
    assert load_state(path, "a checkpoint")["place"]["step"] == 1
    assert not list(tmp_path.glob(".*"))


def test_requeue_asks_scontrol_after_sigusr1_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool, called = tmp_path / "scontrol", tmp_path / "called"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {called}\n[ "$2" = 13 ] && {{ echo no such job >&2; exit 1; }}\nexit 0\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert requeue_job("SIGUSR1", {"SLURM_JOB_ID": "12"})
    assert requeue_job("SIGUSR1", {"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"})
    assert not requeue_job("SIGTERM", {"SLURM_JOB_ID": "12"})
    assert not requeue_job("SIGUSR1", {})
    with pytest.warns(UserNotice, match="no such job"):
        assert not requeue_job("SIGUSR1", {"SLURM_JOB_ID": "13"})
    assert called.read_text().splitlines() == ["requeue 12", "requeue 9_3", "requeue 13"]
