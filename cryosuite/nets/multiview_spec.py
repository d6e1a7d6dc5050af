"""The shapes of multi-view pose networks: what can be chosen, the presets, what they cost."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

STEMS, ROLES, HEADS = ("conv", "patch"), ("two", "table"), ("affine", "dense")
NECK = 256  # channels of the dense head
CODE = 256  # hidden width of the affine head and of the network that codes rotations
VIEW_TABLE = 128  # rows of the released table of views
ROTATION_FEATURES = 9 * 7  # of a rotation matrix: its entries, and sines and cosines at three frequencies


@dataclass(frozen=True)
class MultiviewSpec:
    """The shape of a network.

    Attributes:
        size, patch: image and patch size in pixels.
        enc_dim, enc_depth, enc_heads: the encoder, shared by all images.
        dec_dim, dec_depth, dec_heads: the star, ``dec_depth`` pairs of View Integration and View Update.
        stem: "conv" (3 x 3 convolutions of stride 2 and a learnt position table) or "patch" (one linear map, released).
        role: "two" learnt vectors, reference and other, or a "table" of 128 by the place in the list (released).
        head: "affine" (c, a, b and a confidence per patch, a shift per image) or "dense" (per pixel, released).
        grid_head: whether cells of a rotation grid can be scored.
        in_channels: 1, or 2 with the phase-flipped image beside the image.
        match_dim: length of the vectors that images are compared by, 0 for none.

    Raises ValueError for sizes that do not go together.
    """

    size: int = 32
    patch: int = 8
    enc_dim: int = 160
    enc_depth: int = 4
    enc_heads: int = 5
    dec_dim: int = 160
    dec_depth: int = 4
    dec_heads: int = 5
    stem: str = "conv"
    role: str = "two"
    head: str = "affine"
    grid_head: bool = True
    in_channels: int = 2
    match_dim: int = 256

    def __post_init__(self) -> None:
        numbers = [value for value in asdict(self).values() if type(value) is int]
        if len(numbers) != 10 or min(numbers[:9]) < 1 or self.match_dim < 0 or type(self.grid_head) is not bool:
            raise ValueError("the sizes of a network must be whole numbers from 1, its grid head yes or no")
        if (self.stem, self.role, self.head) not in [(s, r, h) for s in STEMS for r in ROLES for h in HEADS]:
            raise ValueError(f"unknown stem {self.stem}, role {self.role} or head {self.head}")
        if self.size % self.patch or self.size % 2 or self.in_channels > 2:
            raise ValueError(f"images of {self.size} pixels cannot be cut into patches of {self.patch}")
        if self.stem == "conv" and self.patch != 2 ** round(math.log2(self.patch)):
            raise ValueError(f"a stem of convolutions needs a patch of 2, 4, 8 or 16 pixels, not {self.patch}")
        if self.enc_dim % (4 * self.enc_heads) or self.dec_dim % (4 * self.dec_heads):
            raise ValueError(
                f"widths ({self.enc_dim}, {self.dec_dim}) must be multiples of 4 times the heads ({self.enc_heads}, "
                f"{self.dec_heads}): positions turn pairs of channels, half by row, half by column"
            )
        if self.head == "dense" and self.grid_head:
            raise ValueError("the dense head has no grid head beside it")

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.size // self.patch

    @property
    def match_width(self) -> int:
        """Numbers that each patch contributes to the vector of its image."""
        return 64 if self.tokens <= 16 else 32

    @property
    def tokens(self) -> int:
        """Patches per image, T."""
        return self.grid**2


def released() -> MultiviewSpec:
    """The published network: 532,573,952 parameters, and 788,224 more in its file that it never uses."""
    return MultiviewSpec(128, 16, 1024, 24, 16, 768, 12, 12, "patch", "table", "dense", False, 1, 0)


SPECS = {
    "micro": MultiviewSpec(),
    "nano64": MultiviewSpec(64, 8, 192, 6, 6, 192, 4, 6),
    "tiny64": MultiviewSpec(64, 8, 256, 8, 8, 256, 6, 8),
    "small64": MultiviewSpec(64, 8, 384, 12, 6, 384, 6, 6),
    "paper": released(),
}


def spec_name(spec: MultiviewSpec) -> str:
    """The preset of a spec, or its sizes in words."""
    name = next((name for name, known in SPECS.items() if known == spec), None)
    sizes = f"{spec.size} px / {spec.patch}, {spec.enc_dim} x {spec.enc_depth} + {spec.dec_dim} x {spec.dec_depth}"
    return name or sizes


def stem_channels(spec: MultiviewSpec) -> list[int]:
    """Channels before, between and after the convolutions of a conv stem, each of which halves the image."""
    steps = max(1, round(math.log2(spec.patch)))
    return [spec.in_channels, *(max(8, spec.enc_dim >> (steps - 1 - i)) for i in range(steps))]


def flops(spec: MultiviewSpec, n_views: int, templates: int = 0) -> float:
    """Floating point operations of one image's forward pass, products only, without the grid head.

    ``n_views`` images in one star; with ``templates`` the image is shown that many cached ones instead; with 0 of both
    it is only encoded and turned into the vector it is compared by. A training step costs three times as much.
    """
    t, d, e = spec.tokens, spec.dec_dim, spec.enc_dim
    encoder = spec.enc_depth * t * (12 * e * e + 2 * t * e)
    decoder = t * (8 + 4 + 2) * d * d + 2 * t * t * d  # of one image in a layer; keys and values are counted apart
    if not templates and not n_views:
        wide = t * spec.match_width
        match = t * e * spec.match_width + wide * (spec.match_dim + CODE) + 2 * CODE
        return 2.0 * (_stem_products(spec) + encoder + match)
    if templates:
        star = spec.dec_depth * (decoder + 2 * t * templates * t * d)
    else:
        others = n_views - 1
        # each View Integration asks for keys of all others, and the View Updates for those of the reference, once
        layer = n_views * decoder + 2 * n_views * t * d * d + 2 * (2 * others * t * t * d)
        star = spec.dec_depth * layer / n_views
    if spec.head == "dense":
        head = t * (d * NECK + 9 * NECK * NECK + NECK * 4 * spec.patch**2)
    else:
        head = t * (d * CODE + CODE * 10) + d * (2 * CODE + 2 * d) + 2 * CODE
    return 2.0 * (_stem_products(spec) + encoder + t * e * d + star + head)


def _stem_products(spec: MultiviewSpec) -> float:
    if spec.stem == "patch":
        return float(spec.tokens * spec.in_channels * spec.patch**2 * spec.enc_dim)
    channels, size, total = stem_channels(spec), spec.size, 0
    for before, after in zip(channels[:-1], channels[1:], strict=True):
        size //= 2
        total += size * size * before * after * 9
    return float(total)
