"""CryoBench as it is published: its folders are read, its FSC numbers are reproduced, and its tutorial runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tutorial_pages import run_page
from typer.testing import CliRunner

from cryosuite.cli import app
from cryosuite.data.cryobench import find_published, open_published
from cryosuite.data.truth import find_truth
from cryosuite.errors import InputError
from cryosuite.formats.config import write_yaml
from cryosuite.formats.mrc import read_map, write_map
from cryosuite.formats.pickles import read_ctf, read_labels, read_poses, write_pickle
from cryosuite.formats.stacks import StackReader, StackWriter
from cryosuite.metrics.fsc import fsc_table

RUNNER = CliRunner()
NAMES = ("10_tail", "2_head", "0_core")  # the benchmark sorts by number: 0_core is state 0, 10_tail the last

# The benchmark's own function (ml-struct-bio/CryoBench, metrics/fsc/utils/volumes.py: get_fsc_curve, get_fsc_cutoff;
# area by sklearn's auc of the absolute curve as in metrics/fsc/cdrgn.py), run once on maps of the shared fixtures:
# area, cut-offs at .5 and .143 in pixels, and the curve at entries 1, 4, 8, 12, 16, 24, 31.
PUBLISHED = {
    ("half1", "half2", ""): (
        0.158913, 6.4, 64 / 13, (1.0, 0.994188, 0.86887, 0.151888, -0.003464, -0.015342, 0.007606)),
    ("half1", "half2", "mask"): (
        0.20253, 64 / 13, 64 / 15, (1.000001, 0.999298, 0.982573, 0.605864, 0.076555, 0.015286, 0.002049)),
    ("volume", "half1", ""): (
        0.184567, 64 / 12, 64 / 15, (1.0, 0.996354, 0.922073, 0.324358, 0.10223, -0.027803, -0.022125)),
    ("volume", "half1", "mask"): (
        0.233434, 64 / 15, 3.2, (0.999999, 0.999695, 0.990494, 0.768468, 0.286411, -0.048718, -0.057036)),
    ("volume", "-half2", "mask"): (
        0.227604, 64.0, 64.0, (-1.0, -0.99953, -0.993102, -0.770748, -0.302685, -0.035577, 0.018939)),
}  # fmt: skip


def run(*arguments: object) -> str:
    result = RUNNER.invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def published_curve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The benchmark's definition, said plainly: entry i holds i - 1 <= |k| < i, entry 0 is 1, Nyquist is left out."""
    size = len(a)
    axis = np.arange(size) - size // 2
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis**2)
    u, v = (np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(one.astype(np.float64)))) for one in (a, b))
    curve = [1.0]
    for i in range(1, size // 2):
        shell = (radius >= i - 1) & (radius < i)
        norm = np.sqrt((np.abs(u[shell]) ** 2).sum() * (np.abs(v[shell]) ** 2).sum())
        curve.append(float((u[shell].conj() * v[shell]).sum().real / norm))
    return np.array(curve)


@pytest.mark.parametrize("names", PUBLISHED, ids="-".join)
def test_fsc_numbers_of_the_benchmark_itself(golden: Path, tmp_path: Path, names: tuple) -> None:
    area, half, seventh, values = PUBLISHED[names]
    paths = []
    for name in names[:2]:
        found = read_map(golden / "relion" / f"{name.lstrip('-')}.mrc")
        paths.append(tmp_path / f"{name}.mrc")
        write_map(paths[-1], -found.data if name.startswith("-") else found.data, 3.0)
    mask = ("--mask", golden / "relion" / "mask.mrc") if names[2] else ()
    run("eval-fsc", "--compat", "cryobench", "-o", tmp_path / "out", *mask, "--", *paths)
    row = json.loads((tmp_path / "out" / "scores.json").read_text())["curves"][-1]
    assert row["curve"] == ("masked" if names[2] else "unmasked")
    assert row["auc"] == pytest.approx(area, abs=1e-4)
    for threshold, pixels in ((0.5, half), (0.143, seventh)):
        assert row[f"resolution_{threshold}_A"] == pytest.approx(3.0 * pixels, abs=1e-4)
    text = np.genfromtxt(tmp_path / "out" / "fsc.csv", delimiter=",", names=True)
    assert np.abs(text[row["curve"]][[1, 4, 8, 12, 16, 24, 31]] - values).max() < 1e-4


def test_the_curve_follows_the_published_definition() -> None:
    rng = np.random.default_rng(1)
    a = rng.standard_normal((24, 24, 24)).astype(np.float32)
    b = (a + 2 * rng.standard_normal(a.shape)).astype(np.float32)
    table = fsc_table(torch.from_numpy(a), torch.from_numpy(b), 3.0, compat=True)
    assert np.abs(table.curves["unmasked"] - published_curve(a, b)).max() < 1e-5


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three states of 90 to 150 dark particles in the published layout; CTF of the box before the crop, bare maps."""
    folder = tmp_path_factory.mktemp("toy")
    run("simulate", "-o", folder / "sim", "--structures", "phantom:3", "-n", 360, "-D", 32, "--Apix", 10, "--seed", 5,
        "--snr", 1, "--bfactor", 100, "--sorted", "--occupancies", "3,4,5")  # fmt: skip
    publish(folder / "sim", folder / "Tomotwin-100")
    return folder / "Tomotwin-100"


def publish(sim: Path, out: Path) -> None:
    """Write a simulated set, sorted by state, in the layout of the benchmark."""
    images = out / "images" / "snr0.01"
    for path in (images, out / "vols" / "128_org", out / "init_mask"):
        path.mkdir(parents=True)
    labels = read_labels(sim / "labels.pkl")
    write_pickle(out / "gt_latents.pkl", labels)
    write_pickle(out / "combined_poses.pkl", read_poses(sim / "poses.pkl"))
    ctf = read_ctf(sim / "ctf.pkl")
    ctf[:, 0], ctf[:, 1] = ctf[:, 0] * 2, ctf[:, 1] / 2
    write_pickle(out / "combined_ctfs.pkl", ctf)
    listed, truth = [], find_truth(sim)
    with StackReader(sim / "particles.mrcs") as stack:
        for state, name in enumerate(sorted(NAMES, key=lambda one: int(one.split("_")[0]))):
            own = stack.read(np.flatnonzero(labels == state))
            listed.append(f"{state:03d}_particles_128.mrcs")
            with StackWriter(images / listed[-1], len(own), own.shape[-1], 1.0) as writer:
                writer.write(-own)
            write_map(out / "vols" / "128_org" / f"{name}.mrc", read_map(truth.volumes[state]).data, 1.0)
    (images / "sorted_particles.128.txt").write_text("\n".join(listed) + "\n")
    write_map(out / "init_mask" / "mask.mrc", read_map(truth.mask).data, 1.0)


def test_the_layout_is_found_from_anything_in_it(toy: Path) -> None:
    stacks = toy / "images" / "snr0.01" / "sorted_particles.128.txt"
    for place in (toy, toy / "images", stacks.parent, stacks):
        found = find_published(place)
        assert found.path == toy and found.mask.name == "mask.mrc"
        assert [path.stem for path in found.volumes] == ["0_core", "2_head", "10_tail"]
        assert found.stacks(place) == stacks
    assert find_published(toy.parent) is None and find_truth(toy.parent) is None
    particles = open_published(toy)
    assert len(particles) == 360 and particles.box_size == 32
    assert np.allclose(particles.pixel_size, 10)
    assert np.bincount(find_truth(toy).labels_of(particles.index)).tolist() == [90, 120, 150]


def test_runs_lead_to_the_truth_of_their_particles(toy: Path, tmp_path: Path) -> None:
    """A run of ours and one of cryoDRGN, each trained on the published files themselves."""
    stacks = str(toy / "images" / "snr0.01" / "sorted_particles.128.txt")
    for name, config in (("ours", {"particles": stacks}), ("theirs", {"dataset_args": {"particles": stacks}})):
        (tmp_path / name).mkdir()
        write_yaml(tmp_path / name / "config.yaml", config)
        assert find_truth(tmp_path / name).path == toy


def test_what_is_wrong_with_a_folder_is_said(toy: Path, tmp_path: Path) -> None:
    copy = tmp_path / "set"
    (copy / "vols" / "128_org").mkdir(parents=True)
    write_pickle(copy / "gt_latents.pkl", np.array([0, 1, 3]))
    with pytest.raises(InputError, match="true maps are expected in 128_org"):
        find_published(copy)
    write_map(copy / "vols" / "128_org" / "000.mrc", np.zeros((8, 8, 8), np.float32), 3.0)
    with pytest.raises(InputError, match="no sorted_particles.128.txt in it or below"):
        find_published(copy).stacks(copy)
    with pytest.raises(InputError, match="has a state 3, but there are 1 true maps"):
        find_truth(copy).labels_of(np.arange(3))
    for level in ("snr0.01", "snr0.1"):
        (copy / "images" / level).mkdir(parents=True)
        (copy / "images" / level / "sorted_particles.128.txt").write_text("a.mrcs\n")
    with pytest.raises(InputError, match="holds 2 lists of images"):
        open_published(copy)


def test_floor_and_ceiling_straight_from_the_layout(toy: Path, tmp_path: Path) -> None:
    """Poses, CTF, states and maps fit each other; of dark particles the signed score shows it, the other does not."""
    assert "consensus" in run("eval-fsc", toy, "--compat", "cryobench")
    run("eval-fsc", toy)
    run("preprocess", toy / "images" / "snr0.01" / "sorted_particles.128.txt", "--poses", toy / "combined_poses.pkl",
        "--ctf", toy / "combined_ctfs.pkl", "-o", tmp_path / "work")  # fmt: skip
    assert find_truth(tmp_path / "work").path == toy
    run("eval-fsc", tmp_path / "work")
    found = {}
    for entry in json.loads((toy / "oracle.json").read_text()).values():
        straight = "Tomotwin" in entry["settings"]["particles"]
        found[entry["settings"]["shells"], straight] = {
            name: np.mean(values["masked"]) for name, values in entry["scores"].items() if name != "states"
        }
    assert set(found) == {("cryobench", True), ("ours", True), ("ours", False)}
    white, dark = found["ours", False], found["ours", True]
    assert 0.45 < white["labels"] < 0.4688 and white["labels"] > white["consensus"] + 0.1
    assert dark["labels"] == pytest.approx(-white["labels"], abs=0.01)  # `preprocess` found the contrast
    assert found["cryobench", True]["labels"] == pytest.approx(white["labels"], abs=0.01)


@pytest.mark.slow
def test_the_tutorial_runs_on_a_toy_of_the_layout(toy: Path, tmp_path: Path) -> None:
    """The page's commands as they are written, in a folder where a toy lies under the name of Tomotwin-100."""
    (tmp_path / "Tomotwin-100").symlink_to(toy)
    run_page("cryobench.md", tmp_path)
    scores = json.loads((tmp_path / "hype" / "eval.20" / "scores.json").read_text())
    polished = json.loads((tmp_path / "hype" / "polish.20" / "scores" / "scores.json").read_text())
    assert scores["shells"] == "cryobench" and scores["sampler"] == "compat" and scores["n_states"] == 3
    assert scores["oracle"]["label_backprojection_masked"] > scores["oracle"]["consensus_masked"] + 0.02
    assert polished["per_image"]["auc_masked"] > scores["oracle"]["consensus_masked"]
