"""Do poses, shifts and CTF mean what the program takes them to mean? Asked of the images by quick backprojections.

A few thousand particles are backprojected as given and under the usual misunderstandings (rotations transposed, shifts
with the other sign, images mirrored, images already phase-flipped, ...). Half-map FSC alone is a poor judge: wrong
conventions give wrong maps that agree with each other. So each map of one half set is also asked to predict the images
of the other half,

    agreement = <F V_a, B_b> / sqrt(<F V_a, W_b F V_a> sum |X_b|^2 / sigma^2),

the correlation of predicted with observed coefficients, taken from the sums of the backprojection. The contrast and the
hand do not change it: see `map_skewness` and `compare_hands`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from cryosuite.data.particles import ParticleSet
from cryosuite.kernels import fourier, shells, slices
from cryosuite.kernels.ctf import ctf as evaluate_ctf
from cryosuite.kernels.ctf import odd_phase
from cryosuite.reconstruct.backproject import Accumulator, flip_hand
from cryosuite.reconstruct.masks import gaussian_blur, radius_grid, soft_sphere
from cryosuite.reconstruct.solve import Sums, gridding, pad_map, solve

SAMPLE = 3000  # particles
BOX = 64  # the maps' box: conventions show at low resolution
GIVEN, CONTROL = "given", "control"
MARGIN = 0.03  # relative gain in agreement below which alternatives count as equal
SIGMAS = 5.0  # and in standard errors


@dataclass
class View:
    """What one alternative changes of a chunk of particles: matrices (b, 3, 3), shifts (b, 2) or None, CTF (b, P)."""

    rotation: torch.Tensor
    shift: torch.Tensor | None
    ctf: torch.Tensor | None


@dataclass(frozen=True)
class Alternative:
    """One way to read the metadata: its name, what it would mean if it were the right one, and what to do then."""

    name: str
    meaning: str
    advice: str
    change: Callable[[View], View]


@dataclass
class Trial:
    """What an alternative gave: agreement with held-out images, half-map resolution (A), the joint map (D, D, D)."""

    alternative: Alternative
    agreement: float
    resolution: float
    fsc: torch.Tensor
    map: torch.Tensor


def _mirrored(view: View) -> View:
    rotation = view.rotation * view.rotation.new_tensor([1.0, -1.0, 1.0])[:, None]
    shift = None if view.shift is None else view.shift * view.shift.new_tensor([1.0, -1.0])
    return View(rotation, shift, view.ctf)


def alternatives(particles: ParticleSet) -> list[Alternative]:
    """The readings worth trying for a set, the given one first, the control (poses of other particles) last."""
    found = [
        Alternative(GIVEN, "the metadata mean what they say", "", lambda v: v),
        Alternative(
            "rotations transposed",
            "the rotations map the image to the volume instead of the volume to the image",
            "Transpose each matrix of poses.pkl (cryoSPARC's rotation vectors must be transposed), or take poses from "
            "the star or cs file directly.",
            lambda v: replace(v, rotation=v.rotation.transpose(1, 2)),
        ),
        Alternative(
            "images mirrored",
            "the images are upside down relative to the poses",
            "Some programs write images with y upwards: flip the stack, or export it again.",
            _mirrored,
        ),
    ]
    if particles.shift is not None and np.abs(particles.shift).max() > 0:
        found += [
            Alternative(
                "shifts negated",
                "the shifts point the other way",
                "Multiply the shifts by -1: they must be what is ADDED to centre the particle (rlnOrigin / box).",
                lambda v: replace(v, shift=-v.shift),
            ),
            Alternative(
                "no shifts",
                "the images were already centred when they were extracted",
                "Set the shifts to zero (the particles were re-extracted at their centres).",
                lambda v: replace(v, shift=None),
            ),
            Alternative(
                "shifts x and y swapped",
                "the columns of the shifts are in the order y, x",
                "Swap the two columns of the shifts.",
                lambda v: replace(v, shift=v.shift.flip(1)),
            ),
        ]
    if particles.ctf is not None and not particles.ctf_premultiplied:
        found += [
            Alternative(
                "phases already flipped",
                "the images were phase-flipped before",
                "Extract the particles again without phase flipping.",
                lambda v: replace(v, ctf=v.ctf.abs()),
            ),
            Alternative(
                "CTF already multiplied",
                "the images were multiplied by their CTF before",
                "Set rlnCtfDataAreCtfPremultiplied to 1 in the star file, or extract without premultiplication.",
                lambda v: replace(v, ctf=v.ctf.square()),
            ),
            Alternative(
                "no CTF",
                "the CTF parameters do not describe these images, or it was corrected before",
                "Check defocus units (Angstrom), pixel size, voltage and Cs; or use --no-ctf.",
                lambda v: replace(v, ctf=None),
            ),
        ]
    control = Alternative(
        CONTROL,
        "poses and images belong to different particles",
        "The order of the poses and of the images differs: use the star or cs file that belongs to this stack, and "
        "check --ind.",
        lambda v: replace(v, rotation=v.rotation.roll(1, 0)),
    )
    return [*found, control]


def try_alternatives(particles: ParticleSet, sample: int = SAMPLE, box: int = BOX) -> list[Trial]:
    """Backproject a sample of the particles under every alternative; one pass over the images.

    Args:
        sample: particles used, spread evenly over the set.
        box: box of the maps (at most that of the particles).
    """
    rows = np.unique(np.linspace(0, len(particles) - 1, min(sample, len(particles))).astype(np.int64))
    chosen = particles.subset(rows)
    box = min(box, particles.box_size)
    base = Accumulator(chosen, map_box=box)
    trials = alternatives(chosen)
    half = chosen.half_sets()
    sums = [[slices.new_accumulator(box) for _ in (0, 1)] for _ in trials]
    power = [0.0, 0.0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for part, images in base._chunks(np.arange(len(chosen)), 64):
            X, weight, view = _prepare(base, part, images)
            own = half[part]
            for side in (0, 1):
                pick = torch.from_numpy(np.nonzero(own == side)[0])
                power[side] += float((X[pick].abs().square() * weight[pick]).double().sum())
            for number, one in enumerate(trials):
                values, weights, rotation = _insertion(base, X, weight, one.change(view), chosen.ctf_premultiplied)
                for side in (0, 1):
                    pick = torch.from_numpy(np.nonzero(own == side)[0])
                    slices.insert_slices(sums[number][side], values[pick], weights[pick], rotation[pick], base.map_disc)
    finally:
        torch.set_num_threads(threads)
    pixel_size = base.pixel_size * particles.box_size / box
    return [_judge(one, pair, power, pixel_size) for one, pair in zip(trials, sums, strict=True)]


def _prepare(base: Accumulator, rows: np.ndarray, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, View]:
    """Unshifted coefficients (b, P), noise weights (b, P) and the given view of a chunk; rows that are not finite
    get no weight."""
    particles, disc = base.particles, base.disc
    good = torch.from_numpy(np.isfinite(images).all((1, 2)))
    images = np.nan_to_num(images, posinf=0.0, neginf=0.0)
    X = fourier.to_half_disc(torch.from_numpy(images), disc) * base.crop_scale
    weight = base.precision[torch.from_numpy(particles.optics_group[rows]).long()] * good[:, None]
    params = particles.ctf_params(rows)
    ctf = None
    if params is not None:
        ctf = evaluate_ctf(disc.frequency, params)
        odd = odd_phase(disc.frequency, params)
        X = X if odd is None else X * odd
    shift = None if particles.shift is None else torch.from_numpy(particles.shift[rows])
    return X, weight, View(base.matrices(rows, params), shift, ctf)


def _insertion(base: Accumulator, X: torch.Tensor, weight: torch.Tensor, view: View, premultiplied: bool) -> tuple:
    """Values, weights and matrices to insert under a view."""
    if view.shift is not None:
        X = fourier.phase_shift(X, base.disc, view.shift)
    if view.ctf is None:
        return X * weight, weight, view.rotation
    factor = weight if premultiplied else weight * view.ctf
    return X * factor, weight * view.ctf.square(), view.rotation


def _judge(one: Alternative, pair: list[slices.Accumulator], power: list[float], pixel_size: float) -> Trial:
    sums = [Sums(acc) for acc in pair]
    halves = [solve(one_half, passes=0) for one_half in sums]
    agreement = [held_out(halves[side], sums[1 - side], power[1 - side]) for side in (0, 1)]
    fsc = shells.fsc(*halves)
    resolution = shells.resolution(fsc, 0.143, halves[0].shape[-1], pixel_size)
    return Trial(one, float(np.mean(agreement)), resolution, fsc, (halves[0] + halves[1]) / 2)


def held_out(volume: torch.Tensor, other: Sums, power: float) -> float:
    """Correlation of a half map's slices with the images of the other half set, from that half's sums."""
    volume = volume / gridding(other.box_size, other.pad)  # interpolation multiplies it back
    F = torch.fft.rfftn(pad_map(volume, other.pad))
    twice = torch.full((F.shape[-1],), 1.0)
    twice[0] = 0.5  # the plane kx = 0 holds both mates of each pair; the half disc holds one
    cross = ((F.conj() * other.B).real * twice).double().sum()
    model = (F.abs().square() * other.W * twice).double().sum()
    return float(cross / (model * power).clamp(min=1e-30).sqrt())


def best_trial(trials: list[Trial], count: int, points: int) -> tuple[Trial, bool]:
    """The reading that predicts the images best, and whether it is clearly better than the given one.

    Clearly: by 3 % and by five standard errors 1/sqrt(count points) of a correlation. The control never wins; when
    the given reading is no better than it, nothing here tells anything.
    """
    given = trials[0]
    best = max((one for one in trials if one.alternative.name != CONTROL), key=lambda one: one.agreement)
    error = SIGMAS / np.sqrt(max(count * points, 1))
    return best, best.agreement > given.agreement + max(MARGIN * abs(given.agreement), error)


def map_skewness(volume: torch.Tensor, blur: float = 1.0) -> float:
    """Skewness of a map inside its sphere: positive when a little of the box is dense, as for a white particle."""
    size = volume.shape[-1]
    inside = radius_grid(size) < 0.45 * size
    values = gaussian_blur(volume, blur)[inside].double()
    values = values - values.mean()
    return float((values**3).mean() / values.square().mean().clamp(min=1e-30) ** 1.5)


def compare_hands(volume: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Mean FSC (shells 1 .. D/4, soft sphere) of a map and of its mirror with a reference in the same frame.

    Projections alone cannot tell the hand: a mirrored map with mirrored poses predicts the same images.
    """
    size = volume.shape[-1]
    mask = soft_sphere(size)
    both = (volume, flip_hand(volume))
    return tuple(float(shells.fsc(one, reference, mask)[: size // 4].mean()) for one in both)


def view_coverage(rotation: np.ndarray, bins: int = 192) -> tuple[float, float]:
    """How evenly the views (N, 3, 3) cover the sphere.

    Returns:
        (share of ``bins`` equal areas of the half sphere with a view, largest eigenvalue of the mean outer product of
        view directions: 1/3 when even, 1 when all views are the same, 1/2 for views on one great circle).
    """
    view = rotation[:, 2, :].astype(np.float64)  # the projection axis in the frame of the volume
    view = view * np.where(view[:, 2:] < 0, -1.0, 1.0)
    rings = max(int(np.sqrt(bins / 2)), 1)
    height = np.minimum((view[:, 2] * rings).astype(int), rings - 1)
    columns = bins // rings
    angle = np.arctan2(view[:, 1], view[:, 0]) / (2 * np.pi) % 1.0
    cell = height * columns + np.minimum((angle * columns).astype(int), columns - 1)
    filled = len(np.unique(cell)) / (rings * columns)
    return float(filled), float(np.linalg.eigvalsh(view.T @ view / len(view))[-1])
