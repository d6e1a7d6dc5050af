"""What the benchmarks share: timing a whole process, result files, the versions they were made with."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
CRYOSUITE = [sys.executable, "-m", "cryosuite"]


@dataclass(frozen=True)
class Timing:
    """One process: CPU seconds of it and its children, wall seconds, peak memory in MiB, its output.

    ended: it came to its end; False where it was stopped at the limit it was given.
    """

    cpu_s: float
    wall_s: float
    rss_mib: float
    output: str
    ended: bool = True


def timed(
    command: list[str], cwd: Path | None = None, env: dict[str, str] | None = None, limit_s: float | None = None
) -> Timing:
    """Run a command to its end and account for it as the operating system does; a failure stops the benchmark.

    limit_s: wall seconds after which it is stopped.
    """
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    if limit_s:
        command = ["timeout", "--kill-after=20", f"{limit_s:g}", *command]
    script = "import resource,subprocess,sys;c=subprocess.run(sys.argv[1:]).returncode;"
    script += "sys.stderr.write('\\nPEAK %d' % resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss);sys.exit(abs(c))"
    done = subprocess.run(
        [sys.executable, "-c", script, *command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    output, _, peak = done.stdout.rpartition("\nPEAK ")
    stopped = bool(limit_s) and done.returncode in (124, 137)
    if done.returncode and not stopped:
        raise SystemExit(f"{' '.join(command)} failed with exit code {done.returncode}:\n{output[-3000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Timing(cpu, time.monotonic() - began, int(peak) / 1024, output, not stopped)


def best(command: list[str], runs: int = 2, **options: object) -> Timing:
    """The run with the least CPU time of several: the machine's noise only ever adds."""
    return min((timed(command, **options) for _ in range(runs)), key=lambda timing: timing.cpu_s)


def peer(name: str, variable: str, fallback: str) -> str | None:
    """Path of a peer program: from the environment variable, else the fallback, else PATH; None when absent."""
    for candidate in (os.environ.get(variable, ""), fallback, shutil.which(name) or ""):
        if candidate and Path(candidate).exists():
            return candidate
    return None


def versions() -> dict[str, str]:
    """The versions a result was made with."""
    names = ("cryosuite", "torch", "numpy", "scipy", "timm", "scikit-learn", "lightning-fabric")
    found = {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def without_paths(text: str) -> str:
    """A result without the folders of this machine: those on the command line become WORK, the project's own ``.``"""
    given = {word for word in sys.argv[1:] if word.startswith("/")}
    names = dict.fromkeys(given, "WORK") | {os.environ.get("CRYOSUITE_SHARED", ""): "../shared"}
    names |= {os.environ.get("CRYODRGN_VENV", ""): ".venv-cryodrgn"}
    names |= {str(Path(__file__).resolve().parents[2]): ".", tempfile.gettempdir(): "/tmp"}
    for path in sorted(filter(None, names), key=len, reverse=True):
        text = text.replace(path, names[path])
    return text


def save(name: str, result: dict, folder: Path | None = None) -> Path:
    """Write one result as JSON with the command that made it, the date and the versions."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    command = ["python", f"tests/benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]  # from wherever it was started
    stamp = {"command": " ".join(command), "date": time.strftime("%Y-%m-%d"), "versions": versions()}
    if run := os.environ.get("BENCH_RUN"):  # several results of one run: bench_speed.py
        stamp["run"] = run
    text = json.dumps({**stamp, **result}, indent=1)
    text = re.sub(r"\[[-+\d.,eE\s]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text)  # numbers in one line
    path.write_text(without_paths(text) + "\n")
    print(f"wrote {path}")
    return path
