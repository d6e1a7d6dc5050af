"""When one process of a training ends with an error, all end at once: none waits half an hour for the one that is gone.

Processes that compute on processors notice by themselves, as their connection closes. On GPUs a process waits in NCCL
until the time limit of messages is over, unless the launcher ends it; ``torchrun`` does, ``srun`` may not.
"""

from __future__ import annotations

import os
import sys
from threading import Event, Thread
from types import TracebackType
from typing import Any

import torch

from cryosuite.console import complain
from cryosuite.errors import InputError

SECONDS = 1.0  # between two looks
GRACE = 3.0  # seconds in which a process may meet the same error by itself
ENDED, TOLD = "cryosuite/ended", "cryosuite/told"
GONE = "another process of this command has ended, and this one cannot go on without it; see what it said"


class Lookout:
    """Around a training of several processes; does nothing for one.

    A process that leaves the block by an error says so to all others. They end within seconds with exit code 2,
    whatever they are waiting for, and the first one prints the message: the same error is told once.
    """

    def __init__(self, rank: int, processes: int) -> None:
        self.rank, self.processes, self._over = rank, processes, Event()

    def __enter__(self) -> Lookout:
        if self.processes > 1:
            self._store: Any = torch.distributed.distributed_c10d._get_default_store()
            self._thread = Thread(target=self._watch, daemon=True, name="cryosuite-lookout")
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        if self.processes == 1:
            return
        self._thread.join(2 * SECONDS)
        if isinstance(error, Exception) and self._told_by_the_first(error):
            raise SystemExit(2)

    def _told_by_the_first(self, error: Exception) -> bool:
        """Say to all that this process ends; whether the first process has told, or will tell, why."""
        text = str(error) if isinstance(error, InputError) else ""
        try:
            self._store.compare_set(ENDED, "", text or GONE)
            if self.rank == 0:
                self._store.set(TOLD, "yes")
                Event().wait(2 * SECONDS)  # it may be the store itself that ends with this process
                return False
            if not text:
                return False  # not a message but a traceback, which nobody else can show
            for _ in range(int(3 * GRACE / SECONDS)):
                if self._store.check([TOLD]):
                    Event().wait(2 * SECONDS + GRACE)  # a launcher that sees this one leave ends the first at once
                    return True
                Event().wait(SECONDS)
        except RuntimeError:  # the first process keeps what they say: it has ended
            return False
        return False

    def _watch(self) -> None:
        """Look now and then whether another process has ended; end this one then."""
        while not self._over.wait(SECONDS):
            try:
                text = self._store.get(ENDED).decode() if self._store.check([ENDED]) else ""
            except RuntimeError:  # the process that kept it is gone
                text = GONE
            if not text:
                continue
            if not self._over.wait(GRACE):
                self._leave(text)
            return

    def _leave(self, text: str) -> None:
        """End this process; never returns."""
        if self.rank == 0:
            complain(f"error: {text}")
            try:
                self._store.set(TOLD, "yes")
                self._over.wait(2 * SECONDS)
            except RuntimeError:
                pass
        else:
            self._over.wait(GRACE)  # a launcher that sees this one leave ends the first before it has told
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(2)
