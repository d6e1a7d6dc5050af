"""Hostile names and bombs: nothing is written outside the folder asked for, nothing reaches the terminal as a command,
a small file takes no large memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import hostile_seeds as seeds
import numpy as np
import pandas as pd
import pytest
from hostile import attempt

from cryosuite import console
from cryosuite.analysis.class_files import write_classes
from cryosuite.analysis.lists import write_lists
from cryosuite.cli import main
from cryosuite.data.export import export_all
from cryosuite.data.open import open_particles
from cryosuite.data.preprocess import PreprocessOptions, preprocess
from cryosuite.data.source import open_source
from cryosuite.data.workdir import AnalysisDir
from cryosuite.errors import InputError, notice, one_line
from cryosuite.formats import cs, star
from cryosuite.formats.atoms import read_atoms
from cryosuite.formats.config import read_yaml
from cryosuite.formats.mrc import read_map
from cryosuite.formats.npz import read_npz

ESCAPE = "\x1b]0;owned\x07\x1b[2J\x1b[31m"
NAMES = ["../../outside/st.mrcs", "/outside/st.mrcs", "a/../../st.mrcs"]


def tree(folder: Path) -> dict[str, bytes | str]:
    """All files below a folder with what they hold."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() or path.is_symlink()
    }


@pytest.fixture(params=NAMES)
def escaping(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A project whose star names its stack (and micrographs) with ways out of the folder; the stack lies in images/."""
    project = tmp_path / "project"
    (project / "images").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept.txt").write_text("mine")
    seeds._stack(project / "images" / "st.mrcs")
    text = seeds.star_text().decode().replace("@st.mrcs", f"@{request.param}")
    (project / "a.star").write_text(text.replace(" a_", " ../../outside/kept.txt_"))
    array = seeds.cs_array()
    wide = [(name, "S64" if name == "blob/path" else array.dtype[name]) for name in array.dtype.names]
    array = array.astype(wide)
    array["blob/path"] = request.param.encode()
    cs.write_cs(project / "a.cs", array)
    return project


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["star", "cs"])
def test_names_with_ways_out_write_nothing_outside(escaping: Path, kind: str) -> None:
    """preprocess, select's and export's star, cs and pkl, those of each class: new files appear where they were asked
    for and nowhere else."""
    before = tree(escaping.parent)
    particles = open_particles(escaping / f"a.{kind}", datadir=escaping / "images")
    made = preprocess(particles, escaping / "work", PreprocessOptions())
    assert made.written == seeds.COUNT
    outs = ["out.star", "out.pkl", *(["out.cs"] if kind == "cs" else [])]
    (escaping / "made").mkdir()
    for chosen in (particles, open_particles(escaping / "work")):
        export_all(chosen.subset(np.arange(5)), [escaping / "made" / name for name in outs])
    labels = np.arange(seeds.COUNT) % 2
    write_lists(AnalysisDir(escaping / "made"), open_particles(escaping / "work"), labels, 2)
    write_classes(escaping / "made" / "classes", open_particles(escaping / "work"), labels)
    stars = list((escaping / "made").rglob("cluster_*.*"))
    assert len(stars) >= 6 and any(path.suffix == f".{kind}" for path in stars)
    after = tree(escaping.parent)
    new = {name for name in after if after[name] != before.get(name)}
    assert before.keys() <= after.keys() and new == after.keys() - before.keys()
    assert {Path(name).parts[:2] for name in new} == {("project", "work"), ("project", "made")}


@pytest.mark.filterwarnings("ignore")
def test_links_are_replaced_not_written_through(tmp_path: Path) -> None:
    """A work folder in which somebody left links: the files they point to stay as they are."""
    seeds._stack(tmp_path / "st.mrcs")
    (tmp_path / "a.star").write_bytes(seeds.star_text())
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    work = tmp_path / "work"
    work.mkdir()
    for name in ("particles.mrcs", "particles.star", "poses.pkl", "ctf.pkl", "rows.pkl", "noise.pkl", "dataset.yaml"):
        (work / name).symlink_to(precious)
    particles = open_particles(tmp_path / "a.star")
    preprocess(particles, work, PreprocessOptions())
    assert precious.read_text() == "mine" and not (work / "particles.star").is_symlink()
    (tmp_path / "out.star").symlink_to(precious)
    export_all(particles, [tmp_path / "out.star"])
    assert precious.read_text() == "mine" and len(star.read_star(tmp_path / "out.star")["particles"]) == seeds.COUNT


def test_a_summary_cannot_lead_the_report_out_of_its_folder(tmp_path: Path) -> None:
    toy = seeds.scene(tmp_path)
    for name in ("..", "../..", "/etc", "a/../..", "."):
        toy.analysis.summary.write_text(f"kind: analysis\nrun: ..\nepoch: 2\nkmeans: {{folder: '{name}'}}\n")
        (toy.run.path / "centers_ind.txt").write_text("3\n")  # what a folder '..' would find
        assert open_source(toy.analysis.path).centre_row(0) is None


def test_messages_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError) as caught:
        raise InputError(f"x.star: {ESCAPE}\nsecond line\u202e")
    with pytest.warns(UserWarning) as told:
        notice(f"a {ESCAPE}")
    console.say(f"one {ESCAPE}\ntwo")
    console.table("t", ["name"], [[f"m{ESCAPE}[red]x"]])
    shown = capsys.readouterr()
    for text in (str(caught.value), str(told[0].message), shown.out, shown.err):
        assert "owned" in text and not {"\x1b", "\x07", "\u202e"} & set(text)
    assert "\n" not in str(caught.value) and "two" in shown.err and "[red]" in shown.out
    assert one_line("Å µ 粒子 é") == "Å µ 粒子 é"


@pytest.mark.parametrize("name", [f"{ESCAPE}st.mrcs", "st\u202e.mrcs", "<script>alert(1)</script>.mrcs"])
def test_a_name_in_a_star_is_shown_without_its_controls(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line's own words about a star with such a name: one line, nothing for the terminal."""
    (tmp_path / "a.star").write_text(seeds.star_text().decode().replace("@st.mrcs", f"@{name}"))
    monkeypatch.setattr(sys, "argv", ["cryosuite", "preprocess", str(tmp_path / "a.star"), "-o", str(tmp_path / "w")])
    with pytest.raises(SystemExit) as left:
        main()
    shown = capsys.readouterr().err
    assert left.value.code == 2 and shown.startswith("error: ") and not {"\x1b", "\x07", "\u202e"} & set(shown)
    assert not (tmp_path / "w").exists()


def test_names_with_breaks_do_not_make_rows_of_their_own(tmp_path: Path) -> None:
    """A text that would end its line is refused when a star is written, and quoted where it only looks like syntax."""
    for bad in ("a\nloop_", "a\rb", "a\tb"):
        with pytest.raises(InputError, match=r"cannot be written to a STAR file"):
            star.write_star(tmp_path / "x.star", {"": pd.DataFrame({"rlnMicrographName": [bad]})})
    odd = ["data_x", "loop_", "_a", "# no comment", "two words", ""]
    star.write_star(tmp_path / "x.star", {"": pd.DataFrame({"rlnMicrographName": odd})})
    assert star.read_star(tmp_path / "x.star")[""]["rlnMicrographName"].tolist() == odd


def bomb_of_aliases(merge: bool) -> str:
    lines = ["a0: &a0 {x: 1}" if merge else "a0: &a0 [x, y]"]
    for i in range(1, 12):
        nine = ",".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} " + (f"{{<<: [{nine}]}}" if merge else f"[{nine}]"))
    return "\n".join(lines)


YAML_BOMBS = {
    "aliases": bomb_of_aliases(False), "merged aliases": bomb_of_aliases(True), "itself": "a: &a [*a, *a]",
    "brackets": "[" * 500_000, "dashes": "- " * 20_000 + "1", "base 60": "a: 1" + ":59" * 300_000,
    "many": "a: [" + "1," * 300_000 + "]", "long": "#" * (5 << 20) + "\na: 1",
}  # fmt: skip


@pytest.mark.parametrize("name", YAML_BOMBS)
def test_yaml_bombs_are_refused_quickly(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(YAML_BOMBS[name])
    outcome = attempt(read_yaml, path)
    assert outcome.result == "refused" and outcome.seconds < 4, (outcome.fault, outcome.message)


def test_plain_yaml_with_an_alias_is_read(tmp_path: Path) -> None:
    """cryoDRGN's configs share lists by aliases."""
    (tmp_path / "c.yaml").write_text("a: &id001 [1, 2]\nb: *id001\nc: &x 5\nd: *x\n")
    assert read_yaml(tmp_path / "c.yaml") == {"a": [1, 2], "b": [1, 2], "c": 5, "d": 5}


def npz_of(name: str, data: bytes, kind: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", kind) as archive:
        archive.writestr(name, data)
    return out.getvalue()


def npy_of(shape: tuple[int, ...], dtype: str, data: bytes) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
    return out.getvalue() + data


def test_npz_that_lie_or_explode_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    zeros = npy_of((1 << 24,), "|u1", bytes(1 << 24))
    hostile = {
        "a deflated bomb": npz_of("a.npy", zeros, zipfile.ZIP_DEFLATED),
        "a header that lies": npz_of("a.npy", npy_of((1 << 40,), "<f8", bytes(8))),
        "objects": npz_of("a.npy", npy_of((1,), "|O", pickle.dumps([1]))),
        "another name": npz_of("b.npy", npy_of((1,), "<f8", bytes(8))),
        "no archive": b"PK\x03\x04" + bytes(50),
    }
    for what, data in hostile.items():
        path.write_bytes(data)
        outcome = attempt(lambda path: read_npz(path, ["a"]), path)
        assert outcome.result == "refused" and outcome.peak < 2_000_000, (what, outcome)
    np.savez(path, a=np.arange(6).reshape(2, 3), b=np.zeros(0), c=np.float32(3))
    with open(path, "rb"):
        found = read_npz(path, ["a", "b", "c"])
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and found["b"].shape == (0,) and found["c"] == 3


def test_gz_bombs(tmp_path: Path) -> None:
    """A model that unpacks to 1000 times its size is refused early; a map whose header lies costs no memory."""
    (tmp_path / "m.pdb.gz").write_bytes(gzip.compress(bytes(64 << 20), 6))
    outcome = attempt(read_atoms, tmp_path / "m.pdb.gz", size=(tmp_path / "m.pdb.gz").stat().st_size * 40)
    assert outcome.result == "refused" and "unpacks to more than 100 times" in outcome.message, outcome
    data = bytearray(seeds.mrc_of("f4"))
    data[0:12] = np.array([400, 400, 5], "<i4").tobytes()  # 3.2 MB promised, a kilobyte there
    (tmp_path / "x.mrc.gz").write_bytes(gzip.compress(bytes(data) + bytes(2000), 9))
    outcome = attempt(read_map, tmp_path / "x.mrc.gz")
    assert outcome.result == "refused" and outcome.peak < 2_000_000, outcome
    text = seeds.model().make_pdb_string().encode()
    (tmp_path / "m.pdb.gz").write_bytes(gzip.compress(text))
    (tmp_path / "m.pdb").write_bytes(text)
    plain, packed = read_atoms(tmp_path / "m.pdb"), read_atoms(tmp_path / "m.pdb.gz")
    np.testing.assert_array_equal(plain.xyz, packed.xyz)
    assert plain.atom_name.tolist() == packed.atom_name.tolist() and plain.name == packed.name


def test_a_zip_is_no_cs(tmp_path: Path) -> None:
    (tmp_path / "x.cs").write_bytes(npz_of("a.npy", bytes(1 << 24), zipfile.ZIP_DEFLATED))
    outcome = attempt(cs.read_cs, tmp_path / "x.cs")
    assert outcome.result == "refused" and outcome.peak < 1_000_000, outcome


def test_json_with_deep_brackets_is_refused(tmp_path: Path) -> None:
    from cryosuite.data.select import rows_from

    for text in ("[" * 200_000, json.dumps({"kind": "cryosuite selection"})[:-1] + ', "rows": ' + "[" * 100_000):
        (tmp_path / "x.json").write_text(text)
        outcome = attempt(lambda path: rows_from(path, 10), tmp_path / "x.json")
        assert outcome.result == "refused", outcome


def test_names_of_a_cs_reach_tables_without_controls(tmp_path: Path) -> None:
    """particles.csv is looked at with cat and less: micrographs named by a cs file cannot command the terminal."""
    from cryosuite.analysis.particle_table import _column, _micrograph, write_particle_table

    names = np.array([f"{ESCAPE}.mrc".encode(), b"plain.mrc", b"two\nlines.mrc"])
    columns = [_micrograph(names), _column("x\x1b[1m/y", np.arange(3.0), set())]
    write_particle_table(tmp_path / "particles.csv", columns)
    for path in tmp_path.iterdir():
        text = path.read_text()
        assert not {"\x1b", "\x07"} & set(text) and len(text.splitlines()) in (3, 4)
    assert len(pd.read_csv(tmp_path / "particles.csv")) == 3
