"""``cryosuite pretrain-iev`` from the command line: lists of sets, a short training, resume, features for analyze."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_methods_iev import SMALL, stacks
from typer.testing import CliRunner

from cryosuite.cli import app
from cryosuite.commands.training_options import count, rounds
from cryosuite.data.encoder_weights import load_encoder, save_encoder
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, UserNotice
from cryosuite.formats.config import read_yaml, write_yaml
from cryosuite.formats.pickles import read_latent
from cryosuite.formats.stacks import StackWriter
from cryosuite.methods import iev_run, load_run
from cryosuite.methods.iev_options import IevOptions
from cryosuite.methods.iev_run import SimulateOptions, list_sets, molecules
from cryosuite.nets import ief
from cryosuite.simulate.phantoms import make_phantoms
from cryosuite.simulate.pool import PoolOptions
from cryosuite.simulate.sources import from_phantom
from cryosuite.training.logs import read_metrics

SHORT = ("--preset", "tiny", "--images", "64", "--every", "32", "-b", "16", "--accelerator", "cpu", "--views", "4")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny preset that is tinier."""
    monkeypatch.setitem(ief.SPECS, "vit_tiny", SMALL)


def command(*arguments: object) -> str:
    """Run ``cryosuite pretrain-iev``; output, or the exception it ended with."""
    result = CliRunner().invoke(app, ["pretrain-iev", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def make_stack(path: Path, n: int = 24, seed: int = 0) -> Path:
    """A bare stack of noise with blobs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with StackWriter(path, n, 24, 2.0) as writer:
        writer.write(stacks(n, 24, seed).read(np.arange(n)))
    return path


def test_numbers_of_images_as_people_write_them() -> None:
    assert [count(text, "--images") for text in ("5000", "300k", "10M", "1.5k")] == [5000, 300_000, 10_000_000, 1500]
    for wrong in ("many", "0", "-3k", ""):
        with pytest.raises(InputError, match="--images"):
            count(wrong, "--images")


def test_no_image_is_left_out_whatever_the_tests_between() -> None:
    assert rounds(100_000, 50_000, 50) == (2, 50_000)
    assert rounds(100_000, 60_000, 32) == (1, 100_000)
    assert rounds(992, 99, 32) == (10, 96)
    assert rounds(32, 100, 32) == (1, 32)


def test_something_is_held_out_where_phantoms_stand_beside_one_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_phantoms(6, np.random.default_rng(0))
    some = [from_phantom(phantom, f"phantom{i}" if i else "mine") for i, phantom in enumerate(made)]
    monkeypatch.setattr(iev_run, "load_structures", lambda *_: some)
    train, held = molecules(SimulateOptions("mine.pdb,phantom:5", "8"))
    assert len(train) == len(held) == 3


def test_a_lone_molecule_held_out_is_told_from_others(tmp_path: Path) -> None:
    """Of one alone every neighbour is right, whatever the encoder."""
    told = SimulateOptions("phantom:3", "1", pool=PoolOptions(2, 32))
    with pytest.warns(UserNotice, match="alone is held out: 8 made-up molecules"):
        _, held = iev_run.make_corpus([], told, IevOptions(), RunDir(tmp_path), 32, False, "cpu")
    assert len(np.unique(held[1])) == 9


def test_sets_come_from_files_folders_and_lists(tmp_path: Path) -> None:
    one, two = make_stack(tmp_path / "a" / "one.mrcs"), make_stack(tmp_path / "a" / "two.mrcs")
    assert [entry.path for entry in list_sets([tmp_path / "a"])] == [one, two]
    write_yaml(tmp_path / "all.yaml", {"sets": [{"path": "a/one.mrcs", "weight": 3}, "a/two.mrcs"]})
    entries = list_sets([tmp_path / "all.yaml", two])
    assert [(entry.path.name, entry.weight) for entry in entries] == [
        ("one.mrcs", 3.0),
        ("two.mrcs", None),
        ("two.mrcs", None),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no particle sets"):
        list_sets([tmp_path / "empty"])
    for wrong in (
        {"sets": []},
        {"sets": [{"weight": 1}]},
        {"sets": [{"path": "x", "colour": 1}]},
        {"sets": [{"path": "x", "weight": "a"}]},
    ):
        write_yaml(tmp_path / "wrong.yaml", wrong)
        with pytest.raises(InputError, match="wrong.yaml"):
            list_sets([tmp_path / "wrong.yaml"])


def test_trains_on_files_and_simulation_and_goes_on(tmp_path: Path) -> None:
    stack, run = make_stack(tmp_path / "one.mrcs"), tmp_path / "run"
    command(stack, "--Apix", 2, "--simulate", "phantom:4", "--hold-out", 2, "--cache", "-o", run, *SHORT)
    config = read_yaml(run / "config.yaml")
    assert config["method"] == "iev"
    assert config["sets"][0]["path"] == str(stack)
    assert (run / "images.0.u8").stat().st_size == 24 * 56 * 56
    assert [r["epoch"] for r in read_metrics(RunDir(run).metrics) if "knn" in r] == [1, 2]
    loaded = load_encoder(run / "encoder.safetensors")
    assert loaded.prep == "standard"
    assert "pretrain-iev" in loaded.notes["trained_by"]
    with pytest.raises(InputError, match="holds a run already"):
        command(stack, "--Apix", 2, "-o", run, *SHORT)
    command("-o", run, "--resume")
    with pytest.raises(InputError, match="no z.N.pkl"):
        load_run(run)


def test_features_go_to_analyze(tmp_path: Path) -> None:
    stack = make_stack(tmp_path / "one.mrcs", 60)
    torch.manual_seed(0)
    save_encoder(tmp_path / "e.safetensors", ief.IefEncoder(SMALL), "standard", 0.5, 0.12, {})
    out = tmp_path / "features"
    command(stack, "--Apix", 2, "--encode", "--weights", tmp_path / "e.safetensors", "-o", out, "--accelerator", "cpu")
    z = read_latent(RunDir(out).z(1))[0]
    assert z.shape == (60, 32)
    loaded = load_run(out)
    assert loaded.decode is None
    np.testing.assert_array_equal(loaded.z, z)
    result = CliRunner().invoke(app, ["analyze", str(out), "--ksample", "3", "--gmm", "2", "--skip-umap"])
    assert result.exit_code == 0, result.output
    assert (out / "analyze.1" / "labels.pkl").is_file() or list((out / "analyze.1").rglob("labels.pkl"))
    with pytest.raises(InputError, match="prep"):
        command(stack, "--encode", "--weights", tmp_path / "e.safetensors", "--prep", "ief", "-o", tmp_path / "x")
    with pytest.raises(InputError, match="nothing to resume"):
        command("-o", out, "--overwrite", "--resume")


def test_nothing_and_nonsense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to train on"):
        command("-o", tmp_path / "run")
    with pytest.raises(InputError, match="one particle set"):
        command("--encode", "-o", tmp_path / "run")
    with pytest.raises(InputError, match="goes with --encode"):
        command("x.star", "--weights", "iev-tiny", "-o", tmp_path / "run")
    with pytest.raises(InputError, match="--snr"):
        command("--simulate", "phantom:4", "--snr", "2", "-o", tmp_path / "run", *SHORT)
    with pytest.raises(InputError, match="no encoder 'iev-huge'"):
        command(make_stack(tmp_path / "s.mrcs"), "--encode", "--weights", "iev-huge", "-o", tmp_path / "run")
    assert not (tmp_path / "run").exists()
