"""When memory runs out: knowing it by its many names, and going on with portions half as large."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from cryosuite.errors import InputError, notice

T = TypeVar("T")

# what allocators and libraries say where they do not raise torch.OutOfMemoryError
SAID = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "CUFFT_ALLOC")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the GPU, or the machine, has no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)


def halved(size: int, what: str) -> int:
    """Half as many of ``what`` at a time, said in a notice, and the memory of the GPU's cache given back.

    Raises InputError where there is nothing to halve.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if size <= 1:
        gpu = torch.cuda.is_initialized()  # by this run: else it computes on the CPU, whatever the machine has
        of = "the GPU (nvidia-smi shows it), or run with --accelerator cpu" if gpu else "this machine's memory"
        raise InputError(f"not enough memory for one of the {what}: end what else uses {of}")
    notice(f"out of memory with {size} {what} at a time: going on with {size // 2}; the result is the same")
    return size // 2


class Portions:
    """Work on rows in portions; where memory runs out the portion is tried again in halves, and so are all that follow.

    ``size``: rows at a time to begin with (None: all that are asked for); ``what``: what rows are, for the notice.
    """

    def __init__(self, what: str, size: int | None = None) -> None:
        self.what, self.size = what, size

    def over(self, work: Callable[[slice], T], count: int) -> Iterator[tuple[slice, T]]:
        """(rows, ``work(rows)``) for consecutive rows that together are 0 .. count.

        Raises InputError where not even one row fits, and whatever ``work`` raises for other reasons.
        """
        start = 0
        while start < count:
            rows = slice(start, min(start + (self.size or count), count))
            try:
                found = [work(rows)]
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                found = []
            if not found:  # outside the except clause, whose traceback would keep the tensors
                self.size = halved(rows.stop - rows.start, self.what)
                continue
            yield rows, found[0]
            start = rows.stop
