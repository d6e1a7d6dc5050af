"""The voxel field of train-kraqen in several processes: the same maps, shares and losses as in one."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import each
from hype_toy import blob_particles, blobs

from cryosuite.data.images import ArrayImages
from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, UserNotice
from cryosuite.formats.mrc import read_map
from cryosuite.formats.pickles import read_latent, safe_load
from cryosuite.kernels import class_slices as kernel
from cryosuite.methods import kraqen_run
from cryosuite.methods.kraqen_codes import finish
from cryosuite.methods.kraqen_cross import CrossEM
from cryosuite.methods.kraqen_halves import shares_apart
from cryosuite.methods.kraqen_options import KraqenOptions
from cryosuite.methods.kraqen_voxel import VoxelEM, VoxelResult
from cryosuite.reconstruct.weights import ClassWeights
from cryosuite.training import checkpoint, logs
from cryosuite.training.options import TrainOptions

slow = pytest.mark.slow
COUNT = 200
FEW_GRIDS = ("local", 1e-3), ("wiener", 2.5e-4)  # GiB
ENGINES = {"local": CrossEM, "wiener": VoxelEM}
OPTIONS = KraqenOptions(n_codes=4, iterations=6, start_images=100, images_per_code=20)


@pytest.fixture(scope="module")
def toy():
    """200 images of three molecules and their labels."""
    return blob_particles([blobs(16, seed) for seed in (1, 2, 3)], COUNT, noise=1.0, seed=4)


def engine(particles: ParticleSet, name: str, processes: Processes = ALONE, **more) -> VoxelEM:
    return ENGINES[name](particles, OPTIONS.changed(m_step=name), processes=processes, **more)


def alike(one: VoxelResult, two: VoxelResult) -> None:
    """Maps to 1e-4, the same labels, losses to 1e-4."""
    assert float((one.codes - two.codes).abs().max()) < 1e-4 * float(one.codes.abs().max())
    np.testing.assert_array_equal(one.p.labels(), two.p.labels())
    np.testing.assert_allclose(one.p.dense(), two.p.dense(), atol=2e-3)
    losses = [[line["loss"] for line in found.history] for found in (one, two)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert [line["split"] for line in one.history] == [line["split"] for line in two.history]


@pytest.mark.parametrize(
    "name, memory_gib",
    [
        ("local", 8.0),
        ("wiener", 8.0),
        pytest.param("local", 1e-3, marks=slow),
        pytest.param("wiener", 2.5e-4, marks=slow),
    ],
)
def test_three_processes_find_what_one_finds(toy, tmp_path: Path, name: str, memory_gib: float) -> None:
    """Also where the grids of the codes do not fit the memory together."""
    alone = engine(toy[0], name, memory_gib=memory_gib).run(progress=False)
    assert alone.p.n_classes == 4 and len(alone.history) > 2
    seen: list[int] = []

    def work(processes: Processes) -> None:
        mine = engine(toy[0], name, processes, memory_gib=memory_gib)
        read = mine.images.chunks
        mine.images.chunks = lambda rows, r_max: seen.extend(rows.tolist()) or read(rows, r_max)
        alike(alone, mine.run(progress=False))
        assert 0 < len(set(seen)) < 0.45 * COUNT, "each process looks at its own images"

    each(tmp_path, work)


def test_the_finish_of_a_network_is_shared(toy, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    p = ClassWeights.from_dense(0.4 * np.eye(3)[toy[1]] + 0.6 * generator.dirichlet(np.ones(3), COUNT))
    options = OPTIONS.changed(em_finish=3)
    alone, maps = finish(toy[0], p, options), finish(toy[0], p, options.changed(em_finish=0, m_step="wiener"))

    def work(processes: Processes) -> None:
        alike(alone, finish(toy[0], p, options, processes=processes))
        found = finish(toy[0], p, options.changed(em_finish=0, m_step="wiener"), processes=processes)
        assert torch.allclose(found.codes, maps.codes, atol=1e-4 * float(maps.codes.abs().max()))

    each(tmp_path, work, 2)


@slow
@pytest.mark.parametrize("merge", ["overlap", "likelihood", "correlation"])
def test_twins_latents_and_files_are_those_of_one_process(toy, tmp_path: Path, merge: str, monkeypatch) -> None:
    options = OPTIONS.changed(merge=merge, n_codes=6)
    run = RunDir(tmp_path / "one")
    alone = kraqen_run.train(toy[0], run, options, TrainOptions())
    assert len(alone.codes) >= 3

    def work(processes: Processes) -> None:
        monkeypatch.setattr(kraqen_run, "join_processes", lambda *_: processes)
        if processes.rank == 1:
            for place in (kraqen_run, checkpoint, logs):
                for name in ("write_map", "write_pickle", "write_text", "save_state", "append_text"):
                    monkeypatch.setattr(place, name, None, raising=False)  # only the first one writes
        found = kraqen_run.train(toy[0], RunDir(tmp_path / "two"), options, TrainOptions())
        assert [code.labelled for code in found.codes] == [code.labelled for code in alone.codes]
        assert found.merged == alone.merged

    each(tmp_path, work, 2)
    other = RunDir(tmp_path / "two")
    names = [sorted(path.name for path in folder.path.iterdir()) for folder in (run, other)]
    assert names[0] == names[1] and "vol_000.mrc" in names[0]
    np.testing.assert_array_equal(safe_load(run.labels(6))[0], safe_load(other.labels(6))[0])
    z, twin = (read_latent(folder.z(6))[0] for folder in (run, other))
    np.testing.assert_allclose(z, twin, atol=1e-3 * np.abs(z).max())
    for code in alone.codes:
        a, b = (read_map(folder.volume(code.number)).data for folder in (run, other))
        assert np.abs(a - b).max() < 1e-3 * np.abs(a).max()


def test_half_sets_are_held_apart_together(toy, tmp_path: Path) -> None:
    start = ClassWeights.from_labels(toy[1], 3)
    alone = shares_apart(toy[0], start, OPTIONS)

    def work(processes: Processes) -> None:
        found = shares_apart(toy[0], start, OPTIONS, processes=processes)
        np.testing.assert_allclose(found.dense(), alone.dense(), atol=2e-3)

    each(tmp_path, work, 2)


# --- stopping and going on


class Enough(Exception):  # noqa: N818
    """The end of a run that is cut short."""


def until(iteration: int) -> Callable:
    def stop(state, record):
        if state.iteration == iteration:
            raise Enough

    return stop


@pytest.mark.parametrize("name", ["wiener", pytest.param("local", marks=slow)])
@pytest.mark.parametrize("before, after", [(2, 2), (2, 1), (1, 2)])
def test_a_run_goes_on_with_any_number_of_processes(toy, tmp_path: Path, name: str, before: int, after: int) -> None:
    """With the same number bit for bit."""

    def start(processes: Processes) -> None:
        with pytest.raises(Enough):
            engine(toy[0], name, processes).run(run=RunDir(tmp_path), progress=False, on_iteration=until(3))

    def go_on(processes: Processes) -> None:
        found = engine(toy[0], name, processes).run(run=RunDir(tmp_path), resume=True, progress=False)
        whole = engine(toy[0], name, processes).run(progress=False)
        alike(whole, found)
        assert after != before or torch.equal(whole.codes, found.codes)

    for number, (work, count) in enumerate(((start, before), (go_on, after))):
        folder = tmp_path / str(number)
        folder.mkdir()
        each(folder, work, count)
    lines = [json.loads(line) for line in RunDir(tmp_path).metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)) and len(lines) > 3


def test_a_signal_to_one_process_stops_all_after_the_same_iteration(toy, tmp_path: Path) -> None:
    def work(processes: Processes) -> None:
        def ask(state, record):
            if state.iteration == 2 and processes.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        found = engine(toy[0], "wiener", processes).run(run=RunDir(tmp_path), progress=False, on_iteration=ask)
        assert (found.stopped, found.exit_code, len(found.history)) == ("SIGTERM", 85, 2)

    each(tmp_path, work, 2)


@slow
@pytest.mark.parametrize("where", ["twins", "latents", "maps"])
def test_a_signal_after_the_search_is_no_end(toy, tmp_path: Path, monkeypatch, where: str) -> None:
    """The run stops, and --resume comes to the end of an undisturbed one."""
    whole = kraqen_run.train(toy[0], RunDir(tmp_path / "whole"), OPTIONS, TrainOptions())
    parts = {"twins": (CrossEM, "_iterate"), "latents": (kraqen_run, "embed"), "maps": (kraqen_run, "solve")}
    owner, name = parts[where]
    before, asked = getattr(owner, name), []

    def interrupted(*given):
        if not asked and (where != "twins" or given[3]):  # the first iteration on everything
            asked.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            asked.append(where == "twins")
        return before(*given)

    monkeypatch.setattr(owner, name, interrupted)
    run = RunDir(tmp_path / "run")
    found = kraqen_run.train(toy[0], run, OPTIONS, TrainOptions())
    assert (found.stopped, found.exit_code) == ("SIGTERM", 85) and not run.epochs()
    assert asked == [True, True][: 2 if where == "twins" else 1]  # after the search at once
    found = kraqen_run.train(toy[0], run, OPTIONS, TrainOptions(), resume=True)
    assert not found.stopped and found.codes == whole.codes


# --- mistakes


def test_a_mistake_of_one_process_reaches_all(toy, tmp_path: Path) -> None:
    def work(processes: Processes) -> None:
        mine = engine(toy[0], "local", processes, cache_gib=0.0)
        whole = mine.images._read
        reads: list[int] = []

        def read(rows: np.ndarray):
            reads.append(len(rows))
            if processes.rank == 1 and len(reads) > 3:
                raise InputError("particles.mrcs: the file became shorter while it was read")
            return whole(rows)

        mine.images._read = read
        with pytest.raises(InputError, match="became shorter"):
            mine.run(progress=False)

    each(tmp_path, work)


def test_memory_that_ends_in_one_process_halves_in_all(toy, tmp_path: Path, monkeypatch) -> None:
    alone = engine(toy[0], "wiener").run(progress=False)

    def work(processes: Processes) -> None:
        if processes.rank == 1:
            whole = kernel.new_class_accumulator

            def small(count: int, *rest, **more):
                if count > 2:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return whole(count, *rest, **more)

            monkeypatch.setattr(kernel, "new_class_accumulator", small)
        mine = engine(toy[0], "wiener", processes)
        with pytest.warns(UserNotice, match="out of memory with 4 maps at a time: going on with 2"):
            alike(alone, mine.run(progress=False))
        assert processes.everyone(lambda: len(mine._groups(8))) == [len(mine._groups(8))] * 2 != [1, 1]

    each(tmp_path, work, 2)


def test_a_broken_image_is_left_out_by_all(toy, tmp_path: Path) -> None:
    images = toy[0].read(np.arange(COUNT)).copy()
    images[[5, 190], 3, 3] = np.nan
    broken = replace(toy[0], images=ArrayImages(images))
    with pytest.warns(UserNotice, match="2 of 200 images were left out"):
        alone = engine(broken, "local").run(progress=False)

    def work(processes: Processes) -> None:
        with pytest.warns(UserNotice, match="2 of 200 images were left out"):
            found = engine(broken, "local", processes).run(progress=False)
        alike(alone, found)
        assert np.flatnonzero(found.engine.images.bad).tolist() == [5, 190]
        assert found.p.labels()[[5, 190]].tolist() == [-1, -1]

    each(tmp_path, work)
