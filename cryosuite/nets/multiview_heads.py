"""What a multi-view network says of each image: planar map, confidence, shift, scores of rotations, a clean picture.

All heads work in float32 whatever autocast says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cryosuite.kernels.planar import kabsch_tokens, patch_grid, released_pose
from cryosuite.nets.ief import Linear
from cryosuite.nets.multiview_spec import CODE, NECK, ROTATION_FEATURES, MultiviewSpec

LOGIT_RANGE = (-10.0, 8.0)  # confidence from 1.00005 to 2982
MAX_SCALE = 100.0  # of the products of two vectors of length 1
EPS = 1e-6


@dataclass
class Heads:
    """Affine heads of images (...).

    Attributes:
        c, a, b: (..., T, 3) planar map of each patch (kernels.planar).
        conf_logit: (..., T), see ``confidence``.
        shift: (..., 2) as CONVENTIONS have it, fraction of the box.
        pooled: (..., d) what rotations are scored with.
    """

    c: Tensor
    a: Tensor
    b: Tensor
    conf_logit: Tensor
    shift: Tensor
    pooled: Tensor


@dataclass
class DenseHeads:
    """Dense heads of images (...): planar map x (..., D, D, 3) on the released grid, h included, and conf_logit
    (..., D, D) of the same pixels."""

    x: Tensor
    conf_logit: Tensor


@dataclass
class Poses:
    """Rotations (..., 3, 3), shifts (..., 2) as a fraction of the box, confidence (...): the mean over the image."""

    rotation: Tensor
    shift: Tensor
    confidence: Tensor


@dataclass
class Match:
    """What images (...) are compared by: vector (..., match_dim) of length 1, and the shift (..., 2) that centres each,
    as CONVENTIONS have it, fraction of the box."""

    vector: Tensor
    shift: Tensor


def confidence(logit: Tensor) -> Tensor:
    """C = 1 + exp(logit), the logit held in a range where neither C nor log C leaves float32's."""
    return 1 + torch.exp(logit.float().clamp(*LOGIT_RANGE))


def poses(heads: Heads | DenseHeads, spec: MultiviewSpec) -> Poses:
    """What the heads say, by Kabsch's algorithm: weighted by confidence, unweighted for the released network.

    Affine heads give the rotation of the map itself (relative to the reference in a star, absolute against templates);
    dense ones what the release exports (kernels.planar.released_pose).
    """
    conf = confidence(heads.conf_logit)
    if isinstance(heads, DenseHeads):
        rotation, shift = released_pose(heads.x)
        return Poses(rotation, shift, conf.mean((-1, -2)))
    rotation = kabsch_tokens(heads.c, heads.a, heads.b, conf, spec.size, spec.patch)
    return Poses(rotation, heads.shift, conf.mean(-1))


def pixel_shuffle(x: Tensor, grid: int, patch: int) -> Tensor:
    """(..., T, k patch^2) -> (..., k, D, D): the pixels of each patch in their place."""
    x = x.unflatten(-1, (-1, patch, patch)).unflatten(-4, (grid, grid))  # (..., row, column, k, p, p)
    *lead, _, _, k, _, _ = x.shape
    n = len(lead)
    x = x.permute(*range(n), n + 2, n, n + 3, n + 1, n + 4)
    return x.reshape(*lead, k, grid * patch, grid * patch)


class AffineHead(nn.Module):
    """Tokens of an image -> its map, confidence, shift, and the vector that scores rotations.

    A token gives the map's derivatives a and b and what kx a + ky b lacks of its value c: for a true map all three are
    the same at every place, so position need not be learnt a second time. Each token sees the mean of all beside
    itself.
    """

    def __init__(self, spec: MultiviewSpec) -> None:
        super().__init__()
        d = spec.dec_dim
        self.own = Linear(d, CODE)
        self.mean = Linear(d, CODE, bias=False)
        self.out = Linear(CODE, 10)
        self.shift = nn.Sequential(Linear(d, CODE), nn.GELU(), Linear(CODE, 2))
        self.pool = nn.Sequential(Linear(d, d), nn.GELU(), Linear(d, d))
        self.make_tables(spec)

    def make_tables(self, spec: MultiviewSpec) -> None:
        """Compute the centres of the patches, which no file holds."""
        self.register_buffer("grid", patch_grid(spec.size, spec.patch), persistent=False)

    def forward(self, x: Tensor) -> Heads:  # (..., T, d)
        mean = x.mean(-2)
        out = self.out(F.gelu(self.own(x) + self.mean(mean)[..., None, :]))
        a, b, rest, logit = out.split([3, 3, 3, 1], -1)
        c = self.grid[:, :1] * a + self.grid[:, 1:2] * b + rest
        return Heads(c, a, b, logit.squeeze(-1), self.shift(mean), self.pool(mean))


class RotationCode(nn.Module):
    """phi: a rotation matrix -> the vector whose product with an image's is the score of that rotation.

    A network of the nine entries and of their sines and cosines at three frequencies (Murphy et al. 2021), so any
    rotation can be scored, on any grid, at no parameter per cell.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        sizes = [ROTATION_FEATURES, CODE, CODE, dim]
        self.layers = nn.ModuleList(Linear(i, o) for i, o in zip(sizes[:-1], sizes[1:], strict=True))

    def forward(self, rotation: Tensor) -> Tensor:  # (..., 3, 3) -> (..., dim)
        entries = rotation.float().flatten(-2)
        angles = [entries * (math.pi / 2 * 2**i) for i in range(3)]
        x = torch.cat([entries, *(f(angle) for angle in angles for f in (torch.sin, torch.cos))], -1)
        for i, layer in enumerate(self.layers):
            x = layer(F.gelu(x) if i else x)
        return x


class Matcher(nn.Module):
    """Encoder tokens -> a vector per image, near for images of one object from one side: phi(R) by looking.

    A rotation is scored by the product of a particle's vector with that of the target's clean projection at that
    rotation, read by the same encoder. To compare pictures is learnt fast and holds for molecules never seen: the micro
    encoder was 13 degrees off on such after 20,000 images of SNR 10 and 32 pixels, when the star was still at
    chance after 50,000. Patches keep their places: they are joined, not averaged.
    """

    def __init__(self, spec: MultiviewSpec) -> None:
        super().__init__()
        wide = spec.tokens * spec.match_width
        self.reduce = Linear(spec.enc_dim, spec.match_width)
        self.out = Linear(wide, spec.match_dim)
        self.shift = nn.Sequential(Linear(wide, CODE), nn.GELU(), Linear(CODE, 2))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, x: Tensor) -> Match:  # (..., T, enc_dim)
        x = self.reduce(x).flatten(-2)
        return Match(F.normalize(self.out(x), dim=-1), self.shift(x))

    def scores(self, vector: Tensor, others: Tensor) -> Tensor:  # (..., n, d), (..., G, d) -> (..., n, G)
        """Scaled products of image vectors with those of the reference's projections."""
        return vector.float() @ (others.float() * self.log_scale.exp().clamp(max=MAX_SCALE)).transpose(-1, -2)


class Norm2d(nn.Module):
    """Layer norm over the channels of (b, c, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], self.weight, self.bias, EPS)
        return x.permute(0, 3, 1, 2)


class DenseHead(nn.Module):
    """The released head: tokens -> x, y, z and a confidence per pixel, and on request a denoised image."""

    def __init__(self, spec: MultiviewSpec) -> None:
        super().__init__()
        self.side, self.patch = spec.grid, spec.patch
        self.neck = nn.Sequential(
            nn.Conv2d(spec.dec_dim, NECK, 1, bias=False),
            Norm2d(NECK),
            nn.Conv2d(NECK, NECK, 3, padding=1, bias=False),
            Norm2d(NECK),
        )
        self.proj = Linear(NECK, 4 * spec.patch**2)
        self.proj_fvalue = Linear(NECK, spec.patch**2)
        for last in (self.proj, self.proj_fvalue):
            nn.init.zeros_(last.weight)

    def features(self, x: Tensor) -> Tensor:  # (..., T, d) -> (..., T, NECK)
        """Tokens after the convolutions that both outputs share."""
        flat = x.reshape(-1, *x.shape[-2:]).transpose(1, 2).unflatten(2, (self.side, self.side))
        return self.neck(flat).flatten(2).transpose(1, 2).reshape(*x.shape[:-1], NECK)

    def forward(self, x: Tensor) -> DenseHeads:  # (..., T, d)
        out = pixel_shuffle(self.proj(self.features(x)), self.side, self.patch)
        # the network stores X / 2 + 1/2; its confidence at [row, column] was trained on the error at [column, row]
        return DenseHeads(out[..., :3, :, :].movedim(-3, -1) * 2 - 1, out[..., 3, :, :].transpose(-1, -2))

    def denoised(self, x: Tensor) -> Tensor:  # (..., T, d) -> (..., D, D)
        """The image without its noise, as the network sees it."""
        return pixel_shuffle(self.proj_fvalue(self.features(x)), self.side, self.patch).squeeze(-3)
