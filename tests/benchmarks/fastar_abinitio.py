"""A probe of `train-fastar --mode ab-initio`: does a small network learn poses of molecules that nobody knows?

    CRYOSUITE_SHARED=../shared python tests/benchmarks/fastar_abinitio.py [--work DIR] [--minutes 30] [--hand-loss min]

Trains preset micro as gate G4 of the design asks (made-up molecules, 8 views of each, hardly any noise, no CTF) for so
many minutes on one core, then poses sets of 8, 32 and 128 views at four signal to noise ratios (at the network's 32
pixels): made-up molecules of another seed, and the structures of ``atomic/bench``. Errors are those of poses relative
to the first view, with the better hand of each set; chance is the same with the answers dealt out anew. With
``--judge FILE`` nothing is trained.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from common import save

from cryosuite.data.multiview_weights import load_multiview
from cryosuite.methods.fastar import Fastar, FastarModel
from cryosuite.methods.fastar_options import HELD_OUT, preset
from cryosuite.methods.fastar_run import STRUCTURE_BEADS
from cryosuite.methods.fastar_validate import GRID, NEAR, Case
from cryosuite.simulate.beads import Beads, find_structures, structure_beads
from cryosuite.simulate.view_sets import ViewSets
from cryosuite.training.logs import read_metrics

RECIPE = "--mode ab-initio --preset micro --structures phantom --views 8 --snr 10:5 --ctf 0 --junk 0 --images 5M"
VIEWS, SNRS = (8, 32, 128), (10.0, 1.0, 0.1, 0.05)
PARTICLES = 1024  # of each kind at each number of views and SNR


def train(work: Path, minutes: float, every: str, seed: int, hand: str) -> None:
    """Run the command in a process of its own, for so long; goes on where an earlier start stopped."""
    begun = (work / "checkpoint.pt").is_file()
    new = [*RECIPE.split(), "--hand-loss", hand, "--every", every, "--seed", str(seed)]
    command = [sys.executable, "-m", "cryosuite", "train-fastar", "-o", str(work), "--max-minutes", f"{minutes:g}"]
    command += ["--resume"] if begun else new
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def judge(weights: Path, shared: Path) -> list[dict]:
    """A row per kind of molecule, number of views and SNR: medians in degrees, chance, share within 20 degrees."""
    net, _ = load_multiview(weights)
    options = preset("micro", mode="ab-initio").options
    model, method = FastarModel(options), Fastar(options)
    model.net = net
    folder = shared / "data" / "atomic" / "bench"
    kinds: dict[str, Beads | None] = {"made up": None}
    if folder.is_dir():
        kinds["bench"] = structure_beads(find_structures(str(folder)), STRUCTURE_BEADS)[0]
    rows = []
    for kind, library in kinds.items():
        for views in VIEWS:
            for snr in SNRS:
                drawn = replace(
                    options.view_options(32, views, library is not None), views=(views,) * 2, snr=(snr, snr), ctf=0.0,
                    blind=0.0, junk=0.0, cones=0.0, coloured=0.0, neighbours=0.0, structures=float(library is not None),
                )  # fmt: skip
                stream, generator = ViewSets(drawn, library, HELD_OUT), torch.Generator().manual_seed(0)
                parts = [
                    Case(stream, n, GRID, kind).errors(model.eval(), method, generator, {})
                    for n in range(PARTICLES // views)
                ]
                found = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
                rows.append({
                    "molecules": kind, "views": views, "snr": snr, "deg": round(float(found["deg"].median()), 1),
                    "chance": round(float(found["chance"].median()), 1),
                    "within_20": round(float((found["deg"] < NEAR).float().mean()), 3),
                    "chance_within_20": round(float((found["chance"] < NEAR).float().mean()), 3),
                })  # fmt: skip
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Train, judge, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench/fastar-abinitio"))
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("CRYOSUITE_SHARED", "../shared")))
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", default="20k", help="images between two tests; fewer would not be judged")
    parser.add_argument("--hand-loss", default="min", choices=["min", "anchor"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge", type=Path, default=None, metavar="FILE", help="train nothing, measure these weights")
    given = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, object] = {"recipe": f"{RECIPE} --hand-loss {given.hand_loss}", "seed": given.seed}
    if given.judge is None:
        train(given.work, given.minutes, given.every, given.seed, given.hand_loss)
        lines = [line for line in read_metrics(given.work / "metrics.jsonl") if "phantom_snr10_deg" in line]
        kept = ("epoch", "phantom_snr10_deg", "phantom_snr10_chance")
        record |= {"minutes": given.minutes, "course": [{key: line.get(key) for key in kept} for line in lines]}
    weights = given.judge or given.work / "weights.safetensors"
    record["images_seen"] = int(load_multiview(weights)[1]["images_seen"])
    record["rows"] = judge(weights, given.shared)
    save(f"fastar_abinitio_{given.hand_loss}_s{given.seed}", record)


if __name__ == "__main__":
    main()
