"""Images with pixels that are not numbers: met while reading, named, and kept out of everything that is summed up."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from cryosuite.errors import notice

if TYPE_CHECKING:
    from cryosuite.data.particles import ParticleSet
    from cryosuite.data.processes import Processes

NAMED = 20  # images named in notices; what comes after is counted


def not_finite(images: np.ndarray) -> np.ndarray:
    """(b,) bool: which of the images (b, D, D) hold NaN or infinity."""
    with np.errstate(over="ignore", invalid="ignore"):
        bad = ~np.isfinite(images.sum(axis=(1, 2)))  # one pass, no copy; values near the largest number overflow
    if bad.any():
        bad[bad] = ~np.isfinite(images[bad]).all(axis=(1, 2))
    return bad


class Broken:
    """The broken images of a set that one reader has met: each is told once, however often it is read.

    The first ``NAMED`` are named as they are met; of more, ``finish`` or ``share`` say at the end how many there are.

    Attributes:
        rows: (N,) bool of the set. ``len`` is how many there are.
    """

    def __init__(self, particles: ParticleSet) -> None:
        self.particles = particles
        self.rows = np.zeros(len(particles), bool)
        self._counted = NAMED  # as many have been told
        self._lock = Lock()

    def __len__(self) -> int:
        return int(self.rows.sum())

    def find(self, rows: np.ndarray, images: np.ndarray) -> np.ndarray:
        """(b,) bool: which of the images (b, D, D) of some rows are broken; new ones are told by their place in the
        original stack, with how many there are by now."""
        bad = not_finite(images)
        if bad.any():
            self.add(np.asarray(rows)[bad])
        return bad

    def share(self, processes: Processes) -> None:
        """Take in what the other processes have met, so that the first, which alone speaks, tells all; all call it."""
        self.add(np.concatenate(processes.everyone(lambda: np.flatnonzero(self.rows))))
        self.finish()

    def share_part(self, whole: ParticleSet, rows: np.ndarray, processes: Processes) -> None:
        """``share``, for a reader of nothing but this process's ``rows`` of the ``whole`` set; all call it."""
        if processes.count == 1:
            return self.finish()
        told = Broken(whole)
        told.rows[rows[self.rows] if len(rows) else rows] = True
        told.share(processes)

    def finish(self) -> None:
        """Tell how many there are in all, where they were too many to be named."""
        count = len(self)
        if count > self._counted:
            self._counted = count
            of = self.particles.path or "the particles"
            notice(f"{of}: {count:,} images in all have NaN or infinite pixels; left out")

    def add(self, rows: np.ndarray) -> None:
        """Rows of broken images that the reader has found itself; those that are new are told."""
        with self._lock:
            met = np.unique(rows)
            new = met[~self.rows[met]]
            before = len(self)
            self.rows[new] = True
        if len(new) and before < NAMED:
            names = self.particles.index[new[: NAMED - before]]
            more = " and more" if before + len(new) > NAMED else ""
            many = "s" if len(new) > 1 else ""
            notice(
                f"{self.particles.path or 'the particles'}: image{many} {', '.join(map(str, names))}{more} (0-based): "
                f"NaN or infinite pixels; left out ({before + len(new)} so far)"
            )
