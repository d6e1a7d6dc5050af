"""The ablation of CryoKRAQEN's paper, all eight rows, on a loop and on a mixture, with standard deviations over seeds.

    CRYOSUITE_SHARED=../shared python tests/benchmarks/ablation.py [--sets loop mix16] [--rows ...] [--seeds 0 1 2]

"full" is the published configuration under our reading of it (KRAQEN.md, section 2): tri-plane field, Epanechnikov
kernel, cosine annealing from 13 to 1.3 Bayes temperatures, triplet loss; every other row changes one thing. Networks
and training are cut to what one core does in about a minute; the closed-form finish and merging are left out of all
rows, so that the field itself is seen. "ours" are this project's defaults for the same field, with the finish, and
stand outside of the ablation. One JSON per set, row and seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import runs
from common import RESULTS, save
from judge import Judge, without_states
from sets import FAMILIES, WORK, Recipe, make

PUBLISHED = ["--assign", "kernel", "--anneal", "paper", "--beta", "0.05", "--em-finish", "0", "--merge", "none"]
COLD, HOT, ANNEALED = (["--t-max", t, "--t-min", low] for t, low in (("1.3", "1.3"), ("13", "13"), ("13", "1.3")))
NETWORK = ["--channels", "8", "--features", "32", "--width", "64", "--layers", "2", "-b", "100"]
TRIPLANE, KERNEL = ["--field", "triplane"], ["--kernel", "epanechnikov"]
ROWS: dict[str, list[str]] = {
    "full": [*TRIPLANE, *PUBLISHED, *KERNEL, *ANNEALED],
    "voxels instead of the tri-plane": ["--field", "voxel", "--m-step", "wiener", *PUBLISHED, *KERNEL, *ANNEALED],
    "Fourier features instead of the tri-plane": ["--field", "fourier", *PUBLISHED, *KERNEL, *ANNEALED],
    "Gaussian kernel": [*TRIPLANE, *PUBLISHED, "--kernel", "gaussian", *ANNEALED],
    "no kernel": [*TRIPLANE, *PUBLISHED, "--kernel", "none", *ANNEALED],
    "no annealing, low T": [*TRIPLANE, *PUBLISHED, *KERNEL, *COLD],
    "no annealing, high T": [*TRIPLANE, *PUBLISHED, *KERNEL, *HOT],
    "no triplet": [*TRIPLANE, *PUBLISHED, *KERNEL, *ANNEALED, "--beta", "0"],
    "ours": [*TRIPLANE, "--merge", "none"],
}
SETS: dict[str, tuple[str, list[str]]] = {
    "loop": ("igg50", ["--n-codes", "32", "--rank", "8"]),
    "mix16": ("mix16", ["--n-codes", "24", "--rank", "16"]),
}


def run_row(name: str, row: str, recipe: Recipe, arguments: argparse.Namespace) -> None:
    """One training and its scores."""
    key = row.replace(",", "").replace(" ", "-")
    result_name = f"ablation_{name}_{key}_s{recipe.seed}"
    if (RESULTS / f"{result_name}.json").exists():
        print(f"{result_name}: done before")
        return
    judge = Judge(make(recipe, arguments.work, arguments.threads))
    run = arguments.work / "runs" / recipe.name / f"ablation-{key}"
    options = [*ROWS[row], *SETS[name][1]]
    if "voxel" not in options:
        options += [*NETWORK, "-n", str(arguments.epochs)]
    done = runs.train_kraqen(judge.folder, run, *options, seed=recipe.seed, threads=arguments.threads)
    found = runs.scores(run, "--no-clustering", "--images", str(arguments.images), threads=arguments.threads)
    weights = runs.kraqen_weights(run)
    agreement = judge.agreement(weights.labels())
    entropy = float(np.mean(weights.entropy()))
    floors = {key: without_states(value) for key, value in judge.floors().items()}
    scores, maps = found["per_image"], judge.score(runs.kraqen_map(run), weights.labels())
    save(
        result_name,
        {
            "set": name, "row": row, "recipe": recipe.title, "seed": recipe.seed, "epochs": arguments.epochs,
            "training": done.costs(), "per_image": scores, "agreement": agreement, "entropy": entropy,
            "maps": without_states(maps), "floors": floors,
        },
    )  # fmt: skip
    print(f"{result_name}: AUC {scores['auc_masked']:.3f}, ARI {agreement['ari']:.3f}", flush=True)


def main() -> None:
    """Run the chosen sets, rows and seeds: all rows of a seed before the next seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=50, help="volumes judged")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    kinds = {SETS[name][0]: name for name in arguments.sets}
    for recipe in FAMILIES["ablation"]:
        if recipe.seed in arguments.seeds and recipe.kind in kinds:
            for row in arguments.rows:
                run_row(kinds[recipe.kind], row, recipe, arguments)


if __name__ == "__main__":
    main()
