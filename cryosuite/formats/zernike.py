"""cryoSPARC's aberration coefficients (lengths in Angstrom) as RELION's Zernike coefficients (radians).

Both programs evaluate their polynomials at spatial frequencies k in 1/Angstrom, so the two forms are exactly the same
phase. With lambda the wavelength, theta the angle of k against x, and the sign with which ``kernels.aberrations`` uses
them (the image's transform is multiplied by exp(i odd); even terms are added to +pi/2 Cs lambda^3 k^4):

    odd  = -2 pi lambda^2 k^3 (T . (cos, sin) theta) - 2 pi/3 lambda^2 k^3 (A . (cos, sin) 3 theta)
    even = lambda^3 k^4 (2 pi (B0 cos 2 theta + B1 sin 2 theta) + pi/2 (B2 cos 4 theta + B3 sin 4 theta))

with T = ctf/tilt_A, A = ctf/trefoil_A, B = ctf/tetra_A; k^3 cos theta = (Z_3^1 + 2 Z_1^1) / 3 and
k^4 cos 2 theta = (Z_4^2 + 3 Z_2^2) / 4.
"""

from __future__ import annotations

import numpy as np


def wavelength_a(voltage_kv: np.ndarray) -> np.ndarray:
    """Relativistic wavelength of the electron in Angstrom, 12.2639 / sqrt(V + 0.97845e-6 V^2) with V in volts."""
    volts = np.asarray(voltage_kv, np.float64) * 1e3
    return 12.2639 / np.sqrt(volts + 0.97845e-6 * volts**2)


def odd_zernike(
    wavelength: np.ndarray,  # (N,) A
    tilt_a: np.ndarray | None = None,  # (N, 2) A
    trefoil_a: np.ndarray | None = None,  # (N, 2) A
) -> np.ndarray:  # (N, 6) rad A^n
    """rlnOddZernike: coefficients of Z_1^-1, Z_1^1, Z_3^-3, Z_3^-1, Z_3^1, Z_3^3."""
    coefficients = np.zeros((len(wavelength), 6))
    third = -2 * np.pi / 3 * wavelength**2
    if tilt_a is not None:
        coefficients[:, 4], coefficients[:, 3] = third * tilt_a[:, 0], third * tilt_a[:, 1]
        coefficients[:, 1], coefficients[:, 0] = 2 * coefficients[:, 4], 2 * coefficients[:, 3]
    if trefoil_a is not None:
        coefficients[:, 5], coefficients[:, 2] = third * trefoil_a[:, 0], third * trefoil_a[:, 1]
    return coefficients


def even_zernike(
    wavelength: np.ndarray,  # (N,) A
    tetra_a: np.ndarray,  # (N, 4) A
) -> np.ndarray:  # (N, 9) rad A^n
    """rlnEvenZernike: coefficients of Z_0^0, Z_2^-2, Z_2^0, Z_2^2, Z_4^-4, Z_4^-2, Z_4^0, Z_4^2, Z_4^4."""
    coefficients = np.zeros((len(wavelength), 9))
    half = np.pi / 2 * wavelength**3
    coefficients[:, 7], coefficients[:, 5] = half * tetra_a[:, 0], half * tetra_a[:, 1]
    coefficients[:, 3], coefficients[:, 1] = 3 * coefficients[:, 7], 3 * coefficients[:, 5]
    coefficients[:, 8], coefficients[:, 4] = half * tetra_a[:, 2], half * tetra_a[:, 3]
    return coefficients
