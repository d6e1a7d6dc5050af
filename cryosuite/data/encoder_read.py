"""Rows of a particle set as images for an encoder: read, contrast of the encoder's liking, eight bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cryosuite.data.contrast import box_of
from cryosuite.data.encoder_pixels import encoder_images, finite_images

if TYPE_CHECKING:
    from cryosuite.data.particles import ParticleSet


def stored_sign(particles: ParticleSet, rows: np.ndarray | None = None) -> np.ndarray:
    """(b,) int8 of the rows (all when None): +1 where the SOURCE file shows the particle white, -1 where dark.

    It is what the set was told or found, not a look at the images. ``particles.read`` gives white particles; times this
    they have the contrast of the file they come from. For a work directory that is the file it was made of, as
    dataset.yaml says.
    """
    signs = getattr(particles.images, "signs", None)
    if signs is not None:
        return np.asarray(signs if rows is None else signs[rows], np.int8)
    sign = particles.sign * (-1 if particles.dataset.get("sign") == -1 else 1)
    return np.full(len(particles if rows is None else rows), sign, np.int8)


def read_encoder_images(
    particles: ParticleSet, rows: np.ndarray, size: int, prep: str = "ief", circle: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Images of the rows (b, size, size) uint8, and (b,) bool whether their pixels are finite (if not the image is 0).

    Prep "ief" sees them as stored in their source file, "robust" white. Stacks of several boxes are each resized from
    their own.
    """
    rows = np.asarray(rows)
    factor = stored_sign(particles, rows) if prep == "ief" else np.ones(len(rows), np.int8)
    eight = np.empty((len(rows), size, size), np.uint8)
    finite = np.empty(len(rows), bool)
    boxes = box_of(particles, rows)
    for box in np.unique(boxes):
        chosen = np.flatnonzero(boxes == box)
        images = particles.read(rows[chosen])
        dark = factor[chosen] < 0
        if dark.any():
            images[dark] *= -1
        eight[chosen] = encoder_images(images, size, prep, circle)
        finite[chosen] = finite_images(images)
    return eight, finite
