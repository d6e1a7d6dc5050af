"""Prior-mean mode of `polish`: a network's own map as prior, trusted in every shell as far as the data bear it out.

    V = F^-1[(B + tau P) / (W + tau)],    P: the network's map, scaled per shell to the data of the same half set

tau(r), a multiple of the shell mean of W, is the one that predicts the other half set best inside the mask:
err(tau, r) = sum_shell |F mask (V_a(tau) - Y_b)|^2 + (a <-> b), summed over all classes (BENCHMARKS, section 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryosuite.errors import InputError
from cryosuite.kernels.slices import Accumulator
from cryosuite.reconstruct.class_sums import ClassSums
from cryosuite.reconstruct.masks import auto_mask, soft_sphere
from cryosuite.reconstruct.polish_gain import half_radius
from cryosuite.reconstruct.solve import Sums, crop_padded, gridding, pad_map

TAUS = (1e-3, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)  # in units of the shell mean of a half set's W


@dataclass
class PriorMaps:
    """Maps and half maps (K, D, D, D) with the network's map as prior.

    tau: (D/2 + 1,) chosen per shell, in units of the shell mean of W. mask: (D, D, D). pixel_size in Angstrom.
    """

    maps: Tensor
    half_a: Tensor
    half_b: Tensor
    tau: Tensor
    mask: Tensor
    pixel_size: float


def prior_mean(sums: ClassSums, prior: Tensor, mask: Tensor | None = None) -> PriorMaps:
    """Maps of all classes from their sums and the network's maps.

    Args:
        prior: (K, D, D, D) maps in any grey scale; or (2, K, D, D, D), those of half a and of half b, where the maps
            come from the data themselves: then neither half ever sees the other's.
        mask: (D, D, D), default one found in the prior maps.

    Raises:
        InputError: shapes that do not fit, or no class with particles in both half sets.
    """
    D, K = sums.box_size, sums.n_classes
    if tuple(prior.shape) not in ((K, D, D, D), (2, K, D, D, D)):
        raise InputError(f"prior maps of shape {tuple(prior.shape)} for {K} classes of box {D}")
    pair = prior if prior.ndim == 5 else prior.expand(2, K, D, D, D)
    prior = pair.mean(0) if prior.ndim == 5 else prior
    used = np.nonzero((sums.counts > 0).all(1))[0]
    if not len(used):
        raise InputError("no class has particles in both half sets: the prior cannot be weighed against the data")
    sphere = soft_sphere(D)
    mask = auto_mask(prior * sphere) if mask is None else mask
    mask = mask if float(mask.sum()) > 0 else sphere
    tau = _choose(sums, pair, mask, used.tolist())
    out = torch.empty(3, K, D, D, D)
    for k in range(K):
        grids = [Sums(sums.load(k, 0)), Sums(sums.load(k, 1)), Sums(sums.joint(k))]
        # tau is an absolute precision: the joint map has twice the data and the same prior
        for place, (which, P, part) in enumerate(((2, prior, 0.5), (0, pair[0], 1.0), (1, pair[1], 1.0))):
            out[place, k] = _map(grids[which], scaled_prior(grids[which], P[k], sphere), tau * part)
    return PriorMaps(out[0] * sphere, out[1] * sphere, out[2] * sphere, tau, mask, sums.pixel_size)


def scaled_prior(grid: Sums | Accumulator, prior: Tensor, sphere: Tensor) -> Tensor:
    """The prior's transform on the padded grid, scaled to the data per shell: alpha = <P, B> / <P, W P>, at least 0."""
    grid = grid if isinstance(grid, Sums) else Sums(grid)
    P = torch.fft.rfftn(pad_map(prior * sphere * gridding(prior.shape[-1], grid.pad), grid.pad))
    flat, size = grid.shell.reshape(-1), len(grid.mean)
    along = torch.bincount(flat, (P.conj() * grid.B).real.reshape(-1), size)
    norm = torch.bincount(flat, (grid.W * P.abs().square()).reshape(-1), size)
    alpha = (along / norm.clamp(min=1e-30)).clamp(min=0)
    if float(norm[0]) <= 0:  # the shell of the mean holds no data: it follows its neighbour
        alpha[0] = alpha[1]
    return P * alpha.to(P.real.dtype)[grid.shell]


def _map(grid: Sums, prior: Tensor, tau: Tensor | float) -> Tensor:
    D = grid.box_size
    level = grid.regulariser(tau)
    padded = torch.fft.irfftn((grid.B + level * prior) / (grid.W + level), s=(D * grid.pad,) * 3)
    return crop_padded(padded, D) / gridding(D, grid.pad)


def _choose(sums: ClassSums, prior: Tensor, mask: Tensor, used: list[int]) -> Tensor:
    """(D/2 + 1,) the tau of each shell that predicts the other half set best; prior: (2, K, D, D, D)."""
    D = sums.box_size
    shell = half_radius(D).round().long().clamp(max=D // 2).reshape(-1)
    sphere, column = soft_sphere(D), torch.arange(D // 2 + 1)
    twice = torch.where((column > 0) & (column < D // 2), 2.0, 1.0)
    error = torch.zeros(len(TAUS), D // 2 + 1, dtype=torch.float64)
    for k in used:
        grids = [Sums(sums.load(k, half)) for half in (0, 1)]
        priors = [scaled_prior(grid, P[k], sphere) for grid, P in zip(grids, prior, strict=True)]
        plain = [_map(grid, torch.zeros_like(P), TAUS[0]) for grid, P in zip(grids, priors, strict=True)]
        for number, tau in enumerate(TAUS):
            for half in (0, 1):
                difference = (_map(grids[half], priors[half], tau) - plain[1 - half]) * mask
                power = torch.fft.rfftn(difference).abs().square() * twice
                error[number] += torch.bincount(shell, power.reshape(-1).double(), D // 2 + 1)
    # neighbouring shells share their choice a little: single shells are noisy
    smooth = error.clone()
    smooth[:, 1:-1] = (error[:, :-2] + 2 * error[:, 1:-1] + error[:, 2:]) / 4
    return torch.tensor(TAUS)[smooth.argmin(0)]
