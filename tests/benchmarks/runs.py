"""How the benchmarks call train-kraqen, train-hype, polish and cryoDRGN: finished runs are read again, not repeated."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import CRYOSUITE, peer, timed

from cryosuite.data.workdir import RunDir
from cryosuite.formats.mrc import read_map
from cryosuite.formats.pickles import read_labels, safe_load
from cryosuite.reconstruct.weights import ClassWeights


@dataclass(frozen=True)
class Done:
    """A finished command: its folder, what it cost and how it was called (paths as given)."""

    folder: Path
    cpu_s: float
    wall_s: float
    rss_mib: float
    command: str

    def costs(self) -> dict:
        """For JSON."""
        return {"cpu_s": self.cpu_s, "wall_s": self.wall_s, "rss_mib": self.rss_mib, "command": self.command}


def once(folder: Path, command: list[str], threads: int = 1, cwd: Path | None = None) -> Done:
    """Run a command that writes ``folder``, unless this very command has been run to its end.

    What it cost is kept beside the folder.
    """
    note = folder.with_name(f"{folder.name}.done.json")
    shown = " ".join(["cryosuite", *command[len(CRYOSUITE) :]] if command[:3] == CRYOSUITE else command)
    if not note.exists() or json.loads(note.read_text())["command"] != shown:
        folder.parent.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        timing = timed(command, cwd=cwd, env=environment)
        costs = {"cpu_s": round(timing.cpu_s, 1), "wall_s": round(timing.wall_s, 1), "rss_mib": round(timing.rss_mib)}
        note.write_text(json.dumps({**costs, "command": shown}))
        print(f"{folder.name}: {timing.cpu_s:.0f} CPU s, {timing.rss_mib:.0f} MiB", flush=True)
    return Done(folder, **json.loads(note.read_text()))


def train_kraqen(source: Path, run: Path, *options: str, seed: int = 0, threads: int = 1) -> Done:
    """``cryosuite train-kraqen``."""
    command = [*CRYOSUITE, "train-kraqen", str(source), "-o", str(run), "--seed", str(seed), "--overwrite", *options]
    return once(run, command, threads)


def train_hype(source: Path, run: Path, *options: str, seed: int = 0, threads: int = 1) -> Done:
    """``cryosuite train-hype``."""
    command = [*CRYOSUITE, "train-hype", str(source), "-o", str(run), "--seed", str(seed), "--overwrite", *options]
    return once(run, command, threads)


def finished(run: Path, epochs: int) -> Done | None:
    """A run of so many epochs that another benchmark made and that was linked here: its costs are wall time then."""
    folder = RunDir(run)
    if run.with_name(f"{run.name}.done.json").exists() or not folder.z(epochs).exists():
        return None
    seconds = json.loads(folder.metrics.read_text().splitlines()[-1])["seconds"]
    return Done(run, round(seconds, 1), round(seconds, 1), 0, f"cryosuite train-hype ... -n {epochs}")


def kraqen_labels(run: Path) -> np.ndarray:
    """The merged code of every particle, (N,)."""
    folder = RunDir(run)
    return np.asarray(read_labels(folder.labels(folder.last_epoch()))).astype(np.int64)


def kraqen_weights(run: Path) -> ClassWeights:
    """The share of every particle in every merged code."""
    folder = RunDir(run)
    return ClassWeights.from_arrays(safe_load(folder.shares(folder.last_epoch()))[0])


def kraqen_map(run: Path) -> Callable[[int], torch.Tensor]:
    """Code -> its map (D, D, D)."""
    return lambda code: torch.from_numpy(read_map(RunDir(run).volume(code)).data)


def scores(run: Path, *options: str, threads: int = 1) -> dict:
    """``cryosuite eval-fsc RUN``: its scores.json."""
    folder = run / "scores"
    once(folder, [*CRYOSUITE, "eval-fsc", str(run), "-o", str(folder), "--gmm-seeds", "0", *options], threads)
    found = json.loads((folder / "scores.json").read_text())
    found.get("oracle", {}).pop("per_state", None)
    return found


def cryodrgn(name: str = "cryodrgn") -> str | None:
    """cryoDRGN's executable in the environment CRYODRGN_VENV, or None."""
    return peer(name, "", os.path.join(os.environ.get("CRYODRGN_VENV", "/nonexistent"), "bin", name))
