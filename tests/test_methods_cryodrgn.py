"""``analyze`` on cryoDRGN's own run folders: latents, particles, volumes; moved files, old forms, hostile ones."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from cryosuite.cli import app
from cryosuite.data.cryodrgn_run import is_cryodrgn_run, open_cryodrgn_run, read_cryodrgn_config
from cryosuite.data.orientations import from_euler
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError
from cryosuite.formats.mrc import StackWriter, read_map
from cryosuite.formats.pickles import read_indices, read_labels, read_torch, safe_load, write_pickle
from cryosuite.methods import load_run
from cryosuite.methods.cryodrgn_decoder import CryodrgnDecoder

QUICK = ("--skip-umap", "--ksample", "3", "--pc", "1", "--n-per-pc", "2")


@pytest.fixture
def project(golden: Path, tmp_path: Path) -> Path:
    """The golden run with the files its config names, in a folder that can be written."""
    for name in ("cryodrgn_run", "relion", "cryodrgn"):
        (tmp_path / name).mkdir()
        for path in (golden / name).iterdir():
            if path.is_file():
                shutil.copyfile(path, tmp_path / name / path.name)
    return tmp_path


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def rewrite(run: Path, **entries: object) -> None:
    """Change dataset_args of a config."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["dataset_args"].update(entries)
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_volumes_are_those_of_its_own_program(golden: Path) -> None:
    """eval_vol of cryoDRGN 4.3.1 at a row of zvals.txt; grey values and orientation included."""
    run = golden / "cryodrgn_run"
    loaded = load_run(run)
    assert (loaded.name, loaded.epoch, loaded.box_size, loaded.z.shape) == ("cryodrgn", 2, 64, (200, 4))
    assert loaded.pixel_size == pytest.approx(3.0) and len(loaded.particles) == 200
    assert np.array_equal(loaded.z, safe_load(run / "z.2.pkl")[0])
    z = np.loadtxt(run / "eval_vol/zvals.txt")
    volumes = loaded.decode(z)
    theirs = read_map(run / "eval_vol/vol_002.mrc").data
    assert volumes.shape == (3, 64, 64, 64) and volumes.dtype == np.float32
    assert np.abs(volumes[1] - theirs).max() < 1e-4 * theirs.std()
    assert np.abs(volumes[0] - theirs).max() > 0.1 * theirs.std()


def toy_run(folder: Path, read_out: tuple[float, float], box: int = 16, count: int = 12) -> Path:
    """A run in its layout whose network gives relu(z1) times ``read_out`` = (re, im) everywhere."""
    run, zdim, rng = folder / "run", 2, np.random.default_rng(0)
    run.mkdir(parents=True)
    images = rng.normal(size=(count, box, box)).astype(np.float32)
    with StackWriter(folder / "particles.mrcs", count, box, 2.0) as writer:
        writer.write(images)
    write_pickle(
        folder / "pose.pkl", (np.broadcast_to(np.eye(3, dtype=np.float32), (count, 3, 3)).copy(), np.zeros((count, 2)))
    )
    row = [box, 2.0, 15000, 14000, 30, 300, 2.7, 0.1, 0]
    write_pickle(folder / "ctf.pkl", np.tile(np.array(row, np.float32), (count, 1)))
    files = {"particles": "particles.mrcs", "poses": "pose.pkl", "ctf": "ctf.pkl"}
    config = {
        "dataset_args": {name: f"/elsewhere/{file}" for name, file in files.items()} | {"norm": [0.0, 7.0]},
        "lattice_args": {"D": box + 1, "extent": 0.5},
        "model_args": {"pe_type": "gaussian", "domain": "fourier", "activation": "relu", "zdim": zdim},
    }  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    frequencies = torch.randn(5, 3)
    first, middle, last = torch.zeros(4, 10 + zdim), torch.zeros(4, 4), torch.zeros(2, 4)
    first[0, 10], last[:, 0] = 1.0, torch.tensor(read_out)
    name = "decoder.decoder.main"
    state = {
        "decoder.rand_freqs": frequencies, f"{name}.0.weight": first, f"{name}.0.bias": torch.zeros(4),
        f"{name}.2.linear.weight": middle, f"{name}.2.linear.bias": torch.zeros(4),
        f"{name}.4.weight": last, f"{name}.4.bias": torch.zeros(2),
    }  # fmt: skip
    for epoch in (1, 2):
        write_pickle(run / f"z.{epoch}.pkl", rng.normal(size=(count, zdim)).astype(np.float32), np.zeros((count, zdim)))
        torch.save(
            {"epoch": epoch, "model_state_dict": state, "optimizer_state_dict": {}}, run / f"weights.{epoch}.pkl"
        )
    return run


def test_a_toy_of_its_layout_gives_the_volume_of_its_formula(tmp_path: Path) -> None:
    """Real ones on the ball of frequencies are a peak at voxel D//2, as high as there are points; i is odd there."""
    with pytest.warns(UserWarning, match="elsewhere/particles.mrcs is not there"):
        loaded = load_run(toy_run(tmp_path / "even", (1.0, 0.0)))
    assert (loaded.epoch, loaded.box_size, loaded.pixel_size, len(loaded.particles)) == (2, 16, 2.0, 12)
    points = np.stack(np.meshgrid(*[np.arange(-8, 8)] * 3), -1).reshape(-1, 3)
    inside = int((np.square(points).sum(1) <= 64).sum())
    volumes = loaded.decode(np.array([[1.0, 9.0], [3.0, 0.0], [-1.0, 0.0]]))
    assert volumes[0, 8, 8, 8] == volumes[0].max() == pytest.approx(7.0 * inside / 16**3, rel=1e-5)
    assert np.allclose(volumes[1], 3 * volumes[0], atol=1e-5) and not volumes[2].any()
    inner = volumes[0, 1:, 1:, 1:]
    assert np.allclose(inner, inner[::-1, ::-1, ::-1], atol=1e-5)
    with pytest.warns(UserWarning, match="elsewhere"):
        odd = load_run(toy_run(tmp_path / "odd", (0.0, 1.0))).decode(np.array([[1.0, 0.0]]))[0]
    assert abs(odd).max() > 0.1 and abs(odd[8, 8, 8]) < 0.01 * abs(odd).max()


@pytest.mark.parametrize("program", ["abinit", "abinit_homo_old", "damaged"])
def test_poses_that_ab_initio_programs_found(tmp_path: Path, program: str) -> None:
    """abinit writes shifts in pixels, the older programs pixels / (D + 1); rotations are as ours in all of them.

    Checked against cryoDRGN 4.3: its search (pose_search_ai.opt_trans) gives t = (-3, 2) for an image displaced by
    (3, -2) pixels, with R and not with R transposed.
    """
    run, box = toy_run(tmp_path, (1.0, 0.0)), 16
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["dataset_args"]["poses"]
    if program != "abinit_homo_old":
        config |= {"data_norm_mean": 0.0, "data_norm_std": 7.0}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    pixels = np.random.default_rng(1).uniform(-0.4, 0.4, (12, 2))  # below one: taken for fractions by mistake
    pixels[0] = -3, 2
    rotation = from_euler(np.random.default_rng(2).uniform(0, 170, (12, 3)))
    if program == "damaged":
        rotation[3] = np.nan
    write_pickle(run / "pose.2.pkl", (rotation, pixels / (box + 1) if program == "abinit_homo_old" else pixels))
    with pytest.warns(UserWarning) as told:
        opened = open_cryodrgn_run(run, need_poses=False)
    if program == "damaged":
        assert any("pose.2.pkl" in str(one.message) and "left out" in str(one.message) for one in told)
        assert not opened.poses_found
        with pytest.raises(InputError, match="pose.2.pkl"):
            open_cryodrgn_run(run)
        return
    np.testing.assert_allclose(opened.particles.shift * box, pixels, atol=1e-5)
    np.testing.assert_allclose(opened.particles.rotation, rotation, atol=1e-6)
    assert opened.poses_found and opened.particles.poses_from == run / "pose.2.pkl"


def test_the_network_of_abinit_is_asked_on_the_ball_without_its_mean(golden: Path) -> None:
    """Real ones at every frequency but the mean; scaled by data_norm_std, which its config has in place of norm."""
    names = {"mlp.main.0": torch.zeros(4, 12), "mlp.main.2.linear": torch.zeros(4, 4), "mlp.main.4": torch.zeros(1, 4)}
    state = {f"hypervolume.{name}.weight": weight for name, weight in names.items()}
    state |= {f"hypervolume.{name}.bias": torch.zeros(len(weight)) for name, weight in names.items()}
    state["hypervolume.mlp.main.4.bias"] = torch.ones(1)
    state["hypervolume.rand_freqs"] = torch.randn(5, 3)
    config = {
        "data_norm_mean": 0.0, "data_norm_std": 3.0, "dataset_args": {}, "lattice_args": {"D": 17},
        "model_args": {"domain": "hartley", "pe_type": "gaussian"},
    }  # fmt: skip
    volume = CryodrgnDecoder(state, config, golden).volumes(np.zeros((1, 2)))[0]
    points = np.square(np.stack(np.meshgrid(*[np.arange(-8, 8)] * 3), -1)).sum(-1)
    assert volume[8, 8, 8] == pytest.approx(3.0 * ((points > 0) & (points <= 64)).sum() / 16**3, rel=1e-5)
    assert abs(volume.mean()) < 1e-6


@pytest.mark.parametrize("epoch", [1, 7])
def test_other_epochs(golden: Path, epoch: int) -> None:
    if epoch == 7:
        with pytest.raises(InputError, match="epoch 7"):
            load_run(golden / "cryodrgn_run", 7)
        return
    with pytest.warns(UserWarning, match=r"no volumes: .*weights.1.pkl"):  # the golden run kept those of the end alone
        loaded = load_run(golden / "cryodrgn_run", 1)
    assert loaded.decode is None and np.array_equal(loaded.z, safe_load(golden / "cryodrgn_run/z.1.pkl")[0])


@pytest.mark.slow
def test_analyze_select_and_export(project: Path) -> None:
    run = project / "cryodrgn_run"
    assert "next:" in invoke("analyze", run, *QUICK)
    out = RunDir(run).analysis(2)
    labels = read_labels(out.labels)
    assert len(labels) == 200 and len(out.kmeans(3).volumes()) == 3 and out.chimerax.is_file()
    invoke("select", run, "--cluster", 0, 2, "-o", project / "ind.pkl")
    assert read_indices(project / "ind.pkl").tolist() == np.flatnonzero(labels != 1).tolist()
    invoke("export", out.path, "--cluster", 1, "-o", project / "one.star")
    from cryosuite.data.open import open_particles

    star = open_particles(project / "one.star")
    wanted = open_particles(project / "relion/particles.star").subset(np.flatnonzero(labels == 1))
    assert np.array_equal(star.read(slice(None)), wanted.read(slice(None)))
    assert np.allclose(star.rotation, wanted.rotation, atol=1e-5)


@pytest.mark.slow
def test_its_own_analysis_is_left_alone(project: Path) -> None:
    theirs = project / "cryodrgn_run/analyze.2"
    (theirs / "kmeans20").mkdir(parents=True)
    (theirs / "cryoDRGN_viz.ipynb").touch()
    (theirs / "kmeans20/labels.pkl").write_bytes(b"theirs")
    invoke("analyze", project / "cryodrgn_run", *QUICK, "--skip-vol")
    assert (theirs / "kmeans20/labels.pkl").read_bytes() == b"theirs" and not (theirs / "labels.pkl").exists()
    assert (project / "cryodrgn_run/analyze.2.cryosuite/labels.pkl").is_file()
    invoke("select", project / "cryodrgn_run", "--cluster", 1, "-o", project / "ind.pkl")


def test_files_of_another_machine_are_found_beside_or_by_datadir(project: Path) -> None:
    run, far = project / "cryodrgn_run", "/cluster/someone/2021"
    rewrite(run, particles=f"{far}/relion/particles.mrcs", poses=f"{far}/cryodrgn/pose.pkl", ctf=f"{far}/ctf.pkl")
    with pytest.raises(InputError, match=r"ctf .*2021/ctf.pkl.*are not there.*Looked for: /cluster.*--datadir"):
        open_cryodrgn_run(run)
    (project / "meta").mkdir()
    shutil.copyfile(project / "cryodrgn/ctf.pkl", project / "meta/ctf.pkl")
    with pytest.warns(UserWarning, match="is used as ctf"):
        found = open_cryodrgn_run(run, datadir=project / "meta")
    assert len(found.particles) == 200 and found.particles.ctf is not None and found.particles.rotation is not None


def test_without_the_images_there_are_latents_and_volumes(project: Path) -> None:
    shutil.rmtree(project / "relion")
    with pytest.warns(UserWarning, match="Without them") as told:
        loaded = load_run(project / "cryodrgn_run")
    assert "particles.mrcs" in str(told[0].message) and any("--Apix" in str(one.message) for one in told)
    assert loaded.particles is None and loaded.z.shape == (200, 4)
    assert loaded.decode(loaded.z[:1]).shape == (1, 64, 64, 64)
    with pytest.raises(InputError, match="--polish"):
        invoke("analyze", project / "cryodrgn_run", *QUICK, "--polish")


@pytest.mark.slow
def test_analysis_without_the_images(project: Path) -> None:
    shutil.rmtree(project / "relion")
    with pytest.warns(UserWarning, match="Without them"):
        invoke("analyze", project / "cryodrgn_run", *QUICK, "--Apix", 3)
    out = RunDir(project / "cryodrgn_run").analysis(2)
    assert len(read_labels(out.labels)) == 200
    assert read_map(out.kmeans(3).volume(0)).pixel_size == pytest.approx(3.0)


def test_the_config_of_old_versions(project: Path) -> None:
    """config.pkl: the config with numpy numbers, then a second pickle with a date, which is not looked at."""
    import datetime

    run = project / "cryodrgn_run"
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").unlink()
    config["dataset_args"]["norm"] = tuple(np.float32(value) for value in config["dataset_args"]["norm"])
    del config["time"]
    meta = {"time": datetime.datetime(2021, 1, 1), "version": "0.3.2"}
    (run / "config.pkl").write_bytes(pickle.dumps(config) + pickle.dumps(meta))
    assert is_cryodrgn_run(run) and read_cryodrgn_config(run)["lattice_args"]["D"] == 65
    assert load_run(run).decode(np.zeros((1, 4))).shape == (1, 64, 64, 64)


def test_hostile_configs_and_weights_run_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = project / "cryodrgn_run"
    monkeypatch.chdir(project)

    class Evil:
        def __reduce__(self) -> tuple:
            return os.system, ("touch PWNED",)

    torch.save({"model_state_dict": Evil()}, run / "weights.2.pkl")
    with pytest.warns(UserWarning, match="no volumes: .*refused"):
        assert load_run(run).decode is None
    (run / "config.yaml").unlink()
    (run / "config.pkl").write_bytes(pickle.dumps({"dataset_args": Evil()}))
    with pytest.raises(InputError, match="config.pkl: refused"):
        load_run(run)
    (run / "config.pkl").unlink()
    (run / "config.yaml").write_text("dataset_args: !!python/object/apply:os.system ['touch PWNED']\n")
    with pytest.raises(InputError, match="config.yaml: refused"):
        load_run(run)
    assert not (project / "PWNED").exists()


@pytest.mark.parametrize(
    ("change", "mention"),
    [
        (lambda c, s: c["model_args"].update(pe_type="wavelets"), "wavelets"),
        (lambda c, s: c["model_args"].update(activation="sine"), "sine"),
        (lambda c, s: c["model_args"].update(pe_type="none"), "none"),
        (lambda c, s: c["lattice_args"].update(D=64), "lattice_args.D is 64"),
        (lambda c, s: c["dataset_args"].update(norm=None), "norm is None"),
        (lambda c, s: c["dataset_args"].update(norm=[0.0, float("nan")]), "finite"),
        (lambda c, s: s.pop("decoder.rand_freqs"), "rand_freqs"),
        (lambda c, s: [s.pop(key) for key in list(s) if key.startswith("decoder.decoder")], "no layers"),
        (lambda c, s: c["model_args"].update(domain="hartley"), "2 outputs"),
    ],
)
def test_networks_that_are_not_known_are_named(golden: Path, change, mention: str) -> None:
    path = golden / "cryodrgn_run/weights.2.pkl"
    config, state = read_cryodrgn_config(path.parent), dict(read_torch(path)["model_state_dict"])
    change(config, state)
    with pytest.raises(InputError, match=mention):
        CryodrgnDecoder(state, config, path)


def test_a_run_that_is_being_written(project: Path) -> None:
    """Its files are not written at once: half a z.N.pkl is left out, the epoch before is analysed."""
    run = project / "cryodrgn_run"
    whole = (run / "z.2.pkl").read_bytes()
    (run / "z.3.pkl").write_bytes(whole[: len(whole) // 3])
    (run / "z.4.pkl").touch()
    with pytest.warns(UserWarning, match="epoch 4 is left out") as told:
        assert load_run(run).epoch == 2
    assert any("epoch 3 is left out" in str(one.message) for one in told)
    with pytest.raises(InputError, match="truncated"):
        load_run(run, 3)


def test_indices_choose_the_particles(project: Path) -> None:
    run = project / "cryodrgn_run"
    chosen = np.arange(0, 200, 4)
    write_pickle(project / "ind.pkl", chosen)
    rewrite(run, ind="../ind.pkl")
    for epoch in (1, 2):
        mu, logvar = safe_load(run / f"z.{epoch}.pkl")
        write_pickle(run / f"z.{epoch}.pkl", mu[chosen], logvar[chosen])
    loaded = load_run(run)
    assert np.array_equal(loaded.particles.index, chosen) and len(loaded.z) == 50


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["train_vae", "--domain", "hartley", "--activation", "leaky_relu"],
        ["train_vae", "--pe-type", "geom_full", "--pe-dim", "6"],
        ["train_dec", "--pe-type", "geom_lowf"],
    ],
    ids=["hartley", "geometric", "train_dec"],
)
def test_volumes_of_a_run_made_now(project: Path, options: list[str]) -> None:
    """With a cryoDRGN beside (CRYODRGN_VENV): train a tiny run, let both programs draw its volumes."""
    program = Path(os.environ.get("CRYODRGN_VENV", "/nonexistent")) / "bin" / "cryodrgn"
    if not program.is_file():
        pytest.skip("no cryoDRGN: set CRYODRGN_VENV to an environment with `pip install cryodrgn`")
    command, *more = options
    given = ["../relion/particles.mrcs", "--poses", "../cryodrgn/pose.pkl", "--ctf", "../cryodrgn/ctf.pkl"]
    size = ["--zdim", "4", "-n", "1", "-b", "8", "--seed", "3", "--no-amp", "--no-analysis"]
    if command == "train_vae":
        size += ["--enc-dim", "8", "--enc-layers", "1", "--dec-dim", "16", "--dec-layers", "2"]
    else:
        size += ["--dim", "16", "--layers", "2"]
    work = project / "now"
    work.mkdir()
    points = np.array([[0.5, -1, 0.2, 0.1], [1, 0, 0, -1]])
    np.savetxt(work / "points.txt", points)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for line in (
        [command, *given, *size, *more, "-o", "run"],
        ["eval_vol", "run/weights.1.pkl", "-c", "run/config.yaml", "--zfile", "points.txt", "-o", "volumes"],
    ):
        done = subprocess.run([program, *line], cwd=work, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
    loaded = load_run(work / "run")
    volumes = loaded.decode(points)
    for number, name in enumerate(sorted((work / "volumes").glob("*.mrc"))):
        theirs = read_map(name).data
        assert np.abs(volumes[number] - theirs).max() < 1e-4 * theirs.std()
