"""Soft assignment of particles to K codes: exact scores of all codes from one small system per image.

A code c (M,) makes the slice S = sum_m c_m b_m from M basis slices b. With whitened coefficients x = X / sigma of the
half disc, sigma^2 = E|noise|^2 of a complex coefficient, and A = (CTF / sigma) b, everything about all codes lies in

    G = 2 Re(A^H A)  (M, M),    h = 2 Re(A^H x)  (M,),    n = 2 |x|^2        (the 2 makes them whole-disc sums)
    log likelihood  l = h.c - c^T G c / 2      (up to a constant of the image)
    cosine        cos = h.c / sqrt(n c^T G c)

so that the cost hardly depends on K. For explicit slices (voxel maps) h.c and c^T G c are sums h, g over the slice.

Temperatures are given in units of T*, at which the softmax is the Bayes posterior: a useful difference of the published
kernel between two codes is 4e-4 to 2e-2, an absolute temperature of 0.1 therefore assigns everything to everything.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "RULES",
    "KERNELS",
    "Gram",
    "gram",
    "gram_of_parts",
    "quadratic",
    "log_likelihood",
    "cosines",
    "scores",
    "likelihood_from_sums",
    "cosine_from_sums",
    "scores_from_sums",
    "map_codes",
    "code_variance",
    "n_effective",
    "signal_ratio",
    "bayes_temperature",
    "kernel_of_cosine",
    "logits",
    "annealed",
    "balance",
    "balance_strength",
    "corrected_correlation",
    "merge_groups",
]

RULES = ("likelihood", "zcos", "kernel")
KERNELS = ("epanechnikov", "gaussian", "none")
CHUNK_VALUES = 1 << 20  # numbers in one weighted piece of the basis
TINY = 1e-30


class Gram(NamedTuple):
    """The system of b images: G (b, M, M), h (b, M), n (b,), real."""

    G: Tensor
    h: Tensor
    n: Tensor


def gram(
    basis: Tensor,  # (b, P, M) complex
    ctf_over_sigma: Tensor,  # (b, P) real
    x: Tensor,  # (b, P) complex, whitened data
) -> Gram:
    """G, h and n of each image. The weighted basis is made piece by piece unless a gradient is needed."""
    parts = torch.stack([basis.real, basis.imag], dim=2) if _needs_gradient(basis, ctf_over_sigma) else None
    if parts is not None:
        return gram_of_parts(parts, ctf_over_sigma, x)
    return _in_pieces(lambda at: torch.stack([basis[:, at].real, basis[:, at].imag], 2), basis, ctf_over_sigma, x)


def gram_of_parts(
    parts: Tensor,  # (b, P, 2, M) real: real and imaginary part of the basis
    ctf_over_sigma: Tensor,  # (b, P) real
    x: Tensor,  # (b, P) complex, whitened data
) -> Gram:
    """As `gram`, for a basis given as real numbers in the order a network gives them."""
    if not _needs_gradient(parts, ctf_over_sigma):
        return _in_pieces(lambda at: parts[:, at], parts[:, :, 0], ctf_over_sigma, x)
    weighted = (parts * ctf_over_sigma[..., None, None]).flatten(1, 2)  # (b, 2P, M)
    data = torch.view_as_real(x).flatten(1)  # (b, 2P): re, im of each point as in `weighted`
    G = 2 * weighted.transpose(1, 2) @ weighted
    h = 2 * (data[:, None] @ weighted)[:, 0]
    return Gram(G, h, 2 * data.square().sum(1))


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _in_pieces(read, basis: Tensor, ctf_over_sigma: Tensor, x: Tensor) -> Gram:
    """The sums over points, a piece of them at a time: the whole weighted basis never exists."""
    b, P, M = basis.shape
    data = torch.view_as_real(x)
    G, h = data.new_zeros(b, M, M), data.new_zeros(b, M, 1)
    step = max(1, CHUNK_VALUES // max(1, 2 * b * M))
    for begin in range(0, P, step):
        at = slice(begin, begin + step)
        weighted = (read(at) * ctf_over_sigma[:, at, None, None]).flatten(1, 2)
        across = weighted.transpose(1, 2)
        G.baddbmm_(across, weighted)
        h.baddbmm_(across, data[:, at].flatten(1)[..., None])
    return Gram(G.mul_(2), h.mul_(2)[..., 0], 2 * data.flatten(1).square().sum(1))


# scores of codes -----------------------------------------------------------------------------------------------------


def quadratic(system: Gram, codes: Tensor) -> Tensor:  # (K, M) -> (b, K)
    """c^T G c, the energy of each code's slice in each image: one product with all c c^T."""
    outer = codes[:, :, None] * codes[:, None, :]
    return system.G.flatten(1) @ outer.flatten(1).T


def log_likelihood(system: Gram, codes: Tensor) -> Tensor:  # (K, M) -> (b, K)
    """Log-likelihood of each code, exact up to a constant of the image."""
    return likelihood_from_sums(system.h @ codes.T, quadratic(system, codes))


def cosines(system: Gram, codes: Tensor) -> Tensor:  # (K, M) -> (b, K)
    """Cosine between the whitened image and each code's CTF-filtered slice; 0 for an empty slice or image."""
    return cosine_from_sums(system.h @ codes.T, quadratic(system, codes), system.n)


def scores(rule: str, system: Gram, codes: Tensor) -> Tensor:  # (K, M) -> (b, K)
    """What `logits` takes: likelihoods for the rule "likelihood", else cosines."""
    return log_likelihood(system, codes) if rule == "likelihood" else cosines(system, codes)


def likelihood_from_sums(h: Tensor, g: Tensor) -> Tensor:  # (b, K), (b, K) -> (b, K)
    """h - g / 2 with h = 2 Re<A S, x> and g = 2 |A S|^2 of explicit slices S."""
    return h - g / 2


def cosine_from_sums(h: Tensor, g: Tensor, n: Tensor) -> Tensor:  # (b, K), (b, K), (b,) -> (b, K)
    """h / sqrt(n g); 0 where the slice or the image is empty."""
    square = n[:, None] * g
    return torch.where(square > 0, h * square.clamp_min(TINY).rsqrt(), torch.zeros_like(h))


def scores_from_sums(rule: str, h: Tensor, g: Tensor, n: Tensor) -> Tensor:  # -> (b, K)
    """As `scores`, for explicit slices."""
    return likelihood_from_sums(h, g) if rule == "likelihood" else cosine_from_sums(h, g, n)


# the particle's own code ---------------------------------------------------------------------------------------------


def code_variance(codes: Tensor) -> Tensor:  # (K, M) -> ()
    """v = mean_k |c_k - mean c|^2 / M, the prior variance of a particle's own code."""
    return (codes - codes.mean(0)).square().mean()


@torch.no_grad()
def map_codes(
    system: Gram,
    mean: Tensor,  # (b, M) prior mean, usually sum_k p_k c_k
    variance: Tensor | float,  # v, prior variance per component
    return_precision: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (b, M)
    """MAP code f = (G + I/v)^-1 (h + mean/v) of each image, by Cholesky; no gradient.

    The covariance of its error is the inverse of the precision G + I/v (b, M, M), returned on request.
    """
    G, h, _ = system
    lam = 1 / torch.as_tensor(variance, dtype=G.dtype, device=G.device).clamp_min(1e-12)
    eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    precision = G + lam * eye
    level = precision.diagonal(dim1=1, dim2=2).mean(1)
    jitter = 16 * torch.finfo(G.dtype).eps * level[:, None, None]
    factor, _ = torch.linalg.cholesky_ex(precision + jitter * eye)
    # solved for the offset from the mean: it is small where the prior decides, and so is its rounding error
    offset = h - (G @ mean[..., None])[..., 0]
    f = mean + torch.cholesky_solve(offset[..., None], factor)[..., 0]
    return (f, precision) if return_precision else f


# temperatures and logits ---------------------------------------------------------------------------------------------


def n_effective(weights: Tensor) -> Tensor:  # (P,) -> ()
    """N_eff = (sum w^2)^2 / sum w^4 over the real degrees of freedom, two per half-disc point; w = 1 gives 2 P."""
    square = weights.square()
    return 2 * square.sum().square() / square.square().sum().clamp_min(TINY)


def signal_ratio(x: Tensor) -> Tensor:  # (..., P) complex, whitened -> ()
    """s = mean |x|^2 - 1, signal over noise per coefficient, at least 1e-4: T* of pure noise stays finite."""
    return (x.abs().square().mean() - 1).clamp_min(1e-4)


def bayes_temperature(
    rule: str, n_eff: Tensor | float, s: Tensor | float, kernel: str = "epanechnikov"
) -> Tensor | float:
    """T*: the temperature at which softmax(value / T*) is the posterior of codes of equal energy.

    The log-likelihood is N sqrt(s (1 + s)) cos; values are l (T* = 1), z = cos sqrt(N) (T* = 1 / sqrt(N s (1 + s))) or
    the kernel K(d) of d = (1 - cos) / 2 (T* = |dK/dcos| / (N sqrt(s (1 + s))) at the cosine of the true code,
    sqrt(s / (1 + s))). Floats give a float, tensors a tensor.
    """
    _check(rule, kernel)
    if rule == "likelihood":
        return 1.0
    if rule == "zcos":
        return (n_eff * s * (1 + s)) ** -0.5
    distance = (1 - (s / (1 + s)) ** 0.5) / 2
    return _slope(distance, kernel) / (n_eff * (s * (1 + s)) ** 0.5)


def _check(rule: str, kernel: str) -> None:
    if rule not in RULES:
        raise ValueError(f"the assignment rule must be one of {', '.join(RULES)}, not {rule}")
    if kernel not in KERNELS:
        raise ValueError(f"the kernel must be one of {', '.join(KERNELS)}, not {kernel}")


def _slope(distance: Tensor | float, kernel: str) -> Tensor | float:
    """|dK/dcos| at a distance: K = 1 - d^2, exp(-d^2 / 2) or 1 - d, and dd/dcos = -1/2."""
    if kernel == "epanechnikov":
        return distance
    if kernel == "gaussian":
        return distance / 2 * math.e ** (-(distance**2) / 2)
    return 0.5


def kernel_of_cosine(cosine: Tensor, kernel: str = "epanechnikov") -> Tensor:
    """K(d) of the distance d = (1 - cos) / 2: max(0, 1 - d^2) as published, exp(-d^2 / 2), or 1 - d ("none").

    With the published 1/2 the cut-off needs cos = -1: the three differ by little more than a factor on T.
    """
    distance = (1 - cosine) / 2
    if kernel == "epanechnikov":
        return (1 - distance.square()).clamp_min(0)
    return torch.exp(-distance.square() / 2) if kernel == "gaussian" else 1 - distance


def logits(
    rule: str,
    values: Tensor,  # (b, K): of `scores` or `scores_from_sums`
    n_eff: Tensor | float,
    s: Tensor | float,
    kernel: str = "epanechnikov",
) -> Tensor:  # (b, K)
    """Logits in units of T*: p = softmax(logits / t) with t = 1 the Bayes posterior, negatives softmax(-logits / t)."""
    temperature = bayes_temperature(rule, n_eff, s, kernel)
    if rule == "likelihood":
        return values
    if rule == "zcos":
        return values * (n_eff**0.5 / temperature)
    return (kernel_of_cosine(values, kernel) - 0.75) / temperature  # 3/4: near the values, so that rounding is small


def annealed(fraction: float, t_max: float, t_min: float, over: float = 0.8, shape: str = "geometric") -> float:
    """Temperature after a fraction of the training, in units of T*.

    "geometric": log T follows half a cosine from t_max to t_min over the first ``over`` and stays; "paper": T itself
    does, over the whole training.
    """
    progress = min(max(fraction / (1.0 if shape == "paper" else max(over, 1e-9)), 0.0), 1.0)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    if shape == "paper":
        return t_min + (t_max - t_min) * share
    return t_min * (t_max / t_min) ** share


def balance_strength(fraction: float, start: float, over: float = 0.8) -> float:
    """b of the load balance, falling linearly from ``start`` to 0 over the first ``over`` of the training."""
    return start * max(0.0, 1 - fraction / max(over, 1e-9))


def balance(values: Tensor, usage: Tensor, b: float) -> Tensor:  # (b, K), (K,) -> (b, K)
    """logits - b log pi: codes that are used much become less attractive. ``usage`` is scaled to sum 1 here."""
    if b == 0:
        return values
    share = usage / usage.sum().clamp_min(TINY)
    return values - b * share.clamp_min(1e-3 / len(share)).log().to(values.dtype)


# twins ---------------------------------------------------------------------------------------------------------------


def corrected_correlation(
    a: Tensor,  # (K, n) real or complex: half map a of each code
    b: Tensor,  # (K, n): half map b
) -> Tensor:  # (K, K)
    """Correlation of codes corrected for noise: Re<a_j, b_k> / sqrt(Re<a_j, b_j> Re<a_k, b_k>), symmetrised.

    1 for the same map at any noise. 0 where a code's halves do not agree at all (its own place is 1).
    """
    if a.is_complex():
        a, b = torch.view_as_real(a).flatten(1), torch.view_as_real(b).flatten(1)
    cross = a @ b.T
    own = cross.diagonal()
    scale = torch.where(own > 0, own.clamp_min(TINY).rsqrt(), torch.zeros_like(own))
    found = (cross + cross.T) / 2 * scale[:, None] * scale
    return found.fill_diagonal_(1.0)


def merge_groups(correlation: Tensor, threshold: float) -> Tensor:  # (K, K) -> (K,) int64
    """Connected components of codes that correlate above the threshold, numbered 0.. by their first member."""
    K = len(correlation)
    reach = (correlation > threshold) | torch.eye(K, dtype=torch.bool, device=correlation.device)
    reach = (reach | reach.T).float()
    for _ in range(max(1, math.ceil(math.log2(max(K, 2))))):  # squaring doubles the length of the chains followed
        reach = ((reach @ reach) > 0).float()
    first = reach.argmax(1)  # the smallest member of the component
    return torch.unique(first, return_inverse=True)[1]
