"""Angles of the file formats <-> rotation matrices, in numpy: reading a table must not load torch (2 s, 600 MB).

Same conventions as ``kernels.rotations`` (CONVENTIONS: RELION's ZYZ matrix, cryoSPARC's transposed expmap); the tests
hold both against each other and against RELION's own numbers.
"""

from __future__ import annotations

import warnings

import numpy as np


def from_euler(euler_deg: np.ndarray) -> np.ndarray:
    """RELION's (rot, tilt, psi) in degrees, (N, 3) -> matrices (N, 3, 3) float64, volume frame -> image frame."""
    angles = np.deg2rad(np.asarray(euler_deg, np.float64).reshape(-1, 3))
    (ca, cb, cg), (sa, sb, sg) = np.cos(angles).T, np.sin(angles).T
    rows = [
        [cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb],
        [-sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb],
        [sb * ca, sb * sa, cb],
    ]  # written out: scipy's Rotation gives the same and takes 0.2 s to import
    return np.moveaxis(np.array(rows), -1, 0)


def to_euler(rotation: np.ndarray) -> np.ndarray:
    """Matrices (N, 3, 3) -> RELION's (rot, tilt, psi) in degrees, (N, 3) float64; at tilt 0 or 180, psi is 0."""
    from scipy.spatial.transform import Rotation

    if len(rotation) == 0:
        return np.zeros((0, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gimbal lock: any split of rot + psi gives the same matrix
        inverse = np.asarray(rotation, np.float64).transpose(0, 2, 1)
        return Rotation.from_matrix(inverse).as_euler("ZYZ", degrees=True)


def from_cryosparc(pose: np.ndarray) -> np.ndarray:
    """cryoSPARC's rotation vectors (N, 3) in radians -> matrices (N, 3, 3) float64; the zero vector is the identity."""
    from scipy.spatial.transform import Rotation

    pose = np.asarray(pose, np.float64)
    if len(pose) == 0:
        return np.zeros((0, 3, 3))
    return Rotation.from_rotvec(pose).inv().as_matrix()


def to_cryosparc(rotation: np.ndarray) -> np.ndarray:
    """Matrices (N, 3, 3) -> cryoSPARC's rotation vectors (N, 3) float32 in radians."""
    from scipy.spatial.transform import Rotation

    if len(rotation) == 0:
        return np.zeros((0, 3), np.float32)
    inverse = np.asarray(rotation, np.float64).transpose(0, 2, 1)
    return Rotation.from_matrix(inverse).as_rotvec().astype(np.float32)
