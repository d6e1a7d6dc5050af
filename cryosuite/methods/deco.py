"""CryoDECO: a pre-trained encoder gives every particle a latent, one network turns latents into volumes.

Poses are known, or they are found: by a voxel start or by hierarchical search with the network itself
(`deco_search`), and then refined in a table together with the networks. What differs from the paper by default:
complex field on the half disc, whitened loss, frequency marching; ``--preset paper`` goes back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cryosuite.console import Progress
from cryosuite.data.encoder_images import EncoderCache
from cryosuite.data.loader import Batch
from cryosuite.data.particles import ParticleSet
from cryosuite.data.spectra import measure_spectra, slice_matrices
from cryosuite.errors import InputError
from cryosuite.kernels import chance, fourier
from cryosuite.kernels.memory import Portions
from cryosuite.kernels.rotations import random_rotations
from cryosuite.methods.deco_encoder import open_encoder
from cryosuite.methods.deco_images import encoder_cache
from cryosuite.methods.deco_model import DecoModel, PoseTable
from cryosuite.methods.deco_options import RANDOM, DecoOptions
from cryosuite.methods.deco_search import (
    Searcher,
    Stage,
    everywhere,
    held,
    rows_of,
    searched_again,
    stage_of,
    worst,
)
from cryosuite.reconstruct.abinitio_rounds import image_scales
from cryosuite.reconstruct.backproject import common_pixel_size
from cryosuite.training.inference import autocast, evaluating
from cryosuite.training.launch import world
from cryosuite.training.method import Step
from cryosuite.training.schedule import march

ENCODE_BATCH = 256
FEWEST = 16  # particles worth training on


class Deco:
    """The method: see training/method.py for its verbs.

    ``cache_path``: where the encoder's images are kept on disk; None: in memory. ``precision``: of the training, in
    which all images are encoded too. ``accelerator``: "cpu" or "cuda", where the features of an encoder that is not
    trained are made; that is before a training moves the model there.
    """

    name = "deco"

    def __init__(
        self,
        options: DecoOptions | None = None,
        cache_path: Path | None = None,
        epochs: int = 1,
        precision: str = "auto",
        accelerator: str = "cpu",
    ) -> None:
        self.options = options or DecoOptions()
        self.cache_path, self.epochs, self.precision, self.accelerator = cache_path, epochs, precision, accelerator
        self.cache: EncoderCache | None = None
        self.count = 0  # of particles
        self.pixel_size = 1.0  # of the volumes, Angstrom; known once the model is built
        self.frozen: Tensor | None = None  # features (N, C) of an encoder that is not trained
        self.searcher: Searcher | None = None

    @property
    def unused_parameters(self) -> bool:
        """True where there is a warm-up: the encoder gets no gradient in it."""
        return self.options.poses == "none" and self.options.start == "network"

    def check(self, particles: ParticleSet) -> None:
        """Raises InputError where known poses are asked for and there are none, and for too few particles."""
        if self.options.poses == "known" and particles.rotation is None:
            raise InputError(
                f"{particles.path}: has no poses, and is to be sorted with known ones. Give them with --poses "
                "poses.pkl, or have them found by a run with --ab-initio"
            )
        if len(particles) < FEWEST:
            raise InputError(f"{particles.path}: {len(particles)} particles are too few to learn from")

    # the verbs of a method -------------------------------------------------------------------------------------------

    def build(self, particles: ParticleSet) -> DecoModel:
        """The model; raises InputError as ``check`` does, and for weights that do not fit."""
        self.check(particles)
        self.pixel_size = common_pixel_size(particles.pixel_size)
        spectra = measure_spectra(particles, self.options.window)
        loaded = open_encoder(self.options, particles)
        model = DecoModel(particles.box_size, self.options, spectra, loaded, particles.ctf_premultiplied)
        self.attach(model, particles, loaded.spec.image_size, loaded.prep)
        if self.options.table:
            model.table = PoseTable(*first_poses(particles), self.options.lr_poses)
            place, reach = image_scales(particles)
            self.searcher = Searcher(model, self.options, None if place is None else self.pixel_size)
            if self.options.search == "cached":
                r_max = math.ceil(reach * self.searcher.search_options.r_max)
                model.keep_volumes(self.options.cached_volumes, r_max)
        return model

    def attach(self, model: DecoModel, particles: ParticleSet, size: int, prep: str, trained: bool = True) -> None:
        """Make or open the encoder's images; of an encoder that is not trained keep the features.

        trained: the model is to be trained on these images; False: it was trained on others, and stays as it is.
        """
        self.cache = encoder_cache(particles, self.options.seen, model.noise_amplitude, size, prep, self.cache_path)
        self.count, self.frozen = len(particles), None
        if trained and (self.options.encoder == RANDOM or self.options.seen != "raw"):
            model.measure_pixels(self.cache)
        if not model.encoder_trains:
            self.frozen = self._features(model, len(particles))

    def parameter_groups(self, model: DecoModel) -> list[dict]:
        """Decoder and head, and the encoder, each with its own learning rate."""
        encoder = [p for p in model.encoder.parameters() if p.requires_grad]
        rest = [p for module in (model.head, model.field) for p in module.parameters() if p.requires_grad]
        groups = [{"params": rest}]
        if encoder:
            groups.append({"params": encoder, "lr_scale": self.options.lr_encoder, "weight_decay": 0.0})
        return groups

    def loss(self, model: DecoModel, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Whitened squared error per coefficient of the half disc: 1 for pure noise."""
        stage = stage_of(step, self.epochs, self.options, self.count)
        z = self.encode(model, batch, train=stage is not Stage.WARMUP)
        batch = self._posed(model, batch, z, stage, step)
        target = model.target(batch)
        device, half = batch.images.device, model.box_size / 2
        disc = fourier.half_disc(model.box_size, device=device)
        # whole rings: for every new number of points the CPU's kernels keep buffers, gigabytes over a run
        r_max = math.ceil(march(step.fraction, self.options.march_from * half, half, self.options.march_over))
        count = disc.count(r_max)
        with torch.autocast(device.type, enabled=False):
            q = disc.frequency[:count] @ slice_matrices(batch, self.pixel_size)[:, :2]  # (b, P, 3): (kx, ky, 0) @ R
        values = model.values(q, q.norm(dim=-1) * model.box_size, z)
        with torch.autocast(device.type, enabled=False):
            difference = torch.view_as_real(target.values[:, :count]) - target.ctf[:, :count, None] * values
            error = difference.square().sum(-1).mean(1)
            if model.table is not None:
                self._note_misfit(model.table, batch.index, error.detach())
            return {"loss": error.mean()}

    def encode(self, model: DecoModel, batch: Batch, train: bool = True) -> Tensor:
        """Latents (b, zdim)."""
        if self.frozen is not None:
            features = self.frozen[batch.index.to(self.frozen.device)].to(batch.images.device)
        else:
            images = self.cache.batch(batch.index).to(batch.images.device, non_blocking=True)
            with torch.set_grad_enabled(torch.is_grad_enabled() and train):
                features = model.features(images)
        return model.latent(features)

    def decode(self, model: DecoModel, z: Tensor) -> Tensor:
        """Volumes (k, D, D, D) float32 at latents z (k, zdim), in the grey values of the images."""
        return model.volumes(z)

    # parts -----------------------------------------------------------------------------------------------------------

    def _posed(self, model: DecoModel, batch: Batch, z: Tensor, stage: Stage, step: Step) -> Batch:
        """The batch with the poses of its stage."""
        if model.table is None:
            return batch
        if stage is Stage.WARMUP:
            rotation = chance.rows(lambda n: random_rotations(n, device=batch.images.device), len(batch))
            return replace(batch, rotation=rotation, shift=torch.zeros_like(rotation[:, 0, :2]))
        if stage is Stage.SEARCH:
            self.searcher.search(batch, z.detach())
        elif searched_again(step, self.epochs, self.options):
            rows = worst(model.table.misfit, batch.index, self.options.research_share)
            self.searcher.search(rows_of(batch, rows), z.detach()[rows])
        learn = stage is not Stage.SEARCH and not held(step, self.options)
        rotation, shift = model.table(batch.index, learn)
        return replace(batch, rotation=rotation, shift=shift)

    def _note_misfit(self, table: PoseTable, index: Tensor, error: Tensor) -> None:
        """Remember how badly images fit; those of all processes where that decides what is searched for again."""
        parts = [(index, error)] if self.options.research_every <= 0 else everywhere((index, error))
        for rows, values in parts:
            table.misfit[rows] = values

    def _features(self, model: DecoModel, count: int) -> Tensor:
        """Features of all particles (N, C) float32, in eval mode, the same in every process."""
        before = model.envelope.device
        device = torch.device(self.accelerator) if before.type == "cpu" else before

        def one(rows: np.ndarray) -> np.ndarray:
            return model.features(self.cache.batch(rows).to(device)).float().cpu().numpy()

        try:
            return torch.from_numpy(_of_all(model.to(device), count, one, self.precision))
        finally:
            model.to(before)

    def embed(self, model: DecoModel, count: int) -> np.ndarray:
        """Latents (N, zdim) float32 of all particles in one clean pass, the same array in every process."""
        device = model.envelope.device

        def one(rows: np.ndarray) -> np.ndarray:
            if self.frozen is not None:
                features = self.frozen[torch.from_numpy(rows)].to(device)
            else:
                features = model.features(self.cache.batch(rows).to(device))
            return model.latent(features).float().cpu().numpy()

        return _of_all(model, count, one, self.precision)


def _of_all(model: DecoModel, count: int, one: Callable[[np.ndarray], np.ndarray], precision: str) -> np.ndarray:
    """What ``one`` gives for batches of all rows, below each other; each process does its part of the batches."""
    rank, processes = world()
    device, found, portions = model.envelope.device, [], Portions("images")
    batches = np.array_split(np.arange(count), max(1, math.ceil(count / ENCODE_BATCH)))
    mine = batches[len(batches) * rank // processes : len(batches) * (rank + 1) // processes]
    with evaluating(model), torch.inference_mode(), Progress(sum(map(len, mine)), "encode") as bar:
        for rows in mine:
            with autocast(device, precision):
                found += [values for _, values in portions.over(lambda some, rows=rows: one(rows[some]), len(rows))]
            bar.advance(len(rows))
    parts = [found]
    if processes > 1:
        parts = parts * processes
        torch.distributed.all_gather_object(parts, found)
    return np.concatenate([values for part in parts for values in part])


def first_poses(particles: ParticleSet) -> tuple[Tensor, Tensor]:
    """Rotations (N, 3, 3) and shifts (N, 2) the pose table begins with: those of the set, else random and zero."""
    count = len(particles)
    rotation = random_rotations(count) if particles.rotation is None else torch.from_numpy(particles.rotation)
    shift = torch.zeros(count, 2) if particles.shift is None else torch.from_numpy(particles.shift)
    return rotation.float(), shift.float()
