"""The pages of ``tutorials``: their shell blocks, and running them as they are written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

TUTORIALS = Path(__file__).parents[1] / "tutorials"


def blocks(name: str) -> list[str]:
    """The shell blocks of a page, in order; what is not to be run is indented instead of fenced."""
    return re.findall(r"^```bash\n(.*?)^```", (TUTORIALS / name).read_text(), flags=re.M | re.S)


def run_block(command: str, folder: Path, timeout: float = 3600, **more: str) -> str:
    """Run one block in ``folder`` with this Python's `cryosuite` first in the path; what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run(
        ["bash", "-e", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def run_page(name: str, folder: Path, timeout: float = 3600) -> list[str]:
    """Run all blocks of a page; what each printed."""
    return [run_block(command, folder, timeout) for command in blocks(name)]
