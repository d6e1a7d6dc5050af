"""Noise whose spectrum is known exactly: drawn in the render box, white or coloured, cropped with the images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cryosuite.kernels.density import crop_half, half_frequencies
from cryosuite.simulate.images import Optics

COLOUR_KNEE = 1.0 / 40.0  # 1/A: coloured noise falls as 1/(1 + (s/knee)^2) ...
COLOUR_FLOOR = 0.1  # ... to this share of its low-frequency power


class NoiseModel:
    """Stationary Gaussian noise: mean 0, pixel variance 1 in the render box, before the crop to D.

    Args:
        optics: boxes and pixel.
        coloured: power falls with frequency instead of being white.
    """

    def __init__(self, optics: Optics, coloured: bool = False, device: torch.device | str = "cpu") -> None:
        self.optics, self.coloured = optics, coloured
        box = optics.render_box
        ky, kx = half_frequencies(box, 2)
        s2 = ((kx**2 + ky**2) / optics.field_of_view**2).double()
        power = torch.ones_like(s2)
        if coloured:
            power = COLOUR_FLOOR + (1 - COLOUR_FLOOR) / (1 + s2 / COLOUR_KNEE**2)
        weight = torch.full((box // 2 + 1,), 2.0, dtype=torch.float64)
        weight[0] = weight[-1] = 1.0
        power = power / ((power * weight).sum() / box**2)
        self.power = power * box**2  # E|n|^2 of an unnormalised coefficient in the render box, (B, B//2 + 1)
        self.amplitude = (power.sqrt()).float().to(device)

    def draw(self, count: int, rng: np.random.Generator) -> Tensor:
        """Transforms (count, B, B//2 + 1) of noise images; the stream of numbers does not depend on batch sizes."""
        box = self.optics.render_box
        white = torch.from_numpy(rng.standard_normal((count, box, box), np.float32)).to(self.amplitude.device)
        spectrum = torch.fft.rfft2(white)
        return spectrum * self.amplitude if self.coloured else spectrum

    def _cropped_power(self) -> Tensor:
        """E|n|^2 of the unnormalised coefficients after the crop (sum over pixels kept): (D, D//2 + 1) float64."""
        size, box = self.optics.box_size, self.optics.render_box
        power = crop_half(self.power, box, size, 2).clone()
        if size < box:  # Nyquist lines hold the mean of two independent coefficients: half the power
            power[size // 2] /= 2
            power[:, -1] /= 2
        return power

    def variance_at_size(self) -> float:
        """Pixel variance after the crop to D (sum over pixels kept, so about (D/B)^-2 of the render box's)."""
        size = self.optics.box_size
        power = self._cropped_power()
        return float((2 * power.sum() - power[:, 0].sum() - power[:, -1].sum()) / size**4)

    def shells(self) -> np.ndarray:
        """E|n|^2 per integer shell 0 .. D//2 after the crop, for a pixel variance of 1 at D: (D//2 + 1,) float32."""
        size = self.optics.box_size
        power = self._cropped_power() / self.variance_at_size()
        ky, kx = half_frequencies(size, 2)
        shell = torch.sqrt(kx**2 + ky**2).round().long()
        weight = torch.full(shell.shape, 2.0, dtype=torch.float64)
        weight[:, 0] = weight[:, -1] = 1.0
        total = torch.bincount(shell.flatten(), (power * weight).flatten())
        return (total / torch.bincount(shell.flatten(), weight.flatten()))[: size // 2 + 1].numpy().astype(np.float32)
