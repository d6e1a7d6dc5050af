"""The Cryo-IEF encoder: a vision transformer whose blocks have a batch norm as their second norm.

A plain pre-norm ViT (Dosovitskiy et al. 2021) on particle images of one channel, with the fixed sine/cosine positions
of MoCo v3 and, as in the released Cryo-IEF weights, BatchNorm over all tokens of the batch before every mlp. In eval
mode an image's features depend on that image alone; in train mode they depend on the batch. State keys are those of the
released files without their head (186 tensors at depth 12), so weights go either way unchanged.

The few layers are written here rather than taken from timm, which needs longer to import (2.6 s) than a small set to
encode; the names inside are timm's, because the files' keys are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cryosuite.kernels.layers import product

NORMS = ("bn", "ln")
CPU_SCORES = 1 << 24  # attention weights held at once on a CPU


@dataclass(frozen=True)
class IefSpec:
    """The shape of an encoder.

    size: its name. dim: C, length of a feature. image_size and patch in pixels. norm2: the norm before every mlp, "bn"
    (the released files) or "ln" (for small training batches). Raises ValueError for sizes that do not go together.
    """

    size: str = "vit_small"
    dim: int = 384
    depth: int = 12
    heads: int = 12
    patch: int = 14
    image_size: int = 224
    norm2: str = "bn"
    channels: int = 1

    def __post_init__(self) -> None:
        if self.dim % self.heads or self.dim % 4 or self.image_size % self.patch or self.norm2 not in NORMS:
            raise ValueError(
                f"an encoder's width ({self.dim}) must be a multiple of 4 and of its heads ({self.heads}), its image "
                f"size ({self.image_size}) one of its patch ({self.patch}), norm2 ({self.norm2}) one of bn, ln"
            )

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch


SPECS = {
    "vit_small": IefSpec(),
    "vit_base": IefSpec("vit_base", dim=768, heads=12),
    "vit_tiny": IefSpec("vit_tiny", dim=192, depth=6, heads=6, image_size=112),
}


def make_spec(size: str, norm2: str = "bn") -> IefSpec:
    """The spec of a size in SPECS with the norm wanted; KeyError for an unknown size."""
    return replace(SPECS[size], norm2=norm2)


class Linear(nn.Linear):
    """A linear layer whose float32 product on a CPU is that of ``kernels.layers``, twice as fast on some."""

    def forward(self, x: Tensor) -> Tensor:  # (..., n) -> (..., m)
        return product(x, self.weight, self.bias)


class PatchEmbed(nn.Module):
    """Patches of an image to tokens: a convolution whose stride is its width, done as one matrix product."""

    def __init__(self, patch: int, dim: int, channels: int = 1) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, image: Tensor) -> Tensor:  # (b, c, s, s) -> (b, (s / patch)^2, dim), rows of patches first
        b, c, height, width = image.shape
        p = self.patch
        patches = image.view(b, c, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        return product(patches.reshape(b, -1, c * p * p), self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention, qkv with bias."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, first_only: bool = False) -> Tensor:
        """(b, t, dim) -> (b, t, dim); with ``first_only`` the answer of the first token alone, (b, 1, dim)."""
        b, t, dim = x.shape
        if first_only:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = product(x[:, :1], weight[:dim], bias[:dim]).view(b, 1, self.heads, -1).transpose(1, 2)
            k, v = product(x, weight[dim:], bias[dim:]).view(b, t, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (b, heads, t, dim / heads)
        plain = x.device.type == "cpu" and q.dtype == torch.bfloat16
        out = _attention_cpu(q, k, v) if plain else F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, -1, dim))


def _attention_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of bf16 (b, heads, t, d) as two products, a few images at a time.

    On CPUs that is twice as fast as torch's own, with gradients six times.
    """
    b, heads, t, d = q.shape
    few = max(1, CPU_SCORES // (heads * t * k.shape[2]))
    if b > few:
        parts = zip(q.split(few), k.split(few), v.split(few), strict=True)
        return torch.cat([_attention_cpu(*part) for part in parts])
    with torch.autocast("cpu", enabled=False):
        q, k, v = (part.reshape(b * heads, -1, d) for part in (q, k, v))
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=d**-0.5)
        return torch.bmm(torch.softmax(scores, -1), v).view(b, heads, t, d)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:  # (..., dim) -> (..., dim)
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm1 x), then x + mlp(norm2 x)."""

    def __init__(self, dim: int, heads: int, norm2: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.BatchNorm1d(dim) if norm2 == "bn" else nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:  # (b, t, dim) -> (b, t, dim)
        x = x + self._run(self._attend, x)
        return x + self._run(self.mlp, self._second_norm(x))

    def first_token(self, x: Tensor) -> Tensor:
        """What ``forward`` gives for the first token, (b, dim), without the work that only the others need.

        While a batch norm is training all tokens must reach it, for they are its statistics.
        """
        if self.training and isinstance(self.norm2, nn.modules.batchnorm._BatchNorm):
            x = x + self._run(self._attend, x)
            return x[:, 0] + self._run(self.mlp, self._second_norm(x)[:, 0])
        x = x[:, :1] + self.attn(self.norm1(x), first_only=True)
        return (x + self._run(self.mlp, self._second_norm(x)))[:, 0]

    def _second_norm(self, x: Tensor) -> Tensor:
        """The norm before the mlp; a batch norm counts every token of every image as one sample.

        The flattening is done here: torch's conversion to synchronised batch norm puts a plain module in its place.
        """
        return self.norm2(x.flatten(0, 1)).view_as(x)

    def _attend(self, x: Tensor) -> Tensor:
        return self.attn(self.norm1(x))

    def _run(self, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``part(x)``; with checkpointing its inner values are computed again backwards. The batch norm lies outside,
        so its running statistics move once per step."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(part, x, use_reentrant=False)
        return part(x)


class IefEncoder(nn.Module):
    """Normalised particle images -> one feature vector each.

    ``pos_embed`` is a parameter that never trains. ``forward`` gives the class token after the final norm, which is the
    feature of Cryo-IEF. Images of another size than the spec's are taken as well, as long as they are a multiple of
    the patch: positions are then resampled bicubically.
    """

    def __init__(self, spec: IefSpec) -> None:
        super().__init__()
        self.spec = spec
        dim = spec.dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(spec.grid, dim), requires_grad=False)
        self.patch_embed = PatchEmbed(spec.patch, dim, spec.channels)
        self.blocks = nn.ModuleList(Block(dim, spec.heads, spec.norm2) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self._initialise()

    def forward(self, image: Tensor, kept: Tensor | None = None) -> Tensor:
        """(b, 1, s, s) normalised -> features (b, dim): the class token after the final norm.

        ``kept`` (b, k) int64: numbers of the patches, from 0, that are looked at; training on a part of them is faster.
        """
        x = self._embed(image)
        if kept is not None:
            x = torch.cat([x[:, :1], x[:, 1:].gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))], dim=1)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.norm(self.blocks[-1].first_token(x))

    def tokens(self, image: Tensor) -> Tensor:
        """(b, 1, s, s) normalised -> all tokens after the final norm (b, 1 + (s / patch)^2, dim), class token first."""
        x = self._embed(image)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def set_checkpointing(self, on: bool = True) -> None:
        """Trade time for memory in training: attention and mlp of every block are computed again backwards."""
        for block in self.blocks:
            block.checkpointing = on

    def _embed(self, image: Tensor) -> Tensor:
        spec, side = self.spec, image.shape[-1]
        if image.ndim != 4 or image.shape[1] != spec.channels or image.shape[-2] != side or side % spec.patch:
            raise ValueError(
                f"the encoder takes images (b, {spec.channels}, s, s) with s a multiple of {spec.patch}, not "
                f"{tuple(image.shape)}"
            )
        x = self.patch_embed(image)
        position = self._positions(side // spec.patch).to(x.dtype)
        first = (self.cls_token + position[:, :1].to(self.cls_token.dtype)).to(x.dtype)
        return torch.cat([first.expand(len(x), -1, -1), x + position[:, 1:]], dim=1)

    def _positions(self, grid: int) -> Tensor:
        """(1, 1 + grid^2, dim): the stored positions, resampled to another number of patches per side."""
        stored = self.pos_embed
        if grid == self.spec.grid:
            return stored
        square = stored[:, 1:].reshape(1, self.spec.grid, self.spec.grid, -1).permute(0, 3, 1, 2)
        square = F.interpolate(square.float(), size=(grid, grid), mode="bicubic", antialias=True)
        return torch.cat([stored[:, :1], square.flatten(2).transpose(1, 2).to(stored.dtype)], dim=1)

    def _initialise(self) -> None:
        """MoCo v3: qkv uniform as three separate matrices, xavier-uniform elsewhere, zero biases."""
        if self.cls_token.is_meta:  # only the shapes are wanted; torch would load its compiler to draw nothing
            return
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                if name.endswith("qkv"):
                    bound = math.sqrt(6.0 / (layer.out_features // 3 + layer.in_features))
                    nn.init.uniform_(layer.weight, -bound, bound)
                else:
                    nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.cls_token, std=1e-6)
        bound = math.sqrt(6.0 / (3 * self.spec.patch**2 + self.spec.dim))  # the 3 of colour images, as published
        nn.init.uniform_(self.patch_embed.proj.weight, -bound, bound)
        nn.init.zeros_(self.patch_embed.proj.bias)


def sincos_positions(grid: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The positions of Cryo-IEF (1, 1 + grid^2, dim): zeros for the class token, then row-major patches.

    Patch (row y, column x) has [sin(y w), cos(y w), sin(x w), cos(x w)] with w_j = 10000^(-j / P), P = dim / 4.
    """
    quarter = dim // 4
    omega = 10000.0 ** (-np.arange(quarter) / quarter)
    y, x = np.divmod(np.arange(grid**2), grid)
    code = np.concatenate([f(axis[:, None] * omega) for axis in (y, x) for f in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros((1, dim)), code]))[None].to(dtype)
