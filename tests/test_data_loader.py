"""The batch loader: every row once, the same order for the same seed, exact restarts, fair shares, few reads."""

from __future__ import annotations

import time

import numpy as np
import pytest

from cryosuite.data import loader as loading
from cryosuite.data.images import StackCache, StackImages
from cryosuite.data.loader import BatchLoader
from cryosuite.data.particles import ParticleSet
from cryosuite.errors import InputError
from cryosuite.formats.mrc import StackWriter


def numbered(n: int = 1000, D: int = 16) -> ParticleSet:
    """Images whose pixels all hold the row's number."""
    images = np.broadcast_to(np.arange(n, dtype=np.float32)[:, None, None], (n, D, D))
    return ParticleSet.from_array(images, 2.0, rotation=np.broadcast_to(np.eye(3, dtype=np.float32), (n, 3, 3)).copy())


def rows_of(loader: BatchLoader, epoch: int = 0, start: int = 0) -> list[list[int]]:
    return [batch.index.tolist() for batch in loader.epoch(epoch, start)]


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(loading, "BLOCK_BYTES", 8 * 16 * 16 * 4)
    monkeypatch.setattr(loading, "WINDOW_BYTES", 128 * 16 * 16 * 4)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_each_row_comes_once_with_its_own_image(small_windows, prefetch):
    loader = BatchLoader(numbered(), 32, prefetch=prefetch)
    seen = []
    for batch in loader.epoch(4):
        assert (batch.images[:, 3, 5].numpy() == batch.index.numpy()).all()
        assert batch.rotation.shape == (len(batch), 3, 3)
        seen += batch.index.tolist()
    assert sorted(seen) == list(range(1000))
    assert len(loader) == 32


def test_order_depends_on_seed_and_epoch_only(small_windows):
    one = rows_of(BatchLoader(numbered(), 32, seed=1), 3)
    assert one == rows_of(BatchLoader(numbered(), 32, seed=1, prefetch=0), 3)
    assert one != rows_of(BatchLoader(numbered(), 32, seed=1), 4)
    assert one != rows_of(BatchLoader(numbered(), 32, seed=2), 3)


def test_a_restart_goes_on_exactly_and_reads_nothing_twice(small_windows):
    whole = rows_of(BatchLoader(numbered(), 32), 2)
    for start in (0, 1, 4, 5, 31):
        assert rows_of(BatchLoader(numbered(), 32), 2, start) == whole[start:]


def test_small_sets_are_shuffled_fully():
    first = rows_of(BatchLoader(numbered(512), 64))[0]
    assert np.std(first) > 100  # uniform over 0..511 has 148; neighbours would have 18


def test_large_sets_are_read_in_runs(small_windows):
    particles = numbered()
    runs = []
    read = particles.images.read
    particles.images.read = lambda rows: (runs.append(np.count_nonzero(np.diff(rows) != 1) + 1), read(rows))[1]
    list(BatchLoader(particles, 32, prefetch=0).epoch(0))
    assert sum(runs) < 1000 / 8 * 1.2  # blocks of 8 neighbours, not single images
    spread = [np.std(rows) for rows in rows_of(BatchLoader(particles, 32))]
    assert np.mean(spread) > 200  # and yet a batch draws from all over the set (uniform: 289)


@pytest.mark.parametrize(("n", "drop"), [(1000, False), (1000, True), (96, False)])
def test_processes_share_the_rows(small_windows, n, drop):
    loaders = [BatchLoader(numbered(n), 32, rank=rank, world_size=3, drop_last=drop) for rank in range(3)]
    shares = [sum(rows_of(loader, 1), []) for loader in loaders]
    assert len({len(share) for share in shares}) == 1
    assert len({len(loader) for loader in loaders}) == 1
    if not drop:
        assert set().union(*shares) == set(range(n))
        assert sum(map(len, shares)) - n < 3
    else:
        assert len(set().union(*shares)) == sum(map(len, shares))


def test_in_order_for_inference():
    assert sum(rows_of(BatchLoader(numbered(100), 32, shuffle=False)), []) == list(range(100))
    assert len(rows_of(BatchLoader(numbered(100), 32, shuffle=False, drop_last=True))) == 3


def test_errors_of_the_reading_thread_arrive(small_windows):
    particles = numbered()

    def broken(rows: np.ndarray) -> np.ndarray:
        raise InputError("stack.mrcs: gone")

    particles.images.read = broken
    with pytest.raises(InputError, match="gone"):
        list(BatchLoader(particles, 32).epoch(0))


def test_leaving_early_ends_the_threads(small_windows):
    import threading

    before = threading.active_count()
    iterator = BatchLoader(numbered(), 32).epoch(0)
    next(iterator)
    iterator.close()
    time.sleep(0.3)
    assert threading.active_count() == before


def write_stacks(folder, files: int, per_file: int, D: int = 16) -> StackImages:
    paths = []
    for number in range(files):
        paths.append(folder / f"{number:04d}.mrcs")
        values = np.arange(number * per_file, (number + 1) * per_file, dtype=np.float32)
        with StackWriter(paths[-1], per_file, D, 1.0) as writer:
            writer.write(np.broadcast_to(values[:, None, None], (per_file, D, D)))
    file_id = np.repeat(np.arange(files), per_file)
    return StackImages(paths, file_id, np.tile(np.arange(per_file), files))


def test_images_of_many_stacks_in_any_order(tmp_path):
    images = write_stacks(tmp_path, 150, 4)
    rows = np.random.default_rng(0).integers(0, 600, 500)
    assert (images.read(rows)[:, 0, 0] == rows).all()
    assert len(images.cache._readers) == len(np.unique(rows // 4))
    part = images.subset(rows[:50])
    assert (part.read(np.arange(50))[:, 1, 1] == rows[:50]).all()
    assert images.read(np.zeros(0, int)).shape[0] == 0


def test_cache_is_bounded(tmp_path):
    images = write_stacks(tmp_path, 5, 2)
    images.cache = StackCache(limit=2)
    images.read(np.arange(10))
    assert len(images.cache._readers) == 2


def test_a_stack_written_anew_is_read_anew(tmp_path):
    write_stacks(tmp_path, 1, 8)
    first = StackImages.of_stack(tmp_path / "0000.mrcs", 8)
    assert first.read(np.arange(8))[7, 0, 0] == 7
    with StackWriter(tmp_path / "0000.mrcs", 3, 32, 1.0) as writer:
        writer.write(np.full((3, 32, 32), 9.0))
    assert first.read(np.arange(8))[7, 0, 0] == 7  # what is open stays what it was
    assert (StackImages.of_stack(tmp_path / "0000.mrcs", 3).read(np.arange(3)) == 9).all()


def test_loader_keeps_up_with_training(tmp_path):
    """Training a D = 32 set on one core runs at some 250 images/s; the loader must not be seen beside it."""
    with StackWriter(tmp_path / "s.mrcs", 8192, 32, 3.0) as writer:
        writer.write(np.zeros((8192, 32, 32), np.float32))
    particles = ParticleSet(StackImages.of_stack(tmp_path / "s.mrcs", 8192), 32, np.float32(3.0))
    began = time.process_time()
    count = sum(len(batch) for batch in BatchLoader(particles, 64).epoch(0))
    assert count / (time.process_time() - began) > 10000
