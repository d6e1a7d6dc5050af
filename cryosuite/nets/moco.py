"""Momentum contrast, version 3 (Chen, Xie & He 2021): two views of one particle image must find each other in a batch.

    q = predictor(projector(f(x)));  k = momentum projector(momentum f(x));  rows normalised
    ctr(q, k) = 2 tau * cross entropy of q k^T / tau with the own row as the answer
    loss = ctr(q1, k2) + ctr(q2, k1)

Negatives are the keys of the whole batch over all processes; there is no queue. The momentum copy follows the
encoder before its keys are made; the copy's parameters follow, its batch norm statistics are its own.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F


def world(group: object = None) -> tuple[int, int]:
    """(rank, number of processes) of a group of torch.distributed; (0, 1) where none was started."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group), dist.get_world_size(group)
    return 0, 1


def gather_keys(keys: Tensor, group: object = None) -> Tensor:
    """The keys of all processes in order of rank, (processes * b, c), without gradient."""
    processes = world(group)[1]
    if processes == 1:
        return keys
    parts = [torch.empty_like(keys) for _ in range(processes)]
    dist.all_gather(parts, keys.contiguous(), group=group)
    return torch.cat(parts)


def contrastive(q: Tensor, k: Tensor, tau: float, group: object = None) -> Tensor:
    """ctr(q, k): scalar, the mean over this process's rows; the mean over processes is that of the whole batch.

    Args:
        q: (b, c) queries of this process, any length.
        k: (b, c) their keys; no gradient goes into them.
        tau: temperature.
        group: of torch.distributed; None is the default one, if any.

    Computed in float32 (float64 stays): at small tau half precision would round the answer away.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q = F.normalize(q.to(wide), dim=1)
        k = gather_keys(F.normalize(k.detach().to(wide), dim=1), group)
        own = torch.arange(len(q), device=q.device) + len(q) * world(group)[0]
        return 2 * tau * F.cross_entropy(q @ k.T / tau, own)


def chance_loss(batch_size: int, tau: float) -> float:
    """The loss of an encoder that cannot tell its images apart: 2 x 2 tau ln(batch)."""
    return 4 * tau * math.log(batch_size)


class SyncNorm(nn.BatchNorm1d):
    """BatchNorm whose statistics are those of the batch over all processes, on any device; state keys unchanged.

    Takes (b, c) or tokens (b, t, c). torch's own synchronised norm runs on GPUs only. With one process it is torch's
    BatchNorm1d.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis over all others and all processes."""
        rows = x.reshape(-1, x.shape[-1])
        if not self.training or world()[1] == 1:
            return super().forward(rows).view_as(x)
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        sums = torch.cat([wide.sum(0), wide.square().sum(0), wide.new_full((1,), len(wide))])
        sums = all_reduce(sums)
        count = sums[-1].detach()
        mean, square = (sums[:-1] / count).split(rows.shape[1])
        variance = (square - mean.square()).clamp(min=0)
        with torch.no_grad():
            unbiased = variance * count / (count - 1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked.add_(1)
        out = (wide - mean) * torch.rsqrt(variance + self.eps)
        if self.affine:
            out = out * self.weight + self.bias
        return out.to(x.dtype).view_as(x)


def synchronised(module: nn.Module) -> nn.Module:
    """The same module with its batch norms over all processes (in place; parameters and buffers are kept)."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d) and not isinstance(child, SyncNorm):
            norm = SyncNorm(child.num_features, child.eps, child.momentum, child.affine)
            norm.weight, norm.bias = child.weight, child.bias
            norm.running_mean, norm.running_var = child.running_mean, child.running_var
            norm.num_batches_tracked = child.num_batches_tracked
            setattr(module, name, norm)
        else:
            synchronised(child)
    return module


def mlp_head(sizes: list[int]) -> nn.Sequential:
    """Linear layers without bias, each followed by a batch norm, ReLU between; the last norm has no scale and shift.

    Names of the layers are those of MoCo v3: 0, 1, 3, 4, 6, 7.
    """
    layers: list[nn.Module] = []
    for number, (into, out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True), start=1):
        last = number == len(sizes) - 1
        layers += [nn.Linear(into, out, bias=False), SyncNorm(out, affine=not last)]
        layers += [] if last else [nn.ReLU()]
    return nn.Sequential(*layers)


class MoCo(nn.Module):
    """An encoder with projector and predictor, and its momentum copy.

    State keys: ``base_encoder.*`` (the encoder, as in the released files), ``projector.*``, ``predictor.*``,
    ``momentum_encoder.*`` and ``momentum_projector.*``.

    Args:
        encoder: (b, 1, s, s) -> (b, dim).
        dim: length of its features.
        hidden, out: widths of the heads.
        tau: temperature.
        chunk: images that go through the encoder at once (0: all); only for encoders without batch norms, whose answer
            does not depend on it. Small chunks stay in a processor's cache.
    """

    def __init__(
        self, encoder: nn.Module, dim: int, hidden: int = 4096, out: int = 256, tau: float = 0.2, chunk: int = 0
    ) -> None:
        super().__init__()
        self.base_encoder = synchronised(encoder)
        self.projector = mlp_head([dim, hidden, hidden, out])
        self.predictor = mlp_head([out, hidden, out])
        self.momentum_encoder = copy.deepcopy(self.base_encoder)
        self.momentum_projector = copy.deepcopy(self.projector)
        for parameter in [*self.momentum_encoder.parameters(), *self.momentum_projector.parameters()]:
            parameter.requires_grad_(False)
        self.tau, self.chunk = tau, chunk

    def forward(
        self, first: Tensor, second: Tensor, kept: Tensor | None = None, group: object = None
    ) -> tuple[Tensor, Tensor]:
        """Two views (b, 1, s, s) each -> (loss scalar, features of both (2 b, dim)).

        ``kept`` (2 b, k): the patches of both views that the encoder is shown; None: all. Call ``follow`` before, once
        per step.
        """
        views = torch.cat([first, second])
        features = self._features(self.base_encoder, views, kept)
        q1, q2 = self.predictor(self.projector(features)).chunk(2)
        with torch.no_grad():
            k1, k2 = self.momentum_projector(self._features(self.momentum_encoder, views, kept)).chunk(2)
        loss = contrastive(q1, k2, self.tau, group) + contrastive(q2, k1, self.tau, group)
        return loss, features

    def _features(self, encoder: nn.Module, images: Tensor, kept: Tensor | None) -> Tensor:
        if not self.chunk:
            return encoder(images) if kept is None else encoder(images, kept)
        if kept is None:
            return torch.cat([encoder(part) for part in images.split(self.chunk)])
        parts = zip(images.split(self.chunk), kept.split(self.chunk), strict=True)
        return torch.cat([encoder(part, of) for part, of in parts])

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """theta_m = m theta_m + (1 - m) theta, for all parameters of encoder and projector (not for buffers)."""
        pairs = ((self.momentum_encoder, self.base_encoder), (self.momentum_projector, self.projector))
        for follower, leader in pairs:
            mine = [p for p in follower.parameters() if p.is_floating_point()]
            theirs = [p.detach() for p in leader.parameters() if p.is_floating_point()]
            torch._foreach_lerp_(mine, theirs, 1 - momentum)


def smooth_patches(patch: int, dim: int) -> Tensor:
    """A start for the patch projection that suits noisy pictures of molecules: (dim, 1, patch, patch).

    Cosine patterns (DCT-II) with the gain 1 / (1 + (r / 3)^2) at r half periods per patch, mixed by a random rotation,
    by several where ``dim`` is above patch^2. A molecule's power falls steeply with frequency and the noise's does not:
    a random projection passes on noise.
    """
    node = torch.arange(patch, dtype=torch.float64)
    basis = torch.cos(math.pi * (node + 0.5) * node[:, None] / patch) * math.sqrt(2 / patch)  # (frequency, pixel)
    basis[0] /= math.sqrt(2)
    patterns = torch.einsum("uy,vx->uvyx", basis, basis).reshape(patch**2, patch, patch)
    radius2 = (node[:, None].square() + node.square()).reshape(-1)
    count = patch**2
    rotations = [torch.linalg.qr(torch.randn(count, count, dtype=torch.float64))[0] for _ in range(-(-dim // count))]
    mix = torch.cat(rotations, 1)[:, :dim]
    return torch.einsum("kc,kyx->cyx", mix / (1 + radius2 / 9)[:, None], patterns)[:, None].float()


def sample_patches(count: int, inside: Tensor, share: float) -> Tensor:
    """Random patches for each of ``count`` images: (count, k) int64, k a share of those that ``inside`` (n,) marks."""
    k = max(1, round(share * int(inside.sum())))
    score = torch.rand(count, len(inside), device=inside.device).masked_fill(~inside, -1.0)
    return score.topk(k, dim=1).indices


def momentum_at(fraction: float, start: float, cosine: bool) -> float:
    """The momentum at a part of the training: ``start``, or rising to 1 along half a cosine."""
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * fraction)) if cosine else start
