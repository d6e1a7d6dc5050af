"""Hypernetworks: weight tokens -> the weight matrices of one coordinate network per image.

Matrices are held as (fan_out, fan_in) like ``nn.Linear``, so that modulation runs along contiguous memory. Every unit
(a column of the paper's W) has unit norm: only the direction of the learnt base counts. The bias is shared by all
images. Source: CryoHype, arXiv 2512.06332, and TransINR (Chen & Wang 2022) for the token groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

HYPERNETS = ("groups", "lowrank")


@dataclass(frozen=True)
class LayerShape:
    """One layer of the coordinate network: its fan-in, fan-out and how many weight tokens write it."""

    fan_in: int
    fan_out: int
    groups: int


def layer_shapes(n_features: int, width: int, layers: int, groups: int, outputs: int) -> list[LayerShape]:
    """``layers`` hidden layers written by ``groups`` tokens each, then the output layer written by one token."""
    hidden = [LayerShape(n_features if i == 0 else width, width, groups) for i in range(layers)]
    return [*hidden, LayerShape(width, outputs, 1)]


class _Modulate(torch.autograd.Function):
    """W[b, j] = B[j] * s[b, j mod G] / |B[j] * s[b, j mod G]|, the gradient of the norm folded into small matrices.

    Plain autograd walks the (b, fan_out, fan_in) array about ten times; this does it four times.
    """

    @staticmethod
    def forward(ctx, base: Tensor, scale: Tensor) -> Tensor:  # (J, G, i), (b, G, i) -> (b, J, G, i)
        # |B s|^2 = sum_i B_i^2 s_i^2: one small product per group
        norm2 = torch.einsum("jgi,bgi->bjg", base.square(), scale.square())
        inverse = norm2.clamp_min(1e-20).rsqrt()
        weight = (base * scale[:, None]).mul_(inverse[..., None])
        ctx.save_for_backward(base, scale, inverse, weight)
        return weight

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        base, scale, inverse, weight = ctx.saved_tensors
        along = (weight * grad).sum(-1)  # (b, J, G) part of the gradient that only changes the length
        q = along * inverse.square()
        grad = grad * inverse[..., None]
        d_base = (grad * scale[:, None]).sum(0) - base * torch.einsum("bjg,bgi->jgi", q, scale.square())
        d_scale = (grad * base).sum(1) - scale * torch.einsum("bjg,jgi->bgi", q, base.square())
        return d_base, d_scale


def modulate(base: Tensor, scale: Tensor) -> Tensor:  # (fan_out, fan_in), (b, G, fan_in) -> (b, fan_out, fan_in)
    """Weights with unit rows: unit j is base row j times the scale of group j mod G, divided by its length."""
    b, groups, fan_in = scale.shape
    with torch.autocast(base.device.type, enabled=False):
        return _Modulate.apply(base.view(-1, groups, fan_in), scale.to(base.dtype)).view(b, -1, fan_in)


class Base(nn.Module):
    """The learnt weight (fan_out, fan_in) and bias (fan_out) that all images share."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(shape.fan_in)  # kaiming uniform with a = sqrt 5
        self.weight = nn.Parameter(torch.empty(shape.fan_out, shape.fan_in).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(shape.fan_out).uniform_(-bound, bound))


class GroupHypernet(nn.Module):
    """Multiplicative hypernetwork: token g of a layer scales the inputs of all units j with j mod G = g.

    Args:
        shapes: the layers; ``groups`` must divide ``fan_out`` (the output layer has one group).
        dim: width of the tokens.
    """

    def __init__(self, shapes: Sequence[LayerShape], dim: int) -> None:
        super().__init__()
        self.shapes = tuple(shapes)
        self.bases = nn.ModuleList(Base(shape) for shape in shapes)
        self.heads = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, s.fan_in)) for s in shapes)

    @property
    def n_tokens(self) -> int:
        """Number of weight tokens: groups x hidden layers + 1."""
        return sum(shape.groups for shape in self.shapes)

    def forward(self, tokens: Tensor) -> list[Tensor]:  # (b, n_tokens, dim) -> per layer (b, fan_out, fan_in)
        parts = tokens.split([shape.groups for shape in self.shapes], dim=1)
        layers = zip(self.bases, self.heads, parts, strict=True)
        return [modulate(base.weight, head(part)) for base, head, part in layers]


class LowRankHypernet(nn.Module):
    """Additive hypernetwork (ablation): W = B + U V^T with rank <= G, written by G tokens per layer; unit rows.

    Token g gives column g of U (fan_out) and of V (fan_in). The norms come from small Gram matrices, never from a
    second walk over W.
    """

    def __init__(self, shapes: Sequence[LayerShape], dim: int) -> None:
        super().__init__()
        self.shapes = tuple(shapes)
        self.bases = nn.ModuleList(Base(shape) for shape in shapes)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, s.fan_in + s.fan_out)) for s in shapes
        )

    @property
    def n_tokens(self) -> int:
        """Number of weight tokens: rank x hidden layers + 1."""
        return sum(shape.groups for shape in self.shapes)

    def forward(self, tokens: Tensor) -> list[Tensor]:  # (b, n_tokens, dim) -> per layer (b, fan_out, fan_in)
        weights = []
        parts = tokens.split([shape.groups for shape in self.shapes], dim=1)
        for shape, base, head, part in zip(self.shapes, self.bases, self.heads, parts, strict=True):
            factors = head(part).to(base.weight.dtype)  # (b, G, fan_in + fan_out)
            v, u = factors[..., : shape.fan_in], factors[..., shape.fan_in :] / math.sqrt(shape.fan_in)
            with torch.autocast(u.device.type, enabled=False):
                weight = torch.baddbmm(base.weight, u.transpose(1, 2), v)
                weights.append(weight * low_rank_norm(base.weight, u, v).clamp_min(1e-20).rsqrt()[..., None])
        return weights


def low_rank_norm(base: Tensor, u: Tensor, v: Tensor) -> Tensor:  # (o, i), (b, G, o), (b, G, i) -> (b, o)
    """Squared row norms of B + U^T V without forming it: |B|^2 + 2 u.(B v) + u.(v v^T) u."""
    cross = torch.einsum("oi,bgi->bgo", base, v)
    gram = v @ v.transpose(1, 2)  # (b, G, G)
    return base.square().sum(1) + (u * (2 * cross + gram @ u)).sum(1)


def build_hypernet(kind: str, shapes: Sequence[LayerShape], dim: int) -> GroupHypernet | LowRankHypernet:
    """The hypernetwork named ``groups`` or ``lowrank``."""
    if kind not in HYPERNETS:
        raise ValueError(f"hypernetwork must be one of {', '.join(HYPERNETS)}, is {kind}")
    return GroupHypernet(shapes, dim) if kind == "groups" else LowRankHypernet(shapes, dim)
