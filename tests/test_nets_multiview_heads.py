"""What a multi-view network says of images: maps, poses, confidence, scores of rotations, in both dialects."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from multiview_toy import SMALL, TABLE, images, model, noise
from torch.nn import functional as F

from cryosuite.kernels.planar import token_map
from cryosuite.kernels.rotations import random_rotations
from cryosuite.nets.multiview import Multiview, confidence
from cryosuite.nets.multiview_heads import DenseHead, Heads, pixel_shuffle, poses


@torch.no_grad()
def test_images_are_compared_each_by_itself() -> None:
    net = model()
    tokens = net.encode(images(6))
    match = net.match(tokens)
    assert torch.allclose(match.vector.norm(dim=-1), torch.ones(6)) and match.shift.shape == (6, 2)
    assert torch.allclose(net.match(tokens[2:3]).vector[0], match.vector[2], atol=1e-6)
    scores = net.match_scores(match.vector.view(2, 3, -1), match.vector.view(2, 3, -1))  # each set with its own
    assert scores.shape == (2, 3, 3) and torch.equal(scores.argmax(-1), torch.arange(3).expand(2, 3))
    assert scores.amax() == pytest.approx(net.matcher.log_scale.exp().item(), rel=1e-5)
    net.matcher.log_scale.fill_(50)
    assert net.match_scores(match.vector, match.vector).amax() < 101
    with torch.autocast("cpu", torch.bfloat16):
        assert net.match(tokens).vector.dtype == torch.float32
    with pytest.raises(ValueError, match="no vectors"):
        model(replace(SMALL, match_dim=0)).match(tokens)


@torch.no_grad()
def test_like_images_match_before_any_training() -> None:
    """Why matching learns fast: the vectors of a fresh network already keep likeness."""
    torch.manual_seed(0)
    net, x = Multiview(SMALL), images(50)
    first, second = (net.match(net.encode(x + 0.3 * noise(*x.shape, seed=seed))).vector for seed in (5, 6))
    assert (net.match_scores(first, second).argmax(-1) == torch.arange(50)).float().mean() > 0.9


def test_exact_heads_give_the_exact_pose_whatever_doubtful_patches_say() -> None:
    R = random_rotations(10, dtype=torch.float64).float()
    c, a, b = (part.clone() for part in token_map(R, 16, 4))
    shift = noise(10, 2)
    logit = torch.full(c.shape[:-1], 6.0)
    found = poses(Heads(c, a, b, logit, shift, noise(10, 48)), SMALL)
    assert torch.allclose(found.rotation, R, atol=1e-5) and torch.equal(found.shift, shift)
    assert torch.allclose(found.confidence, torch.full((10,), 1 + math.exp(6)), rtol=1e-5)
    c[:, 3], logit[:, 3] = 5, -20
    assert (poses(Heads(c, a, b, logit, shift, noise(10, 48)), SMALL).rotation - R).abs().max() < 0.05


def test_confidence_stays_in_range() -> None:
    C = confidence(torch.tensor([-1e4, -3.0, 0.0, 3.0, 1e4]))
    assert C[0] > 1 and C[-1] < 1e4 and C.log().isfinite().all() and (C.diff() > 0).all()
    assert C[2] == 2


def test_scores_of_rotations_need_no_grid_of_their_own() -> None:
    net, cells = model(), random_rotations(7)
    q = noise(2, 3, 48)
    scores = net.grid_scores(q, cells)
    assert scores.shape == (2, 3, 7)
    assert torch.allclose(net.grid_scores(q, codes=net.cell_codes(cells)), scores, atol=1e-6)
    assert torch.allclose(net.grid_scores(q, cells[2:4]), scores[..., 2:4], atol=1e-5)
    with pytest.raises(ValueError, match="cells or their codes"):
        net.grid_scores(q)
    with pytest.raises(ValueError, match="no grid head"):
        model(replace(SMALL, grid_head=False)).cell_codes(cells)


def test_pixels_return_to_their_place() -> None:
    x = noise(2, 9, 4 * 16)  # 3 x 3 patches of 4 x 4, 4 channels
    expected = F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (3, 3)), 4)
    assert torch.equal(pixel_shuffle(x, 3, 4), expected)
    assert torch.equal(pixel_shuffle(x[None], 3, 4), expected[None])


def test_released_confidence_is_transposed_and_its_map_unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    head = DenseHead(TABLE)
    raw = noise(1, 1, 4, 16, 16)  # x, y, z, conf of every pixel as the network puts them out
    tokens = F.pixel_unshuffle(raw[0], 4).flatten(2).transpose(1, 2)[None]
    monkeypatch.setattr(head.proj, "forward", lambda _: tokens)
    found = head(noise(1, 1, 16, 48))
    assert torch.allclose(found.x[0, 0, 2, 11], raw[0, 0, :3, 2, 11] * 2 - 1)  # stored as X / 2 + 1/2
    assert torch.equal(found.conf_logit[0, 0, 2, 11], raw[0, 0, 3, 11, 2])  # trained on the error at [column, row]


@torch.no_grad()
def test_the_released_layout_has_a_head_for_the_reference_and_one_for_the_rest() -> None:
    net = model(TABLE)
    x = net.star(net.encode(images(3, spec=TABLE))[None])
    said, clean = net.heads(x), net.denoised(x)
    assert said.x.shape == (1, 3, 16, 16, 3) and said.conf_logit.shape == (1, 3, 16, 16) == clean.shape
    net.downstream_heads[0].proj.weight.zero_()
    again = net.heads(x)
    assert not torch.equal(again.x[:, 0], said.x[:, 0]) and torch.equal(again.x[:, 1:], said.x[:, 1:])
    assert net.poses(said).rotation.shape == (1, 3, 3, 3)
