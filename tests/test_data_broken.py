"""Broken images are told: the first by name, in the end how many, those of other processes by the first process."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data_processes import each
from training_toy import Toy, options, toy_particles

from cryosuite.data.broken import Broken
from cryosuite.data.loader import BatchLoader
from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError
from cryosuite.training.inference import encode_all
from cryosuite.training.loop import fit

END = "in all have NaN or infinite pixels"


def broken_set(rows: range | list[int], n: int = 60) -> ParticleSet:
    """The toy particles, some rows of them NaN."""
    images = toy_particles(n).read(np.arange(n)).copy()
    images[rows] = np.nan
    return ParticleSet.from_array(images, 1.0)


def told(work) -> list[str]:
    """What a piece of work says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [str(one.message) for one in caught if "NaN" in str(one.message)]


@pytest.mark.filterwarnings("ignore::cryosuite.errors.UserNotice")
def test_a_batch_of_nothing_but_broken_images_shows_others_to_a_training() -> None:
    particles = broken_set([*range(8), *range(10, 60)])
    for batch in BatchLoader(particles, 5).epoch(0):
        assert set(batch.index.tolist()) <= {8, 9} and (batch.images != 0).any(-1).any(-1).all()
    with pytest.raises(InputError, match="every image has NaN"):
        list(BatchLoader(broken_set(range(60)), 5).epoch(0))


def test_many_broken_images_are_counted_in_the_end() -> None:
    particles = broken_set(range(25))

    def read() -> None:
        loader = BatchLoader(particles, 10, shuffle=False, prefetch=0)
        for _ in range(2):  # the second pass has nothing to add
            list(loader.epoch(0))
            loader.broken.share(ALONE)

    said = told(read)
    assert len(said) == 3 and "20 so far" in said[1] and f"25 images {END}" in said[2]
    assert all(END not in text for text in told(lambda: list(BatchLoader(broken_set([3]), 10).epoch(0))))


def test_a_reader_of_a_part_tells_the_first_process(tmp_path: Path) -> None:
    """One image in the first process's part, 23 in the second's, none in the third, whose set is its part alone."""
    particles = broken_set([5, *range(20, 40), 37, 38, 39])

    def work(processes: Processes) -> None:
        mine = processes.mine(np.arange(60))

        def read() -> None:
            part = particles.subset(mine)
            broken = Broken(part)
            broken.find(np.arange(20), part.read(np.arange(20)))
            broken.share_part(particles, mine, processes)

        said = told(read)
        if processes.first:
            assert len(said) == 3 and "image 5 (0-based)" in said[0] and "images 20, 21" in said[1]
            assert f"21 images {END}" in said[2]

    each(tmp_path, work)


def test_latents_and_trainings_tell_what_other_processes_met(tmp_path: Path) -> None:
    particles, method = broken_set([1, 50]), Toy()

    def encode(processes: Processes) -> None:
        z: list[np.ndarray] = []
        said = told(lambda: z.append(encode_all(method, method.build(particles), particles, 16, progress=False)))
        assert np.flatnonzero(np.isnan(z[0]).any(1)).tolist() == [1, 50]
        assert not processes.first or ["image 1 " in said[0], "image 50 " in said[1]] == [True, True]

    each(tmp_path, encode)


def test_a_training_tells_them_after_each_epoch(tmp_path: Path) -> None:
    said = told(lambda: fit(Toy(), broken_set(range(25)), RunDir(tmp_path / "run"), options(epochs=2)))
    assert sum(f"25 images {END}" in text for text in said) == 1


def test_a_training_that_is_stopped_within_an_epoch_tells_them(tmp_path: Path) -> None:
    """At least 30 of the 40 are in the first of two batches."""
    stopping = options(epochs=2, batch_size=50, max_minutes=1e-9)
    said = told(lambda: fit(Toy(), broken_set(range(40)), RunDir(tmp_path / "run"), stopping))
    assert sum(END in text for text in said) == 1


def test_a_backprojection_by_one_process_tells_how_many_there_are() -> None:
    from dataclasses import replace

    from cryosuite.reconstruct.backproject import Accumulator

    particles = broken_set(range(25))
    rotation, noise = np.tile(np.eye(3, dtype=np.float32), (60, 1, 1)), np.ones((1, 5), np.float32)
    posed = replace(particles, rotation=rotation, noise=noise)
    said = told(lambda: Accumulator(posed).run(np.arange(60) % 2))
    assert sum(f"25 images {END}" in text for text in said) == 1


def test_images_prepared_for_an_encoder_are_known_to_be_broken() -> None:
    from cryosuite.methods.deco_images import encoder_cache

    cache: list = []
    particles = broken_set([3, 7])
    said = told(lambda: cache.append(encoder_cache(particles, "flipped", torch.ones(1, 5), 28, "robust", None)))
    assert np.flatnonzero(cache[0].bad).tolist() == [3, 7] and not cache[0].images[[3, 7]].any()
    assert any("images 3 and 7" in text or "3, 7" in text for text in said)


def test_broken_images_of_a_corpus_are_named_after_each_epoch(tmp_path: Path) -> None:
    """Two of 16 images, in batches of 8 that two processes share."""
    from cryosuite.methods.iev_data import Corpus, CorpusLoader, StackSource

    images = np.random.default_rng(0).standard_normal((16, 16, 16)).astype(np.float32)
    images[[3, 4]] = np.nan

    def work(processes: Processes) -> None:
        sources = [StackSource(ParticleSet.from_array(images, 2.0), 28, "standard", name="a")]
        loader = CorpusLoader(Corpus(sources, 16, 28), 8, processes.rank, 2, prefetch=0)

        def read() -> None:
            list(loader.epoch(0))
            loader.share_broken(processes)

        said = " ".join(told(read))
        assert not processes.first or ("3" in said and "4" in said and "2 so far" in said)

    each(tmp_path, work, 2)
