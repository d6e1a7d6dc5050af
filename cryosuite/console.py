"""The terminal: messages on stderr, tables on stdout, progress with rate and ETA."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from cryosuite.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

PLAIN_SECONDS = 15.0  # without a terminal a progress line is written this often
_hushed = False


def hush() -> None:
    """Print nothing in this process from now on, errors apart: of several processes only the first one speaks."""
    global _hushed
    _hushed = True


def messages() -> Console:
    """The rich console for messages and progress (stderr)."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, quiet=_hushed)


def output() -> Console:
    """The rich console for results (stdout); not narrower than a table needs when piped to a file."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 140, quiet=_hushed)


def say(message: str) -> None:
    """Print one message to stderr, its control characters taken out."""
    messages().print(_printable(message), markup=False, soft_wrap=True)


def complain(message: str) -> None:
    """Print an error to stderr, in any process, its control characters taken out."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(_printable(message), markup=False, soft_wrap=True)


def _printable(message: str) -> str:
    """A message of one line or several without what would move a terminal's cursor."""
    return "\n".join(one_line(line) for line in message.split("\n"))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table to stdout; every cell is turned into printable text, without meaning to the terminal."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=title, title_justify="left")
    for column in columns:
        grid.add_column(column, overflow="fold")  # a long path is broken, never cut off
    for row in rows:
        grid.add_row(*[Text(one_line(cell)) for cell in row])
    output().print(grid)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    seconds = int(round(max(seconds, 0.0)))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class Progress:
    """A progress display with rate and ETA: a rich bar on a terminal, a plain line now and then elsewhere.

    Use as a context manager; call ``advance(n)`` after n units of work, ``note`` adds text such as the loss.
    """

    def __init__(self, total: int, label: str, unit: str = "images", done: int = 0) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.start, self.done, self.text = done, done, ""
        self._bar = None

    def __enter__(self) -> Progress:
        self.began = self.last = time.monotonic()
        console = messages()
        if console.is_terminal:
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[rate]}"),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, rate="", note="")
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self.done > self.start:
            self._line()

    @property
    def rate(self) -> float:
        """Units per second since the start of this display."""
        return (self.done - self.start) / max(time.monotonic() - self.began, 1e-9)

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count ``count`` units of work as done."""
        self.done += count
        self.text = self.text if note is None else note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=f"{self.rate:.0f} {self.unit}/s", note=self.text)
        elif time.monotonic() - self.last > PLAIN_SECONDS:
            self._line()

    def _line(self) -> None:
        self.last = time.monotonic()
        left = (self.total - self.done) / max(self.rate, 1e-9)
        say(
            f"{self.label}: {self.done}/{self.total} {self.unit}, {self.rate:.0f} {self.unit}/s, "
            f"{duration(left)} left {self.text}".rstrip()
        )


def track(items: Iterable[T], total: int, label: str, unit: str = "images") -> Iterator[T]:
    """Yield from ``items`` with a progress display; each item counts as one unit."""
    with Progress(total, label, unit) as progress:
        for item in items:
            yield item
            progress.advance()
