"""The files of a simulated set beside its images: star, pickles, noise spectrum, dataset.yaml."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from cryosuite.data.workdir import WorkDir
from cryosuite.formats.config import write_yaml
from cryosuite.formats.pickles import write_pickle
from cryosuite.formats.star import write_star
from cryosuite.kernels.rotations import matrix_to_euler
from cryosuite.simulate.extras import wrong_poses
from cryosuite.simulate.imaging import Particles, SimulateOptions, stage_rng


def star_tables(
    stack: str, rotation: np.ndarray, shift: np.ndarray, ctf: np.ndarray, options: SimulateOptions
) -> dict[str, pd.DataFrame]:
    """RELION 3.1 tables of a set: angles in degrees, origins in A (t x box), random half sets that alternate."""
    n = len(rotation)
    euler = matrix_to_euler(torch.from_numpy(rotation.astype(np.float64))).numpy()
    origin = shift.astype(np.float64) * options.box_size * options.pixel_size
    optics = pd.DataFrame(
        {
            "rlnOpticsGroup": [1],
            "rlnOpticsGroupName": ["opticsGroup1"],
            "rlnVoltage": [options.voltage_kv],
            "rlnSphericalAberration": [options.cs_mm],
            "rlnAmplitudeContrast": [options.amplitude_contrast],
            "rlnImagePixelSize": [options.pixel_size],
            "rlnImageSize": [options.box_size],
            "rlnImageDimensionality": [2],
        }
    )
    particles = pd.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@{stack}" for i in range(n)],
            "rlnMicrographName": [f"simulated_{i // 500:04d}.mrc" for i in range(n)],
            "rlnAngleRot": euler[:, 0],
            "rlnAngleTilt": euler[:, 1],
            "rlnAnglePsi": euler[:, 2],
            "rlnOriginXAngst": origin[:, 0],
            "rlnOriginYAngst": origin[:, 1],
            "rlnDefocusU": ctf[:, 2].astype(np.float64),
            "rlnDefocusV": ctf[:, 3].astype(np.float64),
            "rlnDefocusAngle": ctf[:, 4].astype(np.float64),
            "rlnPhaseShift": ctf[:, 8].astype(np.float64),
            "rlnOpticsGroup": np.ones(n, np.int64),
            "rlnRandomSubset": 1 + np.arange(n) % 2,
        }
    )
    return {"optics": optics, "particles": particles}


def write_metadata(
    work: WorkDir, particles: Particles, noise: np.ndarray, options: SimulateOptions, record: dict[str, Any]
) -> None:
    """Write poses, CTF, labels, noise spectrum, star and, last, dataset.yaml.

    With pose or defocus errors the true values go to ``truth_poses.pkl`` and ``truth_ctf.pkl``.

    Args:
        work: where.
        particles: the truth.
        noise: (D//2 + 1,) E|n|^2 of a coefficient per shell.
        options: how the set was imaged.
        record: the contents of dataset.yaml.
    """
    rotation, shift, ctf = wrong_poses(particles, options, stage_rng(options.seed, "errors"))
    if options.pose_error_deg or options.shift_error or options.defocus_error:
        write_pickle(work.path / "truth_poses.pkl", (particles.rotation, particles.shift))
        write_pickle(work.path / "truth_ctf.pkl", particles.ctf)
        record["truth"] |= {"poses": "truth_poses.pkl", "ctf": "truth_ctf.pkl"}
    write_pickle(work.poses, (rotation, shift))
    write_pickle(work.ctf, ctf)
    write_pickle(work.labels, particles.label)
    write_pickle(work.noise, noise[None])
    write_star(work.star, star_tables(work.particles.name, rotation, shift, ctf, options))
    n = len(rotation)
    # what the star says, for readers in a hurry
    rows = {"index": np.arange(n), "optics_group": np.zeros(n, np.int32), "half": (np.arange(n) % 2).astype(np.int8)}
    write_pickle(work.rows, rows)
    write_yaml(work.dataset, record)
