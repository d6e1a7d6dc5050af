"""Atomic models: PDB and mmCIF, plain or gzipped, read by gemmi into plain arrays."""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cryosuite.errors import InputError
from cryosuite.formats.checks import existing_file, printable

if TYPE_CHECKING:
    import gemmi

_MOST_UNPACKED = 100
_PIECE = 1 << 18  # bytes unpacked at a time
_SUFFIXES = (".pdb", ".ent", ".cif", ".mmcif")


@dataclass(frozen=True)
class Atoms:
    """Atoms of a model: ``xyz`` float64 (n, 3) in A, ``atomic_number`` int64 (n,), ``mass`` float64 (n,) in Da,
    ``chain`` str (n,), ``residue_index`` int64 (n,), ``b_iso`` (A^2) and ``occupancy`` float64 (n,), ``atom_name``,
    ``residue_name`` and ``residue_label`` (the author's number with insertion code) str (n,), ``kind`` str (n,) one of
    protein, nucleic, water, ion, other; ``name`` of the entry."""

    xyz: np.ndarray
    atomic_number: np.ndarray
    mass: np.ndarray
    chain: np.ndarray
    residue_index: np.ndarray
    b_iso: np.ndarray
    occupancy: np.ndarray
    atom_name: np.ndarray
    residue_name: np.ndarray
    residue_label: np.ndarray
    kind: np.ndarray
    name: str = ""

    def __len__(self) -> int:
        return len(self.xyz)


def read_atoms(path: str | os.PathLike, waters: bool = False) -> Atoms:
    """Read a model (.pdb, .ent, .cif, .mmcif, each also .gz), as deposited: no symmetry is applied, first model only.

    Hydrogens (and deuterium) are dropped, waters too unless asked for; of alternate locations of an atom, and of
    different residues at one position, the one of highest occupancy is kept, the first of equal ones.
    ``residue_index`` is label_seq_id where the file has it, else the author's number. Raises InputError for a missing,
    unreadable or empty model.
    """
    path = existing_file(path, "atomic model")
    gz = str(path).lower().endswith(".gz")
    stem = str(path).lower().removesuffix(".gz")
    if not stem.endswith(_SUFFIXES):
        raise InputError(f"{path}: expected an atomic model (.pdb, .ent, .cif or .mmcif, also .gz)")
    import gemmi

    try:
        structure = gemmi.read_structure_string(_unpacked(path)) if gz else gemmi.read_structure(str(path))
        if gz and structure.name == "string":  # what gemmi calls text without a name, in place of the file's
            structure.name = path.with_suffix("").stem
        structure.setup_entities()
        atoms = _collect(structure, waters)
    except InputError:
        raise
    except UnicodeDecodeError:
        raise InputError(f"{path}: cannot read this atomic model: some names are not text") from None
    except Exception as error:  # gemmi raises several types for damaged text
        raise InputError(f"{path}: cannot read this atomic model: {printable(error)}") from None
    if len(atoms) == 0:
        raise InputError(f"{path}: holds no atoms other than waters and hydrogens")
    if not np.isfinite(atoms.xyz).all():
        raise InputError(f"{path}: some coordinates are not numbers")
    return atoms if atoms.name else replace(atoms, name=Path(stem).stem)


def _unpacked(path: Path) -> bytes:
    """The text of a .gz model; InputError where it unpacks to more than any model does (a bomb of zeros: 1000 times).

    Not left to gemmi, which takes as much memory as the last four bytes of the file ask for. It is unpacked twice:
    nothing is kept of a file that turns out to be a bomb, or broken.
    """
    limit = _MOST_UNPACKED * path.stat().st_size + _PIECE
    total = 0
    with gzip.open(path) as stream:
        while piece := stream.read(_PIECE):
            total += len(piece)
            if total > limit:
                raise InputError(f"{path}: unpacks to more than {_MOST_UNPACKED} times its size: no atomic model does")
        stream.seek(0)
        return b"".join(iter(lambda: stream.read(_PIECE), b""))


def _collect(structure: gemmi.Structure, waters: bool) -> Atoms:
    """The atoms of the first model as arrays."""
    rows: list[tuple] = []
    for chain in structure[0] if len(structure) else ():
        for residue in _one_residue([residue for residue in chain if waters or not residue.is_water()]):
            index = residue.label_seq if residue.label_seq is not None else residue.seqid.num
            kept = [atom for atom in _one_location(residue) if not atom.element.is_hydrogen]
            of_residue = (chain.name, index or 0, residue.name, str(residue.seqid), _kind(residue, len(kept)))
            for atom in kept:
                element = atom.element
                rows.append((atom.pos.tolist(), element.atomic_number, element.weight, atom.b_iso, atom.occ, atom.name)
                            + of_residue)  # fmt: skip
    columns = list(zip(*rows, strict=True)) if rows else [()] * 11
    return Atoms(
        xyz=np.array(columns[0], np.float64).reshape(-1, 3),
        atomic_number=np.array(columns[1], np.int64),
        mass=np.array(columns[2], np.float64),
        b_iso=np.array(columns[3], np.float64),
        occupancy=np.array(columns[4], np.float64),
        atom_name=np.array(columns[5], str),
        chain=np.array(columns[6], str),
        residue_index=np.array(columns[7], np.int64),
        residue_name=np.array(columns[8], str),
        residue_label=np.array(columns[9], str),
        kind=np.array(columns[10], str),
        name=structure.name,
    )


def _kind(residue: gemmi.Residue, n_atoms: int) -> str:
    """What a residue is: protein, nucleic, water, ion (one atom) or other (ligands, sugars, lipids)."""
    import gemmi

    if residue.is_water():
        return "water"
    known = gemmi.find_tabulated_residue(residue.name)
    if known.is_amino_acid():
        return "protein"
    if known.is_nucleic_acid():
        return "nucleic"
    return "ion" if n_atoms == 1 else "other"


def _one_residue(residues: list[gemmi.Residue]) -> list[gemmi.Residue]:
    """Residues of a chain with one at each position: of several (microheterogeneity, all their atoms are alternate
    locations) the most occupied, the first of equals."""
    places: dict[int | str, list[gemmi.Residue]] = {}
    for number, residue in enumerate(residues):
        alone = any(atom.altloc == "\0" for atom in residue)
        places.setdefault(number if alone else str(residue.seqid), []).append(residue)
    return [max(rivals, key=lambda residue: max(atom.occ for atom in residue)) for rivals in places.values()]


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
