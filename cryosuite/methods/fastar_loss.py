"""The losses of pose prediction: planar maps with a hand nobody can know, with symmetry, cells of SO(3), shifts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cryosuite.errors import InputError
from cryosuite.kernels.planar import map_error, precise, token_map
from cryosuite.nets.multiview import confidence

HANDS = ("min", "anchor", "none")
CERTAIN = 0.1  # |R_rel[0, 2]| below which the first view does not tell the hand
CONFIDENCE = 0.1  # weight of the reward for confidence
SHIFT = 4.0  # weight of the shift's error, a fraction of the box
TINY = 1e-4  # under the root of the map's squared error, so that its gradient stays finite


def weighted(error: Tensor, logit: Tensor, known: Tensor, settled: bool) -> Tensor:
    """Mean of C |X - X'| - 0.1 log C over the known views; while not ``settled`` C = 1 and the error squared.

    Args:
        error: (..., N, T) mean square error of the map of each patch. logit: (..., N, T). known: (..., N) bool.
    """
    if settled:
        C = confidence(logit)
        each = C * (error + TINY).sqrt() - CONFIDENCE * torch.log(C)
    else:
        each = error + 0 * logit.float()  # every parameter has a gradient from the first step on
    return (each.mean(-1) * known).sum() / known.sum().clamp(min=1)


def shift_loss(found: Tensor, wanted: Tensor, known: Tensor) -> Tensor:
    """SHIFT times the mean distance of shifts (..., N, 2), fractions of the box."""
    distance = ((found.float() - wanted).square().sum(-1) + TINY**2).sqrt()
    return SHIFT * (distance * known).sum() / known.sum().clamp(min=1)


def nearest_mate(
    found: tuple[Tensor, Tensor, Tensor],  # c, a, b each (S, N, T, 3)
    rotation: Tensor,  # (S, N, 3, 3)
    mates: Tensor,  # (S, G, 3, 3)
    size: int,
    patch: int,
) -> tuple[Tensor, Tensor]:
    """(rotation of the symmetry mate nearest to what was found (S, N, 3, 3), error of its map (S, N, T))."""
    all_mates = equivalent(rotation, mates)  # (S, N, G, 3, 3)
    wanted = token_map(all_mates, size, patch)
    error = map_error(tuple(part[:, :, None] for part in found), wanted, size, patch)  # (S, N, G, T)
    best = error.detach().mean(-1).argmin(-1)
    pick = best[..., None, None]
    error = torch.gather(error, 2, pick.expand(*best.shape, 1, error.shape[-1])).squeeze(2)
    nearest = torch.gather(all_mates, 2, pick[..., None].expand(*best.shape, 1, 3, 3)).squeeze(2)
    return nearest, error


@precise
def equivalent(rotation: Tensor, mates: Tensor) -> Tensor:  # (S, N, 3, 3), (S, G, 3, 3) -> (S, N, G, 3, 3)
    """The rotations R S^T that show the same image as R, for symmetries S of the volume frame."""
    return rotation[:, :, None] @ mates[:, None].transpose(-1, -2)


@precise
def cell_loss(
    scores: Tensor,  # (S, N, K) of the cells
    cells: Tensor,  # (K, 3, 3), or (S, K, 3, 3)
    rotation: Tensor,  # (S, N, 3, 3)
    mates: Tensor,  # (S, G, 3, 3)
    known: Tensor,  # (S, N) bool
    width_deg: float,
) -> Tensor:
    """Cross-entropy of the cells against a von Mises-Fisher blur (sd ``width_deg``) about the pose and its mates.

    Less the blur's own entropy, so that 0 is perfect.
    """
    with torch.no_grad():
        kappa = math.radians(width_deg) ** -2
        wanted = equivalent(rotation, mates).flatten(-2)  # (S, N, G, 9)
        flat = cells.flatten(-2).transpose(-1, -2)
        cosine = ((wanted.flatten(1, 2) @ flat).unflatten(1, wanted.shape[1:3]).amax(2) - 1) / 2  # to the nearest mate
        target = torch.softmax(kappa * cosine, -1)
        floor = -(target * target.clamp(min=1e-30).log()).sum(-1)
    each = -(target * torch.log_softmax(scores.float(), -1)).sum(-1) - floor
    return (each * known).sum() / known.sum().clamp(min=1)


def hand_signs(
    error: Tensor,  # (2, S, N, T) for both hands, the given one first
    known: Tensor,  # (S, N) bool
    relative: Tensor,  # (S, N, 3, 3), the given hand
    rule: str,
) -> Tensor:  # (S,) bool, True: the other hand
    """Which hand of each SET the loss is taken with; no gradient passes.

    "min": the one with the smaller unweighted error. "anchor": the one in which the first view beside the reference
    has a positive R_rel[0, 2] ("min" where that is too small to tell). "none": as given.
    Raises InputError for another rule.
    """
    if rule not in HANDS:
        raise InputError(f"--hand-loss {rule}: expected one of {', '.join(HANDS)}")
    with torch.no_grad():
        if rule == "none":
            return torch.zeros(len(known), dtype=torch.bool, device=known.device)
        both = (error.mean(-1) * known).sum(-1)  # (2, S)
        other = both[1] < both[0]
        if rule == "min":
            return other
        tells = relative[:, 1, 0, 2]
        return torch.where(tells.abs() < CERTAIN, other, tells < 0)


def set_loss(
    found: tuple[Tensor, Tensor, Tensor],  # c, a, b each (S, N, T, 3)
    relative: Tensor,  # (S, N, 3, 3), R_i R_0^T
    known: Tensor,  # (S, N) bool
    size: int,
    patch: int,
    rule: str,
) -> tuple[Tensor, Tensor]:
    """(error of the maps (S, N, T) with the hand of each set that ``hand_signs`` takes, which sets are mirrored (S,)).

    Mirrored, a map X becomes X J, J = diag(1, 1, -1): once for all views of a set, never per view or patch.
    """
    c, a, b = token_map(relative, size, patch)
    J = relative.new_tensor([1.0, 1.0, -1.0])
    error = torch.stack(
        [map_error(found, (c, a, b), size, patch), map_error(found, (c * J, a * J, b * J), size, patch)]
    )
    other = hand_signs(error, known, relative, rule)
    return torch.where(other[:, None, None], error[1], error[0]), other
