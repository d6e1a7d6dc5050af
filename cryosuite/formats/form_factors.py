"""Electron form factors of neutral atoms: sums of five Gaussians (International Tables C, 4.3.2.2), from gemmi."""

from __future__ import annotations

import numpy as np

LIKE = 6  # carbon stands for what has no entry


def electron_factors(
    numbers: np.ndarray,  # (n,) atomic numbers
    s: np.ndarray,  # (m,) cycles per A
) -> np.ndarray:  # (n, m) float64, A
    """f(s) = sum_i a_i exp(-b_i s^2 / 4) of each element, in A (Mott-Bethe). Unknown elements count as carbon."""
    import gemmi

    rows = []
    for number in np.asarray(numbers).tolist():
        coefficients = gemmi.Element(int(number)).c4322.get_coefs() if 0 < number < 99 else []
        if not any(coefficients):
            coefficients = gemmi.Element(LIKE).c4322.get_coefs()
        half = len(coefficients) // 2
        a, b = np.array(coefficients[:half]), np.array(coefficients[half:])
        rows.append(np.exp(-b * np.asarray(s, np.float64)[:, None] ** 2 / 4) @ a)
    return np.array(rows).reshape(-1, len(s))
