"""The tutorials' commands, run as they are written, and judged by what they are meant to give."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from sklearn.metrics import adjusted_rand_score
from tutorial_pages import TUTORIALS, blocks, run_block, run_page

from cryosuite.cli import COMMANDS, app
from cryosuite.data.select import LASSO
from cryosuite.formats.mrc import read_map
from cryosuite.formats.pickles import read_indices, read_labels, read_poses
from cryosuite.formats.star import particle_tables

TESTED = {  # page -> the test that runs it
    "abinitio.md": "test_particles_without_poses",
    "cryobench.md": "tests/test_cryobench_layout.py",
    "encoder.md": "test_an_encoder_of_your_own",
    "fastar.md": "test_poses_from_a_network",
    "from_cryodrgn.md": "tests/test_tutorials_cryodrgn.py",
    "from_cryosparc.md": "test_from_cryosparc_and_back",
    "from_relion.md": "test_from_relion_and_back",
    "landscape.md": "test_paths_and_states",
    "mixtures.md": "test_mixtures_sorted_and_polished",
    "mixture_without_poses.md": "test_a_mixture_without_poses",
    "motion.md": "test_continuous_motion",
    "quickstart.md": "test_quickstart",
    "report.md": "test_reading_the_report",
    "sharpen.md": "test_sharpening",
    "slurm.md": "test_a_batch_script",
}


def scores(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_every_page_is_run_by_a_test_and_named_in_the_readme() -> None:
    pages = {path.name for path in TUTORIALS.glob("*.md")}
    assert pages == set(TESTED)
    readme = (TUTORIALS.parent / "README.md").read_text()
    for page, test in TESTED.items():
        assert blocks(page), page
        assert f"tutorials/{page}" in readme, page
        assert test in globals() or (TUTORIALS.parent / test).is_file(), test


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in [*TUTORIALS.glob("*.md"), TUTORIALS.parent / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def commands_of(text: str) -> list[str]:
    """Every command of a page: in blocks, run or not, and in backticks."""
    text = text.replace("\\\n", " ")
    lines = re.findall(r"^ *(?:srun .*?)?cryosuite ([a-z].*?)(?: +#.*| \|\| true| > .*)?$", text, flags=re.M)
    return lines + re.findall(r"`cryosuite ([a-z][^`]*)`", text)


def test_every_command_of_every_page_takes_its_options() -> None:
    """Also of those that are only shown; options of the command that `slurm` wraps are that command's."""
    application, seen = typer.main.get_command(app), 0
    for page in [*TUTORIALS.glob("*.md"), TUTORIALS / "quickstart.sh", TUTORIALS.parent / "README.md"]:
        for line in commands_of(page.read_text()):
            names = [word for word in line.split() if word in COMMANDS]
            assert names, f"{page.name}: cryosuite {line}"
            known = {
                option
                for name in dict.fromkeys(names[:2] if names[0] == "slurm" else names[:1])
                for parameter in application.get_command(None, name).params
                for option in [*parameter.opts, *parameter.secondary_opts, "--help"]
            }
            for word in line.split():
                if re.match(r"--?[A-Za-z]", word):
                    seen += 1
                    assert word.split("=")[0].rstrip(")") in known, f"{page.name}: {word} in: cryosuite {line}"
    assert seen > 150


def test_the_quickstart_page_is_the_quickstart_script() -> None:
    """One set of commands in two places."""
    script = (TUTORIALS / "quickstart.sh").read_text().replace('"$out/', "quickstart/").replace('"', "")
    assert [line for line in script.splitlines() if line.startswith("cryosuite ")] == [
        block.strip() for block in blocks("quickstart.md")
    ]


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    run_page("quickstart.md", tmp_path)
    run = tmp_path / "quickstart" / "run"
    found = scores(run / "eval.25" / "scores.json")
    assert found["clustering"]["kmeans_ari"] > 0.9 and found["oracle"]["gain_masked"] > 0.6
    for name in ("report.html", "overview.png", "view.cxc"):
        assert (run / "analyze.25" / name).stat().st_size > 1000


@pytest.mark.slow
def test_particles_without_poses(tmp_path: Path) -> None:
    """Simulate, find poses and classes, judge; the poses are right."""
    run_page("abinitio.md", tmp_path)
    assert scores(tmp_path / "run" / "eval.6" / "scores.json")["poses"]["rotation_median_deg"] < 5
    assert (tmp_path / "run" / "clusters.6" / "cluster_000.star").exists()


@pytest.mark.slow
def test_mixtures_sorted_and_polished(tmp_path: Path) -> None:
    """Simulate, sort, polish, judge, look, export; the polished maps are the better ones."""
    run_page("mixtures.md", tmp_path)
    raw = scores(tmp_path / "run" / "eval.16" / "scores.json")
    polished = scores(tmp_path / "run" / "polish.16" / "scores" / "scores.json")
    assert raw["clustering"]["kmeans_ari"] > 0.95
    for name in ("auc_masked", "auc_unmasked"):
        assert polished["per_image"][name] > raw["per_image"][name]
    assert polished["polished"] and not raw["polished"]
    assert (tmp_path / "state0.star").exists()


@pytest.mark.slow
def test_poses_from_a_network(tmp_path: Path) -> None:
    """Simulate, pose against the map, train on the poses; they are right."""
    run_page("fastar.md", tmp_path)
    errors = scores(tmp_path / "posed" / "truth.json")
    assert errors["predicted"]["raw"]["median_deg"] < errors["predicted"]["chance_raw"]["median_deg"] / 3
    assert errors["refined"]["raw"]["median_deg"] < 3 and errors["refined"]["raw"]["shift_median_px"] < 1


def judge_classes(folder: Path, suffix: str) -> np.ndarray:
    """The clusters of analyze.12 are the three proteins, and a file per cluster holds its particles."""
    truth = read_labels(folder / "project" / "labels.pkl")
    found = read_labels(folder / "run" / "analyze.12" / "labels.pkl")
    assert adjusted_rand_score(truth, found) > 0.9
    files = sorted((folder / "clusters").glob(f"*{suffix}"))
    assert len(files) == 3
    return found


@pytest.mark.slow
def test_from_relion_and_back(tmp_path: Path) -> None:
    """The exported rows are the original ones of the un-binned images, and RELION itself makes a map of them."""
    run_page("from_relion.md", tmp_path)
    found = judge_classes(tmp_path, ".star")
    source = particle_tables(tmp_path / "project" / "particles.star").particles
    back = particle_tables(tmp_path / "cluster0.star").particles
    kept = source[found == 0]
    for name in ("rlnDefocusU", "rlnAngleRot"):
        assert back[name].astype(str).tolist() == kept[name].astype(str).tolist()
    # the star lies in another folder than the stack: the names lead there from anywhere
    stack = str(tmp_path / "project" / "particles.mrcs")
    assert back["rlnImageName"].tolist() == [f"{n.partition('@')[0]}@{stack}" for n in kept["rlnImageName"]]
    good = particle_tables(tmp_path / "good.star").particles
    assert 0 < len(good) <= (found == 1).sum()
    defocus = good[["rlnDefocusU", "rlnDefocusV"]].astype(float).mean(axis=1)  # what `defocus` is in --where
    assert defocus.max() < 20000
    assert len(read_indices(tmp_path / "ind.pkl")) == (found != 1).sum()
    relion = shutil.which("relion_reconstruct")
    if relion:
        call = [relion, "--i", str(tmp_path / "cluster0.star"), "--o", str(tmp_path / "relion.mrc"), "--ctf"]
        done = subprocess.run(call, cwd=tmp_path / "project", capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        state = np.bincount(read_labels(tmp_path / "project" / "labels.pkl")[found == 0]).argmax()
        truth = read_map(tmp_path / "project" / "volumes" / f"vol_{state:03d}.mrc").data
        assert np.corrcoef(truth.ravel(), read_map(tmp_path / "relion.mrc").data.ravel())[0, 1] > 0.5


@pytest.mark.slow
def test_from_cryosparc_and_back(tmp_path: Path) -> None:
    """Poses come through the axis-angle form unchanged; uids and rows of a cluster are those of the job's file."""
    run_page("from_cryosparc.md", tmp_path)
    found = judge_classes(tmp_path, ".cs")
    rotation, shift = read_poses(tmp_path / "work" / "poses.pkl")
    true_rotation, true_shift = read_poses(tmp_path / "project" / "poses.pkl")
    assert np.abs(rotation - true_rotation).max() < 1e-5 and np.abs(shift - true_shift).max() < 1e-5
    source, back = (np.load(tmp_path / name) for name in ("P1/J42/particles.cs", "cluster0.cs"))
    assert np.array_equal(back["uid"], source["uid"][found == 0])
    assert np.array_equal(back["blob/idx"], source["blob/idx"][found == 0])
    assert set(source.dtype.names) <= set(back.dtype.names)
    assert len(particle_tables(tmp_path / "good.star").particles) == len(np.load(tmp_path / "good.cs"))


@pytest.mark.slow
def test_a_mixture_without_poses(tmp_path: Path) -> None:
    """From images and one map to states, polished maps and their sharpened form."""
    run_page("mixture_without_poses.md", tmp_path)
    assert scores(tmp_path / "posed" / "truth.json")["refined"]["raw"]["median_deg"] < 6
    found = scores(tmp_path / "run" / "polish.16" / "scores" / "scores.json")
    assert found["labels"]["ari"] > 0.6 and found["per_image"]["auc_masked_normalised"] > 0.7
    plain, sharp = (read_map(tmp_path / name) for name in ("run/polish.16/vol_000.mrc", "sharp_000.mrc"))
    assert sharp.data.shape == plain.data.shape and sharp.pixel_size == pytest.approx(plain.pixel_size)
    assert np.corrcoef(plain.data.ravel(), sharp.data.ravel())[0, 1] > 0.5


@pytest.mark.slow
def test_continuous_motion(tmp_path: Path) -> None:
    """Codes follow the turn and not the view, and the polished maps are better than one map for all."""
    run_page("motion.md", tmp_path)
    (path,) = (tmp_path / "run").glob("eval.*/scores.json")
    found = scores(path)
    assert found["landscape"]["imbalance_z_to_landscape"]["10"] < 0.75 and found["labels"]["ami"] > 0.45
    assert found["landscape"]["imbalance_z_to_pose"]["10"] > 0.9
    (path,) = (tmp_path / "run").glob("polish.*/scores/scores.json")
    polished = scores(path)["per_image"]["auc_masked"]
    assert polished > found["oracle"]["consensus_masked"] + 0.01 and polished > found["per_image"]["auc_masked"] + 0.01
    assert len(list((tmp_path / "run").glob("analyze.*/trajectories/*/vol_*.mrc"))) == 8


@pytest.mark.slow
def test_an_encoder_of_your_own(tmp_path: Path) -> None:
    """It learns: proteins that it never saw have more neighbours of their own than with the untrained network."""
    run_page("encoder.md", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "encoder" / "metrics.jsonl").read_text().splitlines()]
    known = [line for line in lines if "knn" in line]
    assert known[-1]["knn"] > known[-1]["knn_random"] + 0.03
    assert (tmp_path / "features" / "analyze.1" / "umap.png").exists()


@pytest.mark.slow
def test_paths_and_states(tmp_path: Path) -> None:
    """A film from particle to particle, and states that are the four proteins."""
    run_page("landscape.md", tmp_path)
    analysis = tmp_path / "run" / "analyze.8"
    assert (analysis / "trajectories" / "graph_12_900" / "movie.gif").stat().st_size > 10_000
    states, truth = (
        read_labels(analysis / "landscape" / "labels.pkl", unlabelled=True),
        read_labels(tmp_path / "work" / "labels.pkl"),
    )
    assert adjusted_rand_score(truth[states >= 0], states[states >= 0]) > 0.7
    assert (tmp_path / "states" / "vol_003.mrc").exists()


@pytest.mark.slow
def test_reading_the_report(tmp_path: Path) -> None:
    """The lasso is drawn by hand in the browser; here rows 5 to 44 are lassoed."""
    first, *others = blocks("report.md")
    run_block(first, tmp_path)
    page = (tmp_path / "run" / "analyze.10" / "report.html").read_text()
    assert "default-src 'none'" in page and len(page) > 100_000  # the browser itself lets nothing be loaded
    rows = list(range(5, 45))
    (tmp_path / "lasso.json").write_text(json.dumps({"kind": LASSO, "version": 1, "n_particles": 1500, "rows": rows}))
    for command in others:
        run_block(command, tmp_path)
    assert sorted(read_indices(tmp_path / "ind.pkl")) == rows
    assert len(particle_tables(tmp_path / "chosen.star").particles) == 40
    found = read_labels(tmp_path / "run" / "analyze.10" / "labels.pkl")
    assert 0 < len(particle_tables(tmp_path / "good.star").particles) < np.isin(found, (3, 5)).sum()


@pytest.mark.slow
def test_sharpening(tmp_path: Path) -> None:
    run_page("sharpen.md", tmp_path)
    before = read_map(tmp_path / "map" / "backproject.mrc")
    for name in ("sharp.mrc", "std.mrc", "cc.mrc"):
        after = read_map(tmp_path / name)
        assert after.data.shape == before.data.shape and after.pixel_size == pytest.approx(before.pixel_size)
    assert read_map(tmp_path / "std.mrc").data.min() >= 0 and read_map(tmp_path / "cc.mrc").data.max() <= 1.001


@pytest.mark.slow
def test_a_batch_script(tmp_path: Path) -> None:
    run_page("slurm.md", tmp_path)
    script = tmp_path / "run.sbatch"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    text = script.read_text()
    assert "#SBATCH --gpus-per-node=4" in text and "train-hype" in text and "--devices 4" in text
