"""Rotations: Euler angles, rotation vectors, quaternions, the 6-D form, sampling of SO(3), alignment.

A rotation matrix R maps the volume frame to the image frame and acts on column vectors, `(R @ p)[:2]` is where a point
projects to; a slice samples the volume's transform at `(kx, ky, 0) @ R`. Euler angles are RELION's (rot, tilt, psi),
ZYZ, degrees. Everything is batched over leading dimensions, works in float32 and float64, and is differentiable.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

__all__ = [
    "euler_to_matrix",
    "matrix_to_euler",
    "expmap",
    "logmap",
    "quaternion_to_matrix",
    "matrix_to_quaternion",
    "matrix_to_six_d",
    "six_d_to_matrix",
    "random_rotations",
    "healpix_rotations",
    "kabsch",
    "geodesic_deg",
]


def euler_to_matrix(euler_deg: Tensor) -> Tensor:
    """(..., 3) rot, tilt, psi in degrees -> (..., 3, 3), equal to RELION's `Euler_angles2matrix`."""
    rot, tilt, psi = torch.deg2rad(euler_deg).unbind(-1)
    ca, cb, cg = torch.cos(rot), torch.cos(tilt), torch.cos(psi)
    sa, sb, sg = torch.sin(rot), torch.sin(tilt), torch.sin(psi)
    rows = [
        torch.stack([cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb], -1),
        torch.stack([-sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb], -1),
        torch.stack([sb * ca, sb * sa, cb], -1),
    ]
    return torch.stack(rows, -2)


def matrix_to_euler(matrix: Tensor) -> Tensor:
    """(..., 3, 3) -> (..., 3) rot, tilt, psi in degrees with tilt in [0, 180]; rot = 0 at gimbal lock.

    psi is taken relative to the rot already found, so that the matrix is reproduced even next to gimbal lock.
    """
    sine2 = matrix[..., 2, 0] ** 2 + matrix[..., 2, 1] ** 2
    free = sine2 > torch.finfo(matrix.dtype).tiny  # rot is defined
    one = torch.ones_like(sine2)
    sine = torch.where(free, torch.where(free, sine2, one).sqrt(), torch.zeros_like(one))
    rot = torch.atan2(torch.where(free, matrix[..., 2, 1], 0 * one), torch.where(free, matrix[..., 2, 0], one))
    tilt = torch.atan2(sine, matrix[..., 2, 2])
    ca, sa = torch.cos(rot), torch.sin(rot)
    sin_psi = matrix[..., 0, 1] * ca - matrix[..., 0, 0] * sa
    cos_psi = matrix[..., 1, 1] * ca - matrix[..., 1, 0] * sa
    return torch.rad2deg(torch.stack([rot, tilt, torch.atan2(sin_psi, cos_psi)], -1))


def expmap(rotvec: Tensor) -> Tensor:
    """Rotation vectors (..., 3), radians -> (..., 3, 3) by Rodrigues' formula; zero gives the identity.

    cryoSPARC's pose is the transpose: `R = expmap(alignments3D/pose).T`.
    """
    theta2 = (rotvec * rotvec).sum(-1)
    small = theta2 < (1e-4 if rotvec.dtype == torch.float64 else 1e-2)
    safe = torch.where(small, torch.ones_like(theta2), theta2)
    theta = safe.sqrt()
    # sin(t)/t and (1 - cos t)/t^2, by their series near zero where the quotients lose digits
    a_series = 1 - theta2 / 6 * (1 - theta2 / 20 * (1 - theta2 / 42))
    b_series = 0.5 * (1 - theta2 / 12 * (1 - theta2 / 30 * (1 - theta2 / 56)))
    a = torch.where(small, a_series, torch.sin(theta) / theta)
    b = torch.where(small, b_series, 2 * torch.sin(theta / 2) ** 2 / safe)
    K = _cross_matrix(rotvec)
    eye = torch.eye(3, dtype=rotvec.dtype, device=rotvec.device)
    return eye + a[..., None, None] * K + b[..., None, None] * (K @ K)


def _cross_matrix(v: Tensor) -> Tensor:
    """(..., 3) -> (..., 3, 3) with M @ p = v x p."""
    x, y, z = v.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))


def logmap(matrix: Tensor) -> Tensor:
    """(..., 3, 3) -> rotation vectors (..., 3), radians, of length at most pi. Inverse of `expmap`."""
    quaternion = matrix_to_quaternion(matrix)
    w, v = quaternion[..., 0], quaternion[..., 1:]
    norm2 = (v * v).sum(-1)
    small = norm2 < (1e-8 if matrix.dtype == torch.float64 else 1e-5)
    safe = torch.where(small, torch.ones_like(norm2), norm2).sqrt()
    # angle / |v| with angle = 2 atan2(|v|, w); near zero 2 (1 + |v|^2/6) since w = sqrt(1 - |v|^2)
    factor = torch.where(small, 2 + norm2 / 3, 2 * torch.atan2(safe, w) / safe)
    return factor[..., None] * v


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Quaternions (..., 4) as (w, x, y, z), of any non-zero length -> (..., 3, 3)."""
    w, x, y, z = (quaternion / quaternion.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z),
        2 * (x * y - w * z),
        2 * (x * z + w * y),
        2 * (x * y + w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z - w * x),
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        1 - 2 * (x * x + y * y),
    ]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def matrix_to_quaternion(matrix: Tensor) -> Tensor:
    """(..., 3, 3) -> unit quaternions (..., 4) as (w, x, y, z) with w >= 0 (Shepperd: the largest component leads)."""
    m00, m01, m02, m10, m11, m12, m20, m21, m22 = matrix.flatten(-2).unbind(-1)
    # row i of the table is 4 q_i times q; the row with the largest diagonal is the well-conditioned one
    table = torch.stack(
        [
            torch.stack([1 + m00 + m11 + m22, m21 - m12, m02 - m20, m10 - m01], -1),
            torch.stack([m21 - m12, 1 + m00 - m11 - m22, m01 + m10, m02 + m20], -1),
            torch.stack([m02 - m20, m01 + m10, 1 - m00 + m11 - m22, m12 + m21], -1),
            torch.stack([m10 - m01, m02 + m20, m12 + m21, 1 - m00 - m11 + m22], -1),
        ],
        -2,
    )
    best = torch.diagonal(table, dim1=-2, dim2=-1).argmax(-1)
    row = torch.gather(table, -2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2)
    quaternion = row / row.norm(dim=-1, keepdim=True)
    return torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def matrix_to_six_d(matrix: Tensor) -> Tensor:
    """The first two rows of R, (..., 6): the image's x and y axes in the volume frame."""
    return matrix[..., :2, :].flatten(-2)


def six_d_to_matrix(six_d: Tensor) -> Tensor:
    """(..., 6) -> (..., 3, 3): Gram-Schmidt of the first two rows (Zhou et al. 2019), continuous and differentiable."""
    a, b = six_d[..., :3], six_d[..., 3:]
    x = torch.nn.functional.normalize(a, dim=-1)
    y = torch.nn.functional.normalize(b - (x * b).sum(-1, keepdim=True) * x, dim=-1)
    return torch.stack([x, y, torch.linalg.cross(x, y)], -2)


def random_rotations(
    n: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:  # (n, 3, 3)
    """Uniform on SO(3): normalised Gaussian quaternions, drawn in float64 so that both precisions agree."""
    source = generator.device if generator is not None else "cpu"
    quaternion = torch.randn(n, 4, generator=generator, dtype=torch.float64, device=source)
    return quaternion_to_matrix(quaternion).to(device=device, dtype=dtype)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def healpix_rotations(order: int) -> Tensor:
    """Equal-area grid of SO(3), (12 * 4^order * 6 * 2^order, 3, 3) float32: HEALPix directions times in-plane angles.

    72, 576, 4608, 36864 rotations at order 0..3, about 60, 30, 15, 7.5 degrees apart. Directions vary slowest.
    The tensor is cached and shared: do not write to it.
    """
    import healpy
    import numpy as np

    if not 0 <= order <= 5:
        raise ValueError(f"the HEALPix order must lie between 0 and 5, not {order}")
    side = 2**order
    tilt, rot = healpy.pix2ang(side, np.arange(12 * side * side), nest=True)
    n_psi = 6 * side
    psi = (torch.arange(n_psi, dtype=torch.float64) + 0.5) * (360 / n_psi)
    n = len(tilt)
    euler = torch.empty(n, n_psi, 3, dtype=torch.float64)
    euler[..., 0] = torch.from_numpy(np.rad2deg(rot))[:, None]
    euler[..., 1] = torch.from_numpy(np.rad2deg(tilt))[:, None]
    euler[..., 2] = psi
    return euler_to_matrix(euler.reshape(-1, 3)).float()


def kabsch(
    a: Tensor,  # (..., n, 3)
    b: Tensor,  # (..., n, 3)
) -> Tensor:  # (..., 3, 3)
    """Rotation R (determinant +1) that minimises sum |R a_i - b_i|^2 (Kabsch 1976); the origin stays fixed."""
    U, _, Vh = torch.linalg.svd(b.transpose(-1, -2) @ a)
    sign = torch.linalg.det(U @ Vh)
    fix = torch.stack([torch.ones_like(sign), torch.ones_like(sign), sign], -1)
    return (U * fix[..., None, :]) @ Vh


def geodesic_deg(a: Tensor, b: Tensor) -> Tensor:
    """Angle in degrees (0..180) between rotations (..., 3, 3), accurate for tiny angles and near 180."""
    chord = torch.linalg.matrix_norm(a - b) / math.sqrt(8)  # sin(angle / 2)
    cosine = ((1 + (a * b).sum((-1, -2))).clamp(min=0)).sqrt() / 2  # cos(angle / 2)
    return torch.rad2deg(2 * torch.atan2(chord, cosine))
