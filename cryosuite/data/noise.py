"""Noise power spectra from what lies outside the particles, as a stream."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from cryosuite.data.broken import Broken
from cryosuite.errors import InputError, notice

if TYPE_CHECKING:
    from cryosuite.data.particles import ParticleSet

EDGE_PIXELS = 4.0  # the hole for the particle has a soft rim, or its sharp edge would leak power between shells
POOLED = 10  # images: the lowest shells have some ten coefficients each, 3 % with a hundred images
DEFAULT_RADIUS = 0.375  # of the box: RELION's default background circle has 75 % of the box as diameter


def radius_map(box_size: int) -> np.ndarray:
    """Distance (D, D) float32 of each pixel from the centre voxel D//2."""
    axis = np.arange(box_size, dtype=np.float32) - box_size // 2
    return np.hypot(axis[:, None], axis[None, :])


def shell_map(box_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Integer shell round(|k|) of each coefficient of an rfft2 (D, D//2 + 1), and how often each stands for the whole
    transform (2 for kx between 0 and D/2, whose mates are left out)."""
    ky = np.fft.fftfreq(box_size) * box_size
    kx = np.arange(box_size // 2 + 1)
    shell = np.rint(np.hypot(ky[:, None], kx[None, :])).astype(np.int64)
    weight = np.full(shell.shape, 2.0)
    weight[:, 0] = weight[:, -1] = 1.0
    return shell, weight


class NoiseEstimator:
    """E|n|^2 of a coefficient of the unnormalised transform, per optics group and integer shell, from many images.

    The particle is cut out by a soft disc m (0 inside), the power of the rest is averaged over each shell and divided
    by mean(m^2), the share of the noise that is left: for white noise of variance s^2 this is s^2 D^2.

    Args:
        box_size: D.
        n_groups: number of optics groups G.
    """

    def __init__(self, box_size: int, n_groups: int) -> None:
        self.box_size, self.n_groups = box_size, n_groups
        shell, weight = shell_map(box_size)
        inside = shell <= box_size // 2
        self._shell = np.where(inside, shell, box_size // 2 + 1).ravel()
        self._weight = weight.ravel()
        self._points = np.bincount(self._shell, self._weight)[: box_size // 2 + 1]
        self._power = np.zeros((n_groups, box_size // 2 + 1))
        self._count = np.zeros(n_groups, np.int64)
        self._masks: dict[float, tuple[np.ndarray, float]] = {}

    def _mask(self, radius: float) -> tuple[np.ndarray, float]:
        if radius not in self._masks:
            t = np.clip((radius_map(self.box_size) - radius) / EDGE_PIXELS + 0.5, 0.0, 1.0)
            mask = (0.5 - 0.5 * np.cos(np.pi * t)).astype(np.float32)
            self._masks[radius] = mask, float(np.square(mask, dtype=np.float64).mean())
        return self._masks[radius]

    def add(self, images: np.ndarray, group: np.ndarray, radius: float | None = None) -> None:
        """Take in images (b, D, D) of optics groups (b,); ``radius`` of the particle in pixels (default 0.375 D)."""
        self.take(self.measured(images, group, radius))

    def measured(
        self, images: np.ndarray, group: np.ndarray, radius: float | None = None
    ) -> list[tuple[int, np.ndarray, int]]:
        """What ``add`` would take in: of each optics group here (its number, power (D//2 + 1,), images)."""
        import scipy.fft

        mask, share = self._mask(DEFAULT_RADIUS * self.box_size if radius is None else float(radius))
        outside = images * mask
        outside -= mask * (outside.sum(axis=(1, 2)) / mask.sum())[:, None, None]  # the mean is no noise
        coefficients = scipy.fft.rfft2(outside, axes=(1, 2))
        power = np.square(coefficients.real) + np.square(coefficients.imag)
        found = []
        for number in np.unique(group).tolist():
            rows = group == number
            total = power[rows].sum(axis=0, dtype=np.float64).ravel() * self._weight
            shells = np.bincount(self._shell, total, minlength=self.box_size // 2 + 2)[: self.box_size // 2 + 1]
            found.append((number, shells / share, int(rows.sum())))
        return found

    def take(self, measured: list[tuple[int, np.ndarray, int]]) -> None:
        """Take in what ``measured`` found, here or in another process."""
        for number, power, count in measured:
            self._power[number] += power
            self._count[number] += count

    def spectrum(self) -> np.ndarray:
        """(G, D//2 + 1) float32. Each group counts ``POOLED`` images of the whole set's mean spectrum as its own,
        brought to its level: one of a few images (or none: cryoSPARC may make a group of each micrograph) has a
        spectrum that can be divided by, and groups of other intensity do not mix. Shell 0, where nothing can be
        measured, is given shell 1's value. Raises ValueError before any image was added.
        """
        if not self._count.any():
            raise ValueError("no images were added")
        count = self._count[:, None]
        level = self._power.sum(axis=1, keepdims=True) / np.maximum(count, 1)  # of an image, all shells together
        shape = (self._power / np.where(level > 0, level, 1.0)).sum(axis=0) / count.sum()
        spectrum = (self._power + POOLED * level * shape) / (count + POOLED) / self._points
        known = level[:, 0] > 0
        if known.any():  # the others take the mean of these
            spectrum[~known] = np.average(spectrum[known], axis=0, weights=self._count[known])
        spectrum[:, 0] = spectrum[:, 1]
        return spectrum.astype(np.float32)


def noise_spectrum(particles: ParticleSet, rows: np.ndarray) -> np.ndarray:
    """E|n|^2 per optics group and shell (G, D//2 + 1): the set's, else estimated outside the particles of some rows."""
    if particles.noise is not None:
        return particles.noise
    notice("the particles have no noise spectrum: estimated from the corners of the images (preprocess does it better)")
    estimator, broken = NoiseEstimator(particles.box_size, particles.n_groups), Broken(particles)
    for part in np.array_split(rows, math.ceil(len(rows) / 256)):
        images = particles.read(part)
        good = ~broken.find(part, images)
        if good.any():
            estimator.add(images[good], particles.optics_group[part[good]])
    broken.finish()
    if len(broken) == len(np.unique(rows)):
        raise InputError(f"{particles.path or 'the particles'}: no image without NaN or infinite pixels")
    return estimator.spectrum()
