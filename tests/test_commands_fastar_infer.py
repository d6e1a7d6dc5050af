"""``cryosuite fastar-infer``: its files, what chains on them, and bad days."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastar_toy import SPEC, StarOracle, TargetOracle
from hype_toy import blob_particles, blobs

from cryosuite.cli import main
from cryosuite.data.multiview_weights import save_multiview
from cryosuite.data.open import open_particles
from cryosuite.data.results import PosesDir
from cryosuite.formats.config import read_yaml
from cryosuite.formats.mrc import read_map, write_map
from cryosuite.formats.pickles import read_indices, read_poses, write_pickle
from cryosuite.formats.stacks import StackWriter
from cryosuite.formats.star import particle_tables
from cryosuite.methods import fastar_run_infer as runs
from cryosuite.methods.fastar_infer import Predicted
from cryosuite.nets.multiview import SPECS, Multiview

N, D, PIXEL = 240, 32, 6.0


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of a command, as the shell sees it."""
    monkeypatch.setattr(sys, "argv", ["cryosuite", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A stack, its star file without poses, true poses, CTF, a map, and networks with random weights."""
    folder = tmp_path_factory.mktemp("set")
    volume = blobs(D, 3, count=12)
    particles, _ = blob_particles([volume], N, 1.2, seed=1)
    with StackWriter(folder / "p.mrcs", N, D, PIXEL) as out:
        out.write(particles.read(np.arange(N)))
    write_pickle(folder / "true.pkl", (particles.rotation, particles.shift))
    write_pickle(folder / "ctf.pkl", particles.ctf)
    write_map(folder / "ref.mrc", volume.numpy(), PIXEL)
    rows = "\n".join(
        f"{i + 1:06d}@p.mrcs mic{i % 7}.mrc {c[2]:.1f} {c[3]:.1f} {c[4]:.1f} 1 {i * 3}"
        for i, c in enumerate(particles.ctf)
    )
    columns = ["ImageName", "MicrographName", "DefocusU", "DefocusV", "DefocusAngle", "OpticsGroup", "CoordinateX"]
    loop = "\n".join(f"_rln{name} #{i + 1}" for i, name in enumerate(columns))
    optics = (
        "data_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnOpticsGroupName #2\n_rlnVoltage #3\n_rlnSphericalAberration #4\n"
        f"_rlnAmplitudeContrast #5\n_rlnImagePixelSize #6\n_rlnImageSize #7\n1 g 300 2.7 0.1 {PIXEL} {D}\n\n"
    )
    (folder / "p.star").write_text(f"\n{optics}\ndata_particles\n\nloop_\n{loop}\n{rows}\n")
    torch.manual_seed(0)
    for name in ("target", "ab-initio"):
        save_multiview(folder / f"{name}.safetensors", Multiview(SPEC), {"mode": name})
    small = replace(SPEC, enc_dim=32, enc_depth=1, enc_heads=2, dec_dim=32, dec_depth=1, dec_heads=2)
    for name, spec in (("looks", small), ("regresses", replace(small, match_dim=0))):
        save_multiview(folder / f"{name}.safetensors", Multiview(spec), {"mode": "target"})
    return folder


@pytest.fixture
def oracle(folder, monkeypatch) -> TargetOracle:
    """The network's place is taken by one that knows the truth, 10 degrees off."""
    rotation, shift = read_poses(folder / "true.pkl")
    known = TargetOracle(rotation, shift, bad=0.1)
    monkeypatch.setattr(runs, "make_target", lambda *_: known)
    return known


def target(folder: Path, out: Path, *more: object) -> list[object]:
    return [
        "fastar-infer", folder / "p.star", "-o", out, "--map", folder / "ref.mrc", "--weights",
        folder / "target.safetensors", "--threads", 1, *more,
    ]  # fmt: skip


def test_from_a_star_file_to_poses_and_map(folder, oracle, tmp_path, capsys, monkeypatch) -> None:
    """All files; the star is the input's with poses; other commands read them; errors are printed beside chance."""
    out = PosesDir(tmp_path / "out")
    assert run(monkeypatch, *target(folder, out.path, "--truth", folder / "true.pkl")) == 0
    printed = capsys.readouterr().out
    assert "median angle" in printed and "chance" in printed and "images per second" in printed
    truth, shift = read_poses(folder / "true.pkl")
    rotation, found_shift = read_poses(out.poses)
    scores = json.loads(out.truth.read_text())
    assert scores["predicted"]["raw"]["median_deg"] > 8 > 3 > scores["refined"]["raw"]["median_deg"]
    assert scores["refined"]["chance_raw"]["median_deg"] > 110 and len(scores["refined"]["deciles"]) == 10
    assert read_map(out.map).pixel_size == pytest.approx(PIXEL)
    assert read_map(out.half(1)).data.shape == read_map(out.half(2)).data.shape == (D, D, D)
    header, *lines = out.fsc.read_text().splitlines()
    assert len(lines) == D // 2 and {"unmasked", "masked", "reference_biased"} <= set(header.split(","))
    biased = [line.split(",")[-1] == "1" for line in lines]
    assert biased == [D * PIXEL / (r + 1) >= 20.0 for r in range(D // 2)]
    timing = json.loads(out.timing.read_text())
    assert {"load", "refine", "back-project", "write", "total", "images_per_s_prediction"} <= set(timing)
    summary = read_yaml(out.summary)
    assert summary["mode"] == "target" and summary["hand"] == "reference" and len(summary["refinement"]) == 2
    assert summary["checks"]["hand_as_reference"] > summary["checks"]["hand_mirrored"]
    assert summary["checks"]["best_reading"] == "given"
    confidence, rejected = np.load(out.confidence), read_indices(out.rejected)
    assert confidence.shape == (N, 3) and confidence.dtype == np.float32
    assert len(rejected) + len(read_indices(out.kept)) == N and set(rejected).isdisjoint(read_indices(out.kept))
    assert not out.flipped_map.exists()

    table = particle_tables(out.star)
    assert len(table) == N and list(table.particles["rlnCoordinateX"].astype(int)[:3]) == [0, 3, 6]
    assert set(table.particles["rlnRandomSubset"].astype(int)) == {1, 2}
    assert np.allclose(table.numbers("rlnParticleFigureOfMerit"), confidence[:, 0], atol=1e-4)
    posed = open_particles(out.star)
    assert np.allclose(posed.rotation, rotation, atol=1e-4) and np.allclose(posed.shift, found_shift, atol=1e-5)
    assert np.array_equal(
        posed.read(np.arange(3)), open_particles(folder / "p.star", need_poses=False).read(np.arange(3))
    )
    assert np.array_equal(np.asarray(posed.half), table.particles["rlnRandomSubset"].astype(int) - 1)
    chained = open_particles(folder / "p.star", poses=out.poses, ind=out.kept)
    assert len(chained) == N - len(rejected)


def test_indices_survive_a_subset(folder, oracle, tmp_path, monkeypatch) -> None:
    """Every third particle, backwards: files speak of original positions."""
    chosen = np.arange(0, N, 3)[::-1].copy()
    write_pickle(tmp_path / "ind.pkl", chosen)
    rotation, _ = read_poses(folder / "true.pkl")
    known = TargetOracle(rotation[chosen], read_poses(folder / "true.pkl")[1][chosen], 5.0)
    monkeypatch.setattr(runs, "make_target", lambda *_: known)
    out = PosesDir(tmp_path / "out")
    code = run(monkeypatch, *target(folder, out.path, "--ind", tmp_path / "ind.pkl", "--truth", folder / "true.pkl"))
    assert code == 0
    assert np.array_equal(read_indices(out.index), chosen)
    assert set(read_indices(out.rejected)) <= set(chosen.tolist())
    table = particle_tables(out.star)
    assert list(table.particles["rlnCoordinateX"].astype(int)) == (3 * chosen).tolist()
    assert json.loads(out.truth.read_text())["refined"]["raw"]["median_deg"] < 4


def test_a_bare_stack_with_a_ctf_file(folder, oracle, tmp_path, monkeypatch) -> None:
    """cryoDRGN's form; without the CTF there are poses and no map, with --no-ctf a map all the same."""
    stack = ["fastar-infer", folder / "p.mrcs", "--map", folder / "ref.mrc", "--Apix", PIXEL, "--threads", 1,
             "--weights", folder / "target.safetensors", "--refine", 0]  # fmt: skip
    for name, more, made in (("a", ["--ctf", folder / "ctf.pkl"], True), ("b", [], False), ("c", ["--no-ctf"], True)):
        out = PosesDir(tmp_path / name)
        assert run(monkeypatch, *stack, *more, "-o", out.path) == 0
        assert out.map.exists() == made and out.poses.exists() and out.star.exists() and out.summary.exists()


def test_a_model_instead_of_a_map(folder, oracle, shared, tmp_path, monkeypatch) -> None:
    """An atomic model is taken as well; the low-pass is written down."""
    model = sorted((shared / "data" / "atomic" / "train").glob("1h1s*"))[0]
    command = [*target(folder, tmp_path / "o", "--refine", 0)]
    place = command.index("--map")
    command[place : place + 2] = ["--model", model]
    assert run(monkeypatch, *command, "--low-pass", 25) == 0
    summary = read_yaml(PosesDir(tmp_path / "o").summary)
    assert summary["low_pass_A"] == 25 and summary["reference"].endswith(model.name)


@pytest.mark.parametrize("kind", ["looks", "regresses"])
def test_a_real_network_twice(folder, tmp_path, monkeypatch, capsys, kind) -> None:
    """Random weights: poses are chance, the command says that they are doubtful, and says the same twice."""
    poses = []
    for name in ("a", "b"):
        command = target(folder, tmp_path / name, "--refine", 0, "--precision", "32")
        command[command.index("--weights") + 1] = folder / f"{kind}.safetensors"
        assert run(monkeypatch, *command) == 0
        poses.append(read_poses(PosesDir(tmp_path / name).poses))
    assert np.array_equal(poses[0][0], poses[1][0]) and np.array_equal(poses[0][1], poses[1][1])
    assert "not sure of its poses" in capsys.readouterr().err


def test_ab_initio_behind_its_flag(folder, tmp_path, monkeypatch, capsys) -> None:
    """Star mode with an oracle: both hands are written, chunks are counted; without the flag it is refused."""
    rotation, shift = read_poses(folder / "true.pkl")
    monkeypatch.setattr(runs, "make_star", lambda *_: StarOracle(rotation, shift))
    out = PosesDir(tmp_path / "out")
    command = ["fastar-infer", folder / "p.star", "-o", out.path, "--weights", folder / "ab-initio.safetensors",
               "--threads", 1, "--views", 50]  # fmt: skip
    assert run(monkeypatch, *command, "--mode", "ab-initio") == 2
    assert "--experimental" in capsys.readouterr().err and not out.path.exists()
    assert run(monkeypatch, *command, "--experimental", "--truth", folder / "true.pkl") == 0
    told = capsys.readouterr().err
    assert "experimental" in told and "hand" in told
    summary = read_yaml(out.summary)
    assert summary["chunks"] > 4 and summary["flips"] > 0 and summary["hand"] == "undetermined"
    scores = json.loads(out.truth.read_text())
    assert scores["refined"]["aligned"]["median_deg"] < 4
    other, _ = read_poses(out.flipped_poses)
    mine, _ = read_poses(out.poses)
    J = np.diag([1.0, 1, -1])
    assert np.allclose(other, J @ mine @ J, atol=1e-6) and out.flipped_map.exists()


def test_without_a_reference_poses_are_searched_for(folder, tmp_path, monkeypatch, capsys) -> None:
    """The fall back, and that it says so."""
    rotation, shift = read_poses(folder / "true.pkl")
    seen = {}

    def search(particles, options, clock, guess, *_, **__):
        seen["guess"] = guess
        known = TargetOracle(rotation, shift, 8.0)
        n = len(particles)
        return Predicted(known.rotation.numpy(), known.shift.numpy(), np.ones(n), np.ones(n), np.ones(n, bool))

    monkeypatch.setattr(runs, "predict_search", search)
    command = ["fastar-infer", folder / "p.star", "-o", tmp_path / "o", "--threads", 1]
    assert run(monkeypatch, *command, "--weights", folder / "target.safetensors") == 0
    assert "searched for without one" in capsys.readouterr().err and seen["guess"] is not None
    assert PosesDir(tmp_path / "o").flipped_poses.exists()
    assert run(monkeypatch, *command, "--weights", folder / "ab-initio.safetensors", "--overwrite") == 0
    assert seen["guess"] is None


def test_what_is_there_is_kept(folder, oracle, tmp_path, monkeypatch, capsys) -> None:
    """A second run is refused without --overwrite; with it, what no longer holds is gone."""
    out = PosesDir(tmp_path / "out")
    assert run(monkeypatch, *target(folder, out.path, "--refine", 0)) == 0
    before = out.poses.read_bytes()
    assert run(monkeypatch, *target(folder, out.path)) == 2
    assert "--overwrite" in capsys.readouterr().err and out.poses.read_bytes() == before
    out.flipped_map.write_bytes(b"old")
    assert run(monkeypatch, *target(folder, out.path, "--overwrite", "--refine", 0)) == 0
    assert not out.flipped_map.exists() and out.poses.read_bytes() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--preset", "nano64"], "another preset"),
        (["--preset", "giant"], "expected one of"),
        (["--model", "x.cif"], "not both"),
        (["--reject", 1.0], "below 1"),
        (["--mode", "magic"], "expected auto"),
        (["--truth", "nowhere.pkl"], "nowhere.pkl"),
        (["--views", 2], "at least 4 views"),
        (["--batch-size", 0], "1 or more images"),
    ],
)
def test_one_message_and_nothing_written(folder, tmp_path, monkeypatch, capsys, more, message) -> None:
    """Bad options and checkpoints of another preset end with one line."""
    assert run(monkeypatch, *target(folder, tmp_path / "o", *more)) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "o").exists()


def test_networks_and_modes_that_do_not_fit(folder, tmp_path, monkeypatch, capsys) -> None:
    """Weights of the other mode, of no network, a map that is none, target mode without a map."""
    wrong = target(folder, tmp_path / "o")
    wrong[wrong.index("--weights") + 1] = folder / "ab-initio.safetensors"
    assert run(monkeypatch, *wrong) == 2 and "against each other" in capsys.readouterr().err
    star = ["fastar-infer", folder / "p.star", "-o", tmp_path / "o", "--experimental"]
    assert run(monkeypatch, *star, "--weights", folder / "target.safetensors") == 2
    assert "against a map" in capsys.readouterr().err
    assert run(monkeypatch, *star, "--mode", "target") == 2 and "--map ref.mrc" in capsys.readouterr().err
    wrong[wrong.index("--weights") + 1] = folder / "ctf.pkl"
    assert run(monkeypatch, *wrong) == 2
    wrong = target(folder, tmp_path / "o")
    wrong[wrong.index("--map") + 1] = folder / "p.mrcs"
    assert run(monkeypatch, *wrong) == 2
    assert not (tmp_path / "o").exists()


def test_mixed_boxes_and_few_particles(folder, oracle, tmp_path, monkeypatch, capsys) -> None:
    """Stacks of two boxes are refused by name; three particles are posed, without refinement; none are refused."""
    with StackWriter(tmp_path / "small.mrcs", 2, 24, PIXEL) as out:
        out.write(np.random.default_rng(0).standard_normal((2, 24, 24)).astype(np.float32))
    (tmp_path / "list.txt").write_text(f"{folder / 'p.mrcs'}\n{tmp_path / 'small.mrcs'}\n")
    mixed = ["fastar-infer", tmp_path / "list.txt", "-o", tmp_path / "o", "--map", folder / "ref.mrc", "--Apix", PIXEL,
             "--weights", folder / "target.safetensors"]  # fmt: skip
    assert run(monkeypatch, *mixed) == 2
    said = capsys.readouterr().err
    assert "24" in said and "32" in said and "Traceback" not in said
    write_pickle(tmp_path / "three.pkl", np.array([5, 1, 9]))
    assert run(monkeypatch, *target(folder, tmp_path / "o", "--ind", tmp_path / "three.pkl")) == 0
    assert "not refined" in capsys.readouterr().err
    assert read_poses(PosesDir(tmp_path / "o").poses)[0].shape == (3, 3, 3)


def test_an_all_zero_image_and_a_damaged_one(folder, oracle, tmp_path, monkeypatch, capsys) -> None:
    """They get finite poses, no confidence, and no place in the map."""
    images = open_particles(folder / "p.mrcs", ctf=folder / "ctf.pkl", need_poses=False, pixel_size=PIXEL)
    pixels = images.read(np.arange(N)).copy()
    pixels[3], pixels[11] = 0.0, 7.0
    with StackWriter(tmp_path / "p.mrcs", N, D, PIXEL) as out:
        out.write(pixels)
    command = ["fastar-infer", tmp_path / "p.mrcs", "-o", tmp_path / "o", "--map", folder / "ref.mrc", "--ctf",
               folder / "ctf.pkl", "--Apix", PIXEL, "--weights", folder / "target.safetensors"]  # fmt: skip
    assert run(monkeypatch, *command) == 0
    assert "2 images hold nothing" in capsys.readouterr().err
    out = PosesDir(tmp_path / "o")
    rotation, shift = read_poses(out.poses)
    assert np.isfinite(rotation).all() and np.isfinite(shift).all()
    assert {3, 11} <= set(read_indices(out.rejected).tolist())
    assert not np.load(out.confidence)[[3, 11], 0].any()


def test_a_killed_write_leaves_no_complete_folder(folder, oracle, tmp_path, monkeypatch) -> None:
    """infer.yaml comes last: where the map cannot be written it is not there."""

    def broken(*_, **__):
        raise OSError(28, "No space left on device", "map.mrc")

    monkeypatch.setattr(runs.output, "write_maps", broken)
    assert run(monkeypatch, *target(folder, tmp_path / "o", "--refine", 0)) == 2
    out = PosesDir(tmp_path / "o")
    assert out.poses.exists() and not out.summary.exists()
    with open(out.poses, "rb") as stream:
        assert len(pickle.load(stream)[0]) == N


def test_presets_by_name() -> None:
    """The name of a preset is one of the network's shapes."""
    assert runs.SHIPPED in SPECS


def test_help_is_fast() -> None:
    """Nothing heavy is imported for it."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "cryosuite", "fastar-infer", "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--map" in done.stdout
    assert not any(name in done.stderr for name in (" torch\n", " scipy\n", " pandas\n", " numpy\n"))
    assert time.monotonic() - began < 5
