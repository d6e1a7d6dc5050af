"""Folders that commands write to: files of our own names there are replaced only when they are ours.

A folder is ours when what is written last is there (dataset.yaml, analyze.yaml, ...) or, after a kill, the mark that
``claim`` puts there until ``finished``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cryosuite.errors import InputError
from cryosuite.formats.atomic import atomic_path

UNFINISHED = ".unfinished"


def claim(folder: Path, last: Path, names: Iterable[str], overwrite: bool = False, remedy: str = "") -> None:
    """Make a folder, or take over one that is ours.

    Args:
        last: the file that is written last. names: of what will be written there, as patterns (vol_*.mrc).
        overwrite: take over what is not ours too. remedy: what else the user may do, after "Choose ...".

    Raises:
        InputError: files under these names that are not ours; a folder that cannot be written.
    """
    mark = folder / UNFINISHED
    if folder.is_dir() and not (overwrite or last.is_file() or mark.is_file()):
        found = sorted({path.relative_to(folder).as_posix() for name in names for path in folder.glob(name)})
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise InputError(
                f"{folder}: holds {', '.join(found[:3])}{more}, but no {last.name}: they are not of this command and "
                f"would be replaced. Choose another folder (-o){remedy}."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(mark) as probe:
            Path(probe).touch()
    except (OSError, InputError) as error:
        raise InputError(f"{folder}: cannot write there ({error}). Give another folder with -o.") from error


def finished(folder: Path) -> None:
    """The file that is written last is there: take the mark away."""
    (folder / UNFINISHED).unlink(missing_ok=True)
