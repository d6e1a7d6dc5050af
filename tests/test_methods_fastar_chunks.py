"""Chunks of fastar-infer tied by anchors: planted frames and hands are found, and what cannot be told is said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cryosuite.kernels.planar import kabsch_tokens, mirror, token_map
from cryosuite.kernels.rotations import expmap, geodesic_deg, random_rotations
from cryosuite.methods import fastar_chunks as chunks

ANCHORS, CHUNKS = 8, 6


def planted(noise_deg: float, seed: int = 0, count: int = CHUNKS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Anchors' truth (A, 3, 3), frames (C, 3, 3), flips (C,), and the anchors as each chunk sees them."""
    generator = torch.Generator().manual_seed(seed)
    truth = random_rotations(ANCHORS, generator)
    frames = random_rotations(count, generator)
    flips = torch.arange(count) % 3 == 1
    noise = expmap(torch.randn(count, ANCHORS, 3, generator=generator) * torch.deg2rad(torch.tensor(noise_deg)) / 1.538)
    # the chunk's own frame and hand, undone by J^s R J^s Q
    seen = (noise @ truth) @ frames.transpose(-1, -2)[:, None]
    return truth, frames, flips, torch.where(flips[:, None, None, None], mirror(seen), seen)


def test_planted_frames_and_hands_are_found() -> None:
    """10 degrees of noise on 8 anchors: every hand is right and the frames agree to a few degrees."""
    for seed in range(5):
        truth, _, flips, seen = planted(10.0, seed)
        tied = chunks.tie(seen, torch.ones(CHUNKS, ANCHORS))
        assert torch.equal(tied.fit.flipped, flips)  # the first chunk is not flipped, so the hand is that of the truth
        assert not tied.fit.undecided.any()
        placed = tied.apply(seen.flatten(0, 1), torch.arange(CHUNKS).repeat_interleave(ANCHORS))
        fit = chunks.fit_frame(placed, truth.repeat(CHUNKS, 1, 1), torch.ones(len(placed)))
        assert not fit.flipped and float(fit.degrees) < 12
        assert float(chunks.fit_frame(tied.anchors, truth, torch.ones(ANCHORS)).degrees) < 7  # a mean of six
        told = chunks.agreement(tied)
        assert told["flips"] == int(flips.sum()) and told["undecided"] == 0


def test_exact_planar_maps_give_one_frame() -> None:
    """Maps of every chunk, Kabsch, tie: the particles' rotations up to one frame, to rounding."""
    truth, frames, flips, seen = planted(0.0, 3)
    generator = torch.Generator().manual_seed(9)
    others = random_rotations(CHUNKS * 5, generator).unflatten(0, (CHUNKS, 5))
    own = others @ frames.transpose(-1, -2)[:, None]
    own = torch.where(flips[:, None, None, None], mirror(own), own)
    views = torch.cat([seen, own], 1)
    found = kabsch_tokens(*token_map(views, 32, 8), None, 32, 8)
    tied = chunks.tie(found[:, :ANCHORS], torch.ones(CHUNKS, ANCHORS))
    placed = tied.apply(found[:, ANCHORS:].flatten(0, 1), torch.arange(CHUNKS).repeat_interleave(5))
    fit = chunks.fit_frame(placed, others.flatten(0, 1), torch.ones(len(placed)))
    moved = chunks.moved(placed, fit.frame, fit.flipped)
    assert float(geodesic_deg(moved, others.flatten(0, 1)).max()) < 0.1
    assert float(chunks.fit_frame(tied.anchors, truth, torch.ones(ANCHORS)).residual) < 1e-4


def test_noise_leaves_the_hand_undecided() -> None:
    """Anchors 120 degrees off say nothing: such chunks are flagged, good ones among them are not."""
    truth, _, _, bad = planted(120.0, 1, 12)
    _, _, flips, good = planted(5.0, 1, 12)
    mixed = good.clone()
    mixed[6:] = bad[6:]
    tied = chunks.tie(mixed, torch.ones(12, ANCHORS))
    assert not tied.fit.undecided[:6].any()
    assert torch.equal(tied.fit.flipped[:6], flips[:6])
    assert int(tied.fit.undecided[6:].sum()) >= 5


def test_bad_anchors_of_little_confidence_are_outvoted() -> None:
    """Three of eight anchors are wrong and say so."""
    truth, _, flips, seen = planted(5.0, 4)
    generator = torch.Generator().manual_seed(0)
    seen[:, :3] = random_rotations(CHUNKS * 3, generator).unflatten(0, (CHUNKS, 3))
    weight = torch.ones(CHUNKS, ANCHORS)
    weight[:, :3] = 0.01
    tied = chunks.tie(seen, weight)
    assert torch.equal(tied.fit.flipped, flips)
    assert float(chunks.fit_frame(tied.anchors[3:], truth[3:], torch.ones(5)).degrees) < 6


def test_the_first_chunk_alone_is_its_own_frame() -> None:
    """One chunk: nothing is moved."""
    _, _, _, seen = planted(10.0, 2, 1)
    tied = chunks.tie(seen, torch.ones(1, ANCHORS))
    assert not tied.fit.flipped[0] and float(geodesic_deg(tied.fit.frame[0], torch.eye(3))) < 0.1


@pytest.mark.parametrize("flipped", [False, True])
def test_several_references_agree_on_the_median(flipped: bool) -> None:
    """Three predictions, one of them bad for a quarter of the particles and in another frame and hand."""
    generator = torch.Generator().manual_seed(5)
    truth = random_rotations(200, generator)
    runs = []
    for r in range(3):
        noise = expmap(torch.randn(200, 3, generator=generator) * 0.05)
        run = noise @ truth
        if r == 1:
            run[:50] = random_rotations(50, generator)
            run = run @ random_rotations(1, generator)[0]
            run = mirror(run) if flipped else run
        runs.append(run)
    stack, median = chunks.together(torch.stack(runs), torch.ones(3, 200))
    error = geodesic_deg(median, truth)
    assert float(error.quantile(0.9)) < 8
    assert float(geodesic_deg(stack[1, 50:], truth[50:]).median()) < 6


def test_the_median_ignores_one_of_three() -> None:
    """A mean would be drawn to the odd one out."""
    one = random_rotations(1, torch.Generator().manual_seed(0))[0]
    odd = expmap(torch.tensor([[0.0, 0.0, 1.0]]))[0] @ one
    found = chunks.chordal_median(torch.stack([one, one, odd])[:, None])[0]
    assert float(geodesic_deg(found, one)) < 0.5
    mean = chunks.chordal_mean(torch.stack([one, one, odd])[:, None], torch.ones(3, 1))[0]
    assert float(geodesic_deg(mean, one)) > 10
