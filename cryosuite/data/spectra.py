"""Radial statistics of a particle set, and batches divided by the noise: what the losses of methods compare with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryosuite.data.broken import Broken
from cryosuite.data.loader import Batch
from cryosuite.data.noise import noise_spectrum
from cryosuite.data.particles import ParticleSet
from cryosuite.kernels import ctf as ctf_kernel
from cryosuite.kernels import fourier
from cryosuite.kernels.aberrations import magnified_rotation

SPECTRUM_IMAGES = 2000


@dataclass
class Target:
    """Data and CTF on the half disc, both divided by the noise amplitude."""

    values: Tensor  # (b, P) complex
    ctf: Tensor  # (b, P)


@dataclass
class Spectra:
    """Radial statistics of a data set at integer shells 0 .. D/2, for unnormalised centred transforms.

    noise: (G, D//2 + 1) E|n|^2 per optics group. signal: (D//2 + 1) E|F|^2 of the particles' slices (CTF divided out).
    seen: signal over noise, CTF included, summed over the coefficients of an image: what an image can tell.
    """

    noise: Tensor
    signal: Tensor
    seen: float = 0.0


def whitened(
    batch: Batch,
    disc: fourier.HalfDisc,
    noise_amplitude: Tensor,  # (G, D//2 + 1)
    premultiplied: bool = False,
    mask: Tensor | None = None,  # (D, D), multiplied onto the images
) -> Target:
    """The batch's centred coefficients and CTF, divided by the noise amplitude of its optics groups; float32."""
    images = batch.images if mask is None else batch.images * mask
    coeffs = fourier.to_half_disc(images, disc)
    if batch.shift is not None:
        coeffs = fourier.phase_shift(coeffs, disc, batch.shift)
    transfer = torch.ones_like(coeffs.real)
    if batch.ctf is not None:
        transfer = ctf_kernel.ctf(disc.frequency, batch.ctf)
        odd = ctf_kernel.odd_phase(disc.frequency, batch.ctf)
        coeffs = coeffs if odd is None else coeffs * odd
        if premultiplied:
            coeffs, transfer = undo_multiplication(coeffs, transfer)
    white = noise_amplitude[batch.group].reciprocal()[:, disc.shell]  # (b, P)
    return Target(coeffs * white, transfer * white)


def slice_matrices(batch: Batch, pixel_size: Tensor | float) -> Tensor:  # -> (b, 3, 3)
    """Rotations with the magnification and the pixel size of each row folded in: a point of an image belongs at
    (kx, ky, 0) times its matrix in the transform of a volume of ``pixel_size`` Angstrom. Call it outside autocast."""
    return batch.rotation if batch.ctf is None else placed(batch.rotation, batch.ctf, pixel_size)


def placed(rotation: Tensor, ctf: ctf_kernel.CtfParams, pixel_size: Tensor | float) -> Tensor:  # -> (b, 3, 3)
    """As ``slice_matrices``, of rotations (b, 3, 3) of images with these optics."""
    if ctf.mag_matrix is not None:
        rotation = magnified_rotation(rotation, ctf.mag_matrix.to(rotation))
    return rotation * (pixel_size / ctf.pixel_size.to(rotation.dtype))[:, None, None]


def undo_multiplication(coeffs: Tensor, transfer: Tensor) -> tuple[Tensor, Tensor]:
    """Data and CTF (b, P) of images that were multiplied by their CTF, as if they had not been.

    Where the CTF is below 0.1 too little is left of the data: both become zero there, and the loss sees nothing.
    """
    seen = transfer.abs() > 0.1
    inverse = torch.where(seen, 1 / torch.where(seen, transfer, 1.0), 0.0)
    return coeffs * inverse, transfer * seen


def noise_before_ctf(noise: Tensor, particles: ParticleSet, rows: np.ndarray) -> Tensor:  # (G, D//2 + 1), twice
    """Noise spectra of images that were multiplied by their CTF, as they were before: divided by the mean CTF^2 of the
    rows of each optics group. Others come back as they are."""
    if not particles.ctf_premultiplied or not len(rows) or particles.ctf_params(rows[:1]) is None:
        return noise
    disc = fourier.half_disc(particles.box_size)
    square = torch.zeros(len(noise), noise.shape[1], dtype=torch.float64)
    for part in np.array_split(rows, math.ceil(len(rows) / 64)):
        own = ctf_kernel.ctf(disc.frequency, particles.ctf_params(part)).square().double()
        shells = torch.zeros(len(part), noise.shape[1], dtype=torch.float64).index_add_(1, disc.shell, own)
        square.index_add_(0, torch.from_numpy(particles.optics_group[part]).long(), shells)
    count = torch.from_numpy(np.bincount(particles.optics_group[rows], minlength=len(noise)))[:, None]
    points = torch.bincount(disc.shell, minlength=noise.shape[1])
    mean = torch.where(count > 0, square / count, (square.sum(0) / len(rows))) / points.clamp_min(1)
    return noise / mean.clamp_min(1e-3).to(noise)


@torch.no_grad()
def measure_spectra(particles: ParticleSet, window: bool) -> Spectra:
    """Noise (the set's own, else estimated outside the particles) and signal per shell, from up to 2,000 images."""
    rows = np.sort(np.random.default_rng(0).choice(len(particles), min(len(particles), SPECTRUM_IMAGES), replace=False))
    D = particles.box_size
    disc = fourier.half_disc(D)
    mask = fourier.window_mask(D) if window else torch.ones(D, D)
    noise = torch.from_numpy(np.asarray(noise_spectrum(particles, rows), np.float32)) * float(mask.square().mean())
    power, ctf2, points = (torch.zeros(D // 2 + 1, dtype=torch.float64) for _ in range(3))
    share = torch.zeros(len(noise), dtype=torch.float64)  # of the optics groups
    broken = Broken(particles)
    for part in np.array_split(rows, math.ceil(len(rows) / 256)):
        images = particles.read(part)
        good = ~broken.find(part, images)
        part, images = part[good], images[good]
        coeffs = fourier.to_half_disc(torch.from_numpy(images) * mask, disc)
        params = particles.ctf_params(part)
        transfer = torch.ones_like(coeffs.real) if params is None else ctf_kernel.ctf(disc.frequency, params)
        seen = torch.ones_like(transfer)
        if particles.ctf_premultiplied:
            coeffs, transfer = undo_multiplication(coeffs, transfer)
            seen = (transfer != 0).to(transfer.dtype)
        for total, values in ((power, coeffs.abs().square()), (ctf2, transfer.square()), (points, seen)):
            total.index_add_(0, disc.shell, values.sum(0).double())
        share += torch.from_numpy(np.bincount(particles.optics_group[part], minlength=len(noise)))
    broken.finish()
    points, ctf2 = points.clamp_min(1), ctf2.clamp_min(1e-6)
    if particles.ctf_premultiplied:  # the spectrum is that of noise times CTF
        noise = noise / (ctf2 / points).float()
    expected = (share / share.sum()) @ noise.double()
    # what is left above the noise; a shell without visible signal keeps a small share, or nothing could grow there
    signal = torch.maximum(power / points - expected, 0.003 * expected) / (ctf2 / points)
    signal[0] = signal[1]
    above = (power / points - expected) / expected.clamp_min(1e-12)
    seen = 2 * float((torch.bincount(disc.shell, minlength=len(above)) * above).sum().clamp_min(0))
    seen *= float(mask.square().mean())  # what a window takes of the noise tells no more
    return Spectra(noise.clamp_min(1e-12), signal.float(), seen)
