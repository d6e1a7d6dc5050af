"""How far the images of a set tell its states apart: beside train-kraqen's result, two limits that know the truth.

    CRYOSUITE_SHARED=../shared python tests/benchmarks/kraqen_limits.py [--family polish rough mini] [--snr 0.01]
        [--seeds 0 1 2] [--work DIR]

"bayes" knows the true maps and shares, poses and noise as they are told to every program: only a method that mends the
poses can do better. "from the truth" is train-kraqen's own expectation maximisation in its box of 32 pixels, begun with
the true labels (and shifts refined by them where they are wrong), after ten iterations: what is lost there is lost
because maps are made of so few particles, not by the search. What train-kraqen itself found is in the results of
polish.py. One JSON per set.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from common import save
from judge import Judge
from sets import FAMILIES, WORK, make

from cryosuite.methods.kraqen_codes import refine
from cryosuite.methods.kraqen_cross import engine_for
from cryosuite.methods.kraqen_options import preset
from cryosuite.metrics.clustering import agreement
from cryosuite.reconstruct.weights import ClassWeights

ITERATIONS = 10


def from_the_truth(judge: Judge, seed: int) -> list[float]:
    """ARI after each iteration from the true labels, every image judged by maps of the other half set."""
    states, labels = np.unique(judge.labels, return_inverse=True)
    options = preset("compositional", judge.particles.box_size, False, n_codes=len(states))[1].options
    engine = engine_for(judge.particles, options, seed)
    p, found = ClassWeights.from_labels(labels, len(states)), []
    engine.align(p)
    with engine.threads_of_torch():
        for _ in range(ITERATIONS):
            p = refine(engine, p, 1, 1.0).p
            found.append(round(agreement(labels, p.labels())[0], 4))
    return found


def main() -> None:
    """Measure the chosen sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=("polish", "rough", "mini"), default=["polish", "rough"])
    parser.add_argument("--snr", type=float, nargs="+", default=[0.01])
    parser.add_argument("--kinds", nargs="+", help="only these kinds of set, e.g. ribo16")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=WORK)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for recipe in [recipe for family in given.family for recipe in FAMILIES[family]]:
        if (
            recipe.seed not in given.seeds
            or recipe.snr not in given.snr
            or recipe.kind not in (given.kinds or recipe.kind)
        ):
            continue
        judge, began = Judge(make(recipe, given.work)), time.process_time()
        found = {"bayes": judge.bayes(), "from_the_truth": from_the_truth(judge, recipe.seed)}
        print(recipe.name, f"Bayes {found['bayes']['ari']:.3f}, from the truth {found['from_the_truth']}", flush=True)
        facts = {"kind": recipe.kind, "snr": recipe.snr, "box": recipe.box, "flaw": recipe.flaw, "seed": recipe.seed}
        spent = round(time.process_time() - began, 1)
        save(f"limits_{recipe.name}", {**facts, "images": recipe.images, "threads": 1, "cpu_s": spent, **found})


if __name__ == "__main__":
    main()
