"""``cryosuite eval-fsc --map --model``: table, files, header of the local-resolution map, clear refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import gemmi
import mrcfile
import numpy as np
import pytest
from map_toy import toy_atoms, toy_grid
from typer.testing import CliRunner

from cryosuite.cli import app
from cryosuite.data.map_grid import read_grid
from cryosuite.errors import InputError
from cryosuite.formats.atoms import Atoms, read_atoms
from cryosuite.formats.mrc import read_map, write_map
from cryosuite.metrics.model_map import ModelOnGrid

RUNNER = CliRunner()


def run(*arguments: object) -> str:
    result = RUNNER.invoke(app, ["eval-fsc", *(str(one) for one in arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def write_model(path: Path, atoms: Atoms) -> None:
    """The toy as mmCIF: chains, residues, a zinc ion, a water, one hydrogen that no score may count."""
    structure = gemmi.Structure()
    structure.add_model(gemmi.Model(1))
    for i in range(len(atoms)):
        chain = structure[0].find_chain(str(atoms.chain[i]))
        if chain is None:
            chain = structure[0].add_chain(gemmi.Chain(str(atoms.chain[i])))
        if not len(chain) or str(chain[-1].seqid) != str(atoms.residue_label[i]):
            residue = gemmi.Residue()
            residue.name, residue.seqid = str(atoms.residue_name[i]), gemmi.SeqId(int(atoms.residue_index[i]), " ")
            chain.add_residue(residue)
        atom = gemmi.Atom()
        atom.name, atom.element = f"{'CNO'[atoms.atomic_number[i] - 6]}{i}", gemmi.Element(int(atoms.atomic_number[i]))
        atom.pos, atom.b_iso, atom.occ = gemmi.Position(*atoms.xyz[i]), float(atoms.b_iso[i]), 1.0
        chain[-1].add_atom(atom)
    hydrogen = gemmi.Atom()
    hydrogen.name, hydrogen.element, hydrogen.pos = "H1", gemmi.Element("H"), gemmi.Position(*(atoms.xyz[0] + 0.9))
    structure[0][0][0].add_atom(hydrogen)
    structure.setup_entities()
    structure.make_mmcif_document().write_file(str(path))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model, two half maps and their mean, axes 3 1 2, negative nstart."""
    folder = tmp_path_factory.mktemp("pair")
    atoms = toy_atoms()
    write_model(folder / "model.cif", atoms)
    empty = toy_grid(atoms, (1.1,) * 3)
    nstart = np.round(np.array(empty.origin) / 1.1).astype(int)
    like = read_map_like(folder / "like.mrc", empty.data, nstart)
    grid = read_grid(like)
    truth = ModelOnGrid(atoms, grid).calculated(b_iso=40.0, d_min=3.5)
    halves = [truth + 1.5 * truth.std() * np.random.default_rng(i).normal(size=truth.shape) for i in (1, 2)]
    for name, values in (("half1", halves[0]), ("half2", halves[1]), ("map", (halves[0] + halves[1]) / 2)):
        write_map(folder / f"{name}.mrc", values, None, like=grid.source)
    return folder


def read_map_like(path: Path, data: np.ndarray, nstart: np.ndarray) -> Path:
    """An empty map with axes 3 1 2 that begins at nstart (x, y, z)."""
    with mrcfile.new(path, np.ascontiguousarray(data.transpose(1, 0, 2).transpose(0, 2, 1))) as mrc:
        mrc.set_volume()
        mrc.header.mapc, mrc.header.mapr, mrc.header.maps = 3, 1, 2
        for axis, n in zip("xyz", data.shape[::-1], strict=True):
            mrc.header["m" + axis], mrc.header["cella"][axis] = n, 1.1 * n
        mrc.header.nxstart, mrc.header.nystart, mrc.header.nzstart = nstart[2], nstart[0], nstart[1]
    return path


def test_scores_files_and_headers(pair, tmp_path):
    out = tmp_path / "scores"
    halves = ("--half1", pair / "half1.mrc", "--half2", pair / "half2.mrc")
    output = run("--map", pair / "map.mrc", "--model", pair / "model.cif", *halves, "-o", out)
    for words in ("CC mask, 3 A", "d_model, masked", "Q, sigma .4 and .6", "local resolution", "half maps"):
        assert words in output
    assert {entry.name for entry in out.iterdir()} == {
        "fsc.csv", "fsc.png", "q_atoms.csv", "q_residues.csv", "q_residues.png", "scores.json", "local_resolution.mrc",
    }  # fmt: skip
    scores = json.loads((out / "scores.json").read_text())
    assert scores["atoms"] == 120 and scores["cc_mask"] > 0.7 and scores["q_0.6"] > 0.5
    assert scores["d_model_masked_A"] == pytest.approx(3.5, abs=0.4)
    with open(out / "q_atoms.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 120 and rows[0]["chain"] == "A" and float(rows[0]["q_0.4"]) <= 1
    x = read_atoms(pair / "model.cif", waters=True).xyz[0, 0]
    assert float(rows[0]["x"]) == pytest.approx(x, abs=1e-3)
    with open(out / "q_residues.csv") as stream:
        kinds = [row["kind"] for row in csv.DictReader(stream)]
    assert kinds.count("water") == 1 and kinds.count("ion") == 1
    local, source = read_map(out / "local_resolution.mrc"), read_map(pair / "map.mrc")
    assert local.axes == (3, 1, 2) and local.nstart == source.nstart and min(local.nstart) < 0
    inside = local.data[local.data > 0]
    assert len(inside) and inside.min() >= 2.2
    alone = run("--half1", pair / "half1.mrc", "--half2", pair / "half2.mrc", "--model", pair / "model.cif")
    assert "CC mask" in alone


def test_grey_values_do_not_matter(pair, tmp_path):
    grid = read_grid(pair / "map.mrc")
    write_map(tmp_path / "other.mrc.gz", 1e-3 * grid.data + 12.0, None, like=grid.source)
    found = []
    for path in (pair / "map.mrc", tmp_path / "other.mrc.gz"):
        run("--map", path, "--model", pair / "model.cif", "--resolution", 3.5, "-o", tmp_path / path.name[:3])
        found.append(json.loads((tmp_path / path.name[:3] / "scores.json").read_text()))
    assert found[0]["calculated_map_cut_from"] == "given"
    for name, value in found[0].items():
        if isinstance(value, float):
            assert found[1][name] == pytest.approx(value, abs=2e-3), name


def test_what_is_refused(pair, tmp_path):
    map_, model = pair / "map.mrc", pair / "model.cif"
    with pytest.raises(InputError, match="nothing to compare"):
        run()
    with pytest.raises(InputError, match="give --model"):
        run("--map", map_)
    with pytest.raises(InputError, match="needs a map"):
        run("--model", model)
    with pytest.raises(InputError, match="one half map alone"):
        run("--map", map_, "--model", model, "--half1", pair / "half1.mrc")
    with pytest.raises(InputError, match="not both"):
        run(map_, map_, "--map", map_, "--model", model)
    with pytest.raises(InputError, match="--mask has no meaning"):
        run("--map", map_, "--model", model, "--mask", map_)
    with pytest.raises(InputError, match="file not found"):
        run("--map", map_, "--model", tmp_path / "none.cif")
    grid = read_grid(map_)
    write_map(tmp_path / "small.mrc", grid.data[:, :, :-4], 1.1, nstart=grid.source.nstart)
    write_map(tmp_path / "moved.mrc", grid.data, 1.1, origin=(1.0, 2.0, 3.0))
    for name in ("small", "moved"):
        with pytest.raises(InputError, match="not on one grid"):
            run("--map", map_, "--model", model, "--half1", pair / "half1.mrc", "--half2", tmp_path / f"{name}.mrc")
    write_map(tmp_path / "zero.mrc", 0 * grid.data, None, like=grid.source)
    with pytest.raises(InputError, match="constant"):
        run("--map", tmp_path / "zero.mrc", "--model", model)
    write_map(tmp_path / "far.mrc", grid.data, 1.1, origin=(900.0, 0.0, 0.0))
    with pytest.raises(InputError, match="none of its 120 atoms"):
        run("--map", tmp_path / "far.mrc", "--model", model)
