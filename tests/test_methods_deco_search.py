"""Poses searched for again: which particles, whoever has them in a batch that several processes share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hype_toy import blob_particles, blobs

from cryosuite.data.loader import BatchLoader
from cryosuite.methods import deco_search
from cryosuite.methods.deco import Deco
from cryosuite.methods.deco_options import DecoOptions
from cryosuite.methods.deco_search import of_all, rows_of, worst

SEARCHED = DecoOptions(
    encoder="random", encoder_size="micro", zdim=4, width=32, layers=1, n_frequencies=16, lr_encoder=1.0, lr_poses=1.0,
    refine_poses=True, research_every=1,
)  # fmt: skip


def test_the_worst_of_a_batch_do_not_depend_on_who_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch shared by four processes, the last of which was given a row again: the same particles are chosen."""
    misfit = torch.rand(40, generator=torch.Generator().manual_seed(0))
    misfit[[3, 9]] = 2.0  # equal
    misfit[[31, 5]] = -1.0
    index = torch.tensor([9, 31, 3, 17, 5, 22, 8, 30, 11])
    whole = index[worst(misfit, index, 0.25)]
    assert {3, 9} <= set(whole.tolist()) and len(whole) == 3
    parts = [index[0::3], index[1::3], index[2::3], index[:1]]
    assert parts[1].tolist() == [31, 5, 30]
    misfit[30] = -1.0
    monkeypatch.setattr(deco_search, "everywhere", lambda values: [(part,) for part in parts])
    chosen = [part[worst(misfit, part, 0.25)] for part in parts]
    assert set(torch.cat(chosen).tolist()) == set(whole.tolist())
    assert len(chosen[1]) == 0  # all its images fit well


def test_what_belongs_to_particles_comes_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [(torch.tensor([7, 2]), torch.tensor([0.7, 0.2])), (torch.tensor([5, 7]), torch.tensor([0.5, 0.7]))]
    monkeypatch.setattr(deco_search, "everywhere", lambda values: parts)
    index, values = of_all(*parts[0])
    assert index.tolist() == [2, 5, 7] and torch.equal(values, torch.tensor([0.2, 0.5, 0.7]))
    monkeypatch.setattr(deco_search, "everywhere", lambda values: [values])
    assert len(of_all(torch.zeros(0, dtype=torch.int64))[0]) == 0


def test_a_process_without_rows_takes_part_in_a_search() -> None:
    """Nothing is searched for and nothing is written."""
    particles, _ = blob_particles([blobs(16, 3, 8)], 32, noise=0.5)
    torch.manual_seed(0)
    method = Deco(SEARCHED, None, 2)
    model = method.build(particles)
    before = model.table.six.clone()
    batch = BatchLoader(particles, 8, shuffle=False, prefetch=0).batch(np.arange(8))
    method.searcher.search(rows_of(batch, torch.zeros(0, dtype=torch.int64)), torch.zeros(0, 4))
    assert torch.equal(model.table.six, before) and torch.isnan(model.table.margin).all()
    method.searcher.search(rows_of(batch, torch.tensor([2, 5])), torch.zeros(2, 4))
    assert torch.nonzero(~torch.isnan(model.table.margin)).flatten().tolist() == [2, 5]
