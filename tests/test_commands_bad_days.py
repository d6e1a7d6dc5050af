"""analyze, select and export on the days when something is wrong with the run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from select_toy import Toy, make_run
from typer.testing import CliRunner

from cryosuite.cli import app
from cryosuite.data.open import open_particles
from cryosuite.data.preprocess import PreprocessOptions, preprocess
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError
from cryosuite.formats.config import write_yaml
from cryosuite.formats.mrc import read_map
from cryosuite.formats.pickles import read_indices, read_labels, write_pickle
from cryosuite.methods import LoadedRun, load_run

D = 16
QUICK = ("--skip-umap", "--ksample", "3", "--pc", "1", "--n-per-pc", "2")


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def project(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder: particles, work folder, run; nothing refers outside of it."""
    folder = tmp_path_factory.mktemp("days") / "project"
    folder.mkdir()
    for name in ("particles.star", "particles.mrcs"):
        shutil.copyfile(golden / "relion" / name, folder / name)
    preprocess(open_particles(folder / "particles.star", ind=np.arange(30)), folder / "work", PreprocessOptions(D))
    make_run(folder / "run", folder / "work", 30, ind=None)
    return folder


@pytest.fixture
def run(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A run whose network is made up: it draws a ball as bright as the first latent number."""
    toy = make_run(tmp_path / "run", project / "work", 30)
    shutil.rmtree(toy.analysis.path)

    def load(folder: RunDir, config: dict, epoch: int) -> LoadedRun:
        from cryosuite.formats.pickles import read_latent

        z = read_latent(folder.z(epoch), finite=False)[0]
        found = open_particles(config["particles"])
        return LoadedRun("hype", found.subset(np.arange(len(z))), z, epoch, 6.0, D, decode, config)

    monkeypatch.setattr("cryosuite.methods.hype_run.load", load)
    monkeypatch.setattr("cryosuite.analysis.run.PREVIEW", 48)
    return toy


def decode(latents: np.ndarray) -> np.ndarray:
    """A ball of 20 pixels."""
    axis = np.arange(D) - D // 2
    ball = axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None] ** 2 < 20
    return np.broadcast_to(ball.astype(np.float32), (len(latents), D, D, D)) * (1 + latents[:, :1, None, None] ** 2)


def analysed(run: Toy, *options: object, epoch: int = 2) -> np.ndarray:
    """Labels after the whole command."""
    invoke("analyze", run.run.path, *QUICK, *options)
    return read_labels(run.run.analysis(epoch).labels, unlabelled=True)


def test_an_unfinished_run_is_analysed_at_its_last_whole_epoch(run: Toy) -> None:
    """As rsync leaves it half-way: a z.N.pkl cut short, a temporary file, weights without latents."""
    whole = run.run.z(2).read_bytes()
    run.run.z(3).write_bytes(whole[: len(whole) // 2])
    (run.run.path / ".z.4.pkl.tmp").write_bytes(b"x")
    run.run.weights(4).write_bytes(b"x")
    with pytest.warns(UserWarning, match="epoch 3 is left out.*truncated"):
        labels = analysed(run, "--skip-vol", "--no-report")
    assert len(labels) == 30 and (labels >= 0).all()
    with pytest.raises(InputError, match="z.3.pkl: truncated"):
        invoke("analyze", run.run.path, 3, *QUICK)
    invoke("select", run.run.path, "--near-row", 1, "--count", 2, "-o", run.run.path / "ind.pkl")


def test_a_run_in_its_first_epoch_says_so(run: Toy) -> None:
    for epoch in (1, 2):
        run.run.z(epoch).unlink()
    with pytest.raises(InputError, match="no epoch is finished yet"):
        load_run(run.run.path)


@pytest.mark.slow
def test_rows_that_are_no_numbers_are_named_and_left_out(run: Toy, tmp_path: Path) -> None:
    z = run.z.copy()
    z[4, 1], z[20] = np.nan, np.inf
    write_pickle(run.run.z(2), z)
    with pytest.warns(UserWarning, match="2 of 30 latents are NaN or infinite.*rows 4, 20"):
        labels = analysed(run)
    assert np.flatnonzero(labels == -1).tolist() == [4, 20]
    counts = 0
    for label in range(3):
        invoke("select", run.run.path, "--cluster", label, "-o", tmp_path / "ind.pkl")
        rows = read_indices(tmp_path / "ind.pkl")
        assert not set(rows) & {4, 20}
        counts += len(rows)
    assert counts == 28
    invoke("select", run.run.path, "--where", "not pc1 > 0 or pc1 > 0", "-o", tmp_path / "ind.pkl")
    assert len(read_indices(tmp_path / "ind.pkl")) == 28
    invoke("export", run.run.path, "--all-clusters", "-o", tmp_path / "all")
    assert sum(len(read_indices(path)) for path in (tmp_path / "all").glob("*.ind.pkl")) == 28


@pytest.mark.slow
@pytest.mark.parametrize(("count", "spread"), [(1, 1.0), (2, 1.0), (30, 0.0)], ids=["one", "two", "all equal"])
def test_one_particle_and_equal_latents(run: Toy, tmp_path: Path, count: int, spread: float) -> None:
    for epoch in (1, 2):
        write_pickle(run.run.z(epoch), (1 + spread * run.z)[:count].astype(np.float32))
    with pytest.warns(UserWarning, match="different latents"):
        labels = analysed(run)
    assert len(labels) == count and labels.max() == (1 if count == 2 else 0)
    volumes = list(run.run.analysis(2).path.glob("kmeans*/vol_*.mrc"))
    assert len(volumes) == labels.max() + 1 and np.isfinite(read_map(volumes[0]).data).all()


def test_a_project_that_moved(project: Path, tmp_path: Path) -> None:
    """All of it to another folder, the old place gone: run, work folder, its source and lists are found again."""
    new = tmp_path / "elsewhere" / "deep"
    shutil.copytree(project, new)
    hidden = project.with_name("hidden")
    project.rename(hidden)
    try:
        found = open_particles(new / "run")
        assert len(found) == 30 and str(found.path).startswith(str(new))
        invoke("select", new / "run", "--cluster", 1, "-o", tmp_path / "a.star", "-o", tmp_path / "a.pkl")
        star = open_particles(tmp_path / "a.star")
        assert star.box_size == 64 and len(star) == 10
        assert np.array_equal(read_indices(tmp_path / "a.pkl"), np.arange(1, 30, 3))
        assert str(new) in star.images.files[0].__str__()
        invoke("export", new / "run/analyze.2", "--cluster", 1, "-o", tmp_path / "b.star")
    finally:
        hidden.rename(project)


def test_images_of_a_run_are_found_by_datadir(golden: Path, tmp_path: Path) -> None:
    """A run on a star file whose stack is elsewhere: one option, as for the star itself."""
    (tmp_path / "meta").mkdir()
    (tmp_path / "stacks").mkdir()
    shutil.copyfile(golden / "relion/particles.star", tmp_path / "meta/particles.star")
    shutil.copyfile(golden / "relion/particles.mrcs", tmp_path / "stacks/particles.mrcs")
    toy = make_run(tmp_path / "runs/one", tmp_path / "meta/particles.star", 200)
    with pytest.raises(InputError, match="cannot find the stack particles.mrcs.*--datadir"):
        invoke("select", toy.run.path, "--cluster", 1, "-o", tmp_path / "a.pkl")
    invoke("select", toy.run.path, "--cluster", 1, "--datadir", tmp_path / "stacks", "-o", tmp_path / "a.pkl")
    assert read_indices(tmp_path / "a.pkl").tolist() == list(range(1, 200, 3))


def test_analyze_takes_datadir_for_any_run(run: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As select and export do; it was known for runs of cryoDRGN only."""
    seen = []
    nothing = SimpleNamespace(decode=None)
    monkeypatch.setattr(
        "cryosuite.methods.hype_run.load", lambda folder, config, epoch: seen.append(config["datadir"]) or nothing
    )
    load_run(run.run.path, datadir=tmp_path / "stacks")
    assert seen == [str(tmp_path / "stacks")]


def test_an_analysis_inside_another_run_belongs_to_its_own(project: Path, tmp_path: Path) -> None:
    """`analyze one -o two/look`: labels of one, whatever the folder above is."""
    one = make_run(tmp_path / "one", project / "work", 30)
    two = make_run(tmp_path / "two", project / "particles.star", 200)
    shutil.move(one.analysis.path, two.run.path / "look")
    write_yaml(two.run.path / "look/analyze.yaml", {"kind": "analysis", "run": "../../one", "epoch": 2})
    invoke("select", two.run.path / "look", "--cluster", 1, "-o", tmp_path / "a.pkl")
    assert read_indices(tmp_path / "a.pkl").tolist() == list(range(1, 30, 3))


def test_a_run_whose_particles_are_gone_says_where_they_were(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "run", tmp_path / "alone" / "run")
    config = (tmp_path / "alone/run/config.yaml").read_text().replace(str(project), "/gone/away")
    (tmp_path / "alone/run/config.yaml").write_text(config)
    with pytest.raises(InputError, match="/gone/away/work"):
        invoke("select", tmp_path / "alone/run", "--cluster", 1, "-o", tmp_path / "a.pkl")


@pytest.mark.skipif(not hasattr(os, "geteuid") or shutil.which("setpriv") is None, reason="needs setpriv")
@pytest.mark.slow
def test_a_run_that_may_only_be_read(project: Path, tmp_path: Path) -> None:
    """Somebody else's run: -o elsewhere works, without -o one sentence says so, and nothing in it changes."""
    everyone = Path("/tmp") / f"cryosuite-readonly-{os.getpid()}"
    shutil.copytree(project, everyone)
    try:
        for path in (everyone, *everyone.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        out = everyone.with_name(everyone.name + "-out")
        out.mkdir()
        out.chmod(0o777)
        before = sorted(map(str, everyone.rglob("*")))

        def as_nobody(*arguments: object) -> subprocess.CompletedProcess:
            command = [sys.executable, "-m", "cryosuite", *map(str, arguments)]
            if os.geteuid() == 0:
                command = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", *command]
            environment = {**os.environ, "HOME": str(out), "MPLCONFIGDIR": str(out), "OMP_NUM_THREADS": "1"}
            return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out, timeout=300)

        done = as_nobody("--version")
        if done.returncode != 0:
            pytest.skip(f"this Python cannot be run by another user: {done.stderr[-200:]}")
        done = as_nobody("select", everyone / "run", "--cluster", 1, "-o", out / "a.star", "-o", out / "a.pkl")
        assert done.returncode == 0, done.stderr
        assert len(read_indices(out / "a.pkl")) == 10
        done = as_nobody("select", everyone / "run", "--cluster", 1, "-o", everyone / "run/a.pkl")
        assert done.returncode == 2 and "a.pkl" in done.stderr and "Traceback" not in done.stderr
        assert sorted(map(str, everyone.rglob("*"))) == before
    finally:
        for path in (everyone, *everyone.rglob("*")):
            path.chmod(0o755)
        shutil.rmtree(everyone)
        shutil.rmtree(everyone.with_name(everyone.name + "-out"), ignore_errors=True)


def test_an_analysis_that_cannot_be_written_names_the_way_out(run: Toy, tmp_path: Path) -> None:
    run.run.analysis(2).path.write_text("in the way")
    with pytest.raises(InputError, match="cannot write there.*Give another folder with -o"):
        invoke("analyze", run.run.path, *QUICK, "--skip-vol")
    invoke("analyze", run.run.path, *QUICK, "--skip-vol", "--no-report", "-o", tmp_path / "look")
    invoke("select", tmp_path / "look", "--cluster", 1, "-o", tmp_path / "a.pkl")
    lasso = {"kind": "cryosuite selection", "version": 1, "run": "run", "epoch": 2, "n_particles": 30, "rows": [7]}
    (tmp_path / "lasso.json").write_text(json.dumps(lasso))
    invoke("select", tmp_path / "look", "--from", tmp_path / "lasso.json", "-o", tmp_path / "a.pkl")
    assert read_indices(tmp_path / "a.pkl").tolist() == [7]
