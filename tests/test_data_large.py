"""Sets that do not fit into memory: what a command holds does not grow with the number of images."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from million_set import make_set

from cryosuite.data import loader as loading
from cryosuite.data.buffers import Buffers
from cryosuite.data.images import StackImages
from cryosuite.data.loader import BatchLoader
from cryosuite.data.open import open_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.formats import stacks
from cryosuite.formats.mrc import StackWriter
from cryosuite.formats.pickles import safe_load, write_pickle

PEAK = """
import atexit, sys
atexit.register(lambda: print(*(line for line in open("/proc/self/status") if "VmHWM" in line)))
"""
RUN = "from cryosuite.cli import main; sys.argv[0] = 'cryosuite'; main()"
READ = """
from cryosuite.formats.star import images_from_star, particle_tables
tables = particle_tables(sys.argv[1]) if len(sys.argv) > 1 else []
names = images_from_star(tables)[0] if len(sys.argv) > 1 else []
print(len(tables), len(names), sum(__import__("os").times()[:2]))
"""
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")


def peak_of(script: str, *arguments: object) -> tuple[float, str]:
    """Peak memory (MiB) of a process of its own, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK + script, *map(str, arguments)], capture_output=True, text=True, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(re.search(r"VmHWM:\s+(\d+)", done.stdout)[1]) / 1024, done.stdout


@linux
def test_memory_does_not_grow_with_the_images(tmp_path):
    """6,000 images more are 94 MiB more; what libraries need late and the tables of the rows is far less."""
    peaks: dict[str, list[float]] = {"preprocess": [], "backproject": []}
    for count in (1500, 7500):
        star = make_set(tmp_path / f"{count}", count, count // 50)
        work = tmp_path / f"work{count}"
        peaks["preprocess"].append(peak_of(RUN, "preprocess", star, "-o", work, "--threads", 1)[0])
        peaks["backproject"].append(
            peak_of(RUN, "backproject", work, "-o", tmp_path / f"map{count}", "--no-half-maps", "--downsample", 32)[0]
        )
    for command, (few, many) in peaks.items():
        print(f"{command}: {few:.0f} and {many:.0f} MiB")
        assert many - few < 55, f"{command}: {few:.0f} and {many:.0f} MiB"


def test_the_set_for_these_tests_is_sound(tmp_path):
    """Linked stacks are stacks of their own, three optics groups differ, and no image is in both half sets."""
    star = make_set(tmp_path / "set", 600, 60)
    particles = open_particles(star)
    assert (len(particles), particles.n_groups, len(particles.images.files)) == (600, 3, 60)
    assert len(np.unique(particles.ctf[:, 5:8], axis=0)) == 3
    assert set(particles.pixel_size.tolist()) == {np.float32(3.0), np.float32(3.06)}
    images = particles.read(slice(None))
    _, number = np.unique(images.reshape(600, -1), axis=0, return_inverse=True)
    assert number.max() + 1 == 240
    assert not set(number[particles.half == 0]) & set(number[particles.half == 1])
    from cryosuite.reconstruct.backproject import reconstruct

    found = reconstruct(particles)
    assert float(found.fsc[3]) > 0.8


@linux
@pytest.mark.slow
def test_a_long_star_file_is_read_fast_and_in_little_memory(tmp_path):
    """100,000 rows of 35 MB in a tenth of what a million may take, with less than 2 KB a row on top of the start."""
    star = make_set(tmp_path / "set", 160_000, 1600)
    assert star.stat().st_size > 32 << 20  # larger than what is given to the starfile package
    idle, _ = peak_of(READ)
    peak, printed = peak_of(READ, star)
    rows, names, seconds = printed.split()[:3]
    assert (int(rows), int(names)) == (160_000, 1600)
    assert float(seconds) < 60 * 0.16
    assert peak - idle < 160_000 * 2e3 / 2**20


def test_latents_are_written_without_a_copy_of_them(tmp_path):
    z = np.random.default_rng(0).standard_normal((400_000, 32), dtype=np.float32)  # 49 MiB
    tracemalloc.start()
    try:
        write_pickle(tmp_path / "z.pkl", z)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < z.nbytes / 2
    assert np.array_equal(safe_load(tmp_path / "z.pkl")[0], z)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("sign", [1, -1])
def test_shuffled_images_land_in_their_batches(tmp_path, monkeypatch, dtype, sign):
    """Many stacks, blocks and windows; reads that stop in the middle of an image, as on a network disk."""
    monkeypatch.setattr(loading, "BLOCK_BYTES", 5 * 16 * 16 * 4)
    monkeypatch.setattr(loading, "WINDOW_BYTES", 96 * 16 * 16 * 4)
    read = os.preadv
    monkeypatch.setattr(
        stacks.os, "preadv", lambda file, buffers, at: read(file, [b[: max(1, 1500)] for b in buffers[:1]], at)
    )
    for number in range(9):
        with StackWriter(tmp_path / f"{number}.mrcs", 37, 16, 1.0, dtype) as writer:
            values = np.arange(number * 37, (number + 1) * 37, dtype=np.float32)
            writer.write(np.broadcast_to(values[:, None, None], (37, 16, 16)))
    files = [tmp_path / f"{number}.mrcs" for number in range(9)]
    images = StackImages(files, np.repeat(np.arange(9), 37), np.tile(np.arange(37), 9))
    seen = []
    for batch in BatchLoader(ParticleSet(images, 16, 1.0, sign=sign), 32).epoch(1):
        assert (batch.images == sign * batch.index[:, None, None]).all()
        seen += batch.index.tolist()
    assert sorted(seen) == list(range(333))


def test_rows_of_different_sign_are_read_into_place(tmp_path):
    with StackWriter(tmp_path / "a.mrcs", 40, 8, 1.0) as writer:
        writer.write(np.broadcast_to(np.arange(40, dtype=np.float32)[:, None, None], (40, 8, 8)))
    signs = np.where(np.arange(40) % 3, 1, -1).astype(np.int8)
    images = StackImages([tmp_path / "a.mrcs"], np.zeros(40, int), np.arange(40), signs=signs)
    out = np.full((10, 8, 8), 99, np.float32)
    rows, places = np.array([7, 30, 6, 7]), np.array([8, 0, 3, 5])
    images.read_into(out, rows, places)
    assert (out[places, 2, 2] == rows * signs[rows]).all()
    assert (out[[1, 2, 4, 6, 7, 9]] == 99).all()


def test_memory_of_windows_is_used_again_when_nobody_looks():
    buffers = Buffers(2)
    first = buffers.take((4, 8, 8))
    first[:] = 7
    kept = torch.from_numpy(first[1:2])[0, 1:]  # as a training holds a part of a batch
    place = first.ctypes.data
    del first
    second = buffers.take((4, 8, 8))
    second[:] = 1
    assert second.ctypes.data != place
    assert (kept == 7).all()
    del kept
    smaller = buffers.take((3, 8, 8))
    assert smaller.ctypes.data == place
    assert smaller.flags.c_contiguous
    assert smaller.flags.writeable


def test_batches_that_are_kept_stay_what_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "WINDOW_BYTES", 64 * 16 * 16 * 4)
    with StackWriter(tmp_path / "a.mrcs", 640, 16, 1.0) as writer:
        writer.write(np.broadcast_to(np.arange(640, dtype=np.float32)[:, None, None], (640, 16, 16)))
    loader = BatchLoader(ParticleSet(StackImages.of_stack(tmp_path / "a.mrcs", 640), 16, 1.0), 32)
    for epoch in (0, 1):
        for batch in list(loader.epoch(epoch)):
            assert (batch.images == batch.index[:, None, None]).all()
