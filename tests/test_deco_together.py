"""deco-classify with poses that are searched for, in two processes: the poses, losses and latents of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from forked import together
from hype_toy import blob_particles, blobs

from cryosuite.data.workdir import RunDir
from cryosuite.formats.pickles import read_latent, read_poses, write_pickle
from cryosuite.formats.stacks import StackWriter
from cryosuite.kernels.rotations import geodesic_deg
from cryosuite.methods import deco_start
from cryosuite.reconstruct import abinitio, abinitio_restarts
from cryosuite.reconstruct.abinitio import AbInitioOptions
from cryosuite.reconstruct.abinitio_starts import ONE
from cryosuite.training.checkpoint import load_state
from cryosuite.training.logs import read_metrics

pytestmark = pytest.mark.slow
N, D = 110, 16  # the last batch is short
NETWORK = ["--encoder", "random", "--encoder-size", "micro", "--zdim", 4, "--dim", 32, "--layers", 1, "--features", 16,
           "--precision", 32, "-n", 2, "-b", 32, "-k", 2, "--cluster", "gmm-direct", "--log-interval", 1,
           "--accelerator", "cpu"]  # fmt: skip
WAYS = {
    "searched again": "--refine-poses --re-search 1 --hold-poses 0",
    "searched again in cached volumes": "--refine-poses --re-search 1 --search cached --cached-volumes 8",
    "network": "--ab-initio --start network --warmup-images 40 --hps-epochs 1",
    "network, cached volumes": "--ab-initio --start network --warmup-images 40 --hps-epochs 1 --search cached "
    "--cached-volumes 8",
    "voxel": "--ab-initio --starts 2 --classes 1",
    "voxel, two maps": "--ab-initio --starts 1 --classes 2",
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Path:
    """particles.mrcs with poses.pkl and ctf.pkl: two molecules in turn."""
    folder = tmp_path_factory.mktemp("stack")
    particles, _ = blob_particles([blobs(D, 3, 8), blobs(D, 11, 3)], N, noise=0.3)
    with StackWriter(folder / "particles.mrcs", N, D, 6.0) as writer:
        writer.write(particles.read(np.arange(N)))
    write_pickle(folder / "poses.pkl", (particles.rotation, particles.shift))
    write_pickle(folder / "ctf.pkl", particles.ctf)
    return folder


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A voxel start of seconds in which every process has images to search for, some more than others."""

    def options(options, seed):
        return AbInitioOptions(
            classes=options.classes, starts=options.starts, iterations=4, batch=40, settle=2, radius=(2, 3),
            rounds=((4, True), (6, False)), seed=seed,
        )  # fmt: skip

    monkeypatch.setattr(deco_start, "options_of", options)
    monkeypatch.setattr(abinitio, "CHUNK", 24)  # 4.6 of them
    monkeypatch.setattr(abinitio, "REPEATS", 2)
    for name, value in (("STARTS", 1), ("FEWEST", 20)):
        monkeypatch.setattr(abinitio_restarts, name, value)
    for name, value in (("iterations", 2), ("settle", 1), ("batch", 40), ("radius", (2, 3))):
        monkeypatch.setitem(ONE, name, value)


def words(stack: Path, *more: object) -> list[object]:
    posed = [stack / "particles.mrcs", "--poses", stack / "poses.pkl", "--ctf", stack / "ctf.pkl"]
    return ["deco-classify", *posed, *NETWORK, *more]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_find_what_one_finds(way: str, stack: Path, tmp_path: Path) -> None:
    runs = [RunDir(tmp_path / name) for name in ("one", "two")]
    for count, run in enumerate(runs, 1):
        ended = together(tmp_path / f"said{count}", [*words(stack, *WAYS[way].split()), "-o", run.path], count)
        assert all(one.code == 0 for one in ended), ended[-1].err
        # but for what torch itself says in every process
        assert count == 1 or not ended[1].out and not [x for x in ended[1].err.splitlines() if "reducer.cpp" not in x]
    one, two = (read_metrics(run.metrics) for run in runs)
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    (R, t), (R2, t2) = (read_poses(run.poses(2)) for run in runs)
    apart = geodesic_deg(torch.from_numpy(R), torch.from_numpy(R2))
    assert float(apart.quantile(0.98)) < 0.1 and np.median(np.abs(t - t2)) < 1e-4
    if way.startswith("searched"):
        known = read_poses(stack / "poses.pkl")[0]
        moved = geodesic_deg(torch.from_numpy(R), torch.from_numpy(known)) > 5
        assert 4 <= int(moved.sum()) < N // 2  # 5 % of each batch of 32 are two
    z, other = (read_latent(run.z(2))[0] for run in runs)
    np.testing.assert_allclose(z, other, rtol=1e-3, atol=2e-3 * np.abs(z).max())
    assert np.abs(z - z[::-1]).max() > 0.05 * np.abs(z).max()


def test_a_start_goes_on_with_another_number_of_processes(stack: Path, tmp_path: Path) -> None:
    """Stopped in its start by two processes, gone on with by one: the poses of one."""
    start = words(stack, *WAYS["voxel"].split())
    (alone,) = together(tmp_path / "said", [*start, "-o", tmp_path / "one"], 1)
    assert alone.code == 0, alone.err
    stopped = together(tmp_path / "said", [*start, "-o", tmp_path / "two", "--max-minutes", "0.002"])
    assert {one.code for one in stopped} == {stopped[0].code} and "max_minutes" in stopped[0].err
    run = RunDir(tmp_path / "two")
    assert run.start.exists() and not run.checkpoint.exists()
    assert not load_state(run.start, "a start")["done"]
    resumed = together(tmp_path / "said", ["deco-classify", stack / "particles.mrcs", "-o", run.path, "--resume"], 1)
    assert resumed[0].code == 0, resumed[0].err
    first, second = (load_state(RunDir(tmp_path / name).start, "a start")["state"]["poses"] for name in ("one", "two"))
    apart = geodesic_deg(first["rotation"][:, 0], second["rotation"][:, 0])
    assert float(apart.quantile(0.98)) < 0.1


def test_a_mistake_of_one_process_ends_both(stack: Path, tmp_path: Path, monkeypatch) -> None:
    """The second process cannot read one of the images any more; one message, no process waits for ever."""
    from cryosuite.data.particles import ParticleSet
    from cryosuite.errors import InputError
    from cryosuite.ranks import process_rank

    whole = ParticleSet.read

    def read(particles: ParticleSet, rows: np.ndarray) -> np.ndarray:
        if process_rank() == 1 and len(np.atleast_1d(rows)) < N and N - 40 in np.atleast_1d(rows):
            raise InputError("particles.mrcs: the file became shorter while it was read")
        return whole(particles, rows)

    monkeypatch.setattr(ParticleSet, "read", read)
    ended = together(tmp_path / "said", [*words(stack, *WAYS["voxel"].split()), "-o", tmp_path / "out"], seconds=120)
    assert all(one.code != 0 for one in ended) and 2 in {one.code for one in ended}
    said = "".join(one.err for one in ended)
    assert said.count("became shorter") == 1 and "Traceback" not in said, said
