"""The fall of a map's amplitudes with frequency, measured and replaced by that of a model's map.

Proteins and nucleic acids differ little in their radial amplitudes (0.04 in ln |F| beyond 15 A, over 30 structures of
the training set), maps of them differ by orders of magnitude: B-factors of the specimen and of the camera, sharpening,
filters. ``match_spectrum`` takes that difference away before a network sees a map. No model is needed: inside a mask,
ln |F| is fitted by a parabola in s^2 from 15 A to the resolution d, and the map is multiplied by what makes it
the fall of ChimeraX's molmap at d, exp(-2 pi^2 (.225 d)^2 s^2). The line in s^2 is the Guinier plot of Rosenthal and
Henderson (2003); the square is for parts of different B-factors. On simulated maps of training structures the result
correlates with the model as well as the best B-factor that can be found with the model.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cryosuite.kernels.density import MOLMAP_SIGMA
from cryosuite.kernels.map_norm import FEW, MANY, quantile

__all__ = ["SPECTRA", "estimate_resolution", "filter_limit", "flattened", "match_spectrum"]

SPECTRA = ("matched", "as-is")  # how a network sees maps

FROM = 15.0  # A, where the fit begins; twice the resolution for coarse maps
EDGE = 5  # shells of the low-pass filter's cosine
BEYOND = 0.8  # of the resolution, where the map ends
INNER = 2  # shells before the resolution where the fit ends: filters may have begun
DROP = 6.0  # fall of ln |F|^2 over three shells that only a filter or padding makes
STEEPER = 1.8  # fall of ln |F|^2 over four shells, beyond what is expected, that only a filter makes
EXPECTED = 150.0  # A^2, B-factor that any map may fall by; more if the shells before fell by more
BEFORE = 6  # such shells, from 15 A on: further in it is the shape of the molecule that falls
RISES = 0.5  # of ln |F|^2 beyond a filter: more is a dip of the molecule's own (helices have one about 7 A)
CALM = 12.0  # A, where the search for filters begins
SQUARE = 6  # shells that a parabola needs; a line is fitted to fewer
FINEST = 2.2  # voxels: no resolution is finer
ROLL_OFF = 0.03  # of the resolution's frequency: .01 is the best for CC, .1 for Q and FSC (training structures)
STANDS_OUT = 4.0  # power inside the mask over that outside, at the resolution
SOFT = 3  # passes of the blur that makes a mask soft
SLAB = 32  # planes of Fourier space at a time
LARGEST = 20.0  # of the gain's logarithm
COARSEST = 30.0  # A, of an estimate

Voxel = float | tuple[float, float, float]


def match_spectrum(
    volume: Tensor,  # (z, y, x)
    voxel_size: Voxel,  # A; one, or of z, y, x
    mask: Tensor,  # (z, y, x) bool
    resolution: float,  # A
) -> tuple[Tensor, float]:  # (z, y, x), A
    """The map with the amplitudes of a molmap of this resolution, low-passed there; phases are kept.

    The second is the resolution that was used: never finer than 2.2 voxels, nor than where a filter ends the map.

    The scale is such that frequencies below 1/15 A stay as they are. Beyond the resolution the gain grows no more, and
    at .8 of it the map ends: what little lies between is signal in part. A map that is empty inside the mask, or too
    small for a fit, is only cut there. See the module's text.
    """
    voxel = _triple(voxel_size)
    s, power = _profile(_inside(volume, mask), volume.shape, voxel)  # one spectrum after the other: they are large
    spectrum = torch.fft.rfftn(volume)
    whole = _profile(spectrum, volume.shape, voxel)[1]
    resolution = max(resolution, FINEST * max(voxel), _filtered_at(s, whole))
    fit = _fall(s, power, resolution)
    size = max(n * v for n, v in zip(volume.shape, voxel, strict=True))
    for part, square in _squares(volume.shape, voxel, volume.device):
        beyond = (square.sqrt() - 1 / (BEYOND * resolution)) * (size / EDGE)
        log = _log_gain(square, fit, resolution)
        spectrum[part] *= log.exp_() * (0.5 - 0.5 * torch.cos(math.pi * (0.5 - beyond).clamp_(0, 1)))
    return torch.fft.irfftn(spectrum, s=volume.shape), resolution


def flattened(
    volume: Tensor,  # (z, y, x)
    voxel_size: Voxel,  # A
    resolution: float,  # A
    roll_off: float = ROLL_OFF,
) -> Tensor:  # (z, y, x)
    """A molmap of this resolution without its blur: divided by exp(-2 pi^2 (.225 d)^2 s^2) up to s = 1/d.

    That is a B-factor of -4 d^2 (44 A^2 at 3.3 A). Beyond, the map ends as a Gaussian of ``roll_off`` / d, so that
    little is left that the data did not hold. Applied to what a network makes, which was taught molmaps.
    """
    voxel = _triple(voxel_size)
    spectrum = torch.fft.rfftn(volume)
    for part, square in _squares(volume.shape, voxel, volume.device):
        log = 2 * math.pi**2 * (MOLMAP_SIGMA * resolution) ** 2 * square.clamp(max=1 / resolution**2)
        log -= ((square.sqrt() * resolution - 1).clamp_(min=0) / roll_off).square_() / 2
        spectrum[part] *= log.exp_()
    return torch.fft.irfftn(spectrum, s=volume.shape)


def estimate_resolution(
    volume: Tensor,  # (z, y, x)
    voxel_size: Voxel,  # A
    mask: Tensor,  # (z, y, x) bool
) -> float:
    """A guess at the resolution (A) of a map that comes without half maps.

    Where the power inside the mask, per voxel, falls to four times that outside: a compromise, since half maps
    correlate by .6 there inside the mask, and by .2 in the whole box where the molecule fills a sixth of it. Never
    finer than where a filter ends the map (``filter_limit``), nor than 2.2 voxels.
    """
    voxel = _triple(voxel_size)
    far = _soft(mask) == 0  # so far that no molecule reaches into the soft edge of what is measured there
    s, inside = _profile(_inside(volume, mask), volume.shape, voxel)
    outside = _profile(_inside(volume, far), volume.shape, voxel)[1]
    whole = _profile(torch.fft.rfftn(volume), volume.shape, voxel)[1]
    finest = max(FINEST * max(voxel), _ended_at(s, whole))
    if not bool(far.any()) or not bool(mask.any()):
        return finest
    shares = [float(_soft(one).square().mean()) for one in (mask, far)]
    ratio = (inside / shares[0]) / np.maximum(outside / shares[1], 1e-30)
    low = (s > 1 / FROM) & (ratio < STANDS_OUT)
    ends = np.flatnonzero(low[:-1] & low[1:])
    found = 1 / s[ends[0]] if len(ends) else finest
    return float(min(max(found, finest), COARSEST))


def filter_limit(
    volume: Tensor,  # (z, y, x)
    voxel_size: Voxel,  # A
) -> float:
    """A, where a low-pass filter, or padding in Fourier space, ends a map, masked or not; 0 where none is seen."""
    s, power = _profile(torch.fft.rfftn(volume), volume.shape, _triple(voxel_size))
    return _ended_at(s, power)


def _triple(voxel_size: Voxel) -> tuple[float, float, float]:
    return voxel_size if isinstance(voxel_size, tuple) else (float(voxel_size),) * 3


def _soft(mask: Tensor) -> Tensor:
    """A bool mask with an edge some voxels wide."""
    soft = mask.float()[None, None]
    for kernel, pad in (((5, 1, 1), (2, 0, 0)), ((1, 5, 1), (0, 2, 0)), ((1, 1, 5), (0, 0, 2))) * SOFT:
        soft = F.avg_pool3d(soft, kernel, 1, pad)
    return soft[0, 0]


def _inside(volume: Tensor, mask: Tensor) -> Tensor:
    """Half spectrum of the map, less its level outside the mask, inside the soft mask; of all of it without a mask."""
    if not bool(mask.any()):
        return torch.fft.rfftn(volume)
    step = max(1, volume.numel() // MANY) | 1  # odd: no plane of the box is met again and again
    outside = volume.flatten()[::step][~mask.flatten()[::step]]
    level = quantile(outside, 0.5) if len(outside) * step > FEW * volume.numel() else float(volume.mean())
    inner = _soft(mask)
    return torch.fft.rfftn(inner.mul_(volume - level))


def _profile(spectrum: Tensor, shape: torch.Size, voxel: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies of shells (1/A), and the mean of |F|^2 of a half spectrum on them."""
    size = max(n * v for n, v in zip(shape, voxel, strict=True))
    shells = int(size / (2 * max(voxel)))
    sums = torch.zeros(2, shells + 1, dtype=torch.float64)
    for part, square in _squares(shape, voxel, spectrum.device):
        index = (square.sqrt() * size).round_().int().clamp_(max=shells).flatten()
        power = torch.view_as_real(spectrum[part]).square().sum(-1)
        sums[0] += torch.bincount(index, power.flatten().double(), shells + 1).cpu()
        sums[1] += torch.bincount(index, minlength=shells + 1).cpu()
    return np.arange(shells) / size, (sums[0] / sums[1].clamp(min=1))[:shells].numpy()


def _squares(shape: torch.Size, voxel: tuple[float, float, float], device: torch.device):
    """s^2 of the half grid in slabs along z: (slice, (planes, y, x//2 + 1))."""
    z, y = (torch.fft.fftfreq(n, size, device=device) for n, size in zip(shape[:2], voxel[:2], strict=True))
    flat = y[:, None].square() + torch.fft.rfftfreq(shape[2], voxel[2], device=device).square()
    for start in range(0, shape[0], SLAB):
        part = slice(start, min(start + SLAB, shape[0]))
        yield part, z[part, None, None].square() + flat


def _ended_at(s: np.ndarray, power: np.ndarray) -> float:
    """A, where a filter or padding ends a map, whatever a mask left beyond; 0 where none does."""
    return _filtered_at(s, power) or _steepens_at(s, power)


def _filtered_at(s: np.ndarray, power: np.ndarray) -> float:
    """A, where a filter, or padding in Fourier space, ends the map; 0 where nothing does."""
    log = np.log(np.maximum(power, 1e-300))
    falls = np.flatnonzero((log[:-3] - log[3:] > DROP) & (s[:-3] > 1 / FROM))
    return float(1 / s[falls[0] + 2]) if len(falls) else 0.0  # the last shell with anything in it


def _steepens_at(s: np.ndarray, power: np.ndarray) -> float:
    """A, where amplitudes suddenly fall faster and do not recover: a filter has halved them; 0 where they do not.

    Filters whose edge is blunted by what came after them: a mask, or an even solvent, has power at every frequency.
    """
    log, square = np.log(np.maximum(power, 1e-300)), s**2
    middle = np.arange(4, len(log) - 2)
    middle = middle[s[middle] > 1 / CALM]
    if not len(middle):
        return 0.0
    first, last = middle - 2, middle + 2
    before = np.minimum(np.maximum(first - BEFORE, np.searchsorted(s, 1 / FROM)), first - 1)
    rate = (log[before] - log[first]) / (square[first] - square[before])  # half a B-factor
    rate = np.maximum(rate, EXPECTED / 2)
    excess = log[first] - log[last] - rate * (square[last] - square[first])
    highest = np.maximum.accumulate(log[::-1])[::-1]  # from a shell on
    found = np.flatnonzero((excess > STEEPER) & (highest[last] < log[last] + RISES))
    if not len(found):
        return 0.0
    edge = found[middle[found] <= middle[found[0]] + 4]  # shells of the same edge
    at = edge[np.argmax(excess[edge])]
    start = first[at] - 2  # an edge of five shells has begun before the four that fall fastest
    below = log[start] - rate[at] * (square[start:] - square[start]) - log[start:]
    return float(1 / s[start + np.argmax(below >= math.log(4))])


def _fall(s: np.ndarray, power: np.ndarray, resolution: float) -> tuple[np.ndarray, float, float]:
    """Coefficients of ln |F| in s^2, highest power first, and the bounds of s^2 between which they were fitted."""
    low, high = 1 / max(FROM, 2 * resolution), 1 / resolution
    step = s[1] if len(s) > 1 else high
    chosen = (s >= low) & (s <= high - INNER * step) & (power > 0)
    if chosen.sum() < 3:
        return np.zeros(1), low**2, high**2
    x, y = s[chosen] ** 2, 0.5 * np.log(power[chosen])
    weights = np.sqrt(s[chosen])  # the fourth root of the number of coefficients
    degree = 2 if chosen.sum() >= SQUARE else 1
    return np.polyfit(x, y, degree, w=weights), low**2, float(x[-1])


def _log_gain(square: Tensor, fit: tuple[np.ndarray, float, float], resolution: float) -> Tensor:
    """ln of the gain at s^2: constant below and beyond the fit."""
    coefficients, low, high = fit
    if len(coefficients) == 1:
        return torch.zeros_like(square)
    inside = square.clamp(low, high)
    log = torch.full_like(square, float(np.polyval(coefficients, low)))
    value = torch.zeros_like(square)
    for one in coefficients:
        value = value * inside + float(one)
    log -= value
    log -= 2 * math.pi**2 * (MOLMAP_SIGMA * resolution) ** 2 * inside.sub_(low)
    return log.clamp_(-LARGEST, LARGEST)
