"""Disks that fill up in the middle of every command: what is said, what is left, and does it go on once there is room?

    python tests/benchmarks/fire_disk.py --work /tmp/fire --tries 6 [--only polish,analyze] [--seed 0]

Each command writes to a small disk in memory (a tmpfs: needs root) whose size is a random part of what its results
take. It must leave with exit code 2 and one sentence that names a file, the space it needs and the space that is free;
no temporary file may be left, and each file that is there must be whole. Then the disk is made larger and the command
is run again, or continued with --resume: the result must be that of a run on a large disk.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fire_kill_compare as compare
import numpy as np
from common import save
from fire_kill_commands import Command, commands, make_inputs
from fire_kill_process import work

LARGE = 512 << 20
SAID = re.compile(r"error: (\S+?): .*\bneeds? .*are free", re.DOTALL)


def shorten() -> None:
    """Smaller searches and tests of networks than the commands' own, so that a run takes seconds; the files stay."""
    from cryosuite.methods import deco_start, fastar_validate, lvm_validate
    from cryosuite.reconstruct.abinitio import AbInitioOptions

    fastar_validate.GRID, lvm_validate.EACH = 0, 1
    rounds = ((4, True), (6, False))
    deco_start.options_of = lambda options, seed: AbInitioOptions(
        classes=options.classes, starts=1, iterations=6, batch=60, settle=2, radius=(2, 4), rounds=rounds, seed=seed
    )


def mount(folder: Path, size: int, again: bool = False) -> None:
    """A disk of ``size`` bytes at ``folder``, or a new size for the one that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"{'remount,' if again else ''}size={max(size // 4096, 4) * 4096}"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"no small disk to fill: mounting a tmpfs needs root ({done.stderr.strip()})")


def unmount(folder: Path) -> None:
    """Take the disk away."""
    subprocess.run(["umount", "-l", str(folder)], check=True)


class Trial:
    """One command and its disks."""

    def __init__(self, command: Command, base: Path, tries: int, seed: int) -> None:
        self.command, self.base, self.tries = command, base, tries
        self.disk, self.out, self.log = base / "disk", base / "disk/out", base / "out.log"
        self.random = np.random.default_rng([seed, sum(map(ord, command.name))])
        self.problems: list[str] = []
        self.filled = 0

    def start(self, size: int) -> int:
        """The command on a fresh disk of this size; its exit code."""
        mount(self.disk, size)
        if self.command.target(self.out) != self.out:
            self.out.mkdir()
        return work(self.command.arguments(self.out), self.log).code

    def go(self) -> dict:
        """All disks; the row of the table."""
        shutil.rmtree(self.base, ignore_errors=True)
        self.base.mkdir(parents=True)
        try:
            if self.start(LARGE) != 0:
                raise SystemExit(f"{self.command.name} failed on a large disk:\n{self.log.read_text()[-2000:]}")
            shutil.copytree(self.out, self.base / "whole")
        finally:
            unmount(self.disk)
        whole = self.base / "whole"
        pages = sum(-(-path.stat().st_size // 4096) * 4096 for path in compare.files(whole).values())
        for part in self.random.uniform(0.05, 1.0, self.tries):
            try:
                self.one(int(part * pages), whole)
            finally:
                unmount(self.disk)
        return self.row()

    def one(self, size: int, whole: Path) -> None:
        """One disk: filled, made larger, gone on."""
        code = self.start(size)
        if code == 0:
            return
        self.filled += 1
        said = " ".join(self.log.read_text().split())
        if code != 2 or "Traceback" in said:
            self.problems.append(f"exit code {code}: {said[-300:]}")
        elif not SAID.search(said):
            self.problems.append(f"the message does not say what and how much: {said[-200:]}")
        if self.out.exists():
            self.problems += [f"{name} is left" for name in compare.hidden(self.out)]
            self.problems += compare.broken(self.out, None if self.command.resumes else whole)
        mount(self.disk, LARGE, again=True)
        if self.command.target(self.out) != self.out:
            self.out.mkdir(exist_ok=True)
        if problem := self.command.problem(self.out, self.log):
            self.problems.append(problem)
        else:
            self.problems += [f"afterwards {text}" for text in compare.differences(whole, self.out)[:3]]

    def row(self) -> dict:
        """For the table."""
        unique = list(dict.fromkeys(self.problems))
        good = "code 2, one sentence with file, space needed and free; nothing half-written; same result afterwards"
        return {
            "kind": "fault",
            "what": f"disk full during `{self.command.name}`, then room and {self.command.how}",
            "tried": self.filled,
            "result": good if not unique else "; ".join(unique[:3]),
            "detail": "",
            "problems": unique,
        }


def main() -> None:
    """Fill them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tries", type=int, default=6)
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="fire_disk", help="of the result file")
    arguments = parser.parse_args()
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        raise SystemExit("no small disk to fill: mounting a tmpfs needs root on Linux; nothing was tried")
    os.environ["OMP_NUM_THREADS"] = "1"
    shorten()
    base = arguments.work.absolute()
    base.mkdir(parents=True, exist_ok=True)
    names = [name for name in arguments.only.split(",") if name]
    rows = []
    for command in commands(make_inputs(base / "inputs")):
        if names and command.name not in names:
            continue
        row = Trial(command, base / command.name.replace(" ", "_"), arguments.tries, arguments.seed).go()
        print(f"{row['what']}: {row['tried']} disks, {row['result']}", flush=True)
        rows.append(row)
        typed = f"python tests/benchmarks/fire_disk.py --work WORK --tries {arguments.tries}"
        every = [*compare.rows_but(arguments.name, rows), *rows]  # of other commands, tried before
        save(arguments.name, {"command": typed, "seed": arguments.seed, "rows": every})


if __name__ == "__main__":
    main()
