"""A plain vision transformer for density maps: what the SCUNet is measured against, with as many parameters.

Blocks of 8^3 voxels are the tokens, as in the coarsest grid of the SCUNet, so that masks, pre-training (``nets.jepa``)
and weights work alike. The encoder ends with the tokens' embeddings; the decoder is one block per n and a linear map
back to voxels. There is no skip from the input, as in masked autoencoders (He et al. 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cryosuite.nets.jepa import patches, token_grid
from cryosuite.nets.jepa_masks import token_positions
from cryosuite.nets.scunet import SPECS, TOKEN, padded_to_tokens
from cryosuite.nets.vit import Block

__all__ = ["MapVitSpec", "VIT_SPECS", "VitEncoder", "VitDecoder", "MapVit"]

PATCH = TOKEN**3  # voxels of a token


@dataclass(frozen=True)
class MapVitSpec:
    """The shape of a network: width of a token, blocks of the encoder and of the decoder, heads.

    Raises ValueError for sizes that do not go together.
    """

    dim: int = 144
    depth: int = 4
    decoder_depth: int = 1
    heads: int = 6

    def __post_init__(self) -> None:
        sizes = (self.dim, self.depth, self.decoder_depth, self.heads)
        if any(type(size) is not int or size < 1 for size in sizes) or self.dim % self.heads:
            raise ValueError(f"the sizes of a map ViT must be whole numbers from 1, dim a multiple of heads: {self}")

    @property
    def features(self) -> int:
        """Length of an embedding."""
        return self.dim


# as many parameters as the SCUNet of the same name, within 20 %
VIT_SPECS = {name: MapVitSpec(6 * spec.d, 4 * spec.n, spec.n) for name, spec in SPECS.items()}


class VitEncoder(nn.Module):
    """Map crops (b, 1, z, y, x) -> [embeddings (b, z/8, y/8, x/8, dim)], one entry as the last of the SCUNet's."""

    def __init__(self, spec: MapVitSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Linear(PATCH, spec.dim)
        self.blocks = nn.ModuleList(Block(spec.dim, spec.heads) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(spec.dim)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> list[Tensor]:
        """Embeddings of all tokens.

        Args:
            x: (b, 1, z, y, x), edges of any length (padded to multiples of 8).
            visible: (b, z/8, y/8, x/8) bool, the tokens that are shown: nobody attends to the others, theirs are zero.
        """
        x = padded_to_tokens(x)
        grid = token_grid(x)
        if visible is not None and tuple(visible.shape) != (x.shape[0], *grid):
            raise ValueError(f"tokens {tuple(visible.shape)} do not fit crops {tuple(x.shape)} of 8 voxels per token")
        tokens = self.embed(patches(x))
        tokens = tokens + token_positions(grid, self.spec.dim, x.device).to(tokens.dtype)
        shown = None if visible is None else visible.flatten(1)
        for block in self.blocks:
            tokens = block(tokens, shown)
        tokens = self.norm(tokens)
        if shown is not None:
            tokens = torch.where(shown[..., None], tokens, torch.zeros((), dtype=tokens.dtype, device=x.device))
        return [tokens.unflatten(1, grid)]


class VitDecoder(nn.Module):
    """Embeddings -> a map (b, 1, z, y, x), without an activation at the end."""

    def __init__(self, spec: MapVitSpec) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(spec.dim, spec.heads) for _ in range(spec.decoder_depth))
        self.norm = nn.LayerNorm(spec.dim)
        self.out = nn.Linear(spec.dim, PATCH)

    def forward(self, features: list[Tensor]) -> Tensor:
        """What ``VitEncoder`` gives -> (b, 1, z, y, x)."""
        tokens = features[-1]
        b, z, y, x = tokens.shape[:4]
        tokens = tokens.flatten(1, 3)
        for block in self.blocks:
            tokens = block(tokens)
        voxels = self.out(self.norm(tokens)).view(b, z, y, x, TOKEN, TOKEN, TOKEN)
        return voxels.permute(0, 1, 4, 2, 5, 3, 6).reshape(b, 1, z * TOKEN, y * TOKEN, x * TOKEN)


class MapVit(nn.Module):
    """The whole network: (b, 1, z, y, x) -> (b, 1, z, y, x), any edges."""

    def __init__(self, spec: MapVitSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = VitEncoder(spec)
        self.decoder = VitDecoder(spec)

    def forward(self, x: Tensor) -> Tensor:
        z, y, w = x.shape[2:]
        return self.decoder(self.encoder(x))[:, :, :z, :y, :w]
