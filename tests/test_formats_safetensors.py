"""Safetensors files: what is written comes back, and no header is believed."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cryosuite.errors import InputError
from cryosuite.formats import safetensors as ours
from cryosuite.formats.safetensors import read_safetensors, read_safetensors_header, write_safetensors

RNG = np.random.default_rng(0)


def tensors() -> dict[str, np.ndarray]:
    return {
        "weights": RNG.standard_normal((3, 5)).astype(np.float32),
        "wide": RNG.standard_normal((2, 2, 2)),
        "half": RNG.standard_normal(7).astype(np.float16),
        "count": np.array(12, np.int64),
        "bytes": np.arange(5, dtype=np.uint8),
        "yes": np.array([True, False]),
        "none": np.zeros((0, 4), np.float32),
    }


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list, begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    wanted = tensors()
    write_safetensors(tmp_path / "a.safetensors", wanted, {"seed": "1", "text": "ä\n"})
    header = read_safetensors_header(tmp_path / "a.safetensors")
    assert header.metadata == {"seed": "1", "text": "ä\n"}
    found = read_safetensors(header)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert np.array_equal(found[name], array)
    assert list(read_safetensors(header, ["half", "wide"])) == ["half", "wide"]


def test_the_formats_own_library_agrees_both_ways(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    wanted = tensors()
    write_safetensors(tmp_path / "ours.safetensors", wanted, {"a": "b"})
    theirs = library.load_file(tmp_path / "ours.safetensors")
    assert all(np.array_equal(theirs[name], wanted[name]) for name in wanted)
    library.save_file(wanted, tmp_path / "theirs.safetensors", {"a": "b"})
    found = read_safetensors(tmp_path / "theirs.safetensors")
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_bfloat16_is_widened(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3.140625, 0.0], np.float32)
    short = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    (tmp_path / "b").write_bytes(raw({"x": entry([4], 0, 8, "BF16")}, short))
    found = read_safetensors(tmp_path / "b")["x"]
    assert found.dtype == np.float32 and np.array_equal(found, values)


def test_big_endian_arrays_are_written_right(tmp_path: Path) -> None:
    array = np.arange(4, dtype=">f4")
    write_safetensors(tmp_path / "e", {"x": array})
    assert np.array_equal(read_safetensors(tmp_path / "e")["x"], [0, 1, 2, 3])


def test_an_unknown_dtype_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="complex"):
        write_safetensors(tmp_path / "c", {"x": np.zeros(2, complex)})
    assert list(tmp_path.iterdir()) == []


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty"),
    "seven bytes": (lambda: b"1234567", "not a safetensors"),
    "length beyond the file": (lambda: raw({"x": entry([1], 0, 4)}, b"\0" * 4, 10**6), "claims 1000000"),
    "length of 2^63": (lambda: raw({"x": entry([1], 0, 4)}, b"\0" * 4, 2**63), "claims"),
    "length 0": (lambda: raw(b"", b"\0" * 40), "not a safetensors"),
    "length cuts the header": (lambda: raw({"x": entry([1], 0, 4)}, b"\0" * 4, 9), "broken"),
    "no JSON": (lambda: raw(b"{nothing at all}", b""), "broken"),
    "not an object": (lambda: raw([1, 2, 3]), "no JSON object"),
    "deep nesting": (lambda: raw(b'{"x":' + b"[" * 50000 + b"]" * 50000 + b"}"), "broken"),
    "huge number": (lambda: raw(b'{"x":' + b"9" * 10000 + b"}"), "broken|lacks"),
    "NaN in the header": (lambda: raw(b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"\0" * 4), "NaN"),
    "no UTF-8": (lambda: raw(b'{"\xff\xfe":1}'), "broken"),
    "name twice": (
        lambda: raw(b'{"x":%b,"x":%b}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2), b"\0" * 4),
        "twice",
    ),
    "entry is a number": (lambda: raw({"x": 3}), "lacks"),
    "entry lacks offsets": (lambda: raw({"x": {"dtype": "F32", "shape": [1]}}), "lacks"),
    "unknown dtype": (lambda: raw({"x": entry([1], 0, 4, "F8_E5M2")}, b"\0" * 4), "dtype F8_E5M2"),
    "dtype is a list": (lambda: raw({"x": entry([1], 0, 4, ["F32"])}, b"\0" * 4), "dtype"),
    "negative shape": (lambda: raw({"x": entry([-1, -1], 0, 4)}, b"\0" * 4), "shape"),
    "fractional shape": (lambda: raw({"x": entry([1.0], 0, 4)}, b"\0" * 4), "shape"),
    "boolean shape": (lambda: raw({"x": entry([True], 0, 4)}, b"\0" * 4), "shape"),
    "shape is text": (lambda: raw({"x": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}, b"\0" * 4), "shape"),
    "shape of 2^62 squared": (lambda: raw({"x": entry([2**62, 2**62], 0, 4)}, b"\0" * 4), "needs"),
    "shape that wraps 64 bits": (lambda: raw({"x": entry([2**32, 2**30, 4], 0, 0)}), "needs"),
    "65 dimensions": (lambda: raw({"x": entry([1] * 65, 0, 4)}, b"\0" * 4), "shape"),
    "offsets backwards": (lambda: raw({"x": entry([1], 4, 0)}, b"\0" * 4), "offsets"),
    "negative offsets": (lambda: raw({"x": entry([1], -4, 0)}, b"\0" * 4), "offsets"),
    "three offsets": (lambda: raw({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}), "offsets"),
    "beyond the end": (lambda: raw({"x": entry([2], 0, 8)}, b"\0" * 4), "truncated"),
    "overlap": (lambda: raw({"x": entry([2], 0, 8), "y": entry([2], 4, 12)}, b"\0" * 12), "overlaps"),
    "the same bytes twice": (lambda: raw({"x": entry([2], 0, 8), "y": entry([2], 0, 8)}, b"\0" * 8), "overlaps"),
    "a gap": (lambda: raw({"x": entry([1], 0, 4), "y": entry([1], 8, 12)}, b"\0" * 12), "gap"),
    "bytes behind": (lambda: raw({"x": entry([1], 0, 4)}, b"\0" * 9), "5 bytes behind"),
    "metadata of numbers": (lambda: raw({"__metadata__": {"a": 1}}), "text"),
    "metadata is a list": (lambda: raw({"__metadata__": ["a"]}), "text"),
    "a Git LFS pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 85937\n",
        "git lfs pull",
    ),
    "a PyTorch file": (lambda: b"PK\x03\x04" + b"\0" * 60, "PyTorch"),
    "a pickle": (lambda: b"\x80\x02}q\x00." + b"\0" * 60, "PyTorch"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused(name: str, tmp_path: Path) -> None:
    make, words = HOSTILE[name]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(make())
    with pytest.raises(InputError, match=words) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_a_huge_header_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "MAX_HEADER", 1000)
    path = tmp_path / "big"
    path.write_bytes(raw(b"{" + b" " * 2000 + b"}"))
    with pytest.raises(InputError):
        read_safetensors_header(path)


def test_changed_bytes_never_crash_the_reader(tmp_path: Path) -> None:
    """Whatever is flipped or cut, the file is read or refused; nothing else happens."""
    path = tmp_path / "fuzz"
    write_safetensors(path, tensors(), {"a": "b"})
    good, random_bytes = path.read_bytes(), random.Random(1)
    refused = 0
    for _ in range(400):
        data = bytearray(good)
        for _ in range(random_bytes.randint(1, 4)):
            data[random_bytes.randrange(min(len(data), 500))] = random_bytes.randrange(256)
        if random_bytes.random() < 0.3:
            del data[random_bytes.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            read_safetensors(path)
        except InputError:
            refused += 1
    assert refused > 200


def test_a_missing_name_and_a_missing_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a", {"x": np.zeros(1)})
    with pytest.raises(InputError, match="no tensor y"):
        read_safetensors(tmp_path / "a", ["y"])
    with pytest.raises(InputError, match="not found"):
        read_safetensors(tmp_path / "absent")
    with pytest.raises(InputError, match="folder"):
        read_safetensors(tmp_path)
