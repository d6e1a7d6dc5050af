"""Every hostile or broken file: read as it should be, or refused in one sentence that names the file, nothing run."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

from cryosuite.errors import InputError, UserNotice
from cryosuite.formats import cs, star
from cryosuite.formats.config import read_yaml
from cryosuite.formats.mrc import StackReader, read_map
from cryosuite.formats.pickles import read_ctf, read_indices, read_latent, read_poses, read_torch

FOLDER = (
    Path(os.environ.get("CRYOSUITE_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "golden" / "adversarial"
)
EXPECTED = json.loads((FOLDER / "expected.json").read_text()) if (FOLDER / "expected.json").is_file() else []

# what only a look at the stack beside the table can tell: tested with the data room
NEEDS_STACK = {
    "index_out_of_range.star",
    "wrong_counts_stack_missing.star",
    "image_size_disagrees.star",
    "idx_out_of_range.cs",
    "particles_missing.txt",
    "mixed_shape.cs",
}


def read_anything(path: Path) -> list[str]:
    """Read a fixture with the reader its name asks for; the texts of the notices."""
    name = path.name
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if name.endswith(".mrcs"):
            reader = StackReader(path, check=True)
            broken = np.flatnonzero(~np.isfinite(reader.read()).all(axis=(1, 2)))
            if len(broken):  # refused by preprocess
                raise InputError(f"{name}: images {broken}")
        elif name.endswith(".mrc"):
            read_map(path)
        elif name.endswith(".star"):
            tables = star.particle_tables(path)
            star.images_from_star(tables)
            box, pixel = star.box_sizes_from_star(tables), star.pixel_sizes_from_star(tables)
            box = np.full(len(tables), 32) if box is None else box
            star.poses_from_star(tables, box, pixel)
            star.ctf_from_star(tables, box, pixel)
        elif name.endswith(".cs"):
            array = cs.read_cs(path)
            cs.images_from_cs(array, path)
            cs.sign_from_cs(array, path)
            cs.poses_from_cs(array, path)
            cs.ctf_from_cs(array, path)
        elif name.endswith(".yaml"):
            read_yaml(path)
        elif "weights" in name:
            read_torch(path)
        elif "poses" in name:
            read_poses(path, n=8)
        elif "ctf" in name:
            read_ctf(path, n=8)
        elif "ind" in name:
            read_indices(path, n_total=8)
        else:
            read_latent(path)
    return [str(w.message) for w in caught if issubclass(w.category, UserNotice)]


def mentioned(entry: dict) -> str:
    """A pattern for what the message has to contain."""
    special = {
        "the refused global": r"refused: the (pickle|checkpoint) asks for [\w.]+\.\w+",
        "image 3 (0-based)": r"\[3\]",
        "images 1 and 6 (0-based)": r"\[1 6\]",
    }
    return special.get(entry["mention"], re.escape(entry["mention"]))


@pytest.mark.parametrize("entry", EXPECTED, ids=lambda entry: entry["file"])
def test_each_file_is_read_or_refused(entry: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Golden adversarial/expected.json, all but what needs the stack."""
    if entry["file"] in NEEDS_STACK:
        pytest.skip("needs the stack: the data room's test")
    monkeypatch.chdir(tmp_path)
    path = FOLDER / entry["file"]
    if entry["must"].startswith("refuse"):
        if entry["file"] == "ind_bool.pkl":
            assert any("bool" in text for text in read_anything(path))  # read as a mask, said so
            return
        with pytest.raises(InputError, match=mentioned(entry) or None) as caught:
            read_anything(path)
        assert entry["file"] in str(caught.value)
        assert "\n" not in str(caught.value)
    else:
        texts = read_anything(path)
        if "warning" in entry["must"] and not entry["file"].startswith("constant"):
            assert any(re.search(mentioned(entry), text) for text in texts), texts
        elif "warning" not in entry["must"] and "tabs" not in entry["file"]:
            assert texts == []
    assert not list(tmp_path.iterdir())  # no PWNED_* and no output


def test_partial_reads_are_possible() -> None:
    """A set without defocus still gives poses, one without poses still gives CTF."""
    if not EXPECTED:
        pytest.skip("no shared fixtures")
    tables = star.particle_tables(FOLDER / "missing_defocus.star")
    euler, shift = star.poses_from_star(tables, 32, 2.5)
    assert euler.shape == (8, 3) and shift.shape == (8, 2)
    tables = star.particle_tables(FOLDER / "missing_angles.star")
    assert star.ctf_from_star(tables, 32, 2.5)[0].shape == (8, 9)
    for name, reader in (("missing_pose.cs", cs.ctf_from_cs), ("missing_ctf.cs", cs.poses_from_cs)):
        assert len(reader(cs.read_cs(FOLDER / name), name)[0]) == 8


def test_variants_hold_what_the_plain_files_hold() -> None:
    """CRLF, BOM, quotes, block order, tabs, byte order, extended header: the content is that of the plain file."""
    if not EXPECTED:
        pytest.skip("no shared fixtures")
    good = star.particle_tables(FOLDER / "good.star")
    for name in ("crlf", "bom", "no_trailing_newline", "multiple_blocks", "optics_keyvalue", "quoted_names"):
        other = star.particle_tables(FOLDER / f"{name}.star")
        for column in ("rlnDefocusU", "rlnAngleRot", "rlnOriginYAngst", "rlnVoltage", "rlnImagePixelSize"):
            np.testing.assert_array_equal(good.numbers(column), other.numbers(column))
        assert star.images_from_star(other)[2].tolist() == list(range(8))
    assert star.images_from_star(star.particle_tables(FOLDER / "quoted_names.star"))[0] == ["my stack.mrcs"]
    images = StackReader(FOLDER / "good.mrcs").read()
    for name in ("extended_header", "big_endian", "trailing_bytes"):
        np.testing.assert_array_equal(StackReader(FOLDER / f"{name}.mrcs", warn=False).read(), images)
    np.testing.assert_array_equal(StackReader(FOLDER / "mode1_int16.mrcs").read(), np.round(images * 1000))
    np.testing.assert_array_equal(StackReader(FOLDER / "mode0_int8.mrcs").read(), np.round(images * 20))
    np.testing.assert_allclose(StackReader(FOLDER / "mode12_float16.mrcs").read(), images, rtol=1e-3, atol=1e-3)
    rotation, shift = read_poses(FOLDER / "good_poses.pkl")
    np.testing.assert_array_equal(read_poses(FOLDER / "good_poses_fortran.pkl")[0], rotation)
    np.testing.assert_allclose(read_poses(FOLDER / "good_poses_numpy1_proto2.pkl")[1], shift, atol=1e-7)
    assert not read_poses(FOLDER / "good_poses_rots_only.pkl")[1].any()


def test_blocks_survive_a_filter_round_trip(tmp_path: Path) -> None:
    """Unknown blocks and the order of all blocks are kept when a selection is written."""
    if not EXPECTED:
        pytest.skip("no shared fixtures")
    tables = star.particle_tables(FOLDER / "multiple_blocks.star")
    star.write_star(tmp_path / "some.star", tables.blocks(tables.particles.iloc[[1, 5]]))
    back = star.read_star(tmp_path / "some.star")
    assert list(back) == ["general", "extra", "particles", "optics"]
    assert len(back["extra"]) == 24 and back["general"]["rlnCustomKey"].tolist() == ["value1"]
    assert back["particles"]["rlnImageName"].tolist() == ["000002@good.mrcs", "000006@good.mrcs"]
