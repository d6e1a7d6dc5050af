"""Scores of maps to which particles were assigned: each particle's map against the particle's own truth.

The headline of BENCHMARKS section 3 (per-image AUC) samples some hundred images. Where every image of a class has the
same map there are only as many different comparisons as occupied pairs (state, class), so all images are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cryosuite.errors import InputError
from cryosuite.metrics.truth import TruthReader, score_volumes


@dataclass
class AssignedScores:
    """AUC of the maps that the particles of each state were given.

    Attributes:
        states: (S,) states that occur. counts: (S,) particles of each.
        auc: "unmasked" and, with a mask, "masked" -> (S,) raw AUC, mean over the particles of the state.
    """

    states: np.ndarray
    counts: np.ndarray
    auc: dict[str, np.ndarray]

    def per_state(self, name: str) -> float:
        """Mean over states, each counted once."""
        return float(self.auc[name].mean())

    def per_image(self, name: str) -> float:
        """Mean over all particles."""
        return float(np.average(self.auc[name], weights=self.counts))

    def summary(self) -> dict[str, Any]:
        """Means and the values of each state, for JSON."""
        out: dict[str, Any] = {}
        for name, values in self.auc.items():
            out[f"per_state_{name}"], out[f"per_image_{name}"] = self.per_state(name), self.per_image(name)
            out[f"states_{name}"] = np.round(values, 5).tolist()
        return out


def score_assigned(
    class_map: Callable[[int], torch.Tensor],
    classes: np.ndarray,
    labels: np.ndarray,
    truth: TruthReader,
    pixel_size: float,
    mask: torch.Tensor | None = None,
    compat: bool = False,
) -> AssignedScores:
    """Judge the map of each particle's class against the truth of the particle's state, for all particles.

    Args:
        class_map: class -> its map (D, D, D); asked once per state and class that meet.
        classes: (N,) class of each particle. labels: (N,) true state of each.
        truth: state -> its map. mask: (D, D, D) applied to both, or None.
        compat: CryoBench's shells and absolute FSC.

    Raises:
        InputError: lengths differ, or there are no particles.
    """
    classes, labels = np.asarray(classes), np.asarray(labels)
    if len(classes) != len(labels):
        raise InputError(f"{len(classes)} classes for {len(labels)} true states: one per particle is needed")
    pairs, counts = np.unique(np.stack([labels, classes], 1), axis=0, return_counts=True)
    found = score_volumes(((int(k), int(s), class_map(int(k))) for s, k in pairs), truth, pixel_size, mask, compat)
    states = np.unique(labels)
    position = np.searchsorted(states, pairs[:, 0])
    total = np.bincount(position, weights=counts)
    auc = {name: np.bincount(position, weights=counts * found.auc(name)) / total for name in found.curves}
    return AssignedScores(states, total.astype(np.int64), auc)


def states_found(labels: np.ndarray, classes: np.ndarray) -> int:
    """How many states have a class of their own: most of the state's particles are in it, and most of it are theirs.

    Args:
        labels: (N,) true states. classes: (N,) classes found, any numbers.
    """
    states, row = np.unique(np.asarray(labels), return_inverse=True)
    names, column = np.unique(np.asarray(classes), return_inverse=True)
    table = np.zeros((len(states), len(names)), np.int64)
    np.add.at(table, (row, column), 1)
    best = table.argmax(1)
    return int((table.argmax(0)[best] == np.arange(len(states))).sum())
