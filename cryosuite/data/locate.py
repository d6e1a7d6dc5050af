"""Finding the stacks that a star, cs or list names: relative to the file, to the project above it, or to --datadir."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cryosuite.data.images import StackCache
from cryosuite.errors import InputError, notice
from cryosuite.formats.checks import name_rows

LEVELS_UP = 6  # a star in Refine3D/job007/ names images relative to the project folder above it
SWAPPED = {".mrc": ".mrcs", ".mrcs": ".mrc"}


class StackFinder:
    """Looks for stacks where RELION, cryoSPARC and cryoDRGN users keep them; remembers where it found the last one."""

    def __init__(self, table: Path, datadir: Path | None = None) -> None:
        self.table, self.datadir = table, datadir
        if datadir is not None and not datadir.is_dir():
            raise InputError(f"{datadir}: no such folder (--datadir).")
        folder = table.absolute().parent
        bases = [folder, *list(folder.parents)[:LEVELS_UP], Path.cwd()]
        self.bases = ([datadir.absolute()] if datadir is not None else []) + list(dict.fromkeys(bases))

    def candidates(self, name: str) -> list[Path]:
        """All places where the stack may lie, likeliest first."""
        path = Path(name)
        if path.is_absolute():
            near = [base / path.name for base in self.bases[:2]]
            return [*near, path] if self.datadir is not None else [path, *near]
        whole = [base / path for base in self.bases]
        bare = [base / path.name for base in self.bases[:2]]
        return list(dict.fromkeys([whole[0], bare[0], *whole[1:], *bare[1:]]))

    def find(self, name: str) -> Path:
        """The stack; InputError listing every path tried when it is nowhere."""
        tried = self.candidates(name)
        for path in tried:
            if path.is_file():
                self._remember(path, name)
                return path
        for path in tried:
            other = path.with_suffix(SWAPPED.get(path.suffix, path.suffix))
            if other.is_file():
                notice(f"{self.table}: {name} does not exist, {other.name} beside it is used.")
                return other
        listing = ", ".join(map(str, tried))
        raise InputError(
            f"{self.table}: cannot find the stack {name}. Looked for: {listing}. "
            "Say where the images are: --datadir FOLDER."
        )

    def _remember(self, path: Path, name: str) -> None:
        """Put the folder that worked first, so that thousands of stacks are found at the first try."""
        base = next((base for base in self.bases if base / name == path), None)
        if base is not None and self.datadir is None:
            self.bases.remove(base)
            self.bases.insert(0, base)


def open_stacks(
    table: Path, names: Sequence[str], file_id: np.ndarray, slices: np.ndarray, datadir: Path | None, unit: str
) -> tuple[list[Path], np.ndarray, list[float | None], StackCache]:
    """Find and check the stacks of some rows.

    Returns paths, box size of each stack (F,) int32, pixel size of each header (A, None when it has none), and the
    cache with readers. Raises InputError for a missing, damaged, non-square or odd stack, and for a row that names an
    image beyond its stack (``unit`` is the column that names it).
    """
    finder, cache = StackFinder(table, datadir), StackCache()
    paths, boxes, pixel_sizes, problems = [], [], [], []
    counts = np.empty(len(names), np.int64)
    for number, name in enumerate(names):
        path = finder.find(name)
        reader = cache.get(path)
        boxes.append(reader.require_square())
        counts[number] = reader.count
        pixel_sizes.append(reader.pixel_size)
        problems.extend(text for text in reader.header.problems if "pixel size" not in text)
        paths.append(path)
    bad = np.flatnonzero(slices >= counts[file_id])
    if len(bad):
        row = bad[0]
        first = 1 if unit == "rlnImageName" else 0
        raise InputError(
            f"{table}: {unit} {slices[row] + first} in {name_rows(bad)} (0-based), but {paths[file_id[row]]} holds "
            f"{counts[file_id[row]]} images (counted from {first})."
        )
    for text in problems[:3]:
        notice(text)
    if len(problems) > 3:
        notice(f"{len(problems) - 3} more stacks of {table} have headers that are odd but readable.")
    return paths, np.array(boxes, np.int32), pixel_sizes, cache
