"""Work on particles shared out over processes: each takes a run of neighbouring rows, the first adds up what all found.

A function that can share its work takes ``processes`` and shares nothing by default: where the first process alone
calls it, it must not wait for the others. torch is loaded only for several.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from cryosuite.errors import FileError, InputError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
PIECE_BYTES = 1 << 28  # of an array sent in one message


@dataclass(frozen=True)
class Processes:
    """Process ``rank`` of ``count`` that do one piece of work together; a process group must exist for count > 1.

    group: of torch.distributed, of all processes, that sends tensors of the CPU (gloo); None: the one that there is.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def mine(self, rows: np.ndarray, step: int = 1) -> np.ndarray:
        """This process's part of the rows, neighbours of one another; parts begin at multiples of ``step``.

        With the step of a loop over batches every process makes the very batches that one process would make.
        """
        pieces = -(-len(rows) // step)
        begin, end = (step * (pieces * rank // self.count) for rank in (self.rank, self.rank + 1))
        return rows[begin:end]

    def add_up(self, values: Tensor) -> None:
        """Make the first process's ``values`` the sum over all, in place; the others' are worth nothing afterwards."""
        if self.count > 1:
            _distributed().reduce(values, 0, group=self.group)

    def hand_out(self, values: Tensor) -> None:
        """Make ``values`` of all processes those of the first, in place."""
        if self.count > 1:
            _distributed().broadcast(values, 0, group=self.group)

    def together(self) -> None:
        """Wait for all of them."""
        if self.count > 1:
            _distributed().barrier(group=self.group)

    def everyone(self, work: Callable[[], T]) -> list[T]:
        """What ``work()`` gives in each process, in their order, in all of them.

        Raises in all processes the InputError that is raised in one of them, of its kind; an OSError is a FileError.
        """
        if self.count == 1:
            return [work()]
        said: list[Any] = [None] * self.count
        _distributed().all_gather_object(said, _outcome(work), group=self.group)
        for _, trouble in said:
            if trouble is not None:
                raise trouble
        return [result for result, _ in said]

    def each(self, work: Callable[[], T]) -> T:
        """What ``work()`` gives in this process, which stays here; raises in all processes as `everyone` does."""
        kept: list[T] = []
        self.everyone(lambda: kept.append(work()))
        return kept[0]

    def first_does(self, work: Callable[[], T]) -> T:
        """What ``work()`` gives in the first process, in all of them; the others only wait.

        Raises in all processes what is raised in the first, as ``everyone`` does.
        """
        if self.count == 1:
            return work()
        said: list[Any] = [_outcome(work) if self.first else None]
        _distributed().broadcast_object_list(said, 0, group=self.group)
        result, trouble = said[0]
        if trouble is not None:
            raise trouble
        return result

    def joined(self, part: np.ndarray, to_all: bool = True) -> np.ndarray:
        """The arrays of all processes below each other, in their order; the parts differ in length only.

        Sent piece by piece, so that memory holds the whole once. ``to_all=False``: in the first process alone, the
        others get their own part back.
        """
        if self.count == 1:
            return part
        import torch

        part = np.ascontiguousarray(part)
        lengths = self.everyone(lambda: len(part))
        edges = np.cumsum([0, *lengths])
        whole = np.empty((edges[-1], *part.shape[1:]), part.dtype) if self.first or to_all else part
        if self.first or to_all:
            whole[edges[self.rank] : edges[self.rank + 1]] = part
        for rank in range(self.count):
            if not (self.first or to_all or rank == self.rank):
                continue
            rows = whole[edges[rank] : edges[rank + 1]] if self.first or to_all else whole
            for piece in torch.from_numpy(rows.reshape(-1).view(np.uint8)).split(PIECE_BYTES):
                if not len(piece):
                    continue
                if to_all:
                    torch.distributed.broadcast(piece, rank, group=self.group)
                elif rank and self.first:
                    torch.distributed.recv(piece, rank, group=self.group)
                elif rank:
                    torch.distributed.send(piece, 0, group=self.group)
        return whole


def _outcome(work: Callable[[], T]) -> tuple[T | None, InputError | None]:
    """(what ``work()`` gives, None), or (None, its error as all processes can be told it)."""
    try:
        return work(), None
    except InputError as error:
        return None, type(error)(str(error))  # without what it holds on to: causes need not be fit to be sent
    except OSError as error:
        return None, FileError(error)


def _distributed() -> Any:
    import torch

    return torch.distributed


ALONE = Processes()
