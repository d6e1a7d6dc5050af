"""The contrast transfer function with all its terms, batched over particles.

Sign: POSITIVE at low frequency for particles that are white (minus cryoDRGN's array, equal to RELION's). With s the
spatial frequency vector in 1/Angstrom, lambda the electron wavelength and df(theta) the defocus along s,

    chi = pi lambda df(theta) s^2 - pi/2 Cs lambda^3 s^4 + phase_shift - even aberrations
    CTF = scale exp(-B s^2 / 4) sin(chi + asin(w)),     w = amplitude contrast

which is sqrt(1 - w^2) sin(chi) + w cos(chi) (Rohou & Grigorieff 2015; RELION's -sin(gamma) with gamma = -chi - asin w).
The phase is summed in float64 as cycles, reduced to one period and only then rounded: float32 survives large defocus.
Odd aberrations (beam tilt, trefoil, odd Zernike) do not change the CTF but the phase of the image: see `odd_phase`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from . import aberrations

__all__ = ["CtfParams", "ctf", "odd_phase", "wavelength"]


@dataclass
class CtfParams:
    """CTF parameters of b particles: tensors whose first axis is b. Optional terms are None when absent."""

    defocus_u: Tensor  # (b,) A, positive = underfocus
    defocus_v: Tensor  # (b,) A
    astigmatism_deg: Tensor  # (b,) angle of the U axis against x
    voltage_kv: Tensor  # (b,)
    cs_mm: Tensor  # (b,)
    amplitude_contrast: Tensor  # (b,) 0..1
    phase_shift_deg: Tensor  # (b,)
    pixel_size: Tensor  # (b,) A
    bfactor: Tensor | None = None  # (b,) A^2: amplitude exp(-B s^2 / 4)
    scale: Tensor | None = None  # (b,)
    beam_tilt: Tensor | None = None  # (b, 2) mrad, as rlnBeamTiltX/Y
    trefoil: Tensor | None = None  # (b, 2) A, as ctf/trefoil_A
    tetrafoil: Tensor | None = None  # (b, 4) A, as ctf/tetra_A
    odd_zernike: Tensor | None = None  # (b, n), as rlnOddZernike
    even_zernike: Tensor | None = None  # (b, n), as rlnEvenZernike
    mag_matrix: Tensor | None = None  # (b, 2, 2), as rlnMagMat00..11

    @staticmethod
    def from_table(table: Tensor) -> CtfParams:
        """From rows of a ctf.pkl (b, 9): D, pixel size, defocus U, V, angle, kV, Cs, amplitude contrast, phase."""
        if table.ndim != 2 or table.shape[1] != 9:
            raise ValueError(f"a CTF table has 9 columns, not shape {tuple(table.shape)}")
        _, pixel_size, u, v, angle, kv, cs, w, phase = table.unbind(1)
        return CtfParams(u, v, angle, kv, cs, w, phase, pixel_size)

    def __len__(self) -> int:
        return self.defocus_u.shape[0]

    def _map(self, function) -> CtfParams:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(v) for name, v in values.items() if v is not None})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> CtfParams:
        """The same parameters on another device or in another precision."""
        return self._map(lambda v: v.to(device=device, dtype=dtype))

    def rows(self, index: Tensor | slice) -> CtfParams:
        """The parameters of some particles."""
        return self._map(lambda v: v[index])


def wavelength(voltage_kv: Tensor) -> Tensor:
    """Relativistic electron wavelength in Angstrom: 12.2639 / sqrt(V + 0.97845e-6 V^2), V in volts."""
    volts = voltage_kv * 1e3
    return 12.2639 / torch.sqrt(volts + 0.97845e-6 * volts**2)


def ctf(
    frequency: Tensor,  # (P, 2) cycles/pixel, (x, y)
    params: CtfParams,
) -> Tensor:  # (b, P)
    """CTF of each particle at each frequency, positive at low frequency, in the precision of `frequency`.

    Anisotropic magnification M maps the image's frequency to the particle's: all terms are evaluated at M s (RELION).
    """
    p = params.to(dtype=torch.float64)
    if p.mag_matrix is None and p.tetrafoil is None and p.even_zernike is None:
        cycles = _cycles_by_matmul(frequency, p)
    else:
        cycles = _cycles_by_point(frequency, p)
    cycles = (cycles - torch.round(cycles.detach())).to(frequency.dtype)
    values = torch.sin((2 * math.pi) * cycles)
    if p.bfactor is not None:
        s2 = _squared_frequency(frequency, p)
        values = values * torch.exp(p.bfactor[:, None] * (-0.25 * s2)).to(frequency.dtype)
    if p.scale is not None:
        values = values * p.scale[:, None].to(frequency.dtype)
    return values


def _offset_cycles(p: CtfParams) -> Tensor:
    """(b,) the part of the phase that does not depend on frequency."""
    return p.phase_shift_deg / 360 + torch.asin(p.amplitude_contrast) / (2 * math.pi)


def _cycles_by_matmul(frequency: Tensor, p: CtfParams) -> Tensor:
    """Phase in cycles as one product (b, 5) @ (5, P) with the monomials x^2, xy, y^2, r^4, 1."""
    x, y = frequency.to(torch.float64).unbind(-1)
    r2 = x * x + y * y
    basis = torch.stack([x * x, x * y, y * y, r2 * r2, torch.ones_like(x)])
    lam = wavelength(p.voltage_kv) / p.pixel_size**2
    mean, half = (p.defocus_u + p.defocus_v) / 2, (p.defocus_u - p.defocus_v) / 2
    angle = torch.deg2rad(2 * p.astigmatism_deg)
    along, across = half * torch.cos(angle), half * torch.sin(angle)
    spherical = -(p.cs_mm * 1e7) * wavelength(p.voltage_kv) ** 3 / (4 * p.pixel_size**4)
    rows = [lam / 2 * (mean + along), lam * across, lam / 2 * (mean - along), spherical, _offset_cycles(p)]
    return torch.stack(rows, 1) @ basis


def _cycles_by_point(frequency: Tensor, p: CtfParams) -> Tensor:
    """Phase in cycles point by point, with the rare even aberrations and magnification."""
    x, y = aberrations.physical_frequency(frequency, p.pixel_size, p.mag_matrix)
    lam = wavelength(p.voltage_kv)[:, None]
    s2 = x * x + y * y
    mean, half = (p.defocus_u + p.defocus_v)[:, None] / 2, (p.defocus_u - p.defocus_v)[:, None] / 2
    angle = torch.deg2rad(2 * p.astigmatism_deg)[:, None]
    defocus_s2 = mean * s2 + half * (torch.cos(angle) * (x * x - y * y) + 2 * torch.sin(angle) * x * y)
    cycles = lam * defocus_s2 / 2 - (p.cs_mm * 1e7)[:, None] * lam**3 * s2 * s2 / 4 + _offset_cycles(p)[:, None]
    even = aberrations.even_phase(x, y, lam, p.tetrafoil, p.even_zernike)
    return cycles - even / (2 * math.pi)


def _squared_frequency(frequency: Tensor, p: CtfParams) -> Tensor:
    x, y = aberrations.physical_frequency(frequency, p.pixel_size, p.mag_matrix)
    return x * x + y * y


def odd_phase(
    frequency: Tensor,  # (P, 2) cycles/pixel, (x, y)
    params: CtfParams,
) -> Tensor | None:  # (b, P) complex, or None without odd aberrations
    """Factor to multiply OBSERVED coefficients with, so that beam tilt, trefoil and odd Zernike terms are undone.

    exp(-i phi) where the microscope multiplied the image's transform by exp(i phi).
    """
    if params.beam_tilt is None and params.trefoil is None and params.odd_zernike is None:
        return None
    p = params.to(dtype=torch.float64)
    x, y = aberrations.physical_frequency(frequency, p.pixel_size, p.mag_matrix)
    lam = wavelength(p.voltage_kv)[:, None]
    phase = aberrations.odd_phase(x, y, lam, p.cs_mm[:, None] * 1e7, p.beam_tilt, p.trefoil, p.odd_zernike)
    phase = torch.remainder(phase, 2 * math.pi).to(frequency.dtype)
    return torch.complex(torch.cos(phase), -torch.sin(phase))
