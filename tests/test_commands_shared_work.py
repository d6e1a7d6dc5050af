"""backproject and polish in two processes (torchrun, gloo) make the maps that one process makes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hype_toy import blob_particles, blobs

from cryosuite.formats.mrc import read_map
from cryosuite.formats.pickles import write_pickle
from cryosuite.formats.stacks import StackWriter

pytestmark = pytest.mark.slow
COUNT, BOX = 301, 16  # odd: the processes get different numbers of images


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Path:
    """particles.mrcs, poses.pkl, ctf.pkl, and labels.pkl with a class that lies in one process's part only."""
    folder = tmp_path_factory.mktemp("stack")
    particles, labels = blob_particles([blobs(BOX, 0), blobs(BOX, 1)], COUNT, noise=0.3)
    with StackWriter(folder / "particles.mrcs", COUNT, BOX, 6.0) as writer:
        writer.write(particles.read(np.arange(COUNT)))
    write_pickle(folder / "poses.pkl", (particles.rotation, particles.shift))
    write_pickle(folder / "ctf.pkl", particles.ctf)
    labels = labels.astype(np.int64)
    labels[:40] = 2
    write_pickle(folder / "labels.pkl", labels)
    return folder


def command(name: str, stack: Path, out: Path) -> list[str]:
    """The words of a command of ours."""
    files = {"--poses": stack / "poses.pkl", "--ctf": stack / "ctf.pkl", "--labels": stack / "labels.pkl", "-o": out}
    return [name, str(stack / "particles.mrcs"), *[str(word) for pair in files.items() for word in pair]]


def run(words: list[str], processes: int) -> subprocess.CompletedProcess:
    """cryosuite in so many processes."""
    start = [sys.executable, "-m"]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start += ["torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*start, "cryosuite", *words], capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize("name", ["backproject", "polish"])
def test_two_processes_make_the_same_maps(name: str, stack: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for processes, out in ((1, one), (2, two)):
        done = run(command(name, stack, out), processes)
        assert done.returncode == 0, done.stderr
    files = sorted(path.relative_to(one) for path in one.rglob("*.mrc"))
    assert len(files) >= 9
    assert files == sorted(path.relative_to(two) for path in two.rglob("*.mrc"))
    for file in files:
        a, b = (read_map(folder / file).data for folder in (one, two))
        off = np.abs(a - b) / max(np.abs(a).max(), 1e-6)
        # sums in another order: rounding, which may carry a voxel of a mask over its threshold
        assert (off.max() if name == "backproject" else off.mean()) < 1e-4, file
    assert done.stdout.count("┏") == 1  # one table: only the first process prints


def test_a_mistake_is_told_and_ends_all_processes(stack: Path, tmp_path: Path) -> None:
    words = command("backproject", stack, tmp_path / "out")
    words[1] = str(stack / "missing.mrcs")
    done = run(words, 2)
    assert done.returncode != 0 and "missing.mrcs" in done.stderr
    assert not (tmp_path / "out").exists()
