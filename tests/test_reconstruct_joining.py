"""Which classes are one: by what they share, and for pairs that share with nobody else by what they share when hot."""

import numpy as np
import pytest

from cryosuite.reconstruct.joining import (
    PAIRS_AT,
    joined_groups,
    lonely_pairs,
    nearest_pairs,
    overlap_groups,
    overlaps,
    together,
)
from cryosuite.reconstruct.weights import ClassWeights


def shares(*parts: tuple[float, ...]) -> ClassWeights:
    """20 images for each row of shares."""
    return ClassWeights.from_dense(np.repeat(np.array(parts, np.float32), 20, 0), 0.0)


def never(p: ClassWeights, temperature: float) -> ClassWeights:
    raise AssertionError("nothing is to be tried again")


def test_overlap_is_measured_against_the_smaller_code():
    p = np.zeros((100, 4))
    p[:40, 0], p[:40, 1] = 0.5, 0.5  # twins
    p[40:99, 2] = 1
    p[99, 2:] = 0.9, 0.1  # a code with a tenth of an image is no twin of the one that has the rest
    assert overlap_groups(ClassWeights.from_dense(p, 0.0)).tolist() == [0, 0, 1, 2]


def test_pairs_are_joined_by_how_much_they_share():
    """Codes 0 and 1 share everything, 2 and 3 a half, 4 nothing."""
    p = np.zeros((40, 5), np.float32)
    p[:10, :2], p[10:20, 2], p[20:30, 3], p[30:, 4] = 0.5, 1, 1, 1
    p[15:25, 2:4] = 0.5
    p = ClassWeights.from_dense(p)
    assert overlap_groups(p).tolist() == [0, 0, 1, 2, 3]
    assert overlap_groups(p, 3).tolist() == [0, 0, 1, 1, 2]


HALF_SHARED = shares((0.8, 0.2, 0, 0), (0.2, 0.8, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))


def test_a_pair_alone_is_tried_hotter_and_joined_where_it_flows_together():
    assert overlaps(HALF_SHARED)[0, 1] == pytest.approx(0.32 / 0.68)
    assert lonely_pairs(HALF_SHARED) == [(0, 1)]
    asked = []

    def together(p, temperature):
        asked.append(temperature)
        return shares((0.5, 0.5, 0, 0), (0.5, 0.5, 0, 0), (0, 0, 0.5, 0.5), (0, 0, 0.5, 0.5))

    # 2 and 3 flow together as well, but they were no pair before: two states
    assert joined_groups(HALF_SHARED, together).tolist() == [0, 0, 1, 2]
    assert asked == [PAIRS_AT]
    assert joined_groups(HALF_SHARED, lambda p, temperature: p).tolist() == [0, 1, 2, 3]


def test_relatives_are_left_as_they_are():
    """Three classes in a chain share as much with each other as twins do: they are states of one molecule."""
    chain = shares((0.8, 0.2, 0, 0), (0.2, 0.6, 0.2, 0), (0, 0.2, 0.8, 0), (0, 0, 0, 1))
    assert overlaps(chain)[0, 1] > 0.25 and lonely_pairs(chain) == []
    assert joined_groups(chain, never).tolist() == [0, 1, 2, 3]


def test_a_pair_is_alone_once_its_twin_has_joined_it():
    """0 and 1 are one at once; what is left of them shares images with 2 only."""
    p = shares((0.4, 0.4, 0.2), (0.4, 0.4, 0.2), (0.1, 0.1, 0.8), (0.1, 0.1, 0.8))
    assert lonely_pairs(p) == []
    groups = joined_groups(p, lambda left, temperature: ClassWeights.from_dense(np.full((80, 2), 0.5, np.float32)))
    assert groups.tolist() == [0, 0, 0]


def test_a_wanted_number_of_classes_is_not_tried_again():
    assert joined_groups(HALF_SHARED, never, 3).tolist() == [0, 0, 1, 2]


def points(states: list[int], distance: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points in 200 dimensions, noise 1, whose states lie ``distance`` from the next; state of each."""
    generator = np.random.default_rng(seed)
    state = np.repeat(np.arange(len(states)), states)
    centres = np.zeros((len(states), 200))
    centres[np.arange(len(states)), np.arange(len(states))] = distance / np.sqrt(2)
    return centres[state] + generator.normal(size=(len(state), 200)), state


def scorer(values: np.ndarray):
    """`together`'s score where the map of a class is the mean of its points in the other half set."""
    half = np.arange(len(values)) % 2

    def score(p: ClassWeights) -> tuple[np.ndarray, np.ndarray]:
        labels, k = p.labels(), p.n_classes
        logits = np.zeros((len(values), k))
        for h in (0, 1):
            means = np.stack([values[(labels == j) & (half != h)].mean(0) for j in range(k)])
            logits[half == h] = -0.5 * ((values[half == h, None] - means) ** 2).sum(2)
        logits += np.log(p.usage() / p.usage().sum())
        table = np.stack([logits[labels == j].mean(0) for j in range(k)])
        return np.logaddexp.reduce(logits, 1), table

    return score


def chosen(values: np.ndarray, labels: np.ndarray) -> ClassWeights:
    """Shares once each point has taken the class it is likelier in, some times: what settling does."""
    half = np.arange(len(values)) % 2
    for _ in range(3):
        found = labels.copy()
        for h in (0, 1):
            means = np.stack([values[(labels == j) & (half != h)].mean(0) for j in range(labels.max() + 1)])
            rows = half == h
            found[rows] = ((values[rows, None] - means) ** 2).sum(2).argmin(1)
        labels = found
    return ClassWeights.from_labels(labels, int(labels.max()) + 1)


@pytest.mark.parametrize("seed", range(5))
def test_twins_that_chose_a_difference_of_noise_are_likelier_together_and_states_are_not(seed: int):
    values, state = points([100, 50, 50], 8.0, seed)
    parted = state + 1
    parted[:50] = 0  # the first state in two: its points have picked sides by what their noise has in common
    p = chosen(values, parted)
    assert min(p.usage()) > 10, "the twins must not have become one by themselves"
    groups = together(p, scorer(values))
    assert groups[0] == groups[1] and len(set(groups.tolist())) == 3
    assert np.array_equal(np.unique(groups), np.arange(3))


def test_nothing_is_joined_where_all_classes_are_states():
    values, state = points([60, 60, 60, 60], 8.0)
    assert together(ClassWeights.from_labels(state), scorer(values)).tolist() == [0, 1, 2, 3]
    assert together(ClassWeights.from_labels(np.zeros(240, np.int64)), scorer(values)).tolist() == [0]


def test_pairs_to_try_are_the_nearest_once_each_and_neither_far_ones_nor_those_without_images():
    table = np.full((6, 6), -100.0)
    np.fill_diagonal(table, 0.0)
    table[0, 1], table[1, 0], table[2, 1], table[3, 2] = -1.0, -2.0, -0.5, -3.0
    table[5], table[:, 5] = np.nan, np.nan
    assert nearest_pairs(table, set()) == [(1, 2)]  # 0 and 3 are nearest to classes that are taken, 4 is far
    assert nearest_pairs(table, {(1, 2)}) == [(0, 1), (2, 3)]
    assert nearest_pairs(table, {(0, 1), (1, 2), (2, 3)}) == []
