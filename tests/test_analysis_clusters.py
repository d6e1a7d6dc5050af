"""Groups of latents: known groups are found, their number too, bad days, the picture of the choice."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

from cryosuite.analysis.clusters import cluster, leading_dimension, participation_ratio, plot_choice
from cryosuite.errors import InputError, UserNotice


def blobs(k: int, count: int, zdim: int = 128, seed: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Latents (count, zdim) of k groups of equal shape and their numbers; each axis has a noise of its own."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(k, size=count)
    noise = rng.normal(size=(count, zdim)) * (0.5 + rng.random(zdim))
    return (rng.normal(size=(k, zdim))[labels] + noise).astype(np.float32), labels


@pytest.mark.parametrize("how", ["gmm-direct", "kmeans"])
def test_sixteen_groups_in_128_dimensions(how):
    z, truth = blobs(16, 1600)
    found = cluster(z, how, 16)
    assert found.k == 16 and found.bic == {}
    assert adjusted_rand_score(truth, found.labels) > 0.98
    assert adjusted_mutual_info_score(truth, found.labels) > 0.98
    assert np.array_equal(found.centres, z[found.centres_index])
    assert np.array_equal(found.labels[found.centres_index], np.arange(16)), "a centre is a member of its group"


@pytest.mark.slow
def test_groups_of_a_single_number():
    """Scaled to length 1, as longer latents are, there would be its sign alone."""
    truth = np.arange(200) % 5
    z = (truth + 0.05 * np.random.default_rng(0).normal(size=200)).astype(np.float32)[:, None]
    assert adjusted_rand_score(truth, cluster(z, "kmeans", 5).labels) == 1


@pytest.mark.parametrize("how", ["gmm-direct", "kmeans", "gmm-umap16"])
def test_the_number_of_groups_is_found(how, tmp_path):
    z, truth = blobs(16, 1600)
    found = cluster(z, how)
    assert found.k == 16
    assert adjusted_rand_score(truth, found.labels) > 0.98
    assert found.stability[16] > 0.9
    plot_choice(tmp_path / "bic.png", found)
    assert (tmp_path / "bic.png").stat().st_size > 5000
    assert (tmp_path / "bic.csv").read_text().startswith("groups,bic,stability")


@pytest.mark.slow
def test_a_hundred_groups():
    z, truth = blobs(100, 6000)
    assert adjusted_rand_score(truth, cluster(z, "kmeans", 100).labels) > 0.93


def test_few_groups_of_unequal_shape_and_size_by_the_criterion():
    rng = np.random.default_rng(11)
    parts = [rng.normal(size=(n, 3)) * s + m for n, s, m in ((60, 0.2, 0), (240, 1.0, 5), (100, [3, 0.3, 0.3], -6))]
    found = cluster(np.concatenate(parts), "gmm-direct")
    assert found.k == 3
    assert sorted(found.sizes) == [60, 100, 240]
    assert found.bic[3] == min(found.bic.values())


def test_same_seed_same_groups():
    z, _ = blobs(5, 300, 12)
    a, b = cluster(z, "gmm-direct", 5, seed=3), cluster(z, "gmm-direct", 5, seed=3)
    assert np.array_equal(a.labels, b.labels) and np.array_equal(a.confidence, b.confidence)


def test_short_latents_need_no_umap():
    z, truth = blobs(4, 400, 16)
    found = cluster(z, "gmm-umap16", 4)
    assert found.dimensions == 16
    assert adjusted_rand_score(truth, found.labels) > 0.95


def test_dimensions_that_carry_something():
    rng = np.random.default_rng(12)
    z = rng.normal(size=(1000, 64)) * np.r_[np.full(6, 5.0), np.full(58, 0.1)]
    assert leading_dimension(z) == 6
    assert participation_ratio(z) == pytest.approx(6, rel=0.05)


def test_bad_days():
    z = np.zeros((40, 8), np.float32)
    with pytest.warns(UserNotice, match="one cluster"):
        assert cluster(z).k == 1
    z[20:] = 1
    with pytest.warns(UserNotice, match="2 different latents"):
        assert cluster(z, "kmeans", 5).k == 2
    assert cluster(z, "kmeans", 1).k == 1
    with pytest.raises(InputError, match="gmm-umap16, gmm-direct, kmeans"):
        cluster(z, "leiden")
    with pytest.raises(InputError, match="auto or a whole number"):
        cluster(z, "kmeans", 0)
    with pytest.raises(InputError, match="must be numbers"):
        cluster(z * np.nan, "kmeans")
