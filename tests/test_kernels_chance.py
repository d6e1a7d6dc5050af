"""Random numbers of a shared batch: each process gets the rows that one process would have drawn."""

from __future__ import annotations

import pytest
import torch

from cryosuite.kernels import chance
from cryosuite.nets.moco import sample_patches


def drawn(share: chance.Share | None, count: int) -> list[torch.Tensor]:
    """Some numbers of a batch, from the same state of the generator."""
    torch.manual_seed(3)
    with chance.sharing(share):
        return [chance.rand(count, 4), chance.randn(count), torch.rand(()), chance.rand(count + 1)]


@pytest.mark.parametrize("total, parts", [(12, 2), (13, 2), (13, 3)])
def test_rows_are_those_of_the_whole_batch(total: int, parts: int) -> None:
    whole = drawn(None, total)
    for part in range(parts):
        own = slice(part, total, parts)
        share = chance.Share(own, total)
        mine = drawn(share, len(share))
        assert len(share) == len(range(part, total, parts))
        assert torch.equal(mine[0], whole[0][own]) and torch.equal(mine[1], whole[1][own])
        assert torch.equal(mine[2], whole[2])  # the generators are in the same state afterwards
        assert len(mine[3]) == len(share) + 1  # a batch of another size is not shared


def test_nothing_is_shared_unless_said() -> None:
    torch.manual_seed(0)
    one = torch.rand(5, 2)
    torch.manual_seed(0)
    assert torch.equal(one, chance.rand(5, 2)) and chance.whole(5) == 5 and chance.share_of(5) is None
    with chance.sharing(chance.Share([0], 7)):
        assert chance.whole(1) == 7 and chance.whole(2) == 2
        torch.manual_seed(0)
        assert len(chance.rows(lambda n: sample_patches(n, torch.ones(9, dtype=torch.bool), 0.5), 1)) == 1
    assert chance.share_of(1) is None
