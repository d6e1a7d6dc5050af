"""Processes forked from a test so that nothing is imported again; none outlives its time, and what hangs says where."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cryosuite.cli import main
from cryosuite.data.processes import Processes


@dataclass
class Ended:
    """What a process left: its exit code (negative: the signal it died of) and what it printed."""

    code: int
    out: str
    err: str


def together(
    folder: Path,
    words: list[object],
    count: int = 2,
    seconds: float = 240.0,
    before: Callable[[], None] | None = None,
    ended: bool = True,
) -> list[Ended]:
    """``cryosuite WORDS`` in ``count`` processes; when one fails the others are ended, as torchrun does.

    folder: for what they print. before: called in each of them first. ended: False: nobody ends them, as under srun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = [str(word) for word in words]
    pids = [_start(folder, text, rank, count, port, before) for rank in range(count)]
    codes = wait(pids, seconds, ended, lambda: (folder / "err0").read_text())
    return [
        Ended(codes[rank], (folder / f"out{rank}").read_text(), (folder / f"err{rank}").read_text())
        for rank in range(count)
    ]


def one_and_two(folder: Path, words: list[object]) -> tuple[Path, Path]:
    """What a command writes (-o) in one and in two processes; all of them end well and only the first one speaks."""
    for name, count in (("one", 1), ("two", 2)):
        for rank, ended in enumerate(together(folder / f"said_{name}", [*words, "-o", folder / name], count)):
            assert ended.code == 0, ended.err
            assert rank == 0 or not ended.out + ended.err, ended
    return folder / "one", folder / "two"


def each(folder: Path, work: Callable[[Processes], None], count: int = 3, seconds: float = 240.0) -> None:
    """``work`` in so many processes that speak by gloo; all of them end well.

    folder: where they meet.
    """

    def meet(rank: int) -> None:
        import torch

        where = f"file://{folder}/meet"
        torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=count)
        torch.distributed.barrier()  # one that ended before the others are connected would leave them calling it
        work(Processes(rank, count))

    assert wait([fork(partial(meet, rank)) for rank in range(count)], seconds) == [0] * count


_LASTING: set[str] = set()  # native threads of libraries


def fork(work: Callable[[], None]) -> int:
    """A process that does ``work`` and ends with the code of its SystemExit, 1 after another error; its number."""
    _let_threads_go()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _let_threads_go(seconds: float = 2.0) -> None:
    """Wait for threads that are joined and not yet gone.

    Python joins a thread before its native end, in which MKL holds a lock on the memory of all threads. A process
    forked in that moment finds it held for ever: of 1,500 forks right after a thread that did an FFT 7 hung.
    """
    deadline = time.monotonic() + seconds
    while True:
        known = {str(thread.native_id) for thread in threading.enumerate()} | _LASTING
        going = set(os.listdir("/proc/self/task")) - known
        if not going:
            return
        if time.monotonic() > deadline:
            _LASTING.update(going)
        time.sleep(0.001)


def wait(pids: list[int], seconds: float, ended: bool = True, said: Callable[[], str] = lambda: "") -> list[int]:
    """Exit codes (negative: the signal) of processes; AssertionError, with what they ``said``, after so many seconds.

    ended: end all others when one fails. Processes that hang print where to their standard error.
    """
    running, codes = set(pids), {}
    deadline = time.monotonic() + seconds
    while running:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                running.remove(pid)
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] and ended:
                    for other in running:
                        os.kill(other, signal.SIGTERM)
        if time.monotonic() > deadline:
            for number in (signal.SIGABRT, signal.SIGKILL):  # faulthandler prints where an aborted process was
                for pid in running:
                    os.kill(pid, number)
                time.sleep(1)
            for pid in running:
                os.waitpid(pid, 0)
            raise AssertionError(f"{len(running)} of {len(pids)} processes hang: {said()[-8000:]}")
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def _start(folder: Path, words: list[str], rank: int, count: int, port: int, before: Callable[[], None] | None) -> int:
    """Fork a process that does a command; its number."""

    def work() -> None:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{name}{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        faulthandler.enable(file=sys.stderr)
        if count > 1:
            os.environ.update(
                {"TORCHELASTIC_RUN_ID": "toy", "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
                 "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
            )  # fmt: skip
        sys.argv = ["cryosuite", *words]
        if before is not None:
            before()
        main()

    return fork(work)
