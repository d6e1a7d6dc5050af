"""Scores of codes from the Gram system, Bayes temperatures, MAP codes, twins and the triplet loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from cryosuite.kernels import assignment as a
from cryosuite.kernels.triplet import alignment_loss, triplet_loss, triplet_margin

f64 = torch.float64


@pytest.fixture
def problem():
    """basis (b, P, M), CTF over sigma, whitened data, codes (K, M), all in double precision."""
    g = torch.Generator().manual_seed(0)
    basis = torch.randn(3, 60, 5, dtype=torch.complex128, generator=g)
    weight = torch.rand(3, 60, dtype=f64, generator=g) - 0.3
    x = torch.randn(3, 60, dtype=torch.complex128, generator=g)
    return basis, weight, x, torch.randn(7, 5, dtype=f64, generator=g)


def explicit(basis, weight, x, codes):
    """h and g of explicit slices, as whole-disc sums."""
    slices = torch.einsum("bpm,km->bkp", basis * weight[..., None], codes.to(basis.dtype))
    return 2 * (slices.conj() * x[:, None]).sum(-1).real, 2 * slices.abs().square().sum(-1), slices


def test_scores_equal_those_of_explicit_slices(problem, monkeypatch):
    basis, weight, x, codes = problem
    h, g, slices = explicit(*problem)
    distance = -2 * (x[:, None] - slices).abs().square().sum(-1) / 2  # log density of complex noise of variance 1
    for chunk in (a.CHUNK_VALUES, 64):  # in one piece, and in many
        monkeypatch.setattr(a, "CHUNK_VALUES", chunk)
        system = a.gram(basis, weight, x)
        likelihood = a.log_likelihood(system, codes)
        assert torch.allclose(likelihood, a.likelihood_from_sums(h, g), atol=1e-10, rtol=0)
        assert torch.allclose(likelihood - likelihood[:, :1], distance - distance[:, :1], atol=1e-10, rtol=0)
        exact = h / (2 * x.abs().square().sum(1, keepdim=True) * g).sqrt()
        assert torch.allclose(a.cosines(system, codes), exact, atol=1e-10, rtol=0)
        assert torch.allclose(a.cosine_from_sums(h, g, system.n), exact, atol=1e-10, rtol=0)
    parts = torch.stack([basis.real, basis.imag], 2)
    for one, other in zip(a.gram_of_parts(parts, weight, x), system, strict=True):
        assert torch.allclose(one, other, atol=1e-10)


def test_gram_passes_a_gradient_where_one_is_asked_for(problem):
    basis, weight, x, codes = problem
    basis = basis[:1, :4].clone().requires_grad_(True)
    assert gradcheck(lambda b: a.log_likelihood(a.gram(b, weight[:1, :4], x[:1, :4]), codes), (basis,))


def test_scale_of_the_images_changes_nothing(problem):
    basis, weight, x, codes = problem
    sigma = 1.7

    def shares(rule, images, noise):
        values = a.scores(rule, a.gram(basis, weight / noise, images / noise), codes)
        return torch.softmax(a.logits(rule, values, 120, 0.3), 1)

    assert torch.allclose(shares("zcos", x, sigma), shares("zcos", 10 * x, sigma), atol=1e-12)
    # images x 10: signal (the codes) and noise are ten times larger too
    codes10 = 10 * codes
    p = shares("likelihood", x, sigma)
    codes = codes10
    assert torch.allclose(p, shares("likelihood", 10 * x, 10 * sigma), atol=1e-10)


def test_an_absolute_temperature_assigns_everything_to_everything(problem):
    """The published kernel with T = 0.1 on codes that correlate by .8: entropy ln K. In units of T* it decides."""
    g = torch.Generator().manual_seed(1)
    N, s, K = 12852, 0.1, 8
    cosine = torch.randn(50, K, dtype=f64, generator=g) / math.sqrt(N)
    cosine += math.sqrt(s / (1 + s)) * torch.tensor([1.0] + [0.8] * (K - 1), dtype=f64)
    p = torch.softmax(a.kernel_of_cosine(cosine) / 0.1, 1)
    assert -(p * p.log()).sum(1).mean() == pytest.approx(math.log(K), rel=0.005)
    for kernel in a.KERNELS:
        logit = a.logits("kernel", cosine, N, s, kernel)
        assert torch.equal(logit.argmax(1), a.logits("zcos", cosine, N, s).argmax(1))
        assert bool((torch.softmax(logit, 1)[:, 0] > 0.99).all())


@pytest.mark.parametrize(
    "rule, kernel", [("likelihood", "none"), ("zcos", "none"), *(("kernel", kernel) for kernel in a.KERNELS)]
)
def test_bayes_temperature_against_monte_carlo(rule, kernel):
    """At t = 1 the logit difference of two codes is their log-odds: among all trials with difference d, a share
    1 / (1 + exp(-d)) belongs to the first."""
    g = torch.Generator().manual_seed(2)
    P, trials, s, r = 400, 4000, 0.15, 0.96
    one = torch.randn(P, dtype=torch.complex128, generator=g)
    other = torch.randn(P, dtype=torch.complex128, generator=g)
    one /= one.abs().square().sum().sqrt()
    other -= (one.conj() * other).sum().real * one
    other = r * one + math.sqrt(1 - r * r) * other / other.abs().square().sum().sqrt()
    slices = torch.stack([one, other]) * math.sqrt(P * s)
    label = torch.arange(trials) % 2
    x = slices[label] + torch.randn(trials, P, dtype=torch.complex128, generator=g)
    h = 2 * (x[:, None] * slices.conj()).sum(-1).real
    energy = (2 * slices.abs().square().sum(1)).expand(trials, 2)
    n = 2 * x.abs().square().sum(1)
    values = a.scores_from_sums(rule, h, energy, n)
    assert float(a.signal_ratio(x)) == pytest.approx(s, abs=0.02)
    logit = a.logits(rule, values, float(a.n_effective(torch.ones(P))), s, kernel)
    difference = (logit[:, 0] - logit[:, 1]).requires_grad_(False)
    slope = torch.tensor(1.0, dtype=f64, requires_grad=True)  # logistic regression of the truth on the difference
    optimiser = torch.optim.LBFGS([slope], max_iter=50)

    def closure():
        optimiser.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(slope * difference, (label == 0).to(f64))
        loss.backward()
        return loss

    optimiser.step(closure)
    assert slope.item() == pytest.approx(1.0, abs=0.12)


def test_own_code_is_the_damped_least_squares_solution(problem):
    basis, weight, x, codes = problem
    mean, v = codes[:3], 0.3
    f, precision = a.map_codes(a.gram(basis, weight, x), mean, v, return_precision=True)
    A = (basis * weight[..., None]) * math.sqrt(2)
    for i in range(3):
        rows = torch.cat([A[i].real, A[i].imag, torch.eye(5, dtype=f64) / math.sqrt(v)])
        data = math.sqrt(2) * x[i]
        right = torch.cat([data.real, data.imag, mean[i] / math.sqrt(v)])
        assert torch.allclose(f[i], torch.linalg.lstsq(rows, right[:, None]).solution[:, 0], atol=1e-9)
    system = a.gram(basis, weight, x)
    assert torch.allclose(precision, system.G + torch.eye(5, dtype=f64) / v)
    single = a.map_codes(a.Gram(*(t.float() for t in system)), mean.float(), v)
    assert torch.allclose(single.double(), f, atol=1e-4)
    empty = a.map_codes(a.Gram(*(torch.zeros_like(t) for t in system)), mean, v)  # zero CTF: the prior mean
    assert torch.allclose(empty, mean)


def test_errors_of_own_codes_have_the_posterior_covariance():
    g = torch.Generator().manual_seed(3)
    P, M, v, trials = 40, 4, 0.2, 20000
    basis = torch.randn(1, P, M, dtype=torch.complex128, generator=g) * 0.3
    truth = math.sqrt(v) * torch.randn(trials, M, dtype=f64, generator=g)
    x = truth.to(basis.dtype) @ basis[0].T + torch.randn(trials, P, dtype=torch.complex128, generator=g)
    one = torch.ones(1, P, dtype=f64)
    system = a.gram(basis, one, x[:1])
    h = 2 * (x @ basis[0].conj()).real
    system = a.Gram(system.G.expand(trials, M, M), h, 2 * x.abs().square().sum(1))
    f, precision = a.map_codes(system, torch.zeros(trials, M, dtype=f64), v, return_precision=True)
    assert torch.allclose(torch.cov((f - truth).T), torch.linalg.inv(precision[0]), atol=0.06 * v)


def test_temperature_schedules():
    assert a.annealed(0, 8, 1) == pytest.approx(8)
    assert a.annealed(0.4, 8, 1) == pytest.approx(8**0.5)
    assert a.annealed(0.8, 8, 1) == a.annealed(1, 8, 1) == pytest.approx(1)
    assert a.annealed(0.5, 13, 1.3, shape="paper") == pytest.approx((13 + 1.3) / 2)
    assert a.annealed(0.3, 1, 1) == 1
    assert [a.balance_strength(f, 0.5) for f in (0, 0.4, 0.9)] == pytest.approx([0.5, 0.25, 0])
    busy = a.balance(torch.zeros(1, 2), torch.tensor([3.0, 1.0]), 0.5)
    assert float(busy[0, 1] - busy[0, 0]) == pytest.approx(0.5 * math.log(3))


def test_effective_number_and_published_temperatures():
    assert float(a.n_effective(torch.ones(6426))) == 12852
    assert float(a.n_effective(torch.tensor([1.0, 0.0]))) == 2
    half = 1 / (2 * 12852 * math.sqrt(0.1 * 1.1))  # the rough form, d = 1/2
    exact = a.bayes_temperature("kernel", 12852, 0.1)
    assert half == pytest.approx(1.2e-4, rel=0.05) and 0.5 * half < exact < half
    with pytest.raises(ValueError, match="must be one of likelihood"):
        a.bayes_temperature("cosine", 10, 0.1)


def test_twins_are_found_at_any_noise():
    """Two codes of one map and one other, correlated .8 with it, all with noise larger than the signal."""
    g = torch.Generator().manual_seed(4)
    n = 200_000
    one, new = torch.randn(2, n, generator=g)
    maps = torch.stack([one, one, 0.8 * one + 0.6 * new])
    halves = [maps + 1.2 * torch.randn(3, n, generator=g) for _ in range(2)]
    found = a.corrected_correlation(*halves)
    assert found[0, 1] == pytest.approx(1, abs=0.02) and found[0, 2] == pytest.approx(0.8, abs=0.02)
    assert a.merge_groups(found, 0.97).tolist() == [0, 0, 1]
    dead = a.corrected_correlation(torch.zeros(2, 10), torch.zeros(2, 10))
    assert torch.equal(dead, torch.eye(2))


def test_groups_are_connected_components():
    link = torch.eye(9)
    for i, j in ((0, 5), (5, 7), (7, 8), (2, 3)):
        link[i, j] = link[j, i] = 0.99
    assert a.merge_groups(link, 0.97).tolist() == [0, 1, 2, 2, 3, 0, 4, 0, 0]
    chain = torch.eye(100) + torch.diag(torch.ones(99), 1)
    assert a.merge_groups(chain, 0.5).tolist() == [0] * 100


def test_triplet_reaches_the_codes_only_and_has_the_right_gradient():
    g = torch.Generator().manual_seed(5)
    codes = torch.randn(4, 3, dtype=f64, generator=g).requires_grad_(True)
    f = torch.randn(6, 3, dtype=f64, generator=g).requires_grad_(True)
    logit = torch.randn(6, 4, dtype=f64, generator=g).requires_grad_(True)
    p, negative = torch.softmax(logit, 1), torch.softmax(-logit, 1)
    m = triplet_margin(codes, 0.1)
    total = (triplet_loss(f, codes, p, negative, m) + alignment_loss(f, codes, p)).sum()
    total.backward()
    assert f.grad is None and logit.grad is None and bool(codes.grad.abs().sum() > 0)

    unit = (codes - codes.mean(0)).square().mean().detach() * 3
    # the published formula, term by term
    best, mixed, far = codes[p.argmax(1)], p @ codes, negative @ codes
    own = (f - best).square().sum(1)
    positive = (own - (f - mixed).square().sum(1)) / unit + m
    reverse = (own - (best - far).square().sum(1)) / unit + m
    assert torch.allclose(triplet_loss(f, codes, p, negative, m), positive.relu() + reverse.relu())
    fixed = p.detach(), negative.detach(), m, unit
    assert gradcheck(lambda c: triplet_loss(f.detach(), c, *fixed), (codes,))
    scaled = triplet_loss(10 * f, 10 * codes, p, negative, m)
    assert torch.allclose(scaled, triplet_loss(f, codes, p, negative, m))


def test_alignment_stops_each_gradient_where_it_should():
    """The mixed code is drawn to c* (which stays), c* is drawn to f (which stays)."""
    codes = torch.tensor([[0.0, 1.0], [2.0, -1.0]], dtype=f64, requires_grad=True)
    p = torch.tensor([[0.75, 0.25]], dtype=f64)
    f = torch.tensor([[1.0, 1.0]], dtype=f64)
    unit = float((codes - codes.mean(0)).detach().square().mean() * 2)
    alignment_loss(f, codes, p, 0.25).sum().backward()
    mixed = p @ codes.detach()
    pull = 0.25 * 2 * (mixed - codes.detach()[:1])
    expected = p.T @ pull
    expected[0] += (2 * (codes.detach()[:1] - f))[0]
    assert torch.allclose(codes.grad * unit, expected)


def test_margin_is_a_share_of_the_mean_distance():
    codes = torch.randn(6, 3, dtype=f64)
    pairs = torch.cdist(codes, codes).square().sum() / 30
    unit = (codes - codes.mean(0)).square().mean() * 3
    assert torch.allclose(triplet_margin(codes, 0.1), 0.1 * pairs / unit)
