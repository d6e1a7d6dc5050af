"""Two processes under torchrun (gloo, CPU) train like one process with the same global batch."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import training_toy
from forked import fork, wait
from training_toy import Toy, ToyOptions, toy_particles, train

from cryosuite.data.workdir import RunDir
from cryosuite.training import launch
from cryosuite.training.checkpoint import load_state
from cryosuite.training.inference import encode_all
from cryosuite.training.logs import read_metrics
from cryosuite.training.options import TrainOptions

pytestmark = pytest.mark.slow


def torchrun(run: Path, *more: str, restarts: int = 0, **changed) -> subprocess.Popen:
    """The toy training under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command += [f"--max-restarts={restarts}"]
    command += [training_toy.__file__, str(run), json.dumps(changed), *more]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and stderr of torchrun."""
    _, text = process.communicate(timeout=180)
    return process.returncode, text


def children_of(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun started, in the order of their ranks."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def curve(run: Path) -> np.ndarray:
    """Loss and gradient norm per line of metrics."""
    return np.array([[line["step"], line["loss"], line["grad_norm"]] for line in read_metrics(RunDir(run).metrics)])


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """101 images in batches of 20: the last batch has one image, so one process has none."""
    method = Toy(ToyOptions())
    one = train(tmp_path / "one", method, epochs=4, batch_size=20, log_every=1)
    train(tmp_path / "odd", method, n=101, epochs=2, batch_size=20, log_every=1)
    code, text = finish(torchrun(tmp_path / "two", epochs=4, batch_size=20, log_every=1))
    assert code == 0, text
    np.testing.assert_allclose(curve(tmp_path / "two"), curve(tmp_path / "one"), rtol=1e-4)
    code, text = finish(
        torchrun(tmp_path / "odd2", n=101, epochs=2, batch_size=20, log_every=1, checkpoint_every_minutes=0)
    )
    assert code == 0, text
    np.testing.assert_allclose(curve(tmp_path / "odd2"), curve(tmp_path / "odd"), rtol=1e-4)
    z = encode_all(method, one.model, toy_particles(), progress=False)
    np.testing.assert_allclose(np.load(tmp_path / "two" / "z4.npy"), z, rtol=1e-3, atol=1e-4)
    assert len(load_state(RunDir(tmp_path / "two").checkpoint, "a checkpoint")["rng"]) == 2


def test_two_processes_stop_together_and_one_goes_on(tmp_path: Path) -> None:
    """SIGTERM to torchrun: both processes agree on the step; another number of processes may continue."""
    train(tmp_path / "one", Toy(ToyOptions()), epochs=4, batch_size=20)
    process = torchrun(tmp_path / "two", "--slow", "0.05", epochs=4, batch_size=20)
    deadline = time.monotonic() + 90
    while len(curve(tmp_path / "two")) < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    code, text = finish(process)
    assert code != 0
    place = load_state(RunDir(tmp_path / "two").checkpoint, "a checkpoint")["place"]
    assert 5 <= place["step"] < 20, text
    result = train(tmp_path / "two", Toy(ToyOptions()), epochs=4, batch_size=20, resume=True)
    assert result.epochs_done == 4
    np.testing.assert_allclose(curve(tmp_path / "two"), curve(tmp_path / "one"), rtol=1e-4)


def test_nan_in_one_process_stops_both_and_names_all_images(tmp_path: Path) -> None:
    code, text = finish(torchrun(tmp_path, "--nan-at", "7", epochs=4, batch_size=20, checkpoint_every_minutes=0))
    assert code != 0 and "training diverged at step 8" in text
    state = load_state(RunDir(tmp_path).checkpoint, "a checkpoint")
    assert state["place"]["step"] == 7
    assert all(torch.isfinite(value).all() for value in state["model"].values())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_restarted_from_the_checkpoint(rank: int, tmp_path: Path) -> None:
    """torchrun --max-restarts: kill -9 of one rank; the same command goes on by itself to the same result."""
    train(tmp_path / "one", Toy(ToyOptions()), epochs=4, batch_size=20)
    process = torchrun(
        tmp_path / "two", "--slow", "0.2", restarts=1, epochs=4, batch_size=20, checkpoint_every_minutes=0
    )
    deadline = time.monotonic() + 90
    while len(curve(tmp_path / "two")) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(children_of(process)[rank], signal.SIGKILL)
    code, text = finish(process)
    assert code == 0, text
    log = RunDir(tmp_path / "two").log.read_text()
    assert "starting at step 0" in log and "finished 4 epochs" in log
    again = re.search(r"going on at step (\d+)", log)
    assert again and int(again[1]) >= 9, log  # a checkpoint after every step: at most the step under way is lost
    np.testing.assert_allclose(curve(tmp_path / "two"), curve(tmp_path / "one"), rtol=1e-4)


def test_too_little_memory_in_one_process_ends_both_with_one_sentence(tmp_path: Path) -> None:
    code, text = finish(torchrun(tmp_path / "two", "--starved", "1", epochs=4, batch_size=20))
    assert code != 0 and text.count("the machine of process 1 has not enough memory for 10 images at a time") == 1
    assert "start again with half the --batch-size, or go on with --resume and more machines" in text


def test_devices_start_their_own_processes(tmp_path: Path) -> None:
    """devices=2 without any launcher."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    given = json.dumps({"epochs": 2, "batch_size": 20, "devices": 2, "log_every": 1})
    command = [sys.executable, training_toy.__file__, str(tmp_path / "two"), given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    train(tmp_path / "one", Toy(ToyOptions()), epochs=2, batch_size=20, log_every=1)
    np.testing.assert_allclose(curve(tmp_path / "two"), curve(tmp_path / "one"), rtol=1e-4)


def test_restarted_processes_do_not_call_the_dead() -> None:
    """With a fixed --master-port the agent's store outlives a restart and holds the addresses of the killed."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def process(rank: int, attempt: int) -> None:
        given = {"RUN_ID": "x", "USE_AGENT_STORE": "True", "RESTART_COUNT": attempt}
        given = {f"TORCHELASTIC_{name}": value for name, value in given.items()}
        given |= {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": server.port, "CUDA_VISIBLE_DEVICES": ""}
        os.environ.update({name: str(value) for name, value in given.items()})
        time.sleep(0.3 * (1 - rank))  # the first rank comes later, and the second finds the old keys
        launch.TIMEOUT = timedelta(seconds=30)
        launch.start_fabric(TrainOptions(accelerator="cpu"))
        torch.distributed.all_reduce(torch.ones(1))
        if attempt == 0:
            signal.pause()

    first = [fork(partial(process, rank, 0)) for rank in (0, 1)]
    time.sleep(5)
    for pid in first:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    second = [fork(partial(process, rank, 1)) for rank in (0, 1)]
    assert wait(second, 120) == [0, 0]
