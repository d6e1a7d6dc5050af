"""train-hype's memory of other views: who is taken for whom, what is forgotten, and that training goes on exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hype_toy import blob_particles, blobs
from test_methods_hype import TINY, first_batch

from cryosuite.data.workdir import RunDir
from cryosuite.methods.hype import Hype
from cryosuite.methods.hype_views import BEGIN, OTHER_SIDE, OtherViews, even_harmonics
from cryosuite.training.checkpoint import load_state
from cryosuite.training.loop import fit
from cryosuite.training.method import Step
from cryosuite.training.options import TrainOptions

X, Y, Z = torch.eye(3)


def directions(count: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(1)), dim=1)


def test_the_likeness_is_of_the_same_molecule_and_seen_from_another_side():
    """Latents that tell the view five times as loudly as the molecule."""
    memory, axis = OtherViews(2, 3, 2), directions(600)
    molecule = torch.arange(600) % 3
    pooled = torch.stack([molecule + 5 * axis[:, 2] ** 2, 5 * axis[:, 0] * axis[:, 1]], 1)
    memory.remember(torch.zeros(400, 2, 3), pooled[:400], axis[:400])
    other, found = memory.likeness(pooled[400:], axis[400:])
    assert found.all() and int(other.max()) < 400
    assert ((axis[400:] * axis[other]).sum(1).abs() < OTHER_SIDE).all()
    assert (molecule[400:] == molecule[other]).float().mean() > 0.99
    plain = torch.cdist(pooled[400:], pooled[:400])
    plain = plain.masked_fill((axis[400:] @ axis[:400].T).abs() >= OTHER_SIDE, torch.inf).argmin(1)
    assert (molecule[400:] == molecule[plain]).float().mean() < 0.8  # what the latents as they are would say


def test_harmonics_do_not_tell_front_from_back_and_hold_all_even_ones():
    axis = directions(100)
    basis = even_harmonics(axis)
    torch.testing.assert_close(even_harmonics(-axis), basis)
    x, y, z = axis.T
    for even in (torch.ones(100), x * y, z**2, x**3 * z, (x * y * z) * y):
        assert torch.linalg.lstsq(basis, even[:, None], driver="gelsd").residuals.abs().max() < 1e-6
    odd = torch.linalg.lstsq(basis, z[:, None], driver="gelsd").solution
    assert (basis @ odd - z[:, None]).square().mean() > 0.2


def test_an_image_without_a_likeness_keeps_its_tokens():
    memory, tokens = OtherViews(2, 3, 1), torch.randn(2, 2, 3)
    axis = torch.stack([Z, -Z])  # places that nobody has filled lie on no side and are not taken
    for _ in range(2):  # with an empty memory, and one that knows this side only
        assert torch.equal(memory.blended(tokens, torch.zeros(2, 1), axis, 0.99), tokens)
    assert int(memory.seen) == 4


def test_a_step_that_went_wrong_does_not_spread():
    """NaN tokens of a step that the training leaves out are nobody's likeness."""
    memory, axis = OtherViews(2, 3, 1), directions(64)
    memory.remember(torch.full((64, 2, 3), torch.nan), torch.full((64, 1), torch.nan), axis)
    tokens = torch.randn(64, 2, 3, requires_grad=True)
    found = memory.blended(tokens, torch.zeros(64, 1), axis.flip(0), 0.99)
    assert torch.equal(found, tokens)
    found.sum().backward()
    assert torch.equal(tokens.grad, torch.ones_like(tokens))


def test_what_is_moved_and_what_learns():
    memory = OtherViews(2, 3, 1)
    memory.remember(torch.full((2, 2, 3), 2.0), torch.zeros(2, 1), torch.stack([X, Y]))
    tokens = torch.zeros(500, 2, 3, requires_grad=True)
    found = memory.blended(tokens, torch.ones(500, 1), Z.expand(500, 3), 0.5)
    way = found[:, 0, 0].detach() / 2
    assert torch.equal(found, 2 * way[:, None, None].expand(-1, 2, 3))
    moved = way > 0
    assert 200 < int(moved.sum()) < 300 and 0.4 < way[moved].mean() < 0.6 and way.max() < 1
    found.sum().backward()
    torch.testing.assert_close(tokens.grad[:, 0, 0], 1 - way)
    assert int(memory.seen) == 502 and torch.equal(memory.axis[2:502], Z.expand(500, 3))


def test_half_precision_changes_nothing_of_who_is_like_whom():
    axis, tokens = directions(300), torch.randn(300, 2, 3)
    pooled = torch.randn(300, 4) + 300 * axis[:, 2:] ** 2  # to be told apart beneath what the view adds
    found = []
    for half in (False, True):
        memory = OtherViews(2, 3, 4)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            for rows in (slice(0, 200), slice(200, 300)):
                torch.manual_seed(0)
                moved = memory.blended(tokens[rows].to(torch.bfloat16), pooled[rows], axis[rows], 0.9)
        found.append(moved)
    assert found[0].dtype == torch.bfloat16 and torch.equal(*found)


def test_the_oldest_are_forgotten():
    memory = OtherViews(2, 3, 1)
    length = len(memory.axis)
    for first in range(0, 3 * length, length // 2 + 1):
        rows = torch.arange(first, first + length // 2 + 1).float()[:, None]
        memory.remember(rows[:, :, None].expand(-1, 2, 3), rows, rows.expand(-1, 3))
    last = int(memory.seen) - 1
    assert sorted(memory.pooled[:, 0].tolist()) == list(range(last - length + 1, last + 1))
    assert torch.equal(memory.pooled.expand(-1, 3), memory.axis)
    many = torch.arange(2.0 * length)[:, None]
    memory.remember(many[:, :, None].expand(-1, 2, 3), many, many.expand(-1, 3))
    assert sorted(memory.pooled[:, 0].tolist()) == list(range(length, 2 * length))


def test_large_models_remember_fewer():
    assert len(OtherViews(40, 128, 400).axis) == 1024
    big = OtherViews(130, 768, 4)
    assert 64 < len(big.axis) < 1024 and big.tokens.nbytes <= 2**27


@pytest.fixture(scope="module")
def tiny_set():
    return blob_particles([blobs(16, 0), blobs(16, 1)], 48, noise=0.3)[0]


def test_tokens_are_moved_once_the_training_has_begun(tiny_set):
    method = Hype(replace(TINY, other_views=0.9))
    batch = first_batch(tiny_set)
    torch.manual_seed(0)
    model = method.build(tiny_set)
    told = []
    condition = model.condition
    model.condition = lambda tokens: (told.append(tokens.detach()), condition(tokens))[1]
    for fraction in (0, BEGIN - 0.01, BEGIN):
        method.loss(model, batch, Step(round(100 * fraction), 100))
    own = model.tokens(model.prepare(batch)[1], batch)
    assert torch.equal(told[0], own) and torch.equal(told[1], own)
    changed = (told[2] - own).abs().amax((1, 2)) > 1e-3
    assert 0.6 < changed.float().mean() < 1
    assert int(model.other_views.seen) == 3 * len(batch.index)


def test_the_memory_is_part_of_checkpoints_and_not_of_the_weights(tiny_set, tmp_path):
    """A training that stops and goes on ends with what it would have ended with."""
    method = Hype(replace(TINY, other_views=0.7))
    how = {"batch_size": 16, "precision": "32", "accelerator": "cpu", "lr": 1e-3, "seed": 3}
    run, options = RunDir(tmp_path / "parts"), TrainOptions(epochs=4, **how)
    whole = fit(method, tiny_set, RunDir(tmp_path / "whole"), options).model
    state = load_state(RunDir(tmp_path / "whole").weights(4), "weights")["model_state_dict"]
    assert not [name for name in state if name.startswith("other_views")]
    assert int(whole.other_views.seen) == 4 * len(tiny_set)
    for part in range(2):
        fit(method, tiny_set, run, replace(options, max_minutes=1e-9), resume=part > 0)
    again = fit(method, tiny_set, run, options, resume=True).model
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
