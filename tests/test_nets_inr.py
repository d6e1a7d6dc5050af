"""Coordinate networks: Hermitian symmetry, the fused layer, memory-saving mode, conditioning by concatenation."""

from __future__ import annotations

import pytest
import torch

from cryosuite.nets.inr import ConcatField, FourierFeatures, HyperField, half_space, mlp
from cryosuite.nets.triplane import TriplaneFeatures


def weights(field: HyperField, width: int = 8, b: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(width, field.features.size), (width, width), (width, width), (field.outputs, width)]
    return (
        [torch.randn(b, *size, generator=generator) for size in sizes],
        [torch.randn(size[0], generator=generator) for size in sizes],
    )


def points(b: int = 2, n: int = 50) -> torch.Tensor:
    return torch.rand(b, n, 3, generator=torch.Generator().manual_seed(3)) - 0.5


def test_mlp_equals_the_published_form():
    """Bias as an extra input (concatenation) and an explicit residual give the same numbers."""
    field = HyperField(FourierFeatures(6, 8.0))
    matrices, biases = weights(field)
    x = field.features(points())
    h = x
    for layer, (w, b) in enumerate(zip(matrices, biases, strict=True)):
        one = torch.ones(*h.shape[:-1], 1)
        full = torch.cat([w, b[None, :, None].expand(len(w), -1, 1)], dim=-1)
        out = torch.cat([h, one], dim=-1) @ full.transpose(1, 2)
        last = layer == len(matrices) - 1
        h = out if last else torch.relu(out + h if layer else out)
    assert torch.allclose(mlp(x, matrices, biases), h, rtol=1e-4, atol=1e-3)


def test_gradient_of_the_fused_layer():
    def run(x, w0, w1, w2, b):
        return mlp(x, [w0, w1, w2], [b, b, b[:1]])

    shapes = [(2, 5, 3), (2, 4, 3), (2, 4, 4), (2, 1, 4), (4,)]
    generator = torch.Generator().manual_seed(5)
    args = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]
    assert torch.autograd.gradcheck(run, args)


@pytest.mark.parametrize("kind", ["complex", "hartley"])
def test_volume_is_real(kind):
    """F(-q) = conj F(q), for both kinds of field."""
    field = HyperField(FourierFeatures(6, 8.0), kind)
    condition = weights(field)
    here, there = field(points(), *condition), field(-points(), *condition)
    assert torch.allclose(here[..., 0], there[..., 0], atol=1e-5 * here.abs().max())
    assert torch.allclose(here[..., 1], -there[..., 1], atol=1e-5 * here.abs().max())


def test_hartley_read_out():
    """Re F - Im F of what the Hartley field returns is the network's own value, at q and at -q."""
    field = HyperField(FourierFeatures(6, 8.0), "hartley")
    condition = weights(field)
    value = field(points(), *condition)
    own = field.network(points(), *condition)[..., 0]
    mirrored = field.network(-points(), *condition)[..., 0]
    assert torch.allclose(value[..., 0] - value[..., 1], own, atol=1e-4)
    assert torch.allclose(value[..., 0] + value[..., 1], mirrored, atol=1e-4)


def test_half_space_is_where_the_network_looks():
    seen = []

    class Spy(FourierFeatures):
        def forward(self, q):
            seen.append(q)
            return super().forward(q)

    field = HyperField(Spy(6, 8.0))
    field(points(), *weights(field))
    assert (seen[0][..., 2] >= 0).all()
    assert half_space(torch.tensor([[0.1, 0.2, 0.0], [0.0, 0.0, -1e-9]])).tolist() == [1.0, -1.0]


def test_features_are_sines_of_float32_phases():
    features = FourierFeatures(6, 8.0)
    phase = points() @ features.frequencies
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = features(points())
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.cat([phase.sin(), phase.cos()], -1), atol=1e-6)


def test_low_memory_changes_no_gradient():
    grads = []
    features = FourierFeatures(6, 8.0)
    for low_memory in (False, True):
        field = HyperField(features, low_memory=low_memory)
        matrices, biases = weights(field)
        matrices[1].requires_grad_()
        field(points(), matrices, biases).square().mean().backward()
        grads.append(matrices[1].grad)
    assert torch.allclose(*grads, rtol=1e-5)


def test_bfloat16_is_close():
    field = HyperField(FourierFeatures(6, 8.0))
    condition = weights(field)
    exact = field(points(), *condition)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = field(points(), *condition)
    assert fast.dtype == torch.float32
    assert (fast - exact).norm() < 0.03 * exact.norm()


def test_concatenation_is_concatenation():
    """Adding z W_z to the first layer equals a layer on [features, z]."""
    field = ConcatField(FourierFeatures(6, 8.0), zdim=3, width=8, layers=2)
    z, x = torch.randn(2, 3), field.features(points())
    joined = torch.cat([x, z[:, None].expand(-1, x.shape[1], -1)], dim=-1)
    h = torch.relu(joined @ torch.cat([field.first.weight, field.latent.weight], 1).T + field.first.bias)
    h = torch.relu(field.hidden[0](h) + h)
    assert torch.allclose(field.network(points(), [z], []), field.last(h), atol=1e-5)


def test_triplane_reads_grid_points_and_learns():
    features = TriplaneFeatures(box_size=8, channels=2)
    q = torch.tensor([[[0.25, -0.5, 0.0]]])  # pixel 6, 0, 4 of the 9 x 9 planes
    value = features(q)[0, 0]
    expected = torch.stack([features.planes[0][:, 0, 6], features.planes[1][:, 4, 0], features.planes[2][:, 4, 6]])
    assert torch.allclose(value, expected.flatten(), atol=1e-5)
    value.sum().backward()
    assert features.planes.grad.abs().sum() > 0


def test_unknown_field_is_refused():
    with pytest.raises(ValueError, match="complex, hartley"):
        HyperField(FourierFeatures(2, 1.0), "real")
