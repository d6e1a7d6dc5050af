"""A search for poses from nothing shared by several processes: what one finds, decided alike in all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hype_toy import blob_particles, blobs
from test_data_processes import each

from cryosuite.data.processes import Processes
from cryosuite.errors import InputError
from cryosuite.reconstruct import abinitio, abinitio_restarts, abinitio_starts
from cryosuite.reconstruct import abinitio_em as em
from cryosuite.reconstruct.abinitio import AbInitio, AbInitioOptions

OPTIONS = AbInitioOptions(
    starts=2, iterations=3, batch=30, settle=1, radius=(2, 3), rounds=((4, True), (6, False)), seed=1
)


def searched(particles, options: AbInitioOptions, processes: Processes | None = None) -> AbInitio:
    engine = AbInitio(particles, options) if processes is None else AbInitio(particles, options, processes=processes)
    while not engine.done:
        engine.advance()
    return engine


@pytest.mark.parametrize(("classes", "coarse"), [(1, 7), (1, 2), (2, 2)])
def test_three_processes_find_what_one_finds(
    classes: int, coarse: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starts, rounds and classes anew; some processes have no image to read for the starts, or in the last unit.

    Beyond the coarse radius images carry their shifts along.
    """
    monkeypatch.setattr(abinitio, "CHUNK", 25)  # 4.4 of them
    monkeypatch.setattr(abinitio, "REPEATS", 1)
    monkeypatch.setattr(abinitio_starts, "COARSE", coarse)
    for name, value in (("STARTS", 1), ("FEWEST", 10)):
        monkeypatch.setattr(abinitio_restarts, name, value)
    for name, value in (("iterations", 2), ("settle", 1), ("batch", 30), ("radius", (2, 3))):
        monkeypatch.setitem(abinitio_starts.ONE, name, value)
    particles, _ = blob_particles([blobs(16, 3, 8), blobs(16, 11, 3)][:classes], 110, noise=0.3)
    options = replace(OPTIONS, classes=classes)
    alone = searched(particles, options)

    def work(processes: Processes) -> None:
        engine = searched(particles, options, processes)
        found, whole = engine.found, alone.found
        for name in ("rotation", "shift", "label", "score", "margin"):  # the same bits in all of them, and in one
            first, *others = processes.everyone(lambda name=name: getattr(found, name))
            assert all(np.array_equal(first, other) for other in others), name
            assert np.array_equal(first, getattr(whole, name)), name
        stages = [[record["stage"] for record in one.state["history"]] for one in (engine, alone)]
        assert stages[0] == stages[1] and engine.position == engine.total == alone.total

    each(tmp_path, work)


def test_an_image_that_one_cannot_read_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abinitio, "CHUNK", 25)
    particles, _ = blob_particles([blobs(16, 3, 8)], 110, noise=0.3)

    def work(processes: Processes) -> None:
        engine = AbInitio(particles, OPTIONS, processes=processes)
        read = engine.loader.batch

        def unreadable(rows: np.ndarray):
            if processes.rank == 2 and len(rows) == 25:
                raise InputError("the file became shorter")
            return read(rows)

        engine.loader.batch = unreadable
        with pytest.raises(InputError, match="became shorter"):
            while not engine.done:
                engine.advance()
        assert engine.starts.done  # it was in the first round

    each(tmp_path, work)


def test_parts_say_together_what_all_images_say() -> None:
    """Also a part without images."""
    generator = torch.Generator().manual_seed(0)
    grid, disc = em.make_grid(0, 0.1, 2), em.fourier.half_disc(16, 3)
    slices = torch.randn(2, len(grid), len(disc), dtype=torch.complex64, generator=generator)
    y = torch.randn(9, len(disc), dtype=torch.complex64, generator=generator)
    c = torch.randn(9, len(disc), generator=generator)
    whole = em.expect(slices, y, c, grid, disc, 2.0, torch.zeros(2))
    cuts = (slice(0, 4), slice(4, 4), slice(4, 9))
    parts = em.together([em.expect(slices, y[cut], c[cut], grid, disc, 2.0, torch.zeros(2)) for cut in cuts])
    for name, value in vars(whole).items():
        assert torch.allclose(getattr(parts, name), value, atol=1e-4), name
