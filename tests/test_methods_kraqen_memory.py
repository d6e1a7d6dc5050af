"""The voxel field of train-kraqen where memory runs out: fewer images or maps at a time, said once, the same result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hype_toy import blob_particles, blobs

from cryosuite.errors import InputError, UserNotice
from cryosuite.kernels import class_slices as kernel
from cryosuite.methods.kraqen_codes import embed
from cryosuite.methods.kraqen_cross import CrossEM
from cryosuite.methods.kraqen_maps import Wiener
from cryosuite.methods.kraqen_options import KraqenOptions
from cryosuite.methods.kraqen_voxel import VoxelEM
from cryosuite.reconstruct.held_out import settle
from cryosuite.reconstruct.weights import ClassWeights

OOM = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"
OPTIONS = KraqenOptions(n_codes=4, iterations=4, start_images=100, images_per_code=40)
KERNELS = ("class_sums", "class_gram", "insert_classes")
ENGINES = {"local": CrossEM, "wiener": VoxelEM}


@pytest.fixture(scope="module")
def toy():
    """120 images of two molecules and their labels."""
    return blob_particles([blobs(16, 1), blobs(16, 2)], 120, noise=1.0, seed=4)


class Small:
    """A GPU that takes so many images and grids of so many maps at a time, once ``full`` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, images: int = 10**9, maps: int = 10**9) -> None:
        self.full, self.seen = True, []
        for name in KERNELS:
            whole = getattr(kernel, name)

            def work(grid, values, *rest, whole=whole, **more):
                self.check(len(values) > images)
                self.seen.append(len(values))
                return whole(grid, values, *rest, **more)

            monkeypatch.setattr(kernel, name, work)
        for name, count in (("class_transforms", len), ("new_class_accumulator", int)):
            whole = getattr(kernel, name)

            def make(what, *rest, whole=whole, count=count, **more):
                self.check(count(what) > maps)
                return whole(what, *rest, **more)

            monkeypatch.setattr(kernel, name, make)

    def check(self, much: bool) -> None:
        """Fail where it is too much."""
        if self.full and much:
            raise torch.OutOfMemoryError(OOM)


def run(toy, name: str, **more):
    return ENGINES[name](toy[0], OPTIONS.changed(m_step=name), **more).run(progress=False)


@pytest.mark.parametrize("name", ENGINES)
def test_fewer_images_at_a_time_give_the_same_bits(toy, name, monkeypatch):
    whole = run(toy, name)
    gpu = Small(monkeypatch, images=40)
    with pytest.warns(UserNotice, match="out of memory with .* images at a time: going on with") as told:
        found = run(toy, name)
    assert torch.equal(found.codes, whole.codes) and np.array_equal(found.p.data, whole.p.data)
    assert found.engine.images.chunk <= 40 < 2 * found.engine.images.chunk + 2
    assert max(gpu.seen) == found.engine.images.chunk
    said = [str(one.message) for one in told if "out of memory" in str(one.message)]
    assert 1 <= len(said) <= 2 and len(set(said)) == len(said), "the smaller number is remembered"
    z, _ = embed(found)
    assert np.isfinite(z).all()


@pytest.mark.parametrize("name", ENGINES)
def test_fewer_maps_at_a_time_give_the_same_maps(toy, name, monkeypatch):
    whole = run(toy, name)
    Small(monkeypatch, maps=2)
    with pytest.warns(UserNotice, match="out of memory with 4 maps at a time: going on with 2") as told:
        found = run(toy, name)
    assert sum("out of memory" in str(one.message) for one in told) == 1
    tolerance = 1e-4 if name == "wiener" else 2e-2  # sums on disk know the noise to one common factor
    assert float((found.codes - whole.codes).abs().max()) < tolerance * float(whole.codes.abs().max())
    assert (found.p.labels() == whole.p.labels()).mean() > 0.98


def test_memory_that_ends_in_the_middle_costs_that_iteration_alone(toy, monkeypatch):
    whole = run(toy, "wiener")
    gpu = Small(monkeypatch, images=40)
    gpu.full = False

    def told(state, record):
        gpu.full = state.iteration == 2

    with pytest.warns(UserNotice, match="images at a time"):
        found = VoxelEM(toy[0], OPTIONS.changed(m_step="wiener")).run(progress=False, on_iteration=told)
    assert torch.equal(found.codes, whole.codes)
    assert [line["iteration"] for line in found.history] == [line["iteration"] for line in whole.history]


def test_maps_that_the_gpu_has_no_room_for_are_made_elsewhere(toy, monkeypatch):
    whole = run(toy, "wiener")
    make, failed = Wiener.map, []

    def map_once(self, sums):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError(OOM)
        return make(self, sums)

    monkeypatch.setattr(Wiener, "map", map_once)
    with pytest.warns(UserNotice, match="made on the processor"):
        assert torch.equal(run(toy, "wiener").codes, whole.codes)


def test_latents_whose_maps_do_not_fit_together_are_made_elsewhere(toy, monkeypatch):
    """An image needs all components at once: a run that went on with fewer maps at a time comes to its end."""
    found = run(toy, "wiener")
    whole, engine = embed(found)[0], found.engine

    def small(volumes, r_max):
        raise torch.OutOfMemoryError(OOM)

    monkeypatch.setattr(engine.work, "transforms", small)
    with pytest.warns(UserNotice, match="out of memory with 4 maps at a time"):
        assert np.array_equal(embed(found)[0], whole)
    assert np.array_equal(embed(found)[0], whole), "with the smaller number that is remembered"


def test_settling_goes_on_with_less(toy, monkeypatch):
    start = ClassWeights.from_labels(toy[1])
    whole = settle(toy[0], start)
    Small(monkeypatch, images=40)
    with pytest.warns(UserNotice, match="images at a time"):
        found = settle(toy[0], start)
    assert np.array_equal(found.p.labels(), whole.p.labels()) and np.array_equal(found.groups, whole.groups)


def test_memory_for_nothing_is_one_sentence(toy, monkeypatch):
    Small(monkeypatch, maps=0)
    with pytest.warns(UserNotice), pytest.raises(InputError, match="not enough memory for one of the maps") as said:
        run(toy, "wiener")
    assert ("--accelerator cpu" in str(said.value)) == torch.cuda.is_available(), "of use on a GPU only"
