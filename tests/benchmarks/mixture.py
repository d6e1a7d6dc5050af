"""Quality of train-hype on a mixture of unrelated complexes, beside its floor and its ceiling.

    python tests/benchmarks/mixture.py --structures ../shared/data/atomic/bench --seeds 0 1 2 [-D 32] [--variant hype]

For each seed: simulate, train, score with ``eval-fsc --oracle`` (consensus is the floor, backprojection with the true
labels the ceiling). One JSON per seed and variant under results/. The set is mini-mix16: sixteen structures of the
group ``bench``, noise added at twice the box.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from common import CRYOSUITE, save, timed

MINI_MIX16 = "1IGY 1HZH 1XNR 6VXX 1KX5 8ZZI 4Y08 5GJV 1TR2 1T6B 3D2F 1E4M 3EIY 3WIP 4R8P 7DRT".lower().split()
VARIANTS = {
    "hype": [],
    "concat": ["--conditioning", "concat"],
    "no-position": ["--pos-embed", "none"],
    "mse": ["--loss", "mse"],
}


def structures(folder: Path) -> str:
    """The sixteen structures as a comma list of files."""
    names = [folder / f"{name}.cif.gz" for name in MINI_MIX16]
    missing = [str(name) for name in names if not name.exists()]
    if missing:
        raise SystemExit(f"not found: {', '.join(missing)}")
    return ",".join(map(str, names))


def run_seed(arguments: argparse.Namespace, seed: int) -> None:
    """One data set, one training, one table of scores."""
    box, work = arguments.box, arguments.work / f"mix16-d{arguments.box}-snr{arguments.snr}-s{seed}"
    run = work / f"run-{arguments.variant}"
    if not (work / "sim" / "dataset.yaml").exists():
        size = ["-n", str(arguments.images), "-D", str(box), "--Apix", str(320 / box), "--snr", str(arguments.snr)]
        source = ["--structures", structures(arguments.structures), "--recipe", "mix"]
        timed([*CRYOSUITE, "simulate", "-o", str(work / "sim"), *source, *size, "--seed", str(seed)])
    train = [*CRYOSUITE, "train-hype", str(work / "sim"), "-o", str(run), "--preset", arguments.preset]
    train += ["--seed", str(seed), "-n", str(arguments.epochs), "--overwrite", *VARIANTS[arguments.variant]]
    environment = {"OMP_NUM_THREADS": str(arguments.threads)} if arguments.threads else {}
    done = (run / f"z.{arguments.epochs}.pkl").exists()  # of an earlier call: only scored again
    training = None if done else timed(train, env=environment)
    timed([*CRYOSUITE, "eval-fsc", str(run), "--oracle"])
    scores = json.loads(next(run.glob("eval.*/scores.json")).read_text())
    scores["oracle"].pop("per_state", None)
    save(
        f"mix16_d{box}_snr{arguments.snr}_{arguments.variant}_s{seed}",
        {
            "seed": seed,
            "images": arguments.images,
            "box": box,
            "snr": arguments.snr,
            "variant": arguments.variant,
            "train_command": " ".join(train[2:]),
            "threads": arguments.threads,
            "train_wall_s": round(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]),
            "train_cpu_s": training and round(training.cpu_s),
            "train_rss_mib": training and round(training.rss_mib),
            "scores": scores,
        },
    )


def main() -> None:
    """Parse the command line and run every seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--structures", type=Path, required=True, help="folder with the bench structures (.cif.gz)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "cryosuite-mixture")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("-D", dest="box", type=int, default=32)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--snr", type=float, default=0.1)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--variant", choices=VARIANTS, default="hype")
    parser.add_argument("--threads", type=int, default=0, help="threads of the training; 0: all cores")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        run_seed(arguments, seed)


if __name__ == "__main__":
    main()
