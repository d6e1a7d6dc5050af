"""Under fire: every command that shares its work, in two processes against one; killed ranks, one-sided mistakes.

    python tests/benchmarks/fire_distributed.py [--work DIR] [--kills 10] [--only NAME ...]

The processes are forked with the environment that torchrun gives them (gloo, CPU); the killed ones run under torchrun
itself, with --max-restarts. The sets are simulated blobs; the trainings take seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import fire_distributed_sets as sets
from common import save
from fire_kill_compare import rows_but
from forked import Ended, together

from cryosuite.data.workdir import RunDir
from cryosuite.formats.mrc import read_map
from cryosuite.formats.pickles import read_latent, read_poses
from cryosuite.kernels.rotations import geodesic_deg
from cryosuite.training.logs import read_metrics

SEED = 0
SAME_POSE = 0.1  # degrees


def main() -> None:
    """Try everything, write results/fire_distributed.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--kills", type=int, default=10, help="trainings whose process is killed; 0: none")
    parser.add_argument("--only", nargs="*", default=None, help="names of trainings and commands; default all")
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="fire_distributed")) if given.work is None else given.work
    sets.shrink()
    folder = sets.stack(work / "set")
    commands = sets.commands(folder)
    rows: list[dict] = []
    for row in tried(folder, work, commands if given.only is None else given.only, given.kills, given.only is None):
        rows.append(row)
        typed = "python tests/benchmarks/fire_distributed.py --work WORK"
        every = [*rows_but("fire_distributed", rows), *rows]  # of other commands, tried before
        save("fire_distributed", {"command": typed, "seed": SEED, "rows": every})
    if given.work is None:
        shutil.rmtree(work)


def tried(folder: Path, work: Path, names: Iterable[str], kills: int, mistakes: bool) -> Iterator[dict]:
    """The rows, one after the other."""
    for name in names:
        yield compare(name, sets.commands(folder)[name], work / name)
    if mistakes:
        yield one_sided(folder, work)
    if kills:
        yield killed(kills, work)


def compare(name: str, words: list[object], work: Path) -> dict:
    """A command in one and in two processes; how far apart their results are."""
    shutil.rmtree(work, ignore_errors=True)
    what = f"{words[0]}{sets.DETAIL.get(name, '')}: two processes against one"
    seconds = []
    for run, count in (("one", 1), ("two", 2)):
        began = time.monotonic()
        ended = together(work / f"said_{run}", [*words, "-o", work / run], count, seconds=900)
        seconds.append(time.monotonic() - began)
        if any(one.code for one in ended):
            print(f"{name} in {count} processes:\n{ended[0].err[-3000:]}\n{ended[-1].err[-1000:]}", flush=True)
            return {"kind": "load", "what": what, "tried": 1, "result": f"FAILED in {count} processes"}
    found = distances(work / "one", work / "two")
    print(f"{name}: {found} ({seconds[0]:.0f} s, {seconds[1]:.0f} s)", flush=True)
    return {"kind": "load", "what": what, "tried": 1, "result": found, "detail": "gloo, the same global batch"}


def distances(one: Path, two: Path) -> str:
    """What two runs have in common, in words: bytes, losses, latents, maps."""
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    if names != sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file()):
        return "DIFFERENT FILES"
    if (one / "particles.mrcs").exists():
        same = all((one / n).read_bytes().replace(b"/two", b"/one") == (two / n).read_bytes().replace(b"/two", b"/one")
                   for n in names)  # fmt: skip
        return "the same bytes" if same else "OTHER BYTES"
    told = []
    pair = [[line["loss"] for line in read_metrics(RunDir(run).metrics) if "loss" in line] for run in (one, two)]
    if pair[0]:
        told.append(f"{len(pair[0])} losses within {_apart(*map(np.array, pair)):.0e}")
    for name in [str(n) for n in names if str(n).startswith("z.")][-1:]:
        z, other = (read_latent(run / name)[0] for run in (one, two))
        told.append("latents in the same order, " + _within(float(np.abs(z - other).max() / np.abs(z).max())))
    for name in [str(n) for n in names if str(n).startswith("poses.") and str(n).endswith(".pkl")][-1:]:
        told.append(_poses_apart(one / name, two / name))
    maps = [_map_distance(one / n, two / n) for n in names if n.suffix == ".mrc" and "mask" not in n.name]
    if maps:
        told.append(f"{len(maps)} maps {_within(max(maps))}")
    return "; ".join(told)


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    return float((np.abs(a - b) / np.abs(a)).max())


def _poses_apart(one: Path, two: Path) -> str:
    import torch

    a, b = (torch.from_numpy(read_poses(path)[0]) for path in (one, two))
    apart = geodesic_deg(a, b)
    return f"{int((apart < SAME_POSE).sum())} of {len(apart)} poses within {SAME_POSE:g} degrees"


def _within(share: float) -> str:
    return "bit for bit" if share == 0 else f"within {share:.0e} of the largest value"


def _map_distance(one: Path, two: Path) -> float:
    a, b = read_map(one).data, read_map(two).data
    return float(np.abs(a - b).mean() / max(np.abs(a).max(), 1e-12))


def killed(count: int, work: Path) -> dict:
    """kill -9 of one of two processes of a training, torchrun --max-restarts, at different steps, ranks in turn."""
    from test_training_distributed import children_of, curve, torchrun
    from training_toy import Toy, ToyOptions, train

    shutil.rmtree(work / "kill", ignore_errors=True)
    train(work / "kill" / "one", Toy(ToyOptions()), epochs=4, batch_size=20)
    good, lost = 0, []
    for number in range(count):
        run = work / "kill" / str(number)
        process = torchrun(run, "--slow", "0.2", restarts=1, epochs=4, batch_size=20, checkpoint_every_minutes=0)
        while len(curve(run)) < 1 + number % 3 and process.poll() is None:
            time.sleep(0.05)
        os.kill(children_of(process)[number % 2], signal.SIGKILL)
        try:
            _, text = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text = "hung"
        log = RunDir(run).log.read_text()
        same = process.returncode == 0 and np.allclose(curve(run), curve(work / "kill" / "one"), rtol=1e-4)
        good += same
        if "going on at step" in log:
            lost.append(5 * (1 + number % 3) - int(log.split("going on at step")[1].split()[0]))
        print(f"kill {number}: {'same' if same else text[-300:]}", flush=True)
    return {
        "kind": "fault", "what": "kill -9 of one of two processes of a training, torchrun --max-restarts",
        "tried": count, "result": f"{good} of {count} went on by themselves to the losses of an undisturbed run",
        "detail": f"a checkpoint every step; at most {max([0, *lost])} steps done again",
    }  # fmt: skip


def one_sided(folder: Path, work: Path) -> dict:
    """A file that one process alone cannot read: all end, with one message."""
    good, names = 0, ("preprocess", "backproject", "train-hype")
    for name in names:
        words = sets.commands(folder)[name]
        ended = together(work / "one_sided" / name, [*words, "-o", work / "one_sided" / f"{name}.out"],
                         before=sets.blind_second)  # fmt: skip
        good += _ended_well(ended)
        print(name, json.dumps([one.code for one in ended]), flush=True)
    return {
        "kind": "input", "what": "a stack that one of two processes cannot read", "tried": len(names),
        "result": f"{good} of {len(names)} ended all processes, code 2, one message", "detail": ", ".join(names),
    }  # fmt: skip


def _ended_well(ended: list[Ended]) -> bool:
    said = "".join(one.err for one in ended)
    return all(one.code for one in ended) and 2 in {one.code for one in ended} and said.count("error:") == 1


if __name__ == "__main__":
    main()
