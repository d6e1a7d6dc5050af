"""Where simulated map pairs get their molecules: specs, the cache, what is held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cryosuite.errors import InputError
from cryosuite.simulate.map_structures import hold_out_names, load_molecules

PDB = (
    "ATOM  {0:5d}  CA  ALA {1}{2:4d}    {3:8.3f}{4:8.3f}{5:8.3f}  1.00 20.00           C  \n"
    "ATOM  {6:5d}  N   ALA {1}{2:4d}    {3:8.3f}{4:8.3f}{7:8.3f}  1.00 20.00           N  \n"
)


def write_model(path: Path, shift: float) -> None:
    rows = [(chain, residue) for chain in "AB" for residue in range(1, 4)]
    path.write_text(
        "".join(
            PDB.format(2 * i + 1, chain, residue, 5.0 * i + shift, 0.0, 0.0, 2 * i + 2, 1.5)
            for i, (chain, residue) in enumerate(rows)
        )
        + "END\n"
    )


def test_molecules_of_a_folder_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("a", "b"):
        write_model(folder / f"{name}.pdb", 100.0)
    cache = tmp_path / "run" / "structures.npz"
    first = load_molecules(str(folder), cache)
    assert [m.name for m in first] == ["a", "b"] and cache.is_file()
    assert len(first[0]) == 12
    assert first[0].residue.tolist() == [i // 2 for i in range(12)]  # counted on over chains
    centre = np.average(first[0].xyz, axis=0, weights=first[0].number)
    assert np.abs(centre).max() < 1e-4
    (folder / "a.pdb").touch()
    again = load_molecules(str(folder), cache)
    assert all(np.array_equal(x.xyz, y.xyz) and x.name == y.name for x, y in zip(first, again, strict=True))
    write_model(folder / "c.pdb", 0.0)
    assert [m.name for m in load_molecules(str(folder), cache)] == ["a", "b", "c"]  # other files: read anew
    text = (folder / "a.pdb").read_text()
    (folder / "a.pdb").write_text(text.replace(" 105.000", " 109.000"))  # as long as before
    assert len((folder / "a.pdb").read_text()) == len(text)
    moved = load_molecules(str(folder), cache)
    assert np.abs(moved[0].xyz - first[0].xyz).max() > 1
    cache.write_bytes(b"not a zip")
    assert len(load_molecules(str(folder), cache)) == 3


def test_phantoms_alone_and_beside(tmp_path: Path) -> None:
    write_model(tmp_path / "a.pdb", 0.0)
    alone = load_molecules("phantom:2")
    assert [m.name for m in alone] == ["phantom000", "phantom001"]
    assert np.array_equal(alone[1].xyz, load_molecules("phantom:2")[1].xyz)
    assert not np.array_equal(alone[1].xyz, load_molecules("phantom:2", seed=5)[1].xyz)
    both = load_molecules(f"both:{tmp_path / 'a.pdb'},phantom:1")
    assert [m.name for m in both] == ["a", "phantom000"]
    with pytest.raises(InputError, match="nowhere"):
        load_molecules("nowhere")


def test_what_is_held_out() -> None:
    names = ["a", "b", "c", "d", "phantom000", "phantom001"]
    held = hold_out_names(names, "2", names)
    assert len(held) == 2 and not any(name.startswith("phantom") for name in held)
    assert held == hold_out_names(names[::-1], "2", names[::-1])
    assert len(hold_out_names(names, "9", names)) == 2  # half of the models are left to train on
    assert hold_out_names(names, "b, phantom001", names) == {"b", "phantom001"}
    assert hold_out_names(names, "0", names) == set()
    assert len(hold_out_names(names[4:], "1", names[4:])) == 1
    one = ["a", *names[4:]]
    assert hold_out_names(one, "1", one) < set(names[4:])  # the only model is trained on
