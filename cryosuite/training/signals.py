"""Being stopped in time: SIGTERM, SIGUSR1 and Ctrl-C end the training at the next step, with a checkpoint.

What a scheduler does and what we do:

- SLURM pre-empts with SIGTERM (PreemptMode=REQUEUE puts the job back by itself); Kubernetes and `timeout` send SIGTERM
  too. We write a checkpoint and leave with exit code 85.
- `#SBATCH --signal=USR1@120` sends SIGUSR1 two minutes before the time limit. We write a checkpoint, put the job back
  with `scontrol requeue $SLURM_JOB_ID` where the option ``requeue`` asks for it, and leave with exit code 85.
- Exit code 85 says "not finished, a checkpoint is there, start me again with --resume". It is what HTCondor takes
  for a checkpoint exit, and SLURM puts the job back by itself where slurm.conf has RequeueExit=85. A batch script
  can also do it: `cryosuite train-... --resume || { [ $? -eq 85 ] && scontrol requeue $SLURM_JOB_ID; }`.
- A job cancelled with `scancel` gets SIGTERM and is never put back by us.
- The first Ctrl-C leaves with a checkpoint and exit code 130, a second one at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, TracebackType

from cryosuite.errors import notice

REQUEUE_EXIT_CODE = 85
EXIT_CODES = {"SIGTERM": REQUEUE_EXIT_CODE, "SIGUSR1": REQUEUE_EXIT_CODE, "SIGINT": 130}


class StopNow(BaseException):
    """A stop signal arrived while nothing would be lost by leaving at once; its text is the signal's name."""


class StopSignals:
    """Inside the block the first SIGTERM, SIGUSR1 or SIGINT is noted in ``received`` instead of killing the process.

    The handlers of before are put back at the end of the block; a second SIGINT interrupts at once. Outside the main
    thread Python allows no handlers, and nothing is caught.
    """

    def __init__(self) -> None:
        self.received = ""
        self._at_once = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in EXIT_CODES:
                number = signal.Signals[name]
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = self.received or name
        if self._at_once:
            self._at_once = False
            raise StopNow(self.received)

    @contextmanager
    def leave_at_once(self) -> Iterator[None]:
        """Inside the block a stop signal raises StopNow instead of waiting for the next step."""
        if self.received:
            raise StopNow(self.received)
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False


@contextmanager
def left_at_once() -> Iterator[None]:
    """Inside the block a stop signal raises StopNow wherever the work is: for what a resumed run does once more.

    So does whatever goes wrong after a signal: another process of the same command may have left before this one.
    """
    with StopSignals() as signals:
        try:
            with signals.leave_at_once():
                yield
        except Exception:
            if signals.received:
                raise StopNow(signals.received) from None
            raise


def exit_code(stopped: str) -> int:
    """The exit code of a command whose training was stopped by this signal; 0 for "" and "max_minutes"."""
    return EXIT_CODES.get(stopped, 0)


def requeue_job(stopped: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Put this SLURM job back into the queue if it was stopped by SIGUSR1; True when scontrol did so.

    Call on one process only, after the checkpoint. Says so in a notice where scontrol fails.
    """
    job = environ.get("SLURM_JOB_ID")
    if stopped != "SIGUSR1" or not job:
        return False
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        notice(f"the job could not be put back into the queue: scontrol requeue {job}: {error}")
        return False
    if done.returncode:
        notice(f"the job could not be put back into the queue: scontrol requeue {job}: {done.stderr.strip()}")
    return done.returncode == 0
