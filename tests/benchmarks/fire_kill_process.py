"""Processes that are killed at a moment of their CPU time: forks of one that has the libraries loaded."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TICK = os.sysconf("SC_CLK_TCK")
START_CPU = 4.0  # CPU seconds that a fresh interpreter takes to load everything


@dataclass(frozen=True)
class Ended:
    """A process that came to its end by itself: its exit code and CPU seconds."""

    code: int
    cpu: float


@dataclass(frozen=True)
class Killed:
    """A process that was killed after so many CPU seconds."""

    cpu: float


def preload() -> None:
    """Import what the commands need, once for all forks."""
    import importlib
    import pkgutil

    import cryosuite

    for found in pkgutil.walk_packages(cryosuite.__path__, "cryosuite."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    for name in ("pandas", "scipy.spatial", "sklearn.cluster", "sklearn.mixture", "matplotlib.figure", "timm",
                 "torch._dynamo", "torch.optim", "lightning_fabric", "skimage.measure"):  # fmt: skip
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


_loaded = False


def work(
    arguments: list[str], log: Path, moment: float | None = None, disaster: Callable[[], object] | None = None
) -> Ended | Killed:
    """Run ``cryosuite ARGUMENTS`` in a fork; SIGKILL to its group once it has used ``moment`` CPU seconds.

    ``disaster``: what happens at that moment instead.
    """
    global _loaded
    if not _loaded:
        preload()
        _loaded = True
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _become(arguments, log)
    return _watch(child, moment, disaster)


def _become(arguments: list[str], log: Path) -> None:
    """The child: a process group of its own, output to a file, then the command; never returns."""
    code = 70
    try:
        os.setpgid(0, 0)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.argv = ["cryosuite", *arguments]
        from cryosuite.cli import main

        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def start_up(arguments: list[str], log: Path, random: np.random.Generator) -> Ended | Killed:
    """The same with a fresh interpreter, killed while it starts up or soon after."""
    with open(log, "wb") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "cryosuite", *arguments], stdout=out, stderr=out, preexec_fn=os.setpgrp
        )
    return _watch(child.pid, float(random.uniform(0, 1.2 * START_CPU)))


def _watch(child: int, moment: float | None, disaster: Callable[[], object] | None = None) -> Ended | Killed:
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            return Ended(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime)
        if moment is None:
            time.sleep(0.05)
            continue
        left = moment - _cpu(child)
        if left <= 0 and disaster is not None:
            disaster()
            moment = None
        elif left <= 0:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            _, status, used = os.wait4(child, 0)
            cpu = used.ru_utime + used.ru_stime
            if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
                return Ended(os.waitstatus_to_exitcode(status), cpu)
            return Killed(cpu)
        time.sleep(min(max(left / 2, 0.002), 0.2))


def _cpu(process: int) -> float:
    """CPU seconds of a process until now, its finished children included."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / TICK
