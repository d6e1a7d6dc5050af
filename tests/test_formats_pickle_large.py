"""Large arrays in pickles: read once, into their own memory; what is cut out on the way opens no door."""

from __future__ import annotations

import io
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cryosuite.errors import InputError
from cryosuite.formats.pickles import safe_load, write_pickle
from cryosuite.formats.unpickler import _LONG, load_bytes

RNG = np.random.default_rng(0)
LONG = RNG.standard_normal((50_000, 4))  # 1.6 MB
ARRAYS = [LONG, np.asfortranarray(LONG), LONG.astype(">f4"), RNG.integers(0, 2, 100_000) > 0, LONG.astype("U8")]


def peak_of(work: Callable[[], object]) -> int:
    tracemalloc.start()
    kept = work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del kept
    return peak


@pytest.mark.parametrize("protocol", range(6))
def test_long_arrays_are_those_of_pickle(protocol: int, tmp_path: Path) -> None:
    value = {"a": ARRAYS, "again": (ARRAYS[0], b"x" * 100_000, "µ" * 100_000), b"k" * _LONG: 3, "short": [LONG[:2]]}
    data = pickle.dumps(value, protocol=protocol) + pickle.dumps(LONG + 1, protocol=protocol)
    (tmp_path / "a.pkl").write_bytes(data)
    for first, second in (safe_load(tmp_path / "a.pkl"), load_bytes(Path("a.pkl"), data)):
        assert first.keys() == value.keys() and first["again"][1:] == value["again"][1:]
        for found, wanted in zip([*first["a"], *first["short"]], [*ARRAYS, LONG[:2]], strict=True):
            assert found.dtype == wanted.dtype and np.array_equal(found, wanted) and found.flags.writeable
            assert found.flags.f_contiguous == wanted.flags.f_contiguous
        assert first["again"][0] is first["a"][0], "one array stays one array"
        assert np.array_equal(second, LONG + 1)


@pytest.mark.parametrize("protocol, times", [(3, 1.02), (4, 1.02), (5, 2.02)])
def test_memory_is_that_of_the_array(protocol: int, times: float, tmp_path: Path) -> None:
    latents = RNG.standard_normal((1 << 20, 4)).astype(np.float32)
    with open(tmp_path / "z.1.pkl", "wb") as file:
        pickle.dump(latents, file, protocol)
    assert peak_of(lambda: safe_load(tmp_path / "z.1.pkl")) < times * latents.nbytes
    pair = (latents, latents + 1)
    write_pickle(tmp_path / "pair.pkl", pair)
    assert peak_of(lambda: safe_load(tmp_path / "pair.pkl")) < 1.02 * sum(one.nbytes for one in pair)


def long_bytes(count: int = _LONG) -> bytes:
    return pickle.BINBYTES8 + count.to_bytes(8, "little") + b"x" * count


HOSTILE = {
    "says more than there is": b"\x80\x04" + pickle.BINBYTES8 + (1 << 60).to_bytes(8, "little") + b"x" * 99 + b".",
    "its own persistent id": b"\x80\x04" + long_bytes() + b"0J\x00\x00\x00\x00Q.",
    "state of the bytes": b"\x80\x04" + long_bytes() + b"}(V_size\nI1000000000000\nub.",
    "slots of the bytes": b"\x80\x04" + long_bytes() + b"N}(V_size\nI1000000000000\nu\x86b.",
    "bytes that are called": b"\x80\x04" + long_bytes() + b")R.",
    "a global behind them": b"\x80\x04" + long_bytes() + b"0cos\nsystem\n.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_comes_in_through_the_cut(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(HOSTILE[name])

    def refused() -> None:
        with pytest.raises(InputError, match=r"a\.pkl: (truncated|refused|damaged pickle)"):
            safe_load(tmp_path / "a.pkl")

    assert peak_of(refused) < 2_000_000


@pytest.mark.parametrize("size", [1000, _LONG])
def test_arrays_of_the_same_bytes_are_counted(size: int, tmp_path: Path) -> None:
    """30 bytes for one more array of bytes that stand in the file once: a small file would fill the memory."""

    class Same:
        def __init__(self, data: bytes) -> None:
            self.data = data

        def __reduce__(self) -> tuple:
            return np.ndarray, (0,), (1, (len(self.data),), np.dtype("u1"), False, self.data)

    stream, data = io.BytesIO(), b"x" * size
    pickle.dump([Same(data) for _ in range(1000)], stream, 4)
    (tmp_path / "a.pkl").write_bytes(stream.getvalue())

    def refused() -> None:
        with pytest.raises(InputError, match="repeat the same bytes"):
            safe_load(tmp_path / "a.pkl")

    assert peak_of(refused) < 10 * len(stream.getvalue()) + 2_000_000
