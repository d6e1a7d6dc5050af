"""Scratch folders of killed processes go, those of living ones stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from cryosuite.formats.scratch import claim_scratch, remove_dead_scratch

PREFIX = "cryosuite-sums-"
HOLD = """
import sys, time
from cryosuite.formats.scratch import claim_scratch
print(claim_scratch(sys.argv[1], sys.argv[2])[0], flush=True)
time.sleep(60)
"""


def test_folders_of_a_killed_process_are_removed_and_those_of_a_living_one_stay(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, PREFIX, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        theirs = Path(other.stdout.readline().strip())
        (theirs / "sums_0_0.npy").write_bytes(bytes(1000))
        ours, lock = claim_scratch(PREFIX, tmp_path)
        remove_dead_scratch(PREFIX, tmp_path)
        assert (theirs / "sums_0_0.npy").is_file() and ours.is_dir()
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdout.close()
    remove_dead_scratch(PREFIX, tmp_path)
    assert not theirs.exists() and ours.is_dir()
    os.close(lock)
    remove_dead_scratch(PREFIX, tmp_path)
    assert not list(tmp_path.iterdir())


def test_links_and_folders_that_nobody_claimed_stay(tmp_path: Path) -> None:
    parent, elsewhere = tmp_path / "parent", tmp_path / "elsewhere"
    parent.mkdir()
    elsewhere.mkdir()
    aim, lock = claim_scratch(PREFIX, elsewhere)
    os.close(lock)  # dead, but not in this folder
    (parent / f"{PREFIX}link").symlink_to(aim)
    (parent / f"{PREFIX}plain").mkdir()
    (parent / f"{PREFIX}linked").mkdir()
    (parent / f"{PREFIX}linked" / "in-use").symlink_to(aim / "in-use")
    other, lock = claim_scratch("others-", parent)
    os.close(lock)
    remove_dead_scratch(PREFIX, parent)
    assert aim.is_dir() and other.is_dir()
    assert {entry.name[len(PREFIX) :] for entry in parent.glob(f"{PREFIX}*")} == {"link", "plain", "linked"}
    remove_dead_scratch(PREFIX, tmp_path / "gone")


def test_links_inside_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    path, lock = claim_scratch(PREFIX, tmp_path)
    (path / "link").symlink_to(tmp_path / "kept")
    os.close(lock)
    remove_dead_scratch(PREFIX, tmp_path)
    assert not path.exists() and (tmp_path / "kept" / "file").is_file()
