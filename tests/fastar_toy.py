"""Networks that know the truth, for tests of fastar-infer: they answer as a trained one would, with planted errors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cryosuite.kernels.planar import mirror, relative
from cryosuite.kernels.rotations import expmap, random_rotations
from cryosuite.methods.fastar_predict import Answer, Clock
from cryosuite.nets.multiview import SPECS

SPEC = SPECS["micro"]


def turned(rotation: Tensor, degrees: float, seed: int) -> Tensor:
    """Rotations (..., 3, 3) with turns of that median angle."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(*rotation.shape[:-2], 3, generator=generator) * np.deg2rad(degrees) / 1.538
    return expmap(vectors) @ rotation


class TargetOracle:
    """Poses of a set known in advance: ``degrees`` and ``pixels`` off, a share of them anywhere and unsure of it."""

    spec = SPEC

    def __init__(
        self, rotation: np.ndarray, shift: np.ndarray, degrees: float = 10.0, share: float = 1.0, bad: float = 0.0,
        shift_error: float = 0.02, seed: int = 0,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        R = torch.from_numpy(rotation)
        self.rotation = turned(R, degrees, seed)
        self.wrong = torch.rand(len(R), generator=generator) < bad
        anywhere = random_rotations(len(R), generator)
        self.rotation = torch.where(self.wrong[:, None, None], anywhere, self.rotation)
        noise = shift_error * torch.randn(len(R), 2, generator=generator)
        self.shift = (torch.from_numpy(shift) + noise) / share  # in fractions of the network's field
        self.truth = R

    def __call__(self, images: Tensor, rows: Tensor) -> Answer:
        """The planted answers of some rows; the true pose is among the rivals where the answer is wrong."""
        sure = torch.where(self.wrong[rows], 0.1, 0.9) + 0.01 * torch.sin(rows.float())
        rivals = torch.stack([self.rotation[rows], turned(self.truth[rows], 10.0, 5)], 1)
        return Answer(self.rotation[rows], self.shift[rows], rivals, sure, 10 * sure)


class StarOracle:
    """Relative poses of a set known in advance, in the hand that the third image of a set happens to give."""

    spec, device = SPEC, torch.device("cpu")

    def __init__(self, rotation: np.ndarray, shift: np.ndarray, degrees: float = 5.0, hands: bool = True) -> None:
        self.truth, self.shift = torch.from_numpy(rotation), torch.from_numpy(shift)
        self.degrees, self.hands, self.clock, self.calls = degrees, hands, Clock(), 0
        self.favourite = len(rotation) // 3  # the reference under which it is surest

    def encode(self, images: Tensor, rows: Tensor) -> Tensor:
        """Its tokens are the number of the image."""
        return rows.float().view(-1, 1, 1)

    def decode(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy relative poses of sets of tokens (..., N, 1, 1)."""
        sets = tokens if tokens.ndim == 4 else tokens[None]
        rows = sets[..., 0, 0].long()
        self.calls += 1
        found = turned(relative(self.truth[rows]), self.degrees, self.calls)
        if self.hands:
            flip = (rows[:, -1] % 2 == 1)[:, None, None, None]
            found = torch.where(flip, mirror(found), found)
        confidence = 2 + 0.5 * torch.cos(rows.float())
        confidence = confidence - 0.01 * (rows[:, :1] - self.favourite).abs()
        values = found, self.shift[rows], confidence
        return values if tokens.ndim == 4 else tuple(value[0] for value in values)
