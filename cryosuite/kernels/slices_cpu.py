"""The loops of slice extraction and insertion for the CPU, compiled by numba at first use and cached on disk.

Fifteen times faster than the same gather and scatter in torch, which materialise eight corners per point. The compiled
loops run single-threaded and release the interpreter lock: two accumulators (half maps) can be filled by two threads.
Frequencies beyond the stored radius, NaN included, read zero and insert nothing.
"""

from __future__ import annotations

import numpy as np

from .compiled import available, compiled

__all__ = ["extract", "insert", "available"]


def extract(
    transforms: np.ndarray,  # (k, 2N+1, 2N+1, N+1, 2)
    which: np.ndarray,  # (b,) int64, the volume of each slice
    xy: np.ndarray,  # (P, 2) int64
    rotation: np.ndarray,  # (b, 3, 3)
    pad: int,
) -> np.ndarray:  # (b, P, 2)
    """Trilinear slices; see `slices.extract_slices`."""
    out = np.zeros((rotation.shape[0], xy.shape[0], 2), transforms.dtype)
    compiled(_extract)(transforms, which, xy, rotation, pad, out)
    return out


def insert(
    data: np.ndarray,  # (2N+1, 2N+1, N+1, 3), added to in place
    values: np.ndarray,  # (b, P, 2)
    weights: np.ndarray,  # (b, P)
    xy: np.ndarray,  # (P, 2) int64
    rotation: np.ndarray,  # (b, 3, 3)
    pad: int,
) -> None:
    """Adjoint of `extract`, with weights; see `slices.insert_slices`."""
    compiled(_insert)(data, values, weights, xy, rotation, pad)


def _extract(transforms, which, xy, rotation, pad, out):
    n, nx = transforms.shape[1], transforms.shape[3]
    N = nx - 1
    limit = (N - 1 + 0.01) ** 2
    step_y, step_z, step_v = nx * 2, n * nx * 2, n * n * nx * 2
    flat = transforms.reshape(-1)
    for b in range(rotation.shape[0]):
        R = rotation[b]
        for p in range(xy.shape[0]):
            kx, ky = xy[p, 0] * pad, xy[p, 1] * pad
            x = kx * R[0, 0] + ky * R[1, 0]
            y = kx * R[0, 1] + ky * R[1, 1]
            z = kx * R[0, 2] + ky * R[1, 2]
            if not x * x + y * y + z * z <= limit:
                continue
            sign = 1
            if x < 0:
                x, y, z, sign = -x, -y, -z, -1
            y += N
            z += N
            ix, iy, iz = int(x), int(y), int(z)
            fx, fy, fz = x - ix, y - iy, z - iz
            start = which[b] * step_v + iz * step_z + iy * step_y + ix * 2
            gx = 1 - fx
            real, imag = 0.0, 0.0
            for corner in range(4):
                o = start + (corner // 2) * step_z + (corner % 2) * step_y
                w = (fz if corner // 2 else 1 - fz) * (fy if corner % 2 else 1 - fy)
                real += w * (gx * flat[o] + fx * flat[o + 2])
                imag += w * (gx * flat[o + 1] + fx * flat[o + 3])
            out[b, p, 0] = real
            out[b, p, 1] = sign * imag


def _insert(data, values, weights, xy, rotation, pad):
    n, nx = data.shape[0], data.shape[2]
    N = nx - 1
    limit = (N - 1 + 0.01) ** 2
    step_y, step_z = nx * 3, n * nx * 3
    flat = data.reshape(-1)
    for b in range(rotation.shape[0]):
        R = rotation[b]
        for p in range(xy.shape[0]):
            kx, ky = xy[p, 0] * pad, xy[p, 1] * pad
            x = kx * R[0, 0] + ky * R[1, 0]
            y = kx * R[0, 1] + ky * R[1, 1]
            z = kx * R[0, 2] + ky * R[1, 2]
            if not x * x + y * y + z * z <= limit:
                continue
            real, imag, weight = values[b, p, 0], values[b, p, 1], weights[b, p]
            if x < 0:
                x, y, z, imag = -x, -y, -z, -imag
            y += N
            z += N
            ix, iy, iz = int(x), int(y), int(z)
            fx, fy, fz = x - ix, y - iy, z - iz
            start = iz * step_z + iy * step_y + ix * 3
            gx = 1 - fx
            for corner in range(4):
                o = start + (corner // 2) * step_z + (corner % 2) * step_y
                w = (fz if corner // 2 else 1 - fz) * (fy if corner % 2 else 1 - fy)
                low, high = w * gx, w * fx
                flat[o] += low * real
                flat[o + 1] += low * imag
                flat[o + 2] += low * weight
                flat[o + 3] += high * real
                flat[o + 4] += high * imag
                flat[o + 5] += high * weight
