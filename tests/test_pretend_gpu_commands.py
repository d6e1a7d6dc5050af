"""Every command that computes on a GPU runs on a pretend one, and writes what it writes on the processor.

Not tried here, since the pretend GPU cannot: --compile, several GPUs, CUDA's own memory limits and random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hype_toy import blob_particles, blobs
from pretend_gpu import GpuTensor, pretend_gpu
from sharpen_toy import toy_map
from test_commands_deco_classify import few_rounds, given, written  # noqa: F401 -- a fixture
from test_commands_fastar_infer import folder as views  # noqa: F401 -- a fixture
from test_commands_lvm_sharpen import weights as map_weights  # noqa: F401 -- a fixture
from test_commands_train_hype import SMALL, cryosuite
from test_methods_iev import SMALL as TINY_ENCODER
from test_pretend_gpu import _there

from cryosuite.data.encoder_weights import save_encoder
from cryosuite.data.results import PosesDir
from cryosuite.data.workdir import RunDir
from cryosuite.formats.mrc import read_map, write_map
from cryosuite.formats.pickles import read_latent, read_poses, safe_load
from cryosuite.formats.stacks import StackReader
from cryosuite.methods import fastar_validate, load_run, lvm_validate
from cryosuite.nets import ief
from cryosuite.nets.multiview import SPECS, MultiviewSpec
from cryosuite.reconstruct import abinitio, abinitio_restarts, abinitio_starts
from cryosuite.reconstruct.abinitio import AbInitio, AbInitioOptions
from cryosuite.reconstruct.held_out import settle
from cryosuite.reconstruct.refine import RefineOptions, refine, search_everywhere
from cryosuite.reconstruct.weights import ClassWeights
from cryosuite.training.logs import read_metrics

N, D = 64, 16
HYPE = [word for name, value in SMALL.items() for word in (f"--{name}", value)]
DECO = ["--encoder", "random", "--encoder-size", "micro", "--zdim", 4, "--preset", "small", "--dim", 32,
        "--layers", 1, "--features", 16, "-n", 1, "-b", 24, "-k", 2, "--cluster", "gmm-direct"]  # fmt: skip
LVM = ["--structures", "phantom:3", "--hold-out", 1, "--size", "micro", "--crop", 24, "--volume", 32, "--mix", 2,
       "--crops-per-volume", 4, "--images", 8, "--every", 8, "-b", 4]  # fmt: skip
IEV = ["--simulate", "phantom:3", "--preset", "tiny", "--images", 32, "--every", 32, "-b", 16, "--views", 4]
FASTAR = ["--preset", "micro", "--images", 32, "--every", 32, "-b", 16, "--views", 8]
KRAQEN = ["--n-codes", 3, "-b", 24]
FIELD = [*KRAQEN, "--features", 32, "--width", 64, "--layers", 2, "--rank", 5, "-n", 1, "--em-finish", 1, "--field"]
TRAININGS: dict[str, list[Any]] = {
    "train-hype": [*HYPE, "--preset", "small", "-n", 1, "-b", 16],
    "train-kraqen": KRAQEN + ["-i", 3],
    "train-kraqen triplane": [*FIELD, "triplane", "--channels", 8],
    "train-kraqen fourier": [*FIELD, "fourier"],
    "deco-classify": DECO,
    "pretrain-iev": IEV,
    "train-fastar": FASTAR,
    "pretrain-lvm": LVM,
    "train-lvm sharpen": ["--task", "sharpen", *LVM],
}
LONG = ("train-kraqen triplane", "train-fastar", "pretrain-lvm", "train-lvm sharpen")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two molecules in turn, as cryoDRGN writes them and as a star file without poses."""
    particles, _ = blob_particles([blobs(D, 3, 8), blobs(D, 11, 3)], N, noise=0.5)
    return written(tmp_path_factory.mktemp("mixture"), particles.read(np.arange(N)), particles)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller networks and coarser tests than the smallest."""
    monkeypatch.setitem(ief.SPECS, "vit_tiny", TINY_ENCODER)
    monkeypatch.setitem(SPECS, "micro", MultiviewSpec(32, 8, 32, 1, 2, 32, 1, 2, match_dim=32))
    monkeypatch.setattr(fastar_validate, "GRID", 0)
    monkeypatch.setattr(lvm_validate, "EACH", 1)


def both(tmp_path: Path, *arguments: object, where: str = "--accelerator", gpu: str = "gpu") -> tuple[Path, Path]:
    """The same command on the processor and on the pretend GPU; the folders they wrote."""
    made = []
    for name in ("cpu", gpu):
        before, command = GpuTensor.made, [*arguments, "-o", tmp_path / name, where, name]
        if name == "cpu":
            done = cryosuite(*command)
        else:
            with pretend_gpu():
                done = cryosuite(*command)
        assert done.returncode == 0, done.stderr
        assert (GpuTensor.made > before) == (name != "cpu")
        made.append(tmp_path / name)
    return made[0], made[1]


def learning(name: str, mixture: Path) -> list[Any]:
    """A training's command line without the place it runs at."""
    command, *_ = name.split()
    own = command in ("train-hype", "train-kraqen", "deco-classify")
    threads = ["--threads", 1] if command in ("train-kraqen", "deco-classify") else []
    return [command, *(given(mixture) if own else []), *TRAININGS[name], *threads]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in TRAININGS]
)
@pytest.mark.filterwarnings("ignore::cryosuite.errors.UserNotice")
def test_trainings(name: str, mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All losses and scores, latents and, opened on the GPU again, volumes."""
    precision = [] if name == "train-kraqen" else ["--precision", "32"]
    here, there = (RunDir(path) for path in both(tmp_path, *learning(name, mixture), *precision))
    assert "device cuda:0" in there.log.read_text() or name == "train-kraqen"
    records = [read_metrics(run.metrics) for run in (here, there)]
    assert len(records[0]) == len(records[1]) > 0
    for a, b in zip(*records, strict=True):
        timed = {"seconds", "images_per_s", "lr"}
        assert a.keys() == b.keys()
        for key in a.keys() - timed:
            assert b[key] == pytest.approx(a[key], rel=0.02, abs=5e-3), key
    epoch = 3 if name == "train-kraqen" else 1
    if not name.startswith(("train-hype", "train-kraqen", "deco")):
        return
    z = [read_latent(run.z(epoch))[0] for run in (here, there)]
    apart = [np.linalg.norm(one[:, None] - one, axis=-1) for one in z]  # axes of little spread may turn
    np.testing.assert_allclose(apart[1], apart[0], atol=0.02 * apart[0].max())
    maps = load_run(here.path).decode(z[0][:2])
    again = _there(lambda gpu: torch.from_numpy(load_run(here.path).decode(z[0][:2]))).numpy()
    np.testing.assert_allclose(again, maps, atol=2e-3 * np.abs(maps).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TRAININGS if name != "train-kraqen"])
@pytest.mark.filterwarnings("ignore::cryosuite.errors.UserNotice")
def test_trainings_in_half_precision_and_further(name: str, mixture: Path, tmp_path: Path) -> None:
    """bfloat16 as a GPU has it, and --resume there."""
    out, half = RunDir(tmp_path), ["--precision", "bf16", "--accelerator", "gpu"]
    with pretend_gpu():
        done = cryosuite(*learning(name, mixture), "-o", out.path, *half)
        assert done.returncode == 0, done.stderr
        longer = (
            ["-n", 2]
            if name.split()[0] in ("train-hype", "train-kraqen", "deco-classify")
            else ["--images", 16 if "lvm" in name else 64]
        )
        data = learning(name, mixture)[:6] if longer[0] == "-n" else [name.split()[0]]
        done = cryosuite(*data, "-o", out.path, "--resume", *longer)
        assert done.returncode == 0, done.stderr
    assert all(np.isfinite(record.get("loss", 0.0)) for record in read_metrics(out.metrics))
    assert "bf16-mixed" in out.log.read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::cryosuite.errors.UserNotice")
def test_poses_from_nothing(mixture: Path, tmp_path: Path, few_rounds: None) -> None:  # noqa: F811
    """deco-classify of a star file without poses; the images are few, so that only the way through it counts."""
    command = ["deco-classify", mixture / "blind.star", *DECO, "--starts", 1, "--classes", 1, "--precision", "32"]
    for path in both(tmp_path, *command, "--threads", 1):
        rotation, _ = safe_load(RunDir(path).poses(1))[0]
        assert rotation.shape == (N, 3, 3) and np.allclose(np.linalg.det(rotation), 1, atol=1e-3)


@pytest.mark.filterwarnings("ignore::cryosuite.errors.UserNotice")
def test_features_of_an_encoder(mixture: Path, tmp_path: Path) -> None:
    """pretrain-iev --encode; half precision on a GPU."""
    save_encoder(tmp_path / "e.safetensors", ief.IefEncoder(TINY_ENCODER), "standard", 0.5, 0.12, {})
    command = ["pretrain-iev", mixture / "p.mrcs", "--Apix", 6, "--encode", "--weights", tmp_path / "e.safetensors"]
    here, there = both(tmp_path, *command)
    z = [read_latent(next(path.glob("z.*.pkl")))[0] for path in (here, there)]
    np.testing.assert_allclose(z[1], z[0], atol=0.03 * np.abs(z[0]).max())


@pytest.mark.slow
@pytest.mark.parametrize("network", ["looks", "regresses", "ab-initio"])
@pytest.mark.filterwarnings("ignore::cryosuite.errors.UserNotice")
def test_poses_of_a_network(network: str, views: Path, tmp_path: Path) -> None:  # noqa: F811
    """fastar-infer: prediction in each of its ways, then refinement and maps."""
    mode = ["--mode", "ab-initio", "--experimental"] if network == "ab-initio" else ["--map", views / "ref.mrc"]
    weights = ["--weights", views / f"{network}.safetensors"]
    command = ["fastar-infer", views / "p.star", *weights, *mode, "--threads", 1, "--precision", "32"]
    here, there = (read_poses(PosesDir(path).poses) for path in both(tmp_path, *command))
    same = np.abs(here[0] - there[0]).max((1, 2)) < 0.02  # a network that knows nothing: ties go either way
    assert same.mean() > (0.9 if mode[0] == "--map" else 0.2)


@pytest.mark.parametrize("network", ["sharpen", pytest.param("uneven", marks=pytest.mark.slow)])
def test_maps_made_readable(network: str, map_weights: Path, tmp_path: Path) -> None:  # noqa: F811
    """lvm-sharpen, and its deviation over rotations."""
    grid = toy_map((40, 36, 44))
    write_map(tmp_path / "in.mrc", grid.data, 1.0, grid.origin)
    (tmp_path / "out").mkdir()
    made = []
    more = ["--tta", 4] if network == "uneven" else []
    for place in ("cpu", "gpu"):
        out = tmp_path / "out" / f"{place}.mrc"
        command = ["lvm-sharpen", tmp_path / "in.mrc", "-o", out, "--weights", map_weights / f"{network}.safetensors"]
        command += ["--precision", "32", "--accelerator", place, *more]
        if place == "cpu":
            done = cryosuite(*command)
        else:
            before = GpuTensor.made
            with pretend_gpu():
                done = cryosuite(*command)
            assert GpuTensor.made > before
        assert done.returncode == 0, done.stderr
        made.append(read_map(out).data)
    np.testing.assert_allclose(made[1], made[0], atol=1e-4 * np.abs(made[0]).max())


@pytest.mark.filterwarnings("ignore::cryosuite.errors.UserNotice")
def test_the_time_that_a_training_will_take(mixture: Path) -> None:
    """The steps that ``check`` tries on the GPU."""
    before = GpuTensor.made
    with pretend_gpu():
        done = cryosuite("check", *given(mixture), "--preset", "small")
    assert "images/s on this GPU" in " ".join(done.stdout.split()), done.stderr
    assert GpuTensor.made > before


@pytest.mark.filterwarnings("ignore::cryosuite.errors.UserNotice")
def test_simulated_images(tmp_path: Path) -> None:
    command = ["simulate", "--structures", "phantom:2", "-n", 12, "-D", 32, "--snr", 0.5]
    here, there = both(tmp_path, *command, where="--device", gpu="cuda")
    images = [StackReader(path / "particles.mrcs").read(np.arange(12)) for path in (here, there)]
    np.testing.assert_allclose(images[1], images[0], atol=2e-3 * np.abs(images[0]).max())


# what several commands share: searches for poses and classes ---------------------------------------------------------


def agree(function: Callable[[Any], dict[str, Any]], tolerance: float, share: float = 0.95) -> None:
    """Most rows of all arrays agree: where two poses are as good, rounding decides."""
    here = function("cpu")
    with pretend_gpu() as gpu:
        before = GpuTensor.made
        there = function(gpu)
    assert GpuTensor.made > before
    for name, value in here.items():
        apart = np.abs(np.asarray(value, np.float64) - there[name]).reshape(len(value), -1).max(1)
        assert (apart <= tolerance * (1 + np.abs(value).max())).mean() >= share, name


def test_refinement_and_search_everywhere() -> None:
    """From poses, with candidates, from a map."""
    particles, _ = blob_particles([blobs(D, 3, 8)], 60, noise=0.3)
    volume, options = blobs(D, 3, 8).float(), RefineOptions(rounds=1)
    twice = np.stack([particles.rotation] * 2, 1)

    def found(device: Any) -> dict[str, Any]:
        first = refine(particles, particles.rotation, particles.shift, options=options, device=device)
        second = refine(particles, twice, particles.shift, options=options, device=device, maps=volume)
        rotation, shift, score = search_everywhere(particles, np.arange(10), volume, device=device)
        return {
            "rotation": first.rotation, "score": first.score, "with a map": second.rotation, "margin": second.margin,
            "everywhere": rotation[:, 0], "shift": shift, "score everywhere": score,
        }  # fmt: skip

    agree(found, 0.02, 0.8)


@pytest.mark.slow
def test_classes_held_out() -> None:
    particles, _ = blob_particles([blobs(D, 3, 8), blobs(D, 11, 3)], 120, noise=0.3)
    weights = ClassWeights.from_labels(np.random.default_rng(0).integers(0, 3, 120))

    def found(device: Any) -> dict[str, Any]:
        settled = settle(particles, weights, box=D, device=device)
        return {"groups": settled.groups, "p": settled.p.dense()}

    agree(found, 1e-2)


@pytest.mark.parametrize(("classes", "coarse"), [(1, 7), (1, 2), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_poses_and_classes_from_nothing(classes: int, coarse: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All kinds of rounds of the search; what they find in so little time means nothing."""
    monkeypatch.setattr(abinitio, "REPEATS", 1)
    monkeypatch.setattr(abinitio_starts, "COARSE", coarse)  # beyond it images carry their shifts along
    for name, value in (("STARTS", 1), ("FEWEST", 10)):
        monkeypatch.setattr(abinitio_restarts, name, value)
    for name, value in (("iterations", 1), ("settle", 1), ("batch", 10), ("radius", (2, 3))):
        monkeypatch.setitem(abinitio_starts.ONE, name, value)
    options = AbInitioOptions(
        classes=classes, starts=2, iterations=1, batch=10, settle=1, radius=(2, 3), rounds=((4, True), (6, False)),
        seed=1,
    )  # fmt: skip
    particles, _ = blob_particles([blobs(D, 3, 8), blobs(D, 11, 3)][:classes], 110, noise=0.3)

    def found(device: Any) -> dict[str, Any]:
        engine = AbInitio(particles, options, device)
        while not engine.done:
            engine.advance()
        return {"rotation": engine.found.rotation, "label": engine.found.label}

    agree(found, 0.05, 0.5)
