"""``cryosuite polish`` on labels, latents, runs of cryoDRGN and bad days."""

from __future__ import annotations

import csv
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import reconstruct_toy as toy

from cryosuite.analysis.polished import polish_to
from cryosuite.cli import main
from cryosuite.data.cryodrgn_run import is_cryodrgn_run, open_cryodrgn_run
from cryosuite.data.map_weights import save_map_weights
from cryosuite.data.results import PolishDir
from cryosuite.formats.mrc import read_map
from cryosuite.formats.pickles import write_pickle
from cryosuite.formats.stacks import StackWriter
from cryosuite.nets.scunet import Scunet, ScunetSpec
from cryosuite.reconstruct.bins import bins_of
from cryosuite.reconstruct.local import local_gain, local_resolution
from cryosuite.reconstruct.masks import soft_sphere
from cryosuite.reconstruct.polish import PolishOptions
from cryosuite.reconstruct.weights import ClassWeights

N, D = 120, 32


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of a command, as the shell sees it."""
    monkeypatch.setattr(sys, "argv", ["cryosuite", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Path:
    """A stack of one molecule with poses and CTF as cryoDRGN writes them, and latents on a circle."""
    folder = tmp_path_factory.mktemp("set")
    particles = toy.particles(N, D, noise=1.0)
    with StackWriter(folder / "p.mrcs", N, D, toy.PIXEL) as out:
        out.write(particles.read(np.arange(N)))
    write_pickle(folder / "poses.pkl", (particles.rotation, particles.shift))
    write_pickle(folder / "ctf.pkl", particles.ctf)
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, N)
    write_pickle(folder / "z.pkl", np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32))
    write_pickle(folder / "labels.pkl", (angle > np.pi).astype(np.int64))
    return folder


def given(folder: Path) -> list[object]:
    return [folder / "p.mrcs", "--poses", folder / "poses.pkl", "--ctf", folder / "ctf.pkl", "--threads", 1]


def test_labels_to_maps(stack, tmp_path, capsys, monkeypatch):
    out = PolishDir(tmp_path / "maps")
    assert (
        run(monkeypatch, "polish", *given(stack), "--labels", stack / "labels.pkl", "-o", out.path, "--passes", 1) == 0
    )
    for path in (out.map(1), out.raw(0), out.raw_half(1, 0), out.half(0, 1), out.gain(0), out.local_resolution(1)):
        found = read_map(path)
        assert found.data.shape == (D, D, D) and found.pixel_size == pytest.approx(toy.PIXEL)
    truth = toy.volume(D).numpy()
    assert np.corrcoef(read_map(out.map(0)).data.ravel(), truth.ravel())[0, 1] > 0.9
    rows = list(csv.DictReader(out.classes.open()))
    assert sum(float(row["particles"]) for row in rows) == N
    assert [row["class_from_0"] for row in rows] == [str(k) for k in range(len(rows))]
    assert len(list(csv.reader(out.fsc.open()))) == D // 2 + 1
    assert "never from them" in capsys.readouterr().err
    assert run(monkeypatch, "polish", *given(stack), "--labels", stack / "labels.pkl", "-o", out.path) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_latents_of_another_program(stack, tmp_path, capsys, monkeypatch):
    out = tmp_path / "maps"
    assert (
        run(monkeypatch, "polish", *given(stack), "--z", stack / "z.pkl", "-k", 3, "-o", out, "-d", 24, "--passes", 0)
        == 0
    )
    labels = pickle.loads(PolishDir(out).labels.read_bytes())
    assert sorted(set(labels.tolist())) == [0, 1, 2]
    assert read_map(PolishDir(out).map(2)).pixel_size == pytest.approx(toy.PIXEL * D / 24)
    assert "learnt from both half sets" in capsys.readouterr().err


def test_kernel_mode(stack, tmp_path, monkeypatch, capsys):
    out = PolishDir(tmp_path / "maps")
    latents = ["--z", stack / "z.pkl", "-k", 2, "--mode", "kernel", "--passes", 1, "--window", 12]
    assert run(monkeypatch, "polish", *given(stack), *latents, "-o", out.path) == 0
    assert np.corrcoef(read_map(out.map(0)).data.ravel(), toy.volume(D).numpy().ravel())[0, 1] > 0.9
    assert "--passes: no effect with --mode kernel" in " ".join(capsys.readouterr().err.split())


def test_kernel_mode_leaves_out_particles_whose_latents_are_not_numbers(tmp_path):
    particles, labels = toy.particles(N, D, noise=1.0), np.arange(N) % 2
    z = np.where(np.arange(N)[:, None] == 3, np.nan, labels[:, None]).astype(np.float32)
    weights, points = ClassWeights.from_labels(labels), np.array([[0.0], [1.0]], np.float32)
    out = PolishDir(tmp_path / "maps")
    polish_to(out, particles, weights, PolishOptions(), mode="kernel", latents=(z, points), refine_shifts=False)
    assert np.isfinite(read_map(out.map(1)).data).all()


def test_a_run_of_cryodrgn(shared: Path, tmp_path, capsys, monkeypatch):
    folder = shared / "golden" / "cryodrgn_run"
    assert is_cryodrgn_run(folder)
    found = open_cryodrgn_run(folder)
    assert found.z.shape == (200, 4) and found.epoch == 2 and len(found.particles) == 200
    assert run(monkeypatch, "polish", folder, "-o", tmp_path / "no", "--invert-data") == 2
    assert "--invert-data: the run" in capsys.readouterr().err
    assert run(monkeypatch, "polish", folder, "-o", tmp_path / "maps", "-k", 2, "--passes", 0, "--threads", 1) == 0
    truth = read_map(shared / "golden" / "relion" / "volume.mrc").data
    ours = read_map(PolishDir(tmp_path / "maps").map(0)).data
    assert np.corrcoef(ours.ravel(), truth.ravel())[0, 1] > 0.8  # density is positive although data were inverted


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["-o", "OUT"], "say what belongs together"),
        (["--z", "z.pkl"], "-o is missing"),
        (["--z", "short.pkl", "-o", "OUT"], "100 latents for 120 particles"),
        (["--z", "z.pkl", "--labels", "labels.pkl", "-o", "OUT"], "not both"),
        (["--labels", "labels.pkl", "--classes", "4", "-o", "OUT"], "--classes"),
        (["--z", "nan.pkl", "-o", "OUT"], "none of the 120 latents is a number"),
        (["--z", "z.pkl", "-o", "OUT", "-d", "31"], "--downsample 31"),
        (["--labels", "labels.pkl", "-o", "OUT", "--basis", "wave"], "--basis wave"),
        (["--labels", "labels.pkl", "-o", "OUT", "--mode", "kernel"], "needs latents"),
        (["--z", "z.pkl", "-o", "OUT", "--mode", "prior"], "needs a run of ours"),
        (["--z", "z.pkl", "-o", "OUT", "--mode", "magic"], "--mode magic"),
        (["--labels", "nobody.pkl", "-o", "OUT"], "no particle has a share"),
        (["--labels", "single.pkl", "-o", "OUT"], "both half sets"),
        (["--labels", "huge.pkl", "-o", "OUT"], "10000001 classes for 120 particles"),
        (["--labels", "labels.pkl", "-o", "OUT", "--window", "0"], "--window 0"),
        (["--labels", "labels.pkl", "-o", "OUT", "--memory", "0"], "--memory 0"),
        (["--z", "z.pkl", "-o", "OUT", "--seed", "-1"], "--seed -1"),
        (["--labels", "labels.pkl", "-o", "OUT", "--half-sets"], "--half-sets"),
    ],
)
def test_bad_days(stack, tmp_path, capsys, monkeypatch, extra, message):
    write_pickle(stack / "short.pkl", np.zeros((100, 2), np.float32))
    write_pickle(stack / "nan.pkl", np.full((N, 2), np.nan, np.float32))
    write_pickle(stack / "nobody.pkl", np.full(N, -1))
    write_pickle(stack / "single.pkl", np.where(np.arange(N) == 7, 0, -1))
    write_pickle(stack / "huge.pkl", np.where(np.arange(N) < 60, 0, 10**7))
    out = tmp_path / "maps"
    words = [out if word == "OUT" else stack / word if word.endswith(".pkl") else word for word in extra]
    assert run(monkeypatch, "polish", *given(stack), *words) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_polishing_again_leaves_no_map_of_before(stack, tmp_path, monkeypatch):
    out = PolishDir(tmp_path / "maps")
    words = [*given(stack), "--z", stack / "z.pkl", "-o", out.path, "--passes", 0, "-d", 16]
    assert run(monkeypatch, "polish", *words, "-k", 4) == 0
    assert len(out.maps()) == 8 * 4
    (out.path / "vol_mine.mrc").write_bytes(b"")
    assert run(monkeypatch, "polish", *words, "-k", 2, "--overwrite") == 0
    assert len(out.maps()) == 8 * 2 and not out.map(2).exists() and (out.path / "vol_mine.mrc").exists()
    np.testing.assert_array_equal(pickle.loads(out.index.read_bytes()), np.arange(N))


def test_a_failure_on_the_way_leaves_no_folder(stack, tmp_path, capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "vol_000.mrc")

    monkeypatch.setattr("cryosuite.analysis.polished.write_map", full)
    words = ["--labels", stack / "labels.pkl", "-o", tmp_path / "maps", "--passes", 0, "-d", 16]
    assert run(monkeypatch, "polish", *given(stack), *words) == 2
    assert "disk is full" in capsys.readouterr().err
    assert not (tmp_path / "maps").exists()


def test_two_arrays_of_cryodrgn_in_one_file(stack, tmp_path, monkeypatch):
    """train_vae writes mu and then logvar: the second says nothing about places."""
    z = pickle.loads((stack / "z.pkl").read_bytes())
    write_pickle(tmp_path / "z.19.pkl", z, np.full_like(z, -3))
    labels = []
    for file in (stack / "z.pkl", tmp_path / "z.19.pkl"):
        out = PolishDir(tmp_path / file.stem)
        words = ["--z", file, "-k", 3, "-o", out.path, "--passes", 0, "-d", 16]
        assert run(monkeypatch, "polish", *given(stack), *words) == 0
        labels.append(pickle.loads(out.labels.read_bytes()))
    np.testing.assert_array_equal(*labels)


def test_bins_follow_the_angle_of_a_noisy_circle():
    rng = np.random.default_rng(1)
    angle = rng.uniform(0, 2 * np.pi, 2000)
    z = np.stack([np.cos(angle), np.sin(angle)], 1) + 0.05 * rng.standard_normal((2000, 2))
    weights, means = bins_of(z)
    labels = weights.labels()
    assert weights.n_classes == 20 and np.bincount(labels).min() >= 20
    for k in range(20):  # every bin is one short arc
        spread = np.abs(np.mean(np.exp(1j * angle[labels == k])))
        assert spread > 0.97
    gaps = np.abs(np.diff(np.unwrap(np.arctan2(means[:, 1], means[:, 0]))))
    assert np.median(gaps) < 0.6  # neighbouring numbers are neighbours on the circle


def test_bins_leave_out_what_is_not_a_number_and_say_when_there_is_too_little():
    z = np.random.default_rng(0).standard_normal((60, 3)).astype(np.float32)
    z[7] = np.nan
    with pytest.warns(UserWarning, match="1 of 60 latents"):
        weights, _ = bins_of(z, 1)
    assert weights.labels()[7] == -1 and (np.delete(weights.labels(), 7) == 0).all()
    with pytest.warns(UserWarning, match="mostly its neighbours"):
        bins_of(z[:7], 3)
    with pytest.warns(UserWarning, match="1 different latents"):
        assert bins_of(np.zeros((50, 2)), 4)[0].n_classes == 1


def test_local_resolution_tells_good_places_from_bad():
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(D, D, D, generator=generator)
    noise = torch.where(torch.arange(D) < D // 2, 0.2, 2.0)  # x < 0 is good
    a, b = (signal + noise * torch.randn(D, D, D, generator=generator) for _ in range(2))
    mask = soft_sphere(D)
    found = local_resolution(a, b, mask, 5.0)
    left, right = found[14:18, 14:18, 6:11], found[14:18, 14:18, 21:26]
    assert float(left.median()) < 11 and float(right.median()) > 20
    assert float(found.min()) >= 10 and float(found[0, 0, 0]) == 50


def test_local_resolution_of_voxels_too_large_for_any_window_is_the_coarsest():
    maps = torch.randn(2, D, D, D, generator=torch.Generator().manual_seed(1))
    assert float(local_resolution(*maps, soft_sphere(D), 26.0).unique()) in (50.0, 52.0)


def test_local_gain_is_the_share_that_was_kept():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(D, D, D, generator=generator)
    kept = torch.where(torch.arange(D) < D // 2, 0.9, 0.3)
    found = local_gain(raw, raw * kept, torch.ones(D, D, D), 5.0)
    assert float(found[..., 6].mean()) == pytest.approx(0.9, abs=0.03)
    assert float(found[..., 26].mean()) == pytest.approx(0.3, abs=0.03)


def test_sharpened_maps_lie_beside_the_others(stack, tmp_path, capsys, monkeypatch):
    plain, out = PolishDir(tmp_path / "plain"), PolishDir(tmp_path / "sharp")
    how = [*given(stack), "--labels", stack / "labels.pkl", "--passes", 0, "-o"]
    monkeypatch.setattr("cryosuite.data.map_weights.WEIGHTS", tmp_path)
    assert run(monkeypatch, "polish", *how, out.path, "--sharpen") == 2  # before any work
    assert "train-lvm --task sharpen" in capsys.readouterr().err and not out.path.exists()
    network = Scunet(ScunetSpec(d=8, bottleneck=2))
    save_map_weights(tmp_path / "lvm-sharpen.safetensors", network, task="sharpen", voxel=toy.PIXEL, norm="robust")
    assert run(monkeypatch, "polish", *how, out.path, "--sharpen") == 0
    assert "Predictions" in capsys.readouterr().err
    assert run(monkeypatch, "polish", *how, plain.path) == 0
    for k in range(2):
        assert out.map(k).read_bytes()[1024:] == plain.map(k).read_bytes()[1024:]
        found = read_map(out.sharp(k))
        assert found.data.shape == (D, D, D) and found.pixel_size == pytest.approx(toy.PIXEL)
        assert b"not a measurement" in found.header and not np.array_equal(found.data, read_map(out.map(k)).data)
    assert run(monkeypatch, "polish", *how, out.path, "--overwrite") == 0
    assert not out.sharp(0).exists()  # of the maps before


def test_wrong_shifts_are_refined(stack, tmp_path, capsys, monkeypatch):
    """The maps are closer to the truth, the shifts lie beside them; --no-refine-shifts leaves everything alone."""
    true, rotation = toy.particles(N, D, noise=1.0).shift, pickle.loads((stack / "poses.pkl").read_bytes())[0]
    wrong = true + np.random.default_rng(0).normal(0, 0.8 / D, (N, 2)).astype(np.float32)
    write_pickle(tmp_path / "poses.pkl", (rotation, wrong))
    command = ["polish", stack / "p.mrcs", "--poses", tmp_path / "poses.pkl", "--ctf", stack / "ctf.pkl"]
    command += ["--labels", stack / "labels.pkl", "--passes", 0, "--threads", 1]
    truth = toy.volume(D).numpy().ravel()
    found = {}
    for name, more in (("refined", []), ("given", ["--no-refine-shifts"])):
        out = PolishDir(tmp_path / name)
        assert run(monkeypatch, *command, *more, "-o", out.path) == 0
        assert ("they were refined: for these maps" in capsys.readouterr().err) == (name == "refined")
        assert ("shift_error_px" in out.summary.read_text()) == out.poses.exists() == (name == "refined")
        found[name] = np.corrcoef(read_map(out.map(0)).data.ravel(), truth)[0, 1]
    shift = pickle.loads((tmp_path / "refined" / "poses.pkl").read_bytes())[1]
    assert (shift - true).std() < 0.3 * (wrong - true).std()
    assert found["refined"] > 0.99 > 0.985 > found["given"]
    refined = tmp_path / "refined"
    assert run(monkeypatch, *command, "--no-refine-shifts", "-o", refined, "--overwrite") == 0
    assert not (refined / "poses.pkl").exists(), "those of before would be taken for these maps'"
