"""cryoDRGN's pickles: what it wrote is read, what could run code is refused by name, what we write it can read."""

from __future__ import annotations

import collections
import io
import pickle
from pathlib import Path

import numpy as np
import pytest

from cryosuite.errors import InputError, UserNotice
from cryosuite.formats.pickles import (
    read_ctf,
    read_indices,
    read_labels,
    read_latent,
    read_poses,
    read_torch,
    safe_load,
    write_pickle,
)


def dump(path: Path, *values: object, protocol: int = 4) -> Path:
    path.write_bytes(b"".join(pickle.dumps(value, protocol=protocol) for value in values))
    return path


ARRAYS = [
    np.arange(12, dtype=np.int64).reshape(3, 4),
    np.asfortranarray(np.random.default_rng(0).normal(size=(3, 4, 5))),
    np.arange(5, dtype=">f4"),
    np.array(["a", "µ", ""]),
    np.array([b"ab", b"c"]),
    np.zeros((0, 3), np.float32),
    np.array(3.5),
    np.arange(20, dtype=np.uint8)[::3],
    np.array([True, False]),
    np.array([1 + 2j], np.complex64),
]


@pytest.mark.parametrize("protocol", range(6))
def test_numpy_data_is_read_from_every_protocol(protocol: int, tmp_path: Path) -> None:
    """numpy writes arrays in three ways, depending on the protocol; containers and scalars around them."""
    values = [*ARRAYS, np.float32(1.5), np.int64(-3), {"a": (1, [2.5, None, "text", b"raw"])}, True, 2**70]
    loaded = safe_load(dump(tmp_path / "a.pkl", values, protocol=protocol))[0]
    for ours, wanted in zip(loaded, values, strict=True):
        if isinstance(wanted, np.ndarray):
            np.testing.assert_array_equal(ours, wanted)
            assert ours.shape == wanted.shape and ours.dtype == wanted.dtype
        else:
            assert ours == wanted
    ordered = collections.OrderedDict(a=1)
    assert safe_load(dump(tmp_path / "b.pkl", ordered, protocol=protocol)) == [{"a": 1}]


class Runs:
    """Runs a function when it is unpickled."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", [eval, getattr, np.load, np.frombuffer, np.random.default_rng, io.BytesIO, set])
def test_any_other_global_is_refused_by_name(function: object, protocol: int, tmp_path: Path) -> None:
    """Also functions of numpy itself, inside containers and object arrays, and in a second pickle."""
    runs = Runs(function, "1")
    array = np.empty(1, object)
    array[0] = runs
    for i, values in enumerate(([runs], [(np.zeros(3), [runs])], [array], [np.zeros(3), runs])):
        path = dump(tmp_path / f"{i}.pkl", *values, protocol=protocol)
        with pytest.raises(InputError, match=rf"{i}\.pkl: refused: the pickle asks for [\w.]*{function.__name__}"):
            safe_load(path)


def test_object_arrays_and_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="array of Python objects"):
        safe_load(dump(tmp_path / "a.pkl", np.array([1, "a", None], object)))
    with pytest.raises(InputError, match="named fields|not a plain number type"):
        safe_load(dump(tmp_path / "b.pkl", np.zeros(2, [("x", "f4")])))
    with pytest.raises(InputError, match="refused: the pickle asks for .*Runs"):
        path = tmp_path / "c.pkl"
        path.write_bytes(pickle.dumps(Runs))
        safe_load(path)


def test_lying_pickles_cost_no_memory(tmp_path: Path) -> None:
    """An index or a length of many gigabytes in a file of some bytes is damage, not a reason to allocate."""
    attacks = {
        "memo": b"\x80\x04Nr\xff\xff\xff\x7f.",
        "bytearray": b"\x80\x05\x96\x00\x00\x00\x00\x10\x00\x00\x00abc.",
        "bytes": b"\x80\x04\x8e\x00\x00\x00\x00\x10\x00\x00\x00abc.",
        "frame": b"\x80\x04\x95\x00\x00\x00\x00\x10\x00\x00\x00N.",
        "shape": pickle.dumps(np.zeros(4)).replace(b"K\x04\x85", b"\x8a\x06\x00\x00\x00\x00\x00\x10\x85"),
    }
    for name, data in attacks.items():
        (tmp_path / f"{name}.pkl").write_bytes(data)
        with pytest.raises(InputError, match=f"{name}.pkl: (truncated|damaged|not a pickle)"):
            safe_load(tmp_path / f"{name}.pkl")


def test_endless_containers_are_damage(tmp_path: Path) -> None:
    endless: list = []
    endless.append(endless)
    with pytest.raises(InputError, match="damaged"):
        safe_load(dump(tmp_path / "b.pkl", endless))


def test_peer_files_are_read(shared: Path) -> None:
    """Poses, CTF and latents as cryoDRGN and its tests wrote them."""
    for path in sorted((shared / "data" / "stacks" / "cryodrgn").glob("*.pkl")):
        read = read_ctf if "ctf" in path.name else read_poses
        assert len(read(path)) > 0
    run = shared / "golden" / "cryodrgn_run"
    mu, logvar = read_latent(run / "z.2.pkl")
    assert mu.shape == logvar.shape == (200, 4) and not np.array_equal(mu, logvar)
    assert {"epoch", "model_state_dict"} <= set(read_torch(run / "weights.2.pkl"))
    assert read_indices(shared / "golden" / "cryodrgn" / "ind_first50.pkl", 200).tolist() == list(range(50))


def test_what_we_write_plain_pickle_reads(tmp_path: Path) -> None:
    rotation, shift = np.tile(np.eye(3, dtype=np.float32), (4, 1, 1)), np.zeros((4, 2), np.float32)
    write_pickle(tmp_path / "poses.pkl", (rotation, shift))
    theirs = pickle.loads((tmp_path / "poses.pkl").read_bytes())
    np.testing.assert_array_equal(theirs[0], rotation)
    assert read_poses(tmp_path / "poses.pkl", 4)[1].dtype == np.float32
    write_pickle(tmp_path / "z.pkl", shift, shift + 1)
    assert [z[0, 0] for z in read_latent(tmp_path / "z.pkl")] == [0, 1]
    with pytest.raises(TypeError):
        write_pickle(tmp_path / "bad.pkl", {"a": [Runs]})
    assert not (tmp_path / "bad.pkl").exists()


def test_indices(tmp_path: Path) -> None:
    assert read_indices(dump(tmp_path / "a.pkl", [3, 1, 2]), 4).tolist() == [3, 1, 2]
    assert read_indices(dump(tmp_path / "a.pkl", np.array([], int)), 4).tolist() == []
    assert read_indices(dump(tmp_path / "a.pkl", np.array([2, 0], np.uint8)), 4).dtype == np.int64
    for value, message in (
        ([0.5, 1.0], "integers"),
        ([[1, 2]], "one dimension"),
        ({"a": 1}, "found dict"),
        (["a"], "numbers"),
        (np.array([2**63], np.uint64), "beyond any stack"),
        (np.array([True, False]), "bool mask of 2"),
    ):
        with pytest.raises(InputError, match=message):
            read_indices(dump(tmp_path / "a.pkl", value), 4)
    with pytest.raises(InputError, match="not known here"):
        read_indices(dump(tmp_path / "a.pkl", np.array([True, False])))


def test_poses_labels_latents_say_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    identity = np.tile(np.eye(3), (3, 1, 1))
    for value, message in (
        ((identity, np.zeros((3, 3))), r"shape \(3, 3\), expected \(N, 2\)"),
        (np.zeros((3, 4)), r"expected \(N, 3, 3\)"),
        ((identity, np.zeros((3, 2)), 1), "3 parts"),
        ("poses", "found str"),
        ((2 * identity, np.zeros((3, 2))), "rows 0, 1 and 2 .*not rotation matrices"),
        ((identity, np.full((3, 2), 1.5)), "fraction"),
    ):
        with pytest.raises(InputError, match=message):
            read_poses(dump(path, value))
    with pytest.raises(InputError, match="3 poses for 4 images"):
        read_poses(dump(path, (identity, np.zeros((3, 2)))), 4)
    assert read_labels(dump(path, np.array([0.0, 2.0]))).tolist() == [0, 2]
    for value, message in (([-1], "label -1"), ([0.5], "whole"), ([[1, 2], [3, 4]], "one dimension")):
        with pytest.raises(InputError, match=message):
            read_labels(dump(path, value))
    for values, message in (
        ([np.zeros((3, 2)), np.zeros((3, 3))], "mu has shape"),
        ([np.zeros(3)] * 3, "3 pickles"),
        ([np.array([[0.0], [np.nan]])], "NaN or infinite in row 1"),
    ):
        with pytest.raises(InputError, match=message):
            read_latent(dump(path, *values))


def test_ctf_limits(tmp_path: Path) -> None:
    good = np.tile([64, 1.5, 15000, 14000, 30, 300, 2.7, 0.1, 0], (4, 1))
    assert read_ctf(dump(tmp_path / "a.pkl", good), 4).dtype == np.float32
    for column, value, message in ((0, 0, "box size"), (1, -1, "pixel size"), (7, 10, "amplitude"), (6, 1e7, "mm")):
        bad = good.copy()
        bad[1, column] = value
        with pytest.raises(InputError, match=rf"{message}.* row 1|row 1.*{message}"):
            read_ctf(dump(tmp_path / "a.pkl", bad))
    micrometres = good.copy()
    micrometres[:, 2:4] /= 1e4
    with pytest.warns(UserNotice, match="micrometres"):
        read_ctf(dump(tmp_path / "a.pkl", micrometres))
    overfocus = good.copy()
    overfocus[:, 2:4] *= -1
    assert len(read_ctf(dump(tmp_path / "a.pkl", overfocus))) == 4


def test_broken_checkpoints_are_one_sentence(tmp_path: Path, golden: Path) -> None:
    whole = (golden / "cryodrgn_run" / "weights.2.pkl").read_bytes()
    for name, data in (("half", whole[: len(whole) // 2]), ("text", b"hello"), ("zeros", bytes(5000))):
        (tmp_path / f"{name}.pkl").write_bytes(data)
        with pytest.raises(InputError, match=f"{name}.pkl: ") as caught:
            read_torch(tmp_path / f"{name}.pkl")
        assert "\n" not in str(caught.value)


def test_nothing_of_a_pickle_outlasts_its_reading(tmp_path: Path) -> None:
    """BUILD with a state sets attributes: of the stand-ins for numpy's functions it would change later reads."""
    from cryosuite.formats import unpickler

    before = unpickler._latin1.__defaults__
    hostile = b"\x80\x04c_codecs\nencode\n(N}(V__defaults__\n(Vutf-8\ntutb."
    (tmp_path / "a.pkl").write_bytes(hostile)
    with pytest.raises(InputError, match=r"a\.pkl: damaged pickle"):
        safe_load(tmp_path / "a.pkl")
    assert unpickler._latin1.__defaults__ == before


def test_lists_of_the_same_list_are_counted(tmp_path: Path) -> None:
    """60 levels of [x, x] hold 2^60 numbers; no reader may walk through them."""
    value: list = [0.0]
    for _ in range(40):
        value = [value, value]
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(value, protocol=4))
    with pytest.raises(InputError, match=r"bomb\.pkl: damaged pickle: its containers repeat"):
        read_indices(tmp_path / "bomb.pkl")
    row = [1, 2, 3]
    (tmp_path / "shared.pkl").write_bytes(pickle.dumps([row] * 1000, protocol=4))
    assert safe_load(tmp_path / "shared.pkl")[0] == [row] * 1000
