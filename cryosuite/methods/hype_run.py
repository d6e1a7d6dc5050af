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
    particles = open_for(particles_path(config, run), config)
    if config.get("poses_found"):
        particles = with_poses(particles, run, epoch)
    state = load_state(run.weights(epoch), "weights")["model_state_dict"]
    noise = state.get("noise_amplitude")
    if noise is None or noise.shape[1] != particles.box_size // 2 + 1:
        raise InputError(f"{run.weights(epoch)}: not made for particles of box {particles.box_size} ({particles.path})")
    nothing = Spectra(torch.ones_like(noise), torch.ones_like(noise[0]))
    model = HypeModel(particles.box_size, options, nothing, particles.ctf_premultiplied)
    load_into(model, state, run.weights(epoch))
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    z = read_latent(run.z(epoch), finite=False)[0]  # analyze names bad rows and leaves them out
    if len(z) != len(particles):
        raise InputError(f"{run.z(epoch)}: {len(z)} latents for {len(particles)} particles: did the set change?")
    method = Hype(options)
    if options.latent != "tokens":
        method.space = LatentSpace.load(run.latent_space(epoch))
        if volume_from != "bank":
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

    pixel_size = common_pixel_size(particles.pixel_size)
    return LoadedRun("hype", particles, z, epoch, pixel_size, particles.box_size, decode, config)
