"""Memory of train-kraqen at full size: 100,000 particles of 128 pixels, 128 codes, voxel maps, one processor.

    python tests/benchmarks/kraqen_memory.py [--work DIR] [--particles 100000] [--box 128] [--codes 128] [--images 4000]

``--images`` different particles (phantoms, SNR 0.1) are simulated, and a star file lists each of them many times with
its pose and CTF, so that 6.5 GB of particles are read from 0.26 GB of disk. All of the command's stages are passed:
codes of 32 pixels that settle in few iterations, the last iterations in 64 pixels, the maps of all codes at the full
box. Nothing is said about quality, and codes are not joined (``--merge none``): repeated images have no twins to find.
The peak is the kernel's figure for the whole process, mapped files included.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pandas as pd
import starfile
from common import CRYOSUITE, save, timed

LIMIT_GIB = 16.0
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


def main() -> None:
    """Simulate, repeat, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench/kraqen_memory"))
    parser.add_argument("--particles", type=int, default=100_000)
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--codes", type=int, default=128)
    parser.add_argument("--images", type=int, default=4000)
    given = parser.parse_args()
    work = given.work.absolute()
    one = {"env": {"OMP_NUM_THREADS": "1"}}
    folder, run = work / f"d{given.box}-n{given.images}", work / "run"
    if not (folder / "dataset.yaml").exists():
        work.mkdir(parents=True, exist_ok=True)
        what = ["--structures", f"phantom:{STATES}", "-n", str(given.images), "-D", str(given.box), "--snr", "0.1"]
        timed([*CRYOSUITE, "simulate", "-o", str(folder), *what], **one)
    shutil.rmtree(run, ignore_errors=True)
    few = ["--n-codes", str(given.codes), "--iterations", str(ITERATIONS), "--merge", "none"]
    done = timed([*CRYOSUITE, "train-kraqen", str(many(folder, given.particles)), "-o", str(run), *few], **one)
    size = sum(path.stat().st_size for path in run.rglob("*")) / 2**30
    save(
        "kraqen_memory",
        {
            "particles": given.particles, "box": given.box, "codes": given.codes, "images": given.images,
            "iterations": ITERATIONS, "seed": 0, "threads": 1, "cpu_s": round(done.cpu_s), "wall_s": round(done.wall_s),
            "peak_gib": round(done.rss_mib / 1024, 2), "limit_gib": LIMIT_GIB, "run_gib": round(size, 2),
            "maps": len(list(run.glob("vol_*.mrc"))),
        },
    )  # fmt: skip
    print(f"peak {done.rss_mib / 1024:.2f} GiB of {LIMIT_GIB:g}, {done.cpu_s:.0f} CPU s")
    shutil.rmtree(run)


if __name__ == "__main__":
    main()
