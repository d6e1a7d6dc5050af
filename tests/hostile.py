"""One hostile file before a reader: what may come of it, and the eyes that see when something else does.

A reader may return or raise InputError with one printable line. Anything else is a fault: another exception, more than
``SECONDS`` of processor time, more than four times the file's size and ``FLOOR`` bytes of memory, a program started, a
connection opened, a file written, a pickle's global looked up.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import resource
import signal
import sys
import time
import traceback
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryosuite.errors import InputError, UserNotice

SECONDS = 5
FLOOR = 2_000_000  # bytes that a reader may use whatever the size of the file: tables of strings, buffers
YAML_MOST = 200_000_000  # bytes: a file of more than 100,000 values is refused
SPARE = 512 << 20  # address space that a process under ``limited_memory`` may still take
FORBIDDEN = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "ctypes.dlopen",
             "pickle.find_class", "shutil.rmtree", "os.remove", "os.rename"}  # fmt: skip


class Hang(BaseException):
    """Raised by the alarm: no reader's ``except Exception`` can swallow it."""


@dataclass(frozen=True)
class Fault:
    """What went wrong: one line that is the same for the same fault, and all there is to say about it."""

    what: str
    details: str


@dataclass(frozen=True)
class Outcome:
    """How a reader took a file: read, refused, or at fault; processor seconds and peak memory (bytes)."""

    result: str
    seconds: float
    peak: int
    fault: Fault | None = None
    message: str = ""


_seen: list[str] = []
_bad: list[Fault] = []  # refusals that were not as they should be
_watching = False
_hooked = False


def _audit(event: str, arguments: tuple) -> None:
    if not _watching:
        return
    if event in FORBIDDEN:
        _seen.append(f"{event} {arguments!r}"[:300])
    elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        _seen.append(f"open for writing {arguments[0]!r}"[:300])


@contextmanager
def watched(writes: bool = False) -> Iterator[list[str]]:
    """What Python itself reports of forbidden deeds within the block (``writes``: files may be written)."""
    global _watching, _hooked
    if not _hooked:  # such a hook stays for the life of the process: it looks away outside the block
        sys.addaudithook(_audit)
        _hooked = True
    _seen.clear()
    _watching = not writes
    try:
        yield _seen
    finally:
        _watching = False


@contextmanager
def alarm(seconds: float = SECONDS) -> Iterator[None]:
    """Raise ``Hang`` after so much processor time of this process."""

    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def limit_memory(spare: int = SPARE) -> None:
    """Let this process take no more address space than it has and ``spare`` bytes; for processes made for this."""
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + spare, now + spare))


def attempt(read: Callable[[Path], object], path: Path, size: int | None = None, writes: bool = False) -> Outcome:
    """Let a reader take a file and judge what comes of it; ``size`` in bytes where it is not that of the file."""
    size = _content(path) if size is None else size
    fault = None
    _bad.clear()
    result, message, notices = "read", "", []
    began = time.process_time()
    with warnings.catch_warnings(record=True) as caught, watched(writes) as deeds:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserNotice)
        tracemalloc.start()
        try:
            with alarm():
                read(path)
        except InputError as error:
            result, message = "refused", str(error)
            judge(error)
        except Hang:
            fault = Fault(f"hang: {_place(sys.exc_info()[2])}", traceback.format_exc())
        except BaseException as error:  # a KeyboardInterrupt or SystemExit out of a reader is a fault as well
            fault = Fault(f"{type(error).__name__}: {_place(error.__traceback__)}", traceback.format_exc())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        notices = [str(one.message) for one in caught]
    seconds = time.process_time() - began
    bad = [text for text in notices if not text.isprintable()]
    fault = fault or next(iter(_bad), None)
    if fault is None and deeds:
        fault = Fault(f"deed: {deeds[0].split()[0]}", "\n".join(deeds))
    if fault is None and peak > _allowed(path, size):
        fault = Fault("memory", f"{peak} bytes for a file of {size}")
    if fault is None and bad:
        fault = Fault("notice not printable", repr(bad[0]))
    return Outcome("fault" if fault else result, seconds, peak, fault, message)


def _allowed(path: Path, size: int) -> int:
    """Bytes that a reader may take for a file: no header may make it more, whatever it says."""
    if path.suffix in (".yaml", ".yml"):  # a node of PyYAML takes about 1 kB, and may be two characters long
        return FLOOR + min(600 * size, YAML_MOST)
    if path.suffix in (".json", ".jsonl"):  # "1," becomes a number of 28 bytes and a pointer of 8
        return FLOOR + 20 * size
    return FLOOR + 4 * size


def _content(path: Path) -> int:
    """Bytes of a file, or of what is in it where it is a gzip file: a map of zeros shrinks a thousand times.

    Of a broken one what comes out before it breaks does not count: who reads it need not keep that.
    """
    if path.suffix == ".gz":
        with contextlib.suppress(OSError, EOFError, zlib.error), gzip.open(path) as stream:
            return max(path.stat().st_size, len(stream.read(64 << 20)))
    return path.stat().st_size


def judge(error: InputError) -> None:
    """A refusal is one printable line with something in it, and no failed attempt to take all memory: else a fault."""
    message = str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            _bad.append(Fault(f"MemoryError behind: {_place(cause.__traceback__)}", message))
        cause = cause.__cause__ or cause.__context__
    if not message.strip() or not message.isprintable():
        _bad.append(Fault(f"message not one printable line: {_place(error.__traceback__)}", repr(message)))


def _place(trace: object) -> str:
    """The last line of ours in a traceback, and the last of all."""
    frames = traceback.extract_tb(trace)
    ours = [f"{Path(f.filename).name}:{f.name}" for f in frames if "cryosuite" in f.filename.split(os.sep)]
    return f"{ours[-1] if ours else '-'} / {frames[-1].name if frames else '-'}"
