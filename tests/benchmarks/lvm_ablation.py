"""The four ablations of CryoLVM at a size that a laptop trains: what pre-training, network and loss are worth.

    CRYOSUITE_SHARED=../shared python tests/benchmarks/lvm_ablation.py --work bench/lvm-ablation
    CRYOSUITE_SHARED=../shared python tests/benchmarks/lvm_ablation.py --work bench/lvm-ablation --quick --arms 1

Arms are start (jepa, mae, scratch) x network (scunet, vit) x loss (mse, mse+hist), each with seeds 0, 1, 2. All arms of
a seed are fine-tuned on the same number of crops of the same stream (``train-lvm --task sharpen``); encoders are
pre-trained once per seed, network and objective (``pretrain-lvm``); the time for that comes on top, as in the paper.
A SCUNet with a new decoder begins as the identity, which a ViT, where all goes through tokens, cannot. Scores are
those of held-out structures of ``atomic/train``; ``atomic/bench`` is not touched. Finished arms are kept in the folder
and not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from common import save

from cryosuite.data.workdir import RunDir
from cryosuite.methods.lvm_validate import SCORES
from cryosuite.training.logs import read_metrics

STARTS, NETS, LOSSES = ("jepa", "mae", "scratch"), ("scunet", "vit"), ("mse", "mse+hist")
SEEDS = (0, 1, 2)
DATA = "--structures both:{train} --hold-out 6 --crop 32 --size {size} --net {net} --seed {seed}"
PRETRAIN = "pretrain-lvm --objective {start} --images {pretrain} -b 16 --lr 1e-3"
TUNE = "train-lvm --task sharpen --images {tune} -b 8 --lr 1e-3 --encoder-lr 5e-4 --alpha {alpha}"
ALPHA = {"mse": "1.0", "mse+hist": "0.9"}


def run_once(command: str, folder: Path) -> float:
    """Run a command of cryosuite into a folder unless it is finished there; CPU seconds it took."""
    marker = folder / "done.json"
    if not marker.is_file():
        before = os.times()
        subprocess.run(
            [sys.executable, "-m", "cryosuite", *command.split(), "-o", str(folder), "--overwrite"],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        after = os.times()
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        marker.write_text(json.dumps({"cpu_seconds": round(spent, 1)}) + "\n")
    return float(json.loads(marker.read_text())["cpu_seconds"])


def arm(start: str, net: str, loss: str, seed: int, work: Path, sizes: dict[str, str]) -> dict[str, object]:
    """Pre-train where needed, fine-tune, and give the scores after the last epoch and after each."""
    named = sizes | {"start": start, "net": net, "seed": str(seed), "alpha": ALPHA[loss]}
    command, seconds = TUNE + " " + DATA, 0.0
    if start != "scratch":
        encoder = work / f"encoder-{start}-{net}-{seed}"
        seconds = run_once((PRETRAIN + " " + DATA).format(**named), encoder)
        command = command.replace(" --size {size} --net {net}", "") + f" --init {encoder}"
    folder = work / f"{start}-{net}-{loss}-{seed}"
    tuned = run_once(command.format(**named), folder)
    curve = [record for record in read_metrics(RunDir(folder).metrics) if "cc_mask" in record]
    last = {name: curve[-1][name] for name in SCORES}
    return {
        "start": start, "net": net, "loss": loss, "seed": seed, "scores": last,
        "input": {name: curve[-1][f"{name}_input"] for name in SCORES},
        "cc_mask_by_epoch": [record["cc_mask"] for record in curve],
        "cpu_seconds": {"pretrain": seconds, "tune": tuned},
    }  # fmt: skip


def compare(rows: list[dict], factor: str, better: str, worse: str) -> dict[str, object] | None:
    """Differences in every score between two levels of a factor, arm by arm and seed by seed."""
    others = [name for name in ("start", "net", "loss", "seed") if name != factor]
    key = {tuple(row[name] for name in others): row for row in rows if row[factor] == worse}
    pairs = [
        (row, key[place]) for row in rows if row[factor] == better and (place := tuple(row[n] for n in others)) in key
    ]
    if not pairs:
        return None
    out: dict[str, object] = {"pairs": len(pairs)}
    for name in SCORES:
        d = np.array([a["scores"][name] - b["scores"][name] for a, b in pairs])
        wins = int((d > 0).sum() if name == "cc_mask" else (d < 0).sum())
        sd = float(d.std(ddof=1)) if len(d) > 1 else float("nan")
        out[name] = {"mean_difference": round(float(d.mean()), 5), "sd": round(sd, 5), "better_in": wins}
    return out


def main() -> None:
    """Run the arms, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench/lvm-ablation"))
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("CRYOSUITE_SHARED", "../shared")))
    parser.add_argument("--size", default="small", help="of the networks")
    parser.add_argument("--pretrain", default="20k", help="crops of each pre-training")
    parser.add_argument("--tune", default="10k", help="crops of each fine-tuning")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many seeds, from 0")
    parser.add_argument("--arms", type=int, default=None, help="so many arms at most, for a trial")
    parser.add_argument("--quick", action="store_true", help="micro networks, hundreds of crops: that it runs, no more")
    given = parser.parse_args()
    sizes = {"size": given.size, "pretrain": given.pretrain, "tune": given.tune}
    if given.quick:
        sizes = {"size": "micro", "pretrain": "96", "tune": "96"}
    sizes["train"] = str((given.shared / "data" / "atomic" / "train").resolve())
    every = [(s, n, lo, k) for k, s, n, lo in itertools.product(range(given.seeds), STARTS, NETS, LOSSES)]
    rows, began = [], time.process_time()
    for start, net, loss, seed in every[: given.arms]:
        rows.append(arm(start, net, loss, seed, given.work.resolve(), sizes))
        print(json.dumps(rows[-1]), flush=True)
    sizes["train"] = "../shared/data/atomic/train"
    table = {
        "sizes": sizes,
        "arms": rows,
        "comparisons": {
            "jepa against scratch": compare(rows, "start", "jepa", "scratch"),
            "mae against scratch": compare(rows, "start", "mae", "scratch"),
            "jepa against mae": compare(rows, "start", "jepa", "mae"),
            "scunet against vit": compare(rows, "net", "scunet", "vit"),
            "mse+hist against mse": compare(rows, "loss", "mse+hist", "mse"),
        },
        "own_cpu_seconds": round(time.process_time() - began, 1),
    }
    print(json.dumps(table["comparisons"], indent=1))
    save("lvm_ablation_quick" if given.quick else "lvm_ablation", table)


if __name__ == "__main__":
    main()
