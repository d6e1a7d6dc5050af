"""Poses that a run found itself: those of an epoch, and shifts refined before a training begins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.config import read_yaml, write_yaml
from cryosuite.formats.pickles import read_poses, write_pickle
from cryosuite.reconstruct.shifts import errors_of_shifts

BEGUN_WITH = 0  # the epoch whose poses.pkl holds what a training began with


def with_poses(particles: ParticleSet, run: RunDir, epoch: int) -> ParticleSet:
    """The particles with the poses of an epoch of a run."""
    rotation, shift = read_poses(run.poses(epoch), len(particles), checked=False)
    return replace(particles, rotation=rotation, shift=shift, poses_from=run.poses(epoch))


def begin_with_refined_shifts(
    particles: ParticleSet, run: RunDir, config: dict[str, Any], processes: Processes = ALONE
) -> ParticleSet:
    """The particles as a training begins with them: shifts refined where one map of all particles shows them wrong.

    They are kept in poses.0.pkl; a run that goes on takes them from there. Without ``refine_shifts`` in the config
    nothing happens. All processes call it; all get the same.
    """
    begun = run.poses(BEGUN_WITH)
    if run.checkpoint.exists():
        return with_poses(particles, run, BEGUN_WITH) if begun.exists() else particles
    try:
        found = errors_of_shifts(particles, processes) if config.get("refine_shifts") else None
    except InputError:  # images that say nothing of shifts: what is wrong with them the training tells
        found = None
    if found is None:
        return particles

    def write() -> None:
        write_pickle(begun, (particles.rotation, found.shift))
        write_yaml(run.config, read_yaml(run.config) | {"poses_found": True})

    processes.first_does(write)
    notice(found.said(float(np.mean(particles.pixel_size)), "the run's poses.pkl has them"))
    return replace(particles, shift=found.shift, poses_from=begun)
