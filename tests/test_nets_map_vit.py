"""The map ViT: as many parameters as the SCUNet, any box, and hidden tokens that nobody can read."""

from __future__ import annotations

import pytest
import torch

from cryosuite.nets.map_vit import VIT_SPECS, MapVit, MapVitSpec, VitEncoder
from cryosuite.nets.scunet import SPECS, Scunet
from cryosuite.nets.vit import Attention

TINY = MapVitSpec(24, 2, 1, 3)


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", list(SPECS))
def test_as_many_parameters_as_the_scunet(name):
    with torch.device("meta"):
        ratio = _count(MapVit(VIT_SPECS[name])) / _count(Scunet(SPECS[name]))
    assert 0.8 < ratio < 1.2


def test_any_box_and_every_voxel_in_its_place():
    net = MapVit(TINY).eval()
    x = torch.rand(2, 1, 17, 24, 30)
    assert net(x).shape == x.shape
    with torch.no_grad():  # an output bias that differs by voxel must come back where it stands in the token
        net.decoder.out.weight.zero_()
        net.decoder.out.bias.copy_(torch.arange(512.0))
    tile = net(torch.rand(1, 1, 16, 16, 16))[0, 0]
    assert torch.equal(tile[8:, :8, 8:], torch.arange(512.0).view(8, 8, 8))


def test_hidden_voxels_cannot_be_read():
    torch.manual_seed(0)
    encoder = VitEncoder(TINY).eval()
    crops = torch.rand(2, 1, 24, 24, 24, requires_grad=True)
    visible = torch.rand(2, 3, 3, 3) < 0.5
    features = encoder(crops, visible)[-1]
    assert features.shape == (2, 3, 3, 3, 24) and not features[~visible].any()
    (grad,) = torch.autograd.grad(features.square().sum(), crops)
    voxels = visible[:, None].repeat_interleave(8, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
    assert not grad[~voxels].any() and grad[voxels].abs().max() > 0
    everything = encoder(crops, torch.ones_like(visible))[-1]
    assert torch.allclose(everything, encoder(crops)[-1], atol=1e-5)
    with pytest.raises(ValueError, match="do not fit"):
        encoder(crops, visible[:, :2])


def test_attention_to_some_keys_is_attention_without_the_others():
    attention = Attention(12, 3)
    x, keys = torch.rand(1, 6, 12), torch.tensor([[True, True, False, True, False, True]])
    assert torch.allclose(attention(x, keys)[keys], attention(x[keys][None])[0], atol=1e-6)


def test_sizes_that_do_not_go_together():
    for wrong in ((25, 2, 1, 3), (24, 0, 1, 3), (24, 2.0, 1, 3)):
        with pytest.raises(ValueError, match="whole numbers"):
            MapVitSpec(*wrong)
