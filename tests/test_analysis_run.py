"""A whole analysis with a decoder made up for the test: files, index law, scripts, volumes, bad days."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cryosuite.analysis.lists import write_lists
from cryosuite.analysis.report_read import read_analysis
from cryosuite.analysis.run import AnalyzeOptions, analyze
from cryosuite.analysis.volumes import VolumeOptions, flip_hand, low_pass, prepare, write_volumes
from cryosuite.data.open import open_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.data.workdir import AnalysisDir, VolumeDir
from cryosuite.errors import InputError, UserNotice
from cryosuite.formats.config import read_yaml, write_yaml
from cryosuite.formats.mrc import read_map
from cryosuite.formats.pickles import read_indices, read_labels, safe_load, write_pickle
from cryosuite.formats.star import read_star

D, PIXEL = 16, 3.0
RECORDS = [{"step": step, "epoch": 1 + step // 10, "loss": 2.0 - 0.05 * step} for step in range(30)]


def decode(z: np.ndarray) -> np.ndarray:
    """Balls whose radius grows with the first latent number: (k, zdim) -> (k, D, D, D)."""
    axis = np.arange(D) - D // 2
    square = axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2
    radius = 3.5 + np.tanh(z[:, 0] / 4)
    return (1 / (1 + np.exp(2 * (np.sqrt(square) - radius[:, None, None, None])))).astype(np.float32)


def latents(count: int = 90, zdim: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    z = 8.0 * np.eye(3, zdim)[labels] + 0.3 * rng.normal(size=(count, zdim))
    return z.astype(np.float32), labels


def particle_set(count: int) -> ParticleSet:
    index = np.arange(count, dtype=np.int64)[::-1] * 2 + 5
    return ParticleSet.from_array(np.zeros((count, D, D), np.float32), PIXEL, index=index.copy())


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Small pictures, and components in place of UMAP, whose compiler takes longer than all else here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cryosuite.analysis.run.PREVIEW", 48)
        patch.setattr("cryosuite.analysis.latents.umap", lambda z, seed: np.ascontiguousarray(z[:, :2]))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """One analysis that several tests look at."""
    z, truth = latents()
    z[7] = np.nan
    out = AnalysisDir(tmp_path_factory.mktemp("an alysis") / "analyze.3")
    options = AnalyzeOptions(ksample=3, per_component=4, skip_umap=False)
    result = analyze(z, decode, out, PIXEL, D, options, particles=particle_set(len(z)), epoch=3, records=RECORDS)
    return result, z, truth


def test_files_have_the_names_cryodrgn_users_expect(finished) -> None:
    out = finished[0].out.path
    names = """z_pca.png z_pca_hexbin.png z_pca_marginals.png umap.pkl umap.png umap_hexbin.png umap_marginals.png
        learning_curve_epoch3.png kmeans3/labels.pkl kmeans3/centers.txt kmeans3/centers_ind.txt kmeans3/z_values.txt
        kmeans3/vol_000.mrc kmeans3/vol_002.mrc kmeans3/vol_002.png kmeans3/volumes.png pc1/z_values.txt pc1/vol_000.mrc
        pc1/vol_003.mrc pc1/umap.png pc1/umap_traversal.png pc1/pca_traversal.png pc2/vol_003.mrc view.cxc pc1/view.cxc
        pc1/morph.cxc labels.pkl overview.png z_pca.csv umap.csv learning_curve_epoch3.csv kmeans3/volumes.csv
        pc1/pca_traversal.csv"""
    for name in re.split(r"\s+", names):
        assert (out / name).is_file(), name
    assert not list(out.rglob("*.tmp*")) and not (out / "kmeans3" / "vol_003.mrc").exists()


def test_labels_count_from_0_and_rows_left_out_are_minus_1(finished) -> None:
    result, z, truth = finished
    labels = read_labels(result.out.labels, unlabelled=True)
    assert labels.shape == (len(z),) and labels[7] == -1
    assert set(labels) == {-1, 0, 1, 2}
    assert np.isnan(safe_load(result.out.umap)[0][7]).all()
    for label in range(3):
        assert len(set(truth[labels == label])) == 1, "the three groups are found"
    rows = np.loadtxt(result.folder.centers_index).astype(int)
    np.testing.assert_array_equal(labels[rows], [0, 1, 2])
    np.testing.assert_allclose(np.loadtxt(result.folder.centers), z[rows], rtol=1e-6)


def test_lists_point_into_the_original_stack(finished) -> None:
    result, z, _ = finished
    index = particle_set(len(z)).index
    together = []
    for label in range(3):
        chosen = read_indices(result.out.cluster_indices(label))
        np.testing.assert_array_equal(chosen, index[result.labels == label])
        together += list(chosen)
    assert sorted(together) == sorted(np.delete(index, 7))
    table = pd.read_csv(result.out.plot("umap").with_suffix(".csv"))
    np.testing.assert_array_equal(table["original_index_from_0"], index[table["row_from_0"]])


def test_star_files_of_clusters_open_with_the_same_images(golden: Path, tmp_path: Path) -> None:
    """Rows, columns and tables are carried, and the images are found from the new place."""
    particles = open_particles(golden / "relion" / "particles.star")
    labels = np.arange(len(particles)) % 3
    labels[5] = -1
    write_lists(AnalysisDir(tmp_path), particles, labels, 3)
    before = read_star(golden / "relion" / "particles.star")
    chosen = np.flatnonzero(labels == 2)
    star = AnalysisDir(tmp_path).cluster_star(2)
    after = read_star(star)
    assert list(after) == list(before) and len(after["particles"]) == len(chosen)
    pd.testing.assert_frame_equal(after["optics"], before["optics"])
    expected = before["particles"].iloc[chosen].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        after["particles"].drop(columns="rlnImageName"), expected.drop(columns="rlnImageName"), check_dtype=False
    )
    again = open_particles(star)
    np.testing.assert_array_equal(again.read(np.arange(3)), particles.read(chosen[:3]))
    np.testing.assert_allclose(again.rotation, particles.rotation[chosen], atol=1e-6)


def test_each_volume_is_that_of_its_label(finished) -> None:
    result, z, _ = finished
    for label, file in enumerate(result.files):
        assert file.path.name == f"vol_{label:03d}.mrc"
        written = read_map(file.path)
        assert written.pixel_size == pytest.approx(PIXEL)
        row = result.rows[result.clusters.centers_index[label]]
        np.testing.assert_allclose(written.data, decode(z[row : row + 1])[0], atol=1e-6)


def test_walk_goes_up_its_component(finished) -> None:
    result = finished[0]
    along = np.loadtxt(result.walks[0].z_values)
    score = (along - result.pca.mean) @ result.pca.components[0]
    assert (np.diff(score) > 0).all() and len(result.walks[0].volumes()) == 4
    levels = set(re.findall(r"level (\S+) color", result.walks[0].chimerax.read_text()))
    assert len(levels) == 1, "one level along a path"


def test_colours_of_the_script_are_those_of_the_map(finished) -> None:
    result = finished[0]
    script = result.out.chimerax.read_text()
    table = pd.read_csv(result.out.plot("umap").with_suffix(".csv"))
    of_map = dict(zip(table["cluster_from_0"], table["colour"], strict=True))
    of_script = {
        int(model) - 1: colour for model, colour in re.findall(r"volume #(\d+) .*color (#[0-9a-f]{6})", script)
    }
    assert of_script == of_map
    assert read_yaml(result.out.summary)["kmeans"]["colours"] == [of_map[label] for label in range(3)]


NUMBER = r"-?\d+(\.\d+)?(e-?\d+)?"
MODELS = r"#\d+(-\d+)?"
# after the pages of the ChimeraX user guide on these commands (version 1.6)
GRAMMAR = {
    "set": [r"bgColor white"],
    "camera": [r"ortho"],
    "lighting": [r"soft"],
    "graphics": [r"silhouettes true"],
    "open": [r'([\w./-]+|"[\w ./#-]+")(?<=\.mrc|mrc") id \d+ name "[^"]+"'],
    "volume": [
        rf"#\d+ style surface step 1 level {NUMBER} color #[0-9a-f]{{6}}",
        rf"morph #1-\d+ frames \d+ playStep {NUMBER} interpolateColors true",
    ],
    "surface": [rf"dust {MODELS} size {NUMBER}"],
    "view": [r"", r"orient"],
    "turn": [rf"[xyz] {NUMBER}"],
    "tile": [rf"{MODELS} columns \d+ spacingFactor [\d.]+"],
    "hide": [rf"{MODELS} models"],
    "mseries": [rf"slider {MODELS}"],
}


def check_script(script: Path) -> dict[int, str]:
    """Every line is a known command, every file is there by a relative path; returns the colour of each model."""
    opened, colours = set(), {}
    for line in script.read_text().splitlines():
        if line.startswith("#"):
            continue
        command, _, rest = line.partition(" ")
        assert any(re.fullmatch(form, rest) for form in GRAMMAR[command]), line
        if command == "open":
            words = shlex.split(rest)
            assert not Path(words[0]).is_absolute() and (script.parent / words[0]).is_file()
            opened.add(int(words[2]))
        elif command == "volume" and not rest.startswith("morph"):
            model, colour = re.match(r"#(\d+) .*color (#[0-9a-f]{6})", rest).groups()
            colours[int(model)] = colour
        for first, last in re.findall(r"#(\d+)(?:-(\d+))?(?= |$)", rest.partition(" color ")[0]):
            assert set(range(int(first), int(last or first) + 1)) <= opened, line
    assert opened == set(colours) == set(range(1, len(opened) + 1))
    return colours


@pytest.mark.parametrize("name", ["view.cxc", "clusters.cxc", "pc1/view.cxc", "pc1/morph.cxc"])
def test_scripts_hold_known_commands_and_relative_paths(finished, name: str) -> None:
    colours = check_script(finished[0].out.path / name)
    if "/" not in name:
        assert list(colours.values()) == finished[0].colours


def test_options_of_volumes() -> None:
    rng = np.random.default_rng(0)
    volume = rng.normal(size=(1, D, D, D)).astype(np.float32)
    flipped = flip_hand(volume)
    np.testing.assert_array_equal(flipped[0, D // 2], volume[0, D // 2])
    np.testing.assert_array_equal(flipped[0, D // 2 + 3], volume[0, D // 2 - 3])
    np.testing.assert_array_equal(flip_hand(flipped), volume)
    inverted, _ = prepare(volume, PIXEL, VolumeOptions(invert=True))
    np.testing.assert_array_equal(inverted, -volume)
    small, size = prepare(decode(np.zeros((1, 2))), PIXEL, VolumeOptions(downsample=8))
    assert small.shape == (1, 8, 8, 8) and size == pytest.approx(2 * PIXEL)
    assert small.mean() == pytest.approx(decode(np.zeros((1, 2))).mean(), rel=1e-4)
    assert prepare(volume, PIXEL, VolumeOptions(pixel_size=1.5, downsample=8))[1] == pytest.approx(3.0)


def test_low_pass_keeps_slow_waves_and_removes_fast_ones() -> None:
    x = np.arange(D)
    slow, fast = np.cos(2 * np.pi * 2 * x / D), np.cos(2 * np.pi * 6 * x / D)  # 24 A and 8 A at 3 A per voxel
    volume = np.broadcast_to(slow + fast, (D, D, D)).astype(np.float32)
    np.testing.assert_allclose(low_pass(volume, PIXEL, 15.0)[0, 0], slow, atol=1e-5)


def test_batches_and_first_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of two volumes give the same files as one batch; numbers begin where asked."""
    monkeypatch.setattr("cryosuite.analysis.volumes.BATCH_VOXELS", 2 * D**3)
    asked = []

    def counting(z: np.ndarray) -> np.ndarray:
        asked.append(len(z))
        return decode(z)

    z = np.linspace(-4, 4, 5)[:, None]
    options = VolumeOptions(start_index=1)
    files = write_volumes(z, counting, VolumeDir(tmp_path), PIXEL, options, ["#000000"] * 5, D)
    assert asked == [2, 2, 1]
    assert [file.path.name for file in files] == [f"vol_{i:03d}.mrc" for i in range(1, 6)]
    np.testing.assert_allclose(read_map(files[4].path).data, decode(z[4:])[0], atol=1e-6)


@pytest.mark.parametrize(
    ("z", "clusters"),
    [(np.ones((1, 3)), 1), (np.ones((30, 3)), 1), (np.arange(12.0).reshape(4, 3), 4), (np.arange(8.0)[:, None], 8)],
    ids=["one particle", "all equal", "fewer than clusters", "one number each"],
)
@pytest.mark.filterwarnings("ignore::cryosuite.errors.UserNotice")
def test_bad_days_end_with_volumes(tmp_path: Path, z: np.ndarray, clusters: int) -> None:
    options = AnalyzeOptions(components=1, per_component=2, skip_umap=True)
    result = analyze(z.astype(np.float32), decode, AnalysisDir(tmp_path / "a"), PIXEL, D, options)
    assert len(result.files) == clusters == result.clusters.count
    assert result.out.chimerax.is_file() and result.out.plot("overview").is_file()
    if z.shape[1] == 1:
        assert result.out.plot("z").is_file() and result.out.plot("z_hist").is_file()


def test_same_seed_same_files(tmp_path: Path) -> None:
    z, _ = latents(40)
    options = AnalyzeOptions(ksample=3, skip_umap=True, skip_volumes=True)
    for name in ("a", "b"):
        analyze(z, None, AnalysisDir(tmp_path / name), PIXEL, D, options)
    for file in ("labels.pkl", "z_pca.csv", "z_pca.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_options_that_cannot_be_met_are_named_before_any_work(tmp_path: Path) -> None:
    z, _ = latents(20)
    for options, word in (
        (AnalyzeOptions(volumes=VolumeOptions(downsample=18)), "-d 18"),
        (AnalyzeOptions(volumes=VolumeOptions(low_pass=-2)), "--low-pass"),
        (AnalyzeOptions(per_component=-1), "--n-per-pc"),
        (AnalyzeOptions(ksample=0), "--ksample"),
    ):
        with pytest.raises(InputError, match=word):
            analyze(z, decode, AnalysisDir(tmp_path / "a"), PIXEL, D, options)
    with pytest.raises(InputError, match="20 latents.*19 particles"):
        analyze(z, decode, AnalysisDir(tmp_path / "a"), PIXEL, D, particles=particle_set(19))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="-o"):
        analyze(z, decode, AnalysisDir(tmp_path / "file" / "a"), PIXEL, D)


def test_notice_names_the_row_left_out(tmp_path: Path) -> None:
    z, _ = latents(30)
    z[4, 1] = np.inf
    with pytest.warns(UserNotice, match="rows 4"):
        analyze(z, None, AnalysisDir(tmp_path), PIXEL, D, AnalyzeOptions(ksample=3, skip_umap=True))
    assert read_yaml(tmp_path / "analyze.yaml")["left_out"] == [4]


def test_the_umap_of_other_latents_does_not_stay(tmp_path: Path) -> None:
    """A folder used again for another epoch with --skip-umap; that of the same latents is kept, it took long."""
    z, _ = latents(30)
    out, options = AnalysisDir(tmp_path), AnalyzeOptions(ksample=3, skip_umap=True)
    analyze(z, None, out, PIXEL, D, options)
    write_pickle(out.umap, np.zeros((30, 2), np.float32))
    analyze(z, None, out, PIXEL, D, options)
    assert out.umap.is_file()
    analyze(2 * z, None, out, PIXEL, D, options)
    assert not out.umap.exists()


def test_volumes_of_other_latents_or_clusters_do_not_stay(tmp_path: Path) -> None:
    """A folder used again with --skip-vol; what still belongs to the same latents and clusters is kept."""
    z, _ = latents(30)
    out = AnalysisDir(tmp_path)
    few = AnalyzeOptions(ksample=3, components=2, per_component=2, skip_umap=True)
    none, others = replace(few, skip_volumes=True), replace(few, skip_volumes=True, ksample=2)
    analyze(z, decode, out, PIXEL, D, few)
    shown = (out.chimerax, out.chimerax_overlay, out.plot("overview"))
    (out.pc(2).path / "mine.txt").touch()
    analyze(z, decode, out, PIXEL, D, none)
    assert all(path.is_file() for path in shown) and len(out.pc(1).volumes()) == 2
    analyze(z, decode, out, PIXEL, D, others)
    assert not any(path.exists() for path in shown) and len(out.pc(1).volumes()) == 2
    analyze(2 * z, decode, out, PIXEL, D, none)
    assert not out.pc(1).path.exists() and [path.name for path in out.pc(2).path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("bent", [{"volumes": "x", "kmeans": [1]}, {"kmeans": {"levels": 3, "folder": "kmeans3"}}])
def test_a_bent_summary_of_an_earlier_analysis_counts_as_none(tmp_path: Path, bent: dict) -> None:
    z, _ = latents(30)
    out = AnalysisDir(tmp_path)
    few = AnalyzeOptions(ksample=3, components=1, per_component=2, skip_umap=True)
    analyze(z, decode, out, PIXEL, D, few)
    write_yaml(out.summary, read_yaml(out.summary) | bent)
    analyze(z, decode, out, PIXEL, D, replace(few, skip_volumes=True))
    assert read_yaml(out.summary)["kmeans"]["levels"] == []


def test_volumes_that_stay_are_told_with_the_options_they_were_made_with(tmp_path: Path) -> None:
    z, _ = latents(30)
    out = AnalysisDir(tmp_path)
    flipped = AnalyzeOptions(ksample=3, components=2, per_component=2, skip_umap=True,
                             volumes=VolumeOptions(pixel_size=2.5, flip=True, start_index=1))  # fmt: skip
    analyze(z, decode, out, PIXEL, D, flipped)
    before = read_yaml(out.summary)
    analyze(z, decode, out, PIXEL, D, replace(flipped, skip_volumes=True, volumes=VolumeOptions()))
    after = read_yaml(out.summary)
    for name in ("volumes", "pixel_size"):
        assert after[name] == before[name]
    assert after["kmeans"]["levels"] == before["kmeans"]["levels"] and len(out.pc(2).volumes()) == 2
    with pytest.warns(UserNotice, match="made with other options and stay"):
        analyze(z, decode, out, PIXEL, D, replace(flipped, skip_volumes=True, volumes=VolumeOptions(invert=True)))
    assert read_yaml(out.summary)["volumes"] == before["volumes"]
    analyze(z, decode, out, PIXEL, D, replace(flipped, components=1))
    assert len(out.pc(2).volumes()) == 2, "the same latents and options: nothing has changed for it"
    analyze(z, decode, out, PIXEL, D, replace(flipped, components=1, volumes=VolumeOptions()))
    assert len(out.pc(1).volumes()) == 2 and not out.pc(2).path.exists()
    assert read_yaml(out.summary)["volumes"]["flip"] is False


def test_fewer_clusters_and_volumes_leave_no_files_of_earlier_ones(tmp_path):
    z, _ = latents()
    for clusters, steps in ((5, 4), (3, 2)):
        options = AnalyzeOptions(ksample=clusters, gmm=2, components=1, per_component=steps, skip_umap=True)
        analyze(z, decode, AnalysisDir(tmp_path), PIXEL, D, options, particles=particle_set(len(z)))
    out = AnalysisDir(tmp_path)
    assert len(list(out.cluster_indices(0).parent.glob("cluster_*.ind.pkl"))) == 3
    assert len(list(out.pc(1).path.glob("vol_*.mrc"))) == 2
    assert not list(out.pc(1).path.glob("vol_003*"))


def test_an_analysis_that_did_not_end_is_not_taken_for_the_earlier_one(tmp_path: Path) -> None:
    """Labels are new, analyze.yaml and the volumes are not: neither a page nor a table may mix them."""
    z, _ = latents(30)
    out, options = AnalysisDir(tmp_path), AnalyzeOptions(ksample=3, components=0, skip_umap=True)
    analyze(z, decode, out, PIXEL, D, options)
    assert read_analysis(out, z).first_volume == 0
    pages = (out.report, out.particles, out.confounds)
    for page in pages:
        page.touch()
    with pytest.raises(ZeroDivisionError):
        analyze(z, lambda z: 1 // 0, out, PIXEL, D, replace(options, ksample=5))
    assert not any(page.exists() for page in pages)
    with pytest.raises(InputError, match="labels.pkl: not the clusters.*run analyze again"):
        read_analysis(out, z)


def test_a_mixture_of_no_groups_is_refused_before_anything_is_done(tmp_path):
    with pytest.raises(InputError, match="--gmm 0"):
        analyze(latents()[0], decode, AnalysisDir(tmp_path / "a"), PIXEL, D, AnalyzeOptions(gmm=0))
    assert not (tmp_path / "a").exists()


def test_other_clusterings_take_the_place_of_k_means(tmp_path):
    z, truth = latents()
    out = AnalysisDir(tmp_path)
    options = AnalyzeOptions(cluster="gmm-direct", k="auto", components=0, skip_umap=True)
    result = analyze(z, decode, out, PIXEL, D, options)
    labels = read_labels(out.labels)
    assert result.clusters.count == 3
    assert all(len(np.unique(labels[truth == group])) == 1 for group in range(3))
    folder = out.clusters("gmm-direct", 3)
    assert len(folder.volumes()) == 3 and folder.plot("bic").is_file()
    assert read_yaml(out.summary)["clustering"] == "gmm-direct"
