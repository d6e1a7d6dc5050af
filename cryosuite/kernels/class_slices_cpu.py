"""The loops of `class_slices` for the CPU, compiled by numba at first use and cached on disk.

A point's eight corners and weights are computed once for all K volumes. The values of a voxel lie side by side, the
real parts of all volumes and then the imaginary ones, so that the sum over corners runs in vector registers and its
result is used at once: no slice is ever stored. The gather waits for memory more than it computes; the voxels of a
point are therefore touched while the point before is computed (2.2 times faster, measured at K = 24). The loops release
the interpreter lock; images (sums) or classes (insertion) can be shared among threads, and the result is the same bit
for bit however they are shared.
"""

from __future__ import annotations

import numpy as np

from .compiled import available, compiled

__all__ = ["sums", "insert", "available"]

FLUSH = 64  # points whose sum is kept in single precision before it is added in double precision


def sums(
    data: np.ndarray,  # (2N+1, 2N+1, N+1, 2, K) float32
    values: np.ndarray,  # (b, P, 2) float32
    weights: np.ndarray,  # (b, P) float32
    xy: np.ndarray,  # (P, 2) int64
    rotation: np.ndarray,  # (b, 3, 3) float32
    pad: int,
    h: np.ndarray,  # (b, K) float64, written
    g: np.ndarray,  # (b, 1, K) or (b, K, K) float64, written
) -> None:
    """Whole-disc sums of every image with every class, or with every pair of them; see `class_slices`."""
    n, nx, classes = data.shape[1], data.shape[2], data.shape[4]
    gram = g.shape[1] == classes and classes > 1
    compiled(_sums)(data.reshape(-1), n, nx, classes, values, weights, xy, rotation, pad, h, g, gram)


def insert(
    data: np.ndarray,  # (K, 2N+1, 2N+1, N+1, 3) float32, added to in place
    values: np.ndarray,  # (b, P, 2) float32
    weights: np.ndarray,  # (b, P) float32
    xy: np.ndarray,  # (P, 2) int64
    rotation: np.ndarray,  # (b, 3, 3) float32
    pad: int,
    shares: np.ndarray,  # (nnz,) float32
    classes: np.ndarray,  # (nnz,) int32
    rows: np.ndarray,  # (b + 1,) int64 where the shares of each image begin
    first: int,
    last: int,
) -> None:
    """Insert images by their shares into classes first .. last - 1; see `class_slices.insert_classes`."""
    n, nx = data.shape[2], data.shape[3]
    arrays = (values, weights, xy, rotation)
    compiled(_insert)(data.reshape(-1), n, nx, *arrays, pad, shares, classes, rows, first, last)


def _sums(flat, n, nx, K, values, weights, xy, rotation, pad, h, g, gram):
    N, P = nx - 1, xy.shape[0]
    limit = (N - 1 + 0.01) ** 2
    K2 = 2 * K
    step_y, step_z = nx * K2, n * nx * K2
    one, touched = np.float32(1), np.float32(0)
    part = np.empty(K2, np.float32)  # one point's slice values
    hs, gs = np.zeros(K, np.float32), np.zeros((K if gram else 1, K), np.float32)
    place, fraction, sign = np.empty(P + 1, np.int64), np.empty((P, 3), np.float32), np.empty(P, np.float32)
    place[P] = -1
    for b in range(rotation.shape[0]):
        R = rotation[b]
        h[b] = 0
        g[b] = 0
        for p in range(P):
            kx, ky = np.float32(xy[p, 0] * pad), np.float32(xy[p, 1] * pad)
            x = kx * R[0, 0] + ky * R[1, 0]
            y = kx * R[0, 1] + ky * R[1, 1]
            z = kx * R[0, 2] + ky * R[1, 2]
            place[p] = -1
            if x * x + y * y + z * z <= limit:
                sign[p] = one
                if x < 0:
                    x, y, z = -x, -y, -z
                    sign[p] = -one
                y += np.float32(N)
                z += np.float32(N)
                ix, iy, iz = int(x), int(y), int(z)
                fraction[p, 0], fraction[p, 1], fraction[p, 2] = x - ix, y - iy, z - iz
                place[p] = iz * step_z + iy * step_y + ix * K2
        for p in range(P):
            if place[p + 1] >= 0:  # fetch what the next point needs into the cache while this one is computed
                for corner in range(4):
                    o = place[p + 1] + (corner // 2) * step_z + (corner % 2) * step_y
                    for j in range(0, 2 * K2, 16):
                        touched += flat[o + j]
            if place[p] >= 0:
                vr, vi, w = values[b, p, 0], values[b, p, 1] * sign[p], weights[b, p]
                fx, fy, fz = fraction[p, 0], fraction[p, 1], fraction[p, 2]
                for corner in range(4):
                    o = place[p] + (corner // 2) * step_z + (corner % 2) * step_y
                    side = (fz if corner // 2 else one - fz) * (fy if corner % 2 else one - fy)
                    low, high = side * (one - fx), side * fx
                    if corner == 0:
                        for j in range(K2):
                            part[j] = low * flat[o + j] + high * flat[o + K2 + j]
                    else:
                        for j in range(K2):
                            part[j] += low * flat[o + j] + high * flat[o + K2 + j]
                for k in range(K):
                    hs[k] += vr * part[k] + vi * part[K + k]
                if gram:
                    for j in range(K):
                        real, imag = w * part[j], w * part[K + j]
                        for k in range(K):
                            gs[j, k] += real * part[k] + imag * part[K + k]
                else:
                    for k in range(K):
                        gs[0, k] += w * (part[k] * part[k] + part[K + k] * part[K + k])
            if p % FLUSH == FLUSH - 1 or p == P - 1:
                for k in range(K):
                    h[b, k] += 2 * hs[k]
                for j in range(gs.shape[0]):
                    for k in range(K):
                        g[b, j, k] += 2 * gs[j, k]
                hs[:] = 0
                gs[:] = 0
    return touched  # used by nobody; a compiler would leave out what is not


def _insert(flat, n, nx, values, weights, xy, rotation, pad, shares, classes, rows, first, last):
    N = nx - 1
    limit = (N - 1 + 0.01) ** 2
    step_y, step_z, step_k = nx * 3, n * nx * 3, n * n * nx * 3
    one = np.float32(1)
    for b in range(rotation.shape[0]):
        begin, end = rows[b], rows[b + 1]
        while begin < end and classes[begin] < first:  # classes of a row ascend
            begin += 1
        while end > begin and classes[end - 1] >= last:
            end -= 1
        if begin == end:
            continue
        R = rotation[b]
        for p in range(xy.shape[0]):
            kx, ky = np.float32(xy[p, 0] * pad), np.float32(xy[p, 1] * pad)
            x = kx * R[0, 0] + ky * R[1, 0]
            y = kx * R[0, 1] + ky * R[1, 1]
            z = kx * R[0, 2] + ky * R[1, 2]
            if not x * x + y * y + z * z <= limit:
                continue
            real, imag, weight = values[b, p, 0], values[b, p, 1], weights[b, p]
            if x < 0:
                x, y, z, imag = -x, -y, -z, -imag
            y += np.float32(N)
            z += np.float32(N)
            ix, iy, iz = int(x), int(y), int(z)
            fx, fy, fz = x - np.float32(ix), y - np.float32(iy), z - np.float32(iz)
            start = iz * step_z + iy * step_y + ix * 3
            for corner in range(4):
                place = start + (corner // 2) * step_z + (corner % 2) * step_y
                side = (fz if corner // 2 else one - fz) * (fy if corner % 2 else one - fy)
                for s in range(begin, end):
                    share = shares[s] * side
                    low, high = share * (one - fx), share * fx
                    o = place + classes[s] * step_k
                    flat[o] += low * real
                    flat[o + 1] += low * imag
                    flat[o + 2] += low * weight
                    flat[o + 3] += high * real
                    flat[o + 4] += high * imag
                    flat[o + 5] += high * weight
