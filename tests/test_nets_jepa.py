"""Joint-embedding prediction: masks, what can be read and what cannot, the slow copy, guards, that it learns."""

from __future__ import annotations

import copy

import pytest
import torch

from cryosuite.nets.jepa import Jepa, Mae, PredictorSpec, patches, smooth_l1, take, target_momentum
from cryosuite.nets.jepa_guards import collapsed, effective_rank, feature_std, guards, linear_probe, mean_ratio
from cryosuite.nets.jepa_masks import Masks, block_sizes, multiblock_masks, random_masks, token_positions
from cryosuite.nets.scunet import Encoder, Scunet, ScunetSpec

SMALL = ScunetSpec(d=8, drop_path=0.0)
PREDICTOR = PredictorSpec(48, 1, 4)


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _crops(count: int, edge: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth blobs: something to predict from its surroundings."""
    noise = torch.randn(count, 1, edge, edge, edge, generator=_rng(seed))
    k = torch.fft.fftfreq(edge)
    gain = torch.exp(-80 * (k[:, None, None] ** 2 + k[:, None] ** 2 + torch.fft.rfftfreq(edge) ** 2))
    smooth = torch.fft.irfftn(torch.fft.rfftn(noise, dim=(-3, -2, -1)) * gain, s=(edge,) * 3, dim=(-3, -2, -1))
    smooth = smooth / smooth.std((-3, -2, -1), keepdim=True)
    return (0.3 * smooth).clamp(0, 1)


def test_blocks_of_a_48_crop_hold_36_tokens():
    assert set(block_sizes((6, 6, 6))) == {(3, 3, 4), (3, 4, 3), (4, 3, 3)}
    assert all(0.15 * 64 <= a * b * c <= 0.2 * 64 for a, b, c in block_sizes((4, 4, 4)))
    assert block_sizes((1, 1, 2)) == ((1, 1, 1),)
    with pytest.raises(ValueError, match="too small"):
        block_sizes((1, 1, 1))


@pytest.mark.parametrize("grid", [(6, 6, 6), (4, 4, 4), (6, 4, 8)])
def test_multiblock_masks(grid):
    total = grid[0] * grid[1] * grid[2]
    shares = []
    for seed in range(6):
        masks = multiblock_masks(grid, 4, _rng(seed))
        assert masks.targets.shape[:2] == (4, 4) and 0.15 <= masks.targets.shape[2] / total <= 0.2
        for context, targets in zip(masks.context, masks.targets, strict=True):
            assert len(set(context.tolist())) == len(context)
            assert not set(context.tolist()) & set(targets.flatten().tolist())
            for block in targets:  # a solid block: as many tokens as its bounding box
                place = torch.stack(torch.unravel_index(block, grid), 1)
                assert int((place.max(0).values - place.min(0).values + 1).prod()) == len(set(block.tolist()))
        shares.append(masks.context.shape[1] / total)
    assert 0.33 < sum(shares) / len(shares) < 0.52  # cut down to the smallest of the batch


def test_random_masks_are_a_partition():
    masks = random_masks((6, 6, 6), 3, 0.6, _rng())
    assert masks.targets.shape == (3, 1, 130)
    for context, targets in zip(masks.context, masks.targets, strict=True):
        assert sorted([*context.tolist(), *targets[0].tolist()]) == list(range(216))
    again = random_masks((6, 6, 6), 3, 0.6, _rng())
    assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))


def test_positions_tell_all_tokens_apart():
    code = token_positions((6, 4, 5), 64)
    assert code.shape == (120, 64)
    distance = torch.cdist(code, code) + torch.eye(120) * 9
    assert float(distance.min()) > 0.1


def test_patches_are_the_voxels_of_their_tokens():
    crops = torch.arange(16 * 24 * 8, dtype=torch.float32).view(1, 1, 16, 24, 8)
    cut = patches(crops)
    assert cut.shape == (1, 6, 512)
    assert torch.equal(cut[0, 4].view(8, 8, 8), crops[0, 0, 8:, 8:16])
    assert torch.equal(take(cut, torch.tensor([[4]]))[0, 0], cut[0, 4])


def _leak(mask_at: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest gradient of the context tokens by hidden and by shown voxels."""
    torch.manual_seed(0)
    jepa = Jepa(Encoder(SMALL), PREDICTOR, mask_at).double()
    crops = _crops(2).double().requires_grad_()
    masks = multiblock_masks((4, 4, 4), 2, _rng(1))
    jepa.shown(crops, masks.context).square().sum().backward()
    gradient = patches(crops.grad).abs().amax(-1)  # (b, T)
    shown = torch.zeros_like(gradient, dtype=torch.bool).scatter(1, masks.context, True)
    return gradient[~shown].max(), gradient[shown].min()


def test_hidden_voxels_cannot_be_read():
    hidden, shown = _leak("input")
    assert float(hidden) == 0.0 and float(shown) > 0


def test_masking_after_the_encoder_leaks():
    hidden, shown = _leak("embedding")
    assert float(hidden) > 0 and float(shown) > 0
    with pytest.raises(ValueError, match="masked at"):
        Jepa(Encoder(SMALL), PREDICTOR, "nowhere")


def test_groups_of_targets_are_predicted_apart():
    torch.manual_seed(1)
    jepa = Jepa(Encoder(SMALL), PREDICTOR).eval()
    crops, masks = _crops(2), multiblock_masks((4, 4, 4), 2, _rng(2))
    with torch.no_grad():
        _, predicted, targets = jepa(crops, masks)
        _, alone, _ = jepa(crops, Masks(masks.context, masks.targets[:, 2:3]))
    assert predicted.shape == targets.shape == (2, 4, 12, 64)
    assert torch.allclose(predicted[:, 2:3], alone, atol=1e-5)
    assert torch.allclose(targets.mean(-1), torch.zeros(1), atol=1e-5)
    assert torch.allclose(targets.std(-1, correction=0), torch.ones(1), atol=1e-3)


def test_targets_get_no_gradient_and_follow_slowly():
    torch.manual_seed(2)
    jepa = Jepa(Encoder(ScunetSpec(d=8, drop_path=0.5)), PREDICTOR).train()
    assert not jepa.target_encoder.training and jepa.encoder.training
    loss, _, targets = jepa(_crops(2), multiblock_masks((4, 4, 4), 2, _rng()))
    loss.backward()
    assert not targets.requires_grad
    assert all(p.grad is None for p in jepa.target_encoder.parameters())
    assert all(p.grad is not None for n, p in jepa.named_parameters() if not n.startswith("target"))
    old = copy.deepcopy(jepa.target_encoder.state_dict())
    with torch.no_grad():
        for parameter in jepa.encoder.parameters():
            parameter.add_(1.0)
    jepa.follow(0.9)
    for name, value in jepa.target_encoder.state_dict().items():
        expected = old[name] + 0.1 if value.is_floating_point() else old[name]
        assert torch.allclose(value, expected, atol=1e-6), name  # norms and relative positions too


def test_momentum_rises_linearly_to_one():
    assert target_momentum(0.0, 1000) == 0.99 and target_momentum(0.0, 30_000) == 0.996
    assert target_momentum(0.5, 1000) == pytest.approx(0.995) and target_momentum(1.0, 1000) == 1.0


def test_loss_is_the_mean_of_the_formula():
    a, b = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[0.5, 1.0, 3.0]])
    assert float(smooth_l1(a, b)) == pytest.approx((0.125 + 0.5 + 2.5) / 3)


def test_guards_fire_on_a_constant_encoder():
    class Constant(Encoder):
        def forward(self, x, visible=None):
            features = super().forward(x, visible)
            return [*features[:-1], features[-1] * 0 + torch.linspace(-1, 1, features[-1].shape[-1])]

    torch.manual_seed(3)
    jepa = Jepa(Constant(SMALL), PREDICTOR).eval()
    with torch.no_grad():
        _, predicted, targets = jepa(_crops(4), multiblock_masks((4, 4, 4), 4, _rng()))
    values = guards(predicted, targets)
    assert float(values["target_std"]) < 1e-3 and float(values["target_rank"]) < 4
    assert {"target_std", "target_rank", "mean_ratio"} == set(collapsed(values))


def test_guards_stay_silent_on_healthy_embeddings():
    targets = torch.nn.functional.layer_norm(torch.randn(500, 32, generator=_rng()), (32,))
    assert collapsed(guards(targets + 0.1, targets)) == []
    assert 25 < float(effective_rank(targets)) <= 32
    assert float(effective_rank(torch.randn(100, 1) * torch.ones(32))) == pytest.approx(1, abs=0.05)
    assert float(feature_std(targets)) == pytest.approx(1, abs=0.1)
    assert float(mean_ratio(targets.mean(0).expand_as(targets), targets)) == pytest.approx(1)


def test_linear_probe_finds_what_is_there():
    tokens = torch.randn(2000, 16, generator=_rng())
    seen = tokens @ torch.randn(16, 2, generator=_rng(1))
    unseen = torch.randn(2000, generator=_rng(2))
    assert bool((linear_probe(tokens, seen) > 0.99).all())
    assert abs(float(linear_probe(tokens, unseen))) < 0.1


def test_bf16_loss_is_float32_and_close():
    torch.manual_seed(4)
    jepa = Jepa(Encoder(SMALL), PREDICTOR).eval()
    crops, masks = _crops(2), multiblock_masks((4, 4, 4), 2, _rng())
    with torch.no_grad():
        full = jepa(crops, masks)[0]
        with torch.autocast("cpu", torch.bfloat16):
            half, _, targets = jepa(crops, masks)
    assert half.dtype == targets.dtype == torch.float32
    assert float(half) == pytest.approx(float(full), rel=0.02)


def test_mae_predicts_voxels():
    torch.manual_seed(5)
    mae = Mae(Encoder(SMALL), PREDICTOR)
    crops, masks = _crops(2), random_masks((4, 4, 4), 2, generator=_rng())
    loss, predicted, targets = mae(crops, masks)
    assert predicted.shape == (2, 1, 38, 512)
    assert torch.equal(targets[1, 0], patches(crops)[1, masks.targets[1, 0]])
    assert float(loss.detach()) == pytest.approx(float((predicted - targets).square().mean().detach()))


def test_the_encoder_goes_into_the_whole_network():
    jepa, net = Jepa(Encoder(SMALL), PREDICTOR), Scunet(SMALL)
    net.encoder.load_state_dict(jepa.target_encoder.state_dict())
    crops = _crops(1)
    with torch.no_grad():
        assert torch.equal(net.eval().encoder(crops)[-1], jepa.eval().target_encoder(crops)[-1])


def _train(model: torch.nn.Module, steps: int, start: int = 0, optimizer: torch.optim.Optimizer | None = None):
    """Some steps on small crops; masks and crops follow from the step."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for step in range(start, start + steps):
        loss = model(_crops(2, 16, step % 8), multiblock_masks((2, 2, 2), 2, _rng(step)))[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if isinstance(model, Jepa):
            model.follow(target_momentum(step / 100, 100))
        losses.append(float(loss.detach()))
    return losses, optimizer


def test_stopped_and_resumed_is_not_stopped():
    def fresh() -> Jepa:
        torch.manual_seed(6)
        return Jepa(Encoder(SMALL), PREDICTOR).train()

    whole, stopped = fresh(), fresh()
    expected, _ = _train(whole, 3)
    first, optimizer = _train(stopped, 1)
    resumed = fresh()
    resumed.load_state_dict(stopped.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    optimizer = torch.optim.AdamW(resumed.parameters(), 2e-3)
    optimizer.load_state_dict(state)
    second, _ = _train(resumed, 2, 1, optimizer)
    assert first + second == expected
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Jepa, Mae])
def test_fifty_steps_on_32_voxels_lower_the_loss(kind):
    torch.manual_seed(7)
    model = kind(Encoder(SMALL), PREDICTOR).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for step in range(50):
        loss = model(_crops(2, 32, step % 4), multiblock_masks((4, 4, 4), 2, _rng(step)))[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if isinstance(model, Jepa):
            model.follow(target_momentum(step / 50, 50))
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
