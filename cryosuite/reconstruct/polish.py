"""Latent to map: the iterated local modal Wiener filter that turns classes of particles into maps (BENCHMARKS, 5).

Every class has two half maps. A pass makes them from the sums of the backprojection with the result of the pass before
as prior (before the first: one map for all classes), finds the eigenmodes of what the halves share across classes, and
keeps of every mode, in every window and band, what the halves agree on. Related states lend each other what they have
in common; unrelated ones are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cryosuite.console import Progress
from cryosuite.errors import InputError, notice
from cryosuite.kernels import shells
from cryosuite.kernels.parallel import in_threads
from cryosuite.reconstruct import polish_gain
from cryosuite.reconstruct.class_sums import ClassSums
from cryosuite.reconstruct.masks import auto_mask, soft_sphere
from cryosuite.reconstruct.solve import PaddedGrid, Sums, crop_padded, gridding, pad_map, solve

BASES = ("auto", "modal", "class")
PADDED_GRIDS = 6  # values that one map takes at a time while it is made, in grids of the padded box


@dataclass(frozen=True)
class PolishOptions:
    """How maps are polished; the defaults need no tuning.

    passes: after the first one, each with the maps of the one before as prior. first_prior, prior: weight of the prior,
    one map for all classes in the first pass, in units of the shell mean of W. window_A: standard deviation of the
    window, Angstrom.
    basis: "modal", "class", or "auto": whichever is expected to leave the smaller error. chance: agreement of the
    halves is doubted below this many standard deviations of what noise alone would show.
    """

    passes: int = 2
    first_prior: float = 0.1
    prior: float = 0.5
    window_A: float = polish_gain.WINDOW_A  # noqa: N815 -- the unit
    basis: str = "auto"
    chance: float = polish_gain.CHANCE

    def __post_init__(self) -> None:
        if self.basis not in BASES:
            raise InputError(f"--basis {self.basis}: expected one of {', '.join(BASES)}")
        if self.passes < 0:
            raise InputError(f"--passes {self.passes}: expected 0 or more")
        if not self.chance >= 0:
            raise InputError(f"chance {self.chance}: expected 0 or more")
        for name in ("first_prior", "prior", "window_A"):
            if not getattr(self, name) > 0:
                flag = name.removesuffix("_A").replace("_", "-")
                raise InputError(f"--{flag} {getattr(self, name)}: expected more than 0")


@dataclass
class Polished:
    """Maps of K classes. All (K, D, D, D) float32 in the grey values of the images unless said otherwise.

    Attributes:
        maps: polished; half_a, half_b: polished half maps. They share their gains: no resolution may be read from them.
        mask: (D, D, D) around all classes, found in the polished maps.
        basis: "modal" or "class" (or the name of another mode); gain: (passes + 1, B) mean gain per band of
            `polish_gain.band_centres`, None in other modes.
        counts: (K, 2) particles in each half set; from_mean: classes without particles in one of the halves, which
            hold the mean of the others.
    """

    maps: Tensor
    half_a: Tensor
    half_b: Tensor
    mask: Tensor
    pixel_size: float
    counts: np.ndarray
    basis: str
    gain: Tensor | None = None
    from_mean: list[int] = field(default_factory=list)


def polish(
    sums: ClassSums,
    options: PolishOptions | None = None,
    prior: Tensor | None = None,
    progress: str | None = None,
    threads: int = 0,
) -> Polished:
    """Polished maps of all classes from their backprojection sums.

    Args:
        sums: of `class_sums.accumulate`.
        prior: (K, D, D, D) maps of another origin (a network's) used as prior of the first pass, with the weight of the
            later ones; default: each half set's own map of all classes together.
        progress: label of a progress display.
        threads: that share the classes; 0: as many as torch has. The maps do not depend on their number.

    Raises:
        InputError: no class has particles in both half sets.
    """
    options = options or PolishOptions()
    used = np.nonzero((sums.counts > 0).all(1))[0]
    if not len(used):
        raise InputError(
            "polish: no class has particles in both half sets, so signal cannot be told from noise: give more "
            "particles, fewer classes, or check the half sets (rlnRandomSubset)"
        )
    D, window = sums.box_size, options.window_A / sums.pixel_size
    mask = soft_sphere(D)
    # one pair of half maps, overwritten by every step: 100 classes at D = 128 take 2.5 GB, the joint maps included
    halves = torch.empty(2, len(used), D, D, D)
    gains, basis = [], options.basis
    bar = Progress((options.passes + 1) * 2 * len(used), progress, "maps") if progress else None
    try:
        if bar is not None:
            bar.__enter__()
        for number in range(options.passes + 1):
            weight = options.first_prior if number == 0 and prior is None else options.prior

            def fill(bar: Progress | None, number: int = number, weight: float = weight) -> None:
                if number == 0:
                    halves[:] = one_for_all(sums, used, weight)[:, None] if prior is None else prior[used]
                fill_halves(halves, sums, used, weight, mask, bar, threads)  # noqa: B023

            fill(bar)
            found, basis = _gained(halves, mask, window, basis, fill, options.chance, threads)
            mask = auto_mask(found.maps)
            mask = mask if float(mask.sum()) > 0 else soft_sphere(D)
            gains.append(found.mean_gain)
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)
    missing = sorted(set(range(sums.n_classes)) - set(used.tolist()))
    whole = [_spread(maps, used, sums) for maps in (found.maps, *halves)]
    if missing:
        notice(
            f"classes {', '.join(map(str, missing))} have no particles in one of the half sets: their maps are the "
            "mean of the other classes"
        )
    return Polished(*whole, mask, sums.pixel_size, sums.counts, basis, torch.stack(gains), missing)


def fill_halves(
    halves: Tensor,
    sums: ClassSums,
    classes: np.ndarray,
    weight: float,
    mask: Tensor,
    bar: Progress | None = None,
    threads: int = 0,
) -> None:
    """Y = F^-1[(B + lam Wm P) / (W + lam Wm)] x mask for both halves, P being what ``halves`` (2, K, D, D, D) holds.

    Args:
        weight: lam. threads: as `in_threads`; the result does not depend on them.
    """
    D = sums.box_size
    correction, grid = gridding(D), PaddedGrid(D)

    def made(place_and_half: tuple[int, int]) -> tuple[int, int, Tensor]:
        place, h = place_and_half
        found = Sums(sums.load(int(classes[place]), h), grid)
        level = found.regulariser(weight)
        # a shell without data, and the mean, come from the prior alone
        values = found.B + level * torch.fft.rfftn(pad_map(halves[h, place] * correction, found.pad))
        padded = torch.fft.irfftn(values / (found.W + level), s=(D * found.pad,) * 3)
        return place, h, crop_padded(padded, D) / correction * mask

    pieces = ((place, h) for place in range(len(classes)) for h in (0, 1))
    for place, h, volume in in_threads(made, pieces, threads, PADDED_GRIDS * 4 * (2 * D) ** 3):
        halves[h, place] = volume
        if bar is not None:
            bar.advance()


def one_for_all(sums: ClassSums, classes: np.ndarray, weight: float) -> Tensor:
    """(2, D, D, D) what each half set says of all classes together, the prior of classes that say nothing themselves.

    The particles of a class may show it from some sides only: latents of a network that knows the poses often follow
    the view, and a rare state has few views. Without a prior both of its half maps lack the same directions, and the
    filter, which believes what the halves share, takes that for signal.
    """
    out = torch.empty(2, *(sums.box_size,) * 3)
    for h in (0, 1):
        total = sums.load(int(classes[0]), h)
        for k in classes[1:]:
            total = total + sums.load(int(k), h)
        out[h] = solve(total, weight, passes=0)
    return out


def _gained(
    halves: Tensor, mask: Tensor, window: float, basis: str, refill: Callable[[None], None], chance: float, threads: int
) -> tuple[polish_gain.Gained, str]:
    """Filter the halves in the wanted basis, or in the one that leaves the smaller error by its own account."""
    covariance = polish_gain.shell_covariance(*halves, threads)
    matrices = polish_gain.bases(covariance)
    if basis != "auto":
        return polish_gain.apply_gains(halves, mask, matrices[basis], window, chance=chance, threads=threads), basis
    likely, other = ("modal", "class") if polish_gain.related(covariance) else ("class", "modal")
    rival = polish_gain.apply_gains(halves, mask, matrices[other], window, False, chance, threads).score
    found = polish_gain.apply_gains(halves, mask, matrices[likely], window, chance=chance, threads=threads)
    if found.score <= rival:
        return found, likely
    refill(None)  # the wrong guess has overwritten the halves
    return polish_gain.apply_gains(halves, mask, matrices[other], window, chance=chance, threads=threads), other


def _spread(maps: Tensor, used: np.ndarray, sums: ClassSums) -> Tensor:
    """Maps of the classes in use put among all K; the others get the mean, weighted by particles."""
    if len(used) == sums.n_classes:
        return maps
    counts = torch.from_numpy(sums.counts[used].sum(1)).float()
    mean = torch.tensordot(counts / counts.sum(), maps, dims=1)
    out = mean.expand(sums.n_classes, *mean.shape).clone()
    out[torch.from_numpy(used)] = maps
    return out


def raw_maps(sums: ClassSums, k: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The unpolished map and half maps of one class: plain regularised backprojection of its own particles."""
    maps = [solve(sums.load(k, h)) if sums.counts[k, h] > 0 else None for h in (0, 1)]
    return solve(sums.joint(k)), *maps


def raw_fsc(half_a: Tensor | None, half_b: Tensor | None, mask: Tensor) -> Tensor | None:
    """(D/2,) FSC of two raw half maps inside a mask; None without both."""
    return None if half_a is None or half_b is None else shells.fsc(half_a, half_b, mask)
