"""Memory of train-kraqen and polish with many classes at full size, on one processor.

    python tests/benchmarks/classes_memory.py [--work DIR] [--only kraqen polish] [--box 128] [--images 4000]
        [--particles 100000] [--codes 128] [--classes 100]

"kraqen": train-kraqen with voxel maps on 100,000 particles with 128 codes. ``--images`` different particles
(phantoms, SNR 0.1) are simulated, and a star file lists each of them many times with its pose and CTF, so that 6.5 GB
of particles are read from 0.26 GB of disk. All of the command's stages are passed: codes of 32 pixels in few
iterations, the last iterations in 64 pixels, the maps of all codes that are in use at the full box. Nothing is said
about quality, and codes are not joined (``--merge none``): repeated images have no twins to find. "polish": the
command with 100 classes of the simulated particles by number; its sums need 20 GB of disk in DIR.

The peak is the kernel's figure for the whole process, mapped files included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import starfile
from common import CRYOSUITE, RESULTS, save, timed

from cryosuite.formats.pickles import write_pickle

LIMIT_GIB = {"kraqen": 16.0, "polish": 8.0}
ITERATIONS = 2  # on all images
STATES = 8


def many(folder: Path, particles: int) -> Path:
    """A star file with so many rows of the set's own star file, over and over."""
    tables = starfile.read(folder / "particles.star", always_dict=True)
    rows = tables["particles"]
    tables["particles"] = pd.concat([rows] * -(-particles // len(rows)), ignore_index=True)[:particles]
    out = folder / f"times-{particles}.star"
    starfile.write(tables, out, overwrite=True)
    return out


def kraqen(folder: Path, run: Path, given: argparse.Namespace) -> tuple[list[str], dict]:
    """The command, and what the result says of it."""
    few = ["--n-codes", str(given.codes), "--iterations", str(ITERATIONS), "--merge", "none"]
    facts = {"particles": given.particles, "classes": given.codes, "iterations": ITERATIONS}
    return ["train-kraqen", str(many(folder, given.particles)), "-o", str(run), *few], facts


def polish(folder: Path, run: Path, given: argparse.Namespace) -> tuple[list[str], dict]:
    """The command, and what the result says of it."""
    labels = folder / f"classes-{given.classes}.pkl"  # half sets take turns by row
    write_pickle(labels, np.arange(given.images) // 2 % given.classes)
    facts = {"particles": given.images, "classes": given.classes}
    return ["polish", str(folder), "--labels", str(labels), "-o", str(run)], facts


COMMANDS: dict[str, Callable[[Path, Path, argparse.Namespace], tuple[list[str], dict]]] = {
    "kraqen": kraqen, "polish": polish,
}  # fmt: skip


def main() -> None:
    """Simulate, then run and measure one command after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench/classes_memory"))
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--particles", type=int, default=100_000)
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--codes", type=int, default=128)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--images", type=int, default=4000)
    given = parser.parse_args()
    work = given.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    one = {"env": {"OMP_NUM_THREADS": "1", "TMPDIR": os.fspath(work)}}
    folder = work / f"d{given.box}-n{given.images}"
    if not (folder / "dataset.yaml").exists():
        what = ["--structures", f"phantom:{STATES}", "-n", str(given.images), "-D", str(given.box), "--snr", "0.1"]
        timed([*CRYOSUITE, "simulate", "-o", str(folder), *what], **one)
    earlier = RESULTS / "classes_memory.json"
    rows = json.loads(earlier.read_text())["rows"] if earlier.exists() else {}
    for name in given.only:
        run = work / name
        shutil.rmtree(run, ignore_errors=True)
        command, facts = COMMANDS[name](folder, run, given)
        done = timed([*CRYOSUITE, *command], **one)
        rows[name] = {
            **facts, "box": given.box, "cpu_s": round(done.cpu_s), "wall_s": round(done.wall_s),
            "peak_gib": round(done.rss_mib / 1024, 2), "limit_gib": LIMIT_GIB[name],
            "maps": len(list(run.glob("vol_*.mrc"))),
        }  # fmt: skip
        shutil.rmtree(run)
        print(name, rows[name], flush=True)
        save("classes_memory", {"seed": 0, "threads": 1, "rows": rows})


if __name__ == "__main__":
    main()
