"""The loop as a whole: it learns, repeats itself bit for bit, and stops with a sentence where it must."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from training_toy import Toy, ToyOptions, options, toy_particles, train

from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, UserNotice
from cryosuite.formats.pickles import read_torch
from cryosuite.training import session
from cryosuite.training.checkpoint import load_into, load_state
from cryosuite.training.guard import TrainingDiverged
from cryosuite.training.logs import read_metrics
from cryosuite.training.loop import fit


def weights(result) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in result.model.parameters()])


def test_learns_and_writes_what_a_run_holds(tmp_path: Path) -> None:
    result = train(tmp_path, epochs=30, ema=0.9, save_every=15)
    run = RunDir(tmp_path)
    lines = read_metrics(run.metrics)
    assert result.epochs_done == 30 and result.stopped == "" and result.exit_code == 0
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"] and lines[-1]["step"] == 30 * 7
    assert {"step", "epoch", "loss", "size", "lr", "images_per_s", "seconds", "grad_norm"} <= lines[0].keys()
    assert lines[-1]["lr"] == pytest.approx(1e-4, rel=1e-3)  # the floor: 1 % of the peak
    assert run.weights(15).exists() and run.weights(30).exists() and not run.weights(1).exists()
    log = run.log.read_text()
    assert "torch" in log and "seed 0" in log and "finished 30 epochs" in log
    model = Toy().build(toy_particles())
    stored = load_state(run.weights(30), "weights")
    load_into(model, stored["model_state_dict"], run.weights(30))
    assert stored["epoch"] == 30
    for ours, theirs in zip(model.parameters(), result.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    first, second = train(tmp_path / "a"), train(tmp_path / "b")
    other = train(tmp_path / "c", seed=1)
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(other))


def test_short_intervals_do_not_change_the_training(tmp_path: Path) -> None:
    """Checkpointing every step, other log and save intervals: the same weights."""
    plain = train(tmp_path / "a")
    busy = train(tmp_path / "b", checkpoint_every_minutes=0, log_every=1, save_every=3)
    assert torch.equal(weights(plain), weights(busy))


def test_metrics_average_over_the_interval_weighted_by_images(tmp_path: Path) -> None:
    train(tmp_path / "a", log_every=1)
    train(tmp_path / "b", log_every=7)
    single, averaged = read_metrics(RunDir(tmp_path / "a").metrics), read_metrics(RunDir(tmp_path / "b").metrics)
    counts = np.array([16] * 6 + [4])
    losses = np.array([line["loss"] for line in single[:7]])
    assert averaged[0]["loss"] == pytest.approx((losses * counts).sum() / 100, rel=1e-5)


def test_micro_batches_are_the_same_training(tmp_path: Path) -> None:
    method = Toy(ToyOptions(noise=0.0))
    whole, cut = train(tmp_path / "a", method), train(tmp_path / "b", method, micro_batches=3)
    assert torch.allclose(weights(whole), weights(cut), atol=1e-5)


def test_nan_stops_names_the_images_and_leaves_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged) as caught:
        train(tmp_path, Toy(nan_at=12), checkpoint_every_minutes=0)
    run = RunDir(tmp_path)
    message = str(caught.value)
    assert "step 13" in message and "loss became nan" in message and str(run.checkpoint) in message
    kept = load_state(run.checkpoint, "a checkpoint")
    assert kept["place"]["step"] == 12
    assert all(torch.isfinite(value).all() for value in kept["model"].values())
    loader = session.GlobalBatches(toy_particles(), 16, 0, 1, seed=0)
    batch = list(loader.epoch(1))[12 - 7]
    assert all(str(1000 + int(row)) in message for row in batch.index)
    assert "diverged" in run.log.read_text()


def test_nan_between_reads_is_traced_back_to_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the losses are read once per interval: the first bad step is still the one named."""
    from cryosuite.training import guard

    collect, calls = guard.Meter.collect, []

    def rarely(self) -> None:
        calls.append(1)
        if len(self.fresh) >= 5:
            collect(self)

    monkeypatch.setattr(guard.Meter, "collect", rarely)
    with pytest.raises(TrainingDiverged, match="step 13:"):
        train(tmp_path, Toy(nan_at=12), save_every=3)


def test_a_broken_image_is_named_and_left_out(tmp_path: Path) -> None:
    particles = toy_particles()
    particles.images.array[37, 2, 3] = np.inf
    with pytest.warns(UserWarning, match=r"image 1037 \(0-based\): NaN or infinite pixels; left out \(1 so far\)"):
        result = fit(Toy(), particles, RunDir(tmp_path), options())
    assert np.isfinite(result.loss)


def test_an_exploding_loss_stops(tmp_path: Path) -> None:
    class Exploding(Toy):
        def loss(self, model, batch, step):
            losses = super().loss(model, batch, step)
            return losses | {"loss": losses["loss"] * (1000.0 if step.index >= 60 else 1.0)}

    with pytest.raises(TrainingDiverged, match="above 10 times its median for 50 steps"):
        train(tmp_path, Exploding(), epochs=40, lr=1e-5, checkpoint_every_minutes=0)
    assert load_state(RunDir(tmp_path).checkpoint, "a checkpoint")["place"]["step"] <= 60


def test_out_of_memory_halves_the_batch_once_and_says_so(tmp_path: Path) -> None:
    class Hungry(Toy):
        limit = 8

        def loss(self, model, batch, step):
            if len(batch.index) > self.limit:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return super().loss(model, batch, step)

    method = Hungry(ToyOptions(noise=0.0))
    with pytest.warns(UserNotice, match="2 pieces of 8 images"):
        halved = train(tmp_path / "a", method)
    whole = train(tmp_path / "b", Toy(ToyOptions(noise=0.0)))
    assert torch.allclose(weights(halved), weights(whole), atol=1e-5)
    assert "the machine ran out of memory" in RunDir(tmp_path / "a").log.read_text()
    Hungry.limit = 2
    with pytest.warns(UserNotice), pytest.raises(InputError, match="--batch-size"):
        train(tmp_path / "c", method)


def test_bf16_trains_on_the_cpu_too(tmp_path: Path) -> None:
    train(tmp_path, epochs=10, precision="bf16")
    lines = read_metrics(RunDir(tmp_path).metrics)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


def test_a_method_chooses_its_parameter_groups(tmp_path: Path) -> None:
    class Frozen(Toy):
        def parameter_groups(self, model):
            return [{"params": model[0].parameters(), "lr_scale": 0.0}, {"params": model[1].parameters()}]

    start = Frozen()
    session.seed_all(0)
    model = start.build(toy_particles())
    result = train(tmp_path, start)
    assert torch.allclose(model[0].weight, result.model[0].weight, atol=1e-6)
    assert not torch.allclose(model[1].weight, result.model[1].weight, atol=1e-3)


def test_one_batch_and_one_image(tmp_path: Path) -> None:
    assert train(tmp_path / "a", n=5, epochs=2).epochs_done == 2
    assert train(tmp_path / "b", n=1, epochs=1).epochs_done == 1


def test_a_finished_or_missing_run_is_not_trodden_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to resume"):
        train(tmp_path, resume=True)
    first = train(tmp_path)
    with pytest.raises(InputError, match="--resume"):
        train(tmp_path)
    again = train(tmp_path, resume=True)
    assert again.epochs_done == 3 and torch.equal(weights(first), weights(again))


def test_bad_options_are_one_sentence() -> None:
    bad_ones = ({"epochs": 0}, {"lr": 0}, {"ema": 1.0}, {"precision": "fp16"}, {"batch_size": 0}, {"betas": (0.9,)})
    for bad in (*bad_ones, {"seed": -1}, {"seed": 1 << 64}):
        with pytest.raises(InputError, match=f"--{next(iter(bad)).replace('_', '-')} "):
            options(**bad)


def test_every_line_of_metrics_is_json(tmp_path: Path) -> None:
    train(tmp_path)
    for line in RunDir(tmp_path).metrics.read_text().splitlines():
        assert isinstance(json.loads(line)["step"], int)


def test_memory_that_runs_out_is_no_damaged_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, epochs=1)

    def starve(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "load", starve)
    for read in (lambda path: load_state(path, "a checkpoint"), read_torch):
        with pytest.raises(MemoryError):
            read(RunDir(tmp_path).checkpoint)
