"""A vision transformer that reads one particle image and rewrites a set of learnt weight tokens.

Plain pre-norm transformer (Dosovitskiy et al. 2021) with one change from CryoHype (arXiv 2512.06332): learnable
"weight tokens" are appended to the image tokens and only they are returned; a hypernetwork turns them into the weights
of that particle's volume.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

POSITIONS = ("learned", "sincos", "none")


class Attention(nn.Module):
    """Multi-head self-attention, qkv without bias, output projection with bias."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:  # (b, t, dim), (b, t) bool -> (b, t, dim)
        b, t, dim = x.shape
        mask = None if keys is None else keys[:, None, None, :]  # whom the others may attend to
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        if x.device.type == "cpu":  # torch's CPU attention has a slow backward pass in bf16; float32 costs nothing here
            with torch.autocast("cpu", enabled=False):
                out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (b, heads, t, dim / heads)
        return self.proj(out.transpose(1, 2).reshape(b, t, dim))


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x), with a GELU in the middle of the mlp."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:  # (b, t, dim), (b, t) bool -> (b, t, dim)
        x = x + self.attention(self.norm1(x), keys)
        return x + self.mlp(self.norm2(x))


def sincos_positions(grid: int, dim: int) -> Tensor:
    """Fixed 2-D sine/cosine position code (grid * grid, dim); dim must be a multiple of 4."""
    omega = 1.0 / 10000 ** (torch.arange(dim // 4) / (dim / 4))
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (x, y)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)


class WeightTokenTransformer(nn.Module):
    """Image (b, d, d) -> transformed weight tokens (b, n_tokens, dim).

    The image is cut into non-overlapping patches, each mapped linearly to a token; positions are added (or not: the
    published encoder has none); the weight tokens are appended and everything passes ``depth`` blocks. There is no
    final norm: the heads of the hypernetwork normalise.

    Args:
        image_size: d, a multiple of ``patch``.
        n_context: length of an optional vector per image (pose, defocus), mapped and added to all image tokens.
    """

    def __init__(
        self,
        image_size: int,
        patch: int,
        n_tokens: int,
        dim: int = 768,
        depth: int = 6,
        heads: int = 12,
        pos_embed: str = "learned",
        n_context: int = 0,
    ) -> None:
        super().__init__()
        if image_size % patch or dim % heads or pos_embed not in POSITIONS:
            raise ValueError(
                f"image size {image_size} must be a multiple of the patch {patch}, width {dim} of the number of "
                f"heads {heads}, and the position code one of {', '.join(POSITIONS)} (is {pos_embed})"
            )
        self.patch, self.n_tokens, grid = patch, n_tokens, image_size // patch
        self.embed = nn.Linear(patch * patch, dim)
        self.context = nn.Linear(n_context, dim) if n_context else None
        self.tokens = nn.Parameter(torch.randn(n_tokens, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        if pos_embed == "learned":
            self.position = nn.Parameter(torch.randn(grid * grid, dim) * 0.02)
        else:
            fixed = sincos_positions(grid, dim) if pos_embed == "sincos" else torch.zeros(1, dim)
            self.register_buffer("position", fixed, persistent=False)

    def forward(self, image: Tensor, context: Tensor | None = None) -> Tensor:
        """(b, d, d) and perhaps (b, n_context) -> (b, n_tokens, dim)."""
        b, d, p = image.shape[0], image.shape[-1], self.patch
        patches = image.view(b, d // p, p, d // p, p).transpose(2, 3).reshape(b, (d // p) ** 2, p * p)
        x = self.embed(patches) + self.position
        if self.context is not None and context is not None:
            x = x + self.context(context)[:, None]
        x = torch.cat([x, self.tokens.to(x.dtype).expand(b, -1, -1)], dim=1)
        for block in self.blocks:
            x = block(x)
        return x[:, -self.n_tokens :]


def best_patch(image_size: int, target: int = 8) -> int:
    """The patch size that divides the image and gives as nearly as possible ``target`` patches per side."""
    divisors = [p for p in range(1, image_size + 1) if image_size % p == 0]
    return min(divisors, key=lambda p: abs(math.log(image_size / p / target)))
