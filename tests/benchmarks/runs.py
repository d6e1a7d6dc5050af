"""How the benchmarks call the train commands, polish, eval-fsc and cryoDRGN.

Finished runs are read again, interrupted ones continued where the command can do that; nothing is repeated.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import CRYOSUITE, peer, timed

from cryosuite.data.open import open_run_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.data.workdir import RunDir
from cryosuite.formats.mrc import read_map
from cryosuite.formats.pickles import read_labels, safe_load
from cryosuite.reconstruct.weights import ClassWeights


@dataclass(frozen=True)
class Done:
    """A finished command: its folder, what it cost and how it was called (paths as given).

    continued: it had been interrupted, and the costs are those of its last part alone.
    """

    folder: Path
    cpu_s: float
    wall_s: float
    rss_mib: float
    command: str
    continued: bool = False

    def costs(self) -> dict:
        """For JSON."""
        found = {"cpu_s": self.cpu_s, "wall_s": self.wall_s, "rss_mib": self.rss_mib, "command": self.command}
        return found | ({"continued": True} if self.continued else {})


def once(
    folder: Path, command: list[str], threads: int = 1, cwd: Path | None = None, go_on: list[str] | None = None
) -> Done:
    """Run a command that writes ``folder``, unless this very command has been run to its end.

    What it cost is kept beside the folder. go_on: the command that continues what an interrupted one left there.
    """
    note = folder.with_name(f"{folder.name}.done.json")
    shown = " ".join(["cryosuite", *command[len(CRYOSUITE) :]] if command[:3] == CRYOSUITE else command)
    if not note.exists() or json.loads(note.read_text())["command"] != shown:
        folder.parent.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        timing = timed(go_on or command, cwd=cwd, env=environment)
        costs = {"cpu_s": round(timing.cpu_s, 1), "wall_s": round(timing.wall_s, 1), "rss_mib": round(timing.rss_mib)}
        costs |= {"continued": True} if go_on else {}
        note.write_text(json.dumps({**costs, "command": shown}))
        print(f"{folder.name}: {timing.cpu_s:.0f} CPU s, {timing.rss_mib:.0f} MiB", flush=True)
    return Done(folder, **json.loads(note.read_text()))


def train(name: str, source: Path, run: Path, *options: str, seed: int = 0, threads: int = 1) -> Done:
    """A training command of ours (``train-hype``, ``train-kraqen``, ``deco-classify``) run to its end.

    A run of the same options that was interrupted goes on through --resume; a link to a run of the same options that
    was made elsewhere is taken as it is.
    """
    command = [*CRYOSUITE, name, str(source), "-o", str(run), "--seed", str(seed), "--overwrite", *options]
    if run.is_symlink():
        return linked(run, command)
    note, made = run.with_name(f"{run.name}.done.json"), RunDir(run)
    go_on = None
    if not note.exists() and made.checkpoint.exists() and same_options(made.read_config()["command"], command):
        go_on = [*CRYOSUITE, name, str(source), "-o", str(run), "--resume"]
    return once(run, command, threads, go_on=go_on)


def train_kraqen(source: Path, run: Path, *options: str, seed: int = 0, threads: int = 1) -> Done:
    """``cryosuite train-kraqen``."""
    return train("train-kraqen", source, run, *options, seed=seed, threads=threads)


def train_hype(source: Path, run: Path, *options: str, seed: int = 0, threads: int = 1) -> Done:
    """``cryosuite train-hype``."""
    return train("train-hype", source, run, *options, seed=seed, threads=threads)


def deco_classify(source: Path, run: Path, k: str, *options: str, seed: int = 0) -> Done:
    """``cryosuite deco-classify`` on one thread; k: classes, or "auto"."""
    return train("deco-classify", source, run, "-k", k, "--threads", "1", *options, seed=seed)


def train_vae(source: Path, out: Path, epochs: int, width: int, depth: int, seed: int = 0, threads: int = 1) -> Done:
    """cryoDRGN's ``train_vae`` with 8 latent numbers; one that was interrupted goes on from its last epoch."""
    program = cryodrgn()
    if program is None:
        raise SystemExit("no cryoDRGN: set CRYODRGN_VENV to an environment with `pip install cryodrgn`")
    options = ["--poses", str(source / "poses.pkl"), "--ctf", str(source / "ctf.pkl")]  # white particles: its default
    options += ["--zdim", "8", "-n", str(epochs), "--no-amp", "--no-analysis", "--seed", str(seed)]
    for side in ("enc", "dec"):
        options += [f"--{side}-dim", str(width), f"--{side}-layers", str(depth)]
    command = [program, "train_vae", str(source / "particles.mrcs"), *options, "-o", str(out)]
    note, left = out.with_name(f"{out.name}.done.json"), list(out.glob("weights.*.pkl"))
    go_on = [*command, "--load", "latest"] if left and not note.exists() else None
    return once(out, command, threads, go_on=go_on)


# what does not change a result: where a run lies, how it was started, how many threads it had
NO_OPTION = {"-o", "--outdir", "--threads", "--overwrite", "--resume"}


def same_options(before: str, now: list[str]) -> bool:
    """Whether two trainings of ours were asked for the same, folders aside: commands as typed and as in config.yaml."""
    return asked(shlex.split(before)) == asked(now)


def asked(words: list[str]) -> tuple[str, list[list[str]]]:
    """(name of the command, its options with their values in order), without those of NO_OPTION."""
    start = next(i for i, word in enumerate(words) if word.startswith(("train-", "deco-")))
    options: list[list[str]] = []
    for word in words[start + 2 :]:  # the particles come first
        if word.startswith("-") and not word[1:2].isdigit():
            options.append([word])
        elif options:
            options[-1].append(word)
    return words[start], sorted(option for option in options if option[0] not in NO_OPTION)


def linked(run: Path, command: list[str]) -> Done:
    """A run made elsewhere that was linked here; SystemExit when its options are others or it has not ended."""
    folder = RunDir(run)
    config = folder.read_config()
    if not same_options(config["command"], command):
        raise SystemExit(f"{run}: links to a run of other options: {config['command']}")
    if not folder.z(config["training"]["epochs"]).exists():
        raise SystemExit(f"{run}: links to a run that has not ended")
    target = run.resolve()
    note, shown = target.with_name(f"{target.name}.done.json"), " ".join(["cryosuite", *command[len(CRYOSUITE) :]])
    if note.exists():
        return Done(run, **(json.loads(note.read_text()) | {"command": shown}))
    seconds = round(json.loads(folder.metrics.read_text().splitlines()[-1])["seconds"], 1)
    return Done(run, seconds, seconds, 0, shown)  # only the wall time is known


def kraqen_labels(run: Path) -> np.ndarray:
    """The merged code of every particle, (N,)."""
    folder = RunDir(run)
    return np.asarray(read_labels(folder.labels(folder.last_epoch()))).astype(np.int64)


def kraqen_weights(run: Path) -> ClassWeights:
    """The share of every particle in every merged code."""
    folder = RunDir(run)
    return ClassWeights.from_arrays(safe_load(folder.shares(folder.last_epoch()))[0])


def kraqen_particles(run: Path) -> ParticleSet:
    """The particles of a run with the shifts that it refined."""
    return open_run_particles(RunDir(run))


def shift_errors(truth: Path, particles: ParticleSet) -> float | None:
    """Errors of shifts of a simulated set, standard deviation per coordinate in pixels; None where they are true."""
    path = truth / "truth_poses.pkl"
    if not path.exists():
        return None
    true = safe_load(path)[0][1][particles.index]
    return round(float((particles.shift - true).std() * particles.box_size), 4)


def kraqen_map(run: Path) -> Callable[[int], torch.Tensor]:
    """Code -> its map (D, D, D)."""
    return lambda code: torch.from_numpy(read_map(RunDir(run).volume(code)).data)


def scores(run: Path, *options: str, threads: int = 1, out: Path | None = None) -> dict:
    """``cryosuite eval-fsc RUN``: its scores.json, in ``out`` or RUN/scores."""
    folder = out or run / "scores"
    once(folder, [*CRYOSUITE, "eval-fsc", str(run), "-o", str(folder), "--gmm-seeds", "0", *options], threads)
    found = json.loads((folder / "scores.json").read_text())
    found.get("oracle", {}).pop("per_state", None)
    return found


def cryodrgn(name: str = "cryodrgn") -> str | None:
    """cryoDRGN's executable in the environment CRYODRGN_VENV, or None."""
    return peer(name, "", os.path.join(os.environ.get("CRYODRGN_VENV", "/nonexistent"), "bin", name))
