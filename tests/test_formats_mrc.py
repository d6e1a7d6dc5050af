"""Maps and stacks: agreement with mrcfile, axis order, placement, streaming, no file handles hoarded."""

from __future__ import annotations

import os
import threading
import tracemalloc
import warnings
from pathlib import Path

import mrcfile
import numpy as np
import pytest

from cryosuite.errors import InputError
from cryosuite.formats import stacks
from cryosuite.formats.mrc import Map, StackReader, StackWriter, read_header, read_map, write_map


def images(count: int = 7, box: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, box, box)).astype(np.float32)


def write_stack(path: Path, data: np.ndarray, pixel_size: float | None = 1.5) -> Path:
    with StackWriter(path, len(data), data.shape[-1], pixel_size) as writer:
        writer.write(data[:2])
        writer.write(data[2:])
    return path


def test_stack_round_trip_is_valid_mrc(tmp_path: Path) -> None:
    data = images()
    path = write_stack(tmp_path / "stack.mrcs", data)
    assert mrcfile.validate(path)
    header = read_header(path)
    assert (header.nx, header.nz, header.is_stack, header.mode) == (16, 7, True, 2)
    assert header.pixel_size == pytest.approx(1.5)
    with mrcfile.open(path) as mrc:
        np.testing.assert_array_equal(mrc.data, data)
        assert mrc.header.rms == pytest.approx(data.std(), rel=1e-6)
        assert mrc.header.dmean == pytest.approx(data.mean(), abs=1e-7)
        assert mrc.header.dmin == data.min() and mrc.header.dmax == data.max()


@pytest.mark.parametrize("name", ["map.mrc", "map.mrc.gz"])
def test_a_float32_map_is_held_once_while_it_is_read(tmp_path: Path, name: str) -> None:
    data = images(96, 96)
    write_map(tmp_path / name, data, 1.5)
    tracemalloc.start()
    found = read_map(tmp_path / name).data
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found, data)
    assert found.dtype == np.float32 and found.flags.c_contiguous and found.flags.writeable
    assert peak < 1.5 * data.nbytes


def test_reader_gives_rows_in_the_order_asked(tmp_path: Path) -> None:
    data = images()
    reader = StackReader(write_stack(tmp_path / "stack.mrcs", data), check=True)
    for rows in ([0, 1, 2], [6, 0, 3, 3, 2], [], [5]):
        np.testing.assert_array_equal(reader.read(rows), data[np.array(rows, int)])
    np.testing.assert_array_equal(reader.read(), data)
    np.testing.assert_array_equal(reader.read(slice(1, 6, 2)), data[1:6:2])
    with pytest.raises(InputError, match=r"image 7 \(0-based\).*has 7"):
        reader.read([7])
    with pytest.raises(InputError, match="-1"):
        reader.read([-1])


def test_many_stacks_hold_few_descriptors(tmp_path: Path) -> None:
    """A data set of thousands of stacks must not run out of file handles; threads share the pool safely."""
    data = images(2, 4)
    readers = [StackReader(write_stack(tmp_path / f"{i}.mrcs", data + i)) for i in range(stacks.OPEN_FILES + 40)]
    before = len(os.listdir("/proc/self/fd"))
    wrong: list[int] = []

    def work(order: np.ndarray) -> None:
        for i in order.tolist():
            if not np.array_equal(readers[i].read([1])[0], data[1] + i):
                wrong.append(i)

    threads = [
        threading.Thread(target=work, args=(np.random.default_rng(s).permutation(len(readers)),)) for s in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(os.listdir("/proc/self/fd")) - before <= stacks.OPEN_FILES
    for reader in readers:
        reader.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_float16_stack_refuses_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "half.mrcs"
    with StackWriter(path, 7, 16, 2.0, np.float16) as writer:
        writer.write(images())
    assert read_header(path).mode == 12
    np.testing.assert_allclose(StackReader(path).read(), images(), rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match=r"image 1 \(0-based\)"), StackWriter(path, 2, 16, 2.0, np.float16) as writer:
        writer.write(np.stack([images()[0], images()[1] * 1e6]))
    with pytest.raises(InputError, match=r"image 90 \(0-based\)"), StackWriter(path, 2, 16, 2.0, np.float16) as writer:
        writer.write(np.stack([images()[0], images()[1] * 1e6]), np.array([7, 90]))
    np.testing.assert_allclose(StackReader(path).read(), images(), rtol=1e-3, atol=1e-3)  # the old file is whole
    assert os.listdir(tmp_path) == ["half.mrcs"]


def test_writer_keeps_nothing_of_an_unfinished_stack(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 of 7 images"), StackWriter(tmp_path / "a.mrcs", 7, 16, 1.0) as writer:
        writer.write(images()[:3])
    with pytest.raises(KeyboardInterrupt), StackWriter(tmp_path / "a.mrcs", 7, 16, 1.0) as writer:
        writer.write(images()[:3])
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="more images"), StackWriter(tmp_path / "a.mrcs", 7, 16, 1.0) as writer:
        writer.write(np.concatenate([images(), images()]))
    with pytest.raises(InputError, match="not enough disk space.*TiB"):
        StackWriter(tmp_path / "a.mrcs", 10**8, 512, 1.0).__enter__()
    assert not os.listdir(tmp_path)


def test_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: object, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"disk is full.*8\.\d KiB"), StackWriter(tmp_path / "a.mrcs", 7, 16, 1.0) as w:
        monkeypatch.setattr("cryosuite.formats.stacks.write_all", full)
        w.write(images())
    assert not os.listdir(tmp_path)


def test_map_keeps_placement_axes_and_voxels(golden: Path, tmp_path: Path) -> None:
    folder = golden / "adversarial"
    both, nstart, turned = (
        read_map(folder / f"vol_{name}.mrc") for name in ("origin_and_nstart", "nstart_only", "axes_zyx")
    )
    assert both.placement == (12.0, -7.5, 3.25)
    assert nstart.placement == (-6.0, 7.5, 9.0)
    np.testing.assert_array_equal(turned.data, nstart.data)
    for like in (both, nstart, turned):
        write_map(tmp_path / "copy.mrc", like.data, None, like=like)
        copy = read_map(tmp_path / "copy.mrc")
        np.testing.assert_array_equal(copy.data, like.data)
        for name in ("origin", "nstart", "axes", "voxel_size", "pixel_size"):
            assert getattr(copy, name) == getattr(like, name)
    write_map(tmp_path / "coarse.mrc", nstart.data[::2, ::2, ::2], 3.0, like=nstart)
    assert read_map(tmp_path / "coarse.mrc").placement == nstart.placement  # Angstrom stay, voxels changed


def test_axes_of_a_box_that_is_no_cube(tmp_path: Path) -> None:
    data = np.arange(4 * 6 * 8, dtype=np.float32).reshape(4, 6, 8)
    like = Map(data, 1.0, nstart=(1, 2, 3), axes=(3, 1, 2), voxel_size=(1.0, 1.5, 2.0))
    write_map(tmp_path / "map.mrc", data, None, like=like)
    header = read_header(tmp_path / "map.mrc")
    assert (header.nx, header.ny, header.nz) == (4, 8, 6)  # columns are z, rows x, sections y
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = read_map(tmp_path / "map.mrc")
    np.testing.assert_array_equal(back.data, data)
    assert back.nstart == (1, 2, 3) and back.voxel_size == (1.0, 1.5, 2.0)


@pytest.mark.parametrize("name", ["map.mrc", "map.mrc.gz", "map.map"])
def test_map_round_trip(name: str, tmp_path: Path) -> None:
    data = images(16)
    write_map(tmp_path / name, data, 1.25, origin=(1.0, 2.0, 3.0))
    back = read_map(tmp_path / name)
    np.testing.assert_array_equal(back.data, data)
    assert back.pixel_size == pytest.approx(1.25) and back.origin == (1.0, 2.0, 3.0)
    with mrcfile.open(tmp_path / name) as mrc:
        assert not mrc.is_image_stack()
        np.testing.assert_array_equal(mrc.data, data)


def test_truncated_gz_map_is_refused(tmp_path: Path) -> None:
    write_map(tmp_path / "map.mrc.gz", images(16), 1.25)
    whole = (tmp_path / "map.mrc.gz").read_bytes()
    for size in (10, 300, len(whole) // 2, len(whole) - 20):
        (tmp_path / "cut.mrc.gz").write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cut\.mrc\.gz"):
            read_map(tmp_path / "cut.mrc.gz")


REFUSED = {"invalid_axes.mrc": "axis order", "prot_gmm.mrc": "no image data"}


def test_maps_and_stacks_in_the_wild(shared: Path) -> None:
    """Every map and stack of shared/data holds what mrcfile finds in it, axes in order, or is refused for a reason."""
    folder = shared / "data"
    seen = 0
    for path in sorted(p for kind in ("odd_mrc", "maps", "stacks") for p in (folder / kind).glob("*/*")):
        if path.suffix in (".pdb", ".pkl"):
            continue
        seen += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.name in REFUSED or "drgnai" in path.parts:
                with pytest.raises(InputError, match=REFUSED.get(path.name, "truncated.*expected.*found")):
                    read_map(path)
                continue
            ours = read_map(path)
            with mrcfile.open(path, permissive=True) as mrc:
                theirs, header = np.atleast_3d(np.asarray(mrc.data, np.float32)), mrc.header
                axes = [int(header[name]) for name in ("mapc", "mapr", "maps")]
                theirs = theirs.reshape(int(header.nz), int(header.ny), int(header.nx))
                size = float(mrc.voxel_size.x)
        theirs = theirs.transpose([2 - axes.index(3), 2 - axes.index(2), 2 - axes.index(1)])
        np.testing.assert_array_equal(ours.data, theirs, err_msg=str(path))
        assert ours.pixel_size == pytest.approx(size, rel=1e-5) if size else ours.pixel_size is None
    assert seen > 40


def test_axis_order_agrees_with_gemmi(shared: Path) -> None:
    gemmi = pytest.importorskip("gemmi")
    for name in ("gemmi/5i55_tiny.ccp4", "cctbx_project/non_zero_origin_map.ccp4"):
        path = shared / "data" / "odd_mrc" / name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = read_map(path)
        theirs = gemmi.read_ccp4_map(str(path))
        theirs.setup(float("nan"), gemmi.MapSetup.ReorderOnly)
        np.testing.assert_array_equal(ours.data, np.array(theirs.grid, copy=False).transpose(2, 1, 0))


def test_several_volumes_in_a_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "volumes.mrc"
    with mrcfile.new(path) as mrc:
        mrc.set_data(np.zeros((3, 4, 4, 4), np.float32))
    with pytest.raises(InputError, match="holds 3 volumes"):
        read_map(path)
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(np.ones((1, 4, 4, 4), np.float32))
    with pytest.warns(UserWarning, match="pixel size"):
        assert read_map(path).data.shape == (4, 4, 4)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.mrc: file not found \(looked for"):
        read_map(tmp_path / "nowhere.mrc")
    with pytest.raises(InputError, match="is a folder"):
        StackReader(tmp_path)
    with pytest.raises(InputError, match=r"folder .*nowhere does not exist"):
        write_map(tmp_path / "nowhere" / "a.mrc", images(16), 1.0)
