"""Gains of `polish`: a local Wiener filter in a basis of classes or of eigenmodes, from half-set statistics alone.

The two half sets give two maps of every class with independent noise. What they share is signal, what differs is noise;
so the cross-power of the halves, in a window in space and a band in frequency, tells how much of each channel to keep.
Nothing is known of the truth, of which classes resemble each other, or of where the molecule lies (BENCHMARKS, 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryosuite.errors import InputError
from cryosuite.kernels.parallel import in_threads

WINDOW_A = 12.5  # standard deviation of the window in space, Angstrom
CHANCE = 2.0  # cross-power is doubted below this many standard deviations of what noise alone would show
VALUES_AT_ONCE = 1 << 22
GRIDS = 24  # arrays of the size of a map that one channel takes while it is filtered
SAME = 1e-10  # of the signal: noise that is only the rounding of sums


@dataclass
class Gained:
    """What a basis gives: maps (K, D, D, D) of both halves joined (None where only asked for), and how much was kept.

    mean_gain: (B,) mean gain per band over channels and mask; score: expected error left, in units of the noise;
    noise: (B,) variance of the joint map per voxel and band.
    """

    maps: Tensor | None
    mean_gain: Tensor
    score: float
    noise: Tensor


def band_centres(box_size: int) -> list[float]:
    """Centres of the frequency bands in Fourier pixels: 0 2 .. 14 17 20 .. D/2 (14 bands at D = 64)."""
    last = box_size // 2
    centres = [float(r) for r in range(0, min(14, last) + 1, 2)]
    centres += [float(r) for r in range(17, last + 1, 3)]
    if last - centres[-1] > 1:
        centres.append(float(last))
    return centres


def bands(box_size: int, radius: Tensor) -> Tensor:
    """(B, ...) weights of overlapping triangular bands at the given radii (Fourier pixels); they sum to 1.

    The first and the last band stay 1 beyond their centres.
    """
    centres = torch.tensor(band_centres(box_size), dtype=radius.dtype, device=radius.device)
    place = torch.bucketize(radius.contiguous(), centres).clamp(1, len(centres) - 1)
    low, high = centres[place - 1], centres[place]
    share = ((radius - low) / (high - low)).clamp(0, 1)
    out = torch.zeros(len(centres), *radius.shape, dtype=radius.dtype, device=radius.device)
    out.scatter_(0, (place - 1)[None], (1 - share)[None])
    return out.scatter_add_(0, place[None], share[None])


def half_radius(box_size: int) -> Tensor:
    """(D, D, D/2 + 1) radius in Fourier pixels of the rfftn grid."""
    full = torch.fft.fftfreq(box_size, 1 / box_size)
    column = torch.arange(box_size // 2 + 1, dtype=torch.float32)
    return (full[:, None, None] ** 2 + full[None, :, None] ** 2 + column**2).sqrt()


@dataclass(frozen=True)
class Covariance:
    """Half-set statistics per shell r = 0 .. D/2: noise (S,), N (S, K, K), signal C (S, K, K), count (S,)."""

    noise: Tensor
    noise_matrix: Tensor
    signal: Tensor
    count: Tensor


def shell_covariance(half_a: Tensor, half_b: Tensor, threads: int = 0) -> Covariance:
    """N_kl = Re <d_k, d_l> / 4 with d = Y^a - Y^b, n = mean_k N_kk, C_kl = symmetric part of Re <Y_k^a, Y_l^b>.

    Per shell of integer radius, means over the coefficients of the full sphere, unnormalised transforms.

    Args:
        half_a, half_b: (K, D, D, D) maps of the two half sets. threads: as `in_threads`.
    """
    K, D = half_a.shape[0], half_a.shape[-1]
    radius = half_radius(D)
    shell = radius.round().long()
    shell[radius > D / 2] = D // 2 + 1
    order = torch.argsort(shell.reshape(-1), stable=True)
    sizes = torch.bincount(shell.reshape(-1), minlength=D // 2 + 2)[: D // 2 + 1]
    order = order[: int(sizes.sum())]
    column = torch.arange(D // 2 + 1)
    twice = torch.where((column > 0) & (column < D // 2), 2.0, 1.0).expand(D, D, -1).reshape(-1)[order]
    a, b = (torch.empty(K, len(order), 2) for _ in range(2))

    def ordered(k: int) -> None:
        for out, maps in ((a, half_a), (b, half_b)):
            values = torch.fft.rfftn(maps[k]).reshape(-1)[order]
            out[k] = torch.view_as_real(values) * twice.sqrt()[:, None]

    N, C, count = (torch.zeros(len(sizes), *shape) for shape in ((K, K), (K, K), ()))
    ends = sizes.cumsum(0).tolist()

    def of_shell(s: int) -> None:
        where = slice(ends[s] - int(sizes[s]), ends[s])
        ya, yb = (v[:, where].reshape(K, -1) for v in (a, b))
        count[s] = twice[where].sum()
        difference = ya - yb
        N[s] = difference @ difference.T / (4 * count[s])
        cross = ya @ yb.T / count[s]
        C[s] = (cross + cross.T) / 2

    for _ in in_threads(ordered, range(K), threads, 32 * D**3):
        pass
    for _ in in_threads(of_shell, reversed(range(len(sizes))), threads, 256 * K * D**2):  # the large ones first
        pass
    return Covariance(N.diagonal(dim1=1, dim2=2).mean(1), N, C, count)


def bases(covariance: Covariance) -> dict[str, Tensor]:
    """The two bases as (K, K) matrices from classes to channels of unit noise: "class" and "modal" (eigenmodes).

    Raises:
        InputError: the half maps do not differ.
    """
    strongest = covariance.signal.diagonal(dim1=1, dim2=2).max()
    if not float(covariance.noise.max()) > SAME * float(strongest):
        raise InputError(
            "polish: the two half maps of every class are the same, so signal cannot be told from noise: the images "
            "are empty, or each of them stands in both half sets (check rlnRandomSubset and repeated rows)"
        )
    n = covariance.noise.clamp(min=1e-30)
    used = covariance.noise > 1e-6 * covariance.noise.max()
    average = (covariance.noise_matrix / n[:, None, None])[used].mean(0)
    K = len(average)
    own = torch.diag(average.diagonal().clamp(min=1e-6).rsqrt())
    values, vectors = torch.linalg.eigh(average.double())
    whiten = (vectors * values.clamp(min=1e-4 * values.max()).rsqrt()) @ vectors.T
    S = whiten @ (covariance.signal.double() / n.double()[:, None, None]) @ whiten
    strength = S.diagonal(dim1=1, dim2=2).sum(1) / (3 * K)
    weight = torch.where(used, covariance.count, 0.0).double() / strength.clamp(min=1)
    _, modes = torch.linalg.eigh((weight[:, None, None] * S).sum(0))
    return {"class": own, "modal": (modes.flip(1).T @ whiten).to(own.dtype)}


def related(covariance: Covariance) -> bool:
    """Whether the classes look like states of one molecule: their signals correlate by more than a half on average.

    Only a first guess of the better basis, to try that one last; `Gained.score` decides.
    """
    n = covariance.noise.clamp(min=1e-30)
    signal = (covariance.signal * (covariance.count / n)[:, None, None])[covariance.noise > 1e-6 * n.max()].sum(0)
    own = signal.diagonal().clamp(min=1e-30).rsqrt()
    K = len(signal)
    return K > 1 and float((signal * own[:, None] * own).sum() - K) > 0.5 * K * (K - 1)


def chance_level(weights: Tensor, blur: Tensor) -> Tensor:
    """(B,) standard deviation of G[x^a x^b] for two independent white noises in a band, in units of their variance.

    The variance is sum_x R(x)^2 (g * g)(x): R the correlation of the band's noise, g the window. It is large where a
    window holds few waves of a band: there chance alone looks like signal.

    Args:
        weights: (B, D, D, D/2 + 1) of the bands; blur: transform of the window (same grid).
    """
    D = weights.shape[1]
    window = torch.fft.irfftn(blur.square(), s=(D,) * 3)
    out = torch.empty(len(weights))
    for b, band in enumerate(weights):
        correlation = torch.fft.irfftn(band.square(), s=(D,) * 3)
        out[b] = ((correlation / correlation[0, 0, 0]).square() * window).sum()
    return out.clamp(min=0).sqrt()


def apply_gains(
    halves: Tensor,
    mask: Tensor,
    basis: Tensor,
    window: float,
    keep: bool = True,
    chance: float = CHANCE,
    threads: int = 0,
) -> Gained:
    """Filter both halves and their mean, channel by channel, band by band, voxel by voxel.

    c = G[x^a x^b] / G[mask^2], n = mean of (x^a - x^b)^2 / 4; gain c+/(c+ + n) on the mean of the halves, c+/(c+ + 2n)
    on each half: the gain that minimises the error against an independent measurement. c is itself an estimate: with
    s = ``chance`` times the standard deviation that noise alone gives it, c^3 / (c^2 + s^2) takes its place.

    Args:
        halves: (2, K, D, D, D) masked half maps; FILTERED IN PLACE, so that many classes of large maps fit the memory.
        mask: (D, D, D); basis: (K, K) of `bases`; window: voxels.
        keep: False leaves the halves as they are and makes no maps: only the score is asked for.
        chance: 0 takes every cross-power at its word (the filter of BENCHMARKS section 5 as written).
        threads: as `in_threads`, of the channels; what comes out does not depend on their number.
    """
    K, D = halves.shape[1], halves.shape[-1]
    weights = bands(D, half_radius(D))
    column = torch.arange(D // 2 + 1)
    twice = torch.where((column > 0) & (column < D // 2), 2.0, 1.0)
    for half in halves:
        _mix(basis, half, threads)
    area = float((mask**2).sum())

    def noise_of(m: int) -> Tensor:
        power = torch.fft.rfftn(halves[0, m] - halves[1, m]).abs().square() * twice
        return torch.stack([(band.square() * power).sum() for band in weights]) / 4

    noise = sum(in_threads(noise_of, range(K), threads, GRIDS * 4 * D**3), torch.zeros(len(weights)))
    noise = noise / (D**3 * area * K)
    blur = _blur_window(D, window)
    support = torch.fft.irfftn(torch.fft.rfftn(mask**2) * blur, s=(D,) * 3).clamp(min=1e-3)
    # both halves have twice the variance of their mean
    doubt = (chance * 2 * noise * chance_level(weights, blur)).square()
    count = (weights * twice).sum((1, 2, 3))
    joint = torch.empty(K, D, D, D) if keep else None

    def filtered(m: int) -> Tensor:
        transforms = torch.fft.rfftn(halves[:, m], dim=(1, 2, 3))
        whole, parts, kept = torch.zeros(D, D, D), torch.zeros(2, D, D, D), torch.zeros(len(weights))
        for b, band in enumerate(weights):
            x = torch.fft.irfftn(transforms * band, s=(D,) * 3)
            shared = torch.fft.irfftn(torch.fft.rfftn(x[0] * x[1]) * blur, s=(D,) * 3).div_(support).clamp_(min=0)
            if chance > 0:
                square = shared.square()
                shared.mul_(square.div_((square + doubt[b]).clamp_(min=1e-30)))
            gain = shared / (shared + noise[b]).clamp_(min=1e-30)
            kept[b] = (gain * mask).sum() / mask.sum()
            if keep:
                whole += gain * (x[0] + x[1]) / 2
                parts += shared / (shared + 2 * noise[b]).clamp_(min=1e-30) * x
        if joint is not None:
            joint[m], halves[:, m] = whole, parts
        return kept

    kept = sum(in_threads(filtered, range(K), threads, GRIDS * 4 * D**3), torch.zeros(len(weights)))
    back = torch.linalg.inv(basis.double()).to(basis.dtype)
    for maps in halves if joint is None else (*halves, joint):
        _mix(back, maps, threads)
    kept = kept / K
    return Gained(joint, kept, float((count * kept).sum() / count.sum()), noise)


def _mix(matrix: Tensor, maps: Tensor, threads: int = 0) -> None:
    """Linear combinations of maps in their own place: (K, K) x (K, D, D, D), a slab of voxels at a time."""
    flat = maps.view(len(maps), -1)
    step = max(1, VALUES_AT_ONCE // len(maps))

    def mixed(start: int) -> None:
        flat[:, start : start + step] = matrix @ flat[:, start : start + step]

    for _ in in_threads(mixed, range(0, flat.shape[1], step), threads):
        pass


def _blur_window(box_size: int, sigma: float) -> Tensor:
    """Transform of a Gaussian of standard deviation sigma voxels on the rfftn grid."""
    return torch.exp(-2 * (torch.pi * sigma / box_size * half_radius(box_size)) ** 2)
