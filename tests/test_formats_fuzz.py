"""Random tables, flipped bytes, cut files: a correct read or one sentence, never a traceback, a hang or big memory."""

from __future__ import annotations

import os
import pickle
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import mrcfile
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cryosuite.errors import InputError
from cryosuite.formats import cs, star
from cryosuite.formats.atoms import read_atoms
from cryosuite.formats.config import read_yaml
from cryosuite.formats.mrc import StackReader, StackWriter, read_map, write_map
from cryosuite.formats.pickles import read_ctf, read_indices, read_poses, safe_load

EXAMPLES = int(os.environ.get("CRYOSUITE_FUZZ_EXAMPLES", "0"))  # more, and other ones each time, when asked for
quiet = settings(
    max_examples=EXAMPLES or 60,
    deadline=5000,
    derandomize=not EXAMPLES,
    suppress_health_check=list(HealthCheck),
    database=None,
)
FLOOR = 2_000_000  # bytes that a reader may use whatever the size of the file (tables of strings, buffers)


def star_text() -> bytes:
    head = "\n# version 30001\n\ndata_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnVoltage #2\n_rlnImagePixelSize #3\n"
    rows = "".join(f"{i + 1:06d}@st.mrcs {1 + i % 2} {9000 + i}.5 {i}.25 -3.5 12 0.5\n" for i in range(12))
    names = ("ImageName", "OpticsGroup", "DefocusU", "AngleRot", "AngleTilt", "AnglePsi", "OriginXAngst")
    columns = "".join(f"_rln{name} #{i}\n" for i, name in enumerate(names, 1))
    return f"{head}1 300 1.5\n2 200 1.6\n\n\ndata_particles\n\nloop_\n{columns}{rows}\n".encode()


def cs_bytes() -> bytes:
    array = np.zeros(9, [("uid", "<u8"), ("blob/path", "S12"), ("blob/idx", "<u4"), ("alignments3D/pose", "<f4", (3,))])
    array["uid"], array["blob/path"] = np.arange(9), b"a/b.mrcs"
    with TemporaryDirectory() as folder:
        cs.write_cs(Path(folder) / "a.cs", array)
        return (Path(folder) / "a.cs").read_bytes()


def mrc_bytes(stack: bool) -> bytes:
    data = np.random.default_rng(0).normal(size=(5, 8, 8)).astype(np.float32)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.mrcs"
        if stack:
            with StackWriter(path, 5, 8, 1.5) as writer:
                writer.write(data)
        else:
            write_map(path, data, 1.5)
        return path.read_bytes()


def read_tables(path: Path) -> None:
    tables = star.particle_tables(path)
    star.images_from_star(tables)
    for call in (star.pixel_sizes_from_star, star.box_sizes_from_star, star.half_from_star):
        call(tables)
    star.poses_from_star(tables, 64, 1.5)
    star.ctf_from_star(tables, 64, 1.5, 300, 2.7, 0.1)


def read_cs_columns(path: Path) -> None:
    array = cs.read_cs(path)
    cs.images_from_cs(array, path)
    cs.poses_from_cs(array, path, 64, 1.5)


POSES = pickle.dumps((np.tile(np.eye(3, dtype=np.float32), (6, 1, 1)), np.zeros((6, 2), np.float32)))
OLD_POSES = pickle.dumps((np.tile(np.eye(3), (6, 1, 1)), np.zeros((6, 2))), protocol=2)
SUBJECTS: dict[str, tuple[bytes, Callable[[Path], object]]] = {
    "a.star": (star_text(), read_tables),
    "a.cs": (cs_bytes(), read_cs_columns),
    "a.mrcs": (mrc_bytes(True), lambda path: StackReader(path).read()),
    "a.mrc": (mrc_bytes(False), read_map),
    "poses.pkl": (POSES, read_poses),
    "old.pkl": (OLD_POSES, read_poses),
    "ctf.pkl": (pickle.dumps(np.ones((4, 9))), read_ctf),
    "ind.pkl": (pickle.dumps([1, 2, 3, 700]), read_indices),
    "a.yaml": (b"a: 1\nb: [1, 2, {c: d}]\nlattice_args:\n  D: 65\n", read_yaml),
    "a.pdb": (b"ATOM      1  N   ALA A   5      11.104   6.134  -6.504  1.00  0.00           N\nEND\n", read_atoms),
}


def attempt(name: str, data: bytes, read: Callable[[Path], object]) -> object | None:
    """Read the bytes; None when refused. Anything but InputError fails the test, and so does much memory."""
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / name
        path.write_bytes(data)
        tracemalloc.start()
        try:
            result = read(path)
        except InputError as error:
            assert name in str(error) and "\n" not in str(error)
            result = None
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 4 * len(data) + FLOOR, f"{peak} bytes for a file of {len(data)}"
        assert os.listdir(folder) == [name]
        return result


@pytest.mark.parametrize("name", SUBJECTS)
def test_flipped_bytes_are_no_traceback(name: str) -> None:
    whole, read = SUBJECTS[name]
    attempt(name, whole, read)  # imports are not the file's memory

    @quiet
    @given(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=6))
    def flip(changes: list[tuple[int, int]]) -> None:
        data = bytearray(whole)
        for place, value in changes:
            data[place] = value
        attempt(name, bytes(data), read)

    flip()


@pytest.mark.parametrize("name", SUBJECTS)
def test_cut_and_lengthened_files_are_no_traceback(name: str) -> None:
    whole, read = SUBJECTS[name]

    @quiet
    @given(st.integers(0, len(whole)), st.binary(max_size=40))
    def cut(size: int, tail: bytes) -> None:
        attempt(name, whole[:size], read)
        attempt(name, whole[:size] + tail, read)

    cut()


@pytest.mark.parametrize("name", ["a.mrcs", "a.mrc", "a.cs"])
def test_headers_with_random_numbers(name: str) -> None:
    """The first fields decide about sizes: every 32-bit value is met with a comparison, not with memory."""
    whole, read = SUBJECTS[name]

    @quiet
    @given(st.integers(0, 60), st.integers(-(2**31), 2**31 - 1), st.sampled_from(["<i4", ">i4"]))
    def change(word: int, value: int, order: str) -> None:
        data = bytearray(whole)
        data[4 * word : 4 * word + 4] = np.array(value, order).tobytes()
        attempt(name, bytes(data), read)

    change()


def test_an_accepted_stack_holds_the_right_numbers() -> None:
    """Where a header with flipped bytes is still accepted, the images are those that mrcfile finds."""
    whole, _ = SUBJECTS["a.mrcs"]

    @quiet
    @given(st.integers(0, 1023), st.integers(0, 255))
    def change(place: int, value: int) -> None:
        data = bytearray(whole)
        data[place] = value
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(folder) / "a.mrcs"
            path.write_bytes(data)
            try:
                ours = StackReader(path).read()
            except InputError:
                return
            with mrcfile.open(path, permissive=True) as mrc:
                if mrc.data is not None:
                    np.testing.assert_array_equal(ours.reshape(-1), np.asarray(mrc.data, np.float32).reshape(-1))

    change()


NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_categories=["Cc", "Zs"]), max_size=12)
WORDS = NAMES | st.sampled_from(["two words", "it's", "#x", "data_x", "loop_", "_x", ";y", "", "nan", "'q'", 'a"b'])
COLUMNS = st.text(st.sampled_from("abcXYZ019.-"), min_size=1, max_size=8)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, pd.DataFrame]:
    """Blocks of random columns: integers, floats and text."""
    blocks = {}
    for name in draw(st.lists(st.text(st.sampled_from("abc_01"), max_size=6), min_size=1, max_size=3, unique=True)):
        n = draw(st.integers(1, 5))
        frame = {}
        for column in draw(st.lists(COLUMNS, min_size=1, max_size=4, unique=True)):
            kind = draw(st.sampled_from(["int", "float", "text"]))
            if kind == "int":
                frame[column] = draw(st.lists(st.integers(-(2**62), 2**62), min_size=n, max_size=n))
            elif kind == "float":
                frame[column] = draw(st.lists(st.floats(-1e12, 1e12), min_size=n, max_size=n))
            else:
                frame[column + "Name"] = draw(st.lists(WORDS, min_size=n, max_size=n))
        blocks[name] = pd.DataFrame(frame)
    return blocks


@quiet
@given(tables())
def test_random_tables_come_back_as_they_were(blocks: dict[str, pd.DataFrame]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.star"
        star.write_star(path, blocks)
        back = star.read_star(path)
    assert list(back) == list(blocks)
    for name, frame in blocks.items():
        assert list(back[name].columns) == list(frame.columns)
        for column in frame.columns:
            ours, wanted = back[name][column].tolist(), frame[column].tolist()
            assert ours == pytest.approx(wanted, rel=1e-14) if not column.endswith("Name") else ours == wanted


@quiet
@given(st.text(max_size=200), st.sampled_from(["", "data_\n", "data_\nloop_\n_a\n", "data_\nloop_\n_a\n_b\n1 2\n"]))
def test_any_text_is_read_or_refused(text: str, start: str) -> None:
    attempt("a.star", (start + text).encode("utf-8", "surrogatepass"), star.read_star)


@quiet
@given(st.binary(max_size=200), st.sampled_from([b"", b"\x80\x04", b"\x80\x02", b"(", b"cnumpy\ndtype\n"]))
def test_any_bytes_are_no_pickle(data: bytes, start: bytes) -> None:
    attempt("a.pkl", start + data, safe_load)
