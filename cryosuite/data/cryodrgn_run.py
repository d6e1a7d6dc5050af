"""A training folder of cryoDRGN (train_vae, train_nn): its particles and latents, so that they can be polished."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cryosuite.data.open import open_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.data.workdir import RunDir, resolve_link
from cryosuite.errors import InputError
from cryosuite.formats.config import read_yaml
from cryosuite.formats.pickles import read_latent


@dataclass
class CryodrgnRun:
    """Particles, latent means (N, zdim) and the epoch they were read from."""

    particles: ParticleSet
    z: np.ndarray
    epoch: int


def is_cryodrgn_run(folder: Path) -> bool:
    """True when a folder's config.yaml is one of cryoDRGN's."""
    config = RunDir(folder).config
    if not config.is_file():
        return False
    found = read_yaml(config)
    return isinstance(found.get("dataset_args"), dict) and "method" not in found


def open_cryodrgn_run(folder: Path, epoch: int | None = None, pixel_size: float | None = None) -> CryodrgnRun:
    """Open the particles a cryoDRGN run was trained on, with their latents.

    Paths in its config.yaml are taken as written, or relative to the folder. cryoDRGN counts saved epochs from 1 in
    recent versions and from 0 in old ones: the number is that of the file z.N.pkl.

    Raises:
        InputError: files that are missing, or latents of another number of particles.
    """
    run = RunDir(folder)
    given: dict[str, Any] = read_yaml(run.config)["dataset_args"]
    wanted = run.epoch(epoch)

    def path(name: str) -> Path | None:
        value = given.get(name)
        return None if value is None else resolve_link(str(value), Path(folder))

    stack = path("particles")
    if stack is None or path("poses") is None:
        raise InputError(f"{run.config}: names no particles or no poses. Use: cryosuite polish PARTICLES --z Z.pkl")
    # its CTF is minus ours, so inverted data with its CTF are data as they are with ours
    sign = 1 if given.get("invert_data", True) else -1
    particles = open_particles(
        stack, poses=path("poses"), ctf=path("ctf"), ind=path("ind"), datadir=path("datadir"), pixel_size=pixel_size,
        need_ctf=path("ctf") is not None, sign=sign,
    )  # fmt: skip
    z = read_latent(run.z(wanted), finite=False)[0]
    if len(z) != len(particles):
        raise InputError(f"{run.z(wanted)}: {len(z)} latents for {len(particles)} particles of {stack}")
    return CryodrgnRun(particles, z, wanted)
