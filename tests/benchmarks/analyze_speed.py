"""``analyze`` of a large run: 100,000 particles, 8 latent numbers, 20 + 20 volumes of 128 voxels from a network.

    python tests/benchmarks/analyze_speed.py --folder /tmp/analyze_speed [--particles 100000] [--threads 2]

A small phantom set is simulated and ``train-hype`` is run on it shortly, so that the volumes are those of a real
network. Its latents, cut to their first 8 components, are then repeated with noise to the number of particles, and the
images likewise: a star file names each image many times. The whole command is run as a user types it, the report and
UMAP with it. Wall time, CPU time and peak memory are those of the process.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CRYOSUITE, Timing, save, timed

from cryosuite.data.open import open_particles
from cryosuite.data.workdir import RunDir, WorkDir
from cryosuite.formats.config import read_yaml, write_yaml
from cryosuite.formats.pickles import read_latent, write_pickle
from cryosuite.formats.star import read_star, write_star
from cryosuite.methods.hype_latent import LatentSpace

BOX, IMAGES, EPOCHS, ZDIM = 128, 400, 1, 8
LIMITS = {"wall_s": 600.0, "peak_gib": 4.0}


def command(*words: str, threads: int = 2) -> Timing:
    """Run cryosuite as a user does, with so many threads."""
    return timed([*CRYOSUITE, *words], env={"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)})


def small_run(folder: Path, threads: int) -> RunDir:
    """A short training on a small simulated set; kept for the next time."""
    run = RunDir(folder / "small" / "run")
    if not run.epochs():
        work = folder / "small" / "work"
        command("simulate", "--structures", "phantom:6", "-n", str(IMAGES), "-D", str(BOX), "--snr", "0.5",
                "-o", str(work), threads=threads)  # fmt: skip
        command("train-hype", str(work), "-o", str(run.path), "--preset", "small", "-n", str(EPOCHS),
                "--overwrite", threads=threads)  # fmt: skip
    return run


def large_run(small: RunDir, run: RunDir, count: int, seed: int = 0) -> None:
    """The same network with the latents and rows of ``count`` particles."""
    rng = np.random.default_rng(seed)
    run.path.mkdir(parents=True, exist_ok=True)
    epoch, work = small.last_epoch(), WorkDir(small.path.parent / "work")
    space = LatentSpace.load(small.latent_space(epoch))
    z = read_latent(small.z(epoch))[0][:, :ZDIM]
    rows = rng.integers(len(z), size=count)
    spread = z.std(axis=0)
    write_pickle(run.z(1), (z[rows] + 0.15 * spread * rng.standard_normal((count, ZDIM))).astype(np.float32))
    LatentSpace(space.mean, space.components[:ZDIM], space.variances[:ZDIM], space.bank_z[:, :ZDIM].contiguous(),
                space.bank_tokens).save(run.latent_space(1))  # fmt: skip
    torch.save(torch.load(small.weights(epoch), weights_only=True), run.weights(1))
    write_pickle(run.index, np.arange(count, dtype=np.int64))
    tables = read_star(work.star)
    name = next(block for block in tables if "particles" in block)
    chosen = tables[name].iloc[rows].reset_index(drop=True)
    number, _, stack = chosen["rlnImageName"].astype(str).str.partition("@").values.T
    chosen["rlnImageName"] = [
        f"{n}@{os.path.relpath(work.path / s, run.path)}" for n, s in zip(number, stack, strict=True)
    ]
    chosen["rlnMicrographName"] = [f"mic_{i:04d}.mrc" for i in np.sort(rng.integers(800, size=count))]
    write_star(run.path / "particles.star", {**tables, name: chosen})
    config = {**read_yaml(small.config), "particles": str((run.path / "particles.star").resolve())}
    config.pop("particles_relative", None)
    write_yaml(run.config, config)
    if len(open_particles(run.path / "particles.star")) != count:
        raise SystemExit("the large set has lost particles")


def main() -> None:
    """Prepare, run, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--particles", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prepare", action="store_true", help="only make the run")
    options = parser.parse_args()
    small = small_run(options.folder, options.threads)
    run = RunDir(options.folder / "large")
    large_run(small, run, options.particles)
    if options.prepare:
        return
    out = options.folder / "analysis"
    load = os.getloadavg()
    taken = command("analyze", str(run.path), "-o", str(out), threads=options.threads)
    summary: dict[str, Any] = read_yaml(out / "analyze.yaml")
    found = {
        "seed": 0, "particles": options.particles, "zdim": ZDIM, "box": BOX, "threads": options.threads,
        "volumes": len(list(out.rglob("vol_*.mrc"))), "wall_s": round(taken.wall_s, 1), "cpu_s": round(taken.cpu_s, 1),
        "peak_gib": round(taken.rss_mib / 1024, 3), "steps_s": summary["seconds"],
        "load_before": round(load[0], 2), "limits": LIMITS,
    }  # fmt: skip
    save("analyze_speed", found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
