"""The user's pairs of map and model: lists in every form, clear refusals, and crops whose target fits the map."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from cryosuite.data.map_sets import load_volume, map_entries, read_pairs
from cryosuite.errors import InputError, UserNotice
from cryosuite.formats.mrc import write_map
from cryosuite.kernels.density import MOLMAP_SIGMA, molmap
from cryosuite.simulate.map_options import PairOptions
from cryosuite.simulate.map_pairs import MapPairs
from cryosuite.simulate.map_users import cube, shifted

VOXEL = 1.3
SHAPE = (50, 46, 54)  # z y x


def model(path: Path, seed: int = 0, n: int = 500) -> np.ndarray:
    """A PDB file of carbons in a ball, 20 to 40 A from the origin; (n, 3) A."""
    rng = np.random.default_rng(seed)
    xyz = np.round(rng.normal(size=(n, 3)) * 5 + 30, 3)
    lines = [
        f"ATOM  {i + 1:5d}  CA  ALA A{i + 1:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00 20.00           C  "
        for i, (x, y, z) in enumerate(xyz)
    ]
    path.write_text("\n".join([*lines, "END"]) + "\n")
    return xyz


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """two.mrc beside two.pdb, one.map beside one.pdb, and a map alone; the maps are those of the models at 6 A."""
    for seed, name in enumerate(("one.map", "two.mrc", "alone.mrc")):
        xyz = model(tmp_path / f"{name.split('.')[0]}.pdb", seed)
        points = torch.from_numpy(xyz).float()
        sigma = MOLMAP_SIGMA * 6.0
        values = molmap(points, torch.full((len(xyz),), 6.0), SHAPE, (1.0, 2.0, 3.0), VOXEL, sigma)
        write_map(tmp_path / name, values.numpy() * 3.7 - 0.2, VOXEL, origin=(1.0, 2.0, 3.0))
    (tmp_path / "alone.pdb").unlink()
    return tmp_path


def test_lists_of_every_form_say_the_same(folder: Path) -> None:
    (folder / "l.csv").write_text("# ours\nmap,model,resolution\none.map,one.pdb,3.5\ntwo.mrc,two.pdb,\n")
    (folder / "l.tsv").write_text("model\tmap\none.pdb\tone.map\ntwo.pdb\ttwo.mrc\n")
    (folder / "l.yaml").write_text(
        "pairs:\n- {map: one.map, model: one.pdb, resolution: 3.5}\n- {map: two.mrc, model: two.pdb}\n"
    )
    table, tabs, yaml, found = (read_pairs(folder / name) for name in ("l.csv", "l.tsv", "l.yaml", "."))
    assert [entry.name for entry in found] == ["one", "two"]
    assert table == yaml
    assert table[0].resolution == 3.5 and table[1].resolution is None
    for entries in (tabs, found):
        assert [(entry.map, entry.model) for entry in entries] == [(entry.map, entry.model) for entry in table]
    assert [entry.name for entry in map_entries([folder])] == ["alone", "one", "two"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("map,resolution\none.map,3\n", "lacks model"),
        ("map,model\none.map,\n", "row 2: no model"),
        ("map,model\none.map,nowhere.pdb\n", "row 2: the model .*nowhere.pdb is not there"),
        ("map,model\none.pdb,one.pdb\n", "must end in .mrc"),
        ("map,model,resolution\none.map,one.pdb,three\n", "row 2: resolution three"),
        ("map,model,resolution\none.map,one.pdb,nan\n", "resolution nan"),
        ("map,model\none.map,one.pdb\none.map,two.pdb\n", "two maps are named one"),
        ("map,model\n", "holds no pair"),
    ],
)
def test_lists_that_are_wrong(folder: Path, text: str, said: str) -> None:
    (folder / "l.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        read_pairs(folder / "l.csv")


def test_other_things_that_are_wrong(folder: Path) -> None:
    (folder / "l.yaml").write_text("pairs: 3\n")
    with pytest.raises(InputError, match="pairs:"):
        read_pairs(folder / "l.yaml")
    with pytest.raises(InputError, match="expected a .csv"):
        read_pairs(folder / "one.map")
    with pytest.raises(InputError, match="expected a map"):
        map_entries([folder / "one.pdb"])
    model(folder / "far.pdb")
    far = (folder / "far.pdb").read_text().replace("ATOM", "HETATM").splitlines()
    (folder / "far.pdb").write_text("\n".join(line[:30] + "   900.000" + line[38:] for line in far))
    (folder / "l.csv").write_text("map,model\none.map,far.pdb\n")
    with pytest.raises(InputError, match="belong"):
        load_volume(read_pairs(folder / "l.csv")[0], 1.0, "robust")


def test_a_map_on_the_working_voxel(folder: Path) -> None:
    entry = read_pairs(folder)[0]
    found = load_volume(entry, 1.0, "robust")
    assert found.values.shape == tuple(round(n * VOXEL) for n in SHAPE)
    assert float(found.values.min()) == 0.0 and float(found.values.max()) == 1.0
    heaviest = np.array(np.unravel_index(found.values.argmax(), found.values.shape))[::-1]
    assert np.abs(found.points.mean(0) - heaviest).max() < 8
    weight = np.clip(found.values, 0.05, 1) - 0.05
    axes = np.meshgrid(*(np.arange(n) for n in found.values.shape), indexing="ij")
    centre = [float((weight * axis).sum() / weight.sum()) for axis in axes][::-1]
    assert np.abs(found.points.mean(0) - centre).max() < 0.15  # origin and voxel are honoured


def test_targets_lie_on_the_users_maps(folder: Path) -> None:
    (folder / "l.csv").write_text("map,model,resolution\none.map,one.pdb,6\n")
    options = PairOptions(volume=48, crop=16, crops_per_volume=3, affine=(0.0, 0.0))
    pairs = MapPairs.open("", options, pairs=folder / "l.csv")
    assert pairs.names == ["one"]
    turned = set()
    for seed in range(5):
        found = pairs.volume(0, torch.Generator().manual_seed(seed))
        inner = (slice(6, -6),) * 3
        both = torch.stack([found.input[inner].flatten(), found.target[inner].flatten()])
        assert float(torch.corrcoef(both)[0, 1]) > 0.995  # 24 rotations and sub-voxel shifts keep them together
        turned.add(round(float(found.input[6:20].mean()), 4))
    assert len(turned) > 1
    batch = pairs.draw(torch.Generator().manual_seed(1))
    assert batch.input.shape == (3, 1, 16, 16, 16) and float(batch.resolution[0]) == 6.0


def test_an_unknown_resolution_is_found(folder: Path) -> None:
    pairs = MapPairs.open("", PairOptions(volume=48, crop=16), pairs=folder)
    with pytest.warns(UserNotice, match="agree best at"):
        batch = pairs.draw(torch.Generator().manual_seed(1))
    assert 2.7 <= float(batch.resolution[0]) < 7.0


def test_users_maps_beside_simulated_ones(folder: Path) -> None:
    options = PairOptions(volume=32, crop=16, crops_per_volume=1, users=0.5)
    (folder / "l.csv").write_text("map,model,resolution\none.map,one.pdb,6\ntwo.mrc,two.pdb,6\n")
    pairs = MapPairs.open("phantom:2", options, pairs=folder / "l.csv", hold_out="two")
    drawn = [int(pairs.draw(torch.Generator().manual_seed(seed)).index[0]) for seed in range(40)]
    assert set(drawn) == {0, 1, 2}
    assert 8 < drawn.count(2) < 32
    assert {int(batch.index[0]) for batch in pairs.held(0, 2)} == {3}


def test_maps_alone_are_for_pretraining(folder: Path) -> None:
    maps = [folder / "alone.mrc"]
    pairs = MapPairs.open("", PairOptions(task="pretrain", volume=32, crop=16), maps=maps)
    batch = pairs.draw(torch.Generator().manual_seed(0))
    assert torch.equal(batch.input, batch.target) and float(batch.input.max()) > 0.3
    with pytest.raises(InputError, match="no target"):
        MapPairs.open("phantom:1", PairOptions(), maps=maps)
    with pytest.raises(InputError, match="wedge"):
        MapPairs.open("phantom:1", PairOptions(task="wedge"), pairs=folder)


def test_cubes_and_shifts() -> None:
    values = np.arange(5 * 6 * 7, dtype=np.float32).reshape(5, 6, 7)
    part = cube(values, np.array([-2, 3, 4]), 4)
    assert part[2, 0, 0] == values[0, 3, 4] and part[3, 2, 2] == values[1, 5, 6]
    assert not part[:2].any() and not part[:, 3].any() and not part[:, :, 3].any()
    axis = torch.arange(32.0)
    gauss = torch.exp(-((axis - 16) ** 2) / 18)
    blob = gauss[:, None, None] * gauss[:, None] * gauss
    moved = shifted(blob, np.array([0.4, -0.3, 0.0]))  # x y z
    for dims, wanted in (((0, 1), 16.4), ((0, 2), 15.7), ((1, 2), 16.0)):
        profile = moved.sum(dims)
        assert float((profile * axis).sum() / profile.sum()) == pytest.approx(wanted, abs=0.01)


def test_a_list_of_junk_takes_no_memory(folder: Path) -> None:
    """A line of 100,000 cells would be as many Python objects; 200,000 lines of one sign, too."""
    junk = {"line 2 has 240000 char": "one.map," * 30_000, "row 2": "x\n" * 200_000}
    for said, text in junk.items():
        path = folder / "junk.csv"
        path.write_text("map,model\n" + text)
        tracemalloc.start()
        with pytest.raises(InputError, match=said):
            read_pairs(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * path.stat().st_size + 100_000, said


def test_a_name_twice_is_refused(folder: Path) -> None:
    (folder / "l.csv").write_text("map,model\none.map,one.pdb\none.map,one.pdb\n")
    with pytest.raises(InputError, match="two maps are named one"):
        read_pairs(folder / "l.csv")
