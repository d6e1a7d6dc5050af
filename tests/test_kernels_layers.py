"""Layers for the CPU against plain torch: values, gradients, mixed precision, ranges."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cryosuite.kernels import layers_cpu
from cryosuite.kernels.layers import fourier_features, norm_relu, product


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(run, *tensors: torch.Tensor) -> list[torch.Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = run(*leaves)
    (out * numbers(*out.shape, seed=9)).sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("reach", [1.0, 30.0, 1000.0])
def test_sine_and_cosine(reach):
    """Accurate to the rounding of the float32 phase."""
    q, f = numbers(300, 3), numbers(3, 21, seed=1) * reach
    phase = q.double() @ f.double()
    expected = torch.cat([phase.sin(), phase.cos()], -1)
    bound = 3e-7 + 2e-7 * float(phase.abs().max())
    assert (fourier_features(q, f) - expected).abs().max() < bound


def test_multiples_of_half_a_turn():
    q = torch.zeros(401, 3)
    q[:, 0] = torch.arange(-200, 201) * (torch.pi / 2)
    values = fourier_features(q, torch.tensor([[1.0], [0.0], [0.0]]))
    expected = torch.cat([q[:, :1].double().sin(), q[:, :1].double().cos()], -1)
    assert (values - expected).abs().max() < 4e-7


def test_gradient_of_the_features():
    f = numbers(3, 8, seed=1) * 5
    ours = gradients(lambda q: fourier_features(q, f), numbers(2, 30, 3))
    plain = gradients(lambda q: torch.cat([(q @ f).sin(), (q @ f).cos()], -1), numbers(2, 30, 3))
    assert torch.allclose(ours[0], plain[0], atol=1e-4)


def test_product_and_its_gradients():
    x, w, b = numbers(3, 70, 24), numbers(20, 40, seed=1)[:, :24], numbers(20, seed=2)
    assert torch.allclose(product(x, w, b), F.linear(x, w, b), atol=1e-4)
    for ours, plain in zip(gradients(product, x, w, b), gradients(F.linear, x, w, b), strict=True):
        assert torch.allclose(ours, plain, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("with_residual", [True, False])
def test_norm_with_residual_and_its_gradients(with_residual):
    x, h, g, b = numbers(2, 50, 37) * 3 + 1, numbers(2, 50, 37, seed=1), 1 + numbers(37, seed=2), numbers(37, seed=3)

    def plain(x, g, b, *h):
        out = F.layer_norm(x, (37,), g, b)
        return torch.relu(out + h[0] if h else out)

    def ours(x, g, b, *h):
        return norm_relu(x, h[0] if h else None, g, b)

    given = (x, g, b, h) if with_residual else (x, g, b)
    assert torch.allclose(ours(x.clone(), *given[1:]), plain(*given), atol=2e-6)
    for mine, theirs in zip(gradients(ours, *given), gradients(plain, *given), strict=True):
        assert torch.allclose(mine, theirs, atol=2e-5, rtol=1e-4)


def test_not_a_number_stays_so():
    x = numbers(80, 16)
    x[3, 5] = torch.nan
    out = norm_relu(x, None, torch.ones(16), torch.zeros(16))
    assert torch.isnan(out[3]).all() and torch.isfinite(out[4]).all()


def test_without_the_compiled_loops(monkeypatch):
    x, h, q, f = numbers(80, 16), numbers(80, 16, seed=1), numbers(80, 3, seed=2), numbers(3, 8, seed=3)
    one, zero = torch.ones(16), torch.zeros(16)
    fast = norm_relu(x.clone(), h, one, zero), fourier_features(q, f)
    monkeypatch.setattr(layers_cpu, "available", lambda: False)
    slow = norm_relu(x.clone(), h, one, zero), fourier_features(q, f)
    for a, b in zip(fast, slow, strict=True):
        assert torch.allclose(a, b, atol=2e-6)
