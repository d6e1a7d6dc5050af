"""A run of CryoHype on disk: what is written after an epoch, and how it is opened again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryosuite.data.open import open_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.data.spectra import Spectra
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.pickles import read_latent, write_pickle
from cryosuite.methods import LoadedRun
from cryosuite.methods.hype import Hype
from cryosuite.methods.hype_latent import LatentSpace
from cryosuite.methods.hype_model import HypeModel
from cryosuite.methods.hype_options import HypeOptions
from cryosuite.reconstruct.backproject import common_pixel_size
from cryosuite.training.checkpoint import load_into, load_state
from cryosuite.training.launch import process_rank
from cryosuite.training.poses import with_poses
from cryosuite.training.runs import particles_path

# how the particles were opened: keys of config.yaml that are arguments of open_particles
VOXEL = "volume_pixel_size"  # in config.yaml: A per voxel of the volumes, for when the particles are gone
OPENED_WITH = ("poses", "ctf", "ind", "datadir", "pixel_size", "sign")


def open_for(path: Path, how: dict[str, Any]) -> ParticleSet:
    """The particle set of a training, opened as its config says."""
    return open_particles(path, **{name: how.get(name) for name in OPENED_WITH})


def epoch_writer(method: Hype, particles: ParticleSet, run: RunDir) -> Callable[[int, HypeModel], None]:
    """What ``fit`` calls after an epoch: encode everything, write z.N.pkl, latent.N.pkl, poses.N.pkl and index.pkl."""

    def write(epoch: int, model: HypeModel) -> None:
        z = method.embed(model, particles)
        if process_rank() != 0:
            return
        if method.space is not None:
            method.space.save(run.latent_space(epoch))
        write_pickle(run.poses(epoch), (particles.rotation, _shift(particles)))
        write_pickle(run.index, np.asarray(particles.index, np.int64))
        write_pickle(run.z(epoch), z)  # last: its presence says that the epoch is complete

    return write


def _shift(particles: ParticleSet) -> np.ndarray:
    return np.zeros((len(particles), 2), np.float32) if particles.shift is None else particles.shift


def load(run: RunDir, config: dict[str, Any], epoch: int, volume_from: str | None = None) -> LoadedRun:
    """Open an epoch of a run.

    ``volume_from`` ("knn", "cluster", "image", "bank") overrides the run's option; volumes come from the token bank
    when the images cannot be read any more.
    """
    options = HypeOptions.from_dict(config["options"])
    if volume_from not in (None, "bank"):
        options = replace(options, volume_from=volume_from)
    particles = _particles_of(run, config, epoch, volume_from)
    state = load_state(run.weights(epoch), "weights")["model_state_dict"]
    noise = state.get("noise_amplitude")
    box = particles.box_size if particles is not None else 0 if noise is None else 2 * (noise.shape[1] - 1)
    if noise is None or noise.shape[1] != box // 2 + 1:
        where = "" if particles is None else f" ({particles.path})"
        raise InputError(f"{run.weights(epoch)}: not made for particles of box {box}{where}")
    nothing = Spectra(torch.ones_like(noise), torch.ones_like(noise[0]))
    model = HypeModel(box, options, nothing, particles is not None and particles.ctf_premultiplied)
    load_into(model, state, run.weights(epoch))
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    z = read_latent(run.z(epoch), finite=False)[0]  # analyze names bad rows and leaves them out
    if particles is not None and len(z) != len(particles):
        raise InputError(f"{run.z(epoch)}: {len(z)} latents for {len(particles)} particles: did the set change?")
    method = Hype(options)
    if options.latent != "tokens":
        method.space = LatentSpace.load(run.latent_space(epoch))
        if volume_from != "bank" and particles is not None:
            try:
                particles.read(np.arange(1))
                method.use_images(model, particles, z)
            except (OSError, InputError) as error:
                notice(f"the images cannot be read ({error}): volumes come from the token bank")

    def decode(points: np.ndarray) -> np.ndarray:
        device = next(model.parameters()).device
        latents = torch.from_numpy(np.atleast_2d(np.asarray(points, np.float32))).to(device)
        with torch.no_grad():
            return method.decode(model, latents).cpu().numpy()

    pixel_size = config[VOXEL] if particles is None else common_pixel_size(particles.pixel_size)
    return LoadedRun("hype", particles, z, epoch, pixel_size, box, decode, config)


def _particles_of(run: RunDir, config: dict[str, Any], epoch: int, volume_from: str | None) -> ParticleSet | None:
    """The particles of a run; None, and a notice, where they are gone but volumes can come from the token bank."""
    try:
        particles = open_for(particles_path(config, run), config)
    except InputError as error:
        if volume_from not in (None, "bank") or not config.get(VOXEL) or config["options"].get("latent") == "tokens":
            raise
        notice(
            f"the particles cannot be opened ({error}): volumes come from the token bank, the rest goes without them"
        )
        return None
    return with_poses(particles, run, epoch) if config.get("poses_found") else particles
