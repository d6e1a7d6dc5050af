"""Half sets of particles whose refinement made none: fixed, balanced, and unrelated to the order of the rows."""

from __future__ import annotations

import numpy as np

from cryosuite.data.particles import ParticleSet
from cryosuite.data.rows import random_halves


def test_half_sets_follow_no_order_of_the_rows():
    """Molecules that take turns in a stack must not end up in halves of their own, whatever the period."""
    count = 10_001
    particles = ParticleSet.from_array(np.zeros((count, 2, 2), np.float32), 1.0)
    half = particles.half_sets()
    assert abs(int(half.sum()) * 2 - count) == 1
    assert np.array_equal(half, particles.half_sets())
    for period in (2, 3, 4, 16):
        for turn in range(period):
            own = half[turn::period]
            assert abs(own.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(own))
    assert abs((half[1:] == half[:-1]).mean() - 0.5) < 0.02
    turned = particles.subset(np.arange(count)[::-1])
    assert np.array_equal(turned.half_sets(), half[::-1])


def test_a_subset_keeps_nearly_all_of_its_half_sets():
    particles = ParticleSet.from_array(np.zeros((4000, 2, 2), np.float32), 1.0)
    rows = np.arange(0, 4000, 2)
    own = particles.subset(rows).half_sets()
    assert own.sum() == 1000
    assert (own == particles.half_sets()[rows]).mean() > 0.95


def test_half_sets_of_a_refinement_stay():
    half = (np.arange(6) < 3).astype(np.int8)
    assert np.array_equal(ParticleSet.from_array(np.zeros((6, 2, 2), np.float32), 1.0, half=half).half_sets(), half)


def test_equal_numbers_share_a_half():
    keys = np.repeat(np.arange(50), 3)
    half = random_halves(keys).reshape(50, 3)
    assert (half == half[:, :1]).all() and half[:, 0].sum() == 25
    assert random_halves(np.zeros(0, np.int64)).shape == (0,)
