"""Recipes: states in the right frames, loops that close, nested assemblies, occupancies, selections."""

from __future__ import annotations

import numpy as np
import pytest

from cryosuite.errors import InputError
from cryosuite.simulate.build import RecipeOptions, build_states, occupancies
from cryosuite.simulate.phantoms import turn_about
from cryosuite.simulate.presets import PRESETS, preset
from cryosuite.simulate.recipes import RIBO_PATTERNS, assembly, loop, mix, nested_patterns, split_blocks
from cryosuite.simulate.sources import Structure, find_files, load_structures, phantom_count, select
from cryosuite.simulate.states import counts


def _toy(n: int = 60) -> Structure:
    rng = np.random.default_rng(0)
    chain = np.repeat(["A", "B", "C"], n // 3)
    residue = np.tile(np.arange(1, n // 3 + 1), 3)
    return Structure("toy", rng.normal(0, 20, (n, 3)) + 100, np.full(n, 6.0), 1e4, chain, residue)


def test_mix_puts_every_molecule_at_the_origin():
    for state in mix(load_structures("phantom:3", np.random.default_rng(0))).states:
        assert np.allclose(np.average(state.xyz, axis=0, weights=state.weight), 0, atol=1e-3)


def test_loop_closes_and_moves_only_the_domain():
    toy = _toy()
    moving = select(toy, "A")
    states = loop(toy, moving, n_states=12).states
    xyz = np.stack([s.xyz for s in states]).astype(np.float64)
    assert np.allclose(xyz[:, ~moving], xyz[0, ~moving], atol=1e-4), "the rest stands still"
    step = np.linalg.norm(np.roll(xyz, -1, axis=0) - xyz, axis=2)[:, moving]
    assert np.allclose(step, step[0], atol=1e-3), "equal steps, the last one back to the first state"
    inner = np.linalg.norm(xyz[:, moving][:, :, None] - xyz[:, moving][:, None], axis=-1)
    assert np.allclose(inner, inner[0], atol=1e-3), "the domain is rigid"


def test_loop_embedding_is_the_angle():
    toy = _toy()
    result = loop(toy, select(toy, "A"), n_states=8)
    angle = np.arctan2(result.embedding[:, 1], result.embedding[:, 0]) % (2 * np.pi)
    assert np.allclose(np.rad2deg(angle), result.details["angles_deg"])
    axis, hinge = np.array(result.details["axis"]), np.array(result.details["hinge"])
    first, second = (s.xyz[:20].astype(np.float64) for s in result.states[:2])
    assert np.allclose((first - hinge) @ turn_about(axis, np.pi / 4).T + hinge, second, atol=5e-3)


def test_phantom_loop_sweeps_around_its_axis():
    states = build_states(RecipeOptions(recipe="loop", n_states=6), 0, 2.5)
    arm = np.stack([s.xyz for s in states.states])
    moved = np.linalg.norm(arm[3] - arm[0], axis=1)
    assert 20 < np.percentile(moved, 95) < 200, "half a turn carries the arm's end across"
    assert max(s.radius for s in states.states) < 150


@pytest.mark.parametrize(("blocks", "states"), [(8, 16), (8, 5), (5, 9), (3, 4), (6, 3), (2, 2)])
def test_nested_patterns_share_the_core_and_differ(blocks, states):
    patterns = nested_patterns(blocks, states)
    assert len(set(patterns)) == states
    assert all(len(p) == blocks and p[0] == "1" for p in patterns)


def test_too_many_states_for_the_blocks():
    with pytest.raises(InputError, match="at most 2 states"):
        nested_patterns(2, 3)


def test_assembly_keeps_one_frame():
    states = build_states(RecipeOptions(recipe="assembly"), 0, 2.5).states
    whole = {tuple(p) for p in states[-1].xyz.tolist()}
    assert states[-1].name == "11111111" and [s.name for s in states] == RIBO_PATTERNS
    core = {tuple(p) for p in states[0].xyz.tolist()}
    for state in states:
        atoms = {tuple(p) for p in state.xyz.tolist()}
        assert core <= atoms <= whole


def test_blocks_of_a_structure():
    toy = _toy()
    assert np.array_equal(split_blocks(toy, "chain"), np.repeat([0, 1, 2], 20))
    runs = split_blocks(toy, "4")
    assert np.array_equal(np.bincount(runs), [15, 15, 15, 15])
    ranges = split_blocks(toy, "1-5,11-20")
    assert (ranges[:5] == 0).all() and (ranges[5:10] == -1).all() and (ranges[10:20] == 1).all()
    assert np.array_equal(np.bincount(split_blocks(toy, "A,B:1-10;C") + 1), [10, 30, 20])
    left_out = assembly(toy, "1-5,11-20", 2)
    assert [len(s.xyz) for s in left_out.states] == [5, 15]
    with pytest.raises(InputError, match="part 1 of 2 holds no atoms"):
        assembly(toy, "900-950,1-20", 2)


@pytest.mark.parametrize("text", ["Z", "A:100-200", "A:5", "A B"])
def test_selections_that_hold_nothing_are_refused(text):
    with pytest.raises(InputError, match="selection"):
        select(_toy(), text)


@pytest.mark.parametrize("minimum", [0, 20])
def test_counts_follow_the_occupancies(minimum):
    share = occupancies("ribosembly", 16, np.random.default_rng(0))
    number = counts(share, 2400, minimum)
    assert number.sum() == 2400 and number.min() >= minimum
    assert np.abs(number - np.maximum(share * 2400, minimum)).max() <= 20
    assert counts(np.ones(3), 10).tolist() == [4, 3, 3]


@pytest.mark.parametrize(("text", "match"), [("1,2", "2 values"), ("a,b,c", "expected"), ("1,-1,2", "at least 0")])
def test_bad_occupancies(text, match):
    with pytest.raises(InputError, match=match):
        occupancies(text, 3, np.random.default_rng(0))


def test_structures_are_found_or_missed_by_name(tmp_path, monkeypatch):
    monkeypatch.delenv("CRYOSUITE_SHARED", raising=False)
    assert phantom_count("phantom:7") == 7 and phantom_count("phantom") == 16 and phantom_count("x.cif") is None
    with pytest.raises(InputError, match="nothere"):
        find_files("nothere")
    with pytest.raises(InputError, match="no .pdb"):
        find_files(str(tmp_path))
    (tmp_path / "note.txt").write_text("x")
    with pytest.raises(InputError, match="expected a .pdb"):
        find_files(str(tmp_path / "note.txt"))
    with pytest.raises(InputError, match="between 1 and"):
        phantom_count("phantom:0")


def test_folders_files_and_phantoms_may_be_mixed(tmp_path):
    line = "ATOM  {0:>5}  CA  ALA A{0:>4}    {1:8.3f}{2:8.3f}{3:8.3f}  1.00  0.00           C\n"
    for folder, name in (("one", "b"), ("one", "a"), ("two", "c")):
        (tmp_path / folder).mkdir(exist_ok=True)
        lines = [line.format(i + 1, 4.0 * i, ord(name) - 90.0, i % 3) for i in range(20)]
        (tmp_path / folder / f"{name}.pdb").write_text("".join(lines) + "END\n")
    spec = f"{tmp_path}/one, phantom:2,{tmp_path}/two"
    states = build_states(RecipeOptions(structures=spec), 0, 2.5)
    assert [state.name for state in states.states] == ["a", "b", "c", "phantom00", "phantom01"]
    alone = build_states(RecipeOptions(structures="phantom:2"), 0, 2.5)
    assert np.array_equal(alone.states[1].xyz, states.states[4].xyz)
    with pytest.raises(InputError, match="either maps"):
        (tmp_path / "map.mrc").write_bytes(b"x")
        build_states(RecipeOptions(structures=f"{tmp_path}/map.mrc,phantom:2"), 0, 2.5)


def test_unknown_names():
    with pytest.raises(InputError, match="unknown"):
        build_states(RecipeOptions(recipe="mixx"), 0, 2.5)
    with pytest.raises(InputError, match="mini-mix16"):
        preset("mini")


def _preset_states(name: str):
    p = PRESETS[name]
    keys = {"recipe", "structures", "blocks", "moving", "hinge", "towards", "occupancies"}
    return build_states(RecipeOptions(n_states=p.get("states"), **{k: v for k, v in p.items() if k in keys}), 0, 2.5)


def test_the_mini_sets(shared, monkeypatch):
    """Numbers of BENCHMARKS: 10,252 atoms of 1IGY that fit 288 A at all angles; the pathway of the 16S rRNA."""
    monkeypatch.setenv("CRYOSUITE_SHARED", str(shared))
    igg = _preset_states("mini-igg10")
    assert len(igg) == 10 and all(len(s.xyz) == 10252 for s in igg.states)
    assert 150 < 2 * max(s.radius for s in igg.states) < 288
    assert 0.27 < igg.details["moving_share"] < 0.36  # one Fab of two and an Fc
    ribo = _preset_states("mini-ribo16")
    size = {s.name: len(s.xyz) for s in ribo.states}
    assert size["11111111"] > 27000 and size["10000000"] < 0.4 * size["11111111"]
    assert np.argmax(ribo.occupancy) == 3
    with pytest.raises(InputError, match="--moving"):
        build_states(RecipeOptions(recipe="loop", structures="1igy"), 0, 2.5)
