"""Headers of the npy form: those that numpy writes are read, those that would cost memory or stack are refused."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest

from cryosuite.formats.npy_header import read_npy_header, require_characters

WIDE = np.dtype([(f"field/{i} (x)", "<f4", (2, 3)) for i in range(3000)])  # a header that needs version 2
TABLES = [
    np.zeros(7, [("uid", "<u8"), ("blob/path", "S12"), ("ctf/shift_A", "<f4", (2,)), ("a'b\"c\\", ">i2")]),
    np.zeros((3, 0, 2), np.float32),
    np.asfortranarray(np.zeros((3, 4))),
    np.zeros(2, WIDE),
    np.zeros(2, [("µ", "?"), ("nested", [("x", "<c16"), ("y", [("z", "U3")])])]),
]


@pytest.mark.parametrize("array", TABLES, ids=["table", "empty", "fortran", "wide", "nested"])
def test_what_numpy_writes_is_read(array: np.ndarray) -> None:
    stream = io.BytesIO()
    with np.testing.suppress_warnings() as quiet:
        quiet.filter(UserWarning)
        np.lib.format.write_array(stream, array)
    size = stream.tell()
    stream.seek(0)
    shape, fortran, dtype = read_npy_header(stream, size, 1 << 20)
    assert shape == array.shape and fortran == (array.flags.f_contiguous and not array.flags.c_contiguous)
    assert size - stream.tell() == array.nbytes
    if all(name.isascii() for name in dtype.names or ()):
        assert dtype == array.dtype


def npy(text: bytes, version: bytes = b"\x01\x00", length: int | None = None) -> bytes:
    size = 2 if version == b"\x01\x00" else 4
    return b"\x93NUMPY" + version + (len(text) if length is None else length).to_bytes(size, "little") + text


BENT = {
    "version 1.38 with a length of 4 bytes": npy(b"{}", b"\x01\x26", 1 << 28),
    "version 0": npy(b"{}", b"\x00\x00", 1 << 28),
    "longer than the file": npy(b"{'descr': '<f4'}", b"\x02\x00", 1 << 28),
    "operators": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"-" * 9000 + b"1,)}"),
    "brackets": npy(b"(" * 150 + b")" * 150),
    "a call": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (int.mro(),)}"),
    "no end of a name": npy(b"{'descr': '<f4"),
    "cut short": b"\x93NUMPY\x01\x00",
}


@pytest.mark.parametrize("name", BENT)
def test_bent_headers_are_refused_before_they_cost_anything(name: str) -> None:
    tracemalloc.start()
    with pytest.raises(ValueError) as caught:
        read_npy_header(io.BytesIO(BENT[name]), len(BENT[name]), 1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000
    assert caught.value.__context__ is None or not isinstance(caught.value.__context__, MemoryError)


@pytest.mark.parametrize("order", ["<", ">"])
def test_text_of_numbers_that_are_no_characters_is_refused(order):
    good = np.array(["ab", "\U0010ffff"], f"{order}U2")
    require_characters(good)
    bad = np.array([0x110000, 0, 65, 66], f"{order}u4").view(f"{order}U2")
    for table in (bad, bad[::1].reshape(1, 2), np.array([(1, "x")], [("n", "i4"), ("t", f"{order}U2")])):
        if table.dtype.names:
            require_characters(table)
            table["t"] = bad[:1]
        with pytest.raises(ValueError, match="no character"):
            require_characters(table)
