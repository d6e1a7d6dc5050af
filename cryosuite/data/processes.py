"""Work on particles shared out over processes: each takes a run of neighbouring rows, the first adds up what all found.

A function that can share its work takes ``processes`` and shares nothing by default: inside a training of several
processes the first one alone makes maps, and must not wait for the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """Process ``rank`` of ``count`` that do one piece of work together; a process group must exist for count > 1."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def mine(self, rows: np.ndarray) -> np.ndarray:
        """This process's part of the rows, neighbours of one another."""
        return rows[len(rows) * self.rank // self.count : len(rows) * (self.rank + 1) // self.count]

    def add_up(self, values: Tensor) -> None:
        """Make the first process's ``values`` the sum over all, in place; the others' are worth nothing afterwards."""
        if self.count > 1:
            torch.distributed.reduce(values, 0)

    def together(self) -> None:
        """Wait for all of them."""
        if self.count > 1:
            torch.distributed.barrier()


ALONE = Processes()
