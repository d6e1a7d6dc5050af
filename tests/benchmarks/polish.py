"""polish with the true labels and with the latents of every method, beside what there was before it.

    CRYOSUITE_SHARED=../shared python tests/benchmarks/polish.py [--family polish|rough|d128|methods|try]
        [--seeds 0 1 2] [--rows true,kraqen,hype,cryodrgn] [--work DIR]

Families: "polish" (assembly of 16, loop of 24, mix of 16; SNR 0.01 and 0.1; 2,400 images of 64 pixels), "rough" (the
same with coloured noise, with angles wrong by 1 or 3 degrees and shifts by half a pixel), "d128" (128 pixels), and
"methods" (the mix at D = 32 on which networks can be trained on two cores). Rows: "true" needs no training; the others
train the method with settings a user would type: train-kraqen is told the number of states, and latents are split into
1.5 bins per state. cryoDRGN is taken from the environment CRYODRGN_VENV. One JSON per set and seed; rows that
are in it are not made again.

AUC is the mean over all images of the signed FSC of the image's map with the image's truth. "before" is what the method
shows without polish: its own volumes, or plain backprojection of the true labels.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import latents
import numpy as np
import runs
from common import RESULTS, save
from judge import CURVES, Judge, not_better, without_states
from sets import FAMILIES, WORK, Recipe, make

from cryosuite.data.particles import ParticleSet
from cryosuite.reconstruct.class_sums import accumulate
from cryosuite.reconstruct.polish import polish
from cryosuite.reconstruct.shifts import refined_within_classes
from cryosuite.reconstruct.weights import ClassWeights

ROWS = ("true", "kraqen", "hype", "cryodrgn")


def polished(judge: Judge, weights: ClassWeights, particles: ParticleSet | None = None) -> dict:
    """Polish particles (default: those of the set) shared out among classes, judge the maps by all of them."""
    began = time.process_time()
    particles, moved = refined_within_classes(judge.particles if particles is None else particles, weights)
    with accumulate(particles, weights) as sums:
        found = polish(sums)
    spent = time.process_time() - began
    scores = judge.score(lambda k: found.maps[k], weights.labels())
    made = {"scores": scores, "cpu_s": round(spent, 1), "basis": found.basis, "classes": weights.n_classes}
    if moved is not None:
        off = runs.shift_errors(judge.folder, judge.particles), runs.shift_errors(judge.folder, particles)
        made["shift_errors_px"] = {"given": off[0], "refined": off[1], "measured": round(moved.error, 4)}
    return made


def true_row(judge: Judge, recipe: Recipe, work: Path, threads: int) -> dict:
    """With the true labels."""
    return {"before": judge.floors()["labels"], "after": polished(judge, ClassWeights.from_labels(judge.labels))}


def kraqen_row(judge: Judge, recipe: Recipe, work: Path, threads: int) -> dict:
    """With the soft assignments of train-kraqen."""
    run = work / "runs" / recipe.name / "kraqen"
    states = len(np.unique(judge.labels))
    done = runs.train_kraqen(judge.folder, run, "--n-states", str(states), seed=recipe.seed, threads=threads)
    weights = runs.kraqen_weights(run)
    labels, particles = weights.labels(), runs.kraqen_particles(run)
    return {
        "training": done.costs(),
        "agreement": judge.agreement(labels),
        "shift_errors_px": {
            name: runs.shift_errors(judge.folder, one)
            for name, one in (("given", judge.particles), ("refined", particles))
        },
        "before": judge.score(runs.kraqen_map(run), labels),
        "after": polished(judge, weights, particles),
    }


def hype_row(judge: Judge, recipe: Recipe, work: Path, threads: int) -> dict:
    """With the latents of train-hype."""
    return latent_row(judge, latents.hype(judge, recipe, work / "runs" / recipe.name / "hype", threads))


def cryodrgn_row(judge: Judge, recipe: Recipe, work: Path, threads: int) -> dict:
    """With the latents of cryoDRGN's train_vae."""
    return latent_row(judge, latents.train_vae(judge, recipe, work / "runs" / recipe.name / "cryodrgn", threads))


def latent_row(judge: Judge, found: latents.Latents) -> dict:
    """Polish 1.5 bins per state, and the bins polish makes by itself; the agreement is that of one bin per state."""
    states = len(np.unique(judge.labels))
    unasked = polished(judge, latents.bins(found.z))
    return {
        "training": found.done.costs(),
        "agreement": judge.agreement(latents.bins(found.z, states).labels()),
        "before": found.before,
        "after": polished(judge, latents.bins(found.z, round(1.5 * states))),
        "after with default bins": {**unasked, "scores": without_states(unasked["scores"])},
    }


MAKERS: dict[str, Callable[[Judge, Recipe, Path, int], dict]] = {
    "true": true_row, "kraqen": kraqen_row, "hype": hype_row, "cryodrgn": cryodrgn_row,
}  # fmt: skip


def compare(row: dict, floors: dict) -> dict:
    """On how many states the polished maps do not beat each of the others."""
    others = {"before": row["before"], "consensus": floors["consensus"], "label backprojection": floors["labels"]}
    return {
        name: {curve: not_better(row["after"]["scores"], other, curve) for curve in CURVES}
        for name, other in others.items()
    }


def run_set(recipe: Recipe, rows: list[str], work: Path, threads: int) -> None:
    """Make the rows of one set that its result does not hold yet."""
    name = f"polish_{recipe.name}"
    path = RESULTS / f"{name}.json"
    known = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    missing = [row for row in rows if row not in known["rows"]]
    if not missing:
        print(f"{name}: done before")
        return
    judge = Judge(make(recipe, work, threads))
    floors = judge.floors()
    for row in missing:
        made = MAKERS[row](judge, recipe, work, threads)
        made["not_better"] = compare(made, floors)
        after, before = made["after"]["scores"], made["before"]
        text = ", ".join(f"{c} {before[f'per_image_{c}']:.4f} -> {after[f'per_image_{c}']:.4f}" for c in CURVES)
        print(f"{name} {row}: {text}", flush=True)
        known["rows"][row] = made
        save(
            name,
            {
                "recipe": recipe.title, "kind": recipe.kind, "seed": recipe.seed, "images": recipe.images,
                "box": recipe.box, "snr": recipe.snr, "flaw": recipe.flaw,
                "snr_at_box": judge.truth.dataset["snr_effective"],
                "states": len(np.unique(judge.labels)), "floors": floors, "rows": known["rows"],
            },
        )  # fmt: skip


def main() -> None:
    """Run the chosen families, seeds and rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--family", nargs="+", choices=("polish", "rough", "d128", "methods", "try"), default=["polish"]
    )
    parser.add_argument("--kinds", nargs="+", help="only these kinds of set, e.g. mix16")
    parser.add_argument("--snr", type=float, nargs="+", help="only these signal-to-noise ratios")
    parser.add_argument("--rows", default="true", help=f"of {','.join(ROWS)}")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    rows = arguments.rows.split(",")
    if unknown := set(rows) - set(ROWS):
        parser.error(f"unknown rows {', '.join(unknown)}")
    for recipe in [recipe for family in arguments.family for recipe in FAMILIES[family]]:
        wanted = recipe.seed in arguments.seeds
        wanted &= not arguments.kinds or recipe.kind in arguments.kinds
        if wanted and (not arguments.snr or recipe.snr in arguments.snr):
            run_set(recipe, rows, arguments.work, arguments.threads)


if __name__ == "__main__":
    main()
