"""Particle images as a pose network takes them: a window around the particle, whitened, brought to the network's size.

The spectrum of a window of the box is cropped (or padded with zeros) to the network's size, divided by the noise's
amplitude and, for the second channel, multiplied by the sign of the CTF. What then makes grey values of it is what the
training does (`simulate.view_sets.network_input`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryosuite.data.loader import Batch
from cryosuite.data.noise import noise_spectrum
from cryosuite.data.particles import ParticleSet
from cryosuite.kernels import ctf as ctf_kernel
from cryosuite.kernels.density import crop_half
from cryosuite.kernels.fourier import real_inverse
from cryosuite.simulate.view_sets import network_input

SAMPLED = 1000  # images the noise is measured on where the set does not say it
SMALL, USUAL = 0.115, 0.17  # radius of gyration / field: below the first the window shrinks, to reach the second


@dataclass(frozen=True)
class Window:
    """How a box of ``box`` pixels is brought to ``size``: the middle ``width`` pixels, then a crop of the spectrum."""

    box: int
    width: int
    size: int

    @property
    def share(self) -> float:
        """Edge of the window as a fraction of the box: shifts in fractions of one times this are those of the other."""
        return self.width / self.box

    def cut(self, images: Tensor) -> Tensor:
        """The middle of images or volumes (..., D, D[, D]) along the last two axes."""
        start = self.box // 2 - self.width // 2
        return images[..., start : start + self.width, start : start + self.width]


def choose_window(box: int, size: int, gyration: float | None) -> Window:
    """The window for a particle of a radius of gyration (fraction of the box), None when nothing is known of it.

    Networks are trained on particles that fill their picture; a small particle in a large box is cut out.
    """
    width = box
    if gyration is not None and gyration < SMALL and box > size:
        width = min(box, max(size, 2 * round(gyration * box / USUAL / 2)))
    return Window(box, width, size)


class Preparation:
    """From batches of particles to the input of a network.

    Args:
        particles: the set; its noise spectrum, else that outside its particles, whitens the images.
        window: which part of the box, and the network's size.
        channels: 1, or 2 with the phase-flipped image beside the image (zeros where the set has no CTF).
        device: where it is done.
    """

    def __init__(
        self, particles: ParticleSet, window: Window, channels: int = 2, device: torch.device | str = "cpu"
    ) -> None:
        self.window, self.channels, self.device = window, channels, torch.device(device)
        self.premultiplied = particles.ctf_premultiplied
        rows = np.unique(np.linspace(0, len(particles) - 1, min(SAMPLED, len(particles))).astype(np.int64))
        noise = torch.from_numpy(np.asarray(noise_spectrum(particles, rows), np.float32))
        ky = torch.fft.fftfreq(window.size, 1 / window.size)
        kx = torch.arange(window.size // 2 + 1, dtype=torch.float32)
        points = torch.stack(torch.broadcast_tensors(kx[None], ky[:, None]), -1)  # (s, s//2 + 1, 2)
        self.frequency = (points / window.width).flatten(0, 1).to(self.device)  # cycles per pixel of the box
        self.white = self._amplitude(noise, points.norm(dim=-1) / window.share).to(self.device)

    @staticmethod
    def _amplitude(noise: Tensor, shell: Tensor) -> Tensor:
        """(G, s, s//2 + 1) one over the noise's amplitude at shells of the box, mean 1 over a group."""
        noise = noise.clamp_min(1e-6 * float(noise.mean()) + 1e-20)
        shell = shell.clamp(max=noise.shape[1] - 1)
        low = shell.floor().long().clamp(max=noise.shape[1] - 2)
        part = shell - low
        log = noise.log()
        values = (log[:, low] * (1 - part) + log[:, low + 1] * part).mul(-0.5).exp()
        return values / values.mean((1, 2), keepdim=True)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Network input (b, C, s, s) of a batch, and (b,) whether there is anything in an image.

        An image without contrast, or with values that are not finite, gives zeros and False.
        """
        batch = batch.to(self.device)
        images = self.window.cut(batch.images)
        finite = torch.isfinite(images).all(-1).all(-1)
        images = torch.where(finite[:, None, None], images, 0.0)
        good = finite & (images.std((1, 2)) > 1e-12)
        spectra = self._resized(torch.fft.rfft2(images)) * self.white[batch.group]
        flipped = None
        size = (self.window.size,) * 2
        if batch.ctf is not None:
            values = ctf_kernel.ctf(self.frequency, batch.ctf).view(spectra.shape)
            odd = ctf_kernel.odd_phase(self.frequency, batch.ctf)
            spectra = spectra if odd is None else spectra * odd.view(spectra.shape)
            sign = torch.where(values < 0, -1.0, 1.0)
            flipped = real_inverse(spectra if self.premultiplied else spectra * sign, size)
        return network_input(real_inverse(spectra, size), flipped)[:, : self.channels], good

    def _resized(self, spectra: Tensor) -> Tensor:
        """Spectra (b, w, w//2 + 1) of the window cropped, or padded with zeros, to the network's size."""
        width, size = self.window.width, self.window.size
        if size <= width:
            return crop_half(spectra, width, size, 2)
        out = spectra.new_zeros(len(spectra), size, size // 2 + 1)
        half = width // 2
        out[:, :half, :half] = spectra[:, :half, :half]
        out[:, size - half + 1 :, :half] = spectra[:, half + 1 :, :half]
        return out


class ReleasedPreparation(Preparation):
    """Input of the released CryoFastAR network: plain grey values, standardised and divided by their maximum.

    The release takes mean, standard deviation and maximum over the views of a set; here they are those of the first
    views that are looked at, so that images can be encoded once. ``sign`` turns the contrast over.
    """

    sign = 1.0
    scale: tuple[float, float, float] | None = None  # mean, standard deviation, maximum

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Network input (b, 1, s, s) of a batch, and (b,) whether there is anything in an image."""
        images = self.window.cut(batch.to(self.device).images)
        finite = torch.isfinite(images).all(-1).all(-1)
        images = torch.where(finite[:, None, None], images, 0.0)
        good = finite & (images.std((1, 2)) > 1e-12)
        images = real_inverse(self._resized(torch.fft.rfft2(images)), (self.window.size,) * 2)
        if self.scale is None:
            mean, sd = float(images.mean()), max(float(images.std()), 1e-12)
            self.scale = mean, sd, max(float((images - mean).abs().max()) / sd, 1e-12)
        mean, sd, highest = self.scale
        return (self.sign / (sd * highest) * (images - mean))[:, None], good
