"""Errors of estimated poses against the truth, up to what no image can tell: frame, hand and origin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cryosuite.errors import InputError

CANDIDATES = 30  # random particles each of which proposes an alignment
MIRROR = np.diag([1.0, 1.0, -1.0])
TRIM = 0.2  # worst share of the particles that the fit of a frame leaves out, twice
SHUFFLES = 5  # of the predictions among the particles, for the level of chance
DECILES = 10


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
    degrees = angles(MIRROR @ found if mirrored else found, truth @ G)
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


@dataclass(frozen=True)
class PoseReport:
    """Errors as they are, errors up to frame, hand and origin, and both for predictions dealt out at random.

    Attributes:
        raw, aligned, chance_raw, chance_aligned: the numbers of `pose_numbers`.
        mirrored: whether the other hand fitted better. deciles: median error per tenth of the confidence, lowest first.
        degrees: (N,) errors after alignment.
    """

    raw: dict[str, float]
    aligned: dict[str, float]
    chance_raw: dict[str, float]
    chance_aligned: dict[str, float]
    mirrored: bool
    deciles: list[dict[str, float]]
    degrees: np.ndarray

    def plain(self) -> dict[str, Any]:
        """All numbers, as JSON takes them."""
        names = ("raw", "chance_raw", "aligned", "chance_aligned", "mirrored", "deciles")
        return {name: getattr(self, name) for name in names}


def pose_report(
    rotation: np.ndarray,  # (N, 3, 3)
    true_rotation: np.ndarray,  # (N, 3, 3)
    shift: np.ndarray,  # (N, 2) fraction of the box
    true_shift: np.ndarray,  # (N, 2)
    box_size: int,
    confidence: np.ndarray | None = None,  # (N,)
    mates: np.ndarray | None = None,  # (G, 3, 3)
    seed: int = 0,
) -> PoseReport:
    """Everything one wants to know of predicted poses whose truth is known, each number beside its level of chance.

    Aligned: one global rotation Q of the volume, the rotation nearest to sum R^T R_true, fitted three times, the last
    two without the worst fifth, or none; for both hands; the best median wins; the nearest of the symmetry mates
    (rotations S that leave the volume as it is); shifts up to one origin in the volume by least squares. Chance is the
    same protocol on predictions shuffled among the particles: it absorbs what fit, hand, symmetry and preferred views
    give away.

    Raises InputError for poses of another number.
    """
    found, truth = (np.asarray(value, np.float64) for value in (rotation, true_rotation))
    if found.shape != truth.shape or found.shape[1:] != (3, 3) or {len(shift), len(true_shift)} != {len(found)}:
        raise InputError(f"{len(found)} predicted and {len(truth)} true poses cannot be compared")
    moves = np.asarray(shift, np.float64), np.asarray(true_shift, np.float64)
    mates = np.eye(3)[None] if mates is None else np.asarray(mates, np.float64)

    def protocol(R: np.ndarray, t: np.ndarray) -> tuple[dict[str, float], dict[str, float], bool, np.ndarray]:
        best = None
        for hand in (False, True):
            own = MIRROR @ R @ MIRROR if hand else R
            for Q in (np.eye(3), fit_frame(own, truth)):  # where nearly all is wrong the fit is worth nothing
                aligned = nearest_mates(own @ Q, truth, mates)
                score = float(np.median(angles(aligned, truth)))
                if best is None or score < best[0]:
                    best = (score, aligned, hand)
        _, aligned, hand = best
        raw = pose_numbers(nearest_mates(R, truth, mates), truth, t - moves[1], box_size)
        fitted = pose_numbers(aligned, truth, _without_origin(t - moves[1], truth), box_size)
        return raw, fitted, hand, angles(aligned, truth)

    raw, aligned, mirrored, degrees = protocol(found, moves[0])
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(len(found)) for _ in range(SHUFFLES)]
    chance = [protocol(found[order], moves[0][order])[:2] for order in orders]
    means = [{key: float(np.mean([one[which][key] for one in chance])) for key in raw} for which in (0, 1)]
    deciles = [] if confidence is None else by_confidence(degrees, confidence)
    return PoseReport(raw, aligned, *means, mirrored, deciles, degrees)


def pose_numbers(found: np.ndarray, truth: np.ndarray, shift_error: np.ndarray, box_size: int) -> dict[str, float]:
    """Angles (degrees), direction and in-plane parts, mean Frobenius norm, shift errors in pixels."""
    degrees = angles(found, truth)
    direction = np.rad2deg(np.arccos(np.clip((found[:, 2] * truth[:, 2]).sum(1), -1, 1)))
    pixels = np.linalg.norm(shift_error, axis=1) * box_size
    return {
        "median_deg": float(np.median(degrees)),
        "mean_deg": float(degrees.mean()),
        "p90_deg": float(np.quantile(degrees, 0.9)),
        "under_10_deg": float((degrees < 10).mean()),
        "under_20_deg": float((degrees < 20).mean()),
        "direction_median_deg": float(np.median(direction)),
        "in_plane_median_deg": float(np.median(np.abs(in_plane(found, truth)))),
        "frobenius_mean": float(np.linalg.norm(found - truth, axis=(1, 2)).mean()),
        "shift_median_px": float(np.median(pixels)),
        "shift_mean_px": float(pixels.mean()),
    }


def angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Geodesic angle in degrees between rotations (N, 3, 3) of one hand: from |a - b|, exact for small ones."""
    chord = np.linalg.norm(a - b, axis=(-2, -1)) / np.sqrt(8)
    return np.rad2deg(2 * np.arcsin(np.clip(chord, 0, 1)))


def in_plane(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Degrees (N,) about the viewing axis by which images must be turned once their directions are brought together.

    Of a b^T the twist about z (swing-twist decomposition).
    """
    M = a @ np.swapaxes(b, 1, 2)
    return np.rad2deg(np.arctan2(M[:, 1, 0] - M[:, 0, 1], M[:, 0, 0] + M[:, 1, 1]))


def fit_frame(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The rotation Q of the volume with found @ Q nearest to the truth, by three fits, two of them trimmed."""
    kept = np.ones(len(found), bool)
    for _ in range(3):
        U, _, Vh = np.linalg.svd(np.einsum("nji,njk->ik", found[kept], truth[kept]))
        Q = U @ np.diag([1, 1, np.linalg.det(U @ Vh)]) @ Vh
        error = angles(found @ Q, truth)
        kept = error <= np.quantile(error, 1 - TRIM)
    return Q


def nearest_mates(found: np.ndarray, truth: np.ndarray, mates: np.ndarray) -> np.ndarray:
    """found @ S of the symmetry mate S nearest to the truth, (N, 3, 3)."""
    if len(mates) == 1:
        return found
    every = found[:, None] @ mates
    overlap = (every * truth[:, None]).sum((-1, -2))
    return every[np.arange(len(found)), overlap.argmax(1)]


def _without_origin(difference: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Shift errors (N, 2) less those of one displacement of the volume, (R s)_xy, by least squares."""
    origin, *_ = np.linalg.lstsq(truth[:, :2].reshape(-1, 3), difference.reshape(-1), rcond=None)
    return difference - truth[:, :2] @ origin


def by_confidence(degrees: np.ndarray, confidence: np.ndarray) -> list[dict[str, float]]:
    """Median error and share under 10 degrees per tenth of the particles, the least confident first."""
    order = np.argsort(confidence, kind="stable")
    return [
        {
            "confidence": float(np.mean(confidence[part])),
            "median_deg": float(np.median(degrees[part])),
            "under_10_deg": float((degrees[part] < 10).mean()),
        }
        for part in np.array_split(order, DECILES)
        if len(part)
    ]
