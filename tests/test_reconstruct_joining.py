"""Which classes are one: by what they share, and for pairs that share with nobody else by what they share when hot."""

import numpy as np
import pytest

from cryosuite.reconstruct.joining import PAIRS_AT, joined_groups, lonely_pairs, overlap_groups, overlaps
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
