"""The molecules that map pairs are simulated from: read once, kept as small arrays, some held out for tests."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryosuite.errors import InputError, notice
from cryosuite.formats.atomic import atomic_path
from cryosuite.formats.npz import read_npz
from cryosuite.simulate.phantoms import Phantom, make_phantoms
from cryosuite.simulate.sources import ATOM_FILES, find_files, has_ending, phantom_count, read_structure

FORMAT = 1
PHANTOMS = 24  # procedural proteins when no number is asked for
PHANTOM_RESIDUE = 8  # atoms
HELD_SEED = 3
PHANTOM = "phantom"  # what the names of procedural proteins begin with

COLUMNS = ("xyz", "number", "residue")  # of the atoms of all molecules together, as the cache keeps them


@dataclass(frozen=True, eq=False)
class Molecule:
    """name; xyz (n, 3) float32, A, centre of mass at 0; number (n,) uint8 atomic numbers; residue (n,) int32, counted
    through the molecule in the order of the file."""

    name: str
    xyz: np.ndarray
    number: np.ndarray
    residue: np.ndarray

    def __len__(self) -> int:
        return len(self.xyz)


def load_molecules(spec: str, cache: Path | None = None, seed: int = 0) -> list[Molecule]:
    """Molecules of ``phantom[:N]``, a folder, files, names divided by commas, or ``both:`` these and phantoms.

    Args:
        cache: a .npz file in which the atomic models are kept; made when absent or of other files.
        seed: of the phantoms.

    Raises:
        InputError: nothing found, or files that cannot be read.
    """
    both = spec.startswith("both:")
    wanted = spec.removeprefix("both:")
    files = [file for file in find_files(wanted) if has_ending(file, ATOM_FILES)]
    count = sum(phantom_count(item) or 0 for item in wanted.split(","))
    if not files and not count:
        raise InputError(f"--structures {spec}: no atomic models (.pdb, .cif) there; maps are given by --pairs or MAPS")
    found = _from_files(files, cache) if files else []
    count = count or (PHANTOMS if both else 0)
    phantoms = make_phantoms(count, np.random.default_rng(seed)) if count else []
    return found + [_from_phantom(phantom, f"{PHANTOM}{i:03d}") for i, phantom in enumerate(phantoms)]


def hold_out_names(names: list[str], wanted: str, numbered: list[str]) -> set[str]:
    """Names of the molecules that are never trained on: a number of them drawn once and for all from ``numbered`` (of
    the atomic models among them, where there are two or more), or those listed.

    Raises InputError for unknown names.
    """
    if wanted.strip().isdigit():
        real = [name for name in numbered if not name.startswith(PHANTOM)]
        if len(real) < 2:  # one model alone is trained on
            real = [name for name in numbered if name.startswith(PHANTOM)] or real
        count = min(int(wanted), len(real) // 2)
        return set(np.random.default_rng(HELD_SEED).permutation(sorted(real))[:count].tolist())
    kept = {name.strip() for name in wanted.split(",") if name.strip()}
    if unknown := kept - set(names):
        raise InputError(f"--hold-out: not among the structures: {', '.join(sorted(unknown))}")
    return kept


def _from_phantom(phantom: Phantom, name: str) -> Molecule:
    residue = np.arange(len(phantom.xyz), dtype=np.int32) // PHANTOM_RESIDUE
    return Molecule(name, phantom.xyz.astype(np.float32), phantom.atomic_number.astype(np.uint8), residue)


def _from_files(files: list[Path], cache: Path | None) -> list[Molecule]:
    said = " ".join(f"{file.name} {zlib.crc32(file.read_bytes())}" for file in files)
    key = np.array([zlib.crc32(said.encode()), FORMAT], np.int64)
    if cache is not None and (kept := _cached(cache, key)) is not None:
        return kept
    notice(f"reading {len(files)} atomic models")
    molecules = []
    for file in files:
        found = read_structure(file)
        change = (found.chain[1:] != found.chain[:-1]) | (found.residue[1:] != found.residue[:-1])
        residue = np.concatenate([[0], np.cumsum(change)]).astype(np.int32)
        molecules.append(
            Molecule(found.name, found.centred().astype(np.float32), found.weight.astype(np.uint8), residue)
        )
    if cache is not None:
        _keep(cache, key, molecules)
    return molecules


def _keep(cache: Path, key: np.ndarray, molecules: list[Molecule]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: np.concatenate([getattr(molecule, name) for molecule in molecules]) for name in COLUMNS}
    ends = np.cumsum([len(molecule) for molecule in molecules])
    with atomic_path(cache) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, key=key, ends=ends, names=np.array([m.name for m in molecules]), **columns)


def _cached(cache: Path, key: np.ndarray) -> list[Molecule] | None:
    if not cache.is_file():
        return None
    try:
        found = read_npz(cache, ("key", "ends", "names", *COLUMNS))
    except InputError:
        return None
    counts = {len(found[name]) if found[name].ndim else -1 for name in COLUMNS}
    starts = np.concatenate([[0], found["ends"].reshape(-1)])
    fits = starts.dtype.kind in "iu" and (np.diff(starts) > 0).all() and counts == {int(starts[-1])}
    if not fits or not np.array_equal(found["key"], key) or found["names"].shape != found["ends"].shape:
        return None
    return [
        Molecule(str(name), *(found[column][a:b] for column in COLUMNS))
        for name, a, b in zip(found["names"], starts[:-1], starts[1:], strict=True)
    ]
