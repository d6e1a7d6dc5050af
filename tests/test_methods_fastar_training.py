"""The training of pose prediction: same stream after a stop, the loss falls, a network that looks finds poses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cryosuite.data.multiview_weights import load_multiview
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError
from cryosuite.methods import fastar, fastar_options, fastar_run, fastar_validate
from cryosuite.methods.fastar import Fastar
from cryosuite.methods.fastar_loader import Molecules, SetLoader
from cryosuite.methods.fastar_options import FastarOptions
from cryosuite.methods.fastar_validate import Examiner
from cryosuite.nets.multiview import SPECS, MultiviewSpec
from cryosuite.simulate.beads import phantom_beads
from cryosuite.training.logs import read_metrics
from cryosuite.training.loop import fit
from cryosuite.training.method import Step
from cryosuite.training.options import TrainOptions

TINY = MultiviewSpec(32, 8, 32, 1, 2, 32, 1, 2, match_dim=32)
OPTIONS = FastarOptions("micro", views=(8, 8), beads=24, curriculum=10_000, templates=4, cones=0.0, neighbours=0.0)
TRAINING = TrainOptions(
    epochs=4, batch_size=16, lr=1e-3, ema=0.9, precision="32", accelerator="cpu", lr_final=0.0, log_every=1,
    checkpoint_every_minutes=1000,
)  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A micro preset that is smaller, and a coarse grid to validate on."""
    monkeypatch.setitem(SPECS, "micro", TINY)
    monkeypatch.setattr(fastar_validate, "GRID", 0)


def molecules(options: FastarOptions = OPTIONS, epoch: int = 80) -> Molecules:
    return Molecules(options.view_options(32, 1, False), epoch)


def train(path: Path, options: FastarOptions = OPTIONS, training: TrainOptions = TRAINING, **how) -> torch.nn.Module:
    return fit(Fastar(options, 3), molecules(options), RunDir(path), training, **how)


def test_twenty_steps_are_ten_and_ten(tmp_path):
    whole = train(tmp_path / "whole")
    stop = {"n": 0}

    class EnoughError(Exception):
        pass

    def interrupt(epoch: int, model: torch.nn.Module) -> None:
        stop["n"] += 1
        if stop["n"] == 2:
            raise EnoughError

    with pytest.raises(EnoughError):
        train(tmp_path / "parts", on_epoch=interrupt)
    parts = train(tmp_path / "parts", resume=True)
    a, b = whole.model.state_dict(), parts.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [r["loss"] for r in read_metrics(tmp_path / "whole" / "metrics.jsonl")] == [
        r["loss"] for r in read_metrics(tmp_path / "parts" / "metrics.jsonl")
    ]


def test_processes_share_out_a_batch_and_both_are_full():
    first, second = (SetLoader(molecules(), 16, rank, 2, seed=1) for rank in (0, 1))
    a, b = next(first.epoch(0)), next(second.epoch(0))
    assert len(a) == len(b) == 1 and not torch.equal(a.images, b.images)
    assert first.global_size(0) == 16 and first.weight(0) == 8 and len(first) == 5
    whole = next(SetLoader(molecules(), 16, seed=1).epoch(0))
    for part, one in enumerate((a, b)):  # the molecules, views and noise that one process alone would make
        for name in ("index", "rotation", "snr"):
            assert torch.equal(getattr(one, name), getattr(whole, name)[part::2]), name
        assert torch.allclose(one.images, whole.images[part::2], atol=1e-4)
        assert torch.allclose(one.candidates, whole.candidates[part::2], atol=1e-4)
    again = list(SetLoader(molecules(), 16, seed=1).epoch(3, start=2))
    assert len(again) == 3
    for wrong in (6, 15, 200):
        with pytest.raises(InputError, match="--batch-size"):
            SetLoader(molecules(), wrong, 0, 2)


def test_the_learning_rate_depends_on_the_length_in_its_last_fifth_only():
    method = Fastar(OPTIONS, warmup=10)
    factors = np.array([method.lr_factor(Step(k, 1000)) for k in range(1000)])
    longer = np.array([method.lr_factor(Step(k, 2000)) for k in range(1000)])
    assert np.array_equal(factors[:800], longer[:800])
    assert factors[0] == pytest.approx(0.1) and factors[500] == 1 and 0 < factors[-1] < 0.01


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_every_loss_reaches_its_part_of_the_network(weight):
    options = replace(OPTIONS, map_weight=weight, grid_order=1)
    method, things = Fastar(options), molecules(options)
    model = method.build(things)
    batch = next(SetLoader(things, 16).epoch(0))
    losses = method.loss(model, batch, Step(400, 1000))
    losses["loss"].backward()
    moved = {name for name, p in model.net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any(name.startswith("matcher") for name in moved) and any(name.startswith("enc_blocks") for name in moved)
    assert any(name.startswith("dec_blocks2") for name in moved) == (weight > 0)
    assert all(torch.isfinite(value) for value in losses.values())


def test_half_precision_learns_the_same():
    options = replace(OPTIONS, map_weight=1.0, grid_order=1)
    method, things = Fastar(options), molecules(options)
    model, batch = method.build(things), next(SetLoader(things, 16).epoch(0))
    found = []
    for half in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found.append({name: float(v.detach()) for name, v in method.loss(model, batch, Step(400, 1000)).items()})
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=0.05, abs=0.02), name


@pytest.mark.parametrize("rule", ["min", "anchor", "none"])
def test_ab_initio_sets_train(rule):
    options = replace(OPTIONS, mode="ab-initio", views=(3, 6), junk=0.2, hand_loss=rule, symmetric=0.0)
    method, things = Fastar(options), molecules(options)
    model = method.build(things)
    for batch in (next(SetLoader(things, 12).epoch(0)), SetLoader(things, 12).stream.batch(0, seen=10**9)):
        assert batch.candidates.shape[1] == 0 and batch.templates.shape[1] == 0
        losses = method.loss(model, batch, Step(400, 1000))
        losses["loss"].backward()
        assert torch.isfinite(losses["loss"]) and 0 <= losses["mirrored"] <= 1


def test_scores_are_written_beside_chance_and_weights_with_a_card(tmp_path):
    run = RunDir(tmp_path)
    things, method = molecules(), Fastar(OPTIONS, 3)
    held = phantom_beads(2, torch.Generator().manual_seed(2), 24).scaled(torch.full((2,), 200.0))
    examiner = Examiner(things, method, run, held, snrs=(10.0, 0.5), cases=2, views=8)
    notes = {"command": "cryosuite train-fastar", "seed": 0}
    write = fastar_run.after_epoch(run, OPTIONS, examiner, notes, 80)
    fit(method, things, run, replace(TRAINING, epochs=1), on_epoch=write)
    scores = fastar_run.last_scores(run)
    names = {f"{kind}_snr{snr}" for kind in ("phantom", "structure") for snr in ("10", "0.5")}
    assert {name.removesuffix("_deg") for name in scores if name.endswith("_deg")} == names
    assert all(0 <= scores[f"{name}_below"] <= 100 and 60 < scores[f"{name}_chance"] < 160 for name in names)
    model, said = load_multiview(run.path, TINY)
    assert said["mode"] == "target" and said["answers"] == "match" and said["images_seen"] == "80"
    card = fastar_run.card_file(run).read_text()
    assert "chance" in card and "phantom, SNR 10" in card and "verdict" in card
    with pytest.raises(InputError, match="fastar-infer"):
        fastar_run.load(run, {}, 1)


def test_structures_are_kept_in_the_run_and_some_held_out(tmp_path, shared, monkeypatch):
    monkeypatch.setattr(fastar_run, "STRUCTURE_BEADS", 48)
    names = ("1hfe", "1a4l", "1h1s")
    folder = tmp_path / "models"
    folder.mkdir()
    for name in names:
        (folder / f"{name}.cif.gz").symlink_to(shared / "data" / "atomic" / "train" / f"{name}.cif.gz")
    options = replace(OPTIONS, structures=f"both:{folder}", hold_out="1a4l")
    with pytest.warns(match="reading 3"):
        things, held = fastar_run.make_molecules(options, 80, RunDir(tmp_path / "run"))
    assert things.names == ["1h1s", "1hfe"] and len(held) == 1 and len(things.library) == 2
    again, _ = fastar_run.make_molecules(options, 80, RunDir(tmp_path / "run"))  # from the kept file, silently
    assert torch.equal(again.library.xyz, things.library.xyz)
    with pytest.raises(InputError, match="9xyz"):
        fastar_run.make_molecules(replace(options, hold_out="9xyz"), 80, RunDir(tmp_path / "run"))


@pytest.mark.slow
def test_the_loss_falls_in_sixty_steps(tmp_path):
    training = replace(TRAINING, epochs=12, lr=2e-3)
    train(tmp_path, training=training)
    losses = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(losses) == 60 and np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


def test_presets_are_those_of_the_networks():
    assert set(fastar_options.NAMES) == set(fastar_options.PRESETS) <= set(SPECS)
    assert fastar.DECAY == 0.2
