"""Half sets of particles whose refinement made none: fixed, balanced, and unrelated to the order of the rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cryosuite.data.open import open_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.data.preprocess import PreprocessOptions, preprocess
from cryosuite.data.rows import random_halves
from cryosuite.formats.star import read_star, write_star


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


def test_copies_of_an_image_stay_together_after_preprocess(golden, tmp_path):
    """The work folder gives each copy a slice of its own: without their identity the halves would share images."""
    blocks = read_star(golden / "relion/particles.star")
    table = blocks["particles"].drop(columns="rlnRandomSubset")
    blocks["particles"] = pd.concat([table.iloc[:40], table.iloc[:40]], ignore_index=True)
    write_star(tmp_path / "twice.star", blocks)
    source = open_particles(tmp_path / "twice.star", datadir=golden / "relion")
    preprocess(source, tmp_path / "w", PreprocessOptions(32))
    preprocess(open_particles(tmp_path / "w"), tmp_path / "again", PreprocessOptions(16))
    for folder in ("w", "again"):
        work = open_particles(tmp_path / folder)
        half = work.half_sets()
        assert np.array_equal(half[:40], half[40:]) and half.sum() == 40
        assert np.array_equal(half, source.half_sets())
        assert len(np.unique(work.images.identity())) == 40


def test_particles_of_one_half_set_only_get_new_ones(golden):
    whole = open_particles(golden / "relion/particles.star")
    with pytest.warns(UserWarning, match="of one half set of the refinement: new half sets are made"):
        some = open_particles(golden / "relion/particles.star", ind=np.flatnonzero(whole.half == 1))
    assert some.half is None and abs(2 * some.half_sets().sum() - len(some)) <= 1
