"""Joint-embedding prediction on map crops: from the shown tokens to the embeddings of the hidden ones.

The context encoder sees a crop whose hidden blocks of 8^3 voxels hold one learnt number, its slow copy (the target
encoder) sees the whole crop, and a small transformer predicts the copy's embeddings at the hidden places. Nothing is
reconstructed; ``Mae`` is the same with voxels as what is predicted.

Masking after a convolutional encoder would let its receptive fields read the hidden voxels; ``mask_at="embedding"`` is
that literal reading of the CryoLVM paper, kept to compare with. I-JEPA: Assran et al. 2023; MAE: He et al. 2022.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cryosuite.nets.jepa_masks import Grid, Masks, token_positions
from cryosuite.nets.scunet import TOKEN, Encoder
from cryosuite.nets.scunet_blocks import Visible
from cryosuite.nets.vit import Block

__all__ = ["PredictorSpec", "Predictor", "Jepa", "Mae", "smooth_l1", "target_momentum", "patches"]

MASK_AT = ("input", "embedding")
PATCH = TOKEN**3  # voxels of a token


@dataclass(frozen=True)
class PredictorSpec:
    """The predictor: width, depth and heads of a plain transformer. One block is enough for networks of d = 16."""

    width: int = 192
    depth: int = 4
    heads: int = 6

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads) < 1 or self.width % self.heads:
            raise ValueError(f"a predictor's width must be a multiple of its heads, all from 1: {self}")


class Predictor(nn.Module):
    """Shown tokens and the places of hidden ones -> what stands at the hidden places.

    Args:
        features: length of a shown token. out: numbers predicted per hidden token.
    """

    def __init__(self, features: int, out: int, spec: PredictorSpec) -> None:
        super().__init__()
        self.width = spec.width
        self.embed = nn.Linear(features, spec.width)
        self.hidden = nn.Parameter(torch.randn(spec.width) * 0.02)
        self.blocks = nn.ModuleList(Block(spec.width, spec.heads) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(spec.width)
        self.out = nn.Linear(spec.width, out)

    def forward(self, shown: Tensor, masks: Masks, grid: Grid) -> Tensor:
        """Tokens (b, n, features) at ``masks.context`` -> (b, k, m, out) at ``masks.targets``; the groups apart."""
        b, k, m = masks.targets.shape
        position = token_positions(grid, self.width, shown.device)
        x = self.embed(shown)
        x = x + position[masks.context].to(x.dtype)
        x = x[:, None].expand(-1, k, -1, -1).flatten(0, 1)
        asked = (self.hidden + position[masks.targets]).flatten(0, 1).to(x.dtype)
        x = torch.cat([x, asked], 1)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x[:, -m:])).view(b, k, m, -1)


class _MaskedEncoder(nn.Module):
    """An encoder whose input is partly hidden, and the linear map from its features to tokens of length E = 8 d."""

    def __init__(self, encoder: Encoder, mask_at: str) -> None:
        super().__init__()
        if mask_at not in MASK_AT:
            raise ValueError(f"crops are masked at {' or '.join(MASK_AT)}, not {mask_at}")
        self.encoder, self.mask_at = encoder, mask_at
        self.tokens = nn.Linear(encoder.spec.features, encoder.spec.features)
        self.fill = nn.Parameter(torch.zeros(()))

    def shown(self, crops: Tensor, context: Tensor) -> Tensor:  # (b, 1, z, y, x), (b, n) -> (b, n, E)
        """Tokens of the context."""
        grid = token_grid(crops)
        visible = None
        if self.mask_at == "input":
            flat = torch.zeros(len(crops), grid[0] * grid[1] * grid[2], dtype=torch.bool, device=crops.device)
            visible = flat.scatter(1, context, True).view(-1, *grid)
            voxels = Visible.at(visible, TOKEN).voxels.movedim(-1, 1)
            crops = torch.where(voxels, crops, self.fill.to(crops.dtype))
        features = self.encoder(crops, visible)[-1].flatten(1, 3)
        return self.tokens(take(features, context))


class Jepa(_MaskedEncoder):
    """Context encoder, target encoder and predictor. Call ``follow`` after every step of the optimiser.

    State keys: ``encoder.*`` and ``tokens.*`` (trained), ``target_encoder.*`` and ``target_tokens.*`` (their averages),
    ``predictor.*``, ``fill``.

    Args:
        encoder: the context encoder; the target starts as its copy.
        mask_at: "input" (hidden voxels cannot be read) or "embedding".
    """

    def __init__(self, encoder: Encoder, predictor: PredictorSpec | None = None, mask_at: str = "input") -> None:
        super().__init__(encoder, mask_at)
        features = encoder.spec.features
        self.predictor = Predictor(features, features, predictor or PredictorSpec())
        self.target_encoder = copy.deepcopy(self.encoder)
        self.target_tokens = copy.deepcopy(self.tokens)
        for part in (self.target_encoder, self.target_tokens):
            part.requires_grad_(False)
            part.eval()

    def train(self, mode: bool = True) -> Jepa:
        """Training mode for all but the target, which never drops a branch."""
        super().train(mode)
        self.target_encoder.eval()
        self.target_tokens.eval()
        return self

    def forward(self, crops: Tensor, masks: Masks) -> tuple[Tensor, Tensor, Tensor]:
        """Crops (b, 1, z, y, x) -> (loss, predicted, targets), the last two (b, k, m, E); edges multiples of 8."""
        predicted = self.predictor(self.shown(crops, masks.context), masks, token_grid(crops))
        targets = take(self.targets(crops), masks.targets.flatten(1)).view(predicted.shape)
        return smooth_l1(predicted, targets), predicted, targets

    @torch.no_grad()
    def targets(self, crops: Tensor) -> Tensor:  # (b, 1, z, y, x) -> (b, T, E) float32
        """Embeddings of all tokens by the target encoder, each with mean 0 and variance 1 over its numbers."""
        tokens = self.target_tokens(self.target_encoder(crops)[-1].flatten(1, 3))
        return F.layer_norm(tokens.float(), tokens.shape[-1:])

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """target = m target + (1 - m) context, for all parameters and floating-point buffers."""
        pairs = ((self.target_encoder, self.encoder), (self.target_tokens, self.tokens))
        for slow, fast in pairs:
            mine = [v for v in slow.state_dict().values() if v.is_floating_point()]
            theirs = [v for v in fast.state_dict().values() if v.is_floating_point()]
            torch._foreach_lerp_(mine, theirs, 1 - momentum)


class Mae(_MaskedEncoder):
    """The same encoder and masks, but the grey values of the hidden voxels are predicted."""

    def __init__(self, encoder: Encoder, predictor: PredictorSpec | None = None) -> None:
        super().__init__(encoder, "input")
        self.predictor = Predictor(encoder.spec.features, PATCH, predictor or PredictorSpec())

    def forward(self, crops: Tensor, masks: Masks) -> tuple[Tensor, Tensor, Tensor]:
        """Crops (b, 1, z, y, x) -> (mean square error, predicted, targets), the last two (b, k, m, 512)."""
        predicted = self.predictor(self.shown(crops, masks.context), masks, token_grid(crops))
        targets = take(patches(crops), masks.targets.flatten(1)).view(predicted.shape)
        return (predicted.float() - targets.float()).square().mean(), predicted, targets


def token_grid(crops: Tensor) -> Grid:
    """Tokens z, y, x of crops (b, 1, z, y, x); ValueError for edges that are no multiples of 8."""
    if crops.ndim != 5 or any(n % TOKEN for n in crops.shape[2:]):
        raise ValueError(f"crops (b, 1, z, y, x) with edges that are multiples of {TOKEN}, not {tuple(crops.shape)}")
    z, y, x = (n // TOKEN for n in crops.shape[2:])
    return z, y, x


def take(tokens: Tensor, index: Tensor) -> Tensor:  # (b, T, E), (b, n) -> (b, n, E)
    """The tokens at the given places of each crop."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def patches(crops: Tensor) -> Tensor:  # (b, 1, z, y, x) -> (b, T, 512)
    """The voxels of every token, z slowest, in the order of the tokens."""
    z, y, x = token_grid(crops)
    blocks = crops.reshape(-1, z, TOKEN, y, TOKEN, x, TOKEN).permute(0, 1, 3, 5, 2, 4, 6)
    return blocks.reshape(crops.shape[0], z * y * x, PATCH)


def smooth_l1(predicted: Tensor, targets: Tensor, beta: float = 1.0) -> Tensor:
    """Smooth L1 in float32, the mean over hidden tokens and over dimensions."""
    return F.smooth_l1_loss(predicted.float(), targets.float(), beta=beta)


def target_momentum(fraction: float, steps: int, start: float | None = None) -> float:
    """Momentum of the target at a part of the training: linear from .996 (.99 below 20,000 steps) to 1."""
    first = start if start is not None else (0.996 if steps >= 20_000 else 0.99)
    return first + (1 - first) * min(max(fraction, 0.0), 1.0)
