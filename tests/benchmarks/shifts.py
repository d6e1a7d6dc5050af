"""What refining wrong shifts gives back, and whether half maps stay honest: true labels, shifts off by half a pixel.

    CRYOSUITE_SHARED=../shared python tests/benchmarks/shifts.py [--kinds ribo16 igg24 mix16] [--seeds 0 1 2]
        [--work DIR]

For the true shifts, those given, and those refined as `polish` does (each half set against its own maps): errors in
pixels, and the mean over states and shells of the FSC of the plain half maps within the true mask, beside the product
of the half maps' own FSCs with the truth. Without noise in common the two are the same; half maps that were aligned on
each other's noise agree better than they should. One JSON per set.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import runs
import torch
from common import save
from judge import Judge
from sets import FAMILIES, WORK, make

from cryosuite.data.particles import ParticleSet
from cryosuite.formats.pickles import safe_load
from cryosuite.kernels import shells
from cryosuite.reconstruct.class_sums import accumulate
from cryosuite.reconstruct.shifts import refined_within_classes
from cryosuite.reconstruct.solve import solve
from cryosuite.reconstruct.weights import ClassWeights


def half_maps(judge: Judge, particles: ParticleSet, weights: ClassWeights) -> dict[str, float]:
    """Mean FSC of the half maps, and what it must be by their FSCs with the true maps."""
    found, expected = [], []
    with accumulate(particles, weights) as sums:
        for k in range(sums.n_classes):
            a, b = (solve(sums.load(k, h)) * judge.mask for h in (0, 1))
            truth = judge.read_truth(k) * judge.mask
            found.append(shells.fsc(a, b)[1:])
            expected.append((shells.fsc(a, truth) * shells.fsc(b, truth))[1:])
    means = {"half_maps": torch.stack(found).mean(), "by_the_truth": torch.stack(expected).mean()}
    return {name: round(float(value), 4) for name, value in means.items()}


def main() -> None:
    """Measure the chosen sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["ribo16", "igg24", "mix16"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--work", type=Path, default=WORK)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for recipe in FAMILIES["rough"]:
        if recipe.kind not in given.kinds or recipe.seed not in given.seeds or not recipe.flaw.startswith("poses"):
            continue
        judge, began = Judge(make(recipe, given.work)), time.process_time()
        weights = ClassWeights.from_labels(judge.labels)
        refined, found = refined_within_classes(judge.particles, weights)
        spent = round(time.process_time() - began, 1)
        true = safe_load(judge.folder / "truth_poses.pkl")[0][1]
        sets = {"true": replace(judge.particles, shift=true), "given": judge.particles, "refined": refined}
        rows = {
            name: {"error_px": runs.shift_errors(judge.folder, one), "fsc": half_maps(judge, one, weights)}
            for name, one in sets.items()
        }
        print(recipe.name, rows, flush=True)
        facts = {"kind": recipe.kind, "snr": recipe.snr, "box": recipe.box, "flaw": recipe.flaw, "seed": recipe.seed}
        measured = None if found is None else round(found.error, 4)
        save(f"shifts_{recipe.name}", {**facts, "threads": 1, "cpu_s": spent, "measured_px": measured, "rows": rows})


if __name__ == "__main__":
    main()
