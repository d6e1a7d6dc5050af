"""Every training command when the GPU's memory runs out: halves its batch once, says so, and comes to its end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cryosuite.cli import app
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, UserNotice
from cryosuite.training.logs import read_metrics
from cryosuite.training.session import Objective

sys.path.append(str(Path(__file__).parent / "benchmarks"))
from fire_kill_commands import Command, trainings

pytestmark = pytest.mark.slow
OOM = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"
LOOPED = [one.name for one in trainings(Path()) if one.name not in ("train-kraqen (voxel maps)",)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    words = ["simulate", "--structures", "phantom:2", "-n", "120", "-D", "32", "--snr", "0.5", "-o", folder / "work"]
    assert CliRunner().invoke(app, list(map(str, words))).exit_code == 0
    return folder


def short(command: Command, out: Path) -> list[str]:
    """The command with less to do."""
    words = command.arguments(out)
    changes = {"-n": "1", "--images": "32", "--every": "32"}
    if command.name == "train-fastar":
        changes["-b"] = "16"  # two molecules
    return [changes.get(words[i - 1], word) if i else word for i, word in enumerate(words)]


@pytest.mark.parametrize("name", LOOPED)
def test_a_batch_is_halved_once_and_the_training_goes_on(
    inputs: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = next(one for one in trainings(inputs) if one.name == name)
    sizes: list[int] = []
    forward = Objective.forward

    def hungry(self: Objective, work):
        sizes.append(len(work.batch.index))
        if len(sizes) > 1 and sizes[-1] > (sizes[0] + 1) // 2:  # the first step goes well, then somebody takes memory
            raise torch.OutOfMemoryError(OOM)
        return forward(self, work)

    monkeypatch.setattr(Objective, "forward", hungry)
    with pytest.warns(UserNotice, match="ran out of memory: from now on a batch is computed in 2 pieces"):
        done = CliRunner().invoke(app, short(command, tmp_path / "run"))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    first = sizes[0]
    assert first > 1 and sum(size == first for size in sizes) == 2, "tried whole once more, never again"
    losses = [line["loss"] for line in read_metrics(RunDir(tmp_path / "run").metrics) if "loss" in line]
    assert losses and all(loss == loss for loss in losses)
    assert "ran out of memory" in RunDir(tmp_path / "run").log.read_text()


def test_memory_that_is_never_enough_is_one_sentence(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starving(self: Objective, work):
        raise torch.OutOfMemoryError(OOM)

    monkeypatch.setattr(Objective, "forward", starving)
    command = next(one for one in trainings(inputs) if one.name == "train-hype")
    with pytest.warns(UserNotice):
        done = CliRunner().invoke(app, short(command, tmp_path / "run"))
    assert isinstance(done.exception, InputError) and "--batch-size" in str(done.exception)
