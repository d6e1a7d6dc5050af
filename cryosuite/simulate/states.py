"""What a simulated set is made of: a few states (atoms in one frame) with occupancies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class State:
    """One conformation or composition as weighted atoms.

    Attributes:
        name: for the table and dataset.yaml.
        xyz: (n, 3) float32, A, x y z from the centre of the box.
        weight: (n,) float32, atomic numbers.
    """

    name: str
    xyz: np.ndarray
    weight: np.ndarray

    def __post_init__(self) -> None:
        self.xyz = np.ascontiguousarray(self.xyz, np.float32)
        self.weight = np.ascontiguousarray(self.weight, np.float32)

    @property
    def radius(self) -> float:
        """Distance of the farthest atom from the centre of the box, A."""
        return float(np.sqrt((self.xyz.astype(np.float64) ** 2).sum(1).max()))


@dataclass
class StateSet:
    """The states of a set, how often each occurs, and what is known of the landscape they lie on.

    Attributes:
        recipe: mix, assembly, loop or homogeneous.
        states: K states.
        occupancy: (K,) float64, relative frequencies (sum 1).
        embedding: (K, d) ground-truth coordinates of the states (a loop: cos, sin of its angle), or None.
        details: what dataset.yaml says about the making (structures, masses, axis ...).
    """

    recipe: str
    states: list[State]
    occupancy: np.ndarray | None = None
    embedding: np.ndarray | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        k = len(self.states)
        weights = np.ones(k) if self.occupancy is None else np.asarray(self.occupancy, np.float64)
        self.occupancy = weights / weights.sum()

    def __len__(self) -> int:
        return len(self.states)


def counts(occupancy: np.ndarray, total: int, minimum: int = 0) -> np.ndarray:
    """Images per state: shares of ``total`` by largest remainder, no state below ``minimum`` where that is possible.

    Args:
        occupancy: (K,) relative frequencies.
        total: images in all.
        minimum: fewest images of a state (taken from the most frequent states).

    Returns:
        (K,) int64 with the sum ``total``.
    """
    share = np.asarray(occupancy, np.float64) / np.sum(occupancy) * total
    number = np.floor(share).astype(np.int64)
    order = np.argsort(-(share - number), kind="stable")
    number[order[: total - number.sum()]] += 1
    minimum = min(minimum, total // len(number))
    while (short := minimum - number).max() > 0:
        rare, often = int(np.argmax(short)), int(np.argmax(number))
        number[rare] += 1
        number[often] -= 1
    return number
