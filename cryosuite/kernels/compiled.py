"""Loops for the CPU, compiled by numba at first use and cached on disk. They release the interpreter lock."""

from __future__ import annotations

import functools
from collections.abc import Callable

__all__ = ["CONTRACT", "SUMS", "available", "compiled"]

# what the compiler may take for granted; never that there is no NaN, which range checks rely on
CONTRACT = frozenset({"contract"})  # fused multiply-adds only: the order of operations stays
SUMS = frozenset({"contract", "reassoc", "nsz"})  # sums may be reordered, which vector registers need


@functools.cache
def available() -> bool:
    """Whether numba can be imported."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def compiled(loop: Callable, fastmath: frozenset[str] = CONTRACT) -> Callable:
    """The loop, compiled; without a place on disk to keep the code it is compiled anew in every process."""
    import numba

    options = {"nogil": True, "fastmath": set(fastmath)}
    try:
        return numba.njit(cache=True, **options)(loop)
    except RuntimeError:
        return numba.njit(**options)(loop)
