"""Maps on their grid: where a voxel lies, resampling there and back, and the header that comes back unchanged."""

from __future__ import annotations

import gzip
from pathlib import Path

import mrcfile
import numpy as np
import pytest

from cryosuite.data.map_grid import back_to, read_grid, resampled, write_like
from cryosuite.errors import InputError
from cryosuite.formats.mrc import read_map
from cryosuite.formats.mrc_like import write_map_like

SHAPE = (18, 15, 22)  # z, y, x
VOXEL = (1.1, 1.3, 0.9)  # x, y, z
RNG = np.random.default_rng(0)


def make(path: Path, axes=(1, 2, 3), dtype=np.float32, order="<", origin=(0.0, 0.0, 0.0), nstart=(0, 0, 0), **header):
    """A map with smooth values in [-100, 100]; data (z, y, x) are returned as they must be read."""
    z, y, x = np.meshgrid(*(np.linspace(0, 1, n, endpoint=False) for n in SHAPE), indexing="ij")
    data = 60 * np.sin(2 * np.pi * (x + 2 * y)) + 40 * np.cos(2 * np.pi * (z - x) + 1)
    data = data.astype(dtype)
    in_file = np.ascontiguousarray(data.transpose([2 - (axis - 1) for axis in reversed(axes)]))
    with mrcfile.new(path, in_file, overwrite=True) as mrc:
        mrc.set_volume()
        for axis, n, size, place in zip("xyz", SHAPE[::-1], VOXEL, origin, strict=True):
            mrc.header["cella"][axis], mrc.header["m" + axis], mrc.header["origin"][axis] = n * size, n, place
        for field, start, axis in zip(("mapc", "mapr", "maps"), ("nxstart", "nystart", "nzstart"), axes, strict=True):
            mrc.header[field], mrc.header[start] = axis, nstart[axis - 1]
        for name, value in header.items():
            mrc.header[name] = value
        mrc.add_label("made by a test")
    if order == ">":
        raw = Path(path).read_bytes()
        swapped = np.frombuffer(raw[:1024], mrcfile.dtypes.HEADER_DTYPE).astype(
            mrcfile.dtypes.HEADER_DTYPE.newbyteorder(">")
        )
        swapped["machst"] = (0x11, 0x11, 0, 0)
        Path(path).write_bytes(swapped.tobytes() + in_file.astype(in_file.dtype.newbyteorder(">")).tobytes())
    return data.astype(np.float32)


CASES = {
    "plain": {},
    "origin and nstart": {"origin": (10.0, -20.0, 5.5), "nstart": (3, 4, 5)},
    "negative nstart": {"nstart": (-11, -7, -9)},
    "axes 3 1 2": {"axes": (3, 1, 2), "nstart": (-4, 2, 7)},
    "axes 2 3 1": {"axes": (2, 3, 1), "origin": (1.0, 2.0, 3.0)},
    "int8": {"dtype": np.int8},
    "int16": {"dtype": np.int16},
    "float16": {"dtype": np.float16},
    "big-endian": {"order": ">", "axes": (3, 1, 2), "nstart": (1, 2, 3)},
    "symmetry": {"ispg": 4},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("suffix", [".mrc", ".map.gz"])
def test_a_header_comes_back(tmp_path, name, suffix):
    """Everything that says where the map lies is what it was; mode, statistics and byte order are the new map's."""
    source = tmp_path / "in.mrc"
    data = make(source, **CASES[name])
    if suffix == ".map.gz":
        source.with_suffix(".map.gz").write_bytes(gzip.compress(source.read_bytes()))
        source = source.with_suffix(".map.gz")
    grid = read_grid(source)
    np.testing.assert_array_equal(grid.data, data)
    out = tmp_path / f"out{suffix}"
    write_like(out, grid.data * 2, grid, "twice")
    again = read_grid(out)
    np.testing.assert_array_equal(again.data, grid.data * 2)
    assert (again.voxel, again.origin) == (grid.voxel, grid.origin)
    with mrcfile.open(source, permissive=True) as old, mrcfile.open(out) as new:
        for field in ("nx", "ny", "nz", "nxstart", "nystart", "nzstart", "mx", "my", "mz", "mapc", "mapr", "maps",
                      "cella", "cellb", "origin", "ispg"):  # fmt: skip
            assert new.header[field] == old.header[field], field
        assert new.header.mode == 2 and new.header.dmax == pytest.approx(2 * data.max())
        assert new.header.nlabl == old.header.nlabl + 1 and b"twice" in bytes(new.header.label[int(old.header.nlabl)])
    if suffix == ".mrc":
        assert mrcfile.validate(out)


def test_the_extended_header_comes_back(tmp_path, shared):
    """Symmetry records of a crystal's map, axes 3 1 2, negative starts: a real one."""
    source = shared / "data" / "maps" / "mrcfile" / "EMD-3001.map.gz"
    with pytest.raises(InputError, match="90, 94.326, 90 degrees"):
        read_grid(source)
    found = read_map(source)
    write_map_like(tmp_path / "out.map", found.data, found)
    old, new = gzip.decompress(source.read_bytes()), (tmp_path / "out.map").read_bytes()
    assert new[1024:1184] == old[1024:1184] and len(new) == len(old)
    np.testing.assert_array_equal(np.frombuffer(new, "<f4", offset=1184), np.frombuffer(old, "<f4", offset=1184))


def test_the_origin_wins_over_nstart(tmp_path):
    make(tmp_path / "a.mrc", **CASES["origin and nstart"])
    make(tmp_path / "b.mrc", **CASES["axes 3 1 2"])
    assert read_grid(tmp_path / "a.mrc").origin == (10.0, -20.0, 5.5)  # never the sum
    np.testing.assert_allclose(read_grid(tmp_path / "b.mrc").origin, np.array([-4, 2, 7]) * VOXEL, rtol=1e-6)
    grid = read_grid(tmp_path / "a.mrc")
    index = np.array([[0, 0, 0], [3, 2, 1]])
    np.testing.assert_allclose(grid.position_of(index)[1], np.array([10, -20, 5.5]) + np.array([1, 2, 3]) * VOXEL)
    np.testing.assert_allclose(grid.index_of(grid.position_of(index)), index, atol=1e-9)


def test_resampling_there_and_back(tmp_path):
    """Finer and back is exact; values at shared points stay; a band-limited wave is the wave on the new grid."""
    data = make(tmp_path / "a.mrc", origin=(5.0, 6.0, 7.0))
    grid = read_grid(tmp_path / "a.mrc")
    fine = resampled(grid, 0.5)
    assert fine.origin == grid.origin
    np.testing.assert_allclose(fine.extent, grid.extent, rtol=1e-12)
    z, y, x = np.meshgrid(*(np.linspace(0, 1, n, endpoint=False) for n in fine.data.shape), indexing="ij")
    wave = 60 * np.sin(2 * np.pi * (x + 2 * y)) + 40 * np.cos(2 * np.pi * (z - x) + 1)
    np.testing.assert_allclose(fine.data, wave, atol=1e-3)
    noise = grid.with_data(RNG.normal(size=data.shape).astype(np.float32))
    back = back_to(resampled(noise, 0.61), grid)
    np.testing.assert_allclose(back.data, noise.data, atol=1e-5)  # all frequencies, Nyquist too
    assert back.source is grid.source
    coarse = back_to(resampled(grid, 2.0), grid)
    np.testing.assert_allclose(coarse.data, data, atol=1e-3)  # the wave needs no more
    assert resampled(noise, 3.0).data.mean() == pytest.approx(noise.data.mean(), abs=1e-5)
    other = resampled(read_grid(tmp_path / "a.mrc", apix=2.0), 1.0)
    with pytest.raises(InputError, match="not that"):
        back_to(other, grid)


def test_thin_maps(tmp_path):
    """Axes of one voxel are axes like others."""
    with mrcfile.new(tmp_path / "thin.mrc", RNG.normal(size=(1, 8, 9)).astype(np.float32)) as mrc:
        mrc.set_volume()
        mrc.voxel_size = 2.0
    grid = read_grid(tmp_path / "thin.mrc")
    assert resampled(grid, 1.0).data.shape == (2, 16, 18)
    np.testing.assert_allclose(back_to(resampled(grid, 1.0), grid).data, grid.data, atol=1e-5)


def test_what_is_refused(tmp_path):
    path = tmp_path / "a.mrc"
    make(path)
    with mrcfile.open(path, "r+") as mrc:
        mrc.header.cellb["beta"] = 94.3
    with pytest.raises(InputError, match=r"90, 94.3, 90 degrees.*right angles"):
        read_grid(path)
    make(path)
    with mrcfile.open(path, "r+") as mrc:
        for axis in "xyz":
            mrc.header.cellb[{"x": "alpha", "y": "beta", "z": "gamma"}[axis]] = 0  # old writers
            mrc.header.cella[axis] = 0
    with pytest.raises(InputError, match="no voxel size; give it with --apix"):
        read_grid(path)
    grid = read_grid(path, apix=1.5)
    assert grid.voxel == (1.5,) * 3
    write_like(tmp_path / "out.mrc", grid.data, grid)  # the user's voxel size is written
    assert read_grid(tmp_path / "out.mrc").voxel == pytest.approx((1.5,) * 3)
    for apix in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="positive number"):
            read_grid(path, apix=apix)
    with pytest.raises(InputError, match="positive number"):
        resampled(grid, 0.0)
    with pytest.raises(InputError, match="would have"):
        resampled(grid, 0.001)
    with pytest.raises(InputError, match="do not fit"):
        write_like(tmp_path / "out.mrc", grid.data[1:], grid)
    make(path)
    with mrcfile.open(path, "r+") as mrc:
        mrc.data[3, 4, 5] = np.nan
    with pytest.raises(InputError, match="1 of 5940 values are not finite"):
        read_grid(path)


def test_old_headers_are_made_valid(tmp_path, shared):
    """A header of before 2000 (no MAP, letters where the space group lies) becomes one that others can read."""
    grid = read_grid(shared / "data" / "odd_mrc" / "imp" / "crop_map.mrc", apix=1.0)
    write_like(tmp_path / "out.mrc", grid.data, grid)
    again = read_grid(tmp_path / "out.mrc")
    np.testing.assert_array_equal(again.data, grid.data)
    with mrcfile.open(tmp_path / "out.mrc") as mrc:
        assert mrc.header.ispg == 1 and mrc.data.shape == grid.data.shape


def test_a_crystal_that_is_not_rectangular(shared):
    with pytest.raises(InputError, match="right angles"):
        read_grid(shared / "data" / "maps" / "ngl" / "3pqr.ccp4.gz")
