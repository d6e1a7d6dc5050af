"""SCUNet for maps: sizes and costs, windows against dense attention, norms, boxes of any shape, hidden voxels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from cryosuite.nets import scunet_windows
from cryosuite.nets.scunet import SPECS, Decoder, Encoder, Scunet, ScunetSpec, flops
from cryosuite.nets.scunet_blocks import FilterResponseNorm, SCBlock, Transformer, Visible
from cryosuite.nets.scunet_windows import (
    WindowAttention,
    from_windows,
    normed_linear,
    relative_index,
    to_windows,
    window_plan,
)

CPU = torch.device("cpu")

# parameters (of the encoder) in millions, GFLOP of a 48^3 crop (of the encoder)
TABLE = {
    "small": (0.68, 0.50, 5.0, 2.6),
    "default": (1.53, 1.11, 10.6, 5.5),
    "medium": (2.71, 1.96, 18.3, 9.4),
    "large": (4.73, None, 34.7, None),
    "d48": (6.09, None, 40.1, None),
    "d64": (10.8, None, 70.2, None),
}


@pytest.mark.parametrize("size", list(TABLE))
def test_sizes_and_costs_of_the_table(size):
    with torch.device("meta"):
        model = Scunet(SPECS[size])
    encoder = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    total = sum(p.numel() for p in model.parameters()) / 1e6
    costs = [value / 1e9 for value in flops(SPECS[size])]
    for value, wanted in zip((total, encoder, sum(costs), costs[0]), TABLE[size], strict=True):
        assert wanted is None or value == pytest.approx(wanted, rel=0.015)


@pytest.mark.slow
def test_costs_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    spec, x = ScunetSpec(d=8), torch.rand(1, 1, 16, 16, 16)
    model = Scunet(spec).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    # torch counts our norms by products, and zeros that fill up narrow heads, as well
    assert sum(flops(spec, 16)) == pytest.approx(counter.get_total_flops(), rel=0.25)
    assert sum(flops(spec, 16)) < counter.get_total_flops()


def _dense(attention: WindowAttention, x: torch.Tensor, window: int, shift: torch.Tensor) -> torch.Tensor:
    """Attention of all tokens with a mask made from the meaning of a shifted window; (z, y, x, h) of one sample."""
    grid, h = x.shape[:3], x.shape[-1]
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"), -1).reshape(-1, 3)
    # a window of the shifted grid that crosses the border falls apart: cells between borders are windows
    cell = torch.div(place - shift, window, rounding_mode="floor")
    allowed = (cell[:, None] == cell[None]).all(-1)
    offset = place[:, None] - place[None] + attention.limit - 1
    side = 2 * attention.limit - 1
    row = ((offset[..., 0] * side + offset[..., 1]) * side + offset[..., 2]).clamp(0, side**3 - 1)
    bias = attention.relative[row].permute(2, 0, 1)
    tokens = torch.nn.functional.linear(attention.norm(x.reshape(-1, h)), attention.qkv.weight, attention.qkv.bias)
    q, k, v = tokens.view(len(place), 3, attention.heads, -1).permute(1, 2, 0, 3)
    scores = q @ k.transpose(1, 2) * (h // attention.heads) ** -0.5 + bias
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    return attention.proj((weights @ v).transpose(0, 1).reshape(len(place), h)).view(x.shape)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("grid", "shifted"), [((8, 8, 8), False), ((8, 8, 8), True), ((12, 4, 8), True)])
def test_shifted_windows_are_dense_attention_with_a_mask(grid, shifted, heads):
    torch.manual_seed(0)
    attention = WindowAttention(12, heads, 4).double()
    torch.nn.init.normal_(attention.relative)
    torch.nn.init.normal_(attention.norm.bias)
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    plan = window_plan(grid, 4, shifted, CPU)
    out = from_windows(attention(to_windows(x, plan), plan), plan)
    for sample in range(2):
        assert torch.allclose(out[sample], _dense(attention, x[sample], 4, torch.tensor(plan.shift)), atol=1e-10)
    # an axis with one window is not shifted against itself
    assert plan.shift == tuple(2 if shifted and n > 4 else 0 for n in grid)


def test_groups_of_windows_hold_few_masks():
    plan = window_plan((48, 48, 48), 4, True, CPU)
    assert plan.windows == 12**3 and plan.tokens == 64 and len(plan.groups) == 8
    assert plan.groups[0][1] is None and plan.groups[0][0] == 11**3
    assert window_plan((48, 48, 48), 4, True, CPU) is plan  # computed once
    assert window_plan((6, 6, 6), 6, False, CPU).groups == ((1, None),)


@pytest.mark.parametrize(
    ("grid", "limit", "shifted"), [((7, 5, 4), 4, True), ((11, 9, 10), 4, True), ((8, 7, 6), 6, False)]
)
def test_windows_that_do_not_fit_are_padded_without_being_seen(grid, limit, shifted):
    torch.manual_seed(1)
    plan = window_plan(grid, limit, shifted, CPU)
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    assert torch.equal(from_windows(to_windows(x, plan), plan), x)
    assert all(w <= limit and p % w == 0 for w, p in zip(plan.window, plan.padded, strict=True))
    marks = to_windows(torch.ones(1, *grid, 1), plan)[..., 0] > 0  # (windows, T): real tokens
    start = 0
    for count, mask in plan.groups:
        for window in marks[start : start + count]:
            if mask is not None:
                seen = mask & ~torch.eye(len(window), dtype=torch.bool)
                assert not bool((seen & ~window[None]).any())  # nobody attends to padding
            else:
                assert bool(window.all())
        start += count


def test_gathering_has_a_gradient():
    plan = window_plan((5, 1, 2), 4, True, CPU)
    x = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: to_windows(v, plan), (x,))
    assert torch.autograd.gradcheck(lambda v: from_windows(to_windows(v, plan), plan) * 2, (x,))


def test_relative_index_is_antisymmetric():
    index = relative_index((2, 3, 4), 4, CPU).view(24, 24)
    assert bool((index + index.T == 7**3 - 1).all()) and int(index[0, 0]) == (7**3 - 1) // 2
    pairs = {tuple(map(int, (index[a, b],))) for a, b in itertools.product(range(24), repeat=2)}
    assert len(pairs) == 3 * 5 * 7


@pytest.mark.parametrize(("dim", "heads"), [(12, 1), (24, 1), (48, 3), (96, 6)])
def test_fast_and_careful_softmax_agree(dim, heads, monkeypatch):
    torch.manual_seed(2)
    attention = WindowAttention(dim, heads, 4)
    tokens, plan = torch.randn(8, 64, dim) * 3, window_plan((8, 8, 8), 4, True, CPU)
    with torch.no_grad():
        fast = attention(tokens, plan)
        monkeypatch.setattr(scunet_windows, "SAFE", -1.0)
        careful = attention(tokens, plan)
        assert torch.allclose(fast, careful, atol=1e-5)
        attention.qkv.weight.mul_(300)  # scores of thousands
        monkeypatch.setattr(scunet_windows, "SAFE", 60.0)
        assert bool(torch.isfinite(attention(tokens, plan)).all())


def test_no_score_is_larger_than_its_bound():
    torch.manual_seed(13)
    for dim, heads in ((12, 1), (48, 3), (96, 6)):
        attention = WindowAttention(dim, heads, 4)
        torch.nn.init.normal_(attention.norm.bias)
        torch.nn.init.normal_(attention.relative)
        with torch.no_grad():
            q, k, _ = attention._queries(torch.randn(50, 64, dim), 0)
            scores = q @ k.transpose(-1, -2) * (dim // heads) ** -0.5 + attention.bias((4, 4, 4))
            bound = attention._largest_score(attention.bias((4, 4, 4)))
            assert float(scores.abs().max()) < bound


def test_accelerators_get_the_same_attention_in_parts(monkeypatch):
    torch.manual_seed(12)
    q, k, v = torch.randn(3, 10, 2, 8, 16, dtype=torch.float64)
    for bias in (torch.randn(1, 2, 8, 8, dtype=torch.float64), torch.randn(10, 2, 8, 8, dtype=torch.float64)):
        whole = scunet_windows._attend(q, k, v, bias, 12)
        with monkeypatch.context() as patch:
            patch.setattr(scunet_windows, "MOST", 3)
            assert torch.allclose(scunet_windows._attend(q, k, v, bias, 12), whole, atol=1e-12)
        weights = (q @ k.transpose(-1, -2) * 12**-0.5 + bias).softmax(-1)
        assert torch.allclose(whole, (weights @ v)[..., :12].transpose(1, 2), atol=1e-10)
        cpu = scunet_windows._attend_cpu(q, k, v.index_fill(3, torch.tensor([12]), 1.0), bias, 12, True)
        careful = scunet_windows._attend_cpu(q, k, v, bias, 12, False)
        assert torch.allclose(whole, cpu, atol=1e-10) and torch.allclose(whole, careful, atol=1e-10)


def test_norm_by_products_is_layer_norm():
    torch.manual_seed(3)
    norm, layer = torch.nn.LayerNorm(12).double(), torch.nn.Linear(12, 20).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(4, 7, 12, dtype=torch.float64) * 5 + 3
    assert torch.allclose(normed_linear(x, norm, layer.weight, layer.bias), layer(norm(x)), atol=1e-10)


def test_filter_response_norm_is_the_formula_in_float32():
    torch.manual_seed(4)
    norm = FilterResponseNorm(6)
    for parameter in (norm.gamma, norm.beta, norm.tau):
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 5, 6, 7, 6) * torch.tensor([1e-4, 1.0, 30.0, 300.0, 1.0, 1.0])
    nu2 = x.double().square().mean((1, 2, 3), keepdim=True)
    exact = torch.maximum(norm.gamma * x / (nu2 + 1e-6).sqrt() + norm.beta, norm.tau)
    assert torch.allclose(norm(x), exact.float(), atol=1e-5)
    half = norm(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), exact.float(), atol=0.08)
    # a mean of squares beyond the reach of bf16 sums (and of half precision) is still right
    large = torch.full((1, 24, 24, 24, 6), 3.0).bfloat16()
    plain = FilterResponseNorm(6)
    assert torch.allclose(plain(large).float(), torch.ones(1), atol=0.01)


def test_norm_of_an_empty_crop_is_finite():
    norm = FilterResponseNorm(4)
    x = torch.zeros(1, 4, 4, 4, 4, requires_grad=True)
    norm(x).sum().backward()
    assert bool(torch.isfinite(x.grad).all()) and float(norm(x).detach().abs().max()) == 0.0


def test_norm_gradients():
    norm = FilterResponseNorm(2).double()
    torch.nn.init.normal_(norm.beta)
    x = torch.randn(1, 3, 2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))


@pytest.mark.parametrize("box", [(32, 32, 32), (16, 40, 24), (7, 20, 33), (1, 8, 9)])
def test_any_box_goes_in_and_comes_out(box):
    torch.manual_seed(5)
    model = Scunet(SPECS["micro"]).eval()
    with torch.no_grad():
        out = model(torch.rand(2, 1, *box))
    assert out.shape == (2, 1, *box) and bool(torch.isfinite(out).all())


def test_samples_of_a_batch_do_not_meet():
    torch.manual_seed(6)
    model = Scunet(SPECS["micro"]).eval()
    x = torch.rand(3, 1, 16, 24, 16)
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(row[None]) for row in x])
    assert torch.allclose(together, alone, atol=1e-5)


def test_wrong_shapes_are_refused():
    encoder = Encoder(SPECS["micro"])
    with pytest.raises(ValueError, match="map crops"):
        encoder(torch.rand(2, 16, 16, 16))
    with pytest.raises(ValueError, match="do not fit"):
        encoder(torch.rand(1, 1, 16, 16, 16), torch.ones(1, 2, 2, 3, dtype=torch.bool))
    for wrong in ({"d": 7}, {"n": 0}, {"drop_path": 1.0}, {"window": 2.5}):
        with pytest.raises(ValueError):
            ScunetSpec(**wrong)


def test_every_parameter_learns():
    torch.manual_seed(7)
    model = Scunet(ScunetSpec(d=8, drop_path=0.0)).train()
    model(torch.rand(1, 1, 32, 32, 32)).square().mean().backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or not bool(torch.isfinite(p.grad).all())
    ] == []


def test_bf16_is_close_to_float32_and_keeps_its_type():
    torch.manual_seed(8)
    model = Scunet(SPECS["micro"]).eval()
    x = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(x)
        features = model.encoder(x)
    with torch.no_grad():
        full = model(x)
    assert half.dtype == torch.bfloat16 and all(f.dtype == torch.bfloat16 for f in features)
    assert float((half - full).norm() / full.norm()) < 0.05


def test_stages_alternate_shifts_over_encoder_and_decoder():
    def shifts(stages):
        return [[block.transformer.shifted for block in blocks] for blocks in stages]

    one, two = SPECS["default"], SPECS["large"]
    with torch.device("meta"):
        assert shifts(Encoder(one).stages) == [[False]] * 4 and shifts(Decoder(one).stages) == [[True]] * 3
        assert shifts(Encoder(two).stages) == [[False, True]] * 3 + [[False, False]]
        drops = [block.transformer.drop for blocks in Encoder(one).stages for block in blocks]
        drops += [block.transformer.drop for blocks in reversed(Decoder(one).stages) for block in blocks]
    assert drops == pytest.approx([0.2 * i / 6 for i in range(7)])


def test_dropped_branches_keep_the_mean_and_take_whole_samples():
    torch.manual_seed(9)
    layer = Transformer(4, 1, 4, False, drop=0.5)
    branch = torch.ones(3 * 400, 2, 4)
    dropped = layer.train()._dropped(branch, 400).view(3, 400, -1)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert bool((dropped == dropped[:1, :, :1]).all()) and float(dropped.mean()) == pytest.approx(1.0, abs=0.15)
    assert layer.eval()._dropped(branch, 400) is branch


def test_block_starts_near_the_identity_scale():
    torch.manual_seed(10)
    block = SCBlock(16, 16, 4).eval()
    x = torch.randn(1, 8, 8, 8, 16)
    with torch.no_grad():
        assert 0.5 < float(block(x).std() / x.std()) < 3.0


def _toy(n: int = 1) -> tuple[Encoder, torch.Tensor, torch.Tensor]:
    torch.manual_seed(11)
    encoder = Encoder(ScunetSpec(d=8, n=n)).double().eval()
    crops = torch.rand(2, 1, 32, 24, 32, dtype=torch.float64)
    visible = torch.rand(2, 4, 3, 4) > 0.5
    return encoder, crops, visible


@pytest.mark.parametrize("n", [1, 2])
def test_hidden_tokens_are_zero_and_nobody_attends_to_them(n):
    """What the hidden voxels of the input hold changes nothing but through the convolutions of the first layer."""
    encoder, crops, visible = _toy(n)
    voxels = Visible.at(visible, 8).voxels.movedim(-1, 1)
    with torch.no_grad():
        features = encoder(torch.where(voxels, crops, 0.3), visible)
    for level, feature in enumerate(features[:4]):
        hidden = ~Visible.at(visible, 8 >> level).voxels
        assert float((feature * hidden).abs().max()) == 0.0
    assert float(features[-1][~visible].abs().max()) == 0.0
    assert bool((features[-1][visible].abs().sum(-1) > 0).all())


def test_all_tokens_shown_is_the_plain_encoder():
    encoder, crops, visible = _toy()
    with torch.no_grad():
        masked, plain = encoder(crops, torch.ones_like(visible)), encoder(crops)
    for a, b in zip(masked, plain, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_a_crop_of_which_nothing_is_shown_is_zero():
    encoder, crops, visible = _toy()
    visible[0] = False
    features = encoder(crops, visible)
    features[-1].square().sum().backward()
    assert float(features[-1][0].detach().abs().max()) == 0.0
    assert all(bool(torch.isfinite(p.grad).all()) for p in encoder.parameters() if p.grad is not None)


def test_norm_counts_visible_voxels_only():
    norm = FilterResponseNorm(3).double()
    x = torch.randn(2, 8, 8, 16, 3, dtype=torch.float64)
    tokens = torch.zeros(2, 1, 1, 2, dtype=torch.bool)
    tokens[:, 0, 0, 0] = True
    with torch.no_grad():
        out = norm(x, Visible.at(tokens, 8))
    assert torch.allclose(out[..., :8, :], norm(x[..., :8, :]), atol=1e-12)
    assert float(out[..., 8:, :].abs().max()) == 0.0
