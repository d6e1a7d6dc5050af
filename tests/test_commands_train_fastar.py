"""``cryosuite train-fastar`` from the command line: a short training, resume, tuning on a map, nonsense refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cryosuite.cli import app
from cryosuite.commands.options import say_without_effect
from cryosuite.data.multiview_weights import load_multiview
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, UserNotice
from cryosuite.formats.config import read_yaml
from cryosuite.formats.mrc import write_map
from cryosuite.methods import fastar_validate, load_run
from cryosuite.methods.fastar_options import FastarOptions
from cryosuite.nets.multiview import SPECS, MultiviewSpec
from cryosuite.training.logs import read_metrics

TINY = MultiviewSpec(32, 8, 32, 1, 2, 32, 1, 2, match_dim=32)
SHORT = ("--preset", "micro", "--images", "64", "--every", "32", "-b", "16", "--views", "8", "--accelerator", "cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A micro preset that is smaller, and a coarse grid to validate on."""
    monkeypatch.setitem(SPECS, "micro", TINY)
    monkeypatch.setattr(fastar_validate, "GRID", 0)


def command(*arguments: object) -> str:
    """Run ``cryosuite train-fastar``; output, or the exception it ended with."""
    result = CliRunner().invoke(app, ["train-fastar", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_trains_goes_on_and_writes_weights_with_a_card(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shown = command("-o", run, *SHORT)
    assert "chance" in shown and "verdict" in shown and "fastar-infer" in shown
    model, notes = load_multiview(run, TINY)
    assert notes["images_seen"] == "64" and notes["mode"] == "target" and "train-fastar" in notes["trained_by"]
    assert json.loads(notes["scores"])["phantom_snr10_chance"] > 60
    assert (run / "model_card.md").is_file()
    with pytest.raises(InputError, match="--resume"):
        command("-o", run, *SHORT)
    command("-o", run, "--resume", "--images", "96")
    _, notes = load_multiview(run)
    assert notes["images_seen"] == "96" and "--resume --images 96" in notes["command"]
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl") if "phantom_snr1_deg" in r][-1] == 6
    with pytest.raises(InputError, match="no z"):  # it has no latents to analyze
        load_run(run, 1)


def test_goes_on_without_the_weights_it_started_from_and_leaves_none_of_a_run_it_replaces(tmp_path: Path) -> None:
    first, run = tmp_path / "first", tmp_path / "run"
    command("-o", first, *SHORT)
    command("-o", run, *SHORT, "--weights", first / "weights.safetensors", "--max-hours", "1e-6")
    (first / "weights.safetensors").unlink()
    with pytest.warns(UserNotice, match="^--snr, --views: not used"):
        command("-o", run, "--resume", "--snr", "1:0.1", "--views", "4", "--log-interval", "5")
    assert load_multiview(run)[1]["images_seen"] == "64"
    shown = command("-o", run, *SHORT, "--overwrite", "--max-hours", "1e-6")
    assert not list(run.glob("weights.safetensors")) and "fastar-infer" not in shown


def test_options_that_change_nothing_are_told() -> None:
    idle = FastarOptions("micro").without_effect({"junk", "hand_loss", "templates", "full_map", "snr", "structures"})
    assert set(idle) == {"junk", "hand_loss", "templates", "full_map"}
    assert FastarOptions("micro").without_effect({"hold_out"})
    assert not FastarOptions("micro", structures="both:pdb").without_effect({"hold_out"})
    blind = FastarOptions("micro", mode="ab-initio", views=(3, 8)).without_effect({"junk", "hard", "snr"})
    assert blind == {"hard": "with --mode ab-initio"}
    real, names = {"map": "m.mrc", "finetune": "p.star"}, {"snr", "curriculum", "hold_out"}
    assert set(FastarOptions("micro", **real).without_effect(names)) == names
    assert not FastarOptions("micro", **real, views=(3, 8)).without_effect({"curriculum"})  # it is that of the views
    with pytest.warns(UserNotice) as told:
        say_without_effect(idle)
    assert [str(one.message) for one in told] == [
        "--hand-loss, --junk: no effect with --mode target",
        "--full-map: no effect without --map",
        "--templates: no effect without --map-weight",
    ]


def test_a_time_budget_stops_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shown = command("-o", run, *SHORT, "--max-hours", "1e-6")
    assert "stopped by max_minutes" in shown and RunDir(run).checkpoint.is_file()
    command("-o", run, "--resume")
    assert load_multiview(run)[1]["images_seen"] == "64"


def test_ab_initio_says_that_it_is_experimental(tmp_path: Path) -> None:
    shown = command("-o", tmp_path, *SHORT[:-4], "--views", "3:8", "--accelerator", "cpu", "--mode", "ab-initio")
    assert "--experimental" in shown and "G4" in shown
    assert load_multiview(tmp_path)[1]["answers"] == "star"
    assert read_yaml(tmp_path / "config.yaml")["options"]["views"] == [3, 8]


def blobs(path: Path) -> Path:
    """A map of a few blobs, 6 A per pixel."""
    axis = np.arange(48) - 24
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    volume = np.zeros((48,) * 3, np.float32)
    for cx, cy, cz, width in ((0, 0, 0, 4), (9, 0, 3, 3), (-5, 8, 0, 3), (0, -4, -9, 2.5)):
        volume += np.exp(-((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2) / (2 * width**2))
    write_map(path, volume.astype(np.float32), 6.0)
    return path


def test_tunes_on_a_map_from_given_weights(tmp_path: Path) -> None:
    command("-o", tmp_path / "first", *SHORT)
    first, _ = load_multiview(tmp_path / "first")
    path = blobs(tmp_path / "blobs.mrc")
    shown = command("-o", tmp_path / "tuned", *SHORT, "--map", path, "--weights", tmp_path / "first", "--lr", "1e-9")
    assert "target, SNR 1" in shown
    tuned, _ = load_multiview(tmp_path / "tuned")
    for name, value in first.state_dict().items():
        assert torch.allclose(value, tuned.state_dict()[name], atol=1e-3), name  # the start is what was given


def test_nonsense_is_refused_with_a_word_on_what_to_do(tmp_path: Path) -> None:
    for wrong, said in (
        (("--preset", "paper"), "--preset"), (("--mode", "both"), "--mode"), (("--views", "a:b"), "--views"),
        (("--snr", "1:2:3"), "--snr"), (("--images", "many"), "--images"), (("--finetune", "p.star"), "--map"),
        (("--structures", str(tmp_path / "nowhere")), "nowhere"), (("--map", str(tmp_path / "no.mrc")), "no.mrc"),
        (("--weights", str(tmp_path / "no.safetensors")), "no.safetensors"), (("-b", "4"), "--batch-size"),
        (("--mode", "ab-initio", "--map", "x.mrc"), "ab-initio"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            command("-o", tmp_path / "run", *SHORT, "--overwrite", *wrong)
