"""What a run writes down while it trains: metrics.jsonl for programs, run.log for people."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path

from cryosuite import __version__
from cryosuite.data.workdir import RunDir
from cryosuite.formats.atomic import append_text, write_text


class MetricsLog:
    """metrics.jsonl: one JSON object per line, appended; at the start lines beyond ``step`` are dropped.

    Only the process with ``enabled`` writes.
    """

    def __init__(self, path: Path, step: int, enabled: bool = True) -> None:
        self.path, self.enabled = path, enabled
        if enabled:
            keep_until(path, step)

    def write(self, record: dict[str, float]) -> None:
        """Append one line; floats are shortened to 7 significant digits."""
        if self.enabled:
            short = {key: float(f"{value:.7g}") if isinstance(value, float) else value for key, value in record.items()}
            append_text(self.path, json.dumps(short) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; a last line cut short by a killed run is left out."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int | float):
                records.append(record)
    return records


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of a metrics.jsonl beyond ``step``, which the run is going to write again."""
    if not path.is_file():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def write_scores(path: Path, epoch: int, scores: dict[str, float], digits: int) -> None:
    """Add the scores after an epoch to a metrics.jsonl, at the step of its last line, rounded to so many digits.

    Scores of that epoch that are there already are replaced: a run that was killed between them and the end of the
    epoch's work does that work again.
    """
    records = read_metrics(path)
    step = records[-1]["step"] if records else 0
    rounded = {name: round(value, digits) for name, value in scores.items()}
    line = {"step": step, "epoch": float(epoch), **rounded}
    kept = [record for record in records if not (record["step"] == step and record.keys() == line.keys())]
    write_text(path, "".join(json.dumps(record) + "\n" for record in [*kept, line]))


class RunLog:
    """run.log: plain lines with the time, appended over all continuations of a run."""

    def __init__(self, path: Path, enabled: bool = True) -> None:
        self.path, self.enabled = path, enabled

    def write(self, line: str) -> None:
        """Append one line."""
        if self.enabled:
            append_text(self.path, f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")


def write_header(log: RunLog, run: RunDir, device: str, precision: str, processes: int, seed: int) -> None:
    """The first lines of a session: the command, the versions, the machine and the seed."""
    import lightning_fabric
    import numpy
    import torch

    log.write(f"command: {' '.join(sys.argv)}")
    log.write(
        f"cryosuite {__version__}, python {platform.python_version()}, torch {torch.__version__}, "
        f"lightning-fabric {lightning_fabric.__version__}, numpy {numpy.__version__}"
    )
    log.write(f"host {platform.node()}, process {os.getpid()}, folder {run.path.absolute()}")
    threads = f", {torch.get_num_threads()} threads" if device.startswith("cpu") else ""
    log.write(f"device {device}{threads}, precision {precision}, {processes} process(es), seed {seed}")
