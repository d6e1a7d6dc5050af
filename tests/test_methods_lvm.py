"""Training of map networks: same stream after a stop, losses fall, guards fire, encoders load, what is frozen stays."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cryosuite.data.map_weights import load_map_encoder, load_map_weights, save_map_encoder, save_map_weights
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, UserNotice
from cryosuite.kernels.map_losses import shell_loss, ssim
from cryosuite.methods import lvm_validate
from cryosuite.methods.lvm import Pretrain
from cryosuite.methods.lvm_loader import CropBatch, CropLoader, Crops
from cryosuite.methods.lvm_options import LvmOptions, PretrainOptions, TrainLvmOptions, net_spec
from cryosuite.methods.lvm_run import after_pretrain_epoch, after_train_epoch, best_epoch, history, make_crops
from cryosuite.methods.lvm_start import fill, find_start, start_as_identity
from cryosuite.methods.lvm_train import TrainLvm
from cryosuite.methods.lvm_validate import Examiner, PretrainExaminer, cc_mask, held_crops, map_scores
from cryosuite.nets.map_vit import MapVit, MapVitSpec, VitEncoder
from cryosuite.nets.scunet import Encoder, Scunet, ScunetSpec
from cryosuite.training.logs import read_metrics
from cryosuite.training.loop import fit
from cryosuite.training.method import Step
from cryosuite.training.options import TrainOptions

SPEC = asdict(ScunetSpec(d=8, drop_path=0.0))
SMALL = {"spec": SPEC, "structures": "phantom:3", "hold_out": "1", "crop": 24, "volume": 32, "crops_per_volume": 4}
TRAIN = TrainLvmOptions(**SMALL, mix=2)
PRE = PretrainOptions(**SMALL, mix=2)
TRAINING = TrainOptions(
    epochs=2, batch_size=4, lr=1e-3, ema=0.9, precision="32", accelerator="cpu", log_every=1, weight_decay=0.04,
    checkpoint_every_minutes=1000,
)  # fmt: skip


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer crops to be scored."""
    monkeypatch.setattr(lvm_validate, "EACH", 1)


def crops(options: LvmOptions = TRAIN, epoch: int = 16, task: str = "sharpen", tmp: Path = Path("absent")) -> Crops:
    return make_crops(options, task, epoch, RunDir(tmp))


def batch(n: int = 3, e: int = 16, seed: int = 0) -> CropBatch:
    g = torch.Generator().manual_seed(seed)
    target = torch.rand(n, 1, e, e, e, generator=g)
    noisy = (target + 0.1 * torch.randn(target.shape, generator=g)).clamp(0, 1)
    return CropBatch(noisy, target, torch.ones_like(target), torch.full((n,), 4.0), torch.arange(n))


class TestStream:
    def test_a_batch_is_a_function_of_its_number(self):
        stream = crops()
        first = list(CropLoader(stream, 4, seed=1).epoch(1))
        again = list(CropLoader(stream, 4, seed=1).epoch(1, start=3))
        assert len(first) == 4 and torch.equal(first[3].input, again[0].input)
        assert not torch.equal(first[0].input, first[1].input)
        other = next(CropLoader(stream, 4, seed=2).epoch(1))
        assert not torch.equal(first[0].input, other.input)

    def test_volumes_are_mixed_and_every_crop_is_seen_once(self):
        loader = CropLoader(crops(), 4, seed=0)
        assert (loader.batches, loader.volumes) == (2, 2)
        seen = torch.cat([loader.batch(k).input for k in range(2)])
        every = loader.held[1].input
        assert {row.sum().item() for row in seen} == {row.sum().item() for row in every} and len(seen) == len(every)

    def test_processes_share_out_a_batch(self):
        stream = crops()
        loaders = [CropLoader(stream, 4, rank, 2) for rank in (0, 1)]
        whole = CropLoader(stream, 4)
        for number in range(4):
            a, b, every = (loader.batch(number) for loader in (*loaders, whole))
            assert len(a.input) == len(b.input) == 2
            assert torch.equal(a.input, every.input[::2]) and torch.equal(b.target, every.target[1::2])
        for wrong, world in ((5, 2), (17, 1)):
            with pytest.raises(InputError, match="--batch-size"):
                CropLoader(stream, wrong, 0, world)

    def test_what_is_held_out_is_never_drawn(self):
        stream = crops()
        held = {int(i) for i in held_crops(stream, 2).index}
        drawn = {int(i) for k in range(8) for i in CropLoader(stream, 4).batch(k).index}
        assert held and drawn and not held & drawn
        assert "phantom" in stream.describe(np.array(sorted(drawn)))

    @pytest.mark.parametrize("without", [{"hold_out": "0"}, {"structures": "phantom:1"}])
    def test_a_stream_with_nothing_to_test_on_is_refused(self, without):
        with pytest.raises(InputError, match="--hold-out"):
            crops(replace(TRAIN, **without))

    def test_other_structures_are_another_stream(self):
        assert crops().key != crops(replace(TRAIN, structures="phantom:4")).key


class TestIdentity:
    @pytest.mark.parametrize("d", [8, 16])
    def test_a_new_decoder_gives_back_the_map(self, d):
        net = Scunet(ScunetSpec(d=d, drop_path=0.0))
        start_as_identity(net)
        x = torch.rand(1, 1, 24, 24, 24)
        inner = (slice(None), slice(None), *[slice(3, -3)] * 3)
        assert torch.allclose(net(x)[inner], x[inner], atol=1e-4)

    def test_and_learns_from_there(self):
        net = Scunet(ScunetSpec(d=8, drop_path=0.0))
        start_as_identity(net)
        x = torch.rand(2, 1, 16, 16, 16)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            (net(x) - x.square()).square().mean().backward()
            optimizer.step()
        still = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        assert not [name for name in still if "weight" in name and "conv" in name]


class TestLosses:
    def test_equal_maps_cost_nothing(self):
        x = torch.rand(2, 1, 16, 16, 16)
        assert torch.allclose(ssim(x, x), torch.ones(2), atol=1e-4) and shell_loss(x, x).abs().max() < 1e-4
        y = torch.rand(2, 1, 16, 16, 16)
        assert ssim(x, y).max() < 0.3
        assert 0.5 < shell_loss(x - 0.5, y - 0.5).min() < 1.3

    def test_shells_where_the_target_is_empty_do_not_count(self):
        smooth = torch.zeros(1, 1, 16, 16, 16)
        smooth += torch.cos(torch.arange(16) * 2 * torch.pi / 16)
        noise = torch.randn(1, 1, 16, 16, 16)
        assert float(shell_loss(smooth, smooth)) < 1e-4
        assert shell_loss(smooth + noise, smooth).item() > shell_loss(smooth, smooth).item()
        with pytest.raises(ValueError, match="cubic"):
            shell_loss(torch.rand(1, 1, 8, 8, 4), torch.rand(1, 1, 8, 8, 4))

    def test_parts_add_up_and_all_have_gradients(self):
        options = replace(TRAIN, alpha=0.6, ssim=0.5, fsc=0.25)
        method = TrainLvm(options)
        model = method.build(None)
        told = method.loss(model, batch(), Step(0, 100))
        total = 0.6 * told["mse"] + 0.4 * told["hist"] + 0.5 * told["ssim"] + 0.25 * told["fsc"]
        assert torch.allclose(told["loss"], total) and told["hist_over_mse"] > 0
        told["loss"].backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        assert "hist_over_mse" not in method.loss(model, batch(), Step(7, 100))
        only = TrainLvm(replace(TRAIN, alpha=1.0)).loss(model, batch(), Step(0, 100))
        assert "hist" not in only and torch.equal(only["loss"], only["mse"])

    def test_the_mask_of_the_histogram(self):
        torch.manual_seed(0)
        model = TrainLvm(TRAIN).build(None)
        crop = batch()
        half = replace(crop, mask=(crop.target > 0.5).float())
        whole = replace(TRAIN, hist_mask="whole", hist_sample=0)
        union = replace(TRAIN, hist_sample=0)
        a, b = (TrainLvm(o).loss(model, half, Step(1, 9))["hist"] for o in (whole, union))
        assert not torch.isclose(a, b)
        assert torch.isclose(a, TrainLvm(union).loss(model, crop, Step(1, 9))["hist"])


def train(path: Path, options: TrainLvmOptions = TRAIN, training: TrainOptions = TRAINING, **how):
    stream = crops(options, tmp=path)
    return fit(TrainLvm(options, load=not how.get("resume")), stream, RunDir(path), training, **how)


def pretrain(path: Path, options: PretrainOptions = PRE, training: TrainOptions = TRAINING, **how):
    training = replace(training, ema=0.0)
    return fit(Pretrain(options, training.lr), crops(options, 16, "pretrain", path), RunDir(path), training, **how)


class StopError(Exception):
    """Ends a training in the middle."""


def interrupt(epoch: int, model: torch.nn.Module) -> None:
    raise StopError


@pytest.mark.parametrize("run", [train, pretrain])
def test_a_stop_in_the_middle_changes_nothing(run, tmp_path):
    whole = run(tmp_path / "whole").model.state_dict()
    with pytest.raises(StopError):
        run(tmp_path / "parts", on_epoch=interrupt)
    parts = run(tmp_path / "parts", resume=True).model.state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    losses = [[r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 8


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["jepa", "mae"])
def test_fifty_steps_of_pretraining_lower_the_loss(objective, tmp_path):
    options = replace(PRE, objective=objective)
    stream = crops(options, 200, "pretrain", tmp_path)
    training = replace(TRAINING, epochs=1, lr=2e-3, ema=0.0)
    fit(Pretrain(options, 2e-3), stream, RunDir(tmp_path), training)
    losses = [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(losses) == 50 and np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.slow
def test_fifty_steps_of_training_lower_the_loss(tmp_path):
    stream, method = crops(TRAIN, 200, "sharpen", tmp_path), TrainLvm(TRAIN)
    batches = [CropLoader(stream, 4, seed=0).batch(number) for number in range(0, 48, 2)]

    @torch.no_grad()
    def mean_loss(model: torch.nn.Module) -> float:
        torch.manual_seed(0)  # of the voxels that the histograms are made of
        return float(np.mean([method.loss(model.eval(), batch, Step(1, 9))["loss"].item() for batch in batches]))

    torch.manual_seed(0)
    before = mean_loss(method.build(stream))  # the map itself, but for the faces of the crops
    after = mean_loss(fit(method, stream, RunDir(tmp_path), replace(TRAINING, epochs=1, lr=2e-3)).model)
    assert after < 0.9 * before  # measured: .79 to .84 over the encoders that ``before`` can be drawn with


class TestGuards:
    def test_they_fire_on_a_constant_encoder(self, tmp_path):
        stream, method = crops(PRE, 16, "pretrain"), Pretrain(PRE, 1e-3)
        model = method.build(stream)
        with torch.no_grad():  # whatever is seen, the same embedding
            for layer in (model.net.target_tokens, model.net.tokens):
                layer.weight.zero_()
        examiner = PretrainExaminer(stream, method, RunDir(tmp_path))
        notes = {"command": "x", "seed": 0, "epochs": 2}
        write = after_pretrain_epoch(RunDir(tmp_path), PRE, examiner, notes, 16)
        with pytest.warns(UserNotice, match="collapsed.*nearly alike"):
            write(1, model)
        assert set(load_map_encoder(tmp_path / "encoder.safetensors")[1]["guards_fired"]) >= {"target_std"}
        assert "spread" in RunDir(tmp_path).card.read_text()

    def test_they_are_logged_and_do_not_fire_on_a_random_encoder(self, tmp_path):
        stream, method = crops(PRE, 16, "pretrain"), Pretrain(PRE, 1e-3)
        model = method.build(stream)
        told = method.loss(model, next(CropLoader(stream, 4).epoch(0)), Step(0, 100))
        assert {"target_std", "target_rank", "mean_ratio"} <= told.keys()
        assert "target_std" not in method.loss(model, next(CropLoader(stream, 4).epoch(0)), Step(1, 100))
        scores = PretrainExaminer(stream, method, RunDir(tmp_path)).score(model)
        assert scores["heldout_target_rank"] > 4 and scores["heldout_probe_density"] > 0.2


def test_the_target_follows_once_a_step():
    stream, method = crops(PRE, 16, "pretrain"), Pretrain(PRE, 1e-3)
    model, crop = method.build(stream), next(CropLoader(stream, 4).epoch(0))
    with torch.no_grad():
        model.net.tokens.weight.add_(1.0)
    before = model.net.target_tokens.weight.clone()
    method.loss(model, crop, Step(3, 100))
    once = model.net.target_tokens.weight.clone()
    method.loss(model, crop, Step(3, 100))  # a second piece of the same batch
    assert torch.equal(once, model.net.target_tokens.weight)
    assert (once - before).mean() == pytest.approx(0.01 * (1 - 0.03), rel=1e-3)  # 1 - m, m from .99 to 1


def test_weight_decay_rises_and_the_learning_rate_falls(tmp_path):
    method = Pretrain(PRE, 1e-3)
    assert method.weight_decay(Step(0, 100)) == pytest.approx(0.04)
    assert method.weight_decay(Step(50, 100)) == pytest.approx(0.22)
    assert method.lr_factor(Step(99, 100)) == pytest.approx(1e-6 / 1e-3)
    assert method.lr_factor(Step(0, 100)) < 0.2
    flat = TrainLvm(replace(TRAIN, schedule="flat", warmup=0.0))
    factors = [flat.lr_factor(Step(k, 100)) for k in (0, 50, 79, 90, 99)]
    assert factors[:3] == [1, 1, 1] and factors[3] == pytest.approx(0.5) and factors[4] < 0.06
    groups = method.parameter_groups(method.build(None))
    named = dict(method.build(None).named_parameters())
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(
        p.numel() for p in named.values() if p.requires_grad
    )
    assert all(p.ndim > 1 for p in groups[0]["params"]) and groups[1]["weight_decay"] == 0
    run = pretrain(tmp_path, training=replace(TRAINING, epochs=1))
    state = torch.load(RunDir(tmp_path).checkpoint, weights_only=True)["optimizer"]["param_groups"]
    assert state[0]["weight_decay"] > 0.04 and state[1]["weight_decay"] == 0 and run.epochs_done == 1


class TestStart:
    @pytest.mark.parametrize("net", ["scunet", "vit"])
    def test_a_pretrained_encoder_loads_strictly(self, net, tmp_path):
        encoder = Encoder(ScunetSpec(**SPEC)) if net == "scunet" else VitEncoder(MapVitSpec(48, 2, 1, 6))
        path = tmp_path / "encoder.safetensors"
        save_map_encoder(path, encoder, {"norm": "robust"})
        start = find_start(str(tmp_path), None)
        assert start.pretrained and start.net == net and start.norm == "robust" and start.spec == asdict(encoder.spec)
        options = replace(TRAIN, net=net, spec=start.spec, start=start.path, pretrained=True)
        model = TrainLvm(options).build(None)
        loaded = load_map_encoder(path)[0].state_dict()
        assert all(torch.equal(value, model.net.encoder.state_dict()[name]) for name, value in loaded.items())
        fresh = TrainLvm(options, load=False).build(None)  # what a resumed training builds
        assert not torch.equal(next(fresh.net.encoder.parameters()), next(model.net.encoder.parameters()))
        with pytest.raises(InputError, match="another network"):
            fill(Scunet(ScunetSpec(d=16)), start.path, True)

    def test_a_whole_network_goes_on_as_it_is(self, tmp_path):
        net = Scunet(ScunetSpec(**SPEC))
        path = tmp_path / "weights.safetensors"
        save_map_weights(path, net, task="sharpen", voxel=1.0, norm="paper")
        start = find_start(None, str(path))
        model = TrainLvm(replace(TRAIN, spec=start.spec, start=start.path)).build(None)
        wanted = load_map_weights(path).net.state_dict()
        assert all(torch.equal(value, model.net.state_dict()[name]) for name, value in wanted.items())
        assert start.norm == "paper" and not start.pretrained

    def test_what_is_no_start(self, tmp_path):
        assert find_start(None, None) is None and find_start("scratch", None) is None
        for init, weights, said in (
            (str(tmp_path), None, "encoder.safetensors"), (None, str(tmp_path), "weights.safetensors"),
            (str(tmp_path / "no"), None, "no"), ("a", "b", "--init and --weights"),
        ):  # fmt: skip
            with pytest.raises(InputError, match=said):
                find_start(init, weights)


def test_a_frozen_encoder_does_not_move_and_then_does(tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_map_encoder(path, Encoder(ScunetSpec(**SPEC)), {})
    options = replace(TRAIN, start=str(path), pretrained=True, frozen=0.5, encoder_lr=0.3)
    seen = {}

    def look(epoch: int, model: torch.nn.Module) -> None:
        seen[epoch] = {name: value.clone() for name, value in model.net.state_dict().items()}

    fit(TrainLvm(options), crops(options), RunDir(tmp_path / "run"), replace(TRAINING, ema=0.0), on_epoch=look)
    loaded = load_map_encoder(path)[0].state_dict()
    assert all(torch.equal(value, seen[1][f"encoder.{name}"]) for name, value in loaded.items())
    assert not torch.equal(seen[2]["encoder.head.weight"], seen[1]["encoder.head.weight"])
    assert not torch.equal(seen[1]["decoder.ups.0.weight"], torch.zeros_like(seen[1]["decoder.ups.0.weight"]))
    groups = torch.load(RunDir(tmp_path / "run").checkpoint, weights_only=True)["optimizer"]["param_groups"]
    assert groups[2]["lr"] == pytest.approx(0.3 * groups[0]["lr"])


class TestScores:
    def test_correlation_inside_a_mask(self):
        a, noise = torch.rand(2, 1, 12, 12, 12), torch.randn(2, 1, 12, 12, 12)
        mask = torch.rand(2, 1, 12, 12, 12) > 0.5
        outside = torch.where(mask, a, noise)
        assert torch.allclose(cc_mask(outside, 3 * a + 1, mask), torch.ones(2, dtype=torch.float64))
        assert cc_mask(noise, a, mask).abs().max() < 0.2
        assert cc_mask(a, a, torch.zeros_like(mask)).isnan().all() and cc_mask(0 * a, a, mask).isnan().all()

    def test_they_stand_beside_those_of_the_input(self, tmp_path, monkeypatch):
        stream = crops(tmp=tmp_path)
        model = TrainLvm(TRAIN).build(stream)
        monkeypatch.setattr(model, "forward", lambda x, frozen=False: x)
        examiner = Examiner(stream, RunDir(tmp_path))
        scores = examiner.score(model)
        for name in ("cc_mask", "mse", "hist"):
            assert scores[name] == pytest.approx(scores[f"{name}_input"], abs=1e-6)
        assert 0.3 < scores["cc_mask"] < 0.99 and scores["mse"] > 0
        perfect = held_crops(stream)
        assert map_scores(perfect.target, perfect) == pytest.approx({"cc_mask": 1, "mse": 0, "hist": 0}, abs=1e-6)
        monkeypatch.setattr(model, "forward", lambda x, frozen=False: 0 * x)
        empty = examiner.score(model)
        assert not empty["cc_mask"] > 0.1 and empty["cc_mask_input"] == scores["cc_mask_input"]

    def test_the_best_epoch_is_kept_and_the_end_comes_early(self, tmp_path, monkeypatch):
        run, options = RunDir(tmp_path), replace(TRAIN, patience=2)
        stream = crops(tmp=tmp_path)
        examiner = Examiner(stream, run)
        values = iter((0.5, 0.7, 0.6, 0.65, 0.9))
        monkeypatch.setattr(examiner, "score", lambda model: examiner.input | {
            "cc_mask": next(values), "mse": 0.0, "hist": 0.0, "cc_mask_input": 0.4, "mse_input": 1.0, "hist_input": 1.0
        })  # fmt: skip
        write = after_train_epoch(run, options, examiner, {"command": "x", "seed": 0}, 16)
        done = fit(TrainLvm(options), stream, run, replace(TRAINING, epochs=5), on_epoch=write)
        assert done.stopped == "early_stop" and done.exit_code == 0 and done.epochs_done == 4
        assert history(run) == {1: 0.5, 2: 0.7, 3: 0.6, 4: 0.65}
        assert load_map_weights(run.network).notes["epoch"] == 2 and "0.7000" in run.card.read_text()
        assert best_epoch({1: 0.5, 2: 0.7, 3: 0.7}) == 2


def test_options_that_make_no_sense():
    for wrong, said in (
        ({"crop": 20}, "--crop"), ({"crop": 16}, "--crop"), ({"crop": 48, "volume": 40}, "--volume"),
        ({"norm": "x"}, "--norm"), ({"task": "wedge", "noise_only": 0.1}, "--noise-only"),
        ({"task": "superres", "clean": 0.1}, "--clean"),
        ({"alpha": 1.5}, "--alpha"), ({"task": "x"}, "--task"), ({"hist_mask": "x"}, "--hist-mask"),
        ({"resolution": (8, 2)}, "--resolution"), ({"frozen": 1.0}, "--frozen"), ({"schedule": "x"}, "--schedule"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            TrainLvmOptions(**SMALL | wrong)
    with pytest.raises(InputError, match="embedding"):
        PretrainOptions(**SMALL, objective="mae", mask_at="embedding")
    for net, size in (("x", "small"), ("scunet", "x")):
        with pytest.raises(InputError, match="expected one of"):
            net_spec(net, size)
    again = TrainLvmOptions.from_dict(asdict(replace(TRAIN, resolution=(3.0, 5.0))) | {"unknown": 1})
    assert again == replace(TRAIN, resolution=(3.0, 5.0))


def test_a_map_vit_trains_too():
    spec = asdict(MapVitSpec(48, 2, 1, 6))
    method = TrainLvm(replace(TRAIN, net="vit", spec=spec))
    model = method.build(None)
    assert isinstance(model.net, MapVit)
    method.loss(model, batch(), Step(1, 10))["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    pre = Pretrain(replace(PRE, net="vit", spec=spec), 1e-3)
    told = pre.loss(pre.build(None), batch(2, 32), Step(0, 10))
    assert torch.isfinite(told["loss"])
