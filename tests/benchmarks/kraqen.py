"""Quality of train-kraqen on mixtures, beside floor, ceiling and the classifier that knows the true maps.

    CRYOSUITE_SHARED=../shared python tests/benchmarks/kraqen.py [--sets mix16 mix100 ...] [--seeds 0 1 2] [--work DIR]

Sets: mix16 (8,000 images of 64 pixels, SNR 0.1), mix16-noisy (32,000, SNR 0.01) and mix100 (all structures, 200 images
each). One JSON per set and seed under results/; sets and runs that are finished are not repeated. The codes are merged
by the run itself, without any knowledge of the truth; the ARI is that of the merged codes.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import runs
from common import RESULTS, save
from judge import Judge, without_states
from sets import FAMILIES, WORK, Recipe, make

# what the user would type: the number of states expected, and for many states a smaller box to tell them apart in
SETS: dict[str, tuple[str, list[str]]] = {
    "mix16": ("kraqen", ["--n-states", "16"]),
    "mix16-noisy": ("kraqen001", ["--n-states", "16"]),
    "mix100": ("kraqen100", ["--n-states", "100", "--cluster-box", "32"]),
}


def run_set(name: str, recipe: Recipe, options: list[str], work: Path, threads: int, variant: str) -> None:
    """Simulate, train, judge, save."""
    result_name = f"kraqen_{name}{variant and '-' + variant}_s{recipe.seed}"
    if (RESULTS / f"{result_name}.json").exists():
        print(f"{result_name}: done before")
        return
    judge = Judge(make(recipe, work, threads))
    run = work / "runs" / f"{recipe.name}{variant and '-' + variant}" / "kraqen"
    done = runs.train_kraqen(judge.folder, run, *options, seed=recipe.seed, threads=threads)
    found = runs.scores(run, "--cluster-seeds", "3", threads=threads)
    labels = runs.kraqen_labels(run)
    floors = {key: without_states(value) for key, value in judge.floors().items()}
    save(
        result_name,
        {
            "set": name,
            "recipe": recipe.title,
            "seed": recipe.seed,
            "images": recipe.images,
            "box": recipe.box,
            "snr": recipe.snr,
            "snr_at_box": judge.truth.dataset["snr_effective"],
            "variant": variant,
            "threads": threads,
            "training": done.costs(),
            "merged": judge.agreement(labels),
            "knn10_accuracy": found["clustering"]["knn10_accuracy"],
            "kmeans_ari": found["clustering"]["kmeans_ari"],
            "per_image": found["per_image"],
            "maps": judge.score(runs.kraqen_map(run), labels),
            "floors": floors,
            "bayes": judge.bayes(),
        },
    )


def main() -> None:
    """Run the chosen sets and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, help="another number of images than the set's own")
    parser.add_argument("--options", default="", help="more options of train-kraqen, as one string")
    parser.add_argument("--variant", default="", help="a word for results with --options or --images")
    arguments = parser.parse_args()
    if (arguments.options or arguments.images) and not arguments.variant:
        parser.error("--options and --images need a --variant, so that results keep apart")
    for name in arguments.sets:
        family, options = SETS[name]
        for recipe in FAMILIES[family]:
            if recipe.seed in arguments.seeds:
                recipe = replace(recipe, images=arguments.images or recipe.images)
                given = [*options, *arguments.options.split()]
                run_set(name, recipe, given, arguments.work, arguments.threads, arguments.variant)


if __name__ == "__main__":
    main()
