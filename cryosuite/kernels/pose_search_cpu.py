"""The loops of pose search for the CPU, compiled by numba at first use and cached on disk; float32, one thread.

A slice is used where it is made: its points go into the products with the image and its power and never leave the
processor's cache. The loops release the interpreter lock, so that threads can share the images. This module needs
numba; `pose_scores.loops()` imports it when it is there.
"""

from __future__ import annotations

import functools

import numba
import numpy as np

from .compiled import SUMS, compiled

__all__ = ["best_of_shifts", "score", "normal_equations"]

# A part of a loop becomes part of its text. As a function of its own it would be compiled twice, alone and within the
# loop, to codes that add up in another order; which of the two is called depends on whether the loop comes from the
# cache on disk, so that the first run on a machine would differ from all others in the last digits.
_part = numba.njit(inline="always", nogil=True, fastmath=set(SUMS))
_loop = functools.partial(compiled, fastmath=SUMS)


@_part
def _raise(real, imag, sign, number, best, which):
    """best = max(best, real + sign imag), `which` the number of the last that raised it; all (H,)."""
    for h in range(real.shape[0]):
        value = real[h] + sign * imag[h]
        better = value > best[h]
        which[h] = number if better else which[h]
        best[h] = value if better else best[h]


@_loop
def best_of_shifts(
    real,  # (B, T, H) float32, products of the real parts
    imag,  # (B, T, H) float32, of the imaginary parts
    corr,  # (B, 2, H) float32, written: the largest real + imag and real - imag over T
    which,  # (B, 2, H) int32, written: its T
):
    """Best shift of every rotation and of the rotation turned by 180 degrees."""
    for b in range(real.shape[0]):
        corr[b] = -np.inf
        which[b] = 0
        for t in range(real.shape[1]):
            for turned in range(2):
                sign = np.float32(1 - 2 * turned)
                _raise(real[b, t], imag[b, t], sign, np.int32(t), corr[b, turned], which[b, turned])


@_part
def _gather(flat, start, n, nx, pad, xy, R, place, part, real, imag):
    """One slice of the padded half transform that begins at `start`, into real and imag (P,).

    Places and fractions first, in vector registers, into the scratch arrays place (P,) and part (4, P); then the sums
    over corners. Unsigned places spare a test for negative ones at every access. Points beyond the stored radius, NaN
    included, read zero.
    """
    P = xy.shape[1]
    zero, one, N, scale = np.float32(0), np.float32(1), np.float32(nx - 1), np.float32(pad)
    limit = np.float32((nx - 2 + 0.01) ** 2)
    ax, ay, az = R[0, 0] * scale, R[0, 1] * scale, R[0, 2] * scale
    bx, by, bz = R[1, 0] * scale, R[1, 1] * scale, R[1, 2] * scale
    step_y, step_z = np.int32(nx * 2), np.int32(n * nx * 2)
    for p in range(P):
        x = xy[0, p] * ax + xy[1, p] * bx
        y = xy[0, p] * ay + xy[1, p] * by
        z = xy[0, p] * az + xy[1, p] * bz
        sign = one if x >= zero else -one  # a point with x < 0 is the conjugate of its mate
        inside = x * x + y * y + z * z <= limit
        x = x * sign if inside else zero
        y = y * sign if inside else zero
        z = z * sign if inside else zero
        y, z = y + N, z + N
        ix, iy, iz = np.int32(x), np.int32(y), np.int32(z)
        part[0, p], part[1, p], part[2, p] = x - np.float32(ix), y - np.float32(iy), z - np.float32(iz)
        part[3, p] = sign if inside else zero
        place[p] = iz * step_z + iy * step_y + np.int32(2) * ix
    begin, up_y, up_z = np.uint64(start), np.uint64(step_y), np.uint64(step_z)
    i1, i2, i3 = np.uint64(1), np.uint64(2), np.uint64(3)
    for p in range(P):
        fx, fy, fz, sign = part[0, p], part[1, p], part[2, p], part[3, p]
        gx, gy, gz = one - fx, one - fy, one - fz
        o = np.uint64(np.uint32(place[p])) + begin
        side = gy * gz
        re = side * (gx * flat[o] + fx * flat[o + i2])
        im = side * (gx * flat[o + i1] + fx * flat[o + i3])
        o += up_y
        side = fy * gz
        re += side * (gx * flat[o] + fx * flat[o + i2])
        im += side * (gx * flat[o + i1] + fx * flat[o + i3])
        o += up_z
        side = fy * fz
        re += side * (gx * flat[o] + fx * flat[o + i2])
        im += side * (gx * flat[o + i1] + fx * flat[o + i3])
        o -= up_y
        side = gy * fz
        re += side * (gx * flat[o] + fx * flat[o + i2])
        im += side * (gx * flat[o + i1] + fx * flat[o + i3])
        real[p] = re * (sign * sign)
        imag[p] = im * sign


@_part
def _move(g, xy, reach, tx, ty, table, real, imag):
    """T_t g for t = (tx, ty) as a fraction of the box, by tables of the phases along x and y."""
    for i in range(reach + 1):
        for axis in range(2):
            angle = -2 * np.pi * i * (ty if axis else tx)
            table[axis, 0, i], table[axis, 1, i] = np.cos(angle), np.sin(angle)
    for p in range(xy.shape[1]):
        kx, ky = np.int32(xy[0, p]), np.int32(xy[1, p])
        size = ky if ky >= 0 else -ky
        cx, sx, cy = table[0, 0, kx], table[0, 1, kx], table[1, 0, size]
        sy = table[1, 1, size] if ky >= 0 else -table[1, 1, size]
        c, s = cx * cy - sx * sy, cx * sy + sx * cy
        real[p] = g[p, 0] * c - g[p, 1] * s
        imag[p] = g[p, 0] * s + g[p, 1] * c


@_part
def _dot(a, b):
    total = np.float32(0)
    for p in range(a.shape[0]):
        total += a[p] * b[p]
    return total


@_part
def _weigh(re, im, moved_re, moved_im, w, z_re, z_im):
    """z = conj(moved) S; returns sum Re z and sum w |S|^2."""
    total, size = np.float32(0), np.float32(0)
    for p in range(re.shape[0]):
        z_re[p] = moved_re[p] * re[p] + moved_im[p] * im[p]
        z_im[p] = moved_re[p] * im[p] - moved_im[p] * re[p]
        total += moved_re[p] * re[p] + moved_im[p] * im[p]
        size += w[p] * (re[p] * re[p] + im[p] * im[p])
    return total, size


@_loop
def score(
    flat,  # all transforms (k, 2N+1, 2N+1, N+1, 2), flattened
    n,
    nx,
    pad,
    volume,  # (b,) int64
    g,  # (b, P', 2) float32, P' >= P, CTF folded in
    w,  # (b, P')
    xy,  # (2, P) float32
    reach,  # largest |k|
    rotation,  # (b, q, 3, 3)
    shift,  # (b, k, 2) fraction of the box, q / k rotations for each
    cosine,  # (T, P) phases of small shifts +t; entry 0 is the shift zero, the others stand for +t and -t
    sine,  # (T, P)
    corr,  # (b, q) written: largest sum Re conj(T g) S over the small shifts
    power,  # (b, q) written: sum w |S|^2
    best,  # (b, q) written: 0 for shift zero, 2 i - 1 for +t_i, 2 i for -t_i
):
    """Scores of rotations at small shifts around those of their parents."""
    P, T = xy.shape[1], cosine.shape[0]
    B, q, k = rotation.shape[0], rotation.shape[1], shift.shape[1]
    each = q // k
    step_v = n * n * nx * 2
    place, part = np.empty(P, np.int32), np.empty((4, P), np.float32)
    moved = np.empty((2, P), np.float32)
    values = np.empty((2, P), np.float32)
    z = np.empty((2, P), np.float32)
    table = np.empty((2, 2, reach + 1), np.float32)
    for b in range(B):
        for j in range(k):
            _move(g[b], xy, reach, shift[b, j, 0], shift[b, j, 1], table, moved[0], moved[1])
            for i in range(j * each, (j + 1) * each):
                R = rotation[b, i]
                _gather(flat, volume[b] * step_v, n, nx, pad, xy, R, place, part, values[0], values[1])
                total, size = _weigh(values[0], values[1], moved[0], moved[1], w[b], z[0], z[1])
                power[b, i] = size
                corr[b, i] = total
                best[b, i] = 0
                for t in range(1, T):
                    even, odd = _dot(z[0], cosine[t]), _dot(z[1], sine[t])
                    if even - odd > corr[b, i]:
                        corr[b, i] = even - odd
                        best[b, i] = 2 * t - 1
                    if even + odd > corr[b, i]:
                        corr[b, i] = even + odd
                        best[b, i] = 2 * t


@_loop
def normal_equations(
    flat,
    n,
    nx,
    pad,
    volume,  # (b,) int64
    g,  # (b, P', 2)
    w,  # (b, P')
    xy,  # (2, P) float32
    reach,
    box_size,
    rotation,  # (b, k, 3, 3)
    shift,  # (b, k, 2) fraction of the box
    turns,  # (6, 3, 3): +- delta about x, y, z of the image
    delta,
    sums,  # (b, k, 2 + 5 + 5 + 15) written: see below
):
    """Sums of a Gauss-Newton step with a = (turns about x, y, z; moves along x, y in pixels).

    Per pose: sum Re conj(T g) S; sum w |S|^2; sum Re conj(T g) dS_a (5); sum w Re conj(S) dS_a (5); and the lower
    triangle, row by row, of sum w Re conj(dS_a) dS_b (15).
    """
    P = xy.shape[1]
    step_v = n * n * nx * 2
    place, part = np.empty(P, np.int32), np.empty((4, P), np.float32)
    moved = np.empty((2, P), np.float32)
    values = np.empty((2, P), np.float32)
    minus = np.empty((2, P), np.float32)
    J = np.empty((5, 2, P), np.float32)
    table = np.empty((2, 2, reach + 1), np.float32)
    scale, along = np.float32(1 / (2 * delta)), np.float32(2 * np.pi / box_size)
    turned = np.empty((3, 3), np.float32)
    for b in range(rotation.shape[0]):
        for j in range(rotation.shape[1]):
            start = volume[b] * step_v
            _move(g[b], xy, reach, shift[b, j, 0], shift[b, j, 1], table, moved[0], moved[1])
            _gather(flat, start, n, nx, pad, xy, rotation[b, j], place, part, values[0], values[1])
            for a in range(6):
                for r in range(2):
                    for c in range(3):
                        turned[r, c] = (
                            turns[a, r, 0] * rotation[b, j, 0, c]
                            + turns[a, r, 1] * rotation[b, j, 1, c]
                            + turns[a, r, 2] * rotation[b, j, 2, c]
                        )
                if a < 3:
                    _gather(flat, start, n, nx, pad, xy, turned, place, part, J[a, 0], J[a, 1])
                else:
                    _gather(flat, start, n, nx, pad, xy, turned, place, part, minus[0], minus[1])
                    for p in range(P):
                        J[a - 3, 0, p] = (J[a - 3, 0, p] - minus[0, p]) * scale
                        J[a - 3, 1, p] = (J[a - 3, 1, p] - minus[1, p]) * scale
            for p in range(P):
                x, y = xy[0, p] * along, xy[1, p] * along
                J[3, 0, p], J[3, 1, p] = -x * values[1, p], x * values[0, p]
                J[4, 0, p], J[4, 1, p] = -y * values[1, p], y * values[0, p]
            total, size = np.float32(0), np.float32(0)
            for p in range(P):
                total += moved[0, p] * values[0, p] + moved[1, p] * values[1, p]
                size += w[b, p] * (values[0, p] * values[0, p] + values[1, p] * values[1, p])
            sums[b, j, 0], sums[b, j, 1] = total, size
            entry = 12
            for a in range(5):
                total, size = np.float32(0), np.float32(0)
                for p in range(P):
                    total += moved[0, p] * J[a, 0, p] + moved[1, p] * J[a, 1, p]
                    size += w[b, p] * (values[0, p] * J[a, 0, p] + values[1, p] * J[a, 1, p])
                sums[b, j, 2 + a], sums[b, j, 7 + a] = total, size
                for c in range(a + 1):
                    total = np.float32(0)
                    for p in range(P):
                        total += w[b, p] * (J[a, 0, p] * J[c, 0, p] + J[a, 1, p] * J[c, 1, p])
                    sums[b, j, entry] = total
                    entry += 1
