"""The encoder learns what molecules look like within a few hundred steps (slow)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_methods_iev import make_states

from cryosuite.data.workdir import RunDir
from cryosuite.methods.iev import Guard, Iev, after_epoch
from cryosuite.methods.iev_data import Corpus, PoolSource
from cryosuite.methods.iev_options import preset
from cryosuite.methods.iev_run import held_out_particles
from cryosuite.nets.moco import chance_loss
from cryosuite.simulate.pool import Imaging, PoolOptions, ProjectionPool
from cryosuite.training.logs import read_metrics
from cryosuite.training.loop import fit
from cryosuite.training.options import TrainOptions


@pytest.mark.slow
def test_encoder_learns_molecules(tmp_path: Path) -> None:
    """vit_tiny, eight molecules, 2,000 views, 112 pixels, 300 steps: neighbours gain more than ten points."""
    torch.manual_seed(0)
    states = make_states(8, seed=3)
    pool = ProjectionPool(tmp_path / "pool.f16", states, PoolOptions(views=250))
    imaging = Imaging(snr=(0.05, 0.3), boxes=(64,))
    options = preset("tiny", False, chunk=16)[1].options
    source = PoolSource(pool, 112, options.prep, options.positives, imaging)
    corpus = Corpus([source], 1600, 112)
    images, labels = held_out_particles(
        states, "", 112, options.prep, tmp_path / "h.f16", PoolOptions(views=60), 64, 0.05
    )  # fmt: skip
    method, run = Iev(options), RunDir(tmp_path / "run")
    run.path.mkdir()
    guard = Guard(images, labels, method, run)
    training = TrainOptions(
        epochs=6, batch_size=32, lr=1e-3, weight_decay=0.1, ema=0, precision="bf16", log_every=10, accelerator="cpu"
    )  # fmt: skip
    fit(method, corpus, run, training, on_epoch=after_epoch(run, options, guard, {}))
    scores = [record for record in read_metrics(run.metrics) if "knn" in record]
    assert scores[-1]["knn"] > scores[-1]["knn_random"] + 0.10
    losses = [record["contrast"] for record in read_metrics(run.metrics) if "contrast" in record]
    assert np.mean(losses[-5:]) < chance_loss(32, options.tau) - 0.05
