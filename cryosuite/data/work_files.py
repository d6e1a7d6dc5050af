"""The files of a work directory beside its stack: star, poses, CTF, rows, noise and, last, dataset.yaml."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pandas as pd

from cryosuite import __version__
from cryosuite.data.export import load_metadata
from cryosuite.data.particles import ParticleSet
from cryosuite.data.row_keys import row_keys
from cryosuite.data.star_tables import star_tables
from cryosuite.data.workdir import WorkDir
from cryosuite.formats.config import write_yaml
from cryosuite.formats.pickles import write_pickle
from cryosuite.formats.star import ParticleTables, write_star


def write_work_files(
    work: WorkDir,
    particles: ParticleSet,
    box_size: int,
    pixel_size: np.ndarray,
    noise: np.ndarray | None,
    record: dict[str, Any],
) -> None:
    """Write what belongs to the stack that was just written.

    Args:
        particles: the SOURCE rows of the images written, in their order.
        box_size, pixel_size: of the images written, pixels and Angstrom (N,).
        noise: (G, D//2 + 1) E|n|^2 per optics group, or None.
        record: what dataset.yaml says beside the usual.
    """
    n = len(particles)
    carried = load_metadata(particles)
    keys = row_keys(carried) if particles.row_key is None else particles.row_key
    carried = carried if isinstance(carried, ParticleTables) else None
    names = pd.array([f"{number + 1:06d}@{work.particles.name}" for number in range(n)], dtype="str")
    write_star(work.star, star_tables(particles, names, box_size, pixel_size, carried))
    del carried, names
    for path in (work.poses, work.ctf, work.noise):
        path.unlink(missing_ok=True)  # of a set that was here before
    if particles.rotation is not None:
        shift = np.zeros((n, 2), np.float32) if particles.shift is None else particles.shift
        write_pickle(work.poses, (particles.rotation, shift))
    if particles.ctf is not None:
        ctf = particles.ctf.copy()
        ctf[:, 0], ctf[:, 1] = box_size, pixel_size
        write_pickle(work.ctf, ctf)
    rows = {"index": particles.index, "optics_group": particles.optics_group, **particles.extras}
    if particles.half is not None:
        rows["half"] = particles.half
    if keys is not None:
        rows["row_key"] = keys
    distinct, image = np.unique(particles.images.identity(), return_inverse=True)
    if len(distinct) < n:  # each copy has a slice of its own here, but the half sets must know that they are one image
        rows["image"] = image.reshape(-1).astype(np.int32)
    if n and (pixel_size != pixel_size[0]).any():  # dataset.yaml has but one
        rows["pixel_size"] = np.asarray(pixel_size, np.float32)
    if particles.file_pixel_size is not None:
        rows["file_pixel_size"] = particles.file_pixel_size * (pixel_size / particles.pixel_size).astype(np.float32)
    write_pickle(work.rows, rows)
    if noise is not None:
        write_pickle(work.noise, noise.astype(np.float32))
    write_yaml(work.dataset, _dataset(work, particles, box_size, pixel_size, record))


def _dataset(
    work: WorkDir, particles: ParticleSet, box_size: int, pixel_size: np.ndarray, record: dict[str, Any]
) -> dict[str, Any]:
    """What the folder is and where it came from."""
    origin = {
        "source": str(particles.path.resolve()) if particles.path else None,
        "source_relative": os.path.relpath(particles.path.resolve(), work.path.resolve()) if particles.path else None,
        "datadir": str(particles.datadir.resolve()) if particles.datadir else None,
        "passthrough": [str(path.resolve()) for path in particles.passthrough] or None,
        "poses": str(particles.poses_from.resolve()) if particles.poses_from else None,
        "ctf": str(particles.ctf_from.resolve()) if particles.ctf_from else None,
        "given": particles.given or None,
    }
    return {
        "kind": "preprocessed",
        "version": __version__,
        **{name: value for name, value in origin.items() if value is not None},
        "source_particles": particles.dataset.get("source_particles") or particles.n_source,
        "n_particles": len(particles),
        "box_size": box_size,
        "pixel_size": float(np.median(pixel_size)),
        "original_box_size": particles.box_size,
        "original_pixel_size": float(np.median(particles.pixel_size)),
        "optics_groups": particles.n_groups,
        "ctf_premultiplied": particles.ctf_premultiplied,
        **{name: value for name, value in record.items() if value is not None},
    }
