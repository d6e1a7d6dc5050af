"""Random numbers of the rows of a batch, the same however many processes share the batch.

Every process draws the numbers of ALL rows from generators in the same state and keeps those of its own rows. Numbers
are cheap; what is done with them is shared. Where nobody shares a batch nothing is different from drawing directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """The rows ``own`` (a slice, or a list) of a batch of ``total`` rows that several processes share."""

    own: slice | list[int]
    total: int

    def __len__(self) -> int:
        return len(range(self.total)[self.own]) if isinstance(self.own, slice) else len(self.own)


_current: Share | None = None  # of all threads: activations are computed again in the threads of a backward pass


@contextmanager
def sharing(share: Share | None) -> Iterator[None]:
    """Inside, batches of as many rows as ``share`` has are those rows of a larger one; None: batches are whole."""
    global _current
    before, _current = _current, share
    try:
        yield
    finally:
        _current = before


def share_of(count: int) -> Share | None:
    """The share that a batch of ``count`` rows is; None for a whole batch."""
    return _current if _current is not None and len(_current) == count else None


def whole(count: int) -> int:
    """Rows of the whole batch of which this process has ``count``."""
    share = share_of(count)
    return count if share is None else share.total


def rows(draw: Callable[[int], Tensor], count: int, share: Share | None = None) -> Tensor:
    """``draw(n)`` gives numbers (n, ...) for n rows; those (count, ...) of this process's rows.

    share: what the rows are; default: what ``sharing`` says.
    """
    share = share or share_of(count)
    return draw(count) if share is None else draw(share.total)[share.own]


def rand(count: int, *shape: int, **how: object) -> Tensor:
    """``torch.rand(count, *shape)`` whose first axis counts the rows of a batch."""
    return rows(lambda n: torch.rand(n, *shape, **how), count)


def randn(count: int, *shape: int, **how: object) -> Tensor:
    """``torch.randn(count, *shape)`` whose first axis counts the rows of a batch."""
    return rows(lambda n: torch.randn(n, *shape, **how), count)
