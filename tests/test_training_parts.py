"""The parts of the training room, one by one."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from training_toy import Toy, options, toy_particles

from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError
from cryosuite.training.ema import Ema
from cryosuite.training.inference import encode_all, encode_batches
from cryosuite.training.launch import (
    Shape,
    launch_shape,
    process_rank,
    resolve_precision,
    rng_state,
    seed_all,
    set_rng_state,
    was_restarted,
)
from cryosuite.training.method import Method, Step
from cryosuite.training.options import TrainOptions, plain
from cryosuite.training.runs import go_on_with, make_config, particles_path, read_run_config, start_run, train_options
from cryosuite.training.schedule import lr_factor, march
from cryosuite.training.shard import GlobalBatches, pieces


def test_learning_rate_rises_from_above_zero_and_falls_to_the_floor() -> None:
    curve = [lr_factor(step, 1000, warmup=0.05, floor=0.01) for step in range(1000)]
    assert curve[0] > 0 and curve[:51] == sorted(curve[:51]) and max(curve) == curve[50] == 1.0
    assert curve[50:] == sorted(curve[50:], reverse=True) and curve[-1] == pytest.approx(0.01)
    assert lr_factor(50 + 949 // 2, 1000, 0.05, 0.01) == pytest.approx(0.505, abs=0.002)
    assert [lr_factor(s, 1, 0.5, 0.01) for s in range(1)] == [1.0]
    assert all(0 < lr_factor(s, t, w, 0.1) <= 1 for t in (1, 2, 3) for w in (0, 0.5, 1) for s in range(t))


def test_marching_reaches_the_end_and_stays() -> None:
    assert march(0, 4, 16, 0.4) == 4 and march(0.2, 4, 16, 0.4) == pytest.approx(10)
    assert march(0.4, 4, 16, 0.4) == march(1, 4, 16, 0.4) == 16 == march(0, 4, 16, 0)


def test_step_fraction() -> None:
    assert Step(0, 10).fraction == 0 and Step(9, 10).fraction == 0.9


def test_the_toy_is_a_method() -> None:
    assert isinstance(Toy(), Method) and not isinstance(object(), Method)


def test_average_follows_its_formula_and_swaps_exactly() -> None:
    model = nn.Linear(2, 1, bias=False)
    ema = Ema(model, 0.999)
    expected = model.weight.detach().clone()
    for t in range(20):
        with torch.no_grad():
            model.weight += 1
        ema.update()
        decay = min(0.999, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    live = model.weight.detach().clone()
    with ema.swapped_in():
        assert torch.allclose(model.weight, expected)
    assert torch.equal(model.weight, live)
    other = Ema(nn.Linear(2, 1, bias=False), 0.999)
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.average[0], ema.average[0]) and other.updates == 20
    off = Ema(model, 0.0)
    off.update()
    with off.swapped_in():
        assert torch.equal(model.weight, live)


def test_random_states_round_trip() -> None:
    import random

    seed_all(3)
    random.gauss(0, 1), np.random.normal()
    state = rng_state()
    first = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1))
    set_rng_state(state)
    assert first == (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_the_batches_of_one(world_size: int) -> None:
    particles = toy_particles(101)
    single = [batch.index for batch in GlobalBatches(particles, 16, 0, 1, seed=4).epoch(2)]
    loaders = [GlobalBatches(particles, 16, rank, world_size, seed=4) for rank in range(world_size)]
    parts = [list(loader.epoch(2)) for loader in loaders]
    assert all(len(part) == len(single) == len(loaders[0]) for part in parts)
    for number, whole in enumerate(single):
        shares = [part[number].index[: loader.weight(number)] for part, loader in zip(parts, loaders, strict=True)]
        assert sorted(torch.cat(shares).tolist()) == sorted(whole.tolist())
        assert loaders[0].global_size(number) == len(whole)
    later = [batch.index.tolist() for batch in loaders[0].epoch(2, start=3)]
    assert later == [batch.index.tolist() for batch in parts[0][3:]]


def test_pieces_cut_every_field() -> None:
    from dataclasses import replace

    from cryosuite.kernels.ctf import CtfParams

    batch = next(iter(GlobalBatches(toy_particles(), 10, 0, 1).epoch(0)))
    table = torch.arange(90.0).reshape(10, 9)
    parts = pieces(replace(batch, ctf=CtfParams.from_table(table)), 3)
    assert [len(part.index) for part in parts] == [3, 4, 3]
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert torch.equal(torch.cat([part.ctf.defocus_u for part in parts]), table[:, 2])
    assert all(part.rotation is None for part in parts)
    assert pieces(batch, 1) == [batch] and len(pieces(batch, 99)) == 10


def test_latents_in_stack_order() -> None:
    method, particles = Toy(), toy_particles(101)
    model = method.build(particles).train()
    with torch.no_grad():
        expected = model[0](torch.from_numpy(particles.read(slice(None))).flatten(1)).numpy()
    z = encode_all(method, model, particles, 16)
    assert z.dtype == np.float32 and np.allclose(z, expected, atol=1e-6) and model.training
    rows = np.concatenate([rows for rows, _ in encode_batches(method, model, particles, 16)])
    assert np.array_equal(rows, np.arange(101))
    half = encode_all(method, model, particles, 16, precision="bf16")
    assert half.dtype == np.float32 and np.allclose(half, expected, atol=0.1) and not np.array_equal(half, z)


def test_launchers_decide_the_number_of_processes() -> None:
    chosen = options(devices=2, num_nodes=1)
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8", "RANK": "5"}
    srun = {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "3", "SLURM_PROCID": "2", "SLURM_NTASKS": "6"}
    assert launch_shape(chosen, {}) == Shape(2, 1, "self")
    assert launch_shape(chosen, torchrun) == Shape(4, 2, "torchrun") and process_rank(torchrun) == 5
    assert launch_shape(chosen, srun) == Shape(2, 3, "srun") and process_rank(srun) == 2
    batch_script = {"SLURM_NTASKS": "6", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}
    assert launch_shape(chosen, batch_script) == Shape(2, 1, "self") and process_rank(batch_script) == 0
    with pytest.raises(InputError, match="same number on every node"):
        launch_shape(chosen, {"SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_NUM_NODES": "2"})


@pytest.mark.parametrize(("capability", "precision"), [(7, "32-true"), (8, "bf16-mixed")])
def test_auto_is_bf16_only_on_cards_that_have_it(
    monkeypatch: pytest.MonkeyPatch, capability: int, precision: str
) -> None:
    """torch emulates bfloat16 on older cards (V100, T4) and calls that supported; it is slower than float32."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=capability))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True, raising=False)
    assert resolve_precision("auto", "cuda") == precision
    assert resolve_precision("bf16", "cuda") == "bf16-mixed"


def test_plain_values_only() -> None:
    value = plain({"a": (1, 2.5), "b": Path("x"), "c": np.float32(0.5), "d": options()})
    assert value["a"] == [1, 2.5] and value["b"] == "x" and value["c"] == 0.5 and value["d"]["betas"] == [0.9, 0.999]


def config_of(run: RunDir, particles: Path, method: str = "toy") -> dict:
    return make_config(method, particles, run, {"zdim": 3}, TrainOptions(lr=1e-3), ind=Path("ind.pkl"), poses=None)


def test_config_is_written_once_and_found_again(tmp_path: Path) -> None:
    particles = tmp_path / "work"
    particles.mkdir()
    run = RunDir(tmp_path / "runs" / "one")
    written = start_run(run, config_of(run, particles))
    assert read_run_config(run) == written and written["method"] == "toy" and written["options"] == {"zdim": 3}
    assert Path(written["ind"]).is_absolute() and written["poses"] is None
    assert train_options(written, epochs=7) == TrainOptions(lr=1e-3, epochs=7)
    assert particles_path(written, run) == particles
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "work").rename(moved / "work")
    (moved / "runs").mkdir()
    (tmp_path / "runs" / "one").rename(moved / "runs" / "one")
    there = RunDir(moved / "runs" / "one")
    assert particles_path(written, there).resolve() == (moved / "work").resolve()
    (moved / "work").rmdir()
    with pytest.raises(InputError, match="were they moved"):
        particles_path(written, there)


def test_a_limit_of_minutes_is_of_the_call_it_was_given_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path / "run")
    limited = make_config("toy", tmp_path, run, {}, TrainOptions(max_minutes=5.0))
    assert train_options(start_run(run, limited)).max_minutes == 5
    run.checkpoint.write_bytes(b"x")
    assert train_options(start_run(run, config_of(run, tmp_path), resume=True)).max_minutes is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the same job once more, with the words it was submitted with
    assert train_options(start_run(run, limited)).max_minutes == 5


def test_a_run_is_never_overwritten_by_accident(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(InputError, match="it holds no run"):
        start_run(run, config_of(run, tmp_path), resume=True)
    stored = start_run(run, config_of(run, tmp_path))
    with pytest.raises(InputError, match="--overwrite"):
        start_run(run, config_of(run, tmp_path))
    with pytest.raises(InputError, match="not reached a first checkpoint"):
        start_run(run, config_of(run, tmp_path), resume=True)
    start_run(run, config_of(run, tmp_path), resume="auto")  # nothing to lose yet
    run.checkpoint.write_bytes(b"x")
    with pytest.raises(InputError, match="add --resume"):
        start_run(run, config_of(run, tmp_path))
    again = start_run(run, config_of(run, tmp_path / "." / "run" / ".."), resume=True)  # the same, typed otherwise
    assert again["particles"] == stored["particles"]
    with pytest.raises(InputError, match="is a run of train-toy, not of train-hype"):
        start_run(run, config_of(run, tmp_path, "hype"), resume="auto")
    for name in ("z.3.pkl", "weights.3.pkl", "weights.best.pkl", "notes.txt"):
        (run.path / name).write_text("mine")
    run.analysis(3).path.mkdir()
    start_run(run, config_of(run, tmp_path), overwrite=True)
    left = sorted(path.name for path in run.path.iterdir())
    assert left == ["analyze.3", "config.yaml", "notes.txt", "weights.best.pkl"]


def test_a_run_goes_on_with_its_own_particles_wherever_they_are_now(tmp_path: Path) -> None:
    run, work = RunDir(tmp_path / "run"), tmp_path / "work"
    other = tmp_path / "other"
    work.mkdir()
    other.mkdir()
    start_run(run, config_of(run, work / "dataset.yaml"))
    (work / "dataset.yaml").touch()
    run.checkpoint.write_bytes(b"x")
    assert particles_path(start_run(run, config_of(run, work), resume=True), run) == work / "dataset.yaml"
    for wrong in (other, tmp_path / "absent"):
        with pytest.raises(InputError, match=f"{wrong}: .* was begun with {work}"):
            start_run(run, config_of(run, wrong), resume=True)
    work.rename(tmp_path / "moved")
    again = start_run(run, config_of(run, tmp_path / "moved"), resume=True)
    assert particles_path(again, run) == tmp_path / "moved"


def test_another_end_is_remembered(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    config = start_run(run, config_of(run, tmp_path))
    assert go_on_with(run, config, epochs=9, devices=2, max_minutes=3.0).devices == 2
    kept = read_run_config(run)
    assert kept["training"] == config["training"] | {"epochs": 9}
    before = run.config.stat().st_mtime_ns
    assert go_on_with(run, kept).epochs == 9 and run.config.stat().st_mtime_ns == before


def test_only_the_first_process_writes_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path / "run")
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert start_run(run, config_of(run, tmp_path))["method"] == "toy"
    assert not run.path.exists()


def test_a_requeued_job_goes_on_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path / "run")
    start_run(run, config_of(run, tmp_path), overwrite=True)
    run.checkpoint.write_bytes(b"x")
    assert not was_restarted({}) and not was_restarted({"SLURM_RESTART_COUNT": "0"})
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    start_run(run, config_of(run, tmp_path), overwrite=True)
    assert run.checkpoint.exists(), "the first start overwrote, the second goes on"


def test_lr_curve_is_a_cosine() -> None:
    values = [lr_factor(s, 101, 0.0, 0.0) for s in range(101)]
    assert values[25] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
