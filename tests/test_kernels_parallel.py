"""Pieces in threads: their order, their number at a time, errors, and torch's own threads."""

import threading
import time

import pytest
import torch

from cryosuite.kernels import parallel
from cryosuite.kernels.parallel import in_threads


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_the_order_of_the_pieces(threads):
    def work(piece):
        time.sleep(0.002 * (7 - piece))  # the last one would be the first to end
        return piece**2

    assert list(in_threads(work, iter(range(7)), threads)) == [0, 1, 4, 9, 16, 25, 36]


def test_pieces_do_run_side_by_side_and_no_more_than_asked_for():
    meet = threading.Barrier(3, timeout=20)  # none of three goes on before all are there

    def work(_):
        meet.wait()
        return threading.get_ident()

    assert len(set(in_threads(work, range(6), 3))) == 3


def test_large_pieces_run_one_at_a_time(monkeypatch):
    monkeypatch.setattr(parallel, "BYTES", 100)
    assert set(in_threads(lambda _: threading.get_ident(), range(5), 4, 60)) == {threading.get_ident()}


@pytest.mark.parametrize("threads", [1, 3])
def test_torch_has_one_thread_in_each_and_its_own_again_afterwards(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert list(in_threads(lambda _: torch.get_num_threads(), range(4), threads)) == [1] * 4
        assert torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="the third"):
            list(in_threads(_fails_at_two, range(9), threads))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def _fails_at_two(piece: int) -> int:
    if piece == 2:
        raise ValueError("the third")
    return piece
