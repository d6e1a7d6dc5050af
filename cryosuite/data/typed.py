"""Paths as one types them in a command line."""

from __future__ import annotations

import os
import shlex
from pathlib import Path


def typed(path: str | Path) -> str:
    """A path for a command shown to the user: quoted where a shell needs it, ``./-run`` for a name that looks like an
    option."""
    text = os.fspath(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
