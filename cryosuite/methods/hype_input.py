"""What CryoHype's encoder looks at: the phase-flipped, whitened particle as a Hartley or a real-space image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cryosuite.data.loader import Batch
from cryosuite.kernels import fourier
from cryosuite.kernels.upright import turn
from cryosuite.methods.hype_options import HypeOptions

if TYPE_CHECKING:
    from cryosuite.data.spectra import Spectra, Target


class EncoderInput(nn.Module):
    """(target, batch) -> image (b, S, S); S = D, or twice ``encoder_rmax``.

    ``encoder_scale`` sets the weight of each shell after the phase flip: "noise" divides by the noise amplitude (the
    default), "total" by that of noise and signal together (all shells of unit variance), "wiener" multiplies with the
    CTF and the Wiener factor instead of flipping signs.
    """

    def __init__(self, box_size: int, options: HypeOptions, spectra: Spectra) -> None:
        super().__init__()
        self.options, self.box_size = options, box_size
        r_max = options.encoder_rmax or box_size // 2
        self.r_max = min(r_max, box_size // 2)
        self.size = 2 * self.r_max
        radius = torch.arange(box_size // 2 + 1, dtype=torch.float32)
        snr = spectra.signal / spectra.noise.mean(0)
        scale = torch.ones_like(radius)
        if options.encoder_scale == "total":
            scale = (1 + 0.4 * snr).rsqrt()  # 0.4: mean CTF^2 is a little below one half
        if options.encoder_lowpass:
            scale = scale * torch.exp(-0.5 * (radius / options.encoder_lowpass) ** 2)
        self.register_buffer("scale", scale)
        self.register_buffer("signal", spectra.signal.clone())

    def forward(
        self, target: Target, disc: fourier.HalfDisc, batch: Batch, seen: Tensor | None = None
    ) -> Tensor:  # -> (b, S, S)
        """The image, float32, values of order one; of the ``seen`` half of the coefficients (P,) only, twice those."""
        if self.options.encoder_scale == "wiener":
            gain = target.ctf * self.signal.sqrt()[disc.shell]  # CTF times signal over noise, in amplitudes
            weight = gain / (1 + gain.square())
        else:
            weight = torch.sign(target.ctf)
        coeffs = target.values * (weight * self.scale[disc.shell])
        if seen is not None:
            coeffs = coeffs * (2.0 * seen)
        small = disc
        if self.size < self.box_size:
            small = fourier.half_disc(self.size, device=disc.device)
            coeffs = coeffs[:, : len(small)]  # the same points in the same order: both are sorted by radius
        image = fourier.from_half_disc(coeffs, small) * self.size  # unit variance for unit coefficients
        if self.options.encoder_align:
            image = turn(image, batch.rotation)
        if self.options.encoder_input == "hartley":
            return fourier.hartley(image) / self.size
        return image


def view_direction(rotation: Tensor) -> Tensor:  # (b, 3, 3) -> (b, 3)
    """The direction of view in the volume's frame, on the upper hemisphere as ``turn`` has it."""
    return rotation[:, 2] * torch.where(rotation[:, 2, 2] < 0, -1.0, 1.0)[:, None]
