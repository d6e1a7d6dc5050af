"""CryoDECO's decoder: published weights and values, the split first layer, Friedel symmetry, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cryosuite.errors import InputError
from cryosuite.nets.deco_field import DecoField

PUBLISHED = {"deco_3x256_z8.weights.7": 128, "deco_noln_3x64_z4.weights.7": 64, "drgnai_3x96_z4.weights.3": 64}


def small(field: str = "complex", layer_norm: bool = True, dtype=torch.float64, **more) -> DecoField:
    torch.manual_seed(4)
    return DecoField(3, 16, 2, 6, layer_norm=layer_norm, field=field, box_size=32, **more).to(dtype)


def points(b: int = 2, n: int = 40, dtype=torch.float64) -> torch.Tensor:
    return torch.rand(b, n, 3, generator=torch.Generator().manual_seed(3), dtype=dtype) - 0.5


def latents(b: int = 2, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(b, 3, generator=torch.Generator().manual_seed(5), dtype=dtype)


def plain(field: DecoField, q: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The network as the paper writes it: latent concatenated to the features of every point."""
    angle = (q[..., None, :] * field.features.frequencies.T).sum(-1)
    h = torch.cat([angle.sin(), angle.cos(), z[:, None].expand(-1, q.shape[1], -1)], dim=-1)
    for number, layer in enumerate([field.first, *field.hidden]):
        y = layer(h)
        if field.norms is not None:
            y = F.layer_norm(y, y.shape[-1:], field.norms[number].weight, field.norms[number].bias)
        h = torch.relu(y + h if number else y)
    return field.last(h)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_give_the_published_values(golden, name):
    folder = golden / "cryodeco_decoder"
    state = torch.load(folder / f"{name}.pkl", weights_only=True)["hypervolume_state_dict"]
    io = np.load(folder / f"{name.split('.')[0]}_io.npz")
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        # the fixture's weights are float32 numbers: taken as they are, multiplied in the precision of the test
        field = DecoField.from_published({k: v.to(dtype) for k, v in state.items()}, PUBLISHED[name])
        field = field.to(dtype).load_published({k: v.to(dtype) for k, v in state.items()})
        q, z = torch.tensor(io["coords"]).to(dtype), torch.tensor(io["z"]).to(dtype)
        with torch.no_grad():
            found = field.network(q, z)[..., 0]
            both = field(q, z)
        assert np.abs(found.double().numpy() - io["out_f64"]).max() < bound
        assert np.abs((both[..., 0] - both[..., 1]).double().numpy() - io["out_f64"]).max() < bound


def test_features_in_the_published_order(golden):
    folder = golden / "cryodeco_decoder"
    state = torch.load(folder / "deco_noln_3x64_z4.weights.7.pkl", weights_only=True)["hypervolume_state_dict"]
    io = np.load(folder / "deco_noln_3x64_z4_io.npz")
    field = DecoField.from_published(state, 64).double().load_published(state)
    gamma = field.features(torch.tensor(io["coords"][:, :3]).double())
    assert np.abs(gamma.numpy() - io["pe_first3points_f64"]).max() < 1e-12


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("kind", ["complex", "hartley"])
def test_split_first_layer_equals_the_concatenation(kind, layer_norm):
    field = small(kind, layer_norm)
    assert torch.allclose(field.network(points(), latents()), plain(field, points(), latents()), atol=1e-12)


@pytest.mark.parametrize("kind", ["complex", "hartley"])
def test_volume_is_real(kind):
    field = small(kind)
    here, there = field(points(), latents()), field(-points(), latents())
    assert torch.allclose(here, there * torch.tensor([1.0, -1.0]), atol=1e-12)


@pytest.mark.parametrize("kind", ["complex", "hartley"])
def test_features_computed_once_give_the_same_values(kind):
    field = small(kind)
    shared = points(1)[0]
    expected = field(shared.expand(2, -1, -1), latents())
    assert torch.allclose(field.from_features(field.base_features(shared), latents()), expected, atol=1e-12)
    own = field.from_features(field.base_features(points()), latents())
    assert torch.allclose(own, field(points(), latents()), atol=1e-12)


def test_blocks_change_nothing(monkeypatch):
    field = small()
    whole = field(points(5, 37), latents(5))
    for block in (16, 16 * 7, 16 * 37, 16 * 80):
        monkeypatch.setattr("cryosuite.nets.deco_field.CPU_BLOCK", block)
        with torch.no_grad():
            assert torch.allclose(field(points(5, 37), latents(5)), whole, atol=1e-13)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_gradients_equal_those_of_the_plain_form(layer_norm):
    found = []
    for form in ("ours", "low memory", "plain"):
        field = small(layer_norm=layer_norm, low_memory=form == "low memory")
        q, z = points().requires_grad_(), latents().requires_grad_()
        values = plain(field, q, z) if form == "plain" else field.network(q, z)
        values.square().sum().backward()
        found.append([q.grad, z.grad, *(p.grad for p in field.parameters())])
    for ours, low, expected in zip(*found, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-11)
        assert torch.allclose(low, expected, rtol=1e-9, atol=1e-11)


def test_mixed_precision_stays_close_and_returns_float32():
    field = small(dtype=torch.float32)
    q, z = points(dtype=torch.float32), latents(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = field(q, z)
        found.square().sum().backward()
    assert found.dtype == torch.float32
    assert (found - field(q, z)).abs().max() < 0.05 * field(q, z).abs().max()
    assert torch.isfinite(field.first.weight.grad).all()


def test_weights_that_do_not_fit_are_refused(golden):
    folder = golden / "cryodeco_decoder"
    state = torch.load(folder / "drgnai_3x96_z4.weights.3.pkl", weights_only=True)["hypervolume_state_dict"]
    with pytest.raises(InputError, match="do not fit"):
        small("hartley", False, torch.float32).load_published(state)
    with pytest.raises(InputError, match="not the weights"):
        DecoField.from_published({k: v for k, v in state.items() if not k.endswith("4.linear.bias")}, 64)
    with pytest.raises(InputError, match="not the weights"):
        DecoField.from_published({"encoder.weight": torch.zeros(2, 2)}, 64)
