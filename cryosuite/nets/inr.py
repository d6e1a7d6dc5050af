"""Coordinate networks for the Fourier transform of a volume: features of a 3-D frequency, then a residual ReLU network.

A field answers one question: the complex value at frequency q (cycles per pixel) for given weights. A real volume has
F(-q) = conj F(q): the network is only ever evaluated in the half space q_z >= 0 and the sign of the imaginary part
follows (``field="complex"``), or it gives the Hartley transform Re F - Im F and is evaluated at q and at -q
(``field="hartley"``, as published: twice the work).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

FIELDS = ("complex", "hartley")


class FourierFeatures(nn.Module):
    """Random Fourier features [sin(q.f_m), cos(q.f_m)] with frozen f_m ~ N(0, scale^2) (Tancik et al. 2020).

    ``scale / 2 pi`` is the spread of the features in real space, in pixels. Phases are computed in float32.
    """

    def __init__(self, n_frequencies: int, scale: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.size = 2 * n_frequencies
        self.register_buffer("frequencies", torch.randn(3, n_frequencies, generator=generator) * scale)

    def forward(self, q: Tensor) -> Tensor:  # (..., 3) cycles/px -> (..., 2 m)
        with torch.autocast(q.device.type, enabled=False):
            twice = torch.cat([self.frequencies, self.frequencies], dim=1)
            quarter = torch.zeros_like(twice[0])
            quarter[self.size // 2 :] = math.pi / 2  # cos x = sin(x + pi / 2): one product, one pass in place
            return F.linear(q.to(twice.dtype), twice.T, quarter).sin_()


def half_space(q: Tensor) -> Tensor:  # (..., 3) -> (...,)
    """+1 where q_z > 0, else -1 (ties: q_y, then q_x): the network sees sign * q, and Im is multiplied by sign."""
    x, y, z = q.unbind(-1)
    positive = (z > 0) | ((z == 0) & ((y > 0) | ((y == 0) & (x >= 0))))
    return positive.to(q.dtype) * 2 - 1


class _Layer(torch.autograd.Function):
    """relu(x W^T + b) with one product and one in-place ReLU; keeps x, W and the result, nothing else."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # (b, P, i), (b, o, i), (o,) -> (b, P, o)
        out = torch.baddbmm(bias, x, weight.transpose(1, 2)).relu_()
        ctx.save_for_backward(x, weight, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight, out = ctx.saved_tensors
        grad = out.sign().mul_(
            grad
        )  # out >= 0; on a CPU far faster than threshold_backward, which mispredicts branches
        d_x = torch.bmm(grad, weight) if ctx.needs_input_grad[0] else None
        return d_x, torch.bmm(grad.transpose(1, 2), x), grad.sum((0, 1))


def relu_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # (b, P, i), (b, o, i), (o,) -> (b, P, o)
    """relu(x W^T + b) as one product and one in-place ReLU."""
    return _Layer.apply(x, weight, bias)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The type products run in here: autocast's where it is on, else the tensor's own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def mlp(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """h_0 = relu(x W_0 + b_0), h_l = relu(h W_l + b_l + h), y = h W + b, one set of weights per image.

    The residual is folded into the matrix (W + 1), so a layer is one ``baddbmm`` and one in-place ReLU.

    Args:
        x: (b, P, features). weights: per layer (b, fan_out, fan_in). biases: per layer (fan_out,).

    Returns:
        (b, P, outputs).
    """
    dtype = autocast_dtype(x)
    x = x.to(dtype)
    for index, (weight, bias) in enumerate(zip(weights[:-1], biases[:-1], strict=True)):
        if index > 0:
            weight = weight + torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
        x = relu_layer(x, weight.to(dtype), bias.to(dtype))
    return torch.baddbmm(biases[-1].to(dtype), x, weights[-1].to(dtype).transpose(1, 2))


class HyperField(nn.Module):
    """Fourier field of a volume whose matrices come from outside, one set per image; holds only the features.

    Args:
        features: module (b, P, 3) -> (b, P, features).
        field: ``complex`` (two outputs, half space) or ``hartley`` (one output, evaluated at q and -q).
        low_memory: recompute the network in the backward pass instead of keeping its activations.
    """

    def __init__(self, features: nn.Module, field: str = "complex", low_memory: bool = False) -> None:
        super().__init__()
        if field not in FIELDS:
            raise ValueError(f"field must be one of {', '.join(FIELDS)}, is {field}")
        self.features, self.field, self.low_memory = features, field, low_memory

    @property
    def outputs(self) -> int:
        """Values the network gives per point: 2 (real, imaginary) or 1 (Hartley)."""
        return 2 if self.field == "complex" else 1

    def network(self, q: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        """Features and network at q: (b, P, 3) -> (b, P, outputs)."""
        return mlp(self.features(q), weights, biases)

    def forward(self, q: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        """The complex value at q as (b, P, 2) real numbers (Re, Im), float32.

        q: (b, P, 3) cycles/px. weights: per layer (b, fan_out, fan_in). biases: per layer (fan_out,).
        """
        if self.field == "hartley":
            here, there = self._run(torch.cat([q, -q], dim=1), weights, biases).float().squeeze(-1).chunk(2, dim=1)
            return torch.stack([here + there, there - here], dim=-1) / 2
        sign = half_space(q)
        values = self._run(q * sign[..., None], weights, biases).float()
        return values * torch.stack([torch.ones_like(sign), sign], dim=-1)

    def _run(self, q: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        if self.low_memory and torch.is_grad_enabled():
            return checkpoint(self.network, q, weights, biases, use_reentrant=False)
        return self.network(q, weights, biases)


class ConcatField(HyperField):
    """The ablation: one network for all images, which sees the image's latent beside the coordinate features.

    Concatenating z to the features of every point is the same as adding z W_z once per image to the first layer.
    """

    def __init__(
        self, features: nn.Module, zdim: int, width: int, layers: int, field: str = "complex", low_memory: bool = False
    ) -> None:
        super().__init__(features, field, low_memory)
        self.first = nn.Linear(features.size, width)
        self.latent = nn.Linear(zdim, width, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers - 1))
        self.last = nn.Linear(width, self.outputs)
        bound = 1.0 / math.sqrt(features.size + zdim)
        nn.init.uniform_(self.first.weight, -bound, bound)
        nn.init.uniform_(self.latent.weight, -bound, bound)

    def network(self, q: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        """Features and network at q, conditioned on weights = [z (b, zdim)]: (b, P, 3) -> (b, P, outputs)."""
        h = (self.first(self.features(q)) + self.latent(weights[0])[:, None]).relu_()
        for layer in self.hidden:
            h = (layer(h) + h).relu_()
        return self.last(h)
