"""``cryosuite train-kraqen``: from a mixture to codes, maps and tables; networks; resume; bad days."""

from __future__ import annotations

import csv
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import reconstruct_toy as toy
from forked import together

from cryosuite.cli import main
from cryosuite.data.open import open_run_particles
from cryosuite.data.workdir import RunDir
from cryosuite.formats.mrc import read_map
from cryosuite.formats.pickles import write_pickle
from cryosuite.formats.stacks import StackWriter
from cryosuite.methods import load_run
from cryosuite.methods.kraqen_options import KraqenOptions, preset
from cryosuite.reconstruct.weights import ClassWeights
from cryosuite.training.logs import read_metrics

N, D = 240, 24
SHAPES = (toy.CENTRES * 0.7, -toy.CENTRES[:, [1, 0, 2]] * 0.7, toy.CENTRES[:, [2, 0, 1]] * [0.7, -0.7, 0.7])
QUICK = ["--n-codes", 5, "-i", 8, "--threads", 1]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of a command, as the shell sees it."""
    monkeypatch.setattr(sys, "argv", ["cryosuite", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """Three molecules, 80 images each, shuffled, as cryoDRGN writes them; true labels beside."""
    folder = tmp_path_factory.mktemp("mixture")
    sets = [toy.particles(N // 3, D, 0.7, seed, 1.0, centres=c) for seed, c in enumerate(SHAPES)]
    order = np.random.default_rng(0).permutation(N)
    images = np.concatenate([s.read(np.arange(len(s))) for s in sets])[order]
    with StackWriter(folder / "p.mrcs", N, D, toy.PIXEL) as out:
        out.write(images)
    rotation, shift, ctf = (np.concatenate([getattr(s, n) for s in sets])[order] for n in ("rotation", "shift", "ctf"))
    write_pickle(folder / "poses.pkl", (rotation, shift))
    write_pickle(folder / "ctf.pkl", ctf)
    write_pickle(folder / "labels.pkl", np.repeat([0, 1, 2], N // 3)[order])
    return folder


def given(folder: Path) -> list[object]:
    return [folder / "p.mrcs", "--poses", folder / "poses.pkl", "--ctf", folder / "ctf.pkl"]


def test_a_mixture_is_sorted_and_written(mixture, tmp_path, capsys, monkeypatch):
    from sklearn.metrics import adjusted_rand_score

    out = RunDir(tmp_path / "run")
    assert run(monkeypatch, "train-kraqen", *given(mixture), "-o", out.path, *QUICK) == 0
    assert "next: cryosuite polish" in capsys.readouterr().err
    truth = pickle.loads((mixture / "labels.pkl").read_bytes())
    labels = pickle.loads(out.labels(8).read_bytes())
    assert adjusted_rand_score(truth, labels) > 0.8
    p = ClassWeights.from_arrays(pickle.loads(out.shares(8).read_bytes()))
    np.testing.assert_array_equal(p.labels(), labels)
    np.testing.assert_allclose(p.dense().sum(1), 1, atol=1e-4)
    rows = list(csv.DictReader(out.occupancy(8).open()))
    assert len(rows) == p.n_classes and sum(int(row["labelled"]) for row in rows) == N
    # the map of a code is the molecule that most of its particles show, with the right grey values
    for k in range(p.n_classes):
        members = truth[labels == k]
        if len(members) < 40:
            continue
        true = toy.volume(D, SHAPES[np.bincount(members).argmax()]).numpy()
        assert np.corrcoef(read_map(out.volume(k)).data.ravel(), true.ravel())[0, 1] > 0.9


def test_the_run_is_opened_like_any_other(mixture, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert run(monkeypatch, "train-kraqen", *given(mixture), "-o", out, *QUICK) == 0
    loaded = load_run(out)
    assert loaded.name == "kraqen" and loaded.z.shape[0] == N and np.isfinite(loaded.z).all()
    p = ClassWeights.from_arrays(pickle.loads(RunDir(out).shares(8).read_bytes()))
    maps = np.stack([read_map(RunDir(out).volume(k)).data for k in range(p.n_classes)])
    np.testing.assert_allclose(loaded.decode(loaded.z[:3]), np.tensordot(p.rows([0, 1, 2]).dense(), maps, 1), atol=1e-5)
    assert run(monkeypatch, "polish", out, "--passes", 0, "--threads", 1, "--datadir", mixture) == 0
    assert (out / "polish.8" / "vol_000.mrc").exists()
    quick = ["--skip-umap", "--skip-vol", "--ksample", 3, "--pc", 1, "--gmm", 3, "--polish", "--flip"]
    assert run(monkeypatch, "analyze", out, *quick) == 0
    assert RunDir(out).analysis(8).path.joinpath("polish", "vol_002.mrc").exists()
    said = " ".join(capsys.readouterr().err.split())
    assert "not the polished maps" in said and f"cryosuite polish {out}" in said
    # its maps are backprojections of the same images: nothing for --mode prior
    assert run(monkeypatch, "polish", out, "--mode", "prior", "-o", tmp_path / "prior") == 2
    assert not (tmp_path / "prior").exists()
    words = ["--labels", RunDir(out).labels(8), "--cluster", 0, "-o", tmp_path / "c.pkl"]
    assert run(monkeypatch, "export", out, *words) == 0
    labels = pickle.loads(RunDir(out).labels(8).read_bytes())
    np.testing.assert_array_equal(pickle.loads((tmp_path / "c.pkl").read_bytes()), np.flatnonzero(labels == 0))


def test_resume_gives_the_same_run_and_a_run_is_not_overwritten(mixture, tmp_path, capsys, monkeypatch):
    one = tmp_path / "one"
    assert run(monkeypatch, "train-kraqen", *given(mixture), "-o", one, *QUICK) == 0
    before = {name: (one / name).read_bytes() for name in ("labels.8.pkl", "vol_000.mrc", "z.8.pkl")}
    assert run(monkeypatch, "train-kraqen", *given(mixture), "-o", one, *QUICK) == 2
    assert "--overwrite" in capsys.readouterr().err
    for name in before:
        (one / name).unlink()
    assert run(monkeypatch, "train-kraqen", *given(mixture), "-o", one, "--resume", "--threads", 1) == 0
    for name, contents in before.items():
        after = (one / name).read_bytes()
        assert after == contents or name.endswith(".mrc") and after[1024:] == contents[1024:], name


@pytest.mark.slow
@pytest.mark.parametrize("field", ["triplane", "fourier"])
def test_network_fields_end_in_maps_too(mixture, tmp_path, monkeypatch, field):
    out = RunDir(tmp_path / "run")
    more = ["--field", field, "--n-codes", 5, "--rank", 5, "-n", 15, "-b", 20, "--em-finish", 4, "--threads", 1]
    assert run(monkeypatch, "train-kraqen", *given(mixture), "-o", out.path, *more) == 0
    loaded = load_run(out.path)
    assert loaded.z.shape == (N, 5)
    volumes = loaded.decode(loaded.z[:2])
    assert volumes.shape == (2, D, D, D) and np.isfinite(volumes).all()
    best = 0.0
    for true in (toy.volume(D, shape).numpy().ravel() for shape in SHAPES):
        found = [np.corrcoef(read_map(out.volume(0)).data.ravel(), true)[0, 1]]
        best = max(best, *found)
    assert best > 0.8


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--field", "wavelet"], "--field wavelet"),
        (["--t-min", 2, "--t-max", 1], "--t-min 2"),
        (["--preset", "huge"], "--preset huge"),
        (["--ctf", "missing.pkl"], "missing.pkl"),
        (["--n-codes", 0], "--n-codes 0"),
        (["--n-states", -3], "--n-states -3"),
        (["-i", 0], "--iterations 0"),
        (["--cluster-box", 9], "--cluster-box 9"),
        (["--seed", -1], "--seed -1"),
        (["--field", "triplane", "--layers", 0], "--layers 0"),
        (["--field", "triplane", "--lr", 0], "--lr 0"),
    ],
)
def test_bad_days(mixture, tmp_path, capsys, monkeypatch, extra, message):
    out = tmp_path / "run"
    assert run(monkeypatch, "train-kraqen", *given(mixture), "-o", out, *extra) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_a_refused_start_leaves_the_run_that_is_there(mixture, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text("method: kraqen\n")
    words = [*given(mixture), "-o", out, "--overwrite", "--cluster-box", 4]
    assert run(monkeypatch, "train-kraqen", *words) == 2
    assert "--cluster-box 4" in capsys.readouterr().err
    assert (out / "config.yaml").read_text() == "method: kraqen\n"


def test_options_that_change_nothing_are_named(mixture, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    idle = ["--lr", 1e-3, "--precision", 32, "--kernel", "gaussian", "--width", 64, "--march", 0.3]
    assert run(monkeypatch, "train-kraqen", *given(mixture), "-o", out, "-k", 2, "-i", 1, *idle) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "--kernel: no effect with --assign likelihood" in said and "--march: no effect with --m-step local" in said
    assert (
        all(f"{name}" in said for name in ("--lr", "--precision", "--width")) and "no effect with --field voxel" in said
    )
    assert (
        run(monkeypatch, "train-kraqen", mixture / "p.mrcs", "-o", out, "--resume", "-k", 9, "-n", 9, "--Apix", 2) == 0
    )
    said = " ".join(capsys.readouterr().err.split())
    assert "--Apix, --n-codes: not used" in said and "--num-epochs: no effect with --field voxel" in said


@pytest.mark.slow
def test_a_folder_that_the_first_process_refuses_ends_all(mixture, tmp_path):
    """Under srun nobody ends a process that waits for the first one."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("method: kraqen\n")
    words = ["train-kraqen", *given(mixture), "-o", tmp_path / "run", *QUICK, "--accelerator", "cpu"]
    found = together(tmp_path / "said", words, ended=False)
    assert [one.code for one in found] == [2, 2]
    assert "holds a run already" in found[0].err and "Traceback" not in found[1].err


@pytest.mark.slow
def test_a_killed_process_is_replaced_and_the_run_comes_to_the_same_end(mixture, tmp_path):
    """torchrun --max-restarts: kill -9 of the second of two processes; what was done before is not done again."""
    words = [*given(mixture), "--n-codes", 5, "-i", 16, "--accelerator", "cpu"]
    (alone,) = together(tmp_path / "said", ["train-kraqen", *words, "-o", tmp_path / "one"], 1)
    assert alone.code == 0, alone.err
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    command = [*start, f"--master-port={port}", "-m", "cryosuite", "train-kraqen", *words, "-o", tmp_path / "two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([str(word) for word in command], env=environment, stderr=subprocess.PIPE, text=True)
    one, two = RunDir(tmp_path / "one"), RunDir(tmp_path / "two")
    while len(read_metrics(two.metrics)) < 3 and process.poll() is None:
        time.sleep(0.02)
    done = read_metrics(two.metrics)[:2]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said[-2000:]
    lines = [read_metrics(run.metrics) for run in (one, two)]
    assert [line["step"] for line in lines[1]] == [line["step"] for line in lines[0]]
    assert lines[1][:2] == done, "with their times"
    np.testing.assert_allclose(*([line["loss"] for line in part] for part in lines), rtol=1e-4)
    np.testing.assert_array_equal(*(pickle.loads(run.labels(16).read_bytes()) for run in (one, two)))


def test_a_run_that_was_stopped_says_how_to_go_on(mixture, tmp_path, capsys, monkeypatch):
    words = [*given(mixture), "-o", tmp_path / "run", *QUICK, "--max-minutes", 1e-6]
    assert run(monkeypatch, "train-kraqen", *words) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "max_minutes" in said and "--resume" in said
    assert not list((tmp_path / "run").glob("z.*.pkl"))
    assert run(monkeypatch, "train-kraqen", mixture / "p.mrcs", "-o", tmp_path / "run", "--resume") == 0
    assert list((tmp_path / "run").glob("z.*.pkl"))  # the limit was of the first call


def test_missing_poses_are_named(mixture, tmp_path, capsys, monkeypatch):
    words = [mixture / "p.mrcs", "--ctf", mixture / "ctf.pkl", "-o", tmp_path / "run"]
    assert run(monkeypatch, "train-kraqen", *words) == 2
    assert "poses" in capsys.readouterr().err


def test_one_image_and_more_codes_than_images(mixture, tmp_path, capsys, monkeypatch):
    write_pickle(tmp_path / "one.pkl", np.array([3]))
    out = RunDir(tmp_path / "run")
    words = [*given(mixture), "--ind", tmp_path / "one.pkl", "-o", out.path, "--n-codes", 4, "-i", 4]
    assert run(monkeypatch, "train-kraqen", *words) == 0
    assert "1 codes are used" in " ".join(capsys.readouterr().err.split())
    assert out.volume(0).exists() and not out.volume(1).exists()


def test_presets_reach_every_row_of_the_papers_ablation():
    paper = preset("paper", 128)[1].options
    assert (paper.field, paper.assign, paper.kernel, paper.beta, paper.plane_size) == (
        "triplane", "kernel", "epanechnikov", 0.05, 64,
    )  # fmt: skip
    rows = {
        "no triplet": {"beta": 0.0}, "cold": {"t_max": 1.3}, "hot": {"t_min": 13.0}, "gaussian": {"kernel": "gaussian"},
        "no kernel": {"kernel": "none"}, "voxel": {"field": "voxel"}, "fourier": {"field": "fourier", "features": 64},
    }  # fmt: skip
    for changes in rows.values():
        assert preset("paper", 128, **changes)[1].options == paper.changed(**changes)
    assert KraqenOptions(n_states=16).codes == 24 and KraqenOptions().codes == 32
    assert preset("auto")[0] == "compositional" and preset("auto")[1].options.field == "voxel"
    assert preset("conformational")[1].options.rank == 8


def test_a_run_has_the_shifts_it_refined(tmp_path, capsys, monkeypatch):
    """poses.pkl holds them, the run is opened with them, and `polish --half-sets` goes back to those it was given."""
    particles = toy.particles(N, D, 0.7, 0, 1.0, centres=SHAPES[0])
    with StackWriter(tmp_path / "p.mrcs", N, D, toy.PIXEL) as out:
        out.write(particles.read(np.arange(N)))
    wrong = particles.shift + np.random.default_rng(0).normal(0, 0.7 / D, (N, 2)).astype(np.float32)
    write_pickle(tmp_path / "poses.pkl", (particles.rotation, wrong.astype(np.float32)))
    write_pickle(tmp_path / "ctf.pkl", particles.ctf)
    made = RunDir(tmp_path / "run")
    options = ["--n-codes", 2, "-i", 3, "--threads", 1]
    assert run(monkeypatch, "train-kraqen", *given(tmp_path), "-o", made.path, *options) == 0
    assert "they were refined" in capsys.readouterr().err
    shift = pickle.loads(made.poses(3).read_bytes())[1]
    assert (shift - particles.shift).std() < 0.5 * 0.7 / D
    assert np.array_equal(load_run(made.path).particles.shift, shift)
    assert np.array_equal(open_run_particles(made).shift, shift)
    assert run(monkeypatch, "polish", made.path, "--half-sets", "-o", tmp_path / "apart", "--threads", 1) == 0
    assert "go back to the shifts they came with" in capsys.readouterr().err
    net = RunDir(tmp_path / "net")
    small = ["--field", "triplane", "--channels", 4, "--features", 8, "--width", 8, "--layers", 1, "-n", 1]
    assert run(monkeypatch, "train-kraqen", *given(tmp_path), "-o", net.path, *options[:2], *small) == 0
    begun, ended = (pickle.loads(net.poses(epoch).read_bytes())[1] for epoch in (0, 1))
    assert np.array_equal(begun, ended) and (ended - particles.shift).std() < 0.5 * 0.7 / D
    assert np.array_equal(load_run(net.path).particles.shift, ended)
    assert run(monkeypatch, "train-kraqen", *given(tmp_path), "-o", tmp_path / "b", *options, "--no-refine-shifts") == 0
    assert np.array_equal(pickle.loads(RunDir(tmp_path / "b").poses(3).read_bytes())[1], wrong)
