"""The same work on many pieces, in threads: for loops over maps, where torch's own threads have too little to share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

T, R = TypeVar("T"), TypeVar("R")
BYTES = 2 << 30  # that pieces in work take together


def in_threads(work: Callable[[T], R], pieces: Iterable[T], threads: int = 0, piece_bytes: int = 0) -> Iterator[R]:
    """``work`` of each piece, in the order of the pieces, whatever the number of threads.

    Torch has one thread in each of them, so that its sums do not depend on their number either. To be read to its end
    or closed.

    Args:
        threads: at most so many; 0: as many as torch has. piece_bytes: that one piece takes while in work: threads are
            spared beyond BYTES together.
    """
    before = torch.get_num_threads()
    threads = max(1, min(threads or before, BYTES // max(piece_bytes, 1)))
    torch.set_num_threads(1)
    try:
        if threads == 1:
            yield from map(work, pieces)
            return
        waiting = iter(pieces)
        # in each thread anew: the library that transforms asks nobody else, and would use threads of its own
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            running = deque(pool.submit(work, piece) for piece in islice(waiting, threads + 1))
            while running:
                found = running.popleft().result()
                running.extend(pool.submit(work, piece) for piece in islice(waiting, 1))
                yield found
    finally:
        torch.set_num_threads(before)
