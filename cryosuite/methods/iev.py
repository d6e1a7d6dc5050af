"""The particle encoder: momentum contrast on particle images, its guards, and features of any particle set."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cryosuite.data.encoder_images import circle_mask, features, normalise
from cryosuite.data.encoder_weights import load_encoder, save_encoder, shipped_encoder
from cryosuite.errors import notice
from cryosuite.kernels import chance
from cryosuite.methods.iev_augment import AFTER_SIMULATION, augment, circled
from cryosuite.methods.iev_data import Corpus, CorpusLoader, PairBatch
from cryosuite.methods.iev_options import IevOptions
from cryosuite.metrics.features import feature_spread, knn_accuracy, pixel_components
from cryosuite.nets.ief import IefEncoder, make_spec
from cryosuite.nets.moco import MoCo, momentum_at, sample_patches, smooth_patches
from cryosuite.simulate.pool import RINGS, TURNS
from cryosuite.training.launch import process_rank, world
from cryosuite.training.logs import write_scores

if TYPE_CHECKING:
    from cryosuite.data.particles import ParticleSet
    from cryosuite.data.workdir import RunDir
    from cryosuite.nets.ief_weights import LoadedEncoder
    from cryosuite.training.method import Step

MEASURED = 2048  # images of which mean and standard deviation of the grey values are taken
ALL_SHOWN = 0.9  # of the training: from here on the encoder sees whole images
COLLAPSED = 0.3  # spread of the features below which the encoder has learnt nothing but one answer


class IevModel(MoCo):
    """MoCo with the grey values' mean and standard deviation, which go into the exported file."""

    def __init__(self, options: IevOptions, mean: float, std: float) -> None:
        spec = make_spec(options.size, options.norm2)
        encoder = IefEncoder(spec)
        encoder.set_checkpointing(options.low_memory)
        if options.patch_start == "smooth":
            encoder.patch_embed.proj.weight.data.copy_(smooth_patches(spec.patch, spec.dim))
        if not options.train_patch:
            encoder.patch_embed.requires_grad_(False)
        super().__init__(encoder, spec.dim, options.hidden, options.out, options.tau, options.chunk)
        self.register_buffer("grey_mean", torch.tensor(float(mean), dtype=torch.float64))
        self.register_buffer("grey_std", torch.tensor(float(std), dtype=torch.float64))
        self.guide = nn.Linear(spec.dim, RINGS * TURNS) if options.guide else None
        mask = circle_mask(spec.image_size) if options.circle else np.ones((spec.image_size,) * 2, np.uint8)
        blocks = mask.reshape(spec.grid, spec.patch, spec.grid, spec.patch).any(axis=(1, 3))
        self.register_buffer("inside", torch.from_numpy(blocks.ravel()), persistent=False)
        self.followed = -1  # the step for which the momentum copy was moved


class Iev:
    """The method ``iev`` for the training loop; ``particles`` is a Corpus."""

    name = "iev"
    unused_parameters = False
    compares_images = True  # of a batch with each other: fewer where a batch is computed in pieces

    def __init__(self, options: IevOptions) -> None:
        self.options = options
        self.aug = frozenset(options.aug)

    def build(self, particles: Corpus) -> IevModel:
        """The model, with mean and standard deviation measured on the first images."""
        random = torch.get_rng_state()
        mean, std = grey_values(particles, self.options.circle)
        torch.set_rng_state(random)
        return IevModel(self.options, mean, std)

    def loader(self, particles: Corpus, batch_size: int, rank: int, processes: int, **how: Any) -> CorpusLoader:
        """Batches for the training loop."""
        return CorpusLoader(particles, batch_size, rank, processes, **how)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Weight decay on matrices only."""
        wanted = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in wanted if p.ndim > 1 and p.shape[:-1].numel() > 1]
        few = {id(p) for p in matrices}
        return [{"params": matrices}, {"params": [p for p in wanted if id(p) not in few], "weight_decay": 0.0}]

    def loss(self, model: IevModel, batch: PairBatch, step: Step) -> dict[str, Tensor]:
        """The contrastive loss of two views of each image, with the guards' numbers beside it."""
        if model.followed != step.index:  # once per step, however many pieces its batch is computed in
            model.follow(momentum_at(step.fraction, self.options.momentum, self.options.m_cos))
            model.followed = step.index
        with torch.no_grad():
            first, second = (self.view(batch, number, model) for number in (0, 1))
            kept = self.patches(len(first), model, step)
        contrast, found = model(first, second, kept)
        spread, rank = feature_spread(found.detach())
        told = {"contrast": contrast, "spread": spread, "effective_rank": rank}
        if model.guide is None:
            return {"loss": contrast} | told
        miss = guide_loss(model.guide(found), batch.shapes)
        return {"loss": contrast + self.options.guide * miss, "guide": miss} | told

    def patches(self, images: int, model: IevModel, step: Step) -> Tensor | None:
        """The patches shown of both views of each image, (2 images, k), first all first views; None: all patches.

        None of them lies wholly outside the circle.
        """
        if self.options.keep >= 1 or step.fraction >= ALL_SHOWN:
            return None

        def both(count: int) -> Tensor:
            return sample_patches(2 * count, model.inside, self.options.keep).unflatten(0, (2, count)).transpose(0, 1)

        return chance.rows(both, images).transpose(0, 1).flatten(0, 1)

    def view(self, batch: PairBatch, number: int, model: IevModel) -> Tensor:
        """One augmented view of each image, (b, 1, s, s) as the encoder takes it."""
        mean, std = model.grey_mean.float(), model.grey_std.float()
        images = ((batch.images[:, number].float() / 255) - mean) / std
        if batch.kind == "simulated":
            images = augment(images, self.aug & AFTER_SIMULATION)
        elif batch.kind == "stacks":
            images = augment(images, self.aug)
        else:
            drawn = augment(images, self.aug & AFTER_SIMULATION)
            images = torch.where(batch.drawn[:, None, None], drawn, augment(images, self.aug))
        if self.options.circle:
            mask = torch.from_numpy(circle_mask(images.shape[-1])).to(images.device) > 0
            images = torch.where(mask, images, -mean / std)
        return images[:, None]

    def encode(self, model: IevModel, batch: PairBatch) -> Tensor:
        """Features (b, C) of the first view, not augmented."""
        return model.base_encoder(self.plain(batch.images[:, 0], model))

    def plain(self, images: Tensor, model: IevModel) -> Tensor:
        """(b, s, s) uint8 -> (b, 1, s, s) as at inference."""
        x = normalise(images, float(model.grey_mean), float(model.grey_std))
        if self.options.circle:
            mask = torch.from_numpy(circle_mask(x.shape[-1])).to(x.device) > 0
            x = circled(x, mask, float(-model.grey_mean / model.grey_std))
        return x


def guide_loss(guess: Tensor, shapes: Tensor | None) -> Tensor:
    """Mean square miss of the ring shapes (2 b, 96), over the rows that have any; 0 where none has.

    Of several processes each counts for as many rows as it has: the mean of what they return is that of all rows.
    """
    if shapes is None:
        shapes = guess.new_full((len(guess) // 2, 2, guess.shape[1]), torch.nan)
    truth = shapes.transpose(0, 1).flatten(0, 1)
    known = torch.isfinite(truth)
    miss = torch.where(known, guess.float() - torch.where(known, truth, 0), 0)
    count, processes = known.sum().to(miss.dtype), world()[1]
    if processes > 1:
        torch.distributed.all_reduce(count)
        count = count / processes
    return miss.square().sum() / count.clamp(min=1 / processes)


def grey_values(corpus: Corpus, circle: bool) -> tuple[float, float]:
    """Mean and standard deviation of u8 / 255 over the first images of a corpus, inside the circle."""
    batch = min(256, corpus.epoch_images)
    loader = CorpusLoader(corpus, batch, seed=0, prefetch=0)
    mask = torch.from_numpy(circle_mask(corpus.box_size)) > 0
    total = torch.zeros(3, dtype=torch.float64)
    for number, found in enumerate(loader.epoch(0)):
        x = found.images[:, 0].cpu().double() / 255
        x = x[:, mask] if circle else x
        total += torch.tensor([x.numel(), x.sum(), x.square().sum()], dtype=torch.float64)
        if (number + 1) * batch >= MEASURED:
            break
    mean = total[1] / total[0]
    return float(mean), float((total[2] / total[0] - mean**2).clamp(min=1e-4).sqrt())


class Guard:
    """After every epoch: do neighbours in feature space show the same molecule? Beside it what needs no training.

    Args:
        images: (n, s, s) uint8 of molecules that are not trained on, no circle. labels: (n,) int64.
    """

    def __init__(self, images: Tensor, labels: np.ndarray, method: Iev, run: RunDir, batch: int = 64) -> None:
        self.images, self.labels, self.method, self.run, self.batch = images, labels, method, run, batch
        self.before: dict[str, float] = {}

    @torch.no_grad()
    def score(self, model: IevModel) -> dict[str, float]:
        """kNN accuracy and the spread of the features of a model as it is."""
        device, training = next(model.parameters()).device, model.training
        model.eval()
        parts = [
            model.base_encoder(self.method.plain(part.to(device), model)).float().cpu()
            for part in self.images.split(self.batch)
        ]
        model.train(training)
        z = torch.cat(parts)
        spread, rank = feature_spread(z)
        knn = knn_accuracy(z.numpy(), self.labels)
        return {"knn": knn, "heldout_spread": float(spread), "heldout_rank": float(rank)}

    def baselines(self, model: IevModel) -> dict[str, float]:
        """Of a random start of the same encoder and of principal components of the pixels; always the same seed."""
        if not self.before:
            # made on the CPU: no other GPU is woken, no GPU's numbers are changed
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                fresh = IevModel(self.method.options, float(model.grey_mean), float(model.grey_std))
            inside = self.images * torch.from_numpy(circle_mask(self.images.shape[-1]))
            self.before = {
                "knn_random": self.score(fresh.to(next(model.parameters()).device))["knn"],
                "knn_pixels": knn_accuracy(pixel_components(inside[:, ::2, ::2].numpy()), self.labels, cosine=False),
            }
        return self.before

    def write(self, epoch: int, model: IevModel) -> None:
        """Add the scores after an epoch to metrics.jsonl and say so when the features have collapsed."""
        if process_rank() != 0:
            return
        scores = self.score(model) | self.baselines(model)
        write_scores(self.run.metrics, epoch, scores, 5)
        if scores["heldout_spread"] < COLLAPSED:
            notice(
                f"epoch {epoch}: the features of all images are nearly alike (spread {scores['heldout_spread']:.2f}): "
                "the training has collapsed; a lower --lr, a larger batch or more varied particles help"
            )


def after_epoch(
    run: RunDir, options: IevOptions, guard: Guard | None, notes: dict[str, Any]
) -> Callable[[int, IevModel], None]:
    """What ``fit`` calls after an epoch: the guard's scores and encoder.safetensors."""

    def write(epoch: int, model: IevModel) -> None:
        if guard is not None:
            guard.write(epoch, model)
        if process_rank() == 0:
            said = notes | {"epoch": epoch}
            save_encoder(
                encoder_file(run), model.base_encoder, options.prep, float(model.grey_mean), float(model.grey_std), said
            )

    return write


def encoder_file(run: RunDir) -> Path:
    """The encoder of a run, in the layout of the released files."""
    return Path(run.path) / "encoder.safetensors"


def open_encoder(weights: str | os.PathLike, prep: str | None = None) -> LoadedEncoder:
    """An encoder by name (``iev-tiny``, which comes with cryosuite) or by the path of a file or folder."""
    name = str(weights)
    if os.sep not in name and not Path(name).exists() and not name.endswith(".safetensors"):
        return shipped_encoder(name, prep=prep)
    return load_encoder(weights, prep=prep)


def encode(
    particles: ParticleSet,
    weights: str | os.PathLike | LoadedEncoder = "iev-tiny",
    *,
    batch: int = 64,
    device: str | torch.device | None = None,
    circle: bool = True,
    progress: bool = True,
    half: bool | None = None,
) -> np.ndarray:
    """Features of all particles, (N, C) float32 in their order, not normalised.

    Args:
        particles: any set (``cryosuite.data.open.open_particles``); neither poses nor CTF are needed.
        weights: a name, a file or folder (the released Cryo-IEF weights unmodified, or ours), or a loaded encoder.
        batch: images at once. device: None is the GPU where there is one. circle: hide the corners, as in training.
        half: bfloat16, twice as fast on processors that have it; default: on a GPU, not on a CPU.

    Raises InputError for weights that are missing or do not fit. ``methods.iev_encode`` writes them to a file as they
    come, for sets whose features are too many for memory.
    """
    loaded = open_encoder(weights) if isinstance(weights, str | os.PathLike) else weights
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    return features(particles, loaded, batch, device, progress, circle=circle, half=half)
