"""Processes of a training end together: one message, and nobody waits for the one that is gone."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from forked import fork, wait

from cryosuite.errors import InputError
from cryosuite.training import lookout
from cryosuite.training.lookout import Lookout


def ended(folder: Path, work: Callable[[int], None], count: int = 3) -> list[tuple[int, str]]:
    """(exit code, what it printed) of each of ``count`` processes that do ``work(rank)`` under a lookout; as under srun
    the first keeps the store, and nobody ends the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def process(rank: int) -> None:
        os.dup2(os.open(folder / f"err{rank}", os.O_CREAT | os.O_WRONLY), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        where = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=count)
        torch.distributed.barrier()  # all are connected
        try:
            with Lookout(rank, count):
                work(rank)
                torch.distributed.barrier()
        except InputError as error:
            print(f"raised: {error}", file=sys.stderr)
            sys.exit(2)
        time.sleep(0.5)

    codes = wait([fork(partial(process, rank)) for rank in range(count)], 120, ended=False)
    return [(code, (folder / f"err{rank}").read_text()) for rank, code in enumerate(codes)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookout, "SECONDS", 0.1)
    monkeypatch.setattr(lookout, "GRACE", 0.5)


@pytest.mark.parametrize("bad", [0, 2])
def test_one_that_fails_ends_those_that_wait_for_something_else(bad: int, tmp_path: Path) -> None:
    """The others sleep for a minute, deaf to closed connections, as in a message between GPUs."""

    def work(rank: int) -> None:
        if rank == bad:
            raise InputError("no memory: half the --batch-size")
        time.sleep(60)

    began = time.monotonic()
    found = ended(tmp_path, work)
    assert time.monotonic() - began < 20
    assert [code for code, _ in found] == [2, 2, 2]
    assert "".join(text for _, text in found).count("half the --batch-size") == 1
    assert "half the --batch-size" in found[0][1], "the first one tells"


def test_an_error_of_all_is_told_once(tmp_path: Path) -> None:
    def work(_: int) -> None:
        raise InputError("diverged")

    found = ended(tmp_path, work)
    assert [code for code, _ in found] == [2, 2, 2] and [text.count("diverged") for _, text in found] == [1, 0, 0]


def test_one_that_is_killed_with_the_store_ends_the_others(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        if rank == 0:
            os._exit(9)
        time.sleep(60)

    began = time.monotonic()
    found = ended(tmp_path, work)
    assert time.monotonic() - began < 20 and [code for code, _ in found] == [9, 2, 2]


def test_those_that_come_to_their_end_leave_in_peace(tmp_path: Path) -> None:
    found = ended(tmp_path, lambda rank: time.sleep(0.5 * rank))
    assert found == [(0, ""), (0, ""), (0, "")]
