"""The report on predicted poses: what is free is fitted, what is chance is measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cryosuite.errors import InputError
from cryosuite.kernels.rotations import expmap, random_rotations
from cryosuite.metrics.poses import MIRROR, in_plane, pose_report

N = 1000


@pytest.fixture(scope="module")
def truth() -> tuple[np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    return random_rotations(N, generator).double().numpy(), 0.05 * torch.randn(N, 2, generator=generator).numpy()


def noisy(rotation: np.ndarray, degrees: float, seed: int = 1) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(len(rotation), 3, generator=generator, dtype=torch.float64) * np.deg2rad(degrees) / 1.538
    return expmap(vectors).numpy() @ rotation


def test_poses_that_mean_what_they_say(truth) -> None:
    """Five degrees of noise in the true frame: raw and aligned agree, nothing is mirrored."""
    rotation, shift = truth
    report = pose_report(noisy(rotation, 5.0), rotation, shift, shift, 64)
    assert report.raw["median_deg"] == pytest.approx(5.0, abs=0.4)
    assert report.aligned["median_deg"] == pytest.approx(5.0, abs=0.4) and not report.mirrored
    assert report.raw["shift_median_px"] == 0
    # sin(angle / 2) is |R - R'| / sqrt 8: the published measure
    assert report.raw["frobenius_mean"] == pytest.approx(np.sqrt(2) * np.deg2rad(report.raw["mean_deg"]), rel=0.01)


def test_frame_hand_and_origin_are_fitted_with_outliers(truth) -> None:
    """Another frame, hand and origin, and a fifth of the particles anywhere: the rest is found right."""
    rotation, shift = truth
    frame = random_rotations(1, torch.Generator().manual_seed(3))[0].double().numpy()
    found = MIRROR @ noisy(rotation, 4.0) @ frame @ MIRROR
    found[::6] = random_rotations(len(found[::6]), torch.Generator().manual_seed(4)).double().numpy()
    origin = np.array([0.03, -0.02, 0.01])
    moved = shift + rotation[:, :2] @ origin
    report = pose_report(found, rotation, moved, shift, 64)
    assert report.mirrored
    assert report.raw["median_deg"] > 60 and report.aligned["median_deg"] < 6
    assert report.aligned["under_10_deg"] > 0.75
    assert report.raw["shift_median_px"] > 1 and report.aligned["shift_median_px"] < 1e-6


def test_chance_is_what_random_rotations_give(truth) -> None:
    """Uniform rotations: mean |R - R'| 2.40, mean angle 126.5, median 132 degrees; fitted 129 (FASTAR's numbers)."""
    rotation, shift = truth
    report = pose_report(noisy(rotation, 5.0), rotation, shift, shift, 64)
    assert report.chance_raw["frobenius_mean"] == pytest.approx(16 * np.sqrt(2) / (3 * np.pi), abs=0.04)
    assert report.chance_raw["mean_deg"] == pytest.approx(126.5, abs=2)
    assert report.chance_raw["median_deg"] == pytest.approx(132.2, abs=2.5)
    assert 125 < report.chance_aligned["median_deg"] < 131
    # few particles: the fit alone takes much away
    few = pose_report(rotation[:8], rotation[:8], shift[:8], shift[:8], 64)
    assert few.chance_aligned["median_deg"] < 120


def test_preferred_views_are_no_merit(truth) -> None:
    """All views within a cone, in-plane angle known: shuffled predictions are as good as the views are alike."""
    rotation, shift = truth
    cone = noisy(np.broadcast_to(np.eye(3), (N, 3, 3)).copy(), 20.0)
    report = pose_report(noisy(cone, 60.0, 7), cone, shift, shift, 64)
    assert report.chance_raw["median_deg"] < 80


def test_symmetry_mates_count_as_right(truth) -> None:
    """A molecule with a twofold axis: half of the answers are turned by 180 degrees about it."""
    rotation, shift = truth
    mates = np.stack([np.eye(3), np.diag([-1.0, -1.0, 1.0])])
    found = noisy(rotation, 3.0)
    found[::2] = found[::2] @ mates[1]
    without = pose_report(found, rotation, shift, shift, 64)
    report = pose_report(found, rotation, shift, shift, 64, mates=mates)
    assert report.raw["median_deg"] < 4 < 30 < without.raw["mean_deg"]


def test_confidence_deciles(truth) -> None:
    """The least confident first."""
    rotation, shift = truth
    found = noisy(rotation, 2.0)
    confidence = np.linspace(0, 1, N)
    found[:100] = noisy(rotation[:100], 120.0)
    report = pose_report(found, rotation, shift, shift, 64, confidence)
    assert len(report.deciles) == 10
    assert report.deciles[0]["median_deg"] > 40 > 5 > report.deciles[9]["median_deg"]
    assert report.deciles[0]["confidence"] < report.deciles[9]["confidence"]


def test_in_plane_part() -> None:
    """A turn of the image about its axis by 30 degrees."""
    rotation = random_rotations(5, torch.Generator().manual_seed(1)).double().numpy()
    turn = expmap(torch.tensor([[0.0, 0.0, np.deg2rad(30.0)]], dtype=torch.float64)).numpy()[0]
    assert np.allclose(in_plane(turn @ rotation, rotation), 30.0, atol=1e-6)


def test_sets_that_do_not_match(truth) -> None:
    rotation, shift = truth
    with pytest.raises(InputError, match="cannot be compared"):
        pose_report(rotation[:10], rotation, shift[:10], shift, 64)
    with pytest.raises(InputError, match="cannot be compared"):
        pose_report(rotation, rotation, shift[:10], shift, 64)
