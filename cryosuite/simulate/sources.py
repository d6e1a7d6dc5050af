"""Where molecules come from: procedural phantoms, atomic models (PDB, mmCIF), or maps."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cryosuite.errors import InputError
from cryosuite.simulate.phantoms import Phantom, make_phantoms

ATOM_FILES = (".pdb", ".cif", ".ent", ".mmcif")
MAP_FILES = (".mrc", ".map")


@dataclass
class Structure:
    """A molecule as weighted atoms with names for its parts.

    Attributes:
        name: short name.
        xyz: (n, 3) float64, A, as deposited.
        weight: (n,) float64, atomic numbers.
        mass: Da.
        chain: (n,) str.
        residue: (n,) int, number within the chain.
        domain: (n,) int, parts an assembly may be built of (phantoms), or None.
    """

    name: str
    xyz: np.ndarray
    weight: np.ndarray
    mass: float
    chain: np.ndarray = field(repr=False)
    residue: np.ndarray = field(repr=False)
    domain: np.ndarray | None = field(default=None, repr=False)

    def centred(self) -> np.ndarray:
        """Coordinates with the centre of mass (atomic numbers as masses) at the origin, (n, 3)."""
        return self.xyz - np.average(self.xyz, axis=0, weights=self.weight)

    def __len__(self) -> int:
        return len(self.xyz)


def from_phantom(phantom: Phantom, name: str) -> Structure:
    """A phantom as a structure; its domains are its chains."""
    chain = np.char.add("D", phantom.domain.astype(str))
    residue = np.arange(len(phantom.xyz)) // 8 + 1
    return Structure(name, phantom.xyz, phantom.atomic_number, phantom.mass, chain, residue, phantom.domain)


def read_structure(path: Path) -> Structure:
    """A PDB or mmCIF file (may be gzipped), without waters and hydrogens."""
    from cryosuite.formats.atoms import read_atoms

    atoms = read_atoms(path)
    name = re.sub(r"(\.(pdb|cif|ent|mmcif))?(\.gz)?$", "", Path(path).name, flags=re.IGNORECASE)
    if not len(atoms.xyz):
        raise InputError(f"{path}: no atoms left after waters and hydrogens were dropped.")
    return Structure(
        name,
        np.asarray(atoms.xyz, np.float64),
        np.asarray(atoms.atomic_number, np.float64),
        float(np.sum(atoms.mass)),
        np.asarray(atoms.chain),
        np.asarray(atoms.residue_index),
    )


def has_ending(path: Path, endings: tuple[str, ...]) -> bool:
    """True when the file is of that kind, gzipped or not."""
    name = path.name.lower()
    return (name[:-3] if name.endswith(".gz") else name).endswith(endings)


def _shared_atomic() -> list[Path]:
    """Folders in which bare names such as 1igy are looked up (CRYOSUITE_SHARED)."""
    root = os.environ.get("CRYOSUITE_SHARED")
    return [Path(root) / "data" / "atomic" / group for group in ("bench", "train")] if root else []


def find_files(spec: str) -> list[Path]:
    """The files meant by ``--structures``: folders, files and names separated by commas (phantoms are passed over).

    A bare name such as ``1igy`` is looked for as 1igy.cif[.gz] or 1igy.pdb[.gz] here and in $CRYOSUITE_SHARED.

    Raises:
        InputError: nothing found, naming what.
    """
    found: list[Path] = []
    items = [part.strip() for part in spec.split(",") if part.strip()]
    for item in items:
        if phantom_count(item) is not None:
            continue
        path = Path(item).expanduser()
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if has_ending(p, ATOM_FILES + MAP_FILES))
            if not files:
                raise InputError(f"{path}: no .pdb, .cif or .mrc files in this folder.")
            found += files
        elif path.is_file():
            if not has_ending(path, ATOM_FILES + MAP_FILES):
                raise InputError(f"{path}: expected a .pdb, .cif (may end in .gz) or .mrc file.")
            found.append(path)
        else:
            found.append(_by_name(item))
    if not items:
        raise InputError("--structures is empty: give phantom:16, a folder, or files separated by commas.")
    return found


def _by_name(name: str) -> Path:
    for folder in [Path("."), *_shared_atomic()]:
        for ending in (".cif", ".cif.gz", ".pdb", ".pdb.gz"):
            for spelling in (name, name.lower(), name.upper()):
                if (path := folder / f"{spelling}{ending}").is_file():
                    return path
    raise InputError(
        f"--structures: {name} is neither a file, a folder, nor a name with a .cif or .pdb file here"
        + (" or in $CRYOSUITE_SHARED." if _shared_atomic() else " (set CRYOSUITE_SHARED to look there too).")
    )


def phantom_count(spec: str) -> int | None:
    """N of ``phantom:N`` (``phantom`` alone: 16), or None when the spec is something else."""
    match = re.fullmatch(r"phantoms?(?::(\d+))?", spec.strip())
    if not match:
        return None
    count = int(match.group(1) or 16)
    if not 1 <= count <= 10_000:
        raise InputError(f"--structures {spec}: give between 1 and 10000 phantoms.")
    return count


def load_structures(spec: str, rng: np.random.Generator) -> list[Structure]:
    """Molecules from ``phantom:N``, folders, names and files separated by commas (no maps): files first, then phantoms.

    Raises:
        InputError: nothing found, or an unreadable file.
    """
    found = [read_structure(path) for path in find_files(spec)]
    count = sum(phantom_count(item) or 0 for item in spec.split(","))
    phantoms = make_phantoms(count, rng) if count else []
    return found + [from_phantom(phantom, f"phantom{i:02d}") for i, phantom in enumerate(phantoms)]


def select(structure: Structure, selection: str) -> np.ndarray:
    """Atoms meant by e.g. ``A,B:1-220`` (whole chain A, residues 1-220 of chain B): (n,) bool.

    Raises:
        InputError: a part that selects nothing.
    """
    chosen = np.zeros(len(structure), bool)
    for part in (p.strip() for p in selection.split(",") if p.strip()):
        match = re.fullmatch(r"(\w+)(?::(-?\d+)-(-?\d+))?", part)
        if not match:
            raise InputError(f"selection {part!r}: expected a chain such as A, or residues of it such as A:1-220.")
        atoms = structure.chain == match.group(1)
        if match.group(2):
            atoms &= (structure.residue >= int(match.group(2))) & (structure.residue <= int(match.group(3)))
        if not atoms.any():
            chains = ", ".join(dict.fromkeys(structure.chain.tolist()))
            raise InputError(f"selection {part!r} holds no atom of {structure.name}; its chains: {chains}.")
        chosen |= atoms
    return chosen
