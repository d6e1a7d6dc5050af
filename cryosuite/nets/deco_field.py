"""CryoDECO's decoder: one residual network with layer norms for all particles, which sees a latent beside the point.

    gamma = [sin a, cos a],  a_m = (D / 2) q . f_m,  f_m ~ N(0, scale^2) frozen
    h = relu(LN(W0 [gamma, z] + b0));   h = relu(LN(W h + b) + h), ``layers`` times;   value = w h + c

What is fast here: W0 [gamma, z] = Wg gamma + (Wz z + b0), so the latent costs one product per image and not per point,
and Wg gamma of points that many images share (`base_features`) is computed once; phases are one product, never
(points, m, 3) numbers; only one of each Friedel pair is evaluated (``field="complex"``); without gradients points go
through all layers in blocks that fit the processor's cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cryosuite.errors import InputError
from cryosuite.kernels.layers import fourier_features, norm_relu, product
from cryosuite.nets.inr import FIELDS, FourierFeatures, half_space

NORM_EPS = 1e-5
CPU_BLOCK = 1 << 18  # values of one activation in a block without gradients: 1 MB, a core's own cache
DEVICE_BLOCK = 1 << 27


class PointFeatures(NamedTuple):
    """What the decoder computes of points before it sees a latent.

    Attributes:
        inner: (..., n, width), Wg gamma at the points where the network is evaluated.
        sign: (..., n), +1 or -1, by which the imaginary part is multiplied; None for a Hartley field, whose ``inner``
            holds q and -q one after the other, (..., 2 n, width).
    """

    inner: Tensor
    sign: Tensor | None


class DecoField(nn.Module):
    """Fourier field of volumes conditioned on a latent (CryoDECO; without layer norms DRGN-AI's ``HyperVolume``).

    Args:
        zdim: length of a latent. width: of the layers. layers: residual layers after the first.
        n_frequencies: m random frequencies. scale: their spread. box_size: D, which sets their unit.
        layer_norm: False for DRGN-AI's form.
        field: ``complex`` (real and imaginary part, half space) or ``hartley`` (Re - Im at q and -q, as published).
        low_memory: recompute activations in the backward pass.
    """

    def __init__(
        self,
        zdim: int,
        width: int = 256,
        layers: int = 3,
        n_frequencies: int = 192,
        scale: float = 0.5,
        layer_norm: bool = True,
        field: str = "complex",
        box_size: int = 128,
        low_memory: bool = False,
    ) -> None:
        super().__init__()
        if field not in FIELDS:
            raise ValueError(f"field must be one of {', '.join(FIELDS)}, is {field}")
        self.zdim, self.width, self.field, self.box_size, self.low_memory = zdim, width, field, box_size, low_memory
        self.features = FourierFeatures(n_frequencies, scale * (box_size // 2))
        self.first = nn.Linear(self.features.size + zdim, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width, NORM_EPS) for _ in range(layers + 1)) if layer_norm else None
        self.last = nn.Linear(width, self.outputs)

    @property
    def outputs(self) -> int:
        """Values the network gives per point: 2 (real, imaginary) or 1 (Hartley)."""
        return 2 if self.field == "complex" else 1

    # values at points -------------------------------------------------------------------------------------------------

    def forward(self, q: Tensor, z: Tensor) -> Tensor:  # (b, P, 3) cycles/px, (b, zdim) -> (b, P, 2)
        """Real and imaginary part of each image's volume at its points, float32 (float64 for a float64 network)."""
        if self.field == "hartley":
            return self._read_out(self.network(torch.cat([q, -q], dim=1), z), None)
        sign = half_space(q)
        return self._read_out(self.network(q * sign[..., None], z), sign)

    def network(self, q: Tensor, z: Tensor) -> Tensor:  # (b, P, 3), (b, zdim) -> (b, P, outputs)
        """The bare network at q: the Hartley value, or (Re, Im) where q lies in the half space."""
        return self._in_blocks(self._from_points, q, self._shift(z))

    def base_features(self, q: Tensor) -> PointFeatures:  # (..., n, 3) cycles/px
        """The part of the first layer that no latent changes, for points that many images share."""
        if self.field == "hartley":
            return PointFeatures(self._inner(torch.cat([q, -q], dim=-2)), None)
        sign = half_space(q)
        return PointFeatures(self._inner(q * sign[..., None]), sign)

    def from_features(self, base: PointFeatures, z: Tensor) -> Tensor:  # (n, width) or (b, n, width), (b, zdim)
        """Real and imaginary part (b, n, 2) at points of `base_features`, shared or one set per image."""
        inner = base.inner.expand(len(z), *base.inner.shape[-2:])
        return self._read_out(self._in_blocks(self._from_inner, inner, self._shift(z)), base.sign)

    def _read_out(self, values: Tensor, sign: Tensor | None) -> Tensor:
        values = values if values.dtype == torch.float64 else values.float()
        if self.field == "hartley":
            here, there = values.squeeze(-1).chunk(2, dim=-1)
            return torch.stack([here + there, there - here], dim=-1) / 2
        return values * torch.stack([torch.ones_like(sign), sign], dim=-1)

    # layers -----------------------------------------------------------------------------------------------------------

    def _shift(self, z: Tensor) -> Tensor:  # (b, zdim) -> (b, 1, width)
        """What the latent and the bias add to the first layer."""
        weight, bias = self.first.weight[:, self.features.size :], self.first.bias
        return F.linear(z.to(bias.dtype), weight, bias)[:, None]

    def _inner(self, q: Tensor) -> Tensor:  # (..., 3) -> (..., width)
        gamma = fourier_features(q, self.features.frequencies)
        return product(gamma, self.first.weight[:, : self.features.size])

    def _from_points(self, q: Tensor, shift: Tensor) -> Tensor:
        return self._from_inner(self._inner(q), shift)

    def _from_inner(self, inner: Tensor, shift: Tensor) -> Tensor:  # (b, P, width), (b, 1, width) -> (b, P, outputs)
        h = self._normed(inner + shift.to(inner.dtype), None, 0)
        for number, layer in enumerate(self.hidden, start=1):
            h = self._normed(product(h, layer.weight, layer.bias), h, number)
        return product(h, self.last.weight, self.last.bias)

    def _normed(self, x: Tensor, residual: Tensor | None, number: int) -> Tensor:
        """relu(LN(x) + residual); ``x`` is a fresh product and may be written over."""
        if self.norms is None:
            return torch.relu_(x if residual is None else x.add_(residual))
        norm = self.norms[number]
        return norm_relu(x, residual, norm.weight, norm.bias, NORM_EPS)

    # blocks -----------------------------------------------------------------------------------------------------------

    def _in_blocks(self, run, points: Tensor, shift: Tensor) -> Tensor:
        """``run`` over (b, P, ...) points and (b, 1, width) shifts, in blocks where nothing is kept for gradients."""
        keep = torch.is_grad_enabled() and (shift.requires_grad or points.requires_grad)
        if keep and not self.low_memory:
            return run(points, shift)
        block = max(1, (CPU_BLOCK if points.device.type == "cpu" else DEVICE_BLOCK) // self.width)
        per_image = min(block, points.shape[1])
        images = max(1, block // max(per_image, 1))
        rows = []
        for some, own in zip(points.split(images), shift.split(images), strict=True):
            parts = [
                checkpoint(run, part, own, use_reentrant=False) if keep else run(part, own)
                for part in some.split(max(per_image, 1), dim=1)
            ]
            rows.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    # published weights ------------------------------------------------------------------------------------------------

    @classmethod
    def from_published(cls, state: Mapping[str, Tensor], box_size: int) -> DecoField:
        """A Hartley field with the weights of a published ``hypervolume_state_dict``; ``box_size``: D of its training.

        Raises:
            InputError: the state is not that of a CryoDECO or DRGN-AI multilayer decoder.
        """
        linear, norms = published_layers(state)
        m = len(state["rand_freqs"])
        width, inputs = linear[0][0].shape
        layers = len(linear) - 2
        field = cls(inputs - 2 * m, width, layers, m, layer_norm=bool(norms), field="hartley", box_size=box_size)
        return field.load_published(state)

    @torch.no_grad()
    def load_published(self, state: Mapping[str, Tensor]) -> DecoField:
        """Take the weights of a published ``hypervolume_state_dict`` (CryoDECO, DRGN-AI); every tensor must fit.

        Raises:
            InputError: other keys, other shapes, or this field is not ``hartley``.
        """
        linear, norms = published_layers(state)
        own = [self.first, *self.hidden, self.last]
        pairs = [(mine.weight, theirs[0]) for mine, theirs in zip(own, linear, strict=False)]
        pairs += [(mine.bias, theirs[1]) for mine, theirs in zip(own, linear, strict=False)]
        for mine, theirs in zip(self.norms or [], norms, strict=False):
            pairs += [(mine.weight, theirs[0]), (mine.bias, theirs[1])]
        pairs.append((self.features.frequencies, state["rand_freqs"].T))
        same = len(linear) == len(own) and len(norms) == len(self.norms or [])
        wrong = [f"{tuple(b.shape)} for {tuple(a.shape)}" for a, b in pairs if a.shape != b.shape]
        if wrong or not same:
            detail = ", ".join(wrong[:5]) or f"{len(linear)} layers and {len(norms)} norms"
            raise InputError(f"these decoder weights do not fit the network that was asked for: {detail}")
        for mine, theirs in pairs:
            mine.copy_(theirs)
        self.features.frequencies.mul_(self.box_size // 2)
        return self


Pair = tuple[Tensor, Tensor]


def published_layers(state: Mapping[str, Tensor]) -> tuple[list[Pair], list[Pair]]:
    """(weight, bias) of the matrices and of the norms of a published decoder, in the order they are applied.

    Raises:
        InputError: a bias is missing, a matrix is none, or there are no frequencies.
    """
    numbered = sorted((key for key in state if key.endswith(".weight")), key=_place)
    found = [(state[key], state.get(key[: -len("weight")] + "bias")) for key in numbered]
    linear, norms = [p for p in found if p[0].ndim == 2], [p for p in found if p[0].ndim == 1]
    whole = all(bias is not None for _, bias in found) and 2 * len(found) + 1 == len(state)
    if "rand_freqs" not in state or len(linear) < 2 or not whole or len(norms) not in (0, len(linear) - 1):
        shown = ", ".join(sorted(state)[:5])
        raise InputError(
            f"these are not the weights of a CryoDECO or DRGN-AI decoder (rand_freqs and layers): found {shown} ..."
        )
    return linear, norms


def _place(key: str) -> list[int]:
    """The numbers in a key, so that layer 10 comes after layer 9."""
    return [int(part) for part in key.split(".") if part.isdigit()]
