"""The hand of maps found without poses: projections do not tell it, but classes of one molecule should agree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cryosuite.data.particles import ParticleSet
from cryosuite.errors import InputError, notice
from cryosuite.metrics.align import align_map
from cryosuite.reconstruct.backproject import reconstruct_classes

WORK_BOX = 32
FLIP = np.diag([1.0, 1.0, -1.0]).astype(np.float32)


def mirrored(rotation: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Poses (n, 3, 3), (n, 2) under which the mirrored volume (z reversed) gives the same images.

    The slice of F at (kx, ky, 0) R is that of the mirrored transform at (kx, ky, 0) R diag(1, 1, -1); the third row,
    which no slice sees, is turned round so that the result is a rotation again. Shifts stay.
    """
    out = rotation @ FLIP
    out[:, 2] *= -1
    return out, shift


def settle_hands(particles: ParticleSet, labels: np.ndarray, hand: str) -> ParticleSet:
    """The particles with poses whose hands agree: "auto" mirrors the classes that fit the largest one better as
    their mirror image, "flip" all the others (so that maps are of the other hand than with "auto"), "keep" none. Says
    that the hand of all together cannot be told.

    For unrelated molecules the choice means nothing, and harms nothing.
    """
    if hand == "keep":
        return particles
    chosen = np.isin(labels, _other_hand(particles, labels)) != (hand == "flip")
    if hand == "auto":
        notice(
            "the hand of the maps cannot be told from images alone: look for right-handed helices in a sharp map; "
            "--hand flip in a new run, or backproject --flip, turns it over"
        )
    if not chosen.any():
        return particles
    rotation, shift = particles.rotation.copy(), particles.shift.copy()
    rotation[chosen], shift[chosen] = mirrored(rotation[chosen], shift[chosen])
    return replace(particles, rotation=rotation, shift=shift)


def _other_hand(particles: ParticleSet, labels: np.ndarray) -> list[int]:
    """Classes whose map fits that of the largest class best after mirroring."""
    if labels.max() < 1:
        return []
    box = min(WORK_BOX, particles.box_size)
    maps = reconstruct_classes(particles, labels, halves=False, map_box=box)
    largest = int(np.bincount(labels).argmax())
    goal = maps[largest].map
    found = []
    for k in sorted(set(maps) - {largest}):
        try:
            if align_map(maps[k].map, goal).mirrored:
                found.append(k)
        except InputError:  # an empty map has no hand
            continue
    return found
