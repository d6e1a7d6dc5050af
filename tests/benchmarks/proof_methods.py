"""The methods of proof.py: what is run for one row, and what is written down of it.

All are judged alike: the images that CryoBench would take (every n-th of the set sorted by state), by ``cryosuite
eval-fsc`` where there is a run or a folder of maps, by the same functions where there is only one map per state.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import runs
import torch
from common import CRYOSUITE
from judge import PLAIN, Judge
from latents import VAE, hype_epochs, more_epochs
from sets import Recipe

from cryosuite.data.results import run_polish
from cryosuite.data.workdir import RunDir
from cryosuite.metrics.truth import Extra, per_conformation, per_image, sample_rows
from cryosuite.reconstruct.backproject import reconstruct, reconstruct_classes

IMAGES = 100  # judged
BINS_PER_STATE = 1.5  # polish of latents
# kept of the scores of eval-fsc: no lists, nothing that can be computed from the rest
SCORES = [
    *(f"auc_{curve}{end}" for curve in ("masked", "unmasked") for end in ("", "_std", "_normalised")),
    *(f"resolution_{curve}_0.5_A" for curve in ("masked", "unmasked")),
    "chamfer_A", "viou", "volumes", "mask_fraction",
]  # fmt: skip
CLUSTERING = ("kmeans_ari", "kmeans_ami", "gmm_ari", "gmm_ami", "knn10_accuracy")
# CPU seconds at D = 32, of starting (commands and their scores) and of 1,000 images: from the first runs, two cores
COSTS = {
    "consensus": (5, 1), "labels": (40, 8),
    "hype": (60, 100), "kraqen": (60, 6), "deco": (60, 75), "cryodrgn": (90, 120),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One row to make: a set, a method, where things are kept, how many threads may be used."""

    recipe: Recipe
    method: str
    work: Path
    threads: int = 1

    @property
    def name(self) -> str:
        """Of the result."""
        return f"proof_{self.recipe.name}_{self.method}"

    @property
    def run(self) -> Path:
        """Folder of the training; maps and scores lie beside it."""
        return self.work / "runs" / self.recipe.name / self.method

    def beside(self, what: str) -> Path:
        """A folder beside the run, e.g. of its polished maps."""
        return self.run.with_name(f"{self.method}-{what}")


def seconds_expected(job: Job) -> float:
    """CPU seconds that a row is expected to take; a training that is there needs only be judged."""
    start, per_thousand = COSTS[job.method]
    if job.run.is_symlink() or job.run.with_name(f"{job.run.name}.done.json").exists():
        return start
    visits = more_epochs(job.recipe) if job.method in ("hype", "cryodrgn") else 1.0
    return start + per_thousand * job.recipe.images / 1000 * (job.recipe.box / 32) ** 2 * visits


def make_row(job: Job, judge: Judge) -> dict:
    """Run the method, bare and polished, and judge it."""
    return MAKERS[job.method](job, judge)


def consensus(job: Job, judge: Judge) -> dict:
    """One map for all."""
    began = time.process_time()
    found = reconstruct(judge.particles, **PLAIN).map
    return {"bare": judged(judge, lambda _: found), "cpu_s": round(time.process_time() - began, 1)}


def labels(job: Job, judge: Judge) -> dict:
    """The particles of each true state in a map of their own: bare, the ceiling of plain maps; polished, the oracle."""
    began = time.process_time()
    found = {k: one.map for k, one in reconstruct_classes(judge.particles, judge.labels, **PLAIN).items()}
    row = {"bare": judged(judge, found.__getitem__), "cpu_s": round(time.process_time() - began, 1)}
    return row | {"polished": polished(job, judge, judge.folder, "--labels", str(judge.folder / "labels.pkl"))}


def hype(job: Job, judge: Judge) -> dict:
    """train-hype with the small preset."""
    options = ["--preset", "small", "-n", str(hype_epochs(job.recipe))]
    done = runs.train_hype(judge.folder, job.run, *options, seed=job.recipe.seed, threads=job.threads)
    return trained(job, judge, done) | {"polished": polished(job, judge, job.run, "-k", str(bins(judge)))}


def kraqen(job: Job, judge: Judge) -> dict:
    """train-kraqen, told the number of states; polished by its own soft shares."""
    options = ["--n-states", str(len(judge.truth.volumes))]
    done = runs.train_kraqen(judge.folder, job.run, *options, seed=job.recipe.seed, threads=job.threads)
    return trained(job, judge, done) | {"polished": polished(job, judge, job.run)}


def deco(job: Job, judge: Judge) -> dict:
    """deco-classify with the known poses; it counts the classes itself, and polishes them itself."""
    done = runs.deco_classify(judge.folder, job.run, "auto", seed=job.recipe.seed)
    row = trained(job, judge, done)
    own = run_polish(job.run, RunDir(job.run).last_epoch())
    if own.summary.exists():
        row["polished"] = scored(job, judge, own.path, "polished") | {"classes": len(list(own.path.glob("vol_*.mrc")))}
    return row


def cryodrgn(job: Job, judge: Judge) -> dict:
    """cryoDRGN's train_vae; epochs for about the CPU time of train-hype."""
    sizes = VAE | {"epochs": round(VAE["epochs"] * more_epochs(job.recipe))}
    done = runs.train_vae(judge.folder, job.run, **sizes, seed=job.recipe.seed, threads=job.threads)
    return trained(job, judge, done) | {"polished": polished(job, judge, job.run, "-k", str(bins(judge)))}


MAKERS: dict[str, Callable[[Job, Judge], dict]] = {
    "consensus": consensus, "labels": labels, "kraqen": kraqen, "hype": hype, "deco": deco, "cryodrgn": cryodrgn,
}  # fmt: skip


def bins(judge: Judge) -> int:
    """Groups that latents without classes of their own are split into by polish."""
    return round(BINS_PER_STATE * len(judge.truth.volumes))


def trained(job: Job, judge: Judge, done: runs.Done) -> dict:
    """What the training cost, the network's own volumes (or maps), the latents, the labels of methods that have any."""
    found = evaluation(job, judge, job.run, "bare", "--cluster-seeds", "3", "--gmm-seeds", "1")
    row = {"training": done.costs(), "bare": short(found)}
    if "clustering" in found:
        row["latents"] = {name: found["clustering"][name] for name in CLUSTERING if name in found["clustering"]}
    if "labels" in found:
        row["own_labels"] = found["labels"]
    return row


def polished(job: Job, judge: Judge, what: Path, *options: str) -> dict:
    """``cryosuite polish`` of a run, or of the set with labels: scores and costs."""
    out = job.beside("polished")
    command = [*CRYOSUITE, "polish", str(what), "-o", str(out), "--overwrite", *options]
    done = runs.once(out, [*command, "--threads", str(job.threads)], job.threads)
    return scored(job, judge, out, "polished") | done.costs() | {"classes": len(list(out.glob("vol_*.mrc")))}


def scored(job: Job, judge: Judge, folder: Path, what: str) -> dict:
    """Scores of a folder of polished maps."""
    return short(evaluation(job, judge, folder, what))


def evaluation(job: Job, judge: Judge, folder: Path, what: str, *options: str) -> dict:
    """``cryosuite eval-fsc`` of a run or a folder of polish."""
    more = ["--truth", str(judge.folder), "--sampler", "compat", "--images", str(IMAGES), "--shapes", *options]
    return runs.scores(folder, *more, threads=job.threads, out=job.beside(f"{what}-scores"))


def judged(judge: Judge, map_of: Callable[[int], torch.Tensor]) -> dict:
    """Scores of one map per state, by the functions behind ``eval-fsc`` and the same images."""
    truth = (judge.labels, judge.read_truth, judge.pixel_size)
    z = judge.labels[:, None].astype(np.float32)

    def decode(points: np.ndarray) -> np.ndarray:
        return np.stack([map_of(int(k)).numpy() for k in points[:, 0]])

    rows = sample_rows(judge.labels, IMAGES, "compat")
    images = per_image(decode, z, *truth, rows, judge.mask, extra=Extra(shapes=True))
    states = per_conformation(decode, z, *truth, judge.mask)
    return short({"per_image": images.summary(), "per_conformation": states.summary()})


def short(found: dict) -> dict:
    """The numbers of an evaluation that are kept."""
    return {
        key: {name: round(found[key][name], 5) for name in SCORES if name in found[key]}
        for key in ("per_image", "per_conformation")
    }
