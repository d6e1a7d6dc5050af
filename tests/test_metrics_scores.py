"""Scores against a truth, clustering, pose errors, shapes: what each must say in cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryosuite.errors import InputError
from cryosuite.metrics import clustering, oracle, poses, shape, truth
from cryosuite.metrics.fsc import FscTable, auc_maximum

D = 16


def blob(x: float, y: float = 0.0, sigma: float = 2.0) -> torch.Tensor:
    axis = torch.arange(D) - D // 2
    square = (axis[None, None] - x) ** 2 + (axis[None, :, None] - y) ** 2 + axis[:, None, None] ** 2
    return torch.exp(-square / (2 * sigma**2))


MAPS = {0: blob(-3.0), 1: blob(3.0), 2: blob(0.0, 3.0)}


def read(state: int) -> torch.Tensor:
    return MAPS[state]


def decode(z: np.ndarray) -> np.ndarray:
    """A perfect decoder: z is the state."""
    return np.stack([MAPS[int(round(float(value)))].numpy() for value in z[:, 0]])


def test_perfect_and_inverted_decoders():
    labels = np.array([0, 1, 2] * 10)
    z = labels[:, None].astype(np.float32)
    rows = truth.sample_rows(labels, 9, "random-per-class", 0)
    scores = truth.per_image(decode, z, labels, read, 3.0, rows, torch.ones(D, D, D))
    assert scores.headline("unmasked") == pytest.approx(auc_maximum(D), abs=1e-5)
    assert scores.summary()["auc_masked_normalised"] == pytest.approx(1.0, abs=1e-4)
    assert scores.inverted() == 0
    wrong = truth.per_image(lambda z: -decode(z), z, labels, read, 3.0, rows)
    assert wrong.headline() == pytest.approx(-auc_maximum(D), abs=1e-5)
    assert wrong.inverted() == len(rows)
    absolute = truth.per_image(lambda z: -decode(z), z, labels, read, 3.0, rows, compat=True)
    assert absolute.headline() > 0.99 * auc_maximum(D)  # the benchmark's absolute FSC hides it


def test_per_conformation_takes_the_particle_nearest_to_the_mean():
    labels = np.array([0, 0, 0, 1, 1, 1])
    z = np.array([[0.0], [0.4], [0.5], [1.0], [1.2], [1.3]])
    assert truth.class_representatives(z, labels).tolist() == [1, 4]
    scores = truth.per_conformation(decode, z, labels, read, 3.0)
    assert scores.labels.tolist() == [0, 1]


def test_compat_sampler_is_the_first_of_each_state_when_they_are_equal():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 20))
    rows = truth.sample_rows(labels, 10, "compat")
    assert labels[rows].tolist() == list(range(10))
    assert rows.tolist() == [int(np.nonzero(labels == state)[0][0]) for state in range(10)]
    uneven = np.repeat([0, 1], [250, 103])  # N // count gives more than count unless it divides N
    assert len(truth.sample_rows(uneven, 100, "compat")) == len(range(0, 353, 3))
    each = truth.sample_rows(uneven, 20, "random-per-class", 1)
    assert np.bincount(uneven[each]).tolist() == [10, 10]
    with pytest.raises(InputError, match="sampler"):
        truth.sample_rows(labels, 10, "other")


def test_oracle_floor_ceiling_and_gain(tmp_path):
    consensus = sum(MAPS.values())
    found = oracle.oracle_scores(consensus, MAPS, read, 3.0)
    assert found.ceiling("unmasked") == pytest.approx(auc_maximum(D), abs=1e-5)
    assert found.floor("unmasked") < found.ceiling("unmasked")
    assert found.ceiling("unmasked", np.array([0, 0, 1])) == pytest.approx(auc_maximum(D), abs=1e-5)
    half_way = (found.floor("unmasked") + found.ceiling("unmasked")) / 2
    assert truth.gain(half_way, found.floor("unmasked"), found.ceiling("unmasked")) == pytest.approx(0.5)
    cache, settings = tmp_path / "oracle.json", {"n": 3}
    assert oracle.read_cached(cache, settings) is None
    for before in (None, b"", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"other": 1}'):
        cache.write_text(oracle.add_to_cache(before, settings, found))
    again = oracle.read_cached(cache, settings)
    assert np.allclose(again.consensus["unmasked"], found.consensus["unmasked"])
    assert oracle.read_cached(cache, {"n": 4}) is None


def test_clusters_that_are_there_are_found():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 60)
    # cosine kNN sees directions: clusters in different directions from the origin
    z = np.eye(4)[labels] * 5 + generator.normal(0, 0.3, (240, 4))
    scores = clustering.cluster_scores(z, labels, seeds=2, n_init=3, gmm_n_init=2)
    assert scores.kmeans_ari.min() == scores.gmm_ari.min() == 1.0
    assert scores.knn_accuracy == 1.0
    nothing = clustering.cluster_scores(generator.normal(size=(240, 4)), labels, seeds=2, n_init=3, gmm_n_init=2)
    assert abs(nothing.kmeans_ari.mean()) < 0.05
    assert 0.1 < nothing.knn_accuracy < 0.45
    with pytest.raises(InputError, match="not finite"):
        clustering.knn_accuracy(np.full((4, 2), np.nan), np.zeros(4))


def test_knn_leaves_the_particle_itself_out_and_weighs_by_similarity():
    z = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [0.7, 0.7]], float)
    labels = np.array([0, 0, 1, 1, 2])
    assert clustering.knn_accuracy(z, labels, k=1) == pytest.approx(4 / 5)  # the lone one never finds its class


@pytest.mark.parametrize("mirrored", [False, True])
def test_pose_errors_up_to_frame_hand_and_origin(mirrored):
    generator = np.random.default_rng(0)
    true = Rotation.random(200, random_state=1).as_matrix()
    G = Rotation.random(random_state=2).as_matrix()
    noise = Rotation.from_rotvec(generator.normal(0, np.deg2rad(1), (200, 3))).as_matrix()
    found = noise @ true @ G
    if mirrored:
        found = poses.MIRROR @ found @ poses.MIRROR
    origin = np.array([0.02, -0.01, 0.03])
    shift = generator.uniform(-0.05, 0.05, (200, 2))
    errors = poses.pose_errors(found, true, shift + true[:, :2] @ origin, shift)
    assert errors.mirrored is mirrored
    assert np.median(errors.degrees) < 3
    assert np.allclose(errors.origin, origin)
    assert errors.shift.max() < 1e-9
    assert np.median(poses.pose_errors(found, true, align=False).degrees) > 20
    single = true.astype(np.float32)  # as files have them: the angle must not drown in the rounding of its cosine
    assert poses.pose_errors(single, single).degrees.max() < 1e-4


def test_shapes_at_matched_volume():
    a = blob(0.0).numpy()
    inside, target = shape.matched_shapes(7 * a - 2, a)  # scale and offset do not matter
    assert shape.volume_overlap(inside, target) == 1.0
    assert shape.chamfer_distance(inside, target, 3.0) == 0.0
    moved, target = shape.matched_shapes(blob(2.0).numpy(), a)
    assert moved.sum() == target.sum()
    assert 0.2 < shape.volume_overlap(moved, target) < 0.9
    assert 0 < shape.chamfer_distance(moved, target, 3.0) < 2 * 3.0


def test_equal_latents_are_one_heap_for_the_mixture():
    found = clustering.gmm_labels(np.full((40, 2), 1e3) + 1e-9 * np.arange(80).reshape(40, 2), 2, n_init=1)
    assert found.shape == (40,)
    assert clustering.knn_accuracy(np.ones((40, 2)), np.zeros(40, int)) == 1.0


def test_knn_does_not_depend_on_how_rows_are_cut(monkeypatch):
    generator = np.random.default_rng(4)
    labels = generator.integers(0, 4, 90)
    z = np.eye(4)[labels] + 0.8 * generator.standard_normal((90, 4))
    whole = clustering.knn_accuracy(z, labels)
    monkeypatch.setattr(clustering, "SIMILARITIES", 90 * 7)
    assert clustering.knn_accuracy(z, labels) == whole


def test_v_measure_compares_different_numbers_of_classes():
    states = np.repeat([0, 1], 20)
    assert clustering.v_measure(states, states) == 1.0
    assert 0.6 < clustering.v_measure(states, np.arange(40) // 10) < 0.7  # complete halves: 2 h c / (h + c) = 2/3


def test_the_cryobench_cut_off_is_that_of_the_signed_curve():
    """Its get_fsc_cutoff compares the values as they are (its area is that of the absolute curve)."""
    inverted, plain = np.array([1.0, -0.9, -0.8, 0.2, 0.1, 0, 0, 0]), np.array([1.0, 0.9, 0.8, 0.2, 0.1, 0, 0, 0])
    for curve, first in ((inverted, 1), (plain, 3)):
        table = FscTable(D, 2.0, {"unmasked": curve}, compat=True)
        assert table.resolution("unmasked", 0.5) == pytest.approx(2.0 * D / first)


def test_pose_errors_of_each_class():
    errors = poses.PoseErrors(np.array([1.0, 3.0, 10.0]), False, np.eye(3), np.array([0.1, 0.3, 0.5]))
    rows = poses.class_rows(errors, np.array([4, 4, 7]))
    assert [row["state"] for row in rows] == [4, 7]
    assert rows[0]["rotation_mean_deg"] == 2.0 and rows[1]["shift_median"] == 0.5
    with pytest.raises(InputError, match="2 states for 3"):
        poses.class_rows(errors, np.array([4, 4]))
