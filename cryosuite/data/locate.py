"""Finding the stacks that a star, cs or list names: relative to the file, to the project above it, or to --datadir."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cryosuite.data.images import StackCache
from cryosuite.errors import InputError, notice
from cryosuite.formats.checks import name_rows, printable

LEVELS_UP = 6  # a star in Refine3D/job007/ names images relative to the project folder above it
SWAPPED = {".mrc": ".mrcs", ".mrcs": ".mrc"}


class StackFinder:
    """Looks for stacks where RELION, cryoSPARC and cryoDRGN users keep them; remembers where it found the last one.

    A name is first taken as it stands, then (under --datadir always) with folders left off from the front: projects
    move. Two names must never become one file that way, and a stand-in for a missing file is told.
    """

    def __init__(self, table: Path, datadir: Path | None = None) -> None:
        self.table, self.datadir = table, datadir
        if datadir is not None and not datadir.is_dir():
            raise InputError(f"{datadir}: no such folder (--datadir).")
        folder = table.absolute().parent
        self.near = (folder, folder.parent)
        self.bases = list(dict.fromkeys([folder, *list(folder.parents)[:LEVELS_UP], Path.cwd()]))
        self._names: dict[Path, tuple[str, bool]] = {}  # what was found -> its name, and whether that was shortened
        self._told = False

    def candidates(self, name: str) -> list[Path]:
        """All places where the stack may lie, likeliest first."""
        path = Path(plain_name(name))
        found = [] if self.datadir is None else [self.datadir.absolute() / tail for tail in _tails(path)]
        found += self._exact(path)
        return list(dict.fromkeys([*found, *(base / path.name for base in self.near)]))

    def _exact(self, path: Path) -> list[Path]:
        """The places that a name means as it stands."""
        return [path] if path.is_absolute() else [base / path for base in self.bases]

    def find(self, name: str) -> Path:
        """The stack; InputError listing every path tried when it is nowhere, or when it stands for another name too."""
        tried = self.candidates(name)
        path = next((path for path in tried if os.path.isfile(path)), None)  # False for names that no file can have
        if path is None:
            swapped = (path.with_suffix(SWAPPED.get(path.suffix, path.suffix)) for path in tried if path.name)
            path = next((path for path in swapped if os.path.isfile(path)), None)
            if path is None:
                raise InputError(
                    f"{self.table}: cannot find the stack {printable(name)}. Looked for: "
                    f"{', '.join(map(str, tried))}. Say where the images are: --datadir FOLDER."
                )
            self._tell(name, path)
        self._remember(path, name)
        return path

    def _remember(self, path: Path, name: str) -> None:
        """Put the folder that worked first, so that thousands of stacks are found at the first try."""
        wanted = Path(plain_name(name))
        exact = path in self._exact(wanted) or (self.datadir is not None and path == self.datadir.absolute() / wanted)
        other, shortened = self._names.setdefault(path, (name, not exact))
        if plain_name(other) != plain_name(name) and (shortened or not exact):
            raise InputError(
                f"{self.table}: {printable(other)} and {printable(name)} would both be read from {path}, the only file "
                "of that name found: give the folder that holds their folders (--datadir)."
            )
        if not exact and self.datadir is None:
            self._tell(name, path)
        base = next((base for base in self.bases if base / wanted == path), None)
        if base is not None and base != self.bases[0]:
            self.bases.remove(base)
            self.bases.insert(0, base)

    def _tell(self, name: str, path: Path) -> None:
        """Notice a stand-in; once, as thousands of stacks of a set have the same story."""
        if not self._told:
            notice(f"{self.table}: {printable(name)} is not there: {path} is used, and the like for other stacks.")
        self._told = True


def plain_name(name: str) -> str:
    """A stack's name without the ':mrcs' with which Xmipp, Scipion and RELION force a file type."""
    return name.removesuffix(":mrcs").removesuffix(":mrc")


def _tails(path: Path) -> list[Path]:
    """a/b/c.mrcs -> a/b/c.mrcs, b/c.mrcs, c.mrcs; of absolute names without the root."""
    parts = path.parts[1:] if path.is_absolute() else path.parts
    return [Path(*parts[start:]) for start in range(len(parts))]


def open_stacks(
    table: Path, names: Sequence[str], file_id: np.ndarray, slices: np.ndarray, finder: StackFinder | None, unit: str
) -> tuple[list[Path], np.ndarray, list[float | None], StackCache]:
    """Find (``finder`` None: the names are paths as they stand) and check the stacks of some rows.

    Returns paths, box size of each stack (F,) int32, pixel size of each header (A, None when it has none), and the
    cache with readers. Raises InputError for a missing, damaged, non-square or odd stack, and for a row that names an
    image beyond its stack (``unit`` is the column that names it).
    """
    cache = StackCache()
    paths, boxes, pixel_sizes, problems = [], [], [], []
    counts = np.empty(len(names), np.int64)
    for number, name in enumerate(names):
        path = Path(name) if finder is None else finder.find(name)
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
