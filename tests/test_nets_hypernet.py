"""Hypernetworks: unit norms, which token writes which unit, gradients, low rank."""

from __future__ import annotations

import pytest
import torch

from cryosuite.nets.hypernet import (
    GroupHypernet,
    LayerShape,
    build_hypernet,
    layer_shapes,
    low_rank_norm,
    modulate,
)

SHAPES = layer_shapes(n_features=6, width=8, layers=2, groups=4, outputs=2)


def tokens(net, b: int = 3, dim: int = 5) -> torch.Tensor:
    return torch.randn(b, net.n_tokens, dim, generator=torch.Generator().manual_seed(1))


def test_layers_and_number_of_tokens():
    assert list(SHAPES) == [LayerShape(6, 8, 4), LayerShape(8, 8, 4), LayerShape(8, 2, 1)]
    assert GroupHypernet(SHAPES, 5).n_tokens == 9
    # the published layout: 32 groups for each of 4 hidden layers, one for the output
    assert sum(shape.groups for shape in layer_shapes(384, 1024, 4, 32, 1)) == 129


@pytest.mark.parametrize("kind", ["groups", "lowrank"])
def test_every_unit_has_unit_norm(kind):
    net = build_hypernet(kind, SHAPES, 5)
    for weight, shape in zip(net(tokens(net)), SHAPES, strict=True):
        assert weight.shape == (3, shape.fan_out, shape.fan_in)
        assert torch.allclose(weight.norm(dim=-1), torch.ones(3, shape.fan_out), atol=1e-6)


def test_modulation_is_the_papers_formula():
    base, scale = torch.randn(8, 6), torch.randn(3, 4, 6)
    explicit = torch.stack([base[j] * scale[:, j % 4] for j in range(8)], dim=1)
    explicit = explicit / explicit.norm(dim=-1, keepdim=True)
    assert torch.allclose(modulate(base, scale), explicit, atol=1e-6)


def test_a_token_moves_only_its_own_units():
    net = GroupHypernet(SHAPES, 5)
    before = tokens(net)
    after = before.clone()
    after[:, 4 + 2] = before[:, 4 + 2].flip(-1)  # token 2 of the second hidden layer
    for layer, (old, new) in enumerate(zip(net(before), net(after), strict=True)):
        changed = (old - new).abs().amax(dim=(0, 2)) > 1e-6
        expected = torch.arange(old.shape[1]) % 4 == 2 if layer == 1 else torch.zeros(old.shape[1], dtype=torch.bool)
        assert torch.equal(changed, expected)


def test_permuting_tokens_permutes_groups():
    net = GroupHypernet(SHAPES, 5)
    first = tokens(net)
    swapped = first.clone()
    swapped[:, [0, 3]] = first[:, [3, 0]]
    old, new = net(first)[0], net(swapped)[0]
    same = (old - new).abs().amax(dim=(0, 2)) < 1e-7
    assert torch.equal(same, torch.tensor([False, True, True, False] * 2))


def test_scale_of_the_base_does_not_matter():
    base, scale = torch.randn(8, 6), torch.randn(3, 4, 6)
    assert torch.allclose(modulate(base, scale), modulate(7 * base, scale), atol=1e-6)


def test_gradient_of_modulation():
    base = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(modulate, (base, scale))


@pytest.mark.parametrize("kind", ["groups", "lowrank"])
def test_gradient_of_the_whole_hypernet(kind):
    net = build_hypernet(kind, layer_shapes(3, 4, 1, 2, 1), 3).double()
    x = torch.randn(2, net.n_tokens, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: torch.cat([w.flatten() for w in net(t)]), (x,))


def test_bias_is_no_business_of_the_tokens():
    net = GroupHypernet(SHAPES, 5)
    sum(weight.sum() for weight in net(tokens(net))).backward()
    assert all(base.bias.grad is None for base in net.bases)


def test_low_rank_norms():
    base, u, v = torch.randn(7, 5), torch.randn(2, 3, 7), torch.randn(2, 3, 5)
    explicit = (base + u.transpose(1, 2) @ v).square().sum(-1)
    assert torch.allclose(low_rank_norm(base, u, v), explicit, rtol=1e-4)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="groups, lowrank"):
        build_hypernet("dense", SHAPES, 5)
