"""Pre-training of map encoders (CryoLVM): joint-embedding prediction of hidden blocks, or masked autoencoding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cryosuite.kernels import chance
from cryosuite.methods.lvm_loader import CropBatch, CropLoader, Crops
from cryosuite.methods.lvm_options import PretrainOptions
from cryosuite.nets.jepa import Jepa, Mae, target_momentum, token_grid
from cryosuite.nets.jepa_guards import guards
from cryosuite.nets.jepa_masks import Masks, multiblock_masks, random_masks
from cryosuite.training.method import Step
from cryosuite.training.schedule import lr_factor

GUARDS_EVERY = 10  # steps
LAST_LR = 1e-6  # where the cosine ends
DECAY = 0.2  # last share of a "flat" training in which the learning rate falls to 0


class PretrainModel(nn.Module):
    """Encoder, what is trained beside it, and (JEPA) the target encoder."""

    def __init__(self, options: PretrainOptions) -> None:
        super().__init__()
        encoder = options.network().encoder
        if options.objective == "mae":
            self.net = Mae(encoder, options.predictor)
        else:
            self.net = Jepa(encoder, options.predictor, options.mask_at)
        self.followed = -1  # the step for which the target was moved

    def forward(self, crops: Tensor, masks: Masks) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, predicted, targets) of crops (b, 1, e, e, e)."""
        return self.net(crops, masks)

    @property
    def encoder(self) -> nn.Module:
        """What the training is for: the target encoder, or with MAE the (averaged) encoder itself."""
        return self.net.target_encoder if isinstance(self.net, Jepa) else self.net.encoder

    @torch.no_grad()
    def embeddings(self, crops: Tensor) -> Tensor:  # (b, 1, e, e, e) -> (b, T, E) float32
        """Embeddings of all tokens of whole crops, each with mean 0 and variance 1 over its numbers."""
        if isinstance(self.net, Jepa):
            return self.net.targets(crops)
        tokens = self.encoder(crops)[-1].flatten(1, 3)
        return F.layer_norm(tokens.float(), tokens.shape[-1:])


class Pretrain:
    """The method ``lvm-pretrain`` for the training loop; ``particles`` are ``Crops``."""

    name = "lvm-pretrain"

    def __init__(self, options: PretrainOptions, lr: float) -> None:
        self.options, self.lr = options, lr

    @property
    def unused_parameters(self) -> bool:
        """With masks after the encoder nothing is filled in."""
        return self.options.mask_at == "embedding" or self.options.net == "vit"

    def build(self, particles: Crops) -> PretrainModel:
        """The model with random weights."""
        return PretrainModel(self.options)

    def loader(self, particles: Crops, batch_size: int, rank: int, processes: int, **how: Any) -> CropLoader:
        """Batches for the training loop."""
        return CropLoader(particles, batch_size, rank, processes, **how)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Weight decay on matrices only, not on biases, norms and tables of relative positions."""
        return decayed(model)

    def lr_factor(self, step: Step) -> float:
        """Factor on the learning rate."""
        return factor(step, self.options.schedule, self.options.warmup, min(1.0, LAST_LR / self.lr))

    def weight_decay(self, step: Step) -> float:
        """From the first to the second of ``decay`` along a cosine."""
        first, last = self.options.decay
        return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(step.fraction, 1.0)))

    def loss(self, model: PretrainModel, batch: CropBatch, step: Step) -> dict[str, Tensor]:
        """The loss of the objective; now and then the numbers that say whether the embedding has collapsed."""
        if isinstance(model.net, Jepa) and model.followed != step.index:
            model.net.follow(target_momentum(step.fraction, step.total))  # once per step, in however many pieces
            model.followed = step.index
        masks = self.masks(batch.input).to(batch.input.device)
        loss, predicted, targets = model(batch.input, masks)
        told = {"loss": loss}
        if isinstance(model.net, Jepa) and step.index % GUARDS_EVERY == 0:
            with torch.autocast(loss.device.type, enabled=False):
                told |= guards(predicted.detach().float(), targets)
        return told

    def masks(self, crops: Tensor, generator: torch.Generator | None = None) -> Masks:
        """What is shown and what is predicted of each crop, on the CPU.

        Drawn for the whole batch where several processes share one: all its crops show as many tokens.
        """
        grid, count = token_grid(crops), chance.whole(len(crops))
        if self.options.mask_mode == "random":
            drawn = random_masks(grid, count, self.options.mask_ratio, generator)
        else:
            drawn = multiblock_masks(grid, count, generator)
        share = chance.share_of(len(crops))
        return drawn if share is None else drawn.rows(share.own)

    def encode(self, model: PretrainModel, batch: CropBatch) -> Tensor:
        """The mean embedding of every crop, (b, E)."""
        return model.embeddings(batch.input).mean(1)


def decayed(model: nn.Module, **more: Any) -> list[dict[str, Any]]:
    """Two groups for AdamW: matrices and kernels, and what is not to decay."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    kept = [p for name, p in named if p.ndim > 1 and not name.endswith(".relative")]
    few = {id(p) for p in kept}
    rest = [p for _, p in named if id(p) not in few]
    return [{"params": kept, **more}, {"params": rest, "weight_decay": 0.0, **more}]


def factor(step: Step, schedule: str, warmup: float, floor: float) -> float:
    """Factor on the learning rate: a warm-up, then a cosine, or flat with the last fifth falling to 0."""
    if schedule == "cosine":
        return lr_factor(step.index, step.total, warmup, floor)
    rising = min(1.0, (step.index + 1) / max(warmup * step.total, 1.0))
    return rising * min(1.0, (1 - step.fraction) / DECAY)
