"""The transformer: sizes as published, positions, context."""

from __future__ import annotations

import pytest
import torch

from cryosuite.nets.vit import WeightTokenTransformer, best_patch


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_sizes():
    with torch.device("meta"):
        net = WeightTokenTransformer(128, 16, 129, 768, 6, 12, "none")
    assert count(net.embed) == 197_376
    assert count(net.blocks[0]) == 7_085_568
    assert net.tokens.numel() == 99_072
    assert count(net) == 197_376 + 6 * 7_085_568 + 99_072


def test_returns_the_weight_tokens():
    net = WeightTokenTransformer(16, 4, 5, 8, 2, 2)
    assert net(torch.randn(3, 16, 16)).shape == (3, 5, 8)


def test_without_positions_patches_are_an_unordered_bag():
    images = torch.randn(2, 16, 16)
    swapped = images.clone()
    swapped[:, :4, :4], swapped[:, 8:12, 4:8] = images[:, 8:12, 4:8], images[:, :4, :4]
    for kind, same in (("none", True), ("learned", False), ("sincos", False)):
        torch.manual_seed(0)
        net = WeightTokenTransformer(16, 4, 3, 8, 2, 2, kind)
        assert torch.allclose(net(images), net(swapped), atol=1e-5) == same


def test_context_reaches_the_tokens():
    net = WeightTokenTransformer(16, 4, 3, 8, 1, 2, n_context=3)
    image = torch.randn(1, 16, 16).expand(2, -1, -1)
    out = net(image, torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]))
    assert not torch.allclose(out[0], out[1])


@pytest.mark.parametrize("size, patch", [(128, 16), (64, 8), (256, 32), (96, 12)])
def test_best_patch_gives_eight_per_side(size, patch):
    assert best_patch(size) == patch


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple of the patch"):
        WeightTokenTransformer(30, 16, 3, 8, 1, 2)
