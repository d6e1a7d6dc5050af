"""STAR files: RELION's versions, the starfile package and cryoDRGN's parsers agree; tilt series are refused."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cryosuite.errors import InputError, UserNotice
from cryosuite.formats import star, star_text
from cryosuite.formats.pickles import read_ctf, read_poses

ONE = "data_particles\n\nloop_\n_rlnImageName #1\n_rlnDefocusU #2\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def particles_of(path: Path) -> star.ParticleTables | str:
    """The tables, or the reason why not."""
    try:
        return star.particle_tables(path)
    except InputError as error:
        return str(error)


GOLDEN = {  # options that the peer's command was given, see golden/poses/parse_commands.json
    "FinalRefinement-OriginalParticles-PfCRT": {"box": 300, "pixel": 1.035, "contrast": 0.1},
    "relion31": {},
    "relion31.v2": {},
    "relion31.6opticsgroups": {},
    "syn_3groups": {},
    "syn_mixedbox": {},
}


@pytest.mark.parametrize("name", GOLDEN)
def test_metadata_agrees_with_cryodrgn(name: str, golden: Path) -> None:
    """Golden poses/: shifts as fractions to 1e-6, CTF tables to 1e-6 relative, per row box and pixel size."""
    path, given = golden / "poses" / f"{name}.star", GOLDEN[name]
    tables = star.particle_tables(path)
    box = star.box_sizes_from_star(tables) if "box" not in given else np.full(len(tables), given["box"])
    pixel = star.pixel_sizes_from_star(tables)
    if "pixel" in given:
        np.testing.assert_allclose(pixel, given["pixel"])  # detector pixel over magnification
    _, shift = star.poses_from_star(tables, box, pixel)
    table, _ = star.ctf_from_star(tables, box, pixel, amplitude_contrast=given.get("contrast"))
    np.testing.assert_allclose(shift, read_poses(f"{path}.pose.pkl")[1], atol=1e-6)
    np.testing.assert_allclose(table, read_ctf(f"{path}.ctf.pkl"), rtol=1e-6, atol=1e-6)


def test_aberrations_per_optics_group(golden: Path) -> None:
    tables = star.particle_tables(golden / "poses" / "relion31.6opticsgroups.star")
    _, extras = star.ctf_from_star(tables, 196, star.pixel_sizes_from_star(tables))
    assert set(extras) == {"beam_tilt", "mag_matrix", "odd_zernike", "even_zernike"}
    assert extras["odd_zernike"].shape == (139, 6) and extras["even_zernike"].shape == (139, 9)
    first = np.flatnonzero(tables.group == 0)[0]
    np.testing.assert_allclose(extras["beam_tilt"][first], [0.657334, 0.884982], rtol=1e-6)
    np.testing.assert_allclose(extras["odd_zernike"][first][[0, 5]], [1.70554063513, 3.56183614819], rtol=1e-6)
    np.testing.assert_allclose(extras["mag_matrix"][first], [[1.011472, 0.004231], [0.00456, 1.008858]], rtol=1e-6)
    assert len(np.unique(star.pixel_sizes_from_star(tables))) == 2


REFUSED_WORDS = ("tilt-series or subtomogram", "no column rlnImageName", "no particle table", "second table")


def test_metadata_in_the_wild(shared: Path) -> None:
    """Every star file of shared/data is read or refused in a sentence; no tomography set gets through."""
    seen = 0
    for path in sorted((shared / "data" / "metadata").glob("*/*.star")):
        seen += 1
        found = particles_of(path)
        text = path.read_text()
        if isinstance(found, str):
            assert any(words in found for words in REFUSED_WORDS), found
        else:
            assert len(star.images_from_star(found)[1]) == len(found)
            assert "rlnTomo" not in text and "rlnCtfImage" not in text
    assert seen > 70
    for name in ("cryodrgn/sta_testing", "drgnai/M_particles_sub10", "cryoCAT/warp2_particles_matching"):
        assert "Tilt series are not supported yet" in particles_of(shared / "data" / "metadata" / f"{name}.star")


def test_own_tables_equal_those_of_starfile(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways to build a table give the same columns, types and values."""
    for path in sorted((shared / "data" / "metadata").glob("*/*.star")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                through = star.read_star(path)
            except InputError:
                continue
            with monkeypatch.context() as patch:
                patch.setattr(star_text, "_STARFILE_BYTES", 0)
                patch.setattr(star_text, "_ROWS", 600)
                own = star.read_star(path)
        assert list(through) == list(own)
        for name, frame in own.items():
            pd.testing.assert_frame_equal(frame, through[name], check_dtype=False, rtol=1e-14)


def test_large_tables_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column that turns to text late in the file is text from the start, as written."""
    rows = [f"{i + 1:06d}@a.mrcs {'1.50' if i < 90 else 'none'}\n" for i in range(100)]
    path = write(tmp_path / "a.star", ONE + "".join(rows))
    monkeypatch.setattr(star_text, "_STARFILE_BYTES", 0)
    monkeypatch.setattr(star_text, "_ROWS", 16)
    monkeypatch.setattr(star_text, "_PIECE", 100)
    frame = star.read_star(path)["particles"]
    assert frame["rlnDefocusU"].tolist() == ["1.50"] * 90 + ["none"] * 10
    assert frame["rlnImageName"].tolist()[-1] == "000100@a.mrcs"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1@a 1\n2@a\n", r"line 7: 1 values .* expected 2"),
        ("1@a 1\n\n2@a 2 3\n", r"line 8: 3 values .* blank line 7 ends the table"),
        ("'1@a 1\n", r"line 6: a quote is opened"),
        ("1@a 1\ndata_particles\n\nloop_\n_a\n1\n", r"data_particles comes twice \(lines 1 and 7\)"),
        ("1@a 1\nloop_\n_a\n1\n", "line 7: a second table"),
        ("1@a 1\n_rlnVoltage 300\n_rlnOther 3 4\n", "line 8: 3 values"),
        ("1@a x\n", "column rlnDefocusU .*'x' in row 1 .line 6. is not a finite number"),
        ("1@a inf\n", "'inf' in row 1"),
        ("x@a 1\n", "rlnImageName: 'x@a' in row 1"),
        ("1@ 1\n", "rlnImageName: '1@'"),
        ("\x001@a 1\n", "not a STAR file: it holds binary data"),
    ],
)
def test_broken_tables_are_refused_with_their_line(rows: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.star", ONE + rows)
    with pytest.raises(InputError, match=message) as caught:
        tables = star.particle_tables(path)
        star.images_from_star(tables)
        tables.numbers("rlnDefocusU")
    assert "bad.star" in str(caught.value)


def test_names_that_are_easily_misread(tmp_path: Path) -> None:
    """Quotes around blanks, '#' and apostrophes inside names, rows that start like a block, unicode."""
    rows = [
        '"1@my stack.mrcs" 1 # comment',
        "'2@it#s.mrcs' 2",
        '"3@don\'t.mrcs" 3',
        "data_4@x.mrcs 4",
        "5@5'prime#1.mrcs 5",
        "6@µm\u00a0x.mrcs 6",
        "'' 7",
    ]
    path = write(tmp_path / "a.star", ONE + "\n".join(rows))
    frame = star.read_star(path)["particles"]
    names = [
        "1@my stack.mrcs", "2@it#s.mrcs", "3@don't.mrcs", "data_4@x.mrcs", "5@5'prime#1.mrcs", "6@µm\u00a0x.mrcs", "",
    ]  # fmt: skip
    assert frame["rlnImageName"].tolist() == names
    star.write_star(tmp_path / "b.star", {"particles": frame})
    assert star.read_star(tmp_path / "b.star")["particles"]["rlnImageName"].tolist() == names


def test_identical_double_column_is_kept_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.star", ONE + "_rlnDefocusU #3\n1@a 5 5\n2@a 6 6\n")
    with pytest.warns(UserNotice, match="comes twice with the same values"):
        assert list(star.read_star(path)["particles"].columns) == ["rlnImageName", "rlnDefocusU"]


def test_tables_written_are_read_by_others(tmp_path: Path, golden: Path) -> None:
    """What we write, the starfile package reads to the same values; numbers keep all their digits."""
    import starfile

    tables = star.particle_tables(golden / "relion" / "particles.star")
    star.write_star(tmp_path / "copy.star", tables.blocks())
    theirs = starfile.read(tmp_path / "copy.star")
    for name, frame in (("particles", tables.particles), ("optics", tables.optics)):
        pd.testing.assert_frame_equal(theirs[name], frame, check_dtype=False)
    assert "# version 30001" in (tmp_path / "copy.star").read_text()
    copy = star.particle_tables(tmp_path / "copy.star")
    pd.testing.assert_frame_equal(copy.particles, tables.particles)


def test_half_sets_and_versions(golden: Path) -> None:
    new = star.particle_tables(golden / "relion" / "particles.star")
    old = star.particle_tables(golden / "poses" / "FinalRefinement-OriginalParticles-PfCRT.star")
    assert (new.version, old.version, old.optics) == ("3.1", "3.0", None)
    assert set(star.half_from_star(new)) == {0, 1}
    phase = star.ctf_from_star(new, 64, 3.0)[0][:, 8]
    assert (phase[new.group == 0] == 0).all() and (phase[new.group == 1] != 0).all()


def test_image_names(tmp_path: Path) -> None:
    def parsed(name: str) -> tuple[int, str]:
        star.write_star(tmp_path / "a.star", {"particles": pd.DataFrame({"rlnImageName": [name]})})
        stacks, _, index = star.images_from_star(star.particle_tables(tmp_path / "a.star"))
        return int(index[0]), stacks[0]

    assert parsed("000001@a/b.mrcs") == (0, "a/b.mrcs")
    assert parsed("12@dir@2/b.mrcs") == (11, "dir@2/b.mrcs")
    assert parsed("single.mrc") == (0, "single.mrc")
    for name in ("0@a", "-1@a", "x@a", "1@", "1.5@a"):
        with pytest.raises(InputError, match="NUMBER@STACK"):
            parsed(name)


def test_stack_lists(tmp_path: Path) -> None:
    path = write(tmp_path / "list.txt", "# stacks\r\na.mrcs\r\n\r\n  dir/b c.mrcs  \r\n")
    assert star.read_stack_list(path) == ["a.mrcs", "dir/b c.mrcs"]
    with pytest.raises(InputError, match="empty"):
        star.read_stack_list(write(tmp_path / "none.txt", "\n# only a comment\n"))


def test_write_refuses_what_cannot_be_read_back(tmp_path: Path) -> None:
    for text in ("two\nlines", "a\ttab", """both " and ' here"""):
        with pytest.raises(InputError, match="cannot be written"):
            star.write_star(tmp_path / "a.star", {"x": pd.DataFrame({"rlnName": [text]})})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_million_rows_in_a_minute(tmp_path: Path) -> None:
    import time

    row = " ".join(f"{x:.6f}" for x in np.random.default_rng(0).normal(size=20))
    with open(tmp_path / "big.star", "w") as stream:
        stream.write("data_particles\nloop_\n_rlnImageName\n" + "".join(f"_c{i}\n" for i in range(20)))
        stream.writelines(f"{i + 1:06d}@stack{i % 97}.mrcs {row}\n" for i in range(1_000_000))
    began = time.monotonic()
    tables = star.particle_tables(tmp_path / "big.star")
    assert len(star.images_from_star(tables)[1]) == 1_000_000
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("line", [b'"a ' * 100_000, b"x" * (40 << 20)], ids=["open quotes", "one long line"])
def test_hostile_lines_end_at_once(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "a.star").write_bytes(b"data_particles\nloop_\n_rlnImageName\n" + line)
    began = time.process_time()
    with pytest.raises(InputError, match=r"a\.star"):
        star.read_star(tmp_path / "a.star")
    assert time.process_time() - began < 5
