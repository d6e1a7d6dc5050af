"""Memory that is used again: the system's fresh pages cost as much time as the images that are read into them."""

from __future__ import annotations

import math
import weakref

import numpy as np


class _Lease:
    """What all views of one use of some memory hold on to; when it goes, the memory is free again."""

    def __init__(self, memory: np.ndarray) -> None:
        self.__array_interface__ = memory.__array_interface__


class Buffers:
    """Arrays that give their memory back by themselves; at most ``keep`` pieces wait for their next use.

    Safe to use from several threads.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._free: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array of float32 with whatever the memory holds; it is used again once no view of the array is left."""
        size = math.prod(shape)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(size, np.float32)
        if memory.size < size:
            memory = np.empty(size, np.float32)
        lease = _Lease(memory)
        weakref.finalize(lease, self._give_back, memory).atexit = False
        return np.asarray(lease)[:size].reshape(shape)

    def _give_back(self, memory: np.ndarray) -> None:
        if len(self._free) < self.keep:
            self._free.append(memory)
