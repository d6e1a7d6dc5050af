"""Soft histograms: sums, gradients, the bounds of the divergence, what it must not depend on."""

from __future__ import annotations

import math

import pytest
import torch

from cryosuite.kernels import histogram
from cryosuite.kernels.histogram import histogram_divergence, jensen_shannon, soft_histogram


def test_histogram_is_the_formula():
    values = torch.tensor([0.1, 0.4, 0.41], dtype=torch.float64)
    centres = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    h = torch.exp(-((values[:, None] - centres) * 8).square() / 2).mean(0) + histogram.EPS
    assert torch.allclose(soft_histogram(values, 8), h / h.sum(), atol=1e-12)


def test_histogram_sums_to_one_whatever_it_counts():
    torch.manual_seed(0)
    few, many = torch.rand(2, 500), torch.rand(2, 500).repeat(1, 20)
    assert torch.allclose(soft_histogram(few).sum(-1), torch.ones(2), atol=1e-6)
    assert torch.allclose(soft_histogram(many[:, :500]), soft_histogram(many), atol=1e-6)


def test_chunks_change_nothing(monkeypatch):
    values, weight = torch.rand(2, 300, dtype=torch.float64), torch.rand(2, 300, dtype=torch.float64)
    whole = soft_histogram(values, weight=weight)
    monkeypatch.setattr(histogram, "CHUNK", 7)
    assert torch.allclose(soft_histogram(values, weight=weight), whole, atol=1e-12)


def test_weights_of_zero_and_one_are_a_choice():
    values = torch.rand(1, 400, dtype=torch.float64)
    weight = (torch.rand(1, 400) > 0.5).double()
    chosen = values[weight.bool()][None]
    assert torch.allclose(soft_histogram(values, weight=weight), soft_histogram(chosen), atol=1e-12)


def test_gradients():
    torch.manual_seed(1)
    x = torch.rand(2, 12, dtype=torch.float64, requires_grad=True)
    y, weight = torch.rand(2, 12, dtype=torch.float64), torch.rand(2, 12, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: soft_histogram(v, 6), (x,))
    assert torch.autograd.gradcheck(lambda v: histogram_divergence(v, y, weight, sample=0, bins=6), (x,))


def test_divergence_lies_between_nothing_and_ln_2():
    p = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    q = torch.tensor([0.0, 0.0, 0.5, 0.5], dtype=torch.float64)
    assert float(jensen_shannon(p, q)) == pytest.approx(math.log(2), rel=1e-12)
    assert float(jensen_shannon(p, p)) == 0.0
    random = torch.rand(50, 2, 16, dtype=torch.float64)
    random = random / random.sum(-1, keepdim=True)
    values = jensen_shannon(random[:, 0], random[:, 1])
    assert bool((values > 0).all()) and bool((values < math.log(2)).all())
    assert torch.allclose(values, jensen_shannon(random[:, 1], random[:, 0]))


def test_pull_goes_the_right_way():
    torch.manual_seed(2)
    target = torch.rand(1, 1, 8, 8, 8) * 0.5 + 0.25
    x = (target + 0.1).requires_grad_()
    loss = histogram_divergence(x, target, sample=0).sum()
    loss.backward()
    with torch.no_grad():
        after = histogram_divergence(x - 0.02 * x.grad / x.grad.abs().max(), target, sample=0).sum()
    assert float(after) < float(loss.detach()) < math.log(2)


def test_sample_estimates_the_whole_and_is_repeatable():
    torch.manual_seed(3)
    a, b = torch.rand(2, 24**3) ** 2, torch.rand(2, 24**3)
    whole = histogram_divergence(a, b, sample=0)
    some = [histogram_divergence(a, b, sample=4000, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*some)
    assert torch.allclose(some[0], whole, rtol=0.25)  # fewer values: a little more divergence


def test_empty_mask_gives_nothing_and_no_gradient():
    x = torch.rand(1, 100, requires_grad=True)
    value = histogram_divergence(x, torch.rand(1, 100), mask=torch.zeros(1, 100))
    value.sum().backward()
    assert float(value.detach()) == 0.0 and float(x.grad.abs().max()) == 0.0


def test_half_precision_is_counted_in_full():
    values = torch.rand(2, 5000)
    assert soft_histogram(values.bfloat16()).dtype == torch.float32
    assert float(jensen_shannon(soft_histogram(values.bfloat16()), soft_histogram(values)).max()) < 1e-4
