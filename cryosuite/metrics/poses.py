"""Errors of estimated poses against the truth, up to what no image can tell: frame, hand and origin."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cryosuite.errors import InputError

CANDIDATES = 30  # random particles each of which proposes an alignment
MIRROR = np.diag([1.0, 1.0, -1.0])


@dataclass(frozen=True)
class PoseErrors:
    """Errors after the best alignment.

    Attributes:
        degrees: (N,) geodesic angle between estimated and true orientation.
        mirrored: True when the estimate has the other hand.
        alignment: (3, 3) G with estimate = truth @ G (determinant -1 when mirrored).
        shift: (N,) length of the remaining shift error, in the unit of the shifts, or None.
        origin: (3,) common displacement of the estimated volumes that was taken out, or None.
    """

    degrees: np.ndarray
    mirrored: bool
    alignment: np.ndarray
    shift: np.ndarray | None = None
    origin: np.ndarray | None = None

    def summary(self) -> dict[str, float]:
        """Mean and median angle (degrees), share under 5 degrees, median shift error."""
        out = {
            "rotation_mean_deg": float(self.degrees.mean()),
            "rotation_median_deg": float(np.median(self.degrees)),
            "rotation_under_5_deg": float((self.degrees < 5).mean()),
            "mirrored": float(self.mirrored),
        }
        if self.shift is not None:
            out["shift_median"] = float(np.median(self.shift))
        return out


def pose_errors(
    rotation: np.ndarray,
    true_rotation: np.ndarray,
    shift: np.ndarray | None = None,
    true_shift: np.ndarray | None = None,
    align: bool = True,
    seed: int = 0,
) -> PoseErrors:
    """Errors of estimated rotations (N, 3, 3) and shifts (N, 2), volume frame -> image frame (CONVENTIONS).

    With ``align`` the frame (one global rotation) and the hand are free: of the alignments proposed by 30 random
    particles, for both hands, the one with the smallest median squared Frobenius distance wins (BENCHMARKS section 3).
    Shifts are compared up to one origin o in the volume, t' - t = (R o)_xy, by least squares.
    """
    found, truth = (np.asarray(value, np.float64) for value in (rotation, true_rotation))
    if found.shape != truth.shape or found.shape[1:] != (3, 3):
        raise InputError(f"rotations of shapes {found.shape} and {truth.shape} cannot be compared")
    best = (np.inf, np.eye(3), False)
    if align:
        chosen = np.random.default_rng(seed).permutation(len(found))[:CANDIDATES]
        for mirrored in (False, True):
            estimate = MIRROR @ found if mirrored else found
            for i in chosen:
                G = truth[i].T @ estimate[i]
                score = float(np.median(((truth @ G - estimate) ** 2).sum((1, 2))))
                best = min(best, (score, G, mirrored), key=lambda one: one[0])
    _, G, mirrored = best
    relative = np.einsum("nij,nkj->nik", MIRROR @ found if mirrored else found, truth @ G)
    cosine = (np.trace(relative, axis1=1, axis2=2) - 1) / 2
    degrees = np.rad2deg(np.arccos(np.clip(cosine, -1, 1)))
    if shift is None or true_shift is None:
        return PoseErrors(degrees, mirrored, G)
    difference = np.asarray(shift, np.float64) - np.asarray(true_shift, np.float64)
    origin, *_ = np.linalg.lstsq(truth[:, :2].reshape(-1, 3), difference.reshape(-1), rcond=None)
    left = difference - truth[:, :2] @ origin
    return PoseErrors(degrees, mirrored, G, np.linalg.norm(left, axis=1), origin)


def class_rows(errors: PoseErrors, labels: np.ndarray) -> list[dict[str, float]]:
    """One row per state: its particles and the summary of their errors, all in the one frame found for the whole set.

    Args:
        labels: (N,) state of each particle.
    """
    labels = np.asarray(labels)
    if len(labels) != len(errors.degrees):
        raise InputError(f"{len(labels)} states for {len(errors.degrees)} pose errors: one per particle is needed")
    rows = []
    for state in np.unique(labels):
        own = labels == state
        part = replace(errors, degrees=errors.degrees[own], shift=None if errors.shift is None else errors.shift[own])
        rows.append({"state": int(state), "particles": int(own.sum()), **part.summary()})
    return rows
