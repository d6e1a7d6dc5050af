"""Latents of networks for polish.py: train-hype and cryoDRGN's train_vae, and what their own volumes score."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import runs
import torch
from judge import CURVES, Judge
from sets import Recipe

from cryosuite.data.workdir import RunDir
from cryosuite.formats.mrc import read_map
from cryosuite.formats.pickles import read_latent
from cryosuite.metrics.truth import sample_rows, score_volumes
from cryosuite.reconstruct.weights import ClassWeights

VOLUMES_PER_STATE = 3  # of a network's own volumes, which take long to make
HYPE_EPOCHS = {32: 50, 64: 40}  # D -> epochs at 8,000 images; fewer images are seen more often
VAE = {"epochs": 12, "width": 256, "depth": 3}


@dataclass
class Latents:
    """Latents (N, zdim) of a run, what the training cost, and the scores of the network's own volumes."""

    z: np.ndarray
    done: runs.Done
    before: dict


def bins(z: np.ndarray, count: int | None = None) -> ClassWeights:
    """Latents shared out among bins, as ``polish`` does it; without a count as many as it chooses."""
    from cryosuite.reconstruct.bins import bins_of

    return bins_of(z, count)[0]


def more_epochs(recipe: Recipe) -> float:
    """How much more often than 8,000 images fewer are seen."""
    return min(max(1.0, (8000 / recipe.images) ** 0.5), 2.5)


def hype_epochs(recipe: Recipe) -> int:
    """Epochs of train-hype on a set."""
    return round(HYPE_EPOCHS.get(recipe.box, 40) * more_epochs(recipe))


def hype(judge: Judge, recipe: Recipe, run: Path, threads: int) -> Latents:
    """train-hype --preset small on the set."""
    epochs = hype_epochs(recipe)
    done = runs.train_hype(judge.folder, run, "--preset", "small", "-n", str(epochs), seed=recipe.seed, threads=threads)
    runs.scores(run, "--no-clustering", threads=threads)
    with (run / "scores" / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    states = np.array([int(row["state_from_0"]) for row in rows])
    aucs = {name: np.array([float(row[f"auc_{name}"]) for row in rows]) for name in CURVES}
    folder = RunDir(run)
    return Latents(read_latent(folder.z(folder.last_epoch()))[0], done, by_state(states, aucs, judge.labels))


def train_vae(judge: Judge, recipe: Recipe, out: Path, threads: int) -> Latents:
    """cryoDRGN's train_vae on the set, and its own volumes of some images by its own eval_vol."""
    done = runs.train_vae(judge.folder, out, **VAE, seed=recipe.seed, threads=threads)
    epoch = RunDir(out).last_epoch()
    z = read_latent(out / f"z.{epoch}.pkl")[0]
    rows = sample_rows(judge.labels, VOLUMES_PER_STATE * len(np.unique(judge.labels)))
    points = out.with_name("cryodrgn-z.txt")
    np.savetxt(points, z[rows])
    volumes = out.with_name("cryodrgn-volumes")
    command = [runs.cryodrgn(), "eval_vol", str(out / f"weights.{epoch}.pkl"), "-c", str(out / "config.yaml")]
    command += ["--zfile", str(points), "-o", str(volumes), "--Apix", str(judge.pixel_size)]
    runs.once(volumes, command, threads)
    files = sorted(volumes.glob("vol_*.mrc"))
    if len(files) != len(rows):
        raise SystemExit(f"{volumes}: {len(files)} volumes for {len(rows)} latents")
    maps = ((int(r), int(judge.labels[r]), map_of(f)) for r, f in zip(rows, files, strict=True))
    found = score_volumes(maps, judge.read_truth, judge.pixel_size, judge.mask)
    return Latents(z, done, by_state(found.labels, {name: found.auc(name) for name in CURVES}, judge.labels))


def map_of(path: Path) -> torch.Tensor:
    """A map file as a tensor."""
    return torch.from_numpy(read_map(path).data)


def by_state(states: np.ndarray, aucs: dict[str, np.ndarray], labels: np.ndarray) -> dict:
    """AUC of sampled volumes in the form of ``Judge.score``: each state counts as often as it occurs in the set."""
    names, counts = np.unique(labels, return_counts=True)
    out: dict = {"volumes": len(states)}
    for name, values in aucs.items():
        mean = np.array([values[states == state].mean() for state in names])
        out[f"per_state_{name}"], out[f"per_image_{name}"] = float(mean.mean()), float(np.average(mean, weights=counts))
        out[f"states_{name}"] = np.round(mean, 5).tolist()
    return out
