"""CPU time and memory of every command's --help, the Tab key's answer included; the aim is half a second.

python tests/benchmarks/help_speed.py [--runs 3]
"""

from __future__ import annotations

import argparse

from common import CRYOSUITE, best, save

from cryosuite.cli import COMMANDS

LIMIT = 0.5  # s of CPU, for each


def main() -> None:
    """Measure, print, write; a command above the limit is an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="of each command; the quickest counts (default 3)")
    runs = parser.parse_args().runs
    asked = {"": ["--help"], **{name: [name, "--help"] for name in COMMANDS}}
    found = {name or "cryosuite": best([*CRYOSUITE, *words], runs) for name, words in asked.items()}
    environment = {"_CRYOSUITE_COMPLETE": "complete_bash", "COMP_WORDS": "cryosuite train-", "COMP_CWORD": "1"}
    script = [CRYOSUITE[0], "-c", "from cryosuite.cli import main; main()"]
    found["completion"] = best(script, runs, env=environment)
    for name, timing in found.items():
        print(f"{name:16s} {timing.cpu_s:5.2f} s CPU  {timing.rss_mib:5.0f} MiB", flush=True)
    slowest = max(found.values(), key=lambda timing: timing.cpu_s)
    rows = {name: {"cpu_s": round(one.cpu_s, 3), "rss_mib": round(one.rss_mib)} for name, one in found.items()}
    save("help_speed", {"limit_cpu_s": LIMIT, "slowest_cpu_s": round(slowest.cpu_s, 3), "commands": rows})
    if slowest.cpu_s > LIMIT:
        raise SystemExit(f"above {LIMIT} s: {[name for name, one in found.items() if one.cpu_s > LIMIT]}")


if __name__ == "__main__":
    main()
