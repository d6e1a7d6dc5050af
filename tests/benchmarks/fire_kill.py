"""kill -9 at random moments of every long command, then go on: is the result that of a run that nobody disturbed?

    python tests/benchmarks/fire_kill.py --work /tmp/fire --kills 20 [--only train-hype,polish] [--seed 0]

A command runs as a process group of its own (a fork of this process, which has the libraries loaded, so that the
moments fall on the work and not on imports; a few kills are of a freshly started interpreter). Moments are uniform over
the CPU time of the undisturbed run. Commands with --resume are continued after every kill, one run killed again and
again; the others are begun again in the folder that the kill left. After every kill, each file that a reader would
take (any that is not a hidden temporary file) must be whole; at the end all files must be those of the undisturbed
run, byte for byte, apart from times (in logs, config.yaml, timing.json) and the zip container of checkpoints.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path

import fire_kill_compare as compare
import numpy as np
from common import save
from fire_kill_commands import Command, commands, make_inputs
from fire_kill_process import Killed, start_up, work

SPENT = 150.0  # CPU seconds for the kills of one command; fewer kills where that is not enough


class Trial:
    """The kills of one command."""

    def __init__(self, command: Command, base: Path, kills: int, seed: int, fresh: int) -> None:
        self.command, self.base, self.kills, self.out = command, base, kills, base / "out"
        self.random = np.random.default_rng([seed, sum(map(ord, command.name))])
        self.fresh, self.problems = fresh, []
        self.done, self.runs, self.spent = 0, 0, 0.0

    def undisturbed(self) -> Path:
        """The run that nobody disturbs, and how long it takes."""
        whole, log = self.base / "whole", self.base / "whole.log"
        self.empty()
        found = work(self.command.arguments(self.out), log)
        if found.code != 0:
            raise SystemExit(f"{self.command.name} failed undisturbed:\n{log.read_text()[-3000:]}")
        self.total = found.cpu
        self.out.rename(whole)
        return whole

    def empty(self) -> None:
        """A new output folder, always of the same name: names are written into files."""
        shutil.rmtree(self.out, ignore_errors=True)
        if self.command.target(self.out) != self.out:
            self.out.mkdir()

    def go(self) -> dict:
        """All kills; the row of the table."""
        shutil.rmtree(self.base, ignore_errors=True)
        self.base.mkdir(parents=True)
        whole = self.undisturbed()
        while self.done < self.kills and self.spent < SPENT:
            self.empty()
            self.one_run(whole)
            left = compare.differences(whole, self.out)
            self.problems += [f"after the kills: {text}" for text in left[:3]]
            self.runs += 1
            if left:
                shutil.copytree(self.out, self.base / f"kept{self.runs}")
        return self.row()

    def one_run(self, whole: Path) -> None:
        """One run to its end, killed on its way."""
        count = self.kills - self.done
        moments = np.sort(self.random.uniform(0, self.total, count))
        allowed = list(np.diff(moments, prepend=0.0)) if self.command.resumes else list(moments)
        while True:
            log = self.base / "out.log"
            fresh = self.fresh > 0 and self.done % self.fresh == self.fresh // 2
            if not allowed or self.done >= self.kills or self.spent > SPENT:
                if problem := self.command.problem(self.out, log):
                    self.problems.append(problem)
                return
            arguments = self.command.next_arguments(self.out)
            moment = allowed.pop(0) + (self.ready() if self.command.resumes else 0.0)
            found = start_up(arguments, log, self.random) if fresh else work(arguments, log, moment)
            self.spent += found.cpu
            if not isinstance(found, Killed):
                if found.code != 0:
                    self.problems.append(f"exit code {found.code}: {log.read_text()[-300:]}")
                return
            self.done += 1
            self.problems += compare.broken(self.out, None if self.command.resumes else whole)

    def ready(self) -> float:
        """CPU seconds that a continuation needs before it comes to new work; at random, to hit that part too."""
        return float(self.random.uniform(0.2, 1.0)) * self.command.restart_s

    def row(self) -> dict:
        """For the table."""
        unique = list(dict.fromkeys(self.problems))
        good = "the same files, bit for bit" if not unique else "; ".join(unique[:3])
        return {
            "kind": "fault",
            "what": f"kill -9 of `{self.command.name}`, then {self.command.how}",
            "tried": self.done,
            "result": good,
            "detail": f"in {self.runs} runs of {self.total:.0f} CPU s",
            "problems": unique,
        }


def main() -> None:
    """Kill them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", type=int, default=7, help="One of so many kills hits a fresh interpreter; 0: none.")
    parser.add_argument("--name", default="fire_kill", help="of the result file")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    base = arguments.work.absolute()
    base.mkdir(parents=True, exist_ok=True)
    names = [name for name in arguments.only.split(",") if name]
    inputs = make_inputs(base / "inputs")
    rows = []
    for command in commands(inputs):
        if names and command.name not in names:
            continue
        began = time.monotonic()
        folder = base / command.name.replace(" ", "_")
        row = Trial(command, folder, arguments.kills, arguments.seed, arguments.fresh).go()
        print(f"{row['what']}: {row['tried']} kills, {row['result']} ({time.monotonic() - began:.0f} s)", flush=True)
        rows.append(row)
        typed = f"python tests/benchmarks/fire_kill.py --work WORK --kills {arguments.kills}"
        every = [*compare.rows_but(arguments.name, rows), *rows]  # of other commands, tried before
        save(arguments.name, {"command": typed, "seed": arguments.seed, "rows": every})


if __name__ == "__main__":
    main()
