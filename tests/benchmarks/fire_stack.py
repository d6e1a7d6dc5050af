"""A stack that is cut short, replaced or removed while a command reads it: what is said, and does it go on afterwards?

    python tests/benchmarks/fire_stack.py --work /tmp/fire --tries 2 [--only train-hype] [--seed 0]

At a random moment of its CPU time the stack of images is damaged. The command must come to its end with the same result
(it holds the images, or the file it opened) or leave with exit code 2 and one sentence that names the stack; never by a
signal. With the stack back in its place it is continued (--resume) or run again: the result must be the same.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import fire_kill_compare as compare
import numpy as np
from common import save
from fire_kill_commands import Command, commands, make_inputs
from fire_kill_process import Ended, work

TRIED = ("train-hype", "train-kraqen (voxel maps)", "train-kraqen (tri-plane)", "deco-classify (known poses)",
         "pretrain-iev", "backproject", "polish")  # fmt: skip


def cut_short(stack: Path) -> None:
    """The second half is gone, as when another program writes it anew."""
    os.truncate(stack, stack.stat().st_size // 2)


def replaced(stack: Path) -> None:
    """Another file of the same name, with fewer images."""
    other = stack.with_name("other")
    other.write_bytes(stack.read_bytes()[: stack.stat().st_size // 3])
    os.replace(other, stack)


def removed(stack: Path) -> None:
    """No file any more."""
    stack.unlink()


class Trial:
    """One command, whose particles lie in ``particles``, and its disasters."""

    def __init__(self, command: Command, base: Path, particles: Path, seed: int) -> None:
        self.command, self.base, self.particles = command, base, particles
        self.stack, self.out, self.log = particles / "particles.mrcs", base / "out", base / "out.log"
        self.random = np.random.default_rng([seed, sum(map(ord, command.name))])
        self.problems: list[str] = []
        self.tried = self.stopped = 0

    def go(self, tries: int) -> dict:
        """All disasters; the row of the table."""
        shutil.rmtree(self.base, ignore_errors=True)
        self.base.mkdir(parents=True)
        kept, whole = self.stack.read_bytes(), self.base / "whole"
        first = work(self.command.arguments(self.out), self.log)
        if first.code != 0:
            raise SystemExit(f"{self.command.name} failed undisturbed:\n{self.log.read_text()[-2000:]}")
        self.out.rename(whole)
        for disaster in [cut_short, replaced, removed] * tries:
            shutil.rmtree(self.out, ignore_errors=True)
            try:
                moment = float(self.random.uniform(0, first.cpu))
                ended = work(self.command.arguments(self.out), self.log, moment, lambda do=disaster: do(self.stack))
            finally:
                self.stack.write_bytes(kept)
            self.judge(ended, whole)
        return self.row()

    def judge(self, ended: Ended, whole: Path) -> None:
        """How it ended, and whether it goes on."""
        self.tried += 1
        if ended.code != 0:
            self.stopped += 1
            said = " ".join(self.log.read_text().split())
            if ended.code != 2 or "Traceback" in said or "particles.mrcs: " not in said:
                self.problems.append(f"exit code {ended.code}: {said[-300:]}")
            if problem := self.command.problem(self.out, self.log):
                self.problems.append(problem)
                return
        self.problems += compare.differences(whole, self.out)[:3]

    def row(self) -> dict:
        """For the table."""
        unique = list(dict.fromkeys(self.problems))
        good = "the same result at once, or code 2, one sentence that names the stack, and the same result afterwards"
        return {
            "kind": "fault",
            "what": f"stack cut short, replaced or removed under `{self.command.name}`, then put back and "
            f"{self.command.how}",
            "tried": self.tried,
            "result": "; ".join(unique[:3]) or good,
            "detail": f"{self.stopped} ended with code 2",
            "problems": unique,
        }


def main() -> None:
    """All commands that read particles for longer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tries", type=int, default=2, help="Of each kind of disaster.")
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="fire_stack", help="of the result file")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    base = arguments.work.absolute()
    base.mkdir(parents=True, exist_ok=True)
    names = [name for name in arguments.only.split(",") if name] or TRIED
    inputs, rows = make_inputs(base / "inputs"), []
    for command in commands(inputs):
        if command.name not in names:
            continue
        trial = Trial(command, base / command.name.replace(" ", "_"), inputs / "work", arguments.seed)
        row = trial.go(arguments.tries)
        print(f"{row['what']}: {row['tried']} times, {row['detail']}, {row['result']}", flush=True)
        rows.append(row)
        typed = f"python tests/benchmarks/fire_stack.py --work WORK --tries {arguments.tries}"
        every = [*compare.rows_but(arguments.name, rows), *rows]  # of other commands, tried before
        save(arguments.name, {"command": typed, "seed": arguments.seed, "rows": every})


if __name__ == "__main__":
    main()
