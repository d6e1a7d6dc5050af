"""A folder whose files have fixed names: what `workdir`, `results` and `analysis_dir` are made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folder:
    """A folder; its classes name the files in it: ``mask = File("mask.mrc")``."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all its files."""
        return tuple(entry.name for entry in vars(cls).values() if isinstance(entry, File))


class File:
    """A file (or folder) with a fixed name in a ``Folder``: read from a folder, its whole path."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, folder: Folder, owner: type[Folder]) -> Path:
        return folder.path / self.name
