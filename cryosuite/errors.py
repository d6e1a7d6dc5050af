"""What a user must be told: errors that end a command and notices that do not.

Lies below every room, so that a reader of bytes and a command speak the same language.
"""

from __future__ import annotations

import warnings


def one_line(text: object) -> str:
    """Text for a terminal: what stands in files (names, labels, a library's words) cannot move its cursor or colours.

    Line breaks become blanks, control characters and invisible ones (escape sequences, changes of direction) '?'.
    """
    line = str(text)
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else " " if c in "\r\n\t" else "?" for c in line)


class InputError(Exception):
    """A bad input, said in one clear message.

    The message names the file, the row or field, what was expected, and what to do; it is one printable line. The
    command line prints it without a traceback and leaves with exit code 2.
    """

    def __init__(self, message: object) -> None:
        super().__init__(one_line(message))


class FileError(InputError):
    """A file itself fails: it is not there any more, shorter than it was, replaced, or the disk is full.

    Code that goes on without a part of its work, where that part's input is not good enough, must let this pass.
    """


class UserNotice(UserWarning):
    """Something the user should know that does not stop the work."""


def notice(message: str) -> None:
    """Tell the user something that does not stop the work; the command line prints each text once."""
    warnings.warn(one_line(message), UserNotice, stacklevel=3)
