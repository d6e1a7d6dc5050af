"""The user's own maps, and pairs of map and model, as training sets: lists of files, and volumes on a common voxel.

A list of pairs is a table (.csv, .tsv) with the columns map, model and, if known, resolution (A); a .yaml file with
``pairs:`` and a list of the same; or a folder in which NAME.mrc lies beside NAME.cif (or .map, .pdb, each also .gz).
Paths in a list are relative to the list.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryosuite.data.map_grid import read_grid, resampled
from cryosuite.errors import InputError
from cryosuite.formats.atoms import read_atoms
from cryosuite.formats.checks import printable, read_bytes
from cryosuite.formats.config import read_yaml
from cryosuite.kernels.map_norm import auto_mask, grey_range, to_unit
from cryosuite.kernels.map_spectrum import estimate_resolution, match_spectrum

__all__ = ["MapEntry", "MapVolume", "read_pairs", "map_entries", "load_volume"]

MAPS = (".mrc", ".map", ".ccp4")
MODELS = (".cif", ".mmcif", ".pdb", ".ent")
COLUMNS = ("map", "model", "resolution")
LONGEST_LINE = 20_000  # characters of a list of pairs: two paths and a number
LIMITS = (1.0, 60.0)  # A, between what a resolution must lie


@dataclass(frozen=True)
class MapEntry:
    """name; map file; model file or None; resolution in A or None where it is not known."""

    name: str
    map: Path
    model: Path | None = None
    resolution: float | None = None


@dataclass(frozen=True)
class MapVolume:
    """A map on the working voxel, grey values 0..1, and its model's atoms.

    Attributes:
        values: (z, y, x) float32. voxel: A, x y z (about the working voxel). points: (n, 3) float32, x y z in voxels
        from voxel 0 0 0. number: (n,) uint8 atomic numbers; both empty for a map alone.
    """

    entry: MapEntry
    values: np.ndarray
    voxel: tuple[float, float, float]
    points: np.ndarray
    number: np.ndarray


def read_pairs(path: Path) -> list[MapEntry]:
    """Pairs of map and model of a list or a folder.

    Raises:
        InputError: an unknown kind of list, missing columns or files (with the row), a resolution that is none, nothing
            found, or two pairs of one name.
    """
    path = Path(path)
    if path.is_dir():
        entries: Iterable[MapEntry] = _in_folder(path)
    elif path.suffix.lower() in (".csv", ".tsv", ".txt"):
        entries = (_entry(row, f"row {i}", path) for i, row in enumerate(_table(path), 2))
    elif path.suffix.lower() in (".yaml", ".yml"):
        rows = read_yaml(path).get("pairs")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path}: expected pairs: and below it a list of map:, model: and, if known, resolution:")
        entries = (_entry(row, f"pair {i}", path) for i, row in enumerate(rows, 1))
    else:
        raise InputError(f"--pairs {path}: expected a .csv, .tsv or .yaml list, or a folder of NAME.mrc and NAME.cif")
    distinct = _distinct(entries, path)
    if not distinct:
        raise InputError(f"--pairs {path}: holds no pair of map and model")
    return distinct


def map_entries(paths: Iterable[Path]) -> list[MapEntry]:
    """Maps alone, from files and folders. Raises InputError for what is neither, or holds no map."""
    entries = []
    for path in (Path(p) for p in paths):
        if path.is_dir():
            found = [MapEntry(_stem(file, MAPS), file) for file in sorted(path.iterdir()) if _stem(file, MAPS)]
            if not found:
                raise InputError(f"{path}: no maps (.mrc, .map, also .gz) in this folder")
            entries += found
        elif path.is_file() and _stem(path, MAPS):
            entries.append(MapEntry(_stem(path, MAPS), path))
        else:
            raise InputError(f"{path}: expected a map (.mrc, .map, also .gz) or a folder of maps")
    return entries


def load_volume(entry: MapEntry, voxel: float, norm: str, spectrum: str = "as-is") -> MapVolume:
    """A map, resampled to about ``voxel`` A in Fourier space and scaled to 0..1, with its atoms on the same grid.

    With ``spectrum`` "matched" its amplitudes are those that ``kernels.map_spectrum`` gives it.

    Raises:
        InputError: unreadable files, a constant map, or a model of which hardly anything lies in the map.
    """
    grid = resampled(read_grid(entry.map), voxel)
    values = torch.from_numpy(np.ascontiguousarray(grid.data, np.float32))
    try:
        if spectrum == "matched" and float(values.std()) > 0:
            inside = auto_mask(values, voxel)
            known = entry.resolution or estimate_resolution(values, grid.voxel[::-1], inside)
            values = match_spectrum(values, grid.voxel[::-1], inside, known)[0]
        unit = to_unit(values, *grey_range(values, voxel, norm)).numpy()
    except ValueError as error:
        raise InputError(f"{entry.map}: {error}") from None
    if entry.model is None:
        return MapVolume(entry, unit, grid.voxel, np.zeros((0, 3), np.float32), np.zeros(0, np.uint8))
    atoms = read_atoms(entry.model)
    points = grid.index_of(atoms.xyz)[:, ::-1]
    inside = ((points >= 0) & (points <= np.array(unit.shape[::-1]) - 1)).all(1)
    if inside.mean() < 0.5:
        raise InputError(
            f"{entry.model}: only {inside.mean():.0%} of its atoms lie in {entry.map}: check that the two belong "
            "together and that the map's origin is right"
        )
    return MapVolume(
        entry, unit, grid.voxel, np.ascontiguousarray(points, np.float32), atoms.atomic_number.astype(np.uint8)
    )


def _table(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a .csv or .tsv with a header, as they are read; lines that begin with # are passed over."""
    try:
        lines = _lines(path)
        first = next(lines, None)
        if first is None:
            return
        rows = csv.DictReader(itertools.chain([first], lines), delimiter="\t" if "\t" in first else ",")
        names = [name.strip().lower() for name in rows.fieldnames or []]
        if missing := [name for name in COLUMNS[:2] if name not in names]:
            raise InputError(f"{path}: the first line must name the columns map,model[,resolution]; lacks {missing[0]}")
        rows.fieldnames = names
        yield from rows
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not a text file") from None
    except csv.Error as error:
        raise InputError(f"{path}: is no table that can be read: {printable(error)}") from None


def _lines(path: Path) -> Iterator[str]:
    """Lines that say something; InputError for one so long that it can name no files."""
    text = io.TextIOWrapper(io.BytesIO(read_bytes(path, "list of pairs")), "utf-8-sig")
    for number, line in enumerate(text, 1):
        if len(line) > LONGEST_LINE:
            raise InputError(f"{path}: line {number} has {len(line)} characters: expected map,model[,resolution]")
        if line.strip() and not line.startswith("#"):
            yield line


def _entry(row: dict[str, Any], where: str, path: Path) -> MapEntry:
    """One pair of a list."""
    files = []
    for name, endings in (("map", MAPS), ("model", MODELS)):
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{path}, {where}: no {name} is given")
        file = path.parent / os.path.expanduser(value.strip())
        if not os.path.isfile(file):
            raise InputError(f"{path}, {where}: the {name} {file} is not there")
        if not _stem(file, endings):
            raise InputError(f"{path}, {where}: the {name} {file} must end in {', '.join(endings)} (also .gz)")
        files.append(file)
    resolution = row.get("resolution")
    if resolution in (None, ""):
        return MapEntry(_stem(files[0], MAPS), files[0], files[1])
    try:
        resolution = float(resolution)
    except (TypeError, ValueError, OverflowError):
        resolution = math.nan
    if not LIMITS[0] <= resolution <= LIMITS[1]:
        raise InputError(f"{path}, {where}: resolution {row['resolution']}: expected a number of A such as 3.4")
    return MapEntry(_stem(files[0], MAPS), files[0], files[1], resolution)


def _in_folder(folder: Path) -> list[MapEntry]:
    files = sorted(folder.iterdir())
    models = {_stem(file, MODELS): file for file in files if _stem(file, MODELS)}
    maps = [(name, file) for file in files if (name := _stem(file, MAPS))]
    return [MapEntry(name, file, models[name]) for name, file in maps if name in models]


def _stem(path: Path, endings: tuple[str, ...]) -> str:
    """The name without its ending (and .gz), or "" for a file of another kind."""
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    return next((name[: -len(ending)] for ending in endings if name.lower().endswith(ending)), "")


def _distinct(entries: Iterable[MapEntry], path: Path) -> list[MapEntry]:
    """The pairs as a list; InputError for two of one name."""
    named: dict[str, MapEntry] = {}
    for entry in entries:
        if entry.name in named:
            raise InputError(f"--pairs {path}: two maps are named {entry.name}; give them different names")
        named[entry.name] = entry
    return list(named.values())
