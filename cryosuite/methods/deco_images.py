"""What CryoDECO's encoder looks at: raw particles, or particles with the CTF's signs undone, centred and turned.

Encoders pre-trained on particle stacks want raw images. One that is trained here from nothing has far less to learn
when contrast reversals, shifts and in-plane angles that are known anyway are taken out before.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cryosuite.data.encoder_images import EncoderCache
from cryosuite.data.loader import BatchLoader
from cryosuite.data.particles import ParticleSet
from cryosuite.data.spectra import whitened
from cryosuite.kernels import fourier
from cryosuite.kernels.upright import turn


class PreparedImages:
    """An image source that hands out prepared particles (see the module); poses as they are in the set.

    Args:
        particles: the set. noise_amplitude: (G, D//2 + 1). upright: also turn by the known in-plane angle.
    """

    def __init__(self, particles: ParticleSet, noise_amplitude: Tensor, upright: bool) -> None:
        self.particles, self.noise_amplitude, self.is_upright = particles, noise_amplitude, upright
        self.loader = BatchLoader(particles, 256, shuffle=False, prefetch=0)

    def __len__(self) -> int:
        return len(self.particles)

    @torch.no_grad()
    def read(self, rows: np.ndarray) -> np.ndarray:
        """Images (b, D, D) float32 of the rows; white noise has unit variance. Broken images stay NaN."""
        rows = np.asarray(rows)
        batch = self.loader.batch(rows)
        D = self.particles.box_size
        disc = fourier.half_disc(D)
        target = whitened(batch, disc, self.noise_amplitude, self.particles.ctf_premultiplied)
        images = fourier.from_half_disc(target.values * torch.sign(target.ctf), disc) * D
        if self.is_upright and batch.rotation is not None:
            images = turn(images, batch.rotation)
        images[torch.from_numpy(self.loader.broken.rows[rows])] = torch.nan  # for the cache to count and tell
        return images.numpy()

    def subset(self, rows: np.ndarray) -> PreparedImages:
        """The images of some rows."""
        return PreparedImages(self.particles.subset(rows), self.noise_amplitude, self.is_upright)

    def identity(self) -> np.ndarray:
        """A number (N,) int64 per row, the same for rows that show the same image."""
        return self.particles.images.identity()


def encoder_cache(
    particles: ParticleSet, seen: str, noise_amplitude: Tensor, size: int, prep: str, path: Path | None
) -> EncoderCache:
    """The eight-bit images of all particles as the encoder sees them: "raw", "flipped" or "upright"."""
    if seen != "raw":
        source = PreparedImages(particles, noise_amplitude.cpu(), seen == "upright")
        # white and of unit noise whatever the files hold: neither sign nor noise spectrum of the set applies any more
        particles = replace(particles, images=source, sign=1, dataset={}, noise=None)
    return EncoderCache(particles, size, prep, path)
