"""Whitened coefficients of the particles in a small box, for scoring images against the maps of many classes.

What a particle adds to a map, values C X / sigma^2 and weights C^2 / sigma^2 on the half disc
(reconstruct.backproject), is also all that its likelihood under any map needs. Here sigma^2 is the absolute noise power
of a coefficient, so that likelihoods have their unit. The cluster box (of train-kraqen, of `held_out`) is a Fourier
crop: a prefix of the particles' half disc.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cryosuite.data.loader import read_ahead
from cryosuite.data.noise import noise_spectrum
from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import Processes
from cryosuite.data.spectra import noise_before_ctf
from cryosuite.errors import InputError, notice
from cryosuite.kernels import fourier
from cryosuite.kernels.class_slices import disc_power
from cryosuite.reconstruct.backproject import Accumulator

CACHE_GIB = 4.0  # coefficients kept in memory; beyond it they are read again in every iteration
CHUNK_VALUES = 1 << 20  # coefficients handled at once
SPECTRUM_IMAGES = 2000
POWER_FLOOR = 1e-3  # of the strongest shell: the least signal power a shell is credited with


class Chunk(NamedTuple):
    """b particles: rows (b,), values (b, P) complex64, weights (b, P), matrices (b, 3, 3)."""

    rows: np.ndarray
    values: Tensor
    weights: Tensor
    rotation: Tensor


class ClusterImages:
    """Streams the coefficients of any rows; what fits into ``cache_gib`` is read from disk once.

    Attributes:
        box: D of the cluster box. disc: its half disc, up to D/2.
        power: (D/2 + 1,) unbiased power of the particles' slices per shell of the cluster box, never below a floor.
        signal: mean signal over noise per coefficient, times CTF^2 (`assignment.signal_ratio`).
        chunk: images handled at once.
        pixel_size: of the particles, Angstrom.
        bad: (N,) bool, images with values that are not finite, as far as read; they count nothing.
    """

    def __init__(self, particles: ParticleSet, box: int = 0, cache_gib: float = CACHE_GIB) -> None:
        if not len(particles):
            raise InputError(f"{particles.path or 'the particle set'}: holds no particles")
        self.particles = particles
        self.box = min(particles.box_size, box or 64)
        if self.box % 2 or self.box < 8:
            raise InputError(f"--cluster-box {self.box}: an even number of pixels, at least 8, is needed")
        self._source = Accumulator(particles, map_box=self.box)
        self.pixel_size = self._source.pixel_size
        self._source.precision = self._precision()
        self.disc = fourier.half_disc(self.box)
        self._offset: Tensor | None = None  # (N, 2) from the shifts of the particles as they were read
        self.bad = np.zeros(len(particles), bool)
        points = len(self.disc)
        self.chunk = max(1, CHUNK_VALUES // points)
        self._values: np.ndarray | None = None
        if len(particles) * points * 12 <= cache_gib * 2**30:
            self._values = np.empty((len(particles), points), np.complex64)
            self._weights = np.empty((len(particles), points), np.float32)
            self._known = np.zeros(len(particles), bool)
        self.power, self.signal = self._measure()

    def __len__(self) -> int:
        return len(self.particles)

    def _precision(self) -> Tensor:
        """(G, P) 1 / sigma^2 of the coefficients, in the grey values of the cluster box."""
        source, particles = self._source, self.particles
        rows = _sample(len(particles))
        noise = noise_before_ctf(
            torch.from_numpy(np.asarray(noise_spectrum(particles, rows), np.float32)), particles, rows
        )
        shells = source.disc.shell.clamp(max=noise.shape[1] - 1)
        level = noise[:, shells] * source.crop_scale**2
        typical = level[level > 0].median() if bool((level > 0).any()) else torch.tensor(1.0)
        return 1 / torch.where(torch.isfinite(level), level, typical).clamp_min(1e-6 * float(typical))

    def chunks(self, rows: np.ndarray, r_max: int) -> Iterator[Chunk]:
        """The particles of ``rows`` (ascending), up to radius r_max of the cluster box."""
        count = self.disc.count(r_max)
        parts = [rows[begin : begin + self.chunk] for begin in range(0, len(rows), self.chunk)]
        if self._values is not None and self._known[rows].all():
            for part in parts:
                chunk = self._cached(part, count)
                yield chunk._replace(values=self._moved(part, chunk.values))
            return
        for chunk in read_ahead(self._reading(parts), 2):
            values = self._moved(chunk.rows, chunk.values[:, :count])
            yield Chunk(chunk.rows, values, chunk.weights[:, :count], chunk.rotation)

    def _reading(self, parts: list[np.ndarray]) -> Iterator[Chunk]:
        torch.set_num_threads(1)  # of the thread this generator runs in
        for part in parts:
            yield self._read(part)

    def move(self, shift: np.ndarray | None) -> None:
        """Give the particles other shifts (N, 2), fraction of the box. What is kept in memory stays as it was read: so
        nothing depends on how often they were moved, or on how many images are read at a time."""
        given = self._source.particles.shift
        self.particles = replace(self.particles, shift=shift)
        self._offset = None
        if shift is not given:
            self._offset = torch.from_numpy(
                np.subtract(0 if shift is None else shift, 0 if given is None else given, dtype=np.float32)
            )

    def _moved(self, rows: np.ndarray, values: Tensor) -> Tensor:  # (b, P) complex
        """Coefficients of rows at their shifts of now."""
        if self._offset is None:
            return values
        x, y = self.disc.xy[: values.shape[1]].float().unbind(1)
        by = self._offset[torch.from_numpy(rows)]
        # nothing whose last digit depends on the number of rows: no product of matrices or of complex numbers
        angle = (by[:, :1] * x + by[:, 1:] * y) * (-2 * math.pi)
        cosine, sine, real, imag = angle.cos(), angle.sin(), values.real, values.imag
        return torch.complex(real * cosine - imag * sine, real * sine + imag * cosine)

    def share_bad(self, processes: Processes) -> None:
        """Take in which images the other processes found bad; all of them call it."""
        self._source.broken.share(processes)
        if processes.count > 1:
            self.bad[processes.joined(np.flatnonzero(self.bad))] = True

    def _cached(self, rows: np.ndarray, count: int) -> Chunk:
        values = torch.from_numpy(np.ascontiguousarray(self._values[rows, :count]))
        weights = torch.from_numpy(np.ascontiguousarray(self._weights[rows, :count]))
        return Chunk(rows, values, weights, self._rotation(rows))

    def _rotation(self, rows: np.ndarray) -> Tensor:
        return self._source.matrices(rows, self.particles.ctf_params(rows))

    def _read(self, rows: np.ndarray) -> Chunk:
        if self._values is not None and self._known[rows].all():
            return self._cached(rows, len(self.disc))
        values, weights, rotation = self._source.coefficients(rows, self.particles.read(rows))
        broken = ~(torch.isfinite(torch.view_as_real(values)).flatten(1).all(1) & torch.isfinite(weights).all(1))
        broken |= torch.from_numpy(self._source.broken.rows[rows])
        broken |= ~torch.isfinite(rotation).flatten(1).all(1)
        if bool(broken.any()):
            self.bad[rows[broken.numpy()]] = True
            values[broken], weights[broken] = 0, 0
            rotation = torch.where(broken[:, None, None], torch.eye(3), rotation)
        if self._values is not None:
            self._values[rows], self._weights[rows], self._known[rows] = values.numpy(), weights.numpy(), True
        return Chunk(rows, values, weights, rotation)

    def _measure(self) -> tuple[Tensor, float]:
        """Signal power per shell and signal to noise of the whole, from up to 2,000 images."""
        shells, half = self.disc.shell, self.box // 2
        above, square = (torch.zeros(half + 1, dtype=torch.float64) for _ in range(2))
        total, images = 0.0, 0
        for chunk in self.chunks(_sample(len(self)), half):
            weights = chunk.weights.double()
            excess = chunk.values.real.double() ** 2 + chunk.values.imag.double() ** 2 - weights
            above.index_add_(0, shells, excess.sum(0))
            square.index_add_(0, shells, weights.square().sum(0))
            seen = chunk.weights > 0
            total += float((disc_power(chunk.values, chunk.weights) / (2 * seen.sum(1)).clamp_min(1)).sum())
            images += int(seen.any(1).sum())
        if images == 0 or not float(square.sum()) > 0:
            raise InputError(
                f"{self.particles.path or 'the particle set'}: no image says anything: the images are not finite, or "
                "their CTF is zero everywhere. Check the images and the CTF columns."
            )
        power = above / square.clamp_min(1e-300)
        power[0] = power[1]
        top = float(power.max())
        if not top > 0:  # nothing above the noise: a weak prior, so that something can be told at all
            notice("the images show no signal above the noise spectrum: are the noise levels right?")
            top = float((above.abs() / square.clamp_min(1e-300)).max())
        return power.clamp_min(POWER_FLOOR * top).float(), max(total / images - 1, 1e-4)


def _sample(count: int) -> np.ndarray:
    """Up to 2,000 rows, the same every time."""
    return np.sort(np.random.default_rng(0).choice(count, min(count, SPECTRUM_IMAGES), replace=False))
