"""A million particles in 2,000 stacks of three optics groups: peak memory and processor time of each command.

    python tests/benchmarks/fire_million.py [--work FOLDER] [--particles 1000000] [--stacks 2000] [--steps star,...]

The set is that of million_set.py: 64 pixels, the stacks are hard links to 24 different ones, so 16 GB of images take
0.2 GB of disk; the folder of ``preprocess -D 32`` (4 GB) is whole. Each step is a process of its own, its peak the
kernel's. What is measured already stays in FOLDER/measured.json and is not run again (a set of another size is).

``encode`` passes the million through ``pretrain-iev --encode --precision bf16`` with the shipped iev-tiny: half an hour
of a core with AVX512-BF16, an hour or more without. ``encode-384`` does so with an encoder of one block
and 28 pixels whose features are as long (384, 1.4 GiB in all) as those of the released Cryo-IEF weights: reading,
preparing and writing are those of any encoder, the network costs little.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from common import CRYOSUITE, save

LIMIT_GIB = 2.0
STAR_SECONDS = 60.0
BOX = 32
HERE = Path(__file__).parent
READ_STAR = """
import sys
from cryosuite.formats.star import images_from_star, particle_tables
tables = particle_tables(sys.argv[1])
print(len(images_from_star(tables)[1]))
"""
LONG_FEATURES = 384
ONE_BLOCK = f"""
import sys, torch
from cryosuite.data.encoder_weights import save_encoder
from cryosuite.nets.ief import IefEncoder, IefSpec
torch.manual_seed(0)
spec = IefSpec("one block", dim={LONG_FEATURES}, depth=1, heads=6, patch=14, image_size=28, norm2="ln")
notes = {{"trained_by": "nobody: random weights for a test of memory"}}
save_encoder(sys.argv[1], IefEncoder(spec), "standard", 0.5, 0.12, notes)
"""


@dataclass
class Watched:
    """One process: processor and wall seconds, peak MiB, and (processor seconds, resident MiB) along the way."""

    cpu_s: float
    wall_s: float
    peak_mib: float
    course: list[tuple[float, float]]
    output: str = ""


def watched(command: list[str], cwd: Path) -> Watched:
    """Run a command, its memory looked at every half second.

    A failure stops the benchmark. The peak is the larger of what the kernel kept of the process and of the sum over it
    and its children when looked at.
    """
    began, course = time.monotonic(), []
    log = cwd / f"output-{os.getpid()}.log"
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=cwd, stdout=output, stderr=subprocess.STDOUT)
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            course.append(_now(process.pid))
            time.sleep(0.5)
    text = log.read_text(errors="replace")
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {status}:\n{text[-3000:]}")
    peak = max([usage.ru_maxrss / 1024, *(resident for _, resident in course)])
    return Watched(usage.ru_utime + usage.ru_stime, time.monotonic() - began, peak, course, text)


def _now(pid: int) -> tuple[float, float]:
    """(processor seconds of a process, resident MiB of it and its children) at this moment."""
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        family, pages = [pid], 0
        while family:
            one = family.pop()
            pages += int(Path(f"/proc/{one}/statm").read_text().split()[1])
            family += [int(child) for child in Path(f"/proc/{one}/task/{one}/children").read_text().split()]
    except (OSError, IndexError, ValueError):  # it has just ended
        return 0.0, 0.0
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Million:
    """The steps on one set."""

    def __init__(self, work: Path, particles: int, stacks: int, seed: int) -> None:
        self.work, self.particles, self.stacks, self.seed = work, particles, stacks, seed
        self.star, self.folder = work / "set" / "particles.star", work / "work"

    def make(self) -> None:
        """The set, unless it is there."""
        wanted = {"particles": self.particles, "stacks": self.stacks, "seed": self.seed}
        note = self.work / "set.json"
        if note.is_file() and json.loads(note.read_text()) == wanted:
            return
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        sizes = ["--particles", str(self.particles), "--stacks", str(self.stacks), "--seed", str(self.seed)]
        subprocess.run([sys.executable, HERE / "million_set.py", self.star.parent, *sizes], check=True)
        note.write_text(json.dumps(wanted))

    def run(self, *arguments: object) -> Watched:
        return watched([*CRYOSUITE, *map(str, arguments)], self.work)

    def read_star(self) -> tuple[str, Watched, str]:
        """The table alone, every row checked."""
        size = self.star.stat().st_size / 1e6
        found = watched([sys.executable, "-c", READ_STAR, str(self.star)], self.work)
        if found.output.split()[-1] != str(self.particles):
            raise SystemExit(f"read {found.output} rows")
        return f"a star file of {size:.0f} MB, 25 columns, read and checked", found, f"limit {STAR_SECONDS:.0f} s"

    def preprocess(self) -> tuple[str, Watched, str]:
        found = self.run("preprocess", self.star, "-D", BOX, "-o", self.folder, "--overwrite")
        return f"preprocess -D {BOX} of {self.stacks:,} stacks, three optics groups", found, ""

    def backproject(self) -> tuple[str, Watched, str]:
        found = self.run("backproject", self.folder, "-o", self.work / "map", "--overwrite")
        row = re.search(r"│ all +│ +(\d+) +│[^│]*│ +([\d.]+) +│", found.output)
        if row is None or int(row[1]) != self.particles:
            raise SystemExit(f"not all particles are in the map:\n{found.output}")
        return "backproject with half maps", found, f"half maps agree to {row[2]} A (Nyquist 12)"

    def encode(self) -> tuple[str, Watched, str]:
        what, found, detail = self._encode("features", 192, "--precision", "bf16")
        rate = re.findall(r"encode: \d+/\d+ images, (\d+) images/s", found.output)
        return f"{what} (iev-tiny, bfloat16)", found, f"{detail}; {rate[-1]} images/s" if rate else detail

    def encode_long(self) -> tuple[str, Watched, str]:
        weights = self.work / "one_block.safetensors"
        subprocess.run([sys.executable, "-c", ONE_BLOCK, str(weights)], check=True)
        what, found, detail = self._encode("features-384", LONG_FEATURES, "--weights", weights, "-b", 256)
        return f"{what} (encoder of one block, 28 pixels)", found, detail

    def _encode(self, folder: str, long: int, *options: object) -> tuple[str, Watched, str]:
        """One pass of ``pretrain-iev --encode`` over the work folder."""
        out = self.work / folder
        found = self.run(
            "pretrain-iev", self.folder, "--encode", "-o", out, "--overwrite", "--accelerator", "cpu", *options
        )
        size, wanted = (out / "z.1.pkl").stat().st_size, 4 * self.particles * long
        if not wanted < size < wanted + 1000:
            raise SystemExit("not all features were written, or others")
        steady = [resident for _, resident in found.course[len(found.course) // 4 :] if resident] or [found.peak_mib]
        detail = f"{size / 2**30:.2f} GiB of features; {max(steady) - steady[0]:+.0f} MiB in the last three quarters"
        return f"one pass of encoding, {long} features each", found, detail

    def check(self) -> tuple[str, Watched, str]:
        return "check of the work folder", self.run("check", self.folder, "--no-probe"), ""

    def check_star(self) -> tuple[str, Watched, str]:
        return "check of the star file", self.run("check", self.star, "--no-probe"), ""

    def select(self) -> tuple[str, Watched, str]:
        found = self.run("select", self.star, "--random", self.particles // 100, "-o", self.work / "some.star")
        return "select --random, to a star file", found, ""

    def export(self) -> tuple[str, Watched, str]:
        found = self.run("export", self.folder, "--all", "-o", self.work / "all.star")
        return "export --all of the work folder, to a star file", found, ""


STEPS: dict[str, Callable[[Million], tuple[str, Watched, str]]] = {
    "star": Million.read_star,
    "preprocess": Million.preprocess,
    "encode": Million.encode,
    "encode-384": Million.encode_long,
    "backproject": Million.backproject,
    "check": Million.check,
    "check-star": Million.check_star,
    "select": Million.select,
    "export": Million.export,
}


def row(name: str, particles: int, measured: dict) -> dict:
    """A line of the README's table."""
    gib, seconds = measured["peak_mib"] / 1024, measured["cpu_s"]
    held = gib < LIMIT_GIB and (name != "star" or seconds < STAR_SECONDS)
    detail = f"{seconds:.0f} s of one processor" + (f"; {measured['detail']}" if measured["detail"] else "")
    result = f"{'held' if held else 'NOT held'}: peak {gib:.2f} GiB of {LIMIT_GIB:.0f}"
    return {"kind": "load", "what": measured["what"], "tried": particles, "result": result, "detail": detail}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("bench/fire/million"))
    parser.add_argument("--particles", type=int, default=1_000_000)
    parser.add_argument("--stacks", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", default=",".join(STEPS), help=f"of {', '.join(STEPS)}")
    given = parser.parse_args()
    million = Million(given.work.absolute(), given.particles, given.stacks, given.seed)
    million.make()
    kept = million.work / "measured.json"
    measured = json.loads(kept.read_text()) if kept.is_file() else {}
    for name in given.steps.split(","):
        if name in measured:
            continue
        what, found, detail = STEPS[name](million)
        values = asdict(found) | {"what": what, "detail": detail}
        values["course"] = [found.course[i] for i in range(0, len(found.course), len(found.course) // 20 + 1)]
        del values["output"]
        measured = (json.loads(kept.read_text()) if kept.is_file() else {}) | {name: values}  # another may run too
        kept.write_text(json.dumps(measured, indent=1))
        print(row(name, given.particles, values), flush=True)
    rows = [row(name, given.particles, measured[name]) for name in STEPS if name in measured]
    if given.particles == 1_000_000:
        facts = {name: {key: measured[name][key] for key in ("cpu_s", "wall_s", "peak_mib")} for name in measured}
        save("fire_million", {"seed": given.seed, "rows": rows, "measured": facts})


if __name__ == "__main__":
    main()
