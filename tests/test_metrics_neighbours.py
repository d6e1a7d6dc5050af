"""Neighbours in two spaces, windows of a map, ab-initio alignment: against small dense oracles and known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryosuite.errors import InputError
from cryosuite.kernels import shells
from cryosuite.metrics.align import align_map, mirror, resample
from cryosuite.metrics.local import _window, local_fsc
from cryosuite.metrics.neighbours import information_imbalance, neighbourhood_similarity


def ranks(x: np.ndarray) -> np.ndarray:
    """Rank of each particle as a neighbour of each other one, itself 0: (N, N)."""
    distance = np.linalg.norm(x[:, None] - x[None], axis=-1)
    np.fill_diagonal(distance, -1)
    return distance.argsort(1).argsort(1)


def test_similarity_and_imbalance_equal_their_definitions():
    generator = np.random.default_rng(0)
    a = generator.standard_normal((120, 3))
    b = a[:, :2] + 0.3 * generator.standard_normal((120, 2))
    first, second = ranks(a), ranks(b)
    asked = np.arange(0, 120, 5)
    for k, value in neighbourhood_similarity(a, b, (10, 30)).items():
        same = ((first[asked] < k) & (second[asked] < k)).sum(1) / k
        assert value == pytest.approx(same.mean())
    for k, value in information_imbalance(a, b, (1, 5, 20)).items():
        near = (first >= 1) & (first <= k)
        assert value == pytest.approx(2 / 120 * second[near].mean())


def test_a_plane_knows_its_axis_but_not_the_other_way_round():
    plane = np.random.default_rng(1).uniform(size=(600, 2))
    line = plane[:, :1]
    assert information_imbalance(plane, line, (1,))[1] < 0.1
    assert information_imbalance(line, plane, (1,))[1] > 0.3
    unrelated = np.random.default_rng(2).uniform(size=(600, 2))
    assert information_imbalance(unrelated, plane, (10,))[10] == pytest.approx(1.0, abs=0.06)
    assert neighbourhood_similarity(plane, 3 * plane + 1, (60,))[60] > 0.99
    assert neighbourhood_similarity(unrelated, plane, (60,))[60] == pytest.approx(0.1, abs=0.03)


def test_equal_coordinates_and_wrong_rows():
    constant = np.ones((500, 2))
    line = np.arange(500.0)[:, None]
    assert information_imbalance(constant, line, (10,))[10] == pytest.approx(1.0, abs=0.06)  # not ordered by row
    assert list(neighbourhood_similarity(line[:40], line[:40])) == [10]
    with pytest.raises(InputError, match="same 4 or more"):
        information_imbalance(line, line[:9])
    line[3] = np.nan
    with pytest.raises(InputError, match="not finite"):
        neighbourhood_similarity(line, constant)


def molecule(size: int = 32, seed: int = 0, atoms: int = 40) -> torch.Tensor:
    """Gaussian blobs without any symmetry."""
    generator = np.random.default_rng(seed)
    axis = torch.arange(size) - size // 2
    volume = torch.zeros(size, size, size)
    for x, y, z in generator.normal(0, 1, (atoms, 3)) * (0.16 * size, 0.11 * size, 0.07 * size):
        square = (axis - x) ** 2 + (axis[:, None] - y) ** 2 + (axis[:, None, None] - z) ** 2
        volume += torch.exp(-square / 4.5)
    return volume


def test_local_fsc_equals_the_fsc_of_each_window():
    truth = molecule()
    volume = truth + 0.3 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    found = local_fsc(volume, truth, 5.0)
    box, weight = found.box_size, _window(found.box_size, 5.0)
    assert box == 10
    for row in (0, len(found.centres) // 2):
        z, y, x = found.centres[row]
        at = np.ix_(*[(c + np.arange(box) - box // 2) % 32 for c in (z, y, x)])
        cut = [torch.from_numpy(v.numpy()[at]) * weight for v in (volume, truth)]
        np.testing.assert_allclose(found.curves[row], shells.fsc(*cut).numpy(), atol=1e-5)
        expected = shells.resolution(torch.from_numpy(found.curves[row]), 0.5, box, 5.0)
        assert found.resolution(0.5)[row] == pytest.approx(expected, rel=1e-6)


def test_local_scores_see_a_lost_domain():
    axis = torch.arange(48) - 24
    arm = torch.exp(-((axis - 14) ** 2 + (axis[:, None]) ** 2 + (axis[:, None, None]) ** 2) / 8.0)
    body = molecule(48)
    perfect = local_fsc(body + arm, body + arm, 5.0).summary()
    assert perfect["local_auc_median"] == pytest.approx(1.0, abs=1e-4)
    assert perfect["local_resolution_p90_A"] == pytest.approx(10.0)
    noise = 0.02 * torch.randn(body.shape, generator=torch.Generator().manual_seed(1))
    broken = local_fsc(body + noise, body + arm, 5.0).auc()
    centres = local_fsc(body + noise, body + arm, 5.0).centres
    near_arm = np.linalg.norm(centres - [24, 24, 38], axis=1) < 3
    assert np.median(broken[near_arm]) < 0.5 < np.median(broken)
    with pytest.raises(InputError, match="empty"):
        local_fsc(body, torch.zeros_like(body), 5.0)


@pytest.mark.parametrize("hand", [pytest.param(False, marks=pytest.mark.slow), True])
def test_alignment_finds_rotation_shift_and_hand(hand):
    truth = molecule(32, 3)
    turn = Rotation.from_euler("zyz", (73, 48, -131), degrees=True).as_matrix()
    moved = resample(truth, turn, np.array([2.3, -1.4, 0.8]))
    moved = mirror(moved) if hand else moved
    found = align_map(moved, truth)
    assert found.mirrored == hand
    assert found.correlation > 0.98
    angle = np.rad2deg(Rotation.from_matrix(found.rotation @ turn).magnitude())
    assert angle < 1.5
    assert np.corrcoef(moved.flatten(), truth.flatten())[0, 1] < 0.8


def test_alignment_refuses_what_cannot_be_aligned():
    truth = molecule(16)
    with pytest.raises(InputError, match="constant"):
        align_map(torch.ones(16, 16, 16), truth)
    with pytest.raises(InputError, match="cannot be aligned"):
        align_map(torch.ones(8, 8, 8), truth)
