"""Text in CSV cells that spreadsheets would take for a formula.

Excel and LibreOffice calculate a cell that begins with ``=``, ``+``, ``-`` or ``@``, so a micrograph's name in a star
file from elsewhere could run something on the reader's machine. An apostrophe in front makes it text.
"""

from __future__ import annotations

import re

FORMULA = re.compile(r"'*[=+\-@\t\r]")  # apostrophes too, so that what is taken off again is what was put there


def guarded(text: str) -> str:
    """The text with an apostrophe in front where a spreadsheet would calculate it."""
    return f"'{text}" if FORMULA.match(text) else text


def unguarded(text: str) -> str:
    """The text as it was before ``guarded``."""
    return text[1:] if text[:1] == "'" and FORMULA.match(text) else text
