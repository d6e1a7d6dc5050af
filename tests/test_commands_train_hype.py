"""``cryosuite train-hype`` as a user runs it: files, messages, resume, and opening the run again."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from hype_toy import blob_particles, blobs

from cryosuite.cli import main
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, UserNotice
from cryosuite.formats.pickles import read_latent, read_poses, write_pickle
from cryosuite.formats.stacks import StackWriter
from cryosuite.methods import load_run

SMALL = {"dim": 16, "depth": 1, "heads": 2, "patch": 4, "groups": 2, "inr-dim": 16, "inr-layers": 2, "knn": 4}


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """particles.mrcs, poses.pkl, ctf.pkl, ind.pkl: cryoDRGN's form."""
    folder = tmp_path_factory.mktemp("stack")
    particles, _ = blob_particles([blobs(16, 0), blobs(16, 1)], 48, noise=0.3)
    with StackWriter(folder / "particles.mrcs", 48, 16, 6.0) as writer:
        writer.write(particles.read(np.arange(48)))
    write_pickle(folder / "poses.pkl", (particles.rotation, particles.shift))
    write_pickle(folder / "ctf.pkl", particles.ctf)
    write_pickle(folder / "ind.pkl", np.arange(0, 40, dtype=np.int64))
    return folder


def cryosuite(*arguments: object) -> SimpleNamespace:
    """The command line in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["cryosuite", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            main()
        code = 0
    except SystemExit as leave:
        code = leave.code or 0
    finally:
        sys.argv = argv
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def train(stack, out, *more: object) -> SimpleNamespace:
    ways = ["--poses", stack / "poses.pkl", "--ctf", stack / "ctf.pkl", "--ind", stack / "ind.pkl"]
    small = [word for name, value in SMALL.items() for word in (f"--{name}", value)]
    rest = ["-b", 16, "--precision", "32", *more]
    return cryosuite("train-hype", stack / "particles.mrcs", "-o", out, *ways, *small, *rest)


@pytest.fixture(scope="module")
def run(stack):
    out = stack / "run"
    done = train(stack, out, "-n", "2", "--checkpoint", "1")
    assert done.returncode == 0, done.stderr
    return out, done


def test_writes_what_it_promises(run, stack):
    out, done = run
    folder = RunDir(out)
    for epoch in (1, 2):
        z = read_latent(folder.z(epoch))[0]
        assert z.shape == (40, 64) and z.dtype == np.float32 and np.isfinite(z).all()
        assert folder.weights(epoch).exists() and folder.latent_space(epoch).exists()
    rotation, shift = read_poses(folder.poses(2), 40)
    assert np.allclose(rotation, read_poses(stack / "poses.pkl")[0][:40])
    assert shift.shape == (40, 2)
    config = yaml.safe_load(folder.config.read_text())
    assert config["method"] == "hype" and config["preset"] == "small" and config["options"]["groups"] == 2
    assert "loss" in json.loads(folder.metrics.read_text().splitlines()[0])
    assert "z.2.pkl" in done.stdout and "next: cryosuite analyze" in done.stderr
    assert "--preset small was chosen" in done.stderr and "Traceback" not in done.stderr


def test_a_run_opens_again_and_decodes(run):
    loaded = load_run(run[0])
    assert (loaded.name, loaded.epoch, loaded.box_size, loaded.pixel_size) == ("hype", 2, 16, 6.0)
    assert loaded.z.shape == (40, 64) and len(loaded.particles) == 40
    volumes = loaded.decode(loaded.z[:2])
    assert volumes.shape == (2, 16, 16, 16) and volumes.dtype == np.float32
    for source in ("image", "cluster", "bank"):
        other = load_run(run[0], 1, volume_from=source)
        assert np.isfinite(other.decode(other.z[0])).all()


def test_a_full_folder_is_refused_and_kept(run, stack):
    before = (run[0] / "z.2.pkl").read_bytes()
    again = train(stack, run[0])
    assert again.returncode == 2 and "--resume" in again.stderr and "--overwrite" in again.stderr
    assert (run[0] / "z.2.pkl").read_bytes() == before


def test_resume_needs_no_option_again(run, stack):
    done = cryosuite("train-hype", stack / "particles.mrcs", "-o", run[0], "--resume", "-n", 3, "--dim", 70)
    assert done.returncode == 0, done.stderr
    assert "--dim: not used" in done.stderr and "no GPU is used" not in done.stderr
    assert RunDir(run[0]).epochs() == [1, 2, 3]
    assert load_run(run[0]).z.shape == (40, 64)
    other = cryosuite("train-hype", stack, "-o", run[0], "--resume")
    assert other.returncode == 2 and "was begun with" in other.stderr


def test_volumes_come_from_the_bank_where_the_particles_are_gone(run, tmp_path):
    import shutil

    shutil.copytree(run[0], tmp_path / "run")
    expected = load_run(run[0], 2, volume_from="bank")
    config = RunDir(tmp_path / "run").config
    values = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(values | {"particles": "/no/where", "particles_relative": "no/where"}))
    with pytest.warns(UserNotice, match="particles cannot be opened .*token bank"):
        loaded = load_run(tmp_path / "run", 2)
    assert loaded.particles is None and (loaded.box_size, loaded.pixel_size) == (16, 6.0)
    assert np.array_equal(loaded.decode(loaded.z[:2]), expected.decode(expected.z[:2]))
    with pytest.raises(InputError, match="were they moved"):
        load_run(tmp_path / "run", 2, volume_from="knn")


def test_load_latest_of_cryodrgn_means_resume(run, stack):
    done = cryosuite("train-hype", stack / "particles.mrcs", "-o", run[0], "--load", "latest")
    assert done.returncode == 0 and "--resume" in done.stderr
    refused = cryosuite("train-hype", stack.parent / "unused", "-o", run[0], "--load", "weights.3.pkl")
    assert refused.returncode == 2 and "weights.3.pkl" in refused.stderr


def test_bad_input_is_one_line(stack, tmp_path):
    done = train(stack, tmp_path / "run", "--loss", "l1")
    assert done.returncode == 2 and "--loss l1: expected one of whitened, mse" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
    done = train(stack, tmp_path / "run", "--patch", "5", "--march", "1", "--march-over", "0.2")
    assert "--march-over: no effect with --march 1" in " ".join(done.stderr.split())
    assert done.returncode == 2 and "--patch 5: must divide" in done.stderr and not (tmp_path / "run").exists()


def test_missing_and_foreign_runs_are_refused(tmp_path):
    with pytest.raises(InputError, match="not a training run"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text("method: other\nparticles: x\noptions: {}\ntraining: {}\n")
    with pytest.raises(InputError, match="method 'other' is not known"):
        load_run(tmp_path)


def test_wrong_shifts_are_refined_first_and_kept_over_a_resume(tmp_path):
    """A single molecule, shifts off by .8 pixel: the run trains with better ones, from its first step to its last."""
    particles, _ = blob_particles([blobs(24, 1)], 200, noise=2.0, seed=4)
    with StackWriter(tmp_path / "particles.mrcs", 200, 24, 6.0) as out:
        out.write(particles.read(np.arange(200)))
    wrong = particles.shift + np.random.default_rng(0).normal(0, 0.8 / 24, (200, 2)).astype(np.float32)
    write_pickle(tmp_path / "poses.pkl", (particles.rotation, wrong.astype(np.float32)))
    write_pickle(tmp_path / "ctf.pkl", particles.ctf)
    given = [tmp_path / "particles.mrcs", "--poses", tmp_path / "poses.pkl", "--ctf", tmp_path / "ctf.pkl"]
    small = ["--dim", 32, "--depth", 1, "--inr-dim", 16, "--inr-layers", 1, "--checkpoint", 1]
    run = RunDir(tmp_path / "run")
    done = cryosuite("train-hype", *given, "-o", run.path, "-n", 1, *small)
    assert done.returncode == 0 and "they were refined" in done.stderr, done.stderr
    first = read_poses(run.poses(0))[1]
    assert (first - particles.shift).std() < 0.4 * 0.8 / 24
    done = cryosuite("train-hype", given[0], "-o", run.path, "--resume", "-n", 2)
    assert done.returncode == 0 and "they were refined" not in done.stderr, done.stderr
    assert np.array_equal(read_poses(run.poses(2))[1], first)
    assert np.array_equal(load_run(run.path).particles.shift, first)
    done = cryosuite("train-hype", *given, "-o", run.path, "-n", 1, *small, "--no-refine-shifts", "--overwrite")
    assert done.returncode == 0 and np.array_equal(read_poses(run.poses(1))[1], wrong.astype(np.float32))
    assert not run.poses(0).exists()
