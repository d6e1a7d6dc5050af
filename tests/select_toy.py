"""A run with an analysis, of real particle files and made-up latents: what ``select`` and ``export`` start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryosuite.data.workdir import AnalysisDir, RunDir
from cryosuite.formats.config import write_yaml
from cryosuite.formats.pickles import write_pickle
from cryosuite.training.options import TrainOptions
from cryosuite.training.runs import make_config


@dataclass
class Toy:
    """The run, its analysis, latents (N, 3) and labels (N,)."""

    run: RunDir
    analysis: AnalysisDir
    z: np.ndarray
    labels: np.ndarray


def make_run(folder: Path, particles: Path, count: int, epochs: tuple[int, ...] = (1, 2), **config: object) -> Toy:
    """A run of three clusters in three latent numbers on a particle set; the analysis is that of the last epoch."""
    run = RunDir(folder)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    z = (5 * np.eye(3)[labels] + rng.normal(size=(count, 3))).astype(np.float32)
    write_yaml(run.config, make_config("hype", particles, run, {}, TrainOptions(), **config))
    for epoch in epochs:
        write_pickle(run.z(epoch), z)
    analysis = run.analysis(epochs[-1])
    analysis.path.mkdir()
    write_pickle(analysis.labels, labels)
    write_yaml(analysis.summary, {"kind": "analysis", "run": "..", "epoch": epochs[-1], "n_particles": count})
    return Toy(run, analysis, z, labels)
