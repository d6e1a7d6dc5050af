"""The proof: every method on the same simulated sets, bare and polished, side by side with cryoDRGN.

    CRYOSUITE_SHARED=../shared CRYODRGN_VENV=DIR python tests/benchmarks/proof.py [--suite mini|quick] [--work DIR]
        [--methods hype kraqen ...] [--sets mix16 ...] [--snr 0.1 0.01] [--seeds 0 1 2] [--budget-minutes M]

Suites: "mini" (mini-mix16, mini-mix100, mini-ribo16, mini-igg50; SNR 0.1 and 0.01; seeds 0 to 2; 32 pixels and 8,000 or
10,000 images, which two CPU cores can train on) and "quick" (four phantoms, 600 images; some minutes). Without
structures the sets are made of phantoms and called so. One JSON per set, seed and method; what is there is not made
again, interrupted trainings go on. Then proof.md, proof.csv and proof_*.png are written into the work folder.

With --budget-minutes nothing is started that is not expected to end in time; what is left is said.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import runs
import tables_proof
from common import RESULTS, save
from judge import Judge
from proof_methods import MAKERS, Job, make_row, seconds_expected
from sets import FAMILIES, WORK, Recipe, at_hand, make
from tables_maps import results


@dataclass
class Budget:
    """Wall minutes of this call, and how much longer than expected (in CPU seconds) rows take on this machine today."""

    minutes: float | None
    began: float = field(default_factory=time.monotonic)
    expected: float = 0.0
    spent: float = 0.0

    @property
    def slowness(self) -> float:
        """Wall seconds per expected CPU second: of the rows made in this call; before the first, by the load."""
        if self.expected:
            return max(self.spent / self.expected, 0.1)
        return max(os.getloadavg()[0] / (os.cpu_count() or 1), 1.0)

    def fits(self, seconds: float) -> bool:
        """Whether a row of so many expected CPU seconds ends in time."""
        if self.minutes is None:
            return True
        return time.monotonic() - self.began + seconds * self.slowness <= 60 * self.minutes

    def note(self, expected: float, spent: float) -> None:
        """A row was made."""
        self.expected += expected
        self.spent += spent


def chosen(asked: argparse.Namespace) -> list[Recipe]:
    """The sets of a suite that were asked for: by seed, then by noise."""
    found = [recipe for recipe in FAMILIES[asked.suite] if recipe.seed in asked.seeds]
    kinds = {recipe.kind for recipe in found}
    if unknown := set(asked.sets or []) - kinds:
        raise SystemExit(f"--sets {' '.join(sorted(unknown))}: not in suite {asked.suite}, which has {sorted(kinds)}")
    found = [recipe for recipe in found if not asked.sets or recipe.kind in asked.sets]
    return [at_hand(recipe) for recipe in found if not asked.snr or recipe.snr in asked.snr]


def record(job: Job, suite: str, judge: Judge, row: dict) -> dict:
    """A row with what it is of; programs without their folders."""
    recipe = job.recipe
    if program := runs.cryodrgn():
        row = json.loads(json.dumps(row).replace(program, "cryodrgn"))
    return {
        "suite": suite, "set": recipe.title, "kind": recipe.kind, "seed": recipe.seed, "images": recipe.images,
        "box": recipe.box, "pixel_size": judge.pixel_size, "snr": recipe.snr,
        "snr_at_box": judge.truth.dataset["snr_effective"], "states": len(np.unique(judge.labels)),
        "method": job.method, "threads": job.threads, **row,
    }  # fmt: skip


def run_all(jobs: list[Job], suite: str, budget: Budget, folder: Path) -> list[Job]:
    """Make the rows that are missing and fit the budget; those that are left."""
    left, judge = [], None
    for job in jobs:
        if (folder / f"{job.name}.json").exists():
            print(f"{job.name}: done before", flush=True)
            continue
        seconds = seconds_expected(job)
        if not budget.fits(seconds):
            left.append(job)
            continue
        began = time.monotonic()
        source = make(job.recipe, job.work, job.threads)
        if judge is None or judge.folder != source:
            judge = Judge(source)
        print(f"{job.name}: some {seconds / 60:.0f} CPU min", flush=True)
        save(job.name, record(job, suite, judge, make_row(job, judge)), folder)
        budget.note(seconds, time.monotonic() - began)
    return left


def main() -> None:
    """Parse, run, write the tables and pictures, say what is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("mini", "quick"), default="mini")
    parser.add_argument("--methods", nargs="+", choices=MAKERS, help="default: all; cryodrgn where it is installed")
    parser.add_argument("--sets", nargs="+", metavar="SET", help="only these, e.g. mix16")
    parser.add_argument("--snr", type=float, nargs="+", help="only these signal-to-noise ratios")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2, of the quick suite 0")
    parser.add_argument("--budget-minutes", type=float, metavar="M", help="start nothing that is to end later")
    parser.add_argument("--work", type=Path, default=WORK, help="keeps sets, runs, tables and pictures")
    parser.add_argument("--results", type=Path, default=RESULTS, help="keeps the JSON files")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    asked.seeds = asked.seeds or ([0, 1, 2] if asked.suite == "mini" else [0])
    methods = asked.methods or [name for name in MAKERS if name != "cryodrgn" or runs.cryodrgn()]
    if not asked.methods and len(methods) < len(MAKERS):
        print("no cryoDRGN: set CRYODRGN_VENV to an environment with `pip install cryodrgn` for its rows")
    jobs = [Job(recipe, method, asked.work, asked.threads) for recipe in chosen(asked) for method in methods]
    budget = Budget(asked.budget_minutes)
    left = run_all(jobs, asked.suite, budget, asked.results)
    found = [one for one in results(asked.results, "proof_*.json") if one["suite"] == asked.suite]
    if found:
        tables_proof.write(found, asked.work)
    if left:
        minutes = sum(map(seconds_expected, left)) * budget.slowness / 60
        print(f"left for another call, some {minutes:.0f} min at today's pace:")
        print("\n".join(f"  {job.name}: some {seconds_expected(job) * budget.slowness / 60:.0f} min" for job in left))


if __name__ == "__main__":
    main()
