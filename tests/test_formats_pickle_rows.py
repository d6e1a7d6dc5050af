"""Tables of numbers that are written and read in pieces, in the pickle that everybody reads whole."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from cryosuite.errors import FileError
from cryosuite.formats.pickle_rows import PickledRows, RowsPart, RowsWriter
from cryosuite.formats.pickles import read_latent, write_pickle

VALUES = np.random.default_rng(0).standard_normal((101, 7)).astype(np.float32)


def test_rows_in_any_order_are_the_bytes_of_the_whole(tmp_path: Path) -> None:
    write_pickle(tmp_path / "whole.pkl", VALUES)
    with RowsWriter(tmp_path / "rows.pkl", VALUES.shape) as writer:
        for begin in (60, 0, 30, 90):
            writer.write(begin, VALUES[begin : begin + 30])
        assert not (tmp_path / "rows.pkl").exists()
    assert (tmp_path / "rows.pkl").read_bytes() == (tmp_path / "whole.pkl").read_bytes()
    assert np.array_equal(pickle.loads((tmp_path / "rows.pkl").read_bytes()), VALUES)
    assert np.array_equal(read_latent(tmp_path / "rows.pkl")[0], VALUES)


def test_several_fill_one_table(tmp_path: Path) -> None:
    path = tmp_path / "z.pkl"
    with RowsWriter(path, VALUES.shape) as writer:
        for rows in (np.arange(40, 101), np.arange(40)):
            with RowsPart(path, writer.temporary, VALUES.shape) as part:
                for row in rows:
                    part.write(int(row), VALUES[row : row + 1])
    assert np.array_equal(read_latent(path)[0], VALUES)
    assert [entry.name for entry in tmp_path.iterdir()] == ["z.pkl"]


def test_a_failure_leaves_the_file_of_before(tmp_path: Path) -> None:
    path = tmp_path / "z.pkl"
    path.write_bytes(b"before")
    with pytest.raises(KeyError), RowsWriter(path, VALUES.shape) as writer:
        writer.write(0, VALUES[:5])
        raise KeyError("a bug")
    assert path.read_bytes() == b"before" and [entry.name for entry in tmp_path.iterdir()] == ["z.pkl"]
    with pytest.raises(FileError, match=r"z.pkl: cannot write"):
        RowsPart(path, tmp_path / "gone", VALUES.shape).__enter__()


def test_rows_beyond_the_table_are_refused(tmp_path: Path) -> None:
    for first, rows in ((97, VALUES[:5]), (-1, VALUES[:1]), (0, VALUES[:5, :3]), (0, VALUES[0])):
        with pytest.raises(ValueError, match="do not fit"), RowsWriter(tmp_path / "z.pkl", VALUES.shape) as writer:
            writer.write(first, rows)


def test_pieces_and_chosen_rows(tmp_path: Path) -> None:
    write_pickle(tmp_path / "z.pkl", VALUES)
    table = PickledRows(tmp_path / "z.pkl", VALUES.shape)
    pieces = list(table.pieces(40))
    assert [len(piece) for piece in pieces] == [40, 40, 21] and np.array_equal(np.concatenate(pieces), VALUES)
    rows = np.array([100, 0, 3, 3])
    assert len(table) == 101 and np.array_equal(table.take(rows), VALUES[rows])
    with open(tmp_path / "z.pkl", "r+b") as file:
        file.truncate(500)
    with pytest.raises(FileError, match=r"z.pkl: became shorter"):
        list(table.pieces(40))
