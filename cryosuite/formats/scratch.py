"""Scratch folders that do not outlive a killed process for long: the next one that asks removes them.

Each holds a file that its process keeps locked for as long as it lives, so that the living are told from the dead. The
lock goes with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_LOCK = "in-use"


def claim_scratch(prefix: str, parent: str | os.PathLike | None = None) -> tuple[Path, int]:
    """(path, descriptor of the lock) of a new folder in ``parent`` (None: the system's), for `drop_scratch`."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with contextlib.suppress(OSError):  # no locks on this disk: nobody will remove it
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:  # 0: taken for a dead one in the moment before it was locked
            return path, lock
        os.close(lock)


def drop_scratch(path: Path, lock: int) -> None:
    """Delete a folder whose lock this process holds."""
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
    shutil.rmtree(path, ignore_errors=True)  # a network disk keeps a deleted file in its folder until it is closed


def remove_dead_scratch(prefix: str, parent: str | os.PathLike | None = None) -> None:
    """Delete the folders of `claim_scratch` in ``parent`` whose lock nobody holds; links and other folders stay."""
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir() if parent is None else parent) as entries:
        found = [Path(entry) for entry in entries if entry.name.startswith(prefix) and not entry.is_symlink()]
        for path in found:
            with contextlib.suppress(OSError):  # BlockingIOError: its process lives; others: no such lock, or not ours
                lock = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    os.close(lock)
                    continue
                drop_scratch(path, lock)
