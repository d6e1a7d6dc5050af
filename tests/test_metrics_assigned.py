"""Maps scored by whom they were given to, states that have a class of their own, and the classifier that knows all."""

from __future__ import annotations

import numpy as np
import pytest
import reconstruct_toy as toy
import torch

from cryosuite.errors import InputError
from cryosuite.metrics.assigned import score_assigned, states_found
from cryosuite.metrics.fsc import auc_maximum
from cryosuite.reconstruct.classify import map_likelihoods, most_likely

BOX = 24
OTHER = toy.CENTRES[:, [1, 2, 0]]  # another molecule of the same parts
MAPS = {0: toy.volume(BOX), 1: toy.volume(BOX, OTHER)}


def test_right_maps_score_the_maximum_and_wrong_ones_count_by_their_images():
    labels = np.array([0, 0, 0, 0, 1, 1])
    right = score_assigned(MAPS.__getitem__, labels, labels, MAPS.__getitem__, 5.0, torch.ones(BOX, BOX, BOX))
    assert right.per_state("masked") == pytest.approx(auc_maximum(BOX), abs=1e-5)
    swapped = score_assigned(lambda k: MAPS[1 - k], labels, labels, MAPS.__getitem__, 5.0)
    one_wrong = score_assigned(MAPS.__getitem__, np.array([1, 0, 0, 0, 1, 1]), labels, MAPS.__getitem__, 5.0)
    most, wrong = auc_maximum(BOX), swapped.auc["unmasked"][0]
    assert wrong < 0.8 * most
    assert one_wrong.auc["unmasked"][0] == pytest.approx((3 * most + wrong) / 4, abs=1e-5)
    assert one_wrong.per_image("unmasked") == pytest.approx((5 * most + wrong) / 6, abs=1e-5)
    assert one_wrong.counts.tolist() == [4, 2]
    with pytest.raises(InputError, match="one per particle"):
        score_assigned(MAPS.__getitem__, labels[1:], labels, MAPS.__getitem__, 5.0)


def test_a_state_is_found_when_its_class_is_its_own():
    labels = np.repeat([0, 1, 2], 10)
    assert states_found(labels, labels + 5) == 3
    split = np.concatenate([np.repeat([7, 8], 5), np.repeat([1, 2], 10)])  # two classes for one state
    assert states_found(labels, split) == 3
    fused = np.concatenate([np.zeros(11), np.ones(9), np.full(10, 2)])
    assert states_found(labels, fused) == 3
    assert states_found(labels, np.concatenate([np.zeros(20), np.ones(10)])) == 2
    assert states_found(labels, np.zeros(30)) == 1


def test_the_classifier_that_knows_the_maps_is_right_and_its_likelihood_is_the_sum_over_pixels():
    first, second = toy.particles(40, BOX, 2.0, 0), toy.particles(40, BOX, 2.0, 0, centres=OTHER)
    maps = torch.stack([MAPS[0], MAPS[1]])
    assert (most_likely(first, maps) == 0).mean() > 0.95
    assert (most_likely(second, maps) == 1).mean() > 0.95
    clean = toy.particles(5, BOX, 0.0, 1)
    found = map_likelihoods(clean, torch.stack([MAPS[0], 2 * MAPS[0], 0 * MAPS[0]]))
    # <x, s> - |s|^2 / 2 with s = x: |x|^2 / 2; with s = 2 x: 0
    power = (clean.read(slice(None)) ** 2).sum((1, 2)) * BOX**2 / 2
    assert found[:, 0] == pytest.approx(power, rel=0.05)
    assert found[:, 1] == pytest.approx(np.zeros(5), abs=0.1 * float(power.max()))
    assert found[:, 2] == pytest.approx(np.zeros(5), abs=1e-6)
    with pytest.raises(InputError, match="do not fit"):
        most_likely(clean, torch.zeros(2, 8, 8, 8))
