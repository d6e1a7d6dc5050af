"""What all tests share: the folder of real data and golden outputs, one torch thread, the same random numbers."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("CRYOSUITE_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))


def pytest_configure(config: pytest.Config) -> None:
    """Tests run beside each other and compare bits: one thread each."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)


def pytest_report_header(config: pytest.Config) -> str:
    """Say where the shared fixtures are taken from, or that they are missing."""
    found = "found" if (SHARED / "golden").is_dir() else "MISSING: golden and real-data tests will be skipped"
    return f"CRYOSUITE_SHARED={SHARED} ({found})"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared/ folder with golden outputs and real data; skips the test where it is absent."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"no shared fixtures at {SHARED}: set CRYOSUITE_SHARED to the folder that holds golden/ and data/")
    return SHARED


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """The outputs of RELION, cryoDRGN and others."""
    return shared / "golden"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test or a fixture draws without a seed of its own is the same in every run, whatever ran before it."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def denormal_numbers() -> Iterator[None]:
    """Undo what ``train-hype`` does to its process: a test that runs it must not change the arithmetic of the next."""
    yield
    import torch

    torch.set_flush_denormal(False)
