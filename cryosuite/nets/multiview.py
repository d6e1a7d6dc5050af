"""A network that looks at many particle images at once and says from where each was taken (CryoFastAR, 2506.05864).

A shared encoder reads every image alone. A decoder of layers in pairs then ties the images of a set into a star: View
Integration lets the reference ask all others, View Update lets every other ask the reference as just updated; others
never see each other, so the cost is linear in their number. One class builds the published network (``released()``) and
ours, which has three uses:

- ab initio, ``star``: view 0 is the reference and gives the frame; the others may come in any order and number.
- against a target by looking, ``match``: rotations are scored by comparing an image with the target's projections.
- against a target, ``templates`` and ``against``: noise-free projections of known rotation take the reference's place.
  They ask each other only, once per target; what is said of an image depends on nothing but that image and the target.

    model = Multiview(SPECS["micro"])
    tokens = model.encode(images)                                # (b, T, enc_dim)
    seen = model.match(model.encode(projections)).vector         # (G, d), once per target, at rotations (G, 3, 3)
    scores = model.match_scores(model.match(tokens).vector, seen)
    rotation, mass = kernels.planar.local_mean(scores, rotations)
    cache = model.templates(pictures, model.maps_of(rotations))  # once per target
    heads = model.heads(model.against(cache, tokens[None]))
    model.poses(heads).rotation                                  # (1, b, 3, 3)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cryosuite.kernels.planar import token_map
from cryosuite.nets.ief import Linear
from cryosuite.nets.multiview_blocks import Block, Pair, StarBlock, full_precision, make_stem, rope_table
from cryosuite.nets.multiview_heads import (
    AffineHead,
    DenseHead,
    DenseHeads,
    Heads,
    Match,
    Matcher,
    Poses,
    RotationCode,
    confidence,
    pixel_shuffle,
    poses,
)
from cryosuite.nets.multiview_spec import SPECS, VIEW_TABLE, MultiviewSpec, flops, released, spec_name

__all__ = [
    "SPECS",
    "DenseHeads",
    "Heads",
    "Match",
    "Multiview",
    "MultiviewSpec",
    "Poses",
    "TemplateCache",
    "confidence",
    "flops",
    "parameter_count",
    "released",
    "spec_name",
]

TemplateCache = list[Pair]  # per layer, keys and values of all patches of all templates, (S, M T, heads, head_dim)
REFERENCE, OTHER = 0, 1  # rows of the roles


class Multiview(nn.Module):
    """The network of a spec; see the module's text."""

    def __init__(self, spec: MultiviewSpec) -> None:
        super().__init__()
        self.spec = spec
        e, d = spec.enc_dim, spec.dec_dim
        self.patch_embed = make_stem(spec)
        self.enc_blocks = nn.ModuleList(Block(e, spec.enc_heads) for _ in range(spec.enc_depth))
        self.enc_norm = nn.LayerNorm(e, eps=1e-6)
        self.decoder_embed = Linear(e, d)
        self.dec_blocks = nn.ModuleList(StarBlock(d, spec.dec_heads) for _ in range(spec.dec_depth))  # View Integration
        self.dec_blocks2 = nn.ModuleList(StarBlock(d, spec.dec_heads) for _ in range(spec.dec_depth))  # View Update
        self.dec_norm = nn.LayerNorm(d, eps=1e-6)
        if spec.role == "table":
            self.segment_embeddings = nn.Embedding(VIEW_TABLE, d)
        else:
            self.role = nn.Parameter(torch.randn(2, d) * 0.02)
            self.hand = nn.Parameter(torch.randn(d) * 0.02)
        if spec.head == "dense":
            self.downstream_heads = nn.ModuleList(DenseHead(spec) for _ in range(2))  # of the reference, of the others
        else:
            self.map_embed = nn.Sequential(Linear(9, d), nn.GELU(), Linear(d, d))
            self.head = AffineHead(spec)
            self.picture = Linear(d, spec.patch**2)
        self.matcher = Matcher(spec) if spec.match_dim else None
        self.rotation_code = RotationCode(d) if spec.grid_head else None
        self.make_tables()
        self._initialise()

    def make_tables(self) -> None:
        """Compute what no file holds, the positions of the patches; again after a start on the meta device."""
        spec = self.spec
        if spec.head == "affine":
            self.head.make_tables(spec)
        for name, dim in (("enc", spec.enc_dim // spec.enc_heads), ("dec", spec.dec_dim // spec.dec_heads)):
            for part, table in zip(("cos", "sin"), rope_table(spec.grid, dim), strict=True):
                self.register_buffer(f"{name}_{part}", table, persistent=False)

    def encode(self, images: Tensor) -> Tensor:  # (b, c, D, D) -> (b, T, enc_dim)
        """Tokens of images, each read alone. Raises ValueError for images that are not the spec's."""
        wanted = (self.spec.in_channels, self.spec.size, self.spec.size)
        if tuple(images.shape[1:]) != wanted:
            raise ValueError(f"the network reads images of shape {wanted}, not {tuple(images.shape[1:])}")
        x = self.patch_embed(images).float()
        for block in self.enc_blocks:
            x = block(x, (self.enc_cos, self.enc_sin))
        return x

    def star(
        self,
        tokens: Tensor,  # (S, N, T, enc_dim), view 0 the reference
        hand: Tensor | None = None,  # (S,) +1, -1 or 0
    ) -> Tensor:  # (S, N, T, dec_dim)
        """Tie each set of N views into a star about its first. Permuting the others permutes what is said of them.

        hand: a sign that is shown to the network on view 1, for training that lets it choose the hand of the set; it
        makes view 1 differ from the others. Raises ValueError for less than two views.
        """
        if tokens.shape[1] < 2:
            raise ValueError("a star needs a reference and at least one other view")
        x = self._bridge(tokens)
        if self.spec.role == "table":
            x = x + self.segment_embeddings.weight[torch.arange(x.shape[1], device=x.device) % VIEW_TABLE][:, None]
            centre, rays = x[:, :1], x[:, 1:]
        else:
            centre, rays = x[:, :1] + self.role[REFERENCE], x[:, 1:] + self.role[OTHER]
            if hand is not None:
                sign = hand.to(rays)[:, None, None, None] * self.hand
                rays = torch.cat([rays[:, :1] + sign, rays[:, 1:]], 1)
        table, cross = self._tables()
        for integrate, update in zip(self.dec_blocks, self.dec_blocks2, strict=True):
            centre = integrate(centre, integrate.keys_values(rays, cross), table, cross)
            rays = update(rays, update.keys_values(centre, cross), table, cross)
        return torch.cat([centre, rays], 1)

    def maps_of(self, rotation: Tensor) -> Tensor:  # (..., 3, 3) -> (..., T, 9)
        """The known planar maps c, a, b of template rotations, as ``templates`` takes them."""
        return torch.cat(token_map(rotation, self.spec.size, self.spec.patch), -1)

    def templates(
        self,
        images: Tensor,  # (S, M, c, D, D) noise-free
        maps: Tensor,  # (S, M, T, 9) of ``maps_of``
    ) -> TemplateCache:
        """What images ask a target's templates: encoded, marked with their maps, integrated with one another."""
        self._require_affine()
        tokens = self.encode(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        x = self._bridge(tokens) + self.map_embed(maps.to(tokens)).float() + self.role[REFERENCE]
        table, cross = self._tables()
        cache = []
        for integrate, update in zip(self.dec_blocks, self.dec_blocks2, strict=True):
            x = integrate(x, integrate.keys_values(x, cross), table, cross)
            cache.append(update.keys_values(x, cross))
        return cache

    def against(
        self,
        cache: TemplateCache,  # of S targets
        tokens: Tensor,  # (S, N, T, enc_dim)
    ) -> Tensor:  # (S, N, T, dec_dim)
        """Update images by the templates of their target. Images do not see each other."""
        self._require_affine()
        x = self._bridge(tokens) + self.role[OTHER]
        table, cross = self._tables()
        for update, source in zip(self.dec_blocks2, cache, strict=True):
            x = update(x, source, table, cross)
        return x

    def heads(self, tokens: Tensor) -> Heads | DenseHeads:  # (..., T, dec_dim)
        """What is said of each image, in float32. With dense heads (S, N, T, dec_dim), view 0 has a head of its own."""
        with full_precision(tokens):
            x = self.dec_norm(tokens.float())
            if self.spec.head == "affine":
                return self.head(x)
            first, rest = (head(part) for head, part in zip(self.downstream_heads, self._parts(x), strict=True))
            return DenseHeads(torch.cat([first.x, rest.x], 1), torch.cat([first.conf_logit, rest.conf_logit], 1))

    def denoised(self, tokens: Tensor) -> Tensor:  # (..., T, dec_dim) -> (..., D, D)
        """The clean picture of each image, as far as the network sees it; of interest in training."""
        with full_precision(tokens):
            x = self.dec_norm(tokens.float())
            if self.spec.head == "affine":
                return pixel_shuffle(self.picture(x), self.spec.grid, self.spec.patch).squeeze(-3)
            pairs = zip(self.downstream_heads, self._parts(x), strict=True)
            return torch.cat([head.denoised(part) for head, part in pairs], 1)

    def match(self, tokens: Tensor) -> Match:  # (..., T, enc_dim)
        """The vectors by which images are compared, and their shifts, in float32, from tokens of ``encode``.

        Raises ValueError for a spec without them.
        """
        if self.matcher is None:
            raise ValueError("this network has no vectors to compare images by")
        with full_precision(tokens):
            return self.matcher(self.enc_norm(tokens.float()))

    def match_scores(self, vector: Tensor, others: Tensor) -> Tensor:  # (..., n, d), (..., G, d) -> (..., n, G)
        """Logits over G candidates whose clean projections have the vectors ``others``, in float32."""
        with full_precision(vector):
            return self.matcher.scores(vector, others)

    def poses(self, heads: Heads | DenseHeads) -> Poses:
        """Rotation, shift and confidence of each image (multiview_heads.poses)."""
        return poses(heads, self.spec)

    def cell_codes(self, cells: Tensor) -> Tensor:  # (G, 3, 3) -> (G, d)
        """phi of rotations, for ``grid_scores``; once per grid. Raises ValueError for a spec without grid head."""
        if self.rotation_code is None:
            raise ValueError("this network has no grid head")
        with full_precision(cells):
            return self.rotation_code(cells)

    def grid_scores(
        self,
        pooled: Tensor,  # (..., d)
        cells: Tensor | None = None,  # (G, 3, 3)
        codes: Tensor | None = None,  # (G, d) of ``cell_codes``
    ) -> Tensor:  # (..., G)
        """Scores of rotations, <q, phi(R)> / sqrt(d), in float32: logits over the cells. Give cells, or their codes."""
        if codes is None:
            if cells is None:
                raise ValueError("cells or their codes are needed")
            codes = self.cell_codes(cells)
        with full_precision(pooled):
            return pooled.float() @ (codes.float() * codes.shape[-1] ** -0.5).transpose(-1, -2)

    def _bridge(self, tokens: Tensor) -> Tensor:
        return self.decoder_embed(self.enc_norm(tokens.float())).float()

    def _tables(self) -> tuple[Pair, Pair | None]:
        """Rotary positions of self-attention and of cross-attention, which ours has not: other views are turned."""
        table = (self.dec_cos, self.dec_sin)
        return table, table if self.spec.role == "table" else None

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :1], x[:, 1:]

    def _require_affine(self) -> None:
        if self.spec.head != "affine" or self.spec.role != "two":
            raise ValueError("only networks with affine heads and two roles can be shown a target")

    def _initialise(self) -> None:
        """Glorot's uniform start for linear maps, no offsets; the last layers start small."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.spec.head == "dense":
            last = [layer for head in self.downstream_heads for layer in (head.proj, head.proj_fvalue)]
        else:
            last = [self.head.out, self.head.shift[-1], self.picture]
        if self.matcher is not None:
            last.append(self.matcher.shift[-1])
        for layer in last:
            nn.init.normal_(layer.weight, std=0.0 if self.spec.head == "dense" else 0.01)


def parameter_count(spec: MultiviewSpec) -> int:
    """Parameters of a spec's network, without making it."""
    with torch.device("meta"):
        return sum(p.numel() for p in Multiview(spec).parameters())
