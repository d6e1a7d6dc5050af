"""Hostile files for every reader of files from outside: one hour of processor time of bent, cut and joined files.

    python tests/benchmarks/fire_fuzz.py --work /tmp/fuzz [--seconds 3600] [--readers 'mrc;star'] [--jobs 2]

Each input is judged by ``tests/hostile.py``: read, refused in one sentence, or a fault (another exception, over 5 s,
memory beyond 4 x the file + 2 MB, something executed or written). Readers take turns of a minute in processes of their
own that may die; a second start with the same folder goes on where the first ended. With the atheris package
(``pip install atheris``; libFuzzer for Python) inputs are chosen by the branches they reach, without it at random.
Faulty inputs are kept in WORK/faults; those mended are in tests/corpus, replayed by tests/test_formats_corpus.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]
CORPUS = HERE.parent / "corpus"
SLICE = 12.0  # processor seconds of a turn
STUCK = 120.0  # wall seconds without a word after which a process is ended
LONGEST = 1 << 20  # bytes of an input


class Turn:
    """One process' turn with a reader: inputs are judged and counted, faults kept, the score written now and then."""

    def __init__(self, name: str, work: Path, seconds: float, seed: int) -> None:
        import hostile_inputs
        import hostile_seeds
        from hostile import attempt, limit_memory
        from hostile_readers import READERS

        self.name, self.work, self.seconds, self.attempt = name, work, seconds, attempt
        self.reader, self.mutate, self.rng = READERS[name], hostile_inputs.mutate, random.Random(seed)
        scene = work / "scenes" / slug(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not (scene / "run").is_dir():
                hostile_seeds.scene(scene)
        self.path = scene / self.reader.name
        self.corpus = work / "inputs" / slug(name)
        self.corpus.mkdir(parents=True, exist_ok=True)
        self.seeds = list(self.reader.seeds())
        for data in self.seeds:
            (self.corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)
            self.path.write_bytes(data)
            for _ in range(2):  # what is imported and kept for good is not the file's memory
                attempt(self.reader.read, self.path, writes=self.reader.writes)
        self.kept = list(self.seeds)
        self.score = {"tried": 0, "read": 0, "refused": 0, "fault": 0, "slowest": 0.0, "peak": 0, "faults": {}}
        limit_memory()
        self.began = self.told = time.process_time()

    def one(self, data: bytes) -> None:
        """Judge one input; the process ends when its turn is over."""
        self.path.write_bytes(data)
        outcome = self.attempt(self.reader.read, self.path, writes=self.reader.writes)
        score = self.score
        score["tried"] += 1
        score[outcome.result] += 1
        score["slowest"] = max(score["slowest"], outcome.seconds)
        score["peak"] = max(score["peak"], outcome.peak - 4 * len(data))
        if outcome.fault is not None and outcome.fault.what not in score["faults"]:
            score["faults"][outcome.fault.what] = keep_fault(self.work, self.name, outcome.fault, data)
        now = time.process_time()
        if now - self.told > 1 or now - self.began > self.seconds or score["tried"] == 1:
            self.told = now
            score["cpu_s"] = now - self.began
            write(self.work / f"turn_{slug(self.name)}.json", json.dumps(score))
            if now - self.began > self.seconds:
                os._exit(0)

    def changed(self, data: bytes) -> bytes:
        return self.mutate(data, self.rng, self.seeds, self.reader.words)[:LONGEST]

    def at_random(self) -> None:
        """Inputs made of the seeds, and of inputs that were read."""
        while True:
            data = self.changed(self.rng.choice(self.kept))
            before = self.score["read"]
            self.one(data)
            if self.score["read"] > before and len(self.kept) < 400 and self.rng.random() < 0.05:
                self.kept.append(data)


def write(path: Path, text: str) -> None:
    """Write a file that is whole at any time."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def keep_fault(work: Path, name: str, fault: object, data: bytes) -> str:
    """Write a faulty input and what came of it; returns its path."""
    folder = work / "faults" / slug(name)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha1(fault.what.encode()).hexdigest()[:12]
    if not path.exists():
        path.write_bytes(data)
        path.with_suffix(".txt").write_text(f"{fault.what}\n\n{fault.details}\n")
    return str(path)


def prepare() -> bool:
    """Import what reads, once for all turns; with atheris, if it is there, so that it sees the branches taken."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import atheris
        except ImportError:
            import hostile_readers

            return hostile_readers is None
        with atheris.instrument_imports(include=["cryosuite.formats", "cryosuite.data", "cryosuite.analysis", "yaml"]):
            import hostile_readers
            import yaml  # noqa: F401
    return True


def take_turn(name: str, work: Path, seconds: float, seed: int, guided: bool) -> None:
    """What the process of a turn does; it does not return."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    log = os.open(work / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    turn = Turn(name, work, seconds, seed)
    if not guided:
        turn.at_random()
    import atheris

    def bent(data: bytes, largest: int, number: int) -> bytes:
        turn.rng.seed(number)
        return turn.changed(data)[:largest] if number % 4 else atheris.Mutate(data, largest)

    options = ["fuzz", str(turn.corpus), f"-seed={seed + 1}", f"-max_len={LONGEST}", "-timeout=600", "-rss_limit_mb=0",
               "-verbosity=0", "-handle_segv=0", "-len_control=0", f"-artifact_prefix={work}/"]  # fmt: skip
    atheris.Setup(options, turn.one, custom_mutator=bent)
    atheris.Fuzz()


def start(name: str, work: Path, seconds: float, seed: int, guided: bool) -> int:
    """Fork the process of a turn; its number."""
    (work / f"turn_{slug(name)}.json").unlink(missing_ok=True)
    number = os.fork()
    if number == 0:
        try:
            take_turn(name, work, seconds, seed, guided)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return number


def finish(name: str, work: Path, number: int) -> dict | None:
    """The score of a turn, with what ended it when that was not the clock; None while it goes on."""
    said = work / f"turn_{slug(name)}.json"
    if said.exists() and time.time() - said.stat().st_mtime > STUCK:
        os.kill(number, signal.SIGKILL)
    ended, status = os.waitpid(number, os.WNOHANG)
    if not ended:
        return None
    score = json.loads(said.read_text()) if said.exists() else {"tried": 0, "faults": {}, "cpu_s": 0.0}
    if status:
        from hostile import Fault
        from hostile_readers import READERS

        path = work / "scenes" / slug(name) / READERS[name].name
        what = Fault(f"process ended with {os.waitstatus_to_exitcode(status)}", "see log.txt")
        score["faults"][what.what] = keep_fault(work, name, what, path.read_bytes() if path.exists() else b"")
    return score


def add(total: dict, score: dict) -> None:
    """Add the score of a turn to that of all turns of a reader."""
    for key in ("tried", "read", "refused", "fault", "cpu_s"):
        total[key] = total.get(key, 0) + score.get(key, 0)
    for key in ("slowest", "peak"):
        total[key] = max(total.get(key, 0), score.get(key, 0))
    total.setdefault("faults", {}).update(score["faults"])


def rows(totals: dict[str, dict]) -> list[dict]:
    """Rows for the table: readers with faults left, one each, then all others together."""
    good = {name: total for name, total in totals.items() if not total["faults"]}
    found = [
        {"kind": "input", "what": f"bent {name} files", "tried": total["tried"],
         "result": f"{len(total['faults'])} faults left to mend", "detail": spent_on([total])}
        for name, total in totals.items() if name not in good
    ]  # fmt: skip
    if good:
        mended = sum(len(list((CORPUS / slug(name)).glob("*"))) for name in good if (CORPUS / slug(name)).is_dir())
        met = sum(total["fault"] for total in good.values())
        detail = (
            f"{spent_on(list(good.values()))}; {met} inputs met faults that are mended by now; {mended} in tests/corpus"
        )
        tried = sum(total["tried"] for total in good.values())
        found.append(
            {"kind": "input", "what": f"bent files of {len(good)} kinds: {', '.join(good)}", "tried": tried,
             "result": "each read or refused in one sentence", "detail": detail}
        )  # fmt: skip
    return found


def spent_on(totals: list[dict]) -> str:
    """What some readers did with their inputs and what it took."""
    refused, read, cpu = (sum(total[key] for total in totals) for key in ("refused", "read", "cpu_s"))
    slowest, peak = (max(total[key] for total in totals) for key in ("slowest", "peak"))
    return (
        f"{refused:,} refused, {read:,} read; {cpu:,.0f} CPU s; slowest {slowest:.2f} s; memory at most 4 x file + "
        f"{max(peak, 0) / 1e6:.1f} MB"
    )


def report(totals: dict, seed: int) -> None:
    """Write the result of all turns so far."""
    from common import save

    spent = sum(total["cpu_s"] for total in totals.values())
    save("fire_fuzz", {"seed": seed, "cpu_s": round(spent), "rows": rows(totals)})


def main() -> None:
    """Share the time among the readers, keep the score, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for inputs, faults and the score")
    parser.add_argument("--seconds", type=float, default=3600, help="processor seconds in all")
    parser.add_argument("--readers", default="", help="some of them, by name (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="only write the result of what was done so far")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    progress = work / "progress.json"
    totals = json.loads(progress.read_text()) if progress.exists() else {}
    if options.report:
        report(totals, options.seed)
        return
    guided = prepare()
    from hostile_readers import READERS

    names = [name.strip() for name in options.readers.split(";") if name.strip()] or list(READERS)
    share = options.seconds / len(names)
    running: dict[str, int] = {}
    while True:
        due = [name for name in names if totals.get(name, {}).get("cpu_s", 0) < share - 0.5]
        if not due and not running:
            break
        due = sorted(set(due) - running.keys(), key=lambda name: totals.get(name, {}).get("cpu_s", 0))
        for name in due[: options.jobs - len(running)]:
            total = totals.setdefault(name, {"turns": 0, "cpu_s": 0.0})
            total["turns"] += 1
            seconds = min(SLICE, share - total["cpu_s"])
            running[name] = start(name, work, seconds, options.seed + 1000 * total["turns"], guided)
        time.sleep(1)
        for name in list(running):
            score = finish(name, work, running[name])
            if score is None:
                continue
            del running[name]
            add(totals[name], score)
            write(progress, json.dumps(totals, indent=1))
            spent = sum(one["cpu_s"] for one in totals.values())
            faults = list(totals[name]["faults"])
            print(f"{time.strftime('%H:%M:%S')} {spent:.0f} s: {name} {totals[name]['tried']} {faults}", flush=True)
    report(totals, options.seed)


if __name__ == "__main__":
    main()
