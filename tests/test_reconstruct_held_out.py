"""Classes settled by held-out scores: wrong labels are mended, twins joined, and what was asked for is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hype_toy import blob_particles, blobs
from sklearn.metrics import adjusted_rand_score

from cryosuite.errors import InputError
from cryosuite.reconstruct.class_images import ClusterImages
from cryosuite.reconstruct.class_work import ClassWork
from cryosuite.reconstruct.held_out import Settled, _Settling, settle, usable
from cryosuite.reconstruct.weights import ClassWeights


@pytest.fixture(scope="module")
def toy():
    """300 noisy images of three molecules and their labels."""
    return blob_particles([blobs(24, seed) for seed in (1, 2, 3)], 300, noise=4.0, seed=4)


def settled(toy, start: np.ndarray, **options) -> Settled:
    return settle(toy[0], ClassWeights.from_labels(start), **options)


def test_wrong_and_split_classes_are_mended(toy):
    """Half of the labels are wrong and one molecule has two classes: three pure classes come out."""
    particles, labels = toy
    generator = np.random.default_rng(3)
    start = np.where(generator.random(300) < 0.3, generator.integers(0, 4, 300), labels)
    start = np.where((start == 2) & (generator.random(300) < 0.5), 3, start)
    found = settled(toy, start)
    assert adjusted_rand_score(labels, found.p.labels()) > 0.98 > adjusted_rand_score(labels, start) + 0.3
    assert found.p.n_classes == 3
    assert found.groups[2] == found.groups[3]
    assert np.allclose(found.p.matrix.sum(1), 1, atol=1e-5)


def test_as_many_classes_as_asked_for_are_left(toy):
    labels = toy[1]
    start = labels + 3 * np.random.default_rng(1).integers(0, 2, 300)
    assert settled(toy, start, count=2).p.n_classes == 2
    assert settled(toy, start, count=3).p.n_classes == 3


def test_nothing_changes_where_everything_is_right(toy):
    found = settled(toy, toy[1])
    assert (found.p.labels() != toy[1]).mean() < 0.03
    assert np.array_equal(found.groups, [0, 1, 2])


def test_threads_do_not_change_the_result(toy):
    start = np.random.default_rng(0).integers(0, 4, 300)
    one = settled(toy, start).p
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = settled(toy, start).p
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(a, b) for a, b in zip(one.to_arrays(), two.to_arrays(), strict=True))


def test_scores_are_the_likelihood_of_an_iteration_and_each_class_fits_its_own_images_best(toy):
    """A fifth class has too few images for a map: it fits nothing, and takes no part in the likelihood."""
    particles, labels = toy
    start = labels.copy()
    start[:3] = 4
    p = ClassWeights.from_labels(start, 5)
    engine = _Settling(ClassWork(ClusterImages(particles, 24), "cpu"), np.asarray(particles.half_sets()), None)
    own, table = engine.scored(p)
    engine.run(p, 1)
    assert own.mean() == pytest.approx(engine.likelihood[-1], rel=1e-9)
    assert (table[:3, :3].argmax(1) == np.arange(3)).all()
    assert np.isnan(table[3:]).all() and np.isnan(table[:, 3:]).all()


def test_one_half_set_alone_is_refused(toy):
    with pytest.raises(InputError, match="half sets"):
        settle(toy[0], ClassWeights.from_labels(toy[1]), half=np.zeros(300, np.int8))


def test_small_classes_are_given_up_before_they_mislead():
    assert usable(np.array([[9, 9], [3, 9], [0, 0], [5, 4]])).tolist() == [0, 3]
    assert usable(np.array([[1, 1], [0, 2]])).tolist() == [0]
