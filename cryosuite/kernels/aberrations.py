"""Higher-order aberrations as phases in radians: RELION's Zernike terms, beam tilt, cryoSPARC's trefoil and tetrafoil.

Coordinates (x, y) are spatial frequencies in 1/Angstrom (after anisotropic magnification), r^2 = x^2 + y^2,
phi = atan2(y, x). RELION evaluates Zernike polynomials at these coordinates directly (rho = r in 1/A, not scaled to 1).
All functions are odd or even polynomials, evaluated through powers of (x + i y): no angle is taken, so they are
differentiable everywhere.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

__all__ = ["physical_frequency", "even_phase", "odd_phase", "zernike", "even_index", "odd_index", "magnified_rotation"]


def physical_frequency(
    frequency: Tensor,  # (P, 2) cycles/pixel
    pixel_size: Tensor,  # (b,) A
    mag_matrix: Tensor | None = None,  # (b, 2, 2)
) -> tuple[Tensor, Tensor]:  # x, y each (b, P), float64, 1/A
    """Frequencies in 1/Angstrom, per particle, multiplied by the anisotropic magnification matrix when there is one."""
    scaled = frequency.to(pixel_size.dtype) / pixel_size[:, None, None]
    if mag_matrix is not None:
        scaled = scaled @ mag_matrix.transpose(-1, -2)
    return scaled[..., 0], scaled[..., 1]


@functools.cache
def even_index(i: int) -> tuple[int, int]:
    """(m, n) of RELION's i-th even Zernike term: (0,0), (-2,2), (0,2), (2,2), (-4,4), ..."""
    k = int(math.isqrt(i))
    return 2 * (i - k * k - k), 2 * k


@functools.cache
def odd_index(i: int) -> tuple[int, int]:
    """(m, n) of RELION's i-th odd Zernike term: (-1,1), (1,1), (-3,3), (-1,3), (1,3), (3,3), ..."""
    k = int((math.isqrt(1 + 4 * i) - 1) // 2)  # terms of the orders before n = 2k + 1: k (k + 1)
    n = 2 * k + 1
    return 2 * (i - k * (k + 1)) - n, n


def zernike(m: int, n: int, x: Tensor, y: Tensor) -> Tensor:
    """Zernike polynomial R_n^|m|(r) cos(m phi) (sin(|m| phi) for m < 0), without normalisation, at (x, y)."""
    order = abs(m)
    r2 = x * x + y * y
    angular = _harmonic(order, x, y, sine=m < 0)  # r^|m| cos or sin
    radial = torch.zeros_like(r2)
    for k in range((n - order) // 2 + 1):
        coefficient = (-1) ** k * math.factorial(n - k)
        coefficient //= math.factorial(k) * math.factorial((n + order) // 2 - k) * math.factorial((n - order) // 2 - k)
        radial = radial + coefficient * r2 ** ((n - order) // 2 - k)
    return radial * angular


def _harmonic(m: int, x: Tensor, y: Tensor, sine: bool) -> Tensor:
    """r^m cos(m phi) or r^m sin(m phi): real or imaginary part of (x + i y)^m."""
    real, imag = torch.ones_like(x), torch.zeros_like(x)
    for _ in range(m):
        real, imag = real * x - imag * y, real * y + imag * x
    return imag if sine else real


def magnified_rotation(rotation: Tensor, mag_matrix: Tensor) -> Tensor:
    """Rows x and y of rotations (b, 3, 3) so that a slice at k samples `(M k, 0) @ R`; the third row is kept."""
    rows = mag_matrix.transpose(-1, -2) @ rotation[..., :2, :]
    return torch.cat([rows, rotation[..., 2:, :]], -2)


def _series(coefficients: Tensor, index, x: Tensor, y: Tensor) -> Tensor:
    """Sum of coefficients (b, n) times Zernike terms."""
    total = torch.zeros_like(x)
    for i in range(coefficients.shape[1]):
        total = total + coefficients[:, i, None] * zernike(*index(i), x, y)
    return total


def even_phase(
    x: Tensor,  # (b, P)
    y: Tensor,
    wavelength: Tensor,  # (b, 1) A
    tetrafoil: Tensor | None,  # (b, 4) A
    even_zernike: Tensor | None,  # (b, n)
) -> Tensor:  # (b, P) radians
    """Even aberrations, to be ADDED to RELION's gamma (CTF = -sin gamma), which also holds + pi/2 Cs lambda^3 r^4.

    cryoSPARC's tetrafoil: lambda^3 r^4 (2 pi (A0 cos 2phi + A1 sin 2phi) + pi/2 (A2 cos 4phi + A3 sin 4phi)).
    """
    total = torch.zeros_like(x)
    if tetrafoil is not None:
        r2 = x * x + y * y
        second = tetrafoil[:, :1] * _harmonic(2, x, y, False) + tetrafoil[:, 1:2] * _harmonic(2, x, y, True)
        fourth = tetrafoil[:, 2:3] * _harmonic(4, x, y, False) + tetrafoil[:, 3:] * _harmonic(4, x, y, True)
        total = total + math.pi * wavelength**3 * (2 * r2 * second + fourth / 2)
    if even_zernike is not None:
        total = total + _series(even_zernike, even_index, x, y)
    return total


def odd_phase(
    x: Tensor,  # (b, P)
    y: Tensor,
    wavelength: Tensor,  # (b, 1) A
    cs: Tensor,  # (b, 1) A
    beam_tilt: Tensor | None,  # (b, 2) mrad
    trefoil: Tensor | None,  # (b, 2) A
    odd_zernike: Tensor | None,  # (b, n)
) -> Tensor:  # (b, P) radians
    """Phase phi of the factor exp(i phi) by which odd aberrations multiply an image's transform.

    Beam tilt: -2 pi Cs lambda^2 r^2 (x tx + y ty) with the tilt in radians (Glaeser et al. 2011; RELION).
    cryoSPARC's trefoil: -2 pi/3 lambda^2 r^3 (A0 cos 3phi + A1 sin 3phi).
    """
    total = torch.zeros_like(x)
    if beam_tilt is not None:
        tilt = beam_tilt * 1e-3
        r2 = x * x + y * y
        total = total - 2 * math.pi * cs * wavelength**2 * r2 * (x * tilt[:, :1] + y * tilt[:, 1:])
    if trefoil is not None:
        cosine, sine = _harmonic(3, x, y, False), _harmonic(3, x, y, True)
        total = total - 2 * math.pi / 3 * wavelength**2 * (trefoil[:, :1] * cosine + trefoil[:, 1:] * sine)
    if odd_zernike is not None:
        total = total + _series(odd_zernike, odd_index, x, y)
    return total
