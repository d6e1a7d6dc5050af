"""Half sets whose classes have come to show different structures are paired anew, in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hype_toy import blob_particles, blobs
from sklearn.metrics import adjusted_rand_score

from cryosuite.methods.kraqen_cross import CrossEM
from cryosuite.methods.kraqen_options import KraqenOptions
from cryosuite.reconstruct import held_out
from cryosuite.reconstruct.class_sums import accumulate
from cryosuite.reconstruct.half_pairs import pairing, renamed, worth_it
from cryosuite.reconstruct.weights import ClassWeights

BOX, K = 16, 4
CROSSED = np.array([1, 2, 0, 3])  # a molecule is called k in half set 0 and CROSSED[k] in half set 1


def of_molecules(*seeds: int):
    """240 images of four molecules, their labels, and the labels with those of half set 1 exchanged."""
    particles, labels = blob_particles([blobs(BOX, seed) for seed in seeds], 240, noise=1.0, seed=4)
    return particles, labels, np.where(particles.half_sets() == 1, CROSSED[labels], labels)


@pytest.fixture(scope="module")
def toy():
    return of_molecules(1, 2, 3, 5)


@pytest.mark.parametrize("memory_gib", [4.0, 1e-5])
def test_an_exchange_is_found_and_undone(toy, memory_gib: float, tmp_path: Path):
    particles, labels, crossed = toy
    p = ClassWeights.from_labels(crossed)
    with (
        accumulate(particles, p, memory_gib=memory_gib, scratch=tmp_path) as sums,
        accumulate(particles, ClassWeights.from_labels(labels)) as right,
    ):
        assert bool(sums.kept) == (memory_gib > 1)  # the second time all of them lie on disk
        order = pairing(sums)
        assert order.tolist() == CROSSED.tolist()
        sums.exchange(order, 1)
        assert pairing(sums).tolist() == [0, 1, 2, 3]
        np.testing.assert_array_equal(sums.counts, right.counts)
        for k in range(K):
            for h in (0, 1):
                torch.testing.assert_close(sums.load(k, h).data, right.load(k, h).data)
        assert not list(tmp_path.rglob("*.old"))
    assert renamed(p, particles.half_sets() == 1, order).labels().tolist() == labels.tolist()


def test_soft_shares_keep_their_values_under_their_new_names():
    p = ClassWeights.from_dense(np.array([[0.7, 0.3, 0], [0.2, 0.3, 0.5], [0, 0, 1]], np.float32))
    found = renamed(p, np.array([False, True, True]), np.array([2, 0, 1]))  # what was class 2 is class 0 now
    np.testing.assert_allclose(found.dense(), [[0.7, 0.3, 0], [0.5, 0.2, 0.3], [1, 0, 0]], rtol=1e-6)
    assert all((np.diff(found.indices[a:b]) > 0).all() for a, b in zip(found.indptr, found.indptr[1:], strict=False))


def test_noise_and_empty_halves_are_left_alone(toy):
    particles, labels, _ = toy
    generator = np.random.default_rng(0)
    with accumulate(particles, ClassWeights.from_labels(generator.integers(0, K, len(labels)))) as sums:
        assert pairing(sums).tolist() == [0, 1, 2, 3]  # four times the mean of all
    alone = np.where((labels == 2) & (particles.half_sets() == 1), 3, labels)
    with accumulate(particles, ClassWeights.from_labels(alone)) as sums:
        assert pairing(sums).tolist() == [0, 1, 2, 3]


def test_only_exchanges_that_gain_are_made():
    correlation = np.array([[0.1, 0.9, 0, 0], [0.8, 0.1, 0, 0], [0, 0, 0.5, 0.52], [0, 0, 0.52, 0.5]])
    assert worth_it(np.array([1, 0, 3, 2]), correlation).tolist() == [1, 0, 2, 3]
    assert worth_it(np.array([0, 1, 2, 3]), correlation).tolist() == [0, 1, 2, 3]


def test_a_crossed_beginning_ends_with_halves_that_agree(monkeypatch):
    """Left to themselves two chains stay crossed, each as good as the other: nothing in the scores tells.

    Molecules as alike as those of ``toy`` find each other without help, from what all classes have in common.
    """
    particles, labels, crossed = of_molecules(6, 7, 8, 9)

    def codes() -> np.ndarray:
        engine = CrossEM(particles, KraqenOptions(n_codes=K, iterations=4, split=False))
        monkeypatch.setattr(engine, "_first", lambda start: engine.local_maps(ClassWeights.from_labels(crossed)))
        return engine.run(progress=False).p.labels()

    assert adjusted_rand_score(labels, codes()) > 0.95
    monkeypatch.setattr(held_out, "pairing", lambda sums: np.arange(sums.n_classes))
    assert adjusted_rand_score(labels, codes()) < 0.8
