"""Features of a particle set as a run that ``analyze`` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryosuite.console import say, table
from cryosuite.data.encoder_images import features_to_file
from cryosuite.data.open import open_particles
from cryosuite.data.truth import Truth, find_truth
from cryosuite.data.typed import typed
from cryosuite.data.workdir import RunDir
from cryosuite.formats.pickle_rows import PickledRows
from cryosuite.formats.pickles import write_pickle
from cryosuite.methods.iev import open_encoder
from cryosuite.metrics.features import PIECE, feature_spread, knn_accuracy, neighbour_sample
from cryosuite.training.launch import join_processes, resolve_accelerator
from cryosuite.training.options import TrainOptions
from cryosuite.training.runs import make_config, start_run

EPOCH = 1  # features have no epochs; analyze counts from 1


def encode_to_run(
    path: Path, outdir: Path, weights: str, *, overwrite: bool = False, batch: int = 64, accelerator: str = "auto",
    precision: str = "auto", prep: str | None = None, circle: bool = True, devices: int = 1, num_nodes: int = 1,
    **how: Any,
) -> None:  # fmt: skip
    """Write OUTDIR with the features of a particle set: z.1.pkl (N, C) float32, index.pkl, config.yaml.

    ``precision``: 32, bf16, or auto: bf16 on a GPU. ``how``: arguments of ``open_particles``. Features go to disk as
    they come: memory does not grow with the number of particles. Prints how well neighbours agree where the true
    labels are known (simulated sets). The processes that torchrun or srun started share the particles, or as many as
    ``devices`` on each of ``num_nodes`` say. Raises InputError for weights or particles that cannot be used, and a
    folder that already holds a run.
    """
    loaded = open_encoder(weights, prep)
    options = TrainOptions(epochs=EPOCH, precision=precision)
    particles = open_particles(path, need_poses=False, need_ctf=False, mixed_boxes=True, **how)
    run = RunDir(outdir)
    facts = {"weights": loaded.source, "prep": loaded.prep, "circle": circle, "size": loaded.spec.size}
    config = make_config("iev", path, run, facts, options, holds="features", **how)
    kind = resolve_accelerator(accelerator)
    processes = join_processes(devices, num_nodes, kind)

    def start() -> None:
        start_run(run, config, overwrite=overwrite)
        write_pickle(run.index, np.asarray(particles.index, np.int64))

    processes.first_does(start)
    say(f"encoder: {loaded.source}, prep {loaded.prep}")
    device = torch.device(kind)
    half = None if precision == "auto" else precision == "bf16"
    z = features_to_file(run.z(EPOCH), particles, loaded, batch, device, circle=circle, half=half, processes=processes)
    if processes.first:
        table(f"{len(z):,} particles encoded", ["what", "value"], _rows(run, z, find_truth(path), particles.index))
        say(f"next: cryosuite analyze {typed(run.path)}")


def _rows(run: RunDir, z: PickledRows, truth: Truth | None, index: np.ndarray) -> list[list[object]]:
    """The table about the features on disk, looked at piece by piece."""
    spread, rank = feature_spread(torch.from_numpy(piece) for piece in z.pieces(PIECE))
    rows: list[list[object]] = [
        ["features, one row per particle", run.z(EPOCH)],
        ["numbers per particle", z.shape[1]],
        ["effective rank", f"{float(rank):.1f}"],
        ["spread (below 0.3: all alike)", f"{float(spread):.2f}"],
    ]
    if truth is not None and truth.labels.is_file() and len(z) > 1:
        labels, some = truth.labels_of(index), neighbour_sample(len(z))
        if some is None:
            some, among = np.arange(len(z)), ""
        else:
            among = f", among {len(some):,} particles drawn at random"
        right = knn_accuracy(z.take(some), labels[some])
        rows.append([f"right by 10 nearest neighbours (true labels){among}", f"{100 * right:.1f} %"])
    return rows
