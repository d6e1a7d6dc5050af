"""Quality of deco-classify: known poses, ab initio, the fine-tuning ablation and the sweep of the latent's length.

    python tests/benchmarks/deco.py --work DIR --family known --set DATA --seeds 0,1,2
    python tests/benchmarks/deco.py --work DIR --family abinitio --set DATA --k 4
    python tests/benchmarks/deco.py --work DIR --family finetune|zdim --set DATA

DATA is a folder of ``cryosuite simulate`` (or a pattern with {seed}). Finished runs are not repeated. A record per run
goes to results/deco_FAMILY_NAME_sSEED.json. Tune on seeds from 10 on, report 0, 1 and 2.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from common import save, without_paths
from runs import Done, deco_classify

from cryosuite.data.open import open_particles
from cryosuite.data.workdir import RunDir, WorkDir
from cryosuite.formats.config import read_yaml
from cryosuite.formats.mrc import read_map
from cryosuite.formats.pickles import read_labels, read_latent, safe_load
from cryosuite.metrics.clustering import agreement, kmeans_labels, knn_accuracy
from cryosuite.metrics.poses import angles, nearest_mates, pose_report
from cryosuite.reconstruct.refine import search_everywhere
from cryosuite.simulate.beads import symmetry_mates
from cryosuite.simulate.sources import find_files, read_structure

ABLATION = ("all", "last-3", "head", "none")
LIMIT_PARTICLES = 300  # of each molecule, searched for in its true map
LENGTHS = (4, 8, 16, 32, 64, 128)


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--family", choices=("known", "abinitio", "finetune", "zdim"), required=True)
    parser.add_argument("--set", required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--k", type=int, help="classes; default: auto, ab initio as many as there are")
    parser.add_argument("--encoder", help="default: that of deco-classify")
    parser.add_argument("options", nargs="*", help="after --: more options of deco-classify")
    asked = parser.parse_args()
    for seed in map(int, asked.seeds.split(",")):
        source = Path(asked.set.format(seed=seed))
        for name, more in variants(asked.family, asked.encoder):
            done = deco(source, asked.work / f"{source.name}-{asked.family}-{name}-s{seed}", seed, asked, more)
            record = {"family": asked.family, "variant": name, "set": source.name, "seed": seed}
            record |= {**judge(source, done.folder), **done.costs()}
            record["command"] = without_paths(record["command"].replace(str(source), source.name))
            label = f"{source.name}_{name}" if name else source.name
            path = save(f"deco_{asked.family}_{label}_s{seed}", record)
            print(path.name, {key: record[key] for key in ("ari", "ami", "knn", "cpu_s")}, flush=True)


def variants(family: str, encoder: str | None) -> list[tuple[str, list[str]]]:
    """(name, options) of the runs of a family."""
    own = ["--encoder", encoder] if encoder else []
    if family == "finetune":
        return [(how, ["--finetune", how, *own]) for how in ABLATION] + [("random", ["--encoder", "random"])]
    if family == "zdim":
        return [(f"z{zdim}", ["--zdim", str(zdim), *own]) for zdim in LENGTHS]
    return [("", [*own, *(["--ab-initio"] if family == "abinitio" else [])])]


def deco(source: Path, run: Path, seed: int, asked: argparse.Namespace, more: list[str]) -> Done:
    """One run of the command on one thread."""
    k = str(asked.k or "auto")
    if asked.family == "abinitio" and not asked.k:  # without poses the number of maps must be said
        k = str(int(np.max(read_labels(source / "labels.pkl"))) + 1)
    return deco_classify(source, run, k, *more, *asked.options, seed=seed)


def judge(source: Path, run: Path) -> dict:
    """Labels and latents against the truth; poses, per molecule and in a frame of its own, where they were found."""
    folder = RunDir(run)
    epoch = folder.last_epoch()
    truth = np.asarray(read_labels(source / "labels.pkl")).astype(np.int64)
    found, z = np.asarray(safe_load(folder.labels(epoch))[0]), read_latent(folder.z(epoch))[0]
    ari, ami = agreement(truth, found)
    means = agreement(truth, kmeans_labels(z, int(truth.max()) + 1))
    scores = {"ari": ari, "ami": ami, "classes": int(found.max()) + 1, "knn": knn_accuracy(z, truth)}
    scores |= {"kmeans_ari": means[0], "kmeans_ami": means[1]}
    if folder.read_config().get("poses_found"):
        scores["poses"] = [pose_row(source, folder, epoch, truth, state, found) for state in np.unique(truth)]
    return scores


def pose_row(source: Path, folder: RunDir, epoch: int, truth: np.ndarray, state: int, found: np.ndarray) -> dict:
    """Pose errors of the particles of a molecule that lie in the class that has most of them."""
    particles = open_particles(source)
    rotation, shift = safe_load(folder.poses(epoch))[0]
    own = np.flatnonzero(truth == state)
    class_ = np.bincount(found[own]).argmax()
    rows, mates = own[found[own] == class_], symmetry(source, state)
    true = particles.rotation[rows], particles.shift[rows]
    report = pose_report(rotation[rows], true[0], shift[rows], true[1], particles.box_size, mates=mates)
    return {
        "state": int(state), "class": int(class_), "particles": len(rows), "mates": len(mates),
        "rotation_median_deg": report.aligned["median_deg"], "chance_deg": report.chance_aligned["median_deg"],
        "rotation_under_20_deg": report.aligned["under_20_deg"], "shift_median_px": report.aligned["shift_median_px"],
        "mirrored": report.mirrored, "true_map": searched_in_the_truth(source, own[:LIMIT_PARTICLES], state, mates),
    }  # fmt: skip


def searched_in_the_truth(source: Path, rows: np.ndarray, state: int, mates: np.ndarray) -> dict:
    """Errors that remain when particles are searched for over all orientations in the true map of their molecule."""
    particles, volume = open_particles(source), torch.from_numpy(read_map(WorkDir(source).volume(state)).data.copy())
    true = particles.rotation[rows].astype(np.float64)
    found = nearest_mates(search_everywhere(particles, rows, volume)[0][:, 0].astype(np.float64), true, mates)
    errors = angles(found, true)
    return {"rotation_median_deg": float(np.median(errors)), "rotation_under_20_deg": float((errors < 20).mean())}


def symmetry(source: Path, state: int) -> np.ndarray:
    """Rotations (G, 3, 3) that leave a molecule as it is; the identity alone for one that is not of a file."""
    states = read_yaml(source / "dataset.yaml")["states"]
    files = find_files(states["source"])
    return symmetry_mates(read_structure(files[state])) if len(files) == len(states["structures"]) else np.eye(3)[None]


if __name__ == "__main__":
    main()
