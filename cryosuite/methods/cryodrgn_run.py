"""A run of cryoDRGN (train_vae, train_dec, abinit), opened like one of ours: latents, particles, volumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cryosuite.data.cryodrgn_run import open_cryodrgn_run, read_cryodrgn_config
from cryosuite.data.latents import last_latents
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.pickles import read_torch
from cryosuite.methods import LoadedRun


def load(run: RunDir, epoch: int | None, datadir: Path | None = None) -> LoadedRun:
    """Open an epoch of a run (None: the last one whose files are whole).

    Without its images (they are often on another machine) there are latents and volumes, but no lists of particles;
    without weights, or with a network that is not known here, latents alone. Each lack is said.
    """
    config = read_cryodrgn_config(run.path)
    particles, pixel_size = None, None
    try:
        opened = open_cryodrgn_run(run.path, epoch, datadir=datadir, need_poses=False)
        particles, z, number = opened.particles, opened.z, opened.epoch
        pixel_size = float(np.median(particles.pixel_size))
    except InputError as error:
        number, z = last_latents(run, epoch)
        notice(f"{error} Without them: latents and volumes, but no lists of particles and no polishing.")
    decode, box = _decoder(run, number, config)
    if box is None:
        box = particles.box_size if particles is not None else 0
    elif particles is not None and box != particles.box_size:
        raise InputError(f"{run.path}: a network for box {box}, but {particles.path} has box {particles.box_size}")
    if pixel_size is None:
        pixel_size = 1.0
        notice("the pixel size is not known without the particles: 1 A is taken, give --Apix")
    return LoadedRun("cryodrgn", particles, z, number, pixel_size, box, decode, config)


def _decoder(
    run: RunDir, epoch: int, config: dict[str, Any]
) -> tuple[Callable[[np.ndarray], np.ndarray] | None, int | None]:
    """The function latents -> volumes and its box; None, with a notice, where there is none."""
    from cryosuite.methods.cryodrgn_decoder import CryodrgnDecoder

    path = run.weights(epoch)
    if not path.is_file() and (run.path / "weights.pkl").is_file() and epoch == run.last_epoch():
        path = run.path / "weights.pkl"  # the copy of the last epoch that is left at the end
    try:
        state = read_torch(path)
        if not isinstance(state, dict) or "model_state_dict" not in state:
            raise InputError(f"{path}: not the weights of a cryoDRGN run (no model_state_dict)")
        decoder = CryodrgnDecoder(state["model_state_dict"], config, path)
    except InputError as error:
        notice(f"no volumes: {error}")
        return None, None
    return decoder.volumes, decoder.box
