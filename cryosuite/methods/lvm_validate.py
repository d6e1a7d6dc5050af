"""How good a map network is on structures it has never seen, always beside the map that it was given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from cryosuite.kernels.histogram import histogram_divergence
from cryosuite.methods.lvm_loader import CropBatch
from cryosuite.nets.jepa_guards import collapsed, effective_rank, feature_std, linear_probe, mean_ratio
from cryosuite.nets.scunet import TOKEN
from cryosuite.training.launch import process_rank
from cryosuite.training.logs import write_scores

if TYPE_CHECKING:
    from torch import nn

    from cryosuite.data.workdir import RunDir
    from cryosuite.methods.lvm import Pretrain, PretrainModel
    from cryosuite.methods.lvm_loader import Crops
    from cryosuite.methods.lvm_train import MapModel

HELD_SEED = 900_001
VOLUMES = 12  # that are tested on
EACH = 6  # crops of one volume, at most
AT_ONCE = 16
SHOWN = 0.02  # grey value of the target above which a voxel belongs to the molecule
FEW = 64  # voxels of the molecule with which a correlation means something
SCORES = ("cc_mask", "mse", "hist")


def held_crops(crops: Crops, volumes: int = VOLUMES) -> CropBatch:
    """The crops of held-out structures that every test of this training uses."""
    batches = crops.pairs.held(HELD_SEED, volumes)
    every = [CropBatch.of([batch]) for batch in batches]
    return CropBatch.of([batch.rows(torch.arange(min(EACH, len(batch.index)))) for batch in every])


def cc_mask(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:  # (n, ...) three times -> (n,)
    """Pearson correlation of each crop inside a mask; NaN where it holds fewer than 64 voxels or one is constant."""
    a, b, w = (x.flatten(1).double() for x in (a, b, mask))
    count = w.sum(1, keepdim=True)
    a, b = (w * (x - (w * x).sum(1, keepdim=True) / count.clamp(min=1)) for x in (a, b))
    norm = ((a * a).sum(1) * (b * b).sum(1)).sqrt()
    good = (count[:, 0] >= FEW) & (norm > 0)
    return torch.where(good, (a * b).sum(1) / norm.clamp(min=1e-30), torch.full_like(norm, torch.nan))


def map_scores(answer: Tensor, batch: CropBatch) -> dict[str, float]:
    """CC_mask (inside the target), mean square error, histogram divergence, means over crops of (n, 1, e, e, e)."""
    cc = cc_mask(answer, batch.target, batch.target > SHOWN)
    hist = histogram_divergence(answer, batch.target, batch.mask, 0)
    return {
        "cc_mask": float(cc.nanmean()),
        "mse": float((answer - batch.target).square().mean()),
        "hist": float(hist.mean()),
    }


@torch.no_grad()
def restored(model: nn.Module, inputs: Tensor) -> Tensor:
    """What a network makes of crops (n, 1, e, e, e), clamped to 0..1, on the CPU, float32."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        parts = [model(part.to(device)).float().clamp(0, 1).cpu() for part in inputs.split(AT_ONCE)]
    model.train(training)
    return torch.cat(parts)


class Examiner:
    """Scores a restoring network after every epoch on crops of held-out structures, beside those of its input."""

    def __init__(self, crops: Crops, run: RunDir) -> None:
        self.crops, self.run = crops, run
        self.held: CropBatch | None = None
        self.input: dict[str, float] = {}

    def score(self, model: MapModel) -> dict[str, float]:
        """All scores, named such as cc_mask and cc_mask_input."""
        if self.held is None:
            self.held = held_crops(self.crops)
            self.input = {f"{name}_input": v for name, v in map_scores(self.held.input, self.held).items()}
        return map_scores(restored(model, self.held.input), self.held) | self.input

    def write(self, epoch: int, model: MapModel) -> dict[str, float]:
        """Add the scores after an epoch to metrics.jsonl (first process only)."""
        if process_rank() != 0:
            return {}
        return log_scores(self.run, epoch, self.score(model))


class PretrainExaminer:
    """What the embeddings of held-out crops are worth: the objective, the guards, and two linear probes."""

    def __init__(self, crops: Crops, method: Pretrain, run: RunDir) -> None:
        self.crops, self.method, self.run = crops, method, run
        self.held: CropBatch | None = None

    @torch.no_grad()
    def score(self, model: PretrainModel) -> dict[str, float]:
        """heldout_loss, target_std, target_rank, mean_ratio, and R^2 of local density and of the molecule's share."""
        if self.held is None:
            self.held = held_crops(self.crops)
        device, training = next(model.parameters()).device, model.training
        model.eval()
        generator, losses, ratios, tokens = torch.Generator().manual_seed(0), [], [], []
        for part in self.held.input.split(AT_ONCE):
            part = part.to(device)
            loss, predicted, targets = model(part, self.method.masks(part, generator).to(device))
            losses.append(float(loss))
            ratios.append(float(mean_ratio(predicted, targets)))
            tokens.append(model.embeddings(part).float().cpu())
        model.train(training)
        z = torch.cat(tokens)
        scores = {
            "loss": sum(losses) / len(losses),
            "mean_ratio": sum(ratios) / len(ratios),
            "target_std": float(feature_std(z)),
            "target_rank": float(effective_rank(z)),
        }
        for name, values in (("density", self.held.input), ("mask", self.held.mask)):
            local = F.avg_pool3d(values, TOKEN).flatten()
            scores[f"probe_{name}"] = float(linear_probe(z.flatten(0, 1), local)) if local.std() > 0 else 0.0
        return {f"heldout_{name}": value for name, value in scores.items()}

    def write(self, epoch: int, model: PretrainModel) -> dict[str, float]:
        """Add the scores after an epoch to metrics.jsonl (first process only)."""
        return log_scores(self.run, epoch, self.score(model)) if process_rank() == 0 else {}


def fired(scores: dict[str, float], objective: str) -> list[str]:
    """Guards that say the embedding has collapsed (JEPA) or that nothing is learnt yet (both)."""
    named = {name.removeprefix("heldout_"): value for name, value in scores.items()}
    found = collapsed(named)
    return found if objective == "jepa" else [name for name in found if name == "mean_ratio"]


def log_scores(run: RunDir, epoch: int, scores: dict[str, float]) -> dict[str, float]:
    """Add a line to metrics.jsonl."""
    write_scores(run.metrics, epoch, scores, 6)
    return scores
