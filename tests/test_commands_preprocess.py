"""``cryosuite preprocess`` as a user meets it."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import subprocess
import sys
import warnings
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from cryosuite.cli import main
from cryosuite.data.open import open_particles
from cryosuite.formats.mrc import StackReader, StackWriter
from cryosuite.formats.star import read_star, write_star


def run(*arguments: object) -> SimpleNamespace:
    """The command line in this process: exit code and what it printed."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = ["cryosuite", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(os.environ, COLUMNS="200"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        try:
            main()
        except SystemExit as leave:
            code = leave.code or 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def test_help_is_quick_to_read():
    done = run("preprocess", "--help")
    assert done.returncode == 0
    for word in ("--particle-diameter", "Angstrom", "--invert", "--passthrough", "cryosuite preprocess run_data.star"):
        assert word in done.stdout


def test_a_star_from_the_command_line(golden, tmp_path):
    done = run("preprocess", golden / "relion/particles.star", "-D", 32, "-o", tmp_path / "w")
    assert done.returncode == 0, done.stderr
    assert "64 -> 32" in done.stdout
    assert "note: " in done.stderr and "particles are white" in done.stderr
    assert open_particles(tmp_path / "w").dataset["command"].startswith("cryosuite preprocess")
    again = run("preprocess", golden / "relion/particles.star", "-D", 48, "-o", tmp_path / "w")
    assert (again.returncode, "--overwrite" in again.stderr) == (2, True)
    assert open_particles(tmp_path / "w").box_size == 32
    assert (
        run("preprocess", golden / "relion/particles.star", "-D", 48, "-o", tmp_path / "w", "--overwrite").returncode
        == 0
    )
    assert open_particles(tmp_path / "w").box_size == 48


def test_cryodrgn_options(golden, tmp_path):
    pickles = ("--poses", golden / "cryodrgn/pose.pkl", "--ctf", golden / "cryodrgn/ctf.pkl")
    done = run(
        "preprocess", golden / "relion/particles.mrcs", *pickles, "--ind", golden / "cryodrgn/ind_first50.pkl",
        "--invert", "--float16", "-o", tmp_path / "w",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    work = open_particles(tmp_path / "w")
    assert (len(work), work.dataset["sign"], work.dataset["sign_from"]) == (50, -1, "option")
    assert work.dataset["dtype"] == "float16"


@pytest.mark.parametrize(
    ("file", "options", "mention"),
    [
        ("index_out_of_range.star", (), "12"),
        ("wrong_counts_stack_missing.star", (), "absent.mrcs"),
        ("good.star", ("-D", "33"), "even"),
        ("good.star", ("-D", "64"), "larger"),
        ("good.star", ("--invert", "--uninvert"), "not both"),
        ("truncated.mrcs", (), "33792"),
        ("evil_object.cs", (), "posix"),
        ("no_such_file.star", (), "no such file"),
    ],
)
def test_bad_input_ends_with_one_line_and_no_output(golden, tmp_path, file, options, mention):
    done = run("preprocess", golden / "adversarial" / file, "-o", tmp_path / "w", *options)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert mention in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_memory_stays_under_a_gibibyte(golden, tmp_path):
    """3 GB of images (48,000 of 128 pixels) through one process; its peak is what the kernel says.

    Not ru_maxrss: a child inherits that of the process that started it.
    """
    n, size = 48000, 128
    base = np.random.default_rng(0).standard_normal((1000, size, size), dtype=np.float32)
    with StackWriter(tmp_path / "big.mrcs", n, size, 1.5) as writer:
        for _ in range(n // 1000):
            writer.write(base)
    blocks = read_star(golden / "relion/particles.star")
    blocks["optics"]["rlnImageSize"], blocks["optics"]["rlnImagePixelSize"] = 128, 1.5
    table = blocks["particles"].iloc[np.arange(n) % 200].reset_index(drop=True)
    table["rlnImageName"] = [f"{number + 1:06d}@big.mrcs" for number in range(n)]
    write_star(tmp_path / "big.star", {**blocks, "particles": table})
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    script = (
        "import atexit, re, sys; from cryosuite.cli import main\n"
        "peak = lambda: re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]\n"
        "atexit.register(lambda: print('peak', peak(), 'torch' in sys.modules, file=sys.stderr))\n"
        "sys.argv = ['cryosuite', *sys.argv[1:]]\n"
        "main()"
    )
    arguments = ["preprocess", str(tmp_path / "big.star"), "-D", "64", "-o", str(tmp_path / "w")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    peak, torch_loaded = next(line.split()[1:] for line in done.stderr.splitlines() if line.startswith("peak"))
    assert int(peak) < 700 * 1024  # KiB; the limit we promise is 1 GiB
    print(f"peak {int(peak) // 1024} MiB")
    assert torch_loaded == "False"
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert n / cpu > 2500  # images per CPU second, start-up and tables included (4,000-6,000 on a quiet machine)
    assert StackReader(tmp_path / "w/particles.mrcs").count == n


def test_somebody_elses_files_are_not_replaced_unasked(golden, tmp_path):
    (tmp_path / "particles.star").write_text("mine")
    done = run("preprocess", golden / "relion/particles.star", "-D", 32, "-o", tmp_path)
    assert (done.returncode, "particles.star, but no finished" in done.stderr) == (2, True)
    assert (tmp_path / "particles.star").read_text() == "mine"
