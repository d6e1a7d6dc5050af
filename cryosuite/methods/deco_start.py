"""The voxel start of `deco-classify`: drives `reconstruct.abinitio`, saves it, stops in time and goes on exactly."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryosuite import __version__
from cryosuite.console import Progress
from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.data.workdir import RunDir
from cryosuite.formats.atomic import remove_leftovers
from cryosuite.methods.deco_hand import settle_hands
from cryosuite.methods.deco_options import DecoOptions
from cryosuite.reconstruct.abinitio import AbInitio, AbInitioOptions
from cryosuite.reconstruct.abinitio_starts import options_for
from cryosuite.training import checkpoint
from cryosuite.training.logs import RunLog
from cryosuite.training.options import plain
from cryosuite.training.signals import StopSignals

SAVE_SECONDS = 20.0


def options_of(options: DecoOptions, seed: int) -> AbInitioOptions:
    """The options of the voxel start."""
    return options_for(options.classes, starts=options.starts, shift_extent=options.shift_extent, seed=seed)


def voxel_start(
    particles: ParticleSet,
    run: RunDir,
    options: DecoOptions,
    seed: int,
    device: str = "cpu",
    max_minutes: float | None = None,
    progress: bool = True,
    every: float = SAVE_SECONDS,
    processes: Processes = ALONE,
) -> tuple[ParticleSet, str]:
    """The particles with the poses found, and "" or why it stopped before the end; saved every so many seconds.

    Whatever is in start.pt is gone on from; a start that is complete is only read. ``processes`` share the images; the
    first reads and writes. Raises InputError for a start.pt of other particles or options.
    """
    path, chosen = run.start, options_of(options, seed)
    identity = {
        "options": {"seed": seed},
        "method": {"name": "deco", "options": plain(chosen)},
        "particles": checkpoint.fingerprint(particles),
    }
    log = RunLog(run.log, processes.first)
    engine = AbInitio(particles, chosen, device, lambda text, record: log.write(text), processes)

    def stored() -> dict[str, Any] | None:
        if not path.exists():
            return None
        found = checkpoint.load_state(path, "a start of deco-classify")
        checkpoint.refuse_differences(path, found, identity)
        remove_leftovers(path)
        return found["state"]

    state = processes.first_does(stored)
    if state is not None:
        engine.load_state_dict(state)

    def save() -> None:
        state = {"format": checkpoint.FORMAT, "version": __version__, "state": engine.state_dict(), **identity}
        state["done"] = engine.done
        checkpoint.save_state(path, state)

    stopped = "" if engine.done else _run(engine, save, max_minutes, progress, every, processes)
    if stopped:
        log.write(f"voxel start stopped by {stopped} at unit {engine.position} of {engine.total}")
        return particles, stopped
    found = engine.found
    posed = replace(particles, rotation=found.rotation, shift=found.shift)
    return _in_one_hand(posed, found.label, options.hand, processes), ""


def _in_one_hand(posed: ParticleSet, label: np.ndarray, hand: str, processes: Processes) -> ParticleSet:
    """`settle_hands` by the first process, the poses of it in all."""

    def settled() -> tuple[np.ndarray, np.ndarray]:
        found = settle_hands(posed, label, hand)
        return found.rotation, found.shift

    rotation, shift = processes.first_does(settled)
    return replace(posed, rotation=rotation, shift=shift)


def _run(
    engine: AbInitio,
    save: Callable[[], None],
    max_minutes: float | None,
    progress: bool,
    every: float,
    processes: Processes,
) -> str:
    """Advance until done or told to stop, which any process may be; saves now and then and at the end."""
    began = saved = time.monotonic()
    late = float("inf") if max_minutes is None else began + 60 * max_minutes
    shown = progress and processes.first
    bar = Progress(engine.total, "find first poses", "steps", engine.position) if shown else None
    with StopSignals() as signals, bar or _Silent():
        while not engine.done:
            before = engine.position
            engine.advance()
            if bar is not None:
                bar.advance(engine.position - before)
            now = time.monotonic()
            reason = signals.received or ("max_minutes" if now > late and not engine.done else "")
            told = processes.everyone(lambda said=(reason, now - saved > every): said)
            stopped = next((reason for reason, _ in told if reason), "")
            if stopped or engine.done or told[0][1]:
                processes.first_does(save)
                saved = time.monotonic()
            if stopped:
                return stopped
    return ""


class _Silent:
    """No progress display."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def start_record(run: RunDir) -> dict[str, Any] | None:
    """The state a complete start left behind: poses, margins, history; None where there is none."""
    path: Path = run.start
    return checkpoint.load_state(path, "a start of deco-classify")["state"] if path.exists() else None


def start_margins(record: dict[str, Any]) -> Tensor:
    """(N,) log-likelihood by which the pose of the start is better than the best one elsewhere."""
    from cryosuite.kernels.pose_search import Candidates, margin

    p = record["poses"]
    return margin(Candidates(p["rotation"], p["shift"], p["score"])).to(torch.float32)
