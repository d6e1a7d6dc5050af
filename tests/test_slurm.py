"""Trainings under a real SLURM on this machine (`make test-slurm`): pre-empted, put back, and the same in the end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hype_toy import blob_particles, blobs
from slurm_toy import Cluster, available, wait_for

from cryosuite.data.workdir import RunDir
from cryosuite.formats.pickles import read_latent, write_pickle
from cryosuite.formats.stacks import StackWriter

pytestmark = pytest.mark.slurm
EPOCHS, BATCH, COUNT = 12, 16, 480
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """SLURM of this machine."""
    if not available():
        pytest.skip("SLURM IS NOT TESTED: needs root and Debian's packages slurm-wlm and munge (`make test-slurm`)")
    with Cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Path:
    """particles.mrcs, poses.pkl and ctf.pkl."""
    folder = tmp_path_factory.mktemp("stack")
    particles, _ = blob_particles([blobs(16, 0), blobs(16, 1)], COUNT, noise=0.3)
    with StackWriter(folder / "particles.mrcs", COUNT, 16, 6.0) as writer:
        writer.write(particles.read(np.arange(COUNT)))
    write_pickle(folder / "poses.pkl", (particles.rotation, particles.shift))
    write_pickle(folder / "ctf.pkl", particles.ctf)
    return folder


def command(stack: Path, run: Path) -> list[str]:
    """A small training, in words."""
    small = {"dim": 16, "depth": 1, "heads": 2, "patch": 4, "groups": 2, "inr-dim": 16, "inr-layers": 2, "knn": 4}
    how = {"poses": stack / "poses.pkl", "ctf": stack / "ctf.pkl", "batch-size": BATCH, "num-epochs": EPOCHS,
           "log-interval": 1, "precision": 32, "accelerator": "cpu"} | small  # fmt: skip
    options = [word for name, value in how.items() for word in (f"--{name}", str(value))]
    return ["train-hype", str(stack / "particles.mrcs"), "-o", str(run), *options]


def script(words: list[str], log: Path, *more: str) -> str:
    """What `cryosuite slurm` prints for it."""
    ask = ["slurm", "--gpus", "0", "--cpus", "1", "--mem", "1G", "--time", "0:20:00", "--log", str(log), *more]
    done = subprocess.run([sys.executable, "-m", "cryosuite", *ask, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def latents(run: Path) -> np.ndarray:
    """The latents after the last epoch."""
    return read_latent(RunDir(run).z(EPOCHS))[0]


@pytest.fixture(scope="module")
def undisturbed(stack) -> Path:
    """The same training, outside of SLURM and in one go."""
    run = stack / "undisturbed"
    done = subprocess.run([sys.executable, "-m", "cryosuite", *command(stack, run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return run


def steps(run: Path) -> list[int]:
    """The steps that metrics.jsonl tells of."""
    path = RunDir(run).metrics
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def losses(run: Path) -> list[float]:
    """The loss as metrics.jsonl tells it."""
    return [json.loads(line)["loss"] for line in RunDir(run).metrics.read_text().splitlines()]


def test_a_preempted_job_ends_where_an_undisturbed_one_does(cluster, stack, undisturbed, tmp_path):
    run, log = tmp_path / "run", tmp_path / "job.log"
    job = cluster.submit(script(command(stack, run), log))
    total = EPOCHS * COUNT // BATCH
    wait_for(lambda: any(step > total // 6 for step in steps(run)), 120, f"the first steps: {cluster.logs()}")
    assert cluster.ask("scontrol", "requeue", job) == ""
    wait_for(lambda: cluster.state(job) == "PENDING", 60, "the job to be back in the queue")
    assert max(steps(run)) < total, "it was over before it could be pre-empted"
    saved = RunDir(run).checkpoint.stat().st_mtime
    cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for(lambda: cluster.state(job) in OVER, 240, "the job to end")
    said = log.read_text()
    assert cluster.state(job) == "COMPLETED", said
    assert "Restarts=1" in cluster.ask("scontrol", "show", "job", job)
    assert RunDir(run).checkpoint.stat().st_mtime > saved
    assert "going on at step" in RunDir(run).log.read_text()
    assert np.array_equal(latents(run), latents(undisturbed))
    assert steps(run) == steps(undisturbed)


def test_two_processes_of_srun_train_one_model(cluster, stack, undisturbed, tmp_path):
    run, log = tmp_path / "run", tmp_path / "job.log"
    job = cluster.submit(script(command(stack, run), log, "--sbatch=--ntasks-per-node=2", "--no-requeue"))
    wait_for(lambda: cluster.state(job) in OVER, 300, "the job to end")
    assert cluster.state(job) == "COMPLETED", log.read_text()
    assert "2 process(es)" in RunDir(run).log.read_text()
    one, two = losses(undisturbed), losses(run)
    first = COUNT // BATCH  # steps of an epoch; later on sums in another order grow into different rounding
    assert len(one) == len(two) and np.allclose(one[:first], two[:first], rtol=1e-4)
    assert abs(one[-1] - two[-1]) < 0.01 * one[-1]
    assert np.corrcoef(latents(undisturbed)[:, 0], latents(run)[:, 0])[0, 1] > 0.99


def test_a_mistake_ends_the_job_with_code_2_and_one_sentence(cluster, stack, tmp_path):
    log = tmp_path / "job.log"
    words = command(stack, tmp_path / "run")
    words[1] = str(stack / "missing.mrcs")
    job = cluster.submit(script(words, log))
    wait_for(lambda: cluster.state(job) in OVER, 120, "the job to end")
    assert cluster.state(job) == "FAILED" and "ExitCode=2:0" in cluster.ask("scontrol", "show", "job", job)
    assert "missing.mrcs" in log.read_text() and "Traceback" not in log.read_text()
