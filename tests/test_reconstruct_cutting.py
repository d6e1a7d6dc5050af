"""Classes cut in two: states that share a class are parted, single ones stay whole, and what was asked for is kept."""

from __future__ import annotations

import numpy as np
import pytest
from hype_toy import blob_particles, blobs
from sklearn.metrics import adjusted_rand_score

from cryosuite.data.particles import ParticleSet
from cryosuite.reconstruct import cutting
from cryosuite.reconstruct.cutting import flown_together, halved, in_two, settle_and_cut
from cryosuite.reconstruct.held_out import Settled
from cryosuite.reconstruct.weights import ClassWeights


@pytest.fixture(scope="module")
def toy():
    """480 noisy images of four molecules and their labels."""
    return blob_particles([blobs(24, seed) for seed in (1, 2, 3, 4)], 480, noise=4.0, seed=4)


@pytest.mark.parametrize("alike", [[0, 0, 1, 1], [0, 1, 1, 1], [0, 1, 2, 3]])
def test_states_that_share_a_class_are_parted(toy, alike: list[int]) -> None:
    """From two classes or from four: the images tell the four, and no more."""
    particles, labels = toy
    found = settle_and_cut(particles, np.array(alike)[labels], 0)
    assert found.max() == 3 and adjusted_rand_score(labels, found) > 0.95


def test_only_where_the_number_is_not_given(toy) -> None:
    assert settle_and_cut(toy[0], toy[1] // 2, 0, count=2).max() == 1


def test_never_into_classes_of_a_few_particles(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four classes would have 120 particles each: where 121 are the least, two stay two."""
    particles, labels = toy
    monkeypatch.setattr(cutting, "LEAST", 121)
    assert settle_and_cut(particles, labels // 2, 0).max() == 1


def test_unreadable_images_stay_with_their_class(toy) -> None:
    particles, labels = toy
    images = particles.read(np.arange(480)).copy()
    images[7] = np.nan
    kept = {name: getattr(particles, name) for name in ("rotation", "shift", "ctf", "noise")}
    found = settle_and_cut(ParticleSet.from_array(images, 6.0, **kept), labels, 0)
    assert found[7] == np.bincount(found[labels == labels[7]]).argmax()


def test_halves_of_a_class() -> None:
    """Of those that shall be cut, each into halves of its own, the same ones every time."""
    labels = np.arange(3).repeat(200)
    found = in_two(labels, 3, np.array([0, 2]), 0)
    assert (found[200:400] == 1).all() and np.bincount(found).min() > 70
    assert set(found[:200]) == {0, 3} and set(found[400:]) == {2, 4}
    assert (found == in_two(labels, 3, np.array([0, 2]), 0)).all()


def test_which_classes_are_cut_again() -> None:
    """Of classes 0, 1, 2, 3, of which all but 1 were cut: 0 came back whole, 2 as two, and half of 3 went with 1."""
    cut = np.array([0, 2, 3])
    groups = np.array([0, 1, 2, 3, 0, 4, 1])
    assert halved(groups, 4, cut).tolist() == [1, 2, 3, 4]
    assert np.flatnonzero(flown_together(groups, 4, cut)).tolist() == [1]
    given_up = np.array([0, 1, 2, 3, 0, -1, 4])
    assert halved(given_up, 4, cut).tolist() == [2, 3, 4]
    assert not flown_together(given_up, 4, cut).any()


def test_a_cut_in_which_classes_flow_together_is_tried_again(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempts join everything: others with other halves follow, and the likeliest is kept."""
    particles, labels = toy
    honest, begun = cutting.settle, []

    def settle(particles, start, **options):
        begun.append(start.labels())
        result = honest(particles, start, **options)
        if len(begun) in (2, 3):
            one = ClassWeights.from_labels(np.zeros(480, np.int64), 1)
            return Settled(one, np.zeros_like(result.groups), [-1e9])
        return result

    monkeypatch.setattr(cutting, "settle", settle)
    found = settle_and_cut(particles, labels // 2, 0)
    assert found.max() == 3 and adjusted_rand_score(labels, found) > 0.95
    assert len({labels.tobytes() for labels in begun}) == len(begun)  # other halves every time
