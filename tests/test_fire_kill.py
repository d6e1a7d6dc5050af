"""kill -9 on the way, in small: the full round is tests/benchmarks/fire_kill.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.mark.slow
def test_killed_twice_and_the_same(tmp_path: Path) -> None:
    """Two kills at random moments; then --resume, or again where there is none: the same files, bit for bit."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.argv[0:2] = ['fire_kill.py']\n"
        "import common, fire_kill_compare\n"
        "from pathlib import Path\n"
        "common.RESULTS = fire_kill_compare.RESULTS = Path(sys.argv[2])\n"
        "import fire_kill; fire_kill.main()\n"
    )
    commands = ["train-hype", "train-kraqen (voxel maps)", "preprocess"]
    only = ["--only", ",".join(commands)]
    words = ["--work", str(tmp_path), "--kills", "2", *only, "--name", "killed", "--fresh", "0"]
    run = [sys.executable, "-c", code, str(BENCHMARKS), *words]
    done = subprocess.run(run, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "killed.json").read_text())["rows"]
    for command, row in zip(commands, rows, strict=True):
        assert command in row["what"] and row["tried"] == 2
        assert row["problems"] == [] and row["result"] == "the same files, bit for bit"


def test_what_is_compared_is_what_a_reader_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fire_kill_compare as compare

    for name, loss in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        folder = tmp_path / name
        folder.mkdir()
        line = json.dumps({"step": 1, "loss": loss, "seconds": ord(name)})
        (folder / "metrics.jsonl").write_text(line + "\n")
        (folder / "config.yaml").write_text(f"started: {name}\nepochs: 3\ncommand: x\n  --overwrite {name}\n")
    assert compare.differences(tmp_path / "a", tmp_path / "b") == []
    assert compare.differences(tmp_path / "a", tmp_path / "c") == ["metrics.jsonl differs"]
    (tmp_path / "b" / ".z.1.pkl.abcdefgh.1.pkl").write_text("half")
    (tmp_path / "b" / "z.1.pkl").write_bytes(b"\x80\x04half")
    found = compare.differences(tmp_path / "a", tmp_path / "b")
    assert found == ["z.1.pkl is left over", ".z.1.pkl.abcdefgh.1.pkl is a forgotten temporary file"]
    assert compare.broken(tmp_path / "b", None) == ["after a kill z.1.pkl cannot be read"]
    assert compare.broken(tmp_path / "b", tmp_path / "a") == [
        "after a kill z.1.pkl is there and is not the finished one"
    ]
