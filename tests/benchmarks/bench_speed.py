"""Every speed and memory figure in one run on one machine, one script after the other; then the README's tables.

    python tests/benchmarks/bench_speed.py [--work DIR] [--only pose_search_speed,...]

Each script writes its results/*.json with the moment at which this run began, so that the table "Every ratio" can say
which of its rows belong together. A script that fails is named at the end; the others go on. On two CPU cores some
forty minutes; nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MEMORY = "lvm_sharpen_memory"
SCRIPTS = {
    "help_speed": [],
    "speed": ["--work", "WORK/speed"],
    "kraqen_speed": [],
    "pose_search_speed": [],
    "deco_decoder_speed": [],
    "deco_step_speed": [],
    "hype_published_way": [],
    "fastar_speed": ["--work", "WORK/fastar"],
    "lvm_speed": ["--save"],
    "lvm_sharpen_speed": ["--size", "300"],
    MEMORY: ["--memory", "400", "--kda", "200"],
    "fire_loader": ["--work", "WORK/loader"],
    "report_speed": ["--work", "WORK/report"],
    "analyze_speed": ["--folder", "WORK/analyze"],
}


def main() -> None:
    """Run them all, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("bench/speed"))
    parser.add_argument("--only", default=",".join(SCRIPTS), help="scripts, by name")
    given = parser.parse_args()
    work = given.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "BENCH_RUN": time.strftime("%Y-%m-%d %H:%M")}
    failed = []
    for name in given.only.split(","):
        words = [word.replace("WORK", str(work), 1) for word in SCRIPTS[name]]
        began = time.monotonic()
        script = "lvm_sharpen_speed" if name == MEMORY else name
        done = subprocess.run([sys.executable, HERE / f"{script}.py", *words], env=environment)
        print(f"{name}: {time.monotonic() - began:.0f} s, exit code {done.returncode}", flush=True)
        failed += [name] if done.returncode else []
    subprocess.run([sys.executable, HERE / "tables.py"], check=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
