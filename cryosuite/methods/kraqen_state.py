"""Where the voxel field of train-kraqen stands between two iterations, its checkpoint, and what it found in the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cryosuite import __version__
from cryosuite.data.processes import Processes
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError
from cryosuite.formats.atomic import remove_leftovers
from cryosuite.reconstruct.weights import ClassWeights
from cryosuite.training import checkpoint
from cryosuite.training.logs import MetricsLog, RunLog
from cryosuite.training.signals import exit_code

if TYPE_CHECKING:
    from cryosuite.methods.kraqen_voxel import VoxelEM


@dataclass
class State:
    """What an iteration leaves behind."""

    iteration: int  # iterations done
    volumes: Tensor  # (K, d, d, d) in the cluster box
    usage: np.ndarray  # (K,) share of the images, sum 1
    p: ClassWeights | None = None  # of all images, once an iteration has seen them all
    seconds: float = 0.0
    settled: bool = False  # hardly an image changed its code: more iterations would change nothing
    shift: np.ndarray | None = None  # (N, 2) of the particles where they were refined, fraction of the box


@dataclass
class VoxelResult:
    """What the EM found.

    Attributes:
        codes: (K, d, d, d) maps in the cluster box. p: shares of N particles. usage: (K,) images per code.
        engine: what made it. history: the lines of metrics.jsonl. stopped: "" or the name of a signal.
    """

    codes: Tensor
    p: ClassWeights
    usage: np.ndarray
    engine: VoxelEM = field(repr=False)
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)
    stopped: str = ""

    @property
    def exit_code(self) -> int:
        """0, or the code that asks to be started again."""
        return exit_code(self.stopped)


def save(run: RunDir, state: State, history: list[dict[str, Any]], identity: dict[str, Any]) -> None:
    """Write the checkpoint of an iteration; ``identity``: what only a run of the same kind may go on from."""
    p = None if state.p is None else [torch.from_numpy(part) for part in state.p.to_arrays()]
    values = {"iteration": state.iteration, "volumes": state.volumes, "usage": torch.from_numpy(state.usage)}
    values |= {"shift": None if state.shift is None else torch.from_numpy(state.shift)}
    values |= {"settled": state.settled, "p": p, "seconds": state.seconds, "history": history, "field": "voxel"}
    checkpoint.save_state(run.checkpoint, {"format": checkpoint.FORMAT, "version": __version__, **values, **identity})


def load(run: RunDir, identity: dict[str, Any]) -> tuple[State, list[dict[str, Any]]]:
    """What `save` wrote; InputError where it belongs to another kind of run. What a killed run left half is removed."""
    path = run.checkpoint
    stored = checkpoint.load_state(path, "a checkpoint")
    if stored.get("field") != "voxel":
        raise InputError(f"{path}: not a checkpoint of train-kraqen's voxel field")
    checkpoint.refuse_differences(path, stored, identity)
    remove_leftovers(path)
    p = None if stored["p"] is None else ClassWeights.from_arrays([v.numpy() for v in stored["p"]], str(path))
    state = State(stored["iteration"], stored["volumes"], stored["usage"].numpy(), p, stored["seconds"])
    state.settled = stored["settled"]
    shift = stored.get("shift")  # runs of version 0.1.0 have none
    state.shift = None if shift is None else shift.numpy()
    return state, list(stored["history"])


class Records:
    """What a run writes down after each iteration: by the first process, with errors for all of them.

    run: None writes nothing. iteration: of the checkpoint that it goes on from; later lines are dropped.
    """

    def __init__(self, run: RunDir | None, iteration: int, processes: Processes) -> None:
        self.run, self.processes = run, processes
        if run is not None:
            self.metrics = processes.each(lambda: MetricsLog(run.metrics, iteration, processes.first))
            self.log = RunLog(run.log, processes.first)

    def keep(self, state: State, history: list[dict[str, Any]], identity: Callable[[], dict[str, Any]]) -> None:
        """The line of the last iteration and its checkpoint (``identity()``: as `save`)."""

        def write() -> None:
            self.metrics.write(history[-1])  # before the checkpoint: a line beyond it is dropped on resume
            save(self.run, state, history, identity())

        if self.run is not None:
            self.processes.first_does(write)

    def end(self, iteration: int, stopped: str) -> None:
        """The last line of run.log."""
        if self.run is not None:
            said = f"stopped by {stopped} after iteration {iteration}" if stopped else "finished"
            self.processes.first_does(lambda: self.log.write(said))
