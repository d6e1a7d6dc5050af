"""Features of a particle set as a run that ``analyze`` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryosuite.console import say, table
from cryosuite.data.open import open_particles
from cryosuite.data.truth import find_truth
from cryosuite.data.typed import typed
from cryosuite.data.workdir import RunDir
from cryosuite.formats.pickles import write_pickle
from cryosuite.methods.iev import encode, open_encoder
from cryosuite.metrics.features import feature_spread, knn_accuracy
from cryosuite.training.launch import join_processes, resolve_accelerator
from cryosuite.training.options import TrainOptions
from cryosuite.training.runs import make_config, start_run

EPOCH = 1  # features have no epochs; analyze counts from 1


def encode_to_run(
    path: Path, outdir: Path, weights: str, *, overwrite: bool = False, batch: int = 64, accelerator: str = "auto",
    prep: str | None = None, circle: bool = True, **how: Any,
) -> np.ndarray:  # fmt: skip
    """Write OUTDIR with the features of a particle set: z.1.pkl (N, C) float32, index.pkl, config.yaml.

    ``how``: arguments of ``open_particles``. Prints how well neighbours agree where the true labels are known
    (simulated sets). Returns the features; of the processes that torchrun or srun started the first returns all, the
    others their part. Raises InputError for weights or particles that cannot be used, and a folder that already holds a
    run.
    """
    loaded = open_encoder(weights, prep)
    particles = open_particles(path, need_poses=False, need_ctf=False, mixed_boxes=True, **how)
    run = RunDir(outdir)
    facts = {"weights": loaded.source, "prep": loaded.prep, "circle": circle, "size": loaded.spec.size}
    config = make_config("iev", path, run, facts, TrainOptions(epochs=EPOCH), holds="features", **how)
    processes = join_processes()
    processes.first_does(lambda: start_run(run, config, overwrite=overwrite))
    say(f"encoder: {loaded.source}, prep {loaded.prep}")
    device = torch.device(resolve_accelerator(accelerator))
    z = encode(particles, loaded, batch=batch, device=device, circle=circle, processes=processes)
    if not processes.first:
        return z
    write_pickle(run.index, np.asarray(particles.index, np.int64))
    write_pickle(run.z(EPOCH), z)
    spread, rank = feature_spread(torch.from_numpy(z))
    rows: list[list[object]] = [
        ["features, one row per particle", run.z(EPOCH)],
        ["numbers per particle", z.shape[1]],
        ["effective rank", f"{float(rank):.1f}"],
        ["spread (below 0.3: all alike)", f"{float(spread):.2f}"],
    ]
    truth = find_truth(path)
    if truth is not None and truth.labels.is_file():
        labels = truth.labels_of(particles.index)
        rows.append(["right by 10 nearest neighbours (true labels)", f"{100 * knn_accuracy(z, labels):.1f} %"])
    table(f"{len(z):,} particles encoded", ["what", "value"], rows)
    say(f"next: cryosuite analyze {typed(run.path)}")
    return z
