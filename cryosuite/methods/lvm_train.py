"""Training of map networks for a task (CryoLVM): alpha mean square error + (1 - alpha) histogram divergence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cryosuite.kernels.histogram import histogram_divergence
from cryosuite.kernels.map_losses import masked_correlation, shell_loss, ssim
from cryosuite.methods.lvm import decayed, factor
from cryosuite.methods.lvm_loader import CropBatch, CropLoader, Crops
from cryosuite.methods.lvm_options import TrainLvmOptions
from cryosuite.methods.lvm_start import SCRATCH, fill, start_as_identity
from cryosuite.training.method import Step

RATIO_EVERY = 20  # steps between two looks at the gradients of the losses
SHOWN = 0.02  # grey value of the target above which a voxel belongs to the molecule
LAST = 0.01  # of the learning rate, where the cosine ends


class MapModel(nn.Module):
    """The network, and whether its encoder learns in this step."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:  # (b, 1, e, e, e) -> the same
        """Restored crops; with ``frozen`` nothing is learnt by the encoder."""
        if not frozen:
            return self.net(x)
        with torch.no_grad():
            features = self.net.encoder(x)
        return self.net.decoder(features)


class TrainLvm:
    """The method ``lvm`` for the training loop; ``particles`` are ``Crops``.

    Args:
        load: take the weights of ``options.start`` (not when a training goes on: they are in its checkpoint).
    """

    name = "lvm"

    def __init__(self, options: TrainLvmOptions, load: bool = True) -> None:
        self.options, self.load = options, load

    @property
    def unused_parameters(self) -> bool:
        """A frozen encoder gets no gradient."""
        return self.options.frozen > 0

    def build(self, particles: Crops) -> MapModel:
        """The network, with the weights it starts from."""
        net = self.options.network()
        if self.load and self.options.start != SCRATCH:
            fill(net, self.options.start, self.options.pretrained)
        if self.load and (self.options.pretrained or self.options.start == SCRATCH):
            start_as_identity(net)
        return MapModel(net)

    def loader(self, particles: Crops, batch_size: int, rank: int, processes: int, **how: Any) -> CropLoader:
        """Batches for the training loop."""
        return CropLoader(particles, batch_size, rank, processes, **how)

    def parameter_groups(self, model: MapModel) -> list[dict[str, Any]]:
        """The encoder with its own learning rate; weight decay on matrices only."""
        return [*decayed(model.net.decoder), *decayed(model.net.encoder, lr_scale=self.options.encoder_lr)]

    def lr_factor(self, step: Step) -> float:
        """Factor on the learning rate."""
        return factor(step, self.options.schedule, self.options.warmup, LAST)

    def loss(self, model: MapModel, batch: CropBatch, step: Step) -> dict[str, Tensor]:
        """The weighted sum, each part, and how strongly the second pulls at the maps compared with the first."""
        o = self.options
        predicted = model(batch.input, step.fraction < o.frozen).float()
        told = {"mse": (predicted - batch.target).square().mean()}
        total = o.alpha * told["mse"]
        if o.alpha < 1:
            mask = batch.mask if o.hist_mask == "union" else None
            told["hist"] = histogram_divergence(predicted, batch.target, mask, o.hist_sample).mean()
            if step.index % RATIO_EVERY == 0 and predicted.requires_grad:
                told["hist_over_mse"] = self._ratio(predicted, told)
            total = total + (1 - o.alpha) * told["hist"]
        if o.cc:
            told["cc"] = 1 - masked_correlation(predicted, batch.target, batch.target > SHOWN)
            total = total + o.cc * told["cc"]
        if o.ssim:
            told["ssim"] = 1 - ssim(predicted, batch.target).mean()
            total = total + o.ssim * told["ssim"]
        if o.fsc:
            told["fsc"] = shell_loss(predicted, batch.target).mean()
            total = total + o.fsc * told["fsc"]
        return {"loss": total} | told

    def _ratio(self, predicted: Tensor, told: dict[str, Tensor]) -> Tensor:
        """Length of the gradient of the weighted divergence over that of the weighted square error, at the maps."""
        parts = [torch.autograd.grad(told[name], predicted, retain_graph=True)[0].norm() for name in ("mse", "hist")]
        return (1 - self.options.alpha) * parts[1] / (self.options.alpha * parts[0]).clamp(min=1e-12)

    def encode(self, model: MapModel, batch: CropBatch) -> Tensor:
        """The mean embedding of every crop, (b, E)."""
        return model.net.encoder(batch.input)[-1].flatten(1, 3).float().mean(1)
