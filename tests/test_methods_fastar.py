"""Losses of pose prediction: what they must not depend on, and what they must."""

import pytest
import torch

from cryosuite.errors import InputError
from cryosuite.kernels.planar import mirror, relative, token_map
from cryosuite.kernels.rotations import expmap, random_rotations
from cryosuite.kernels.so3_grid import grid_rotations
from cryosuite.methods.fastar_loss import cell_loss, nearest_mate, set_loss, shift_loss, weighted
from cryosuite.methods.fastar_options import FastarOptions, preset
from cryosuite.methods.fastar_validate import pose_errors, set_errors, shuffled, verdict

SIZE, PATCH = 32, 8


def rotations(*shape: int, seed: int = 0) -> torch.Tensor:
    n = int(torch.tensor(shape).prod())
    return random_rotations(n, torch.Generator().manual_seed(seed)).view(*shape, 3, 3)


def known(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


EYE = torch.eye(3).view(1, 1, 3, 3)


class TestHands:
    truth = relative(rotations(3, 5))

    def loss(self, found: torch.Tensor, rule: str = "min") -> torch.Tensor:
        error, _ = set_loss(token_map(found, SIZE, PATCH), self.truth, known(3, 5), SIZE, PATCH, rule)
        return error

    def test_zero_at_the_truth_and_at_its_mirror_image(self):
        assert self.loss(self.truth).max() < 1e-10
        assert self.loss(mirror(self.truth)).max() < 1e-10

    def test_a_set_may_be_mirrored_a_view_may_not(self):
        mixed = self.truth.clone()
        mixed[1] = mirror(mixed[1])
        assert self.loss(mixed).max() < 1e-10
        mixed = self.truth.clone()
        mixed[:, 2] = mirror(mixed[:, 2])
        assert self.loss(mixed).mean() > 0.05

    def test_without_the_freedom_a_mirrored_set_is_wrong(self):
        assert self.loss(mirror(self.truth), "none").mean() > 0.05
        assert self.loss(self.truth, "none").max() < 1e-10

    def test_the_anchor_takes_the_hand_that_the_first_view_tells(self):
        parts = token_map(self.truth, SIZE, PATCH)
        _, other = set_loss(parts, self.truth, known(3, 5), SIZE, PATCH, "anchor")
        clear = self.truth[:, 1, 0, 2].abs() > 0.1
        assert torch.equal(other[clear], self.truth[:, 1, 0, 2][clear] < 0)
        with pytest.raises(InputError, match="--hand-loss"):
            set_loss(parts, self.truth, known(3, 5), SIZE, PATCH, "both")

    def test_the_choice_has_no_gradient_and_the_error_has(self):
        parts = tuple((0.8 * part).clone().requires_grad_() for part in token_map(self.truth, SIZE, PATCH))
        error, other = set_loss(parts, self.truth, known(3, 5), SIZE, PATCH, "min")
        assert not other.requires_grad
        error.mean().backward()
        assert all(torch.isfinite(part.grad).all() and part.grad.abs().max() > 0 for part in parts)

    def test_views_that_are_not_known_do_not_choose(self):
        found, there = mirror(self.truth), known(3, 5)
        found[:, 3:] = self.truth[:, 3:]
        there[:, 3:] = False
        _, other = set_loss(token_map(found, SIZE, PATCH), self.truth, there, SIZE, PATCH, "min")
        assert bool(other.all())


class TestSymmetry:
    turn = expmap(torch.tensor([[0.0, 0.0, torch.pi]]))
    mates = torch.cat([torch.eye(3)[None], turn])[None]  # C2 about z

    def test_a_pose_is_right_up_to_symmetry(self):
        truth = rotations(1, 6)
        found = truth.clone()
        found[0, ::2] = found[0, ::2] @ self.turn[0].T
        nearest, error = nearest_mate(token_map(found, SIZE, PATCH), truth, self.mates, SIZE, PATCH)
        assert error.max() < 1e-9 and torch.allclose(nearest, found, atol=1e-5)
        assert pose_errors(found, truth, self.mates).max() < 0.1
        assert pose_errors(found, truth, EYE)[0, ::2].min() > 10

    def test_both_mates_are_good_cells(self):
        cells, truth = grid_rotations(1), rotations(1, 4)
        both = torch.stack([truth, truth @ self.turn[0].T]).flatten(-2) @ cells.flatten(-2).T
        score = torch.deg2rad(torch.tensor(12.0)) ** -2 / 2 * both.amax(0)
        with_mates = cell_loss(score, cells, truth, self.mates, known(1, 4), 12.0)
        blind = cell_loss(score, cells, truth, EYE, known(1, 4), 12.0)
        assert with_mates.abs() < 1e-3 and blind > 0.3


class TestCells:
    def test_perfect_scores_cost_nothing_and_guessing_does(self):
        cells, truth = grid_rotations(1), rotations(2, 7)
        kappa = torch.deg2rad(torch.tensor(12.0)) ** -2
        perfect = kappa * (truth.flatten(-2) @ cells.flatten(-2).T) / 2
        arguments = (cells, truth, EYE.expand(2, 1, 3, 3), known(2, 7), 12.0)
        assert cell_loss(perfect, *arguments).abs() < 1e-4
        assert cell_loss(torch.zeros_like(perfect), *arguments) > 1

    def test_each_set_may_have_cells_of_its_own(self):
        cells, truth = rotations(2, 9, seed=1), rotations(2, 7)
        scores = torch.randn(2, 7, 9, generator=torch.Generator().manual_seed(0))
        mates = EYE.expand(2, 1, 3, 3)
        together = cell_loss(scores, cells, truth, mates, known(2, 7), 30.0)
        apart = [cell_loss(scores[k, None], cells[k], truth[k, None], mates[:1], known(1, 7), 30.0) for k in range(2)]
        assert together == pytest.approx(float(sum(apart)) / 2, abs=1e-5)


def test_only_known_views_count_and_confidence_weighs():
    error = torch.full((1, 4, 16), 0.25)
    error[0, 3] = 100.0
    there = known(1, 4)
    there[0, 3] = False
    low, high = torch.full((1, 4, 16), -10.0), torch.full((1, 4, 16), 1.0)
    assert weighted(error, low, there, False) == pytest.approx(0.25)
    assert weighted(error, low, there, True) == pytest.approx(0.5, abs=1e-3)  # C = 1: the distance
    assert weighted(error, high, there, True) > weighted(error, low, there, True)
    right = torch.full((1, 4, 16), 1e-6)
    assert weighted(right, high, there, True) < weighted(right, low, there, True)  # sure of what is right: rewarded
    assert shift_loss(torch.zeros(1, 4, 2), torch.full((1, 4, 2), 0.03), there) == pytest.approx(
        4 * 0.03 * 2**0.5, 1e-3
    )


def test_errors_beside_chance():
    truth, mates = rotations(4, 64), EYE.expand(4, 1, 3, 3)
    generator = torch.Generator().manual_seed(1)
    found = expmap(0.05 * torch.randn(256, 3, generator=generator)).view(4, 64, 3, 3) @ truth
    assert pose_errors(found, truth, mates).median() < 7
    assert 100 < pose_errors(shuffled(found, 0, generator), truth, mates).median() < 140
    assert set_errors(mirror(relative(found)), truth).median() < 12
    deal = set_errors(shuffled(found, 1, generator), truth).median()
    assert 90 < deal < 140


def test_the_verdict_goes_by_the_gates():
    def scores(easy: float, hard: float, below: float) -> dict[str, float]:
        found = {}
        for name, deg in (("phantom_snr10", easy), ("phantom_snr0.2", hard)):
            found |= {f"{name}_deg": deg, f"{name}_chance": 126.0, f"{name}_below": below, f"{name}_shift": 1.0}
        return found

    assert "G2" in verdict(scores(5, 12, 80), "target") and "good" in verdict(scores(5, 12, 80), "target")
    assert "G1" in verdict(scores(20, 70, 30), "target") and "not yet" in verdict(scores(20, 70, 30), "target")
    assert "do not use" in verdict(scores(80, 120, 2), "target")
    assert "G4" in verdict(scores(118, 125, 2), "ab-initio")
    assert "--experimental" in verdict(scores(80, 120, 2), "ab-initio")
    assert verdict({}, "target") == "not judged yet"


def test_options_say_what_is_wrong_with_them():
    for wrong in (
        {"preset": "huge"}, {"mode": "paper"}, {"views": (2, 32), "mode": "ab-initio"}, {"views": (32, 8)},
        {"snr": (0.1, 10)}, {"beads": 100}, {"ctf": 2.0}, {"shift": 0.5}, {"hand_loss": "left"}, {"grid_order": 5},
        {"mode": "ab-initio", "views": (3, 8), "map": "x.mrc"}, {"map_weight": -1.0}, {"match_deg": 0.0},
    ):  # fmt: skip
        with pytest.raises(InputError, match="--"):
            FastarOptions(**wrong)
    assert preset("micro", mode="ab-initio").options.views == (3, 32)
    assert preset("nano64").options == FastarOptions("nano64")
    again = FastarOptions.from_dict({"preset": "micro", "views": [3, 9], "of another version": 1})
    assert again.views == (3, 9)
    with pytest.raises(InputError, match="small64"):
        preset("medium")
