"""The element loops of a decoder's layers for the CPU, compiled by numba at first use and cached on disk.

One pass over memory each where torch takes three to six: phases with their sine and cosine, and layer norm with
residual and ReLU. Everything is float32; the loops release the interpreter lock.
"""

from __future__ import annotations

import math

import numpy as np

from .compiled import SUMS, available, compiled

__all__ = ["available", "sincos", "norm_relu", "norm_relu_backward"]

# pi in three parts: n times the first two is exact for the n that occur (Cody and Waite)
_PI_1, _PI_2, _PI_3 = (np.float32(4 * part) for part in (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8))
_ONE_OVER_PI, _HALF, _ONE, _EIGHT = (np.float32(v) for v in (1 / math.pi, 0.5, 1.0, 8.0))
_ROUNDING = np.float32(1.5 * 2**23)  # added and taken away: rounds to a whole number
_S3, _S5, _S7, _S9, _S11 = (np.float32((-1) ** (n // 2) / math.factorial(n)) for n in (3, 5, 7, 9, 11))
_C2, _C4, _C6, _C8, _C10, _C12 = (np.float32((-1) ** (n // 2) / math.factorial(n)) for n in (2, 4, 6, 8, 10, 12))


def sincos(q: np.ndarray, frequencies: np.ndarray, out: np.ndarray) -> None:  # (n, 3), (3, m), (n, 2m)
    """out = [sin(q f), cos(q f)]; absolute error 2e-7 beside that of the float32 phase, for phases up to 10,000."""
    compiled(_sincos)(q, frequencies, out)


def norm_relu(
    x: np.ndarray,  # (n, w)
    residual: np.ndarray,  # (n, w), or (0, w) for none
    gain: np.ndarray,  # (w,)
    offset: np.ndarray,  # (w,)
    eps: float,
    out: np.ndarray,  # (n, w), may be x
    stats: np.ndarray,  # (n, 2): mean and 1 / sd of each row
) -> None:
    """out = relu(LN(x) * gain + offset + residual)."""
    compiled(_norm_relu, SUMS)(x, residual, gain, offset, np.float32(eps), out, stats)


def norm_relu_backward(
    grad: np.ndarray,  # (n, w)
    out: np.ndarray,  # (n, w), of the forward pass
    x: np.ndarray,  # (n, w)
    stats: np.ndarray,  # (n, 2)
    gain: np.ndarray,  # (w,)
    d_x: np.ndarray,  # (n, w)
    d_residual: np.ndarray,  # (n, w)
    d_gain: np.ndarray,  # (w,), added to
    d_offset: np.ndarray,  # (w,), added to
) -> None:
    """Gradients of `norm_relu`."""
    compiled(_norm_relu_backward, SUMS)(grad, out, x, stats, gain, d_x, d_residual, d_gain, d_offset)


# Rows are taken as arrays of their own: an index such as m + j, or an output that may be an input, would keep the
# compiler from using vector instructions.
def _sincos(q, frequencies, out):
    m = frequencies.shape[1]
    f_x, f_y, f_z = frequencies[0], frequencies[1], frequencies[2]
    for p in range(q.shape[0]):
        x, y, z = q[p, 0], q[p, 1], q[p, 2]
        sines, cosines = out[p, :m], out[p, m:]
        for j in range(m):
            a = x * f_x[j] + y * f_y[j] + z * f_z[j]
            n = (a * _ONE_OVER_PI + _ROUNDING) - _ROUNDING
            r = ((a - n * _PI_1) - n * _PI_2) - n * _PI_3
            half = n * _HALF
            odd = half - ((half + _ROUNDING) - _ROUNDING)  # 0, or 1/2 either way
            sign = _ONE - _EIGHT * odd * odd
            s = r * r
            sine = r + r * s * (_S3 + s * (_S5 + s * (_S7 + s * (_S9 + s * _S11))))
            cosine = _ONE + s * (_C2 + s * (_C4 + s * (_C6 + s * (_C8 + s * (_C10 + s * _C12)))))
            sines[j] = sign * sine
            cosines[j] = sign * cosine


def _norm_relu(x, residual, gain, offset, eps, out, stats):
    n, w = x.shape
    scale, zero = np.float32(1.0 / w), np.float32(0.0)
    with_residual = residual.shape[0] > 0
    row = np.empty(w, np.float32)
    for p in range(n):
        given, result = x[p], out[p]
        total = zero
        for j in range(w):
            total += given[j]
        mean = total * scale
        total = zero
        for j in range(w):
            total += (given[j] - mean) * (given[j] - mean)
        rstd = _ONE / np.sqrt(total * scale + eps)
        stats[p, 0], stats[p, 1] = mean, rstd
        for j in range(w):
            row[j] = (given[j] - mean) * rstd * gain[j] + offset[j]
        if with_residual:
            other = residual[p]
            for j in range(w):
                row[j] += other[j]
        for j in range(w):
            result[j] = zero if row[j] < zero else row[j]  # NaN stays NaN


def _norm_relu_backward(grad, out, x, stats, gain, d_x, d_residual, d_gain, d_offset):
    n, w = x.shape
    scale, zero = np.float32(1.0 / w), np.float32(0.0)
    normal, scaled = np.empty(w, np.float32), np.empty(w, np.float32)
    for p in range(n):
        mean, rstd = stats[p, 0], stats[p, 1]
        given, up, result, masked, down = x[p], grad[p], out[p], d_residual[p], d_x[p]
        for j in range(w):
            masked[j] = up[j] if result[j] > zero else zero
        first, second = zero, zero
        for j in range(w):
            normal[j] = (given[j] - mean) * rstd
            scaled[j] = masked[j] * gain[j]
            first += scaled[j]
            second += scaled[j] * normal[j]
        for j in range(w):
            d_offset[j] += masked[j]
            d_gain[j] += masked[j] * normal[j]
        first, second = first * scale, second * scale
        for j in range(w):
            down[j] = rstd * (scaled[j] - first - normal[j] * second)
