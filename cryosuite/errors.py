"""What a user must be told: errors that end a command and notices that do not.

Lies below every room, so that a reader of bytes and a command speak the same language.
"""

from __future__ import annotations

import warnings


class InputError(Exception):
    """A bad input, said in one clear message.

    The message names the file, the row or field, what was expected, and what to do. The command line prints it
    without a traceback and leaves with exit code 2.
    """


class UserNotice(UserWarning):
    """Something the user should know that does not stop the work."""


def notice(message: str) -> None:
    """Tell the user something that does not stop the work; the command line prints each text once."""
    warnings.warn(message, UserNotice, stacklevel=3)
