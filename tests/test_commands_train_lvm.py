"""``cryosuite train-lvm`` from the command line: each task, starts from an encoder or a network, resume, nonsense."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from forked import together
from test_commands_pretrain_lvm import SHORT, command, few  # noqa: F401 -- a fixture
from test_data_map_sets import folder as pair_folder  # noqa: F401 -- a fixture

from cryosuite.data.map_weights import load_map_weights, save_map_encoder
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError
from cryosuite.formats.config import read_yaml
from cryosuite.methods import load_run, lvm_run
from cryosuite.nets.map_vit import MapVit
from cryosuite.nets.scunet import Encoder, ScunetSpec
from cryosuite.ranks import process_rank
from cryosuite.training.logs import read_metrics

UNSIZED = tuple(part for part in SHORT if part not in ("--size", "micro"))


def train(*arguments: object) -> str:
    return command(*arguments, name="train-lvm")


def encoder(path: Path, norm: str = "robust") -> Path:
    save_map_encoder(path, Encoder(ScunetSpec(d=8, drop_path=0.0)), {"norm": norm})
    return path


@pytest.mark.parametrize(("task", "voxel"), [("sharpen", 1.0), ("superres", 1.0), ("wedge", 10.0)])
def test_each_task_leaves_weights_with_a_card(task: str, voxel: float, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    shown = train("-o", tmp_path, "--task", task, *SHORT, "--images", "8", "--overwrite")
    assert "the map given" in shown and "lvm-sharpen" in shown
    found = load_map_weights(run.network)
    assert (found.task, found.voxel, found.norm) == (task, voxel, "robust") and found.net.spec.d == 8
    assert found.notes["images_seen"] == 8 and found.notes["scores"]["cc_mask_input"] <= 1
    assert "CC inside the molecule" in run.card.read_text() and f"{voxel:g} A per voxel" in run.card.read_text()
    record = [record for record in read_metrics(run.metrics) if "cc_mask" in record][-1]
    assert {"mse", "mse_input", "hist", "hist_input", "cc_mask_input"} <= record.keys()


def test_goes_on_from_an_encoder_and_then_from_that_network(tmp_path: Path) -> None:
    start = encoder(tmp_path / "encoder.safetensors")
    train("-o", tmp_path / "run", "--task", "sharpen", *UNSIZED, "--init", tmp_path)
    config = read_yaml(tmp_path / "run" / "config.yaml")
    assert config["options"]["start"] == str(start) and config["options"]["frozen"] == 0.1
    assert config["options"]["encoder_lr"] == pytest.approx(1 / 3) and config["training"]["lr"] == 3e-4
    with pytest.raises(InputError, match="--resume"):
        train("-o", tmp_path / "run", "--task", "sharpen", *SHORT)
    start.unlink()  # what it started from is in its checkpoint
    shown = train("-o", tmp_path / "run", "--resume", "--images", "24")
    assert "3 rounds done" in shown and load_map_weights(RunDir(tmp_path / "run").network).notes["images_seen"] == 24
    train("-o", tmp_path / "next", "--task", "superres", *UNSIZED, "--weights", tmp_path / "run", "--lr", "1e-9")
    first, second = (load_map_weights(RunDir(tmp_path / name).network) for name in ("run", "next"))
    assert second.task == "superres"
    for name, value in first.net.state_dict().items():
        assert np.allclose(value, second.net.state_dict()[name], atol=1e-3), name
    with pytest.raises(InputError, match="no z"):  # it has no latents to analyze
        load_run(tmp_path / "next", -1)


def test_the_paper_and_the_ablation(tmp_path: Path) -> None:
    train("-o", tmp_path, "--task", "sharpen", *SHORT, "--images", "8", "--preset", "paper", "--net", "vit")
    options = read_yaml(tmp_path / "config.yaml")["options"]
    assert (options["alpha"], options["hist_mask"], options["norm"]) == (0.5, "whole", "paper")
    assert isinstance(load_map_weights(RunDir(tmp_path).network).net, MapVit)


def test_what_one_process_cannot_read_ends_all(tmp_path: Path) -> None:
    def before() -> None:
        def fails(*_: object) -> None:
            raise InputError("pairs.csv: map 3 is not there")

        if process_rank() == 1:
            lvm_run.make_crops = fails

    words = ["train-lvm", "--task", "sharpen", *SHORT, "-o", tmp_path / "run"]
    ended = together(tmp_path / "said", words, 2, 60, before, ended=False)
    assert [one.code for one in ended] == [2, 2], ended
    assert "map 3 is not there" in ended[0].err and "Traceback" not in ended[0].err + ended[1].err


def test_resume_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to resume"):
        train("-o", tmp_path / "run", "--resume")


def test_options_that_could_do_nothing_are_refused(tmp_path: Path) -> None:
    for wrong in (("--net", "vit", "--drop-path", "0.1"), ("--encoder-lr", "0")):
        with pytest.raises(InputError, match=wrong[-2]):
            train("-o", tmp_path / "run", "--task", "sharpen", *SHORT, *wrong)


@pytest.mark.filterwarnings("ignore::cryosuite.errors.UserNotice")
def test_the_users_own_pairs_and_maps(request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("pair_folder")
    train("-o", folder / "run", "--task", "sharpen", *SHORT, "--images", "8", "--pairs", folder)
    assert read_yaml(folder / "run" / "config.yaml")["options"]["pairs"] == str(folder)
    assert load_map_weights(RunDir(folder / "run").network).notes["images_seen"] == 8
    command("-o", folder / "pre", folder / "alone.mrc", folder / "one.map", *SHORT, "--images", "8")
    assert len(read_yaml(folder / "pre" / "config.yaml")["options"]["maps"]) == 2


def test_it_ends_early(tmp_path: Path) -> None:
    more = ("--images", "64", "--lr", "1e-9", "--ema", "0", "--patience", "1")
    shown = train("-o", tmp_path, "--task", "sharpen", *SHORT, *more)
    scores = [record["cc_mask"] for record in read_metrics(tmp_path / "metrics.jsonl") if "cc_mask" in record]
    assert "ended early" in shown and len(scores) < 8


def test_another_scale_of_grey_values_is_told(tmp_path: Path) -> None:
    start = encoder(tmp_path / "encoder.safetensors", "paper")
    with pytest.warns(UserWarning, match="--norm paper"):
        train("-o", tmp_path / "a", "--task", "sharpen", *UNSIZED, "--images", "8", "--init", start, "--norm", "robust")
    train("-o", tmp_path / "b", "--task", "sharpen", *UNSIZED, "--images", "8", "--init", start)
    assert load_map_weights(RunDir(tmp_path / "b").network).norm == "paper"  # as it was


def test_nonsense_is_refused_with_a_word_on_what_to_do(tmp_path: Path) -> None:
    start = encoder(tmp_path / "encoder.safetensors")
    for wrong, said in (
        ((), "--task"), (("--task", "denoise"), "--task"), (("--init", tmp_path / "no"), "no"),
        (("--init", start, "--size", "small"), "--size"), (("--init", start, "--net", "vit"), "--net"),
        (("--init", start, "--weights", "sharpen"), "--init and --weights"), (("--weights", start), "encoder"),
        (("--frozen", "0.2"), "--frozen"), (("--alpha", "2"), "--alpha"), (("--hist-mask", "x"), "--hist-mask"),
        (("--pairs", tmp_path / "nowhere"), "nowhere"), (("--patience", "-1"), "--pat"),
    ):  # fmt: skip
        task = () if "--task" in wrong or not wrong else ("--task", "sharpen")
        size = SHORT if "--init" not in wrong else UNSIZED
        with pytest.raises(InputError, match=said):
            train("-o", tmp_path / "run", *task, *size, "--overwrite", *wrong)
