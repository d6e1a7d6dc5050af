"""The same seed twice: every command with a seed is run two times in one process, its files compared bit for bit.

    python tests/benchmarks/fire_numerics.py --work /tmp/numerics [--commands 'simulate;train-hype']

Writes results/fire_numerics.json after each command; a second start leaves out those that were compared before. Then
the tests of tests/test_fire_numerics.py, what readers of images are put through, are run and counted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

import pytest  # noqa: E402
from common import RESULTS, save  # noqa: E402
from fire_toy import COMMANDS, SEED, contents, run_twice, small_networks  # noqa: E402

# what is tried and what comes of it -> parts of the names of its tests
LIMITS = {
    ("images with NaN and infinite pixels", "named and left out; maps and spectra are those of the others"): [
        "broken", "without_them", "good_images",
    ],
    ("stacks of float16, int8, int16, uint16", "the images of float32 up to the rounding"): ["few_bits"],
    ("10 and 50 orders of magnitude between images", "alike after preprocess"): ["orders_of_magnitude"],
    ("two sets 10 orders apart, not normalised", "each whitened by its own noise"): ["other_intensity"],
    ("hot and dead pixels", "finite, the other images unchanged"): ["dead_pixels"],
    ("constant images, and nothing else", "named and kept; a map of zeros"): ["constant_images"],
    ("defocus 0", "amplitude contrast alone, finite maps"): ["without_defocus"],
    ("shifts of half a box", "the same map"): ["half_a_box"],
}  # fmt: skip


def call(words: list[str]) -> None:
    """A command in this process; a failure ends the benchmark."""
    from cryosuite.cli import app

    own, sys.argv = sys.argv, ["cryosuite", *words]
    try:
        app(args=words, prog_name="cryosuite", standalone_mode=False)
    finally:
        sys.argv = own


def row(name: str, differ: list[str], seconds: float) -> dict:
    """The row of a command for the table."""
    result = "the same bits" if not differ else f"{len(differ)} files differ: {', '.join(differ[:4])}"
    made = COMMANDS[name][1]
    later = [other for _, other in COMMANDS.values() if other.startswith(f"{made}/")]  # put there by other commands
    files = [file for file in contents(Path(made)) if not file.startswith(tuple(later) or "\0")]
    detail = f"{len(files)} files compared; CPU, {seconds:.0f} s of processor time"
    return {"kind": "input", "what": f"the same seed twice, {name}", "tried": 2, "result": result, "detail": detail}


class Counted:
    """A plugin for pytest: how each test ended."""

    def __init__(self) -> None:
        self.passed: dict[str, bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.partition("::")[2]
        self.passed[name] = self.passed.get(name, True) and not report.failed


def limits() -> list[dict]:
    """Rows of what the tests put the readers of images through."""
    counted = Counted()
    pytest.main(["-q", "-m", "not slow", str(HERE.parent / "test_fire_numerics.py")], plugins=[counted])
    rows = []
    for (what, result), parts in LIMITS.items():
        ends = [end for name, end in counted.passed.items() if any(part in name for part in parts)]
        failed = len(ends) - sum(ends)
        detail = "tests/test_fire_numerics.py" + (f": {failed} FAILED" if failed else "")
        rows.append({"kind": "input", "what": what, "tried": len(ends), "result": "FAILED" if failed else result,
                     "detail": detail})  # fmt: skip
    return rows


def main() -> None:
    """Run the commands, keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what the commands write")
    parser.add_argument("--commands", default="", help="some of them, by name (default: all)")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "fire_numerics.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {one["what"].rpartition(" ")[2]: one for one in known}
    os.chdir(options.work)
    names = [name.strip() for name in options.commands.split(";") if name.strip()] or list(COMMANDS)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small_networks(patch)
        for name in names:
            if rows.get(name, {}).get("result") == "the same bits" and Path(COMMANDS[name][1]).exists():
                seconds = float(rows[name]["detail"].rpartition("CPU, ")[2].split()[0])
                rows[name] = row(name, [], seconds)
                continue
            began = time.process_time()
            rows[name] = row(name, run_twice(name, call), time.process_time() - began)
            print(time.strftime("%H:%M:%S"), rows[name], flush=True)
            save("fire_numerics", {"seed": SEED, "rows": [rows[one] for one in COMMANDS if one in rows]})
    found = [rows[one] for one in COMMANDS if one in rows]
    save("fire_numerics", {"seed": SEED, "rows": [*found, *limits()]})


if __name__ == "__main__":
    main()
