"""Sums of many classes from one pass: they equal those of single backprojections, in memory and spilled."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import reconstruct_toy as toy

from cryosuite.errors import FileError, InputError
from cryosuite.formats.scratch import claim_scratch
from cryosuite.kernels import slices
from cryosuite.reconstruct import class_sums
from cryosuite.reconstruct.backproject import reconstruct
from cryosuite.reconstruct.class_sums import ClassSums, accumulate, accumulator_bytes, class_order
from cryosuite.reconstruct.solve import solve
from cryosuite.reconstruct.weights import ClassWeights

N, BOX = 60, 16


@pytest.fixture(scope="module")
def images():
    return toy.particles(N, BOX, noise=0.5, shifts=1.0)


def test_hard_classes_equal_single_backprojections(images):
    labels = np.arange(N) % 3
    labels[:5] = -1
    with accumulate(images, ClassWeights.from_labels(labels)) as sums:
        for k in range(3):
            alone = reconstruct(images, rows=np.nonzero(labels == k)[0])
            torch.testing.assert_close(solve(sums.joint(k)), alone.map)
            for h, half in enumerate((alone.half_a, alone.half_b)):
                torch.testing.assert_close(solve(sums.load(k, h)), half)
            assert sums.counts[k].tolist() == [alone.count_a, alone.count_b]
        assert sums.pixel_size == toy.PIXEL


def test_soft_shares_are_weighted_sums(images):
    p = np.random.default_rng(0).dirichlet([1, 1], N).astype(np.float32)
    half = images.half_sets()
    sums = accumulate(images, ClassWeights.from_dense(p, cut=0))
    for k in (0, 1):
        for h in (0, 1):
            rows = np.nonzero(half == h)[0]
            alone = accumulate(images, ClassWeights.from_labels(np.where(half == h, 0, -1)), half).load(0, h)
            weighted = reconstruct(images, rows=rows, weights=p[:, k], halves=False)
            torch.testing.assert_close(solve(sums.load(k, h)), weighted.map, rtol=1e-4, atol=1e-4)
            assert sums.load(k, h).data[..., 2].sum() < alone.data[..., 2].sum()
    # shares of a particle sum to one, so the sums of all classes are those of the whole set
    whole = accumulate(images, ClassWeights.from_labels(np.zeros(N, int)))
    for h in (0, 1):
        both = sums.load(0, h).data + sums.load(1, h).data
        torch.testing.assert_close(both, whole.load(0, h).data, rtol=1e-4, atol=1e-2)


def test_spilled_sums_equal_those_in_memory_and_leave_nothing_behind(images, tmp_path):
    weights = ClassWeights.from_dense(np.random.default_rng(1).dirichlet(np.full(5, 0.2), N))
    kept = accumulate(images, weights)
    small = 2.5 * 2 * accumulator_bytes(BOX) / 2**30  # room for two classes
    os.close(claim_scratch(class_sums.SCRATCH, tmp_path)[1])  # as a run leaves it that was killed
    spilled = accumulate(images, weights, memory_gib=small, scratch=tmp_path)
    assert spilled.kept == {} and len(list(tmp_path.glob("*/*.npy"))) == 10 and len(list(tmp_path.iterdir())) == 1
    for k in range(5):
        for h in (0, 1):
            torch.testing.assert_close(spilled.load(k, h).data, kept.load(k, h).data)
    spilled.close()
    assert not list(tmp_path.iterdir())


def test_one_or_two_threads_give_the_same_sums(images):
    weights = ClassWeights.from_dense(np.random.default_rng(2).dirichlet(np.full(3, 0.5), N))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(accumulate(images, weights).load(1, 0).data)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_images_come_class_by_class_within_stretches_of_the_stack(monkeypatch):
    labels = np.array([1, 0, -1, 1, 0, 1, 0, 0])
    weights = ClassWeights.from_labels(labels)
    np.testing.assert_array_equal(class_order(weights, BOX), [1, 4, 6, 7, 0, 3, 5])
    monkeypatch.setattr(class_sums, "STRETCH_BYTES", 4 * 4 * BOX**2)  # four images
    np.testing.assert_array_equal(class_order(weights, BOX), [1, 4, 0, 3, 6, 7, 5])


def test_wrong_sizes_and_empty_shares_are_refused(images):
    with pytest.raises(InputError, match="10 rows of class shares for 60 particles"):
        accumulate(images, ClassWeights.from_labels(np.zeros(10, int)))
    with pytest.raises(InputError, match="no particle has a share"):
        accumulate(images, ClassWeights.from_labels(np.full(N, -1), 2))


def test_a_class_without_particles_has_empty_sums(images):
    sums = accumulate(images, ClassWeights.from_labels(np.zeros(N, int), 2))
    assert sums.counts[1].sum() == 0 and float(sums.load(1, 0).data.abs().sum()) == 0


def test_a_scratch_disk_that_fails_is_no_input_to_be_forgiven(tmp_path):
    """deco-classify goes on without maps that its input does not allow, but never because a disk was full."""
    sums = ClassSums(1, BOX, toy.PIXEL, np.ones((1, 2)), BOX // 2, scratch=tmp_path / "gone")
    with pytest.raises(FileError, match="cannot write the sums of 1 classes"):
        sums.store(0, 0, slices.new_accumulator(BOX), spill=True)
