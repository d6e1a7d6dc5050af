"""Tokens of particles seen from other sides: train-hype's guard against volumes that are right in one view only."""

from __future__ import annotations

from itertools import combinations_with_replacement

import torch
from torch import Tensor, nn

from cryosuite.kernels import chance

KEPT = 1024  # images whose tokens are remembered
MEMORY = 2**27  # bytes that their tokens may take
OTHER_SIDE = 0.5  # cosine of the axes of view below which two images show a particle from different sides
BEGIN = 0.1  # of the training: before it the latents say nothing about who is like whom
RIDGE = 1e-3  # per image, of the fit of latents by the view


class OtherViews(nn.Module):
    """The last images' tokens, and who among them is like an image but was seen from another side.

    The volume of a particle is scored by the image that it was read from, which is one slice of it. Nothing in that
    loss asks for the rest of the volume, so an encoder may learn to tell the views apart as well as the molecules: on
    50 states of one bending molecule 80 % of the direction of view could be told from the cluster. An image whose
    volume is read in part from its likeness from another side asks for volumes that hold from all sides, and for
    latents in which likeness does not mean the same view. Tokens are moved part of the way, not exchanged: volumes
    are made from means of many particles' tokens, which mean nothing where each view has tokens of its own.

    Args:
        tokens: of one particle; dim: of one token; pooled: length of ``HypeModel.pool``.
    """

    def __init__(self, tokens: int, dim: int, pooled: int) -> None:
        super().__init__()
        length = max(64, min(KEPT, MEMORY // (2 * tokens * dim)))
        self.register_buffer("tokens", torch.zeros(length, tokens, dim, dtype=torch.float16))
        self.register_buffer("pooled", torch.zeros(length, pooled))
        self.register_buffer("axis", torch.zeros(length, 3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # images so far

    def blended(self, tokens: Tensor, pooled: Tensor, axis: Tensor, share: float) -> Tensor:
        """The tokens (b, n, dim), those of a random ``share`` of the images moved towards their likeness's, by a
        random part of the way.

        Args:
            pooled: (b, p) what likeness is measured in. axis: (b, 3) of view, in the frame of the volume.

        Afterwards the images are among those remembered. No gradient goes to the likeness. All processes that share a
        batch remember the same images, and no number is read back from the device.
        """
        with torch.no_grad(), torch.autocast(axis.device.type, enabled=False):
            pooled, axis = pooled.float(), axis.float()
            other, found = self.likeness(pooled, axis)
            moved, way = chance.rand(len(tokens), 2, device=tokens.device).unbind(1)
            way = torch.where(found & (moved < share), way, 0).to(tokens.dtype)
            goal = self.tokens[other].to(tokens.dtype)
            self.remember(tokens, pooled, axis)
        way = way[:, None, None]
        return torch.where(way > 0, torch.lerp(tokens, goal, way), tokens)  # nothing of a goal that is not taken

    def likeness(self, pooled: Tensor, axis: Tensor) -> tuple[Tensor, Tensor]:
        """Who of those remembered is nearest among those seen from another side (b,), and whether there is any (b,).

        What can be told from the view is taken from the latents first: what is left is the molecule.
        """
        known = torch.arange(len(self.axis), device=axis.device) < self.seen
        own, kept = even_harmonics(axis), even_harmonics(self.axis) * known[:, None]
        unit = torch.eye(kept.shape[1], device=axis.device)
        normal = kept.T @ kept + RIDGE * (1 + known.sum()) * unit
        told = torch.linalg.solve_ex(normal, kept.T @ self.pooled)[0]  # never singular: a GPU need not be waited for
        distance = torch.cdist(pooled - own @ told, self.pooled - kept @ told)
        fits = known & ((axis @ self.axis.T).abs() < OTHER_SIDE)
        least, other = distance.masked_fill(~fits, torch.inf).min(1)
        return other, least.isfinite()

    def remember(self, tokens: Tensor, pooled: Tensor, axis: Tensor) -> None:
        """Put the images of the whole batch in the place of the oldest ones."""
        tokens, pooled, axis = (of_whole_batch(x) for x in (tokens.half(), pooled, axis))
        last = slice(-len(self.axis), None)  # of a batch larger than the memory
        place = (self.seen + torch.arange(len(tokens), device=axis.device))[last] % len(self.axis)
        self.tokens[place], self.pooled[place], self.axis[place] = tokens[last], pooled[last], axis[last]
        self.seen += len(tokens)


def even_harmonics(axis: Tensor) -> Tensor:  # (n, 3) -> (n, 15)
    """Functions of a direction that do not tell front from back, as far as degree 4: all monomials of degree 4."""
    which = combinations_with_replacement(axis.unbind(1), 4)
    return torch.stack([a * b * c * d for a, b, c, d in which], 1)


def of_whole_batch(values: Tensor) -> Tensor:
    """Rows (b, ...) of this process -> those of all processes that share the batch, in its order."""
    share = chance.share_of(len(values))
    if share is None or not torch.distributed.is_initialized():
        return values
    whole = values.new_zeros(share.total, *values.shape[1:])
    count = values.new_zeros(share.total)
    whole[share.own], count[share.own] = values, 1
    for part in (whole, count):
        torch.distributed.all_reduce(part)
    return whole / count.view(-1, *[1] * (values.ndim - 1)).clamp_min(1)  # a short batch may hold a row twice
