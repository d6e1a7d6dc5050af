"""Files appear whole or not at all; YAML is plain; atomic models are read as deposited."""

from __future__ import annotations

import csv
import gzip
import os
import re
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from cryosuite.errors import InputError
from cryosuite.formats.atomic import atomic_path, readable_bytes, write_bytes, write_text
from cryosuite.formats.atoms import read_atoms
from cryosuite.formats.config import read_yaml, write_yaml


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == tmp_path
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    "name", ["a." + "b" * 240 + ".mrc", "x" * 251 + ".mrc", "\U0001f600" * 60 + ".mrc", "\u597d" * 83]
)
def test_the_longest_names_can_be_written(name: str, tmp_path: Path) -> None:
    """The temporary name of a file is longer than its own; neither may have more than 255 bytes."""
    with atomic_path(tmp_path / name) as temporary:
        temporary.write_text("new")
        assert Path(name).suffix != ".mrc" or temporary.suffix == ".mrc"
    assert os.listdir(tmp_path) == [name]


def test_permissions_are_those_of_a_plain_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    write_text(tmp_path / "atomic", "x")
    assert stat.S_IMODE((tmp_path / "plain").stat().st_mode) == stat.S_IMODE((tmp_path / "atomic").stat().st_mode)


@pytest.mark.parametrize(
    ("number", "message"), [(28, r"disk is full; it needs 2\.0 KiB"), (122, "disk is full"), (13, "cannot write")]
)
def test_write_errors_are_sentences(number: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"a\.bin: .*{message}"), atomic_path(tmp_path / "a.bin", needed=2048):
        raise OSError(number, os.strerror(number))
    assert not os.listdir(tmp_path)


def test_errors_about_other_files_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        (tmp_path / "input that is missing").read_bytes()


def test_needed_space_is_checked_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not enough disk space"), atomic_path(tmp_path / "a", needed=1 << 60):
        raise AssertionError("must not get here")
    with pytest.raises(InputError, match="does not exist"):
        write_bytes(tmp_path / "no" / "a", b"x")
    assert readable_bytes(1536) == "1.5 KiB (1536 bytes)"


def test_a_killed_writer_leaves_nothing_half_written(tmp_path: Path) -> None:
    """SIGKILL in the middle: the old content stays."""
    write_text(tmp_path / "a.txt", "old")
    code = (
        "import os, signal, sys\n"
        "from cryosuite.formats.atomic import atomic_path\n"
        "with atomic_path(sys.argv[1]) as t:\n"
        "    t.write_text('new'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt")], check=False).returncode == -9
    assert (tmp_path / "a.txt").read_text() == "old"


def test_yaml_round_trip_of_numpy_and_paths(tmp_path: Path) -> None:
    value = {"b": np.float32(1.5), "a": (1, np.int64(2)), "path": Path("x/y"), "none": None, "list": np.arange(3)}
    write_yaml(tmp_path / "a.yaml", value)
    assert read_yaml(tmp_path / "a.yaml") == {"b": 1.5, "a": [1, 2], "path": "x/y", "none": None, "list": [0, 1, 2]}
    assert list(read_yaml(tmp_path / "a.yaml")) == ["b", "a", "path", "none", "list"]
    with pytest.raises(TypeError):
        write_yaml(tmp_path / "a.yaml", {"a": object()})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "not valid YAML"),
        ("a: !!python/name:os.system x", "python/name"),
        ("just text", "expected a mapping"),
        ("\x00\x01", "not valid YAML"),
        ("a: &x [*x, *y]", "not valid YAML"),
        ("{[1]: 2}", "refused|not valid"),
        ("[" * 1200, "not valid YAML"),
    ],
)
def test_bad_yaml_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError, match=rf"a\.yaml: .*({message})") as caught:
        read_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)


def test_a_file_too_large_to_be_yaml_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack of images given for a config by mistake must not be brought into memory to be refused."""
    path = tmp_path / "particles.mrcs"
    path.touch()
    os.truncate(path, 8 << 30)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("the file was read"))
    with pytest.raises(InputError, match=r"particles\.mrcs: 8589934592 bytes: more than"):
        read_yaml(path)


def test_peer_config_is_read(golden: Path) -> None:
    assert read_yaml(golden / "cryodrgn_run" / "config.yaml")["lattice_args"]["D"] == 65


PDB = """\
HEADER    TEST
ATOM      1  N   ALA A   5      11.104   6.134  -6.504  1.00  0.00           N
ATOM      2  CA AALA A   5      11.639   6.071  -5.147  0.40  0.00           C
ATOM      3  CA BALA A   5      12.639   6.071  -5.147  0.60  0.00           C
ATOM      4  CB AALA A   5      13.639   6.071  -5.147  0.50  0.00           C
ATOM      5  CB BALA A   5      14.639   6.071  -5.147  0.50  0.00           C
ATOM      6  H   ALA A   5      10.104   6.134  -6.504  1.00  0.00           H
ATOM      7  P     G B   7      20.104   6.134  -6.504  1.00  0.00           P
HETATM    8  O   HOH C   1       1.000   2.000   3.000  1.00  0.00           O
HETATM    9 ZN    ZN D   1       4.000   2.000   3.000  1.00  0.00          ZN
END
"""


def test_atoms_waters_hydrogens_and_alternate_locations(tmp_path: Path) -> None:
    (tmp_path / "a.pdb").write_text(PDB)
    with gzip.open(tmp_path / "b.pdb.gz", "wt") as stream:
        stream.write(PDB)
    for name in ("a.pdb", "b.pdb.gz"):
        atoms = read_atoms(tmp_path / name)
        assert atoms.atomic_number.tolist() == [7, 6, 6, 15, 30]
        assert atoms.xyz[1:3, 0].tolist() == [12.639, 13.639]  # the most occupied, the first of equals
        assert atoms.chain.tolist() == ["A", "A", "A", "B", "D"]
        assert atoms.mass[3] == pytest.approx(30.97, abs=0.01)
        assert atoms.xyz.dtype == np.float64 and len(atoms) == 5


@pytest.mark.parametrize(("occupancies", "wanted"), [((0.4, 0.6), "THR"), ((0.6, 0.4), "SER"), ((0.5, 0.5), "SER")])
@pytest.mark.parametrize("ending", ["cif", "pdb"])
def test_of_two_residues_at_one_position_one_is_kept(
    ending: str, occupancies: tuple[float, float], wanted: str, tmp_path: Path
) -> None:
    """Microheterogeneity: both would be density and scores at one place twice."""
    gemmi = pytest.importorskip("gemmi")
    chain = gemmi.Chain("A")
    named = [("SER", 7, "A", occupancies[0]), ("THR", 7, "B", occupancies[1]), ("GLY", 8, "\0", 1.0)]
    for name, number, altloc, occupancy in named:
        residue = gemmi.Residue()
        residue.name, residue.seqid = name, gemmi.SeqId(str(number))
        for x, atom_name in enumerate(("N", "CA", "C", "O")):
            atom = gemmi.Atom()
            atom.name, atom.element, atom.altloc, atom.occ = atom_name, gemmi.Element(atom_name[0]), altloc, occupancy
            atom.pos = gemmi.Position(x, number, 0)
            residue.add_atom(atom)
        chain.add_residue(residue)
    structure, model = gemmi.Structure(), gemmi.Model(1)
    model.add_chain(chain)
    structure.add_model(model)
    structure.setup_entities()
    path = tmp_path / f"model.{ending}"
    path.write_text(structure.make_mmcif_document().as_string() if ending == "cif" else structure.make_pdb_string())
    atoms = read_atoms(path)
    assert atoms.residue_name.tolist() == [wanted] * 4 + ["GLY"] * 4
    assert atoms.residue_label.tolist() == ["7"] * 4 + ["8"] * 4


def check_atoms(shared: Path, step: int) -> None:
    with open(shared / "data" / "MANIFEST.tsv") as stream:
        rows = [row for row in csv.DictReader(stream, delimiter="\t") if row["kind"] == "A-atomic"]
    assert len(rows) == 100
    for row in rows[::step]:
        atoms = read_atoms(shared / "data" / row["path"])
        assert len(atoms) == int(re.search(r"(\d+) non-H", row["description"]).group(1)), row["path"]
        radius = np.sqrt(np.square(atoms.xyz - atoms.xyz.mean(axis=0)).sum(axis=1).mean())  # every atom counts as one
        assert radius == pytest.approx(float(re.search(r"Rg ([\d.]+)", row["description"]).group(1)), rel=0.005)


def test_some_real_models(shared: Path) -> None:
    """Non-hydrogen atoms and radius of gyration are those of the manifest."""
    check_atoms(shared, 20)


@pytest.mark.slow
def test_all_real_models(shared: Path) -> None:
    check_atoms(shared, 1)


def test_bad_models_are_refused(tmp_path: Path, shared: Path) -> None:
    whole = (shared / "data" / "atomic" / "bench" / "3d2f.cif.gz").read_bytes()
    files = {
        "cut.cif.gz": whole[:5000],
        "text.pdb": b"hello\n",
        "text.cif": b"hello\n",
        "bytes.cif": bytes(range(256)) * 4,
        "empty.pdb": b"",
        "notgz.cif.gz": b"data_x\n",
        "model.txt": PDB.encode(),
        "water.pdb": (PDB.splitlines()[8] + "\nEND\n").encode(),
        "nan.pdb": PDB.replace("11.104", "   nan").encode(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
            with pytest.raises(InputError, match=re.escape(name)) as caught:
                read_atoms(tmp_path / name)
            assert "\n" not in str(caught.value)
