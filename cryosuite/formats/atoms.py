"""Atomic models: PDB and mmCIF, plain or gzipped, read by gemmi into plain arrays."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cryosuite.errors import InputError
from cryosuite.formats.checks import existing_file, printable

if TYPE_CHECKING:
    import gemmi

_SUFFIXES = (".pdb", ".ent", ".cif", ".mmcif")


@dataclass(frozen=True)
class Atoms:
    """Atoms of a model: ``xyz`` float64 (n, 3) in A, ``atomic_number`` int64 (n,), ``mass`` float64 (n,) in Da,
    ``chain`` str (n,), ``residue_index`` int64 (n,), ``name`` of the entry."""

    xyz: np.ndarray
    atomic_number: np.ndarray
    mass: np.ndarray
    chain: np.ndarray
    residue_index: np.ndarray
    name: str = ""

    def __len__(self) -> int:
        return len(self.xyz)


def read_atoms(path: str | os.PathLike) -> Atoms:
    """Read a model (.pdb, .ent, .cif, .mmcif, each also .gz), as deposited: no symmetry is applied, first model only.

    Waters and hydrogens (and deuterium) are dropped; of alternate locations the one of highest occupancy is kept, the
    first of equal ones. ``residue_index`` is label_seq_id where the file has it, else the author's number. Raises
    InputError for a missing, unreadable or empty model.
    """
    path = existing_file(path, "atomic model")
    stem = str(path).lower().removesuffix(".gz")
    if not stem.endswith(_SUFFIXES):
        raise InputError(f"{path}: expected an atomic model (.pdb, .ent, .cif or .mmcif, also .gz)")
    import gemmi

    try:
        structure = gemmi.read_structure(str(path))
        structure.setup_entities()
        atoms = _collect(structure)
    except UnicodeDecodeError:
        raise InputError(f"{path}: cannot read this atomic model: some names are not text") from None
    except Exception as error:  # gemmi raises several types for damaged text
        raise InputError(f"{path}: cannot read this atomic model: {printable(error)}") from None
    if len(atoms) == 0:
        raise InputError(f"{path}: holds no atoms other than waters and hydrogens")
    if not np.isfinite(atoms.xyz).all():
        raise InputError(f"{path}: some coordinates are not numbers")
    return atoms if atoms.name else replace(atoms, name=Path(stem).stem)


def _collect(structure: gemmi.Structure) -> Atoms:
    """The atoms of the first model as arrays."""
    xyz, number, mass, chains, residues = [], [], [], [], []
    for chain in structure[0] if len(structure) else ():
        for residue in chain:
            if residue.is_water():
                continue
            index = residue.label_seq if residue.label_seq is not None else residue.seqid.num
            for atom in _one_location(residue):
                if atom.element.is_hydrogen:
                    continue
                xyz.append(atom.pos.tolist())
                number.append(atom.element.atomic_number)
                mass.append(atom.element.weight)
                chains.append(chain.name)
                residues.append(index if index is not None else 0)
    return Atoms(
        xyz=np.array(xyz, np.float64).reshape(-1, 3),
        atomic_number=np.array(number, np.int64),
        mass=np.array(mass, np.float64),
        chain=np.array(chains, str),
        residue_index=np.array(residues, np.int64),
        name=structure.name,
    )


def _one_location(residue: gemmi.Residue) -> list[gemmi.Atom]:
    """Atoms of a residue with one alternate location each: the most occupied, the first of equals."""
    chosen: dict[str, gemmi.Atom] = {}
    for atom in residue:
        if atom.altloc == "\0":
            chosen.setdefault(f"{atom.name}/{len(chosen)}", atom)
            continue
        known = chosen.get(atom.name)
        if known is None or atom.occ > known.occ:
            chosen[atom.name] = atom
    return list(chosen.values())
