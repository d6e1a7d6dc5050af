"""``cryosuite deco-classify``: with and without poses; resume; what opens its runs; bad days."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hype_toy import blob_particles, blobs

from cryosuite.cli import main
from cryosuite.data.open import open_particles
from cryosuite.data.results import run_clusters, run_polish
from cryosuite.data.workdir import RunDir
from cryosuite.formats.mrc import read_map
from cryosuite.formats.pickles import safe_load, write_pickle
from cryosuite.formats.stacks import StackWriter
from cryosuite.methods import load_run
from cryosuite.training.checkpoint import load_state

N, D = 160, 16
NETWORK = ["--encoder", "random", "--encoder-size", "micro", "--zdim", 4, "--dim", 32, "--layers", 1, "--features", 16,
           "--threads", 1, "--precision", 32]  # fmt: skip
QUICK = [*NETWORK, "-n", 2, "-b", 32, "-k", 2, "--cluster", "gmm-direct"]
START = ["--ab-initio", "--starts", 1, "--classes", 1]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of a command, as the shell sees it."""
    monkeypatch.setattr(sys, "argv", ["cryosuite", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def written(folder: Path, images: np.ndarray, particles) -> Path:
    """A set as cryoDRGN writes it, as a star file without poses as well."""
    with StackWriter(folder / "p.mrcs", len(images), D, 6.0) as out:
        out.write(images)
    write_pickle(folder / "poses.pkl", (particles.rotation, particles.shift))
    write_pickle(folder / "ctf.pkl", particles.ctf)
    rows = [f"{i + 1:06d}@p.mrcs {c[2]:.2f} {c[3]:.2f} {c[4]:.2f} 1" for i, c in enumerate(particles.ctf)]
    (folder / "blind.star").write_text(
        "\ndata_optics\n\nloop_\n_rlnOpticsGroup\n_rlnOpticsGroupName\n_rlnVoltage\n_rlnSphericalAberration\n"
        "_rlnAmplitudeContrast\n_rlnImagePixelSize\n_rlnImageSize\n_rlnImageDimensionality\n"
        f"1 one 300 2.7 0.1 6.0 {D} 2\n\n\ndata_particles\n\nloop_\n_rlnImageName\n_rlnDefocusU\n_rlnDefocusV\n"
        "_rlnDefocusAngle\n_rlnOpticsGroup\n" + "\n".join(rows) + "\n"
    )
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """Two molecules in turn."""
    particles, _ = blob_particles([blobs(D, 3, 8), blobs(D, 11, 3)], N, noise=0.5)
    return written(tmp_path_factory.mktemp("mixture"), particles.read(np.arange(N)), particles)


@pytest.fixture
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A voxel start of seconds."""
    from cryosuite.methods import deco_start
    from cryosuite.reconstruct.abinitio import AbInitioOptions

    def short(options, seed):
        return AbInitioOptions(
            classes=options.classes, starts=options.starts, iterations=3, batch=40, settle=2, radius=(2, 3),
            rounds=((4, True), (6, False)), seed=seed,
        )  # fmt: skip

    monkeypatch.setattr(deco_start, "options_of", short)


def given(folder: Path) -> list[object]:
    return [folder / "p.mrcs", "--poses", folder / "poses.pkl", "--ctf", folder / "ctf.pkl"]


def test_known_poses_to_classes_and_what_opens_the_run(mixture, tmp_path, capsys, monkeypatch) -> None:
    """All files are there and agree; analyze, polish and export take the run."""
    out = RunDir(tmp_path / "run")
    assert run(monkeypatch, "deco-classify", *given(mixture), "-o", out.path, *QUICK) == 0, capsys.readouterr().err
    z, labels = safe_load(out.z(2))[0], safe_load(out.labels(2))[0]
    assert z.shape == (N, 4) and np.isfinite(z).all() and labels.shape == (N,)
    folder = run_clusters(out.path, 2)
    assert np.array_equal(safe_load(folder.labels)[0], labels)
    assert folder.volume(0).exists() and folder.plot("poses").exists() and folder.table.exists()
    assert len(np.loadtxt(folder.centers_index, dtype=int, ndmin=1)) == labels.max() + 1
    assert run_polish(out.path, 2).map(0).exists()
    assert not out.encoder_images.exists()
    rotation, shift = safe_load(out.poses(2))[0]
    stored = pickle.loads((mixture / "poses.pkl").read_bytes())
    assert np.array_equal(rotation, stored[0]) and np.array_equal(shift, stored[1])
    loaded = load_run(out.path)
    assert loaded.name == "deco" and loaded.decode(z[:2]).shape == (2, D, D, D)
    assert run(monkeypatch, "analyze", out.path, "--ksample", 3, "--skip-umap", "--pc", 0) == 0
    export = ["export", out.path, "--labels", out.labels(2), "--cluster", 0, "-o", tmp_path / "c.star"]
    assert run(monkeypatch, *export) == 0
    assert run(monkeypatch, "deco-classify", *given(mixture), "-o", out.path, *QUICK) == 2
    assert "--resume" in capsys.readouterr().err


def test_a_star_without_poses_is_solved_and_opens_with_its_poses(
    mixture, tmp_path, capsys, monkeypatch, few_rounds
) -> None:
    """No pose column: they are found, written and used by whatever opens the run; class files carry them."""
    out = RunDir(tmp_path / "run")
    code = run(monkeypatch, "deco-classify", mixture / "blind.star", "-o", out.path, *QUICK, "--starts", 1)
    said = capsys.readouterr().err
    assert code == 0 and "ab initio" in said and "hand" in said, said
    rotation, shift = safe_load(out.poses(2))[0]
    found = open_particles(out.path)
    assert np.array_equal(found.rotation, rotation) and np.array_equal(found.shift, shift)
    assert np.array_equal(load_run(out.path).particles.rotation, rotation)
    with np.load(out.margins(2)) as stored:
        assert stored["margin"].shape == (N,) and np.isfinite(stored["margin"]).all()
    some = open_particles(out.path, ind=np.array([5, 3]))
    assert np.array_equal(some.rotation, rotation[[5, 3]])
    first = run_clusters(out.path, 2)
    classes = sorted(first.path.glob("*.star"))
    assert classes
    label = safe_load(out.labels(2))[0]
    again = open_particles(classes[0], datadir=mixture)
    assert np.allclose(again.rotation, rotation[label == 0], atol=1e-3)


@pytest.mark.parametrize("minutes", [1e-6, 0.02], ids=["in the start", "later"])
def test_stopped_and_resumed_is_the_same(mixture, tmp_path, monkeypatch, few_rounds, minutes: float) -> None:
    """Poses, latents and labels equal those of a run in one go, wherever it was stopped."""
    whole, cut = RunDir(tmp_path / "whole"), RunDir(tmp_path / "cut")
    assert run(monkeypatch, "deco-classify", *given(mixture), "-o", whole.path, *QUICK, *START) == 0
    arguments = ["deco-classify", *given(mixture), "-o", cut.path, *QUICK, *START]
    run(monkeypatch, *arguments, "--max-minutes", minutes)
    assert cut.start.exists()
    for _ in range(40):
        if cut.epochs() and run_clusters(cut.path, 2).table.exists():
            break
        run(monkeypatch, "deco-classify", given(mixture)[0], "-o", cut.path, "--resume", "--max-minutes", minutes * 50)
    assert run(monkeypatch, "deco-classify", given(mixture)[0], "-o", cut.path, "--resume") == 0
    for of in (RunDir.poses, RunDir.z, RunDir.labels):
        one, other = (safe_load(of(folder, 2))[0] for folder in (whole, cut))
        for a, b in zip(one if isinstance(one, tuple) else [one], other if isinstance(other, tuple) else [other],
                        strict=True):  # fmt: skip
            assert np.array_equal(a, b), of
    weights = [load_state(folder.weights(2), "weights")["model_state_dict"] for folder in (whole, cut)]
    assert all(torch.equal(weights[0][n].nan_to_num(), weights[1][n].nan_to_num()) for n in weights[0])


@pytest.mark.slow
def test_a_signal_while_maps_are_made_stops_and_resume_makes_them(mixture, tmp_path, capsys, monkeypatch) -> None:
    """After the last epoch too the command leaves with 85, at once, and the job is put back where that is asked for."""
    from cryosuite.methods import deco_finish, deco_run

    whole, out = tmp_path / "whole", tmp_path / "cut"
    assert run(monkeypatch, "deco-classify", *given(mixture), "-o", whole, *QUICK) == 0
    made, put_back, reached = deco_finish.polish_to, [], []

    def signalled(*arguments, **named):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.05)
        reached.append(True)
        return made(*arguments, **named)

    with monkeypatch.context() as first:
        first.setattr(deco_finish, "polish_to", signalled)
        first.setattr(deco_run, "requeue_job", put_back.append)
        assert run(monkeypatch, "deco-classify", *given(mixture), "-o", out, *QUICK, "--requeue") == 85
    assert not reached and put_back == ["SIGUSR1"] and "--resume" in capsys.readouterr().err
    assert not run_polish(out, 2).summary.exists()
    assert run(monkeypatch, "deco-classify", mixture, "-o", out, "--resume") == 0
    maps = [sorted(run_polish(folder, 2).path.rglob("*.mrc")) for folder in (whole, out)]
    assert len(maps[0]) > 2 and [path.name for path in maps[0]] == [path.name for path in maps[1]]
    for one, other in zip(*maps, strict=True):
        assert np.array_equal(read_map(one).data, read_map(other).data), one


def test_identical_images_are_one_class(mixture, tmp_path, capsys, monkeypatch) -> None:
    """Nothing tells them apart, and that is said."""
    particles, _ = blob_particles([blobs(D, 3, 8)], N, noise=0.5)
    for name in ("rotation", "shift", "ctf"):
        setattr(particles, name, np.repeat(getattr(particles, name)[:1], N, 0))
    folder = written(tmp_path, np.repeat(particles.read(np.arange(1)), N, 0), particles)
    out = RunDir(tmp_path / "run")
    code = run(monkeypatch, "deco-classify", *given(folder), "-o", out.path, *NETWORK, "-n", 1, "-b", 32)
    said = capsys.readouterr().err
    assert code == 0 and "one c" in said, said
    assert safe_load(out.labels(1))[0].max() == 0


def test_noise_is_said_to_be_noise(mixture, tmp_path, capsys, monkeypatch) -> None:
    """A stack of pure noise ends in a result that is not to be trusted, and says so."""
    particles, _ = blob_particles([blobs(D, 3)], N)
    noise = np.random.default_rng(0).standard_normal((N, D, D)).astype(np.float32)
    folder = written(tmp_path, noise, particles)
    assert run(monkeypatch, "deco-classify", *given(folder), "-o", tmp_path / "run", *QUICK, "-n", 1) == 0
    assert "nothing above the noise" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--zdim", "500"], ["--zdim 500", "160 particles"]),
        (["--zdim", "many"], ["--zdim many", "whole number"]),
        (["-k", "0"], ["--k 0"]),
        (["-k", "100"], ["--k 100", "160 particles"]),
        (
            ["--hand", "flip", "--re-search", "5", "-k", "100"],
            ["--hand: no effect with known poses", "--re-search: no"],
        ),
        (["--finetune", "first"], ["--finetune first", "last-3"]),
        (["--encoder", "nowhere.safetensors"], ["nowhere.safetensors"]),
        (["--ab-initio", "--classes", "9"], ["too few", "9"]),
        (["--cluster", "dbscan"], ["--cluster dbscan"]),
        (["--seed", "-1"], ["--seed"]),
        (["--hps-epochs", "3"], ["--hps-epochs", "--start network", "known"]),
        (["--ab-initio", "--warmup-images", "50", "--hps-epochs", "3"], ["--hps-epochs, --warmup-images", "voxel"]),
    ],
)
def test_bad_options_are_refused_before_a_folder_is_made(
    mixture, tmp_path, capsys, monkeypatch, arguments: list[str], words: list[str]
) -> None:
    """One sentence, exit code 2, no folder."""
    out = tmp_path / "run"
    assert run(monkeypatch, "deco-classify", *given(mixture), "-o", out, *QUICK, *arguments) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert all(word in said for word in words), said
    assert not out.exists()


def test_weights_of_another_network_are_refused(mixture, tmp_path, capsys, monkeypatch) -> None:
    """A safetensors file that holds no encoder, and one cut short."""
    from cryosuite.formats.safetensors import write_safetensors

    path = tmp_path / "other.safetensors"
    write_safetensors(path, {"layer.weight": np.zeros((2, 2), np.float32)}, {})
    assert run(monkeypatch, "deco-classify", *given(mixture), "-o", tmp_path / "run", *QUICK, "--encoder", path) == 2
    assert "other.safetensors" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:20])
    assert run(monkeypatch, "deco-classify", *given(mixture), "-o", tmp_path / "run", *QUICK, "--encoder", path) == 2


def test_overwrite_leaves_nothing_of_the_run_before(mixture, tmp_path, monkeypatch) -> None:
    """Start, margins, latents of more epochs: all gone."""
    out = RunDir(tmp_path / "run")
    assert run(monkeypatch, "deco-classify", *given(mixture), "-o", out.path, *QUICK) == 0
    for path in (out.start, out.zdim, out.margins(7), out.encoder_images):
        shutil.copy(out.config, path)
    assert run(monkeypatch, "deco-classify", *given(mixture), "-o", out.path, *QUICK, "-n", 1, "--overwrite") == 0
    assert out.epochs() == [1] and not out.margins(7).exists() and not out.start.exists() and not out.zdim.exists()
