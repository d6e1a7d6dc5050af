"""Building blocks of multi-view networks: stems, rotary positions in two dimensions, self- and cross-attention.

Pre-norm transformer blocks (Dosovitskiy et al. 2021) with rotary positions (Su et al. 2021) whose first half of the
channels turns with the row and the second with the column of a patch, as in CroCo and DUSt3R. Norms and the residual
stream stay in float32 under autocast; products and attention run in what autocast says. Parameter names are those of
the released CryoFastAR files where there is a counterpart.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cryosuite.nets.ief import Linear, Mlp, PatchEmbed
from cryosuite.nets.multiview_spec import MultiviewSpec, stem_channels

BASE = 100.0  # of the rotary frequencies
EPS = 1e-6
CPU_SCORES = 1 << 23  # attention weights held at once on a CPU

Pair = tuple[Tensor, Tensor]


def full_precision(x: Tensor) -> AbstractContextManager:
    """Autocast off on the device of x."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def rope_table(grid: int, head_dim: int) -> Pair:  # cos, sin each (grid^2, head_dim)
    """Cosines and sines of the angles by which the channels of patch (row, column) are turned."""
    quarter = head_dim // 4
    frequency = BASE ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(*(torch.arange(grid, dtype=torch.float64),) * 2, indexing="ij")
    angle = torch.cat([axis.reshape(-1, 1) * frequency.repeat(2) for axis in (row, column)], dim=1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, table: Pair | None) -> Tensor:
    """Turn queries or keys (..., T, heads, head_dim) by the positions of their patches; None leaves them."""
    if table is None:
        return x
    cos, sin = (part[:, None].to(x.dtype) for part in table)
    row, column = x.chunk(2, -1)
    (r1, r2), (c1, c2) = row.chunk(2, -1), column.chunk(2, -1)
    return x * cos + torch.cat([-r2, r1, -c2, c1], -1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q (b, n, heads, d) over k, v (b, m, heads, d) -> (b, n, heads * d)."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    plain = q.device.type == "cpu" and q.dtype == torch.bfloat16
    out = _attend_cpu(q, k, v) if plain else F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


def _attend_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in bf16 as two products, some at a time: on CPUs faster than torch's own, backwards several times."""
    b, heads, n, d = q.shape
    rows = max(1, CPU_SCORES // (heads * k.shape[2] * min(b, 64)))
    if n > rows:
        return torch.cat([_attend_cpu(part, k, v) for part in q.split(rows, 2)], 2)
    few = max(1, CPU_SCORES // (heads * n * k.shape[2]))
    if b > few:
        parts = zip(q.split(few), k.split(few), v.split(few), strict=True)
        return torch.cat([_attend_cpu(*part) for part in parts])
    with torch.autocast("cpu", enabled=False):
        q, k, v = (part.reshape(b * heads, -1, d) for part in (q, k, v))
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=d**-0.5)
        return torch.bmm(torch.softmax(scores, -1), v).view(b, heads, n, d)


class SelfAttention(nn.Module):
    """Multi-head attention of an image's patches to one another, qkv with bias."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, table: Pair) -> Tensor:  # (b, T, dim) -> (b, T, dim)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return self.proj(attend(rotate(q, table), rotate(k, table), v))


class CrossAttention(nn.Module):
    """Multi-head attention of all patches of some images to all patches of others of the same set."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projq = Linear(dim, dim)
        self.projk = Linear(dim, dim)
        self.projv = Linear(dim, dim)
        self.proj = Linear(dim, dim)

    def keys_values(self, y: Tensor, table: Pair | None) -> Pair:  # (s, m, T, dim) -> each (s, m T, heads, d)
        """What the images y are asked by and answer; the same for every image that asks."""
        k, v = (proj(y).unflatten(-1, (self.heads, -1)) for proj in (self.projk, self.projv))
        return rotate(k, table).flatten(1, 2), v.flatten(1, 2)

    def forward(self, x: Tensor, source: Pair, table: Pair | None) -> Tensor:  # (s, n, T, dim) -> (s, n, T, dim)
        q = rotate(self.projq(x).unflatten(-1, (self.heads, -1)), table)
        k, v = source
        return self.proj(attend(q.flatten(1, 2), k.to(q.dtype), v.to(q.dtype)).view(x.shape))


class Block(nn.Module):
    """A block of the encoder: x + attention(norm1 x), then x + mlp(norm2 x)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, table: Pair) -> Tensor:  # (b, T, dim) -> (b, T, dim)
        x = x + self.attn(self.norm1(x), table)
        return x + self.mlp(self.norm2(x))


class StarBlock(nn.Module):
    """View Integration and View Update alike: own patches, then those of other images, then the mlp."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.norm_y = nn.LayerNorm(dim, eps=EPS)
        self.cross_attn = CrossAttention(dim, heads)
        self.norm3 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, 4 * dim)

    def keys_values(self, y: Tensor, cross_table: Pair | None) -> Pair:
        """Keys and values of the images that will be asked, (s, m, T, dim) -> each (s, m T, heads, d)."""
        return self.cross_attn.keys_values(self.norm_y(y), cross_table)

    def forward(self, x: Tensor, source: Pair, table: Pair, cross_table: Pair | None) -> Tensor:
        """Update the images x (s, n, T, dim) by the images behind ``source`` (``keys_values``)."""
        flat = x.flatten(0, 1)
        x = x + self.attn(self.norm1(flat), table).view(x.shape)
        x = x + self.cross_attn(self.norm2(x), source, cross_table)
        return x + self.mlp(self.norm3(x))


class ConvStem(nn.Module):
    """Convolutions of 3 x 3 with stride 2 until a patch is one token, then a learnt vector per place."""

    def __init__(self, spec: MultiviewSpec) -> None:
        super().__init__()
        channels = stem_channels(spec)
        pairs = zip(channels[:-1], channels[1:], strict=True)
        self.convs = nn.ModuleList(nn.Conv2d(before, after, 3, 2, 1) for before, after in pairs)
        self.position = nn.Parameter(torch.randn(spec.tokens, spec.enc_dim) * 0.02)

    def forward(self, image: Tensor) -> Tensor:  # (b, c, D, D) -> (b, T, dim), float32
        for i, conv in enumerate(self.convs):
            image = conv(F.gelu(image) if i else image)
        return image.flatten(2).transpose(1, 2).float() + self.position


def make_stem(spec: MultiviewSpec) -> nn.Module:
    """The stem of a spec: images (b, c, D, D) -> tokens (b, T, enc_dim), rows of patches first."""
    return ConvStem(spec) if spec.stem == "conv" else PatchEmbed(spec.patch, spec.enc_dim, spec.in_channels)
