"""Latents: components, clusters, mixtures and maps find what was put in, and bad days end well."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from cryosuite.analysis import latents
from cryosuite.errors import InputError, UserNotice


def blobs(groups: int = 6, each: int = 60, zdim: int = 8, spread: float = 0.3, seed: int = 0):
    """Latents (groups * each, zdim) around random centres, and their true labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(groups), each)
    z = 4.0 * rng.normal(size=(groups, zdim))[labels] + spread * rng.normal(size=(groups * each, zdim))
    return z.astype(np.float32), labels


def test_pca_axes_are_orthonormal_and_sorted_and_rebuild_the_latents() -> None:
    z, _ = blobs()
    model = latents.pca(z)
    np.testing.assert_allclose(model.components @ model.components.T, np.eye(8), atol=1e-5)
    assert (np.diff(model.ratio) <= 1e-12).all()
    assert model.ratio.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(model.mean + model.scores @ model.components, z, atol=1e-4)


def test_pca_finds_the_direction_of_a_line() -> None:
    rng = np.random.default_rng(1)
    direction = np.array([1.0, 2.0, -2.0]) / 3
    z = rng.normal(size=(500, 1)) * 5 * direction + 0.01 * rng.normal(size=(500, 3)) + 7
    model = latents.pca(z)
    assert abs(model.components[0] @ direction) == pytest.approx(1.0, abs=1e-4)
    assert np.abs(model.components[0]).max() == model.components[0].max(), "the largest loading is positive"


def test_traversal_walks_up_one_component_only() -> None:
    z, _ = blobs()
    model = latents.pca(z)
    path = latents.traversal(model, 1, 7)
    scores = (path - model.mean) @ model.components.T
    assert (np.diff(scores[:, 1]) > 0).all()
    np.testing.assert_allclose(np.delete(scores, 1, axis=1), 0, atol=1e-4)
    np.testing.assert_allclose(scores[[0, -1], 1], np.percentile(model.scores[:, 1], [5, 95]), rtol=1e-4)
    np.testing.assert_allclose(np.diff(scores[:, 1], 2), 0, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_kmeans_finds_the_groups_and_centres_are_particles(seed: int) -> None:
    z, truth = blobs(seed=seed)
    found = latents.kmeans(z, 6, seed)
    assert adjusted_rand_score(truth, found.labels) > 0.99
    assert found.labels.min() == 0 and found.count == 6 and found.sizes.sum() == len(z)
    np.testing.assert_array_equal(found.centers, z[found.centers_index])
    np.testing.assert_array_equal(found.labels[found.centers_index], np.arange(6))


def test_kmeans_gives_the_same_for_the_same_seed() -> None:
    z, _ = blobs()
    first, second = latents.kmeans(z, 4, 3), latents.kmeans(z, 4, 3)
    np.testing.assert_array_equal(first.labels, second.labels)


def test_a_centre_is_one_of_its_group() -> None:
    """A tight group inside a wide one has its mean: the wide group's centre is a particle of its own."""
    rng = np.random.default_rng(0)
    z = np.concatenate([6 * rng.normal(size=(600, 3)), 0.4 * rng.normal(size=(600, 3))]).astype(np.float32)
    found = latents.mixture(z, latents.pca(z), 2)
    assert found.sizes.min() > 500
    np.testing.assert_array_equal(found.labels[found.centers_index], [0, 1])
    for number, row in enumerate(found.centers_index):
        own = z[found.labels == number]
        away = np.linalg.norm(own - own.mean(axis=0), axis=1)
        assert np.linalg.norm(z[row] - own.mean(axis=0)) == pytest.approx(away.min(), rel=1e-5)


def test_neighbouring_numbers_are_alike() -> None:
    """Groups strung along a line are numbered along it."""
    z = np.repeat(np.arange(8.0)[:, None] * 10, 20, axis=0) + np.random.default_rng(0).normal(size=(160, 1)) * 0.1
    centers = latents.kmeans(np.hstack([z, 0 * z]), 8).centers[:, 0]
    assert (np.diff(centers) > 0).all() or (np.diff(centers) < 0).all()


def test_mixture_chooses_the_number_of_groups_and_is_sure_of_them() -> None:
    z, truth = blobs(groups=5, each=150)
    found = latents.mixture(z, latents.pca(z))
    assert found is not None
    assert found.count == 5 and found.asked == 5
    assert adjusted_rand_score(truth, found.labels) > 0.99
    assert found.confidence.min() > 0.9
    assert found.scores[5] == min(found.scores.values())


def test_mixture_of_a_given_number() -> None:
    z, _ = blobs(groups=5, each=100)
    assert latents.mixture(z, latents.pca(z), 3).asked == 3
    with pytest.warns(UserNotice, match="--gmm 50: there are 12 different latents"):
        assert latents.mixture(z[:12], latents.pca(z[:12]), 50).asked == 12


@pytest.mark.parametrize("limit", [1000, pytest.param(150, marks=pytest.mark.slow)])
def test_umap_keeps_groups_together_and_places_the_rest(limit: int) -> None:
    z, truth = blobs(groups=4, each=50)
    placed = latents.umap(z, limit=limit)
    assert placed.shape == (200, 2) and np.isfinite(placed).all()
    centers = np.stack([placed[truth == k].mean(axis=0) for k in range(4)])
    nearest = np.linalg.norm(placed[:, None] - centers, axis=-1).argmin(axis=1)
    assert (nearest == truth).mean() > 0.95


def test_rows_that_are_no_numbers_are_named_and_left_out() -> None:
    z, _ = blobs()
    z[3, 2], z[11, 0] = np.nan, np.inf
    with pytest.warns(UserNotice, match="2 of 360.*rows 3, 11"):
        rows = latents.finite_rows(z)
    assert len(rows) == 358 and not {3, 11} & set(rows)


def test_no_number_at_all_is_an_error() -> None:
    with pytest.raises(InputError, match="none of the 4"):
        latents.finite_rows(np.full((4, 2), np.nan))
    with pytest.raises(InputError, match="shape"):
        latents.finite_rows(np.zeros((0, 3)))


@pytest.mark.filterwarnings("always::cryosuite.errors.UserNotice")
@pytest.mark.parametrize("count", [1, 3, 40])
def test_equal_latents_make_one_cluster_with_a_notice(count: int) -> None:
    z = np.full((count, 4), 0.1, np.float32)
    model = latents.pca(z)
    assert not model.spread
    if count > 1:
        with pytest.warns(UserNotice, match="1 different"):
            assert latents.kmeans(z, 20).count == 1
    with pytest.warns(UserNotice, match="UMAP is left out"):
        assert latents.umap(z) is None
    with pytest.warns(UserNotice, match="mixture is left out"):
        assert latents.mixture(z, model) is None


def test_fewer_particles_than_clusters() -> None:
    z = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    with pytest.warns(UserNotice, match="5 clusters"):
        found = latents.kmeans(z, 20)
    assert sorted(found.labels) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [4, 9])
def test_umap_of_a_handful(count: int) -> None:
    z = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)
    assert np.isfinite(latents.umap(z)).all()
