"""Momentum contrast: the published loss to the last digit, two processes like one, the copy that follows."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import iev_toy
import numpy as np
import pytest
import torch

from cryosuite.nets.ief import IefEncoder
from cryosuite.nets.moco import (
    MoCo,
    SyncNorm,
    chance_loss,
    contrastive,
    mlp_head,
    momentum_at,
    sample_patches,
    smooth_patches,
)


@pytest.fixture(scope="module")
def published(golden: Path) -> dict[str, np.ndarray]:
    """Queries, keys and losses of MoCo v3's own code."""
    return dict(np.load(golden / "moco.npz"))


@pytest.mark.parametrize("tau", [0.5, 1.0, 0.1])
def test_loss_is_the_published_one(published: dict[str, np.ndarray], tau: float) -> None:
    q1, q2, k1, k2 = (torch.from_numpy(published[name]).double() for name in ("q1", "q2", "k1", "k2"))
    name = f"T{tau}".replace(".", "p")
    one, two = contrastive(q1, k2, tau), contrastive(q2, k1, tau)
    assert abs(float(one) - published[f"loss12_{name}"]) < 1e-12
    assert abs(float(two) - published[f"loss21_{name}"]) < 1e-12
    assert abs(float(one + two) - published[f"loss_{name}"]) < 1e-12
    assert abs(float(contrastive(q1.float(), k2.float(), tau)) - published[f"loss12_{name}"]) < 1e-5


def test_gradient_and_momentum_are_the_published_ones(published: dict[str, np.ndarray]) -> None:
    q1 = torch.from_numpy(published["q1"]).double().requires_grad_()
    k2 = torch.from_numpy(published["k2"]).double().requires_grad_()
    contrastive(q1, k2, float(published["T"])).backward()
    np.testing.assert_allclose(q1.grad.numpy(), published["grad_q1_of_loss12"], atol=1e-12)
    assert k2.grad is None
    model = iev_toy.toy()
    with torch.no_grad():
        model.base_encoder.norm.bias[:5] = torch.from_numpy(published["ema_base"])
        model.momentum_encoder.norm.bias[:5] = torch.from_numpy(published["ema_before"])
    model.follow(float(published["ema_m"]))
    np.testing.assert_allclose(model.momentum_encoder.norm.bias[:5].numpy(), published["ema_after"], atol=1e-12)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Loss, gradients, momentum copy and batch norm statistics of two steps, in float64."""
    command = [sys.executable, iev_toy.__file__]
    running = [subprocess.Popen([*command, str(rank), "2", str(tmp_path)]) for rank in range(2)]
    one = iev_toy.two_steps(0, 1)
    assert [process.wait(timeout=240) for process in running] == [0, 0]
    for rank in range(2):
        two = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert two.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-8, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


def test_momentum_copy_has_statistics_and_no_gradient_of_its_own() -> None:
    model = iev_toy.toy()
    first, second = iev_toy.views()
    before = model.momentum_encoder.blocks[0].norm2.running_mean.clone()
    model.follow(0.0)
    model(first, second)[0].backward()
    assert all(p.grad is None for p in [*model.momentum_encoder.parameters(), *model.momentum_projector.parameters()])
    assert not torch.equal(before, model.momentum_encoder.blocks[0].norm2.running_mean)
    assert int(model.momentum_encoder.blocks[0].norm2.num_batches_tracked) == 1  # once per step, not per view
    stays = model.momentum_encoder.blocks[0].norm2.running_mean.clone()
    model.follow(0.0)  # parameters follow at once, buffers do not follow at all
    assert torch.equal(stays, model.momentum_encoder.blocks[0].norm2.running_mean)
    for mine, theirs in zip(model.momentum_encoder.parameters(), model.base_encoder.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_state_keys_are_those_of_the_field() -> None:
    keys = set(iev_toy.toy().state_dict())
    assert {"base_encoder.cls_token", "base_encoder.blocks.0.norm2.running_mean", "predictor.4.running_var"} <= keys
    assert {"projector.0.weight", "projector.1.weight", "projector.3.weight", "projector.6.weight"} <= keys
    assert not {"projector.0.bias", "projector.7.weight", "predictor.4.weight"} & keys
    plain = {f"base_encoder.{key}" for key in IefEncoder(iev_toy.SPEC).state_dict()}
    assert plain == {key for key in keys if key.startswith("base_encoder.")}


def test_unrelated_features_lose_by_chance() -> None:
    """Equal similarities to all keys give exactly 2 tau ln B each way; random ones come near it."""
    same = torch.ones(64, 8, dtype=torch.float64)
    assert abs(2 * float(contrastive(same, same, 0.2)) - chance_loss(64, 0.2)) < 1e-12
    torch.manual_seed(0)
    q, k = torch.randn(512, 256), torch.randn(512, 256)
    assert abs(2 * float(contrastive(q, k, 0.5)) / chance_loss(512, 0.5) - 1) < 0.02
    assert math.isclose(chance_loss(512, 0.5), 2 * math.log(512))


def test_chunks_change_nothing() -> None:
    spec = iev_toy.IefSpec("toy", 16, 2, 2, 4, 16, "ln")
    torch.manual_seed(0)
    whole = MoCo(IefEncoder(spec), 16, 24, 8).double()
    parts = MoCo(IefEncoder(spec), 16, 24, 8, chunk=3).double()
    parts.load_state_dict(whole.state_dict())
    first, second = iev_toy.views()
    kept = sample_patches(16, torch.ones(16, dtype=torch.bool), 0.5)
    for shown in (None, kept):
        torch.testing.assert_close(parts(first, second, shown)[0], whole(first, second, shown)[0])


def test_shown_patches_are_different_ones_and_inside() -> None:
    inside = torch.zeros(64, dtype=torch.bool)
    inside[10:50] = True
    kept = sample_patches(32, inside, 0.25)
    assert kept.shape == (32, 10)
    assert bool(inside[kept].all())
    assert all(len(set(row.tolist())) == 10 for row in kept)
    assert len({tuple(sorted(row.tolist())) for row in kept}) == 32


def test_encoder_on_all_patches_in_any_order_is_the_encoder() -> None:
    model, (first, _) = iev_toy.toy().eval(), iev_toy.views()
    order = torch.stack([torch.randperm(16) for _ in range(len(first))])
    torch.testing.assert_close(model.base_encoder(first, order), model.base_encoder(first))


def test_sync_norm_is_torchs_batch_norm() -> None:
    x = torch.randn(12, 5, 6)
    ours, theirs = SyncNorm(6), torch.nn.BatchNorm1d(6)
    torch.testing.assert_close(ours(x).flatten(0, 1), theirs(x.flatten(0, 1)))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert isinstance(mlp_head([4, 4, 4])[1], SyncNorm)


@pytest.mark.parametrize("dim", [192, 384])
def test_smooth_start_keeps_the_picture_and_drops_noise(dim: int) -> None:
    torch.manual_seed(1)
    weight = smooth_patches(14, dim)[:, 0]
    assert weight.shape == (dim, 14, 14)
    noise = torch.randn(500, 14, 14)
    flat = torch.ones(1, 14, 14)
    passed = [
        torch.einsum("cyx,byx->bc", weight, x).square().sum(1).mean() / x.square().sum((1, 2)).mean()
        for x in (noise, flat)
    ]
    assert float(passed[0]) < 0.08 * dim / 192 < 0.8 < float(passed[1])


def test_momentum_rises_to_one() -> None:
    assert momentum_at(0.0, 0.99, True) == pytest.approx(0.99)
    assert momentum_at(0.5, 0.99, True) == pytest.approx(0.995)
    assert momentum_at(1.0, 0.99, True) == pytest.approx(1.0)
    assert momentum_at(0.7, 0.99, False) == 0.99
