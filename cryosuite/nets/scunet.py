"""SCUNet for density maps: a U-shaped network of SC blocks on four grids (48 -> 24 -> 12 -> 6 voxels per edge).

    head Conv3(1 -> d); 3 x [n SC blocks, Conv 2x2x2 stride 2, C -> 2C]; bottleneck n SC blocks (8d);
    3 x [ConvT 2x2x2 stride 2 of (z + skip), C -> C/2, n SC blocks]; tail Conv3(d -> 1) of (z + head)

The encoder is pre-trained by itself (``nets.jepa``) and its state loads into the whole network under ``encoder.``.
Windows of 4 tokens on the three finer grids, shifted in every other block; on the coarsest the window holds the whole
grid of a 48-voxel crop. Any box goes in: its far ends are padded to a multiple of 8 by repeating the last voxel.

CryoLVM's encoder (its widths are not published) in the form of EMReady's network; counts: ``flops`` and the tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cryosuite.nets.scunet_blocks import SCBlock, Visible, conv
from cryosuite.nets.scunet_windows import window_plan

__all__ = ["TOKEN", "ScunetSpec", "SPECS", "Encoder", "Decoder", "Scunet", "flops"]

LEVELS = 3  # times the grid is halved
TOKEN = 2**LEVELS  # voxels per edge of a token of the coarsest grid


@dataclass(frozen=True)
class ScunetSpec:
    """The shape of a network.

    Attributes:
        d: channels of the finest grid, even; doubled at every level.
        n: SC blocks per stage.
        window: longest edge of a window on the three finer grids; bottleneck: the same on the coarsest.
        head_dim: width of an attention head; mlp: width of the hidden layer over that of a token.
        drop_path: probability of the last block's branches to be skipped in training, rising from 0 at the first.

    Raises ValueError for sizes that do not go together.
    """

    d: int = 24
    n: int = 1
    window: int = 4
    bottleneck: int = 6
    head_dim: int = 16
    mlp: int = 4
    drop_path: float = 0.2

    def __post_init__(self) -> None:
        sizes = (self.d, self.n, self.window, self.bottleneck, self.head_dim, self.mlp)
        if any(type(size) is not int or size < 1 for size in sizes) or self.d % 2:
            raise ValueError(f"the sizes of a SCUNet must be whole numbers from 1, d even: {self}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, not {self.drop_path}")

    @property
    def features(self) -> int:
        """Channels of the coarsest grid, 8 d."""
        return self.d << LEVELS

    def block(self, level: int, decoder: bool, i: int) -> SCBlock:
        """SC block i of a stage. At each level the shift alternates, over encoder and decoder together."""
        place = (level if not decoder else 2 * LEVELS - level) * self.n + i
        drop = self.drop_path * place / max(1, (2 * LEVELS + 1) * self.n - 1)
        coarsest = level == LEVELS
        shifted = not coarsest and (i + (self.n if decoder else 0)) % 2 == 1
        limit = self.bottleneck if coarsest else self.window
        return SCBlock(self.d << level, self.head_dim, limit, shifted, self.mlp, drop)


SPECS = {
    "micro": ScunetSpec(d=8),
    "small": ScunetSpec(d=16),
    "default": ScunetSpec(),
    "medium": ScunetSpec(d=32),
    "large": ScunetSpec(d=32, n=2),
    "d48": ScunetSpec(d=48),
    "d64": ScunetSpec(d=64),
}


def padded_to_tokens(x: Tensor) -> Tensor:  # (b, 1, z, y, x) -> (b, 1, z', y', x')
    """Repeat the last voxels until every edge is a multiple of 8."""
    missing = [-n % TOKEN for n in x.shape[2:]]
    return F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]), mode="replicate") if any(missing) else x


class Encoder(nn.Module):
    """Map crops (b, 1, z, y, x) -> features of four grids; the last, (b, z/8, y/8, x/8, 8d), is the embedding."""

    def __init__(self, spec: ScunetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.head = nn.Conv3d(1, spec.d, 3, padding=1)
        self.stages = nn.ModuleList(
            nn.ModuleList(spec.block(level, False, i) for i in range(spec.n)) for level in range(LEVELS + 1)
        )
        self.downs = nn.ModuleList(nn.Conv3d(spec.d << i, spec.d << (i + 1), 2, 2) for i in range(LEVELS))

    def forward(self, x: Tensor, visible: Tensor | None = None) -> list[Tensor]:
        """All that the decoder needs.

        Args:
            x: (b, 1, z, y, x), edges of any length (padded to multiples of 8).
            visible: (b, z/8, y/8, x/8) bool, the tokens that are shown; the features of the others are zero and,
                if their voxels in x are constant, nothing depends on them. Needs edges that are multiples of 8.

        Returns:
            Five arrays, channels last: the inputs of the four stages, (b, z, y, x, d), (b, z/2, .., 2d),
            (b, z/4, .., 4d), (b, z/8, .., 8d), and the output of the last, which is the embedding.

        Raises:
            ValueError: not (b, 1, z, y, x), or tokens that do not fit.
        """
        if x.ndim != 5 or x.shape[1] != 1:
            raise ValueError(f"map crops must be (b, 1, z, y, x), not {tuple(x.shape)}")
        grid = (x.shape[0], *(n // TOKEN for n in x.shape[2:]))
        if visible is not None and (tuple(visible.shape) != grid or any(n % TOKEN for n in x.shape[2:])):
            raise ValueError(f"tokens {tuple(visible.shape)} do not fit crops {tuple(x.shape)} of 8 voxels per token")
        z = conv(padded_to_tokens(x).movedim(1, -1), self.head)
        features = []
        for level, blocks in enumerate(self.stages):
            shown = None if visible is None else Visible.at(visible, TOKEN >> level)
            z = z if shown is None else shown.zeroed(z)
            features.append(z)
            for block in blocks:
                z = block(z, shown)
            if level < LEVELS:
                z = conv(z, self.downs[level])
        return [*features, z]


class Decoder(nn.Module):
    """Features of the four grids -> a map (b, 1, z, y, x), without an activation at the end."""

    def __init__(self, spec: ScunetSpec) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.ConvTranspose3d(spec.d << (i + 1), spec.d << i, 2, 2) for i in range(LEVELS))
        self.stages = nn.ModuleList(
            nn.ModuleList(spec.block(level, True, i) for i in range(spec.n)) for level in range(LEVELS)
        )
        self.tail = nn.Conv3d(spec.d, 1, 3, padding=1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """What ``Encoder`` gives -> (b, 1, z, y, x) float of the features' dtype."""
        *skips, z = features
        for level in reversed(range(LEVELS)):
            z = conv(z + skips[level + 1], self.ups[level])
            for block in self.stages[level]:
                z = block(z)
        return conv(z + skips[0], self.tail).movedim(-1, 1)


class Scunet(nn.Module):
    """The whole network: (b, 1, z, y, x) -> (b, 1, z, y, x), any edges."""

    def __init__(self, spec: ScunetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)

    def forward(self, x: Tensor) -> Tensor:
        z, y, w = x.shape[2:]
        return self.decoder(self.encoder(x))[:, :, :z, :y, :w]


def flops(spec: ScunetSpec, edge: int | tuple[int, int, int] = 48) -> tuple[float, float]:
    """Floating point operations of a forward pass on one crop: encoder, decoder. Products only, two per multiply-add.

    A training step costs three times as much.
    """
    edges = (edge,) * 3 if isinstance(edge, int) else edge
    grids = [tuple(math.ceil(n / TOKEN) * (TOKEN >> level) for n in edges) for level in range(LEVELS + 1)]
    finest = math.prod(grids[0])
    blocks = [spec.n * _block_products(spec, level, grids[level]) for level in range(LEVELS + 1)]
    resampling = sum(8 * (spec.d << i) * (spec.d << (i + 1)) * math.prod(grids[i + 1]) for i in range(LEVELS))
    ends = 27 * spec.d * finest
    return 2.0 * (ends + sum(blocks) + resampling), 2.0 * (ends + sum(blocks[:LEVELS]) + resampling)


def _block_products(spec: ScunetSpec, level: int, grid: tuple[int, ...]) -> float:
    """Multiply-adds of one SC block: two 1x1x1, two 3x3x3, and the transformer's products and scores."""
    channels, half = spec.d << level, (spec.d << level) // 2
    plan = window_plan(grid, spec.bottleneck if level == LEVELS else spec.window, False, torch.device("cpu"))
    convolutions = 2 * channels**2 + 2 * 27 * half**2
    attention = (4 + 2 * spec.mlp) * half**2 + 2 * plan.tokens * half
    return math.prod(grid) * convolutions + math.prod(plan.padded) * attention
