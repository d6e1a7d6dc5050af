"""Endless simulated batches for pre-training, made on the device: nothing is read, nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryosuite.data.loader import Batch
from cryosuite.kernels.ctf import CtfParams
from cryosuite.kernels.rotations import quaternion_to_matrix
from cryosuite.simulate.dataset import ENTROPY, SimulateOptions
from cryosuite.simulate.images import Renderer
from cryosuite.simulate.noise import NoiseModel
from cryosuite.simulate.states import StateSet

CALIBRATION = 256  # images whose variance fixes the scale
STREAM = 100  # keeps the stream's seeds apart from those of the stages of a data set


@dataclass
class StreamBatch(Batch):
    """A batch with its truth: images of unit noise sd; ``label`` is the state, ``index`` the number of the image."""

    label: Tensor | None = None  # (b,) int64


class SimulatedStream:
    """Batch n is a pure function of (seed, n), so a resumed training sees the same images.

    The noise is white and as strong as ``options.snr`` says (before the crop, against the variance of the first
    CALIBRATION images of the stream); everything is drawn and made on the device.

    Args:
        states: what to image, with occupancies.
        options: how; n_particles is not used.
        batch_size: images per batch.
        device: where the batches are made.
    """

    def __init__(
        self, states: StateSet, options: SimulateOptions, batch_size: int, device: torch.device | str = "cpu"
    ) -> None:
        options.check()
        self.options, self.batch_size, self.device = options, batch_size, torch.device(device)
        self.renderer = Renderer(states.states, options.optics, self.device)
        self.noise = NoiseModel(options.optics, options.coloured, self.device)
        self.cumulative = torch.from_numpy(np.cumsum(states.occupancy)).to(self.device)
        self.scale = self._calibrate()

    def _generator(self, number: int) -> torch.Generator:
        """The random numbers of one batch."""
        words = np.random.SeedSequence([ENTROPY, self.options.seed, STREAM, number]).generate_state(2, np.uint32)
        generator = torch.Generator(device=self.device)
        return generator.manual_seed((int(words[0]) << 31) ^ int(words[1]))

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, CtfParams]:
        """States, rotations, shifts and CTF of ``count`` images."""
        o = self.options

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=self.device, dtype=torch.float32)

        label = torch.searchsorted(self.cumulative, uniform(count).double()).clamp(max=len(self.cumulative) - 1)
        quaternion = torch.randn(count, 4, generator=generator, device=self.device)
        shift = (2 * uniform(count, 2) - 1) * o.shift
        defocus = 1e4 * (o.defocus_um[0] + (o.defocus_um[1] - o.defocus_um[0]) * uniform(count))
        half = o.astigmatism / 2 * uniform(count)
        same = torch.ones_like(half)
        contrast = CtfParams(
            defocus + half, defocus - half, 180 * uniform(count), o.voltage_kv * same, o.cs_mm * same,
            o.amplitude_contrast * same, 0 * same, o.pixel_size * same,
        )  # fmt: skip
        return label, quaternion_to_matrix(quaternion), shift, contrast

    def _spectra(self, label: Tensor, rotation: Tensor, shift: Tensor, contrast: CtfParams) -> Tensor:
        """Transforms of clean images in the render box."""
        return self.renderer.spectra(label, rotation, shift) * self.renderer.contrast(contrast)

    def _calibrate(self) -> float:
        """The factor of the clean images for which noise of unit sd at D gives the nominal SNR."""
        sums, generator = [], self._generator(0)
        for _ in range(0, CALIBRATION, 32):
            sums.append(self.renderer.power(self._spectra(*self._draw(32, generator))))
        mean, square = (torch.cat(sums).mean(0) / self.options.optics.render_box**2).tolist()
        sigma2 = (square - mean**2) / self.options.snr
        return float(1.0 / np.sqrt(sigma2 * self.noise.variance_at_size()))

    def batch(self, number: int) -> StreamBatch:
        """Batch ``number`` (from 0) of the stream."""
        generator = self._generator(number + 1)
        label, rotation, shift, contrast = self._draw(self.batch_size, generator)
        clean = self.renderer.to_images(self._spectra(label, rotation, shift, contrast))
        box = self.options.optics.render_box
        white = torch.randn(len(label), box, box, generator=generator, device=self.device)
        noise = self.renderer.to_images(self.noise.colour(torch.fft.rfft2(white)))
        first = number * self.batch_size
        return StreamBatch(
            index=torch.arange(first, first + self.batch_size, device=self.device),
            images=self.scale * clean + noise / self.noise.variance_at_size() ** 0.5,
            rotation=rotation,
            shift=shift,
            ctf=contrast,
            group=torch.zeros_like(label),
            label=label,
        )

    def batches(self, start: int = 0) -> Iterator[StreamBatch]:
        """Batches from ``start`` on, without end."""
        number = start
        while True:
            yield self.batch(number)
            number += 1

    def __iter__(self) -> Iterator[StreamBatch]:
        return self.batches()
