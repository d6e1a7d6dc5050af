"""Commands that share their images among processes (torchrun, gloo) write what one process writes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forked import one_and_two, together
from hype_toy import blob_particles, blobs
from test_commands_train_fastar import TINY
from test_methods_iev import SMALL

from cryosuite.data import preprocess
from cryosuite.data.encoder_weights import save_encoder
from cryosuite.data.multiview_weights import save_multiview
from cryosuite.data.workdir import RunDir
from cryosuite.formats.mrc import read_map, write_map
from cryosuite.formats.pickles import read_latent, read_poses, write_pickle
from cryosuite.formats.stacks import StackWriter
from cryosuite.kernels.rotations import geodesic_deg
from cryosuite.nets.ief import IefEncoder
from cryosuite.nets.multiview import Multiview

pytestmark = pytest.mark.slow
COUNT, BOX = 301, 16  # odd: the processes get different numbers of images


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Path:
    """particles.mrcs, poses.pkl, ctf.pkl, ref.mrc, and labels.pkl with a class that lies in one process's part only."""
    folder = tmp_path_factory.mktemp("stack")
    particles, labels = blob_particles([blobs(BOX, 0), blobs(BOX, 1)], COUNT, noise=0.3)
    with StackWriter(folder / "particles.mrcs", COUNT, BOX, 6.0) as writer:
        writer.write(particles.read(np.arange(COUNT)))
    write_pickle(folder / "poses.pkl", (particles.rotation, particles.shift))
    write_pickle(folder / "ctf.pkl", particles.ctf)
    labels = labels.astype(np.int64)
    labels[:40] = 2
    write_pickle(folder / "labels.pkl", labels)
    write_map(folder / "ref.mrc", blobs(BOX, 0).numpy(), 6.0)
    return folder


def command(name: str, stack: Path, out: Path) -> list[str]:
    """The words of a command of ours."""
    files = {"--poses": stack / "poses.pkl", "--ctf": stack / "ctf.pkl", "--labels": stack / "labels.pkl", "-o": out}
    return [name, str(stack / "particles.mrcs"), *[str(word) for pair in files.items() for word in pair]]


def torchrun(words: list[str], processes: int) -> subprocess.CompletedProcess:
    """cryosuite in so many processes of the real torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*start, "-m", "cryosuite", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize("name", ["backproject", "polish"])
def test_two_processes_make_the_same_maps(name: str, stack: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    (alone,) = together(tmp_path / "said", command(name, stack, one), 1)
    assert alone.code == 0, alone.err
    done = torchrun(command(name, stack, two), 2)
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


def test_preprocess_writes_the_same_bytes(stack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 37 images, and images left out in both parts: the second part is moved up to the first."""
    monkeypatch.setattr(preprocess, "CHUNK_BYTES", 4 * 37 * BOX**2)
    images = np.fromfile(stack / "particles.mrcs", np.float32, offset=1024).reshape(COUNT, BOX, BOX)
    images[[3, 40, 200, 300], 2, 2] = np.nan
    images[77] = 1
    bad = tmp_path / "bad.mrcs"
    bad.write_bytes((stack / "particles.mrcs").read_bytes()[:1024] + images.tobytes())
    words = ["preprocess", bad, "--poses", stack / "poses.pkl", "--ctf", stack / "ctf.pkl", "-D", 12, "--uninvert"]
    one, two = one_and_two(tmp_path, words)
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir()) and "particles.mrcs" in names
    for name in names:
        a, b = (folder / name for folder in (one, two))
        assert a.read_bytes().replace(b"two", b"one") == b.read_bytes().replace(b"two", b"one"), name
    assert (one / "particles.mrcs").stat().st_size == 1024 + 297 * 12 * 12 * 4
    said = (tmp_path / "said_two" / "err0").read_text()
    assert said.count("3, 40, 200, 300") == 1 and said.count("no variation") == 1


def test_features_come_in_the_same_order(stack: Path, tmp_path: Path) -> None:
    encoder = IefEncoder(SMALL).eval()
    save_encoder(tmp_path / "e.safetensors", encoder, "standard", 0.5, 0.15, {})
    words = ["pretrain-iev", stack / "particles.mrcs", "--encode", "--weights", tmp_path / "e.safetensors", "-b", 32]
    runs = one_and_two(tmp_path, [*words, "--accelerator", "cpu"])
    z, other = (read_latent(RunDir(run).z(1))[0] for run in runs)
    assert z.shape == other.shape == (COUNT, SMALL.dim)
    np.testing.assert_array_equal(z, other)
    look = ["analyze", runs[1], "--ksample", 3, "--gmm", 2, "--skip-umap", "--no-report"]
    first, second = together(tmp_path / "said", look)
    assert first.code == second.code == 0 and "works in one process" in first.err and not second.out + second.err


def test_poses_are_predicted_and_refined_alike(stack: Path, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    save_multiview(tmp_path / "w.safetensors", Multiview(TINY), {"mode": "target"})
    words = ["fastar-infer", stack / "particles.mrcs", "--ctf", stack / "ctf.pkl", "--map", stack / "ref.mrc"]
    words += ["--weights", tmp_path / "w.safetensors", "-b", 16, "--refine", 1, "--accelerator", "cpu"]
    write_pickle(tmp_path / "some.pkl", np.arange(0, COUNT, 4))
    words += ["--ind", tmp_path / "some.pkl"]
    one, two = one_and_two(tmp_path, words)
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    np.testing.assert_allclose(np.load(one / "confidence.npy"), np.load(two / "confidence.npy"), atol=1e-5)
    (R, t), (R2, t2) = (read_poses(folder / "poses.pkl") for folder in (one, two))
    apart = geodesic_deg(torch.from_numpy(R), torch.from_numpy(R2)).numpy()
    assert (apart < 0.1).mean() > 0.97 and np.median(np.abs(t - t2)) < 1e-5
    a, b = (read_map(folder / "map.mrc").data for folder in (one, two))
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.999
    assert json.loads((two / "timing.json").read_text())


def test_a_mistake_is_told_once_and_ends_all_processes(stack: Path, tmp_path: Path) -> None:
    words = command("backproject", stack, tmp_path / "out")
    words[1] = str(stack / "missing.mrcs")
    ended = together(tmp_path / "said", words)
    assert ended[0].code == 2 and ended[1].code != 0
    assert "".join(one.err for one in ended).count("missing.mrcs") == 1
    assert not (tmp_path / "out").exists()
    done = torchrun(words, 2)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and "exitcode  : 2" in done.stderr


@pytest.mark.parametrize("name", ["preprocess", "train-hype", "backproject"])
def test_a_mistake_of_one_process_ends_all(name: str, stack: Path, tmp_path: Path, monkeypatch) -> None:
    """The second process alone cannot read an image: preprocess agrees on it, the others end where they wait for it."""
    from cryosuite.data.particles import ParticleSet
    from cryosuite.errors import InputError
    from cryosuite.ranks import process_rank

    whole = ParticleSet.read

    def read(particles: ParticleSet, rows: np.ndarray) -> np.ndarray:
        if process_rank() == 1 and COUNT - 10 in rows:
            raise InputError("particles.mrcs: the file became shorter while it was read")
        return whole(particles, rows)

    monkeypatch.setattr(ParticleSet, "read", read)
    out = tmp_path / "out"
    words = command(name, stack, out)
    if name != "backproject":
        words = [word for word in words if word not in ("--labels", str(stack / "labels.pkl"))]
    if name == "train-hype":
        words += ["--dim", "16", "--depth", "1", "--heads", "2", "--patch", "4", "-n", "2", "--accelerator", "cpu"]
    ended = together(tmp_path / "said", words)
    assert all(one.code != 0 for one in ended) and 2 in {one.code for one in ended}
    said = "".join(one.err for one in ended)
    assert said.count("became shorter") == 1 and "Traceback" not in said, said
    assert not list(out.glob(".particles*")) and not (out / "dataset.yaml").exists()
