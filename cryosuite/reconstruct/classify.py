"""Which of several known maps shows each particle: the classifier that knows the truth, a ceiling for all others.

With white noise after whitening, the log-likelihood of image i under map k is, up to a constant of the image,

    l_ik = 2 sum_p Re[conj(S_k) C X / sigma^2] - sum_p |S_k|^2 C^2 / sigma^2        (the sum over a half disc)

with S_k the map's slice at the known pose (KRAQEN, section 3; Bayes with equal shares of the classes).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryosuite.console import Progress
from cryosuite.data.loader import read_ahead
from cryosuite.errors import InputError
from cryosuite.kernels import class_slices
from cryosuite.reconstruct.backproject import POINTS_PER_CHUNK, Accumulator

if TYPE_CHECKING:
    from cryosuite.data.particles import ParticleSet

MEMORY_LIMIT = 2 << 30  # bytes of padded transforms held at a time; more maps are done in several passes


def map_likelihoods(
    particles: ParticleSet,
    maps: torch.Tensor,
    r_max: int | None = None,
    progress: str | None = None,
) -> np.ndarray:
    """Log-likelihood of every particle under every map, up to a constant of the particle.

    The scale of the noise is the mean over the half disc (`inverse_noise`): ratios between maps are right to one
    common factor, their order is exact.

    Args:
        particles: with poses; shifts, CTF and noise are used where the set has them.
        maps: (K, D, D, D) in the grey values of the images.
        r_max: largest radius used, Fourier pixels, default D/2.
        progress: label of a progress display, None for silence.

    Returns:
        (N, K) float32.

    Raises:
        InputError: the box of the maps is not that of the particles.
    """
    if maps.ndim != 4 or maps.shape[-1] != particles.box_size:
        raise InputError(f"maps of shape {tuple(maps.shape)} do not fit particles of box {particles.box_size}")
    reader = Accumulator(particles, r_max=r_max)
    radius, every = reader.disc.r_max, np.arange(len(particles))
    step = max(1, POINTS_PER_CHUNK // len(reader.disc))
    out = np.empty((len(particles), len(maps)), np.float32)
    group = max(1, MEMORY_LIMIT // class_slices.grid_bytes(radius))
    with Progress(len(particles) * -(-len(maps) // group), progress) if progress else nullcontext() as bar:
        for start in range(0, len(maps), group):
            transforms = class_slices.class_transforms(maps[start : start + group], radius)
            for rows, coefficients in read_ahead(reader.prepared(every, step), 2):
                h, g = class_slices.class_sums(transforms, *coefficients, reader.disc)
                out[rows, start : start + group] = (h - g / 2).float().numpy()
                if bar is not None:
                    bar.advance(len(rows))
    return out


def most_likely(particles: ParticleSet, maps: torch.Tensor, r_max: int | None = None) -> np.ndarray:
    """The map (N,) int64 under which each particle is most likely; see `map_likelihoods`."""
    return map_likelihoods(particles, maps, r_max).argmax(1)
