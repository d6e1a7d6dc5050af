"""``cryosuite pretrain-lvm`` from the command line: a short pre-training, resume, the paper, nonsense refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cryosuite.cli import app
from cryosuite.commands.pretrain_lvm import list_maps
from cryosuite.commands.training_options import ends
from cryosuite.data.map_weights import load_map_encoder
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError
from cryosuite.formats.config import read_yaml
from cryosuite.formats.mrc import write_map
from cryosuite.methods import load_run, lvm_validate
from cryosuite.nets.map_vit import VitEncoder
from cryosuite.training.logs import read_metrics

SHORT = (
    "--structures", "phantom:3", "--hold-out", "1", "--size", "micro", "--crop", "24", "--volume", "32",
    "--crops-per-volume", "4", "--mix", "2", "--images", "16", "--every", "8", "-b", "4", "--accelerator", "cpu",
)  # fmt: skip


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer crops to be scored."""
    monkeypatch.setattr(lvm_validate, "EACH", 1)


def command(*arguments: object, name: str = "pretrain-lvm") -> str:
    """Run a command; output, or the exception it ended with."""
    result = CliRunner().invoke(app, [name, *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.filterwarnings("ignore::cryosuite.errors.UserNotice")
def test_pretrains_goes_on_and_leaves_an_encoder_with_a_card(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    shown = command("-o", run.path, *SHORT)
    assert "spread of the embeddings" in shown and "train-lvm" in shown
    encoder, notes = load_map_encoder(run.encoder)
    assert encoder.spec.d == 8 and encoder.spec.drop_path == 0
    assert notes["images_seen"] == 16 and notes["objective"] == "jepa" and notes["norm"] == "robust"
    assert "crops seen: 16 of 24^3" in run.card.read_text() and "JEPA" in run.card.read_text()
    scores = [record for record in read_metrics(run.metrics) if "heldout_probe_density" in record]
    assert [record["epoch"] for record in scores] == [1, 2]
    with pytest.raises(InputError, match="--resume"):
        command("-o", run.path, *SHORT)
    command("-o", run.path, "--resume", "--images", "24")
    notes = load_map_encoder(run.encoder)[1]
    assert notes["images_seen"] == 24 and "--resume --images 24" in notes["command"]
    with pytest.raises(InputError, match="no z"):  # it has no latents to analyze
        load_run(run.path, 1)


@pytest.mark.filterwarnings("ignore::cryosuite.errors.UserNotice")
def test_a_time_budget_stops_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    shown = command("-o", run.path, *SHORT, "--max-hours", "1e-6")
    assert "stopped by max_minutes" in shown and run.checkpoint.is_file() and not run.encoder.exists()
    command("-o", run.path, "--resume")
    assert load_map_encoder(run.encoder)[1]["images_seen"] == 16


@pytest.mark.filterwarnings("ignore::cryosuite.errors.UserNotice")
def test_the_paper_and_the_ablation(tmp_path: Path) -> None:
    command("-o", tmp_path / "a", *SHORT, "--images", "8", "--preset", "paper", "--objective", "mae", "--net", "vit")
    options = read_yaml(tmp_path / "a" / "config.yaml")["options"]
    assert (options["mask_mode"], options["norm"], options["mask_ratio"]) == ("random", "paper", 0.6)
    encoder, notes = load_map_encoder(RunDir(tmp_path / "a").encoder)
    assert isinstance(encoder, VitEncoder) and notes["objective"] == "mae"
    command("-o", tmp_path / "b", *SHORT, "--images", "8", "--mask-at", "embedding", "--weight-decay", "0:0.1")
    config = read_yaml(tmp_path / "b" / "config.yaml")
    assert config["options"]["decay"] == [0, 0.1] and config["options"]["mask_at"] == "embedding"
    assert config["training"]["ema"] == 0 and config["training"]["lr"] == 3e-4


def test_maps_and_spans(tmp_path: Path) -> None:
    write_map(tmp_path / "a.mrc", np.zeros((4, 4, 4), np.float32), 1.0)
    (tmp_path / "notes.txt").write_text("no map")
    assert list_maps([tmp_path]) == (str(tmp_path / "a.mrc"),) == list_maps([tmp_path / "a.mrc"])
    assert list_maps(None) == () and ends("2.5:8", "--x") == (2.5, 8) and ends("3", "--x") == (3, 3)
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "empty", tmp_path / "absent.mrc"):
        with pytest.raises(InputError, match=wrong.name):
            list_maps([wrong])


def test_nonsense_is_refused_with_a_word_on_what_to_do(tmp_path: Path) -> None:
    for wrong, said in (
        (("--preset", "best"), "--preset"), (("--size", "huge"), "--size"), (("--net", "cnn"), "--net"),
        (("--objective", "moco"), "--objective"), (("--mask-at", "end"), "--mask-at"), (("--crop", "30"), "--crop"),
        (("--mask-mode", "x"), "--mask-mode"), (("--mask-ratio", "1"), "--mask-ratio"), (("--volume", "8"), "--volume"),
        (("--volume", "30"), "--volume"), (("--images", "many"), "--images"), (("--resolution", "a"), "--resolution"),
        (("--structures", str(tmp_path / "nowhere")), "nowhere"), ((str(tmp_path / "no.mrc"),), "no.mrc"),
        (("--weight-decay", "a:b"), "--weight-decay"), (("--objective", "mae", "--mask-at", "embedding"), "jepa"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            command("-o", tmp_path / "run", *SHORT, "--overwrite", *wrong)
    with pytest.raises(InputError, match="nothing to resume"):
        command("-o", tmp_path / "other", "--resume")
