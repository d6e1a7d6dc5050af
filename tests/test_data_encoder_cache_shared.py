"""The file of the encoder's images made by several processes: the bytes of one, each image prepared once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from forked import each
from test_data_encoder_images import toy_images, toy_set

from cryosuite.data import encoder_cache
from cryosuite.data.encoder_cache import EncoderCache
from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import Processes
from cryosuite.errors import InputError

COUNT = 53


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five images at once, ten per process between two notes."""
    monkeypatch.setattr(encoder_cache, "CHUNK_BYTES", 4 * 16 * 16 * 5)
    monkeypatch.setattr(encoder_cache, "STRETCH", 2)


def spoilt() -> ParticleSet:
    """Images of which two, in the parts of different processes, are not finite."""
    images = toy_images(COUNT)
    images[[3, 48], 2, 2] = np.nan
    return ParticleSet.from_array(images, 2.0)


def watched(monkeypatch: pytest.MonkeyPatch, die_at: int = -1) -> list[int]:
    """The rows that are prepared from now on; preparing the row ``die_at`` is a mistake."""
    read: list[int] = []
    original = encoder_cache.read_encoder_images

    def reading(particles: ParticleSet, rows: np.ndarray, *rest: object) -> tuple[np.ndarray, np.ndarray]:
        if die_at in rows:
            raise InputError("the file became shorter")
        read.extend(rows.tolist())
        return original(particles, rows, *rest)

    monkeypatch.setattr(encoder_cache, "read_encoder_images", reading)
    return read


@pytest.mark.filterwarnings("ignore:.*hold NaN")
def test_three_processes_make_the_file_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = EncoderCache(spoilt(), 28, "robust", tmp_path / "one.u8", progress=False)
    read = watched(monkeypatch)

    def work(processes: Processes) -> None:
        cache = EncoderCache(spoilt(), 28, "robust", tmp_path / "many.u8", progress=False)
        assert np.flatnonzero(cache.bad).tolist() == [3, 48]
        assert np.array_equal(cache.images, alone.images)
        own = processes.everyone(lambda: read)
        assert sorted(row for part in own for row in part) == list(range(COUNT))
        assert all(len(part) >= 10 for part in own)
        for part in own:  # neighbours of one another
            assert (np.diff(part) == 1).sum() >= len(part) - 3

    each(tmp_path, work)
    assert (tmp_path / "many.u8").read_bytes() == (tmp_path / "one.u8").read_bytes()
    assert (tmp_path / "many.u8.json").read_text() == (tmp_path / "one.u8.json").read_text()


def test_a_mistake_of_one_is_raised_in_all_and_the_rest_is_made_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was noted before the mistake is not made again, by however many processes."""
    path = tmp_path / "images.u8"

    def wrong(processes: Processes) -> None:
        watched(monkeypatch, die_at=45)
        with pytest.raises(InputError, match="became shorter"):
            EncoderCache(toy_set(COUNT), 28, "ief", path, progress=False)

    each(tmp_path, wrong)
    (tmp_path / "meet").unlink(missing_ok=True)
    assert path.stat().st_size == COUNT * 28 * 28
    read = watched(monkeypatch)
    cache = EncoderCache(toy_set(COUNT), 28, "ief", path, progress=False)
    assert read[-23:] == list(range(30, COUNT)) and max(read[:-23]) < 30  # before: those compared
    plain = EncoderCache(toy_set(COUNT), 28, "ief", None, progress=False)
    assert np.array_equal(cache.images, plain.images)
