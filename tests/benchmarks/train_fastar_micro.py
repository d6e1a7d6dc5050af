"""Train the pose network that ships with the package, and judge it on structures it has not seen.

    CRYOSUITE_SHARED=../shared python tests/benchmarks/train_fastar_micro.py --work bench/fastar-micro --install

Trains with ``cryosuite train-fastar`` on one core, then poses simulated particles (with CTF) of every usable structure
of ``atomic/bench``: median errors beside chance, symmetry mates counted as right, no refinement. The signal to noise
ratio is counted at the network's 32 pixels; 64-pixel images of SNR 0.1 have about three times that after the crop.
``--judge FILE`` measures weights that exist; ``--install`` copies them to cryosuite/weights.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import save

from cryosuite.data.multiview_weights import WEIGHTS, load_multiview, save_multiview
from cryosuite.methods.fastar import Fastar, FastarModel
from cryosuite.methods.fastar_options import HELD_OUT, preset
from cryosuite.methods.fastar_run import STRUCTURE_BEADS
from cryosuite.methods.fastar_validate import GRID, NEAR, Case
from cryosuite.simulate.beads import find_structures, structure_beads
from cryosuite.simulate.view_sets import ViewSets

RECIPE = "--preset micro --structures both:{train} --images {images} --every 50k --seed 0"
SNRS = (10.0, 1.0, 0.3, 0.1)
PARTICLES = 64  # of each structure at each SNR


def train(work: Path, shared: Path, images: str) -> None:
    """Run the command in a process of its own; goes on where an earlier start stopped."""
    arguments = RECIPE.format(train=shared / "data" / "atomic" / "train", images=images).split()
    more = ["--resume"] if (work / "checkpoint.pt").is_file() else []
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "cryosuite", "train-fastar", *arguments, "-o", str(work), *more],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    print(f"trained in {(time.monotonic() - began) / 60:.1f} minutes")


def judge(weights: Path, shared: Path) -> dict:
    """Errors per structure and SNR, with chance, and their medians over all particles."""
    net, notes = load_multiview(weights)
    options = preset("micro").options
    model, method = FastarModel(options), Fastar(options)
    model.net = net
    library, names = structure_beads(find_structures(str(shared / "data" / "atomic" / "bench")), STRUCTURE_BEADS)
    every: dict[float, list[dict[str, torch.Tensor]]] = {snr: [] for snr in SNRS}
    rows, seconds = [], 0.0
    for i, name in enumerate(names):
        banks: dict = {}
        row: dict[str, object] = {"structure": name}
        for snr in SNRS:
            views = replace(
                options.view_options(32, PARTICLES, True), views=(PARTICLES,) * 2, snr=(snr, snr), ctf=1.0,
                blind=0.0, cones=0.0, structures=1.0, coloured=0.0, neighbours=0.0,
            )  # fmt: skip
            case = Case(ViewSets(views, library.rows(slice(i, i + 1)), HELD_OUT), i, GRID, name)
            began = time.process_time()
            found = case.errors(model.eval(), method, torch.Generator().manual_seed(i), banks)
            seconds += time.process_time() - began
            every[snr].append(found)
            row[f"snr{snr:g}"] = {key: round(float(value.median()), 2) for key, value in found.items()} | {
                "below20": round(100 * float((found["deg"] < NEAR).float().mean()), 1)
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
    total = {}
    for snr, parts in every.items():
        joined = {key: torch.cat([part[key] for part in parts]).numpy() for key in parts[0]}
        total[f"snr{snr:g}"] = {key: round(float(np.median(value)), 2) for key, value in joined.items()} | {
            "below20": round(100 * float((joined["deg"] < NEAR).mean()), 1),
            "particles": len(joined["deg"]),
        }
    print(json.dumps(total, indent=1))
    told = {key: notes[key] for key in ("images_seen", "seed", "answers") if key in notes}
    return {"all": total, "structures": rows, "cpu_seconds": round(seconds, 1), "weights": told}


def install(weights: Path) -> None:
    """Copy weights to where cryosuite looks for them, without the folders of this machine in their notes."""
    net, notes = load_multiview(weights)
    command = re.sub(r"^\S*__main__.py|^\S*cryosuite(?= )", "cryosuite", notes.get("command", ""))
    command = re.sub(r"-o \S+", "-o RUN", command)
    command = re.sub(r"both:\S+", "both:../shared/data/atomic/train", command)
    kept = {key: value for key, value in notes.items() if key not in ("format", "kind", "spec")}
    kept |= {"command": command, "made_by": "tests/benchmarks/train_fastar_micro.py"}
    save_multiview(WEIGHTS / "fastar-micro.safetensors", net, kept)
    print(f"installed in {WEIGHTS}")


def main() -> None:
    """Train, judge, install."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench/fastar-micro"))
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("CRYOSUITE_SHARED", "../shared")))
    parser.add_argument("--images", default="900k", help="images seen in all")
    parser.add_argument("--judge", type=Path, default=None, metavar="FILE", help="train nothing, measure these weights")
    parser.add_argument("--no-judge", action="store_true", help="with --install: without measuring")
    parser.add_argument("--install", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.judge is None:
        train(given.work, given.shared, given.images)
    weights = given.judge or given.work / "weights.safetensors"
    if not given.no_judge:
        save("fastar_micro", judge(weights, given.shared))
    if given.install:
        install(weights)


if __name__ == "__main__":
    main()
