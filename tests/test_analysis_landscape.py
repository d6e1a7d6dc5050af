"""Landscapes: known states and densities are found, numbers mean what they say, bad days end well."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score

from cryosuite.analysis import landscape as space
from cryosuite.analysis.landscape_files import LandscapeOptions, make_landscape
from cryosuite.analysis.volumes import VolumeOptions
from cryosuite.data.particles import ParticleSet
from cryosuite.data.workdir import AnalysisDir
from cryosuite.errors import InputError, UserNotice
from cryosuite.formats.config import read_yaml
from cryosuite.formats.mrc import read_map, write_map
from cryosuite.formats.pickles import read_indices, read_labels, safe_load

D, PIXEL = 16, 3.0


def spot(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Maps (k, D, D, D): a body, and a small ball at (x, y) voxels from the centre."""
    axis = np.arange(D) - D // 2.0
    zz, yy, xx = np.meshgrid(axis, axis, axis, indexing="ij")
    body = np.exp(-(zz**2 + yy**2 + xx**2) / 8)
    x, y = (np.asarray(v, np.float64)[:, None, None, None] for v in (x, y))
    return (body + np.exp(-((zz - 3) ** 2 + (yy - y) ** 2 + (xx - x) ** 2) / 3)).astype(np.float32)


def decode(z: np.ndarray) -> np.ndarray:
    """The ball's place depends on the first latent number only, and saturates: far latents, equal maps."""
    return spot(4 * np.tanh(z[:, 0]), np.zeros(len(z)))


def three_groups(each: tuple[int, ...] = (100, 200, 300), zdim: int = 3, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Latents in groups at -2, 0 and 2 of the first number, their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(each)), each))
    z = rng.normal(size=(len(labels), zdim)) * 0.15
    z[:, 0] += 2.0 * (labels - 1)
    return z.astype(np.float32), labels


def test_sketch_stands_for_all() -> None:
    z, labels = three_groups()
    found = space.sketch(z, 30)
    assert found.counts.sum() == len(z) and 25 <= len(found.rows) <= 30
    assert np.array_equal(np.bincount(found.cell), found.counts)
    assert (labels[found.rows][found.cell] == labels).all(), "a particle's centre is of its own group"
    few = space.sketch(np.repeat(np.eye(3, dtype=np.float32), 9, axis=0), 30)
    assert len(few.rows) == 3 and list(few.counts) == [9, 9, 9]


def test_components_of_weighted_maps_are_those_of_repeated_ones() -> None:
    rng = np.random.default_rng(0)
    maps, counts = rng.normal(size=(12, 50)).astype(np.float32), rng.integers(1, 6, 12)
    found = space.volume_pca(maps, counts, 4)
    repeated = np.repeat(maps, counts, axis=0).astype(np.float64)
    centred = repeated - repeated.mean(axis=0)
    values = np.linalg.svd(centred, compute_uv=False) ** 2
    np.testing.assert_allclose(found.ratio, values[:4] / values.sum(), rtol=1e-4)
    np.testing.assert_allclose(found.components @ found.components.T, np.eye(4), atol=1e-4)
    np.testing.assert_allclose(found.mean, repeated.mean(axis=0), atol=1e-5)
    full = space.volume_pca(maps, counts, 50)
    np.testing.assert_allclose(full.mean + full.scores @ full.components, maps, atol=1e-3)


def test_particles_are_placed_where_their_maps_are() -> None:
    """Maps made of a smooth function of the latents: interpolated coordinates are those of the particles' own maps."""
    rng = np.random.default_rng(1)
    z = rng.uniform(-1, 1, size=(800, 2)).astype(np.float32)
    truth = np.stack([np.sin(2 * z[:, 0]), z[:, 1] * z[:, 0]], axis=-1)
    found = space.sketch(z, 120)
    placed, told = space.place_particles(z, found, truth[found.rows].astype(np.float32))
    np.testing.assert_allclose(placed[found.rows], truth[found.rows], atol=1e-3)
    assert np.abs(placed - truth).mean() < 0.03 and told > 0.97
    noise = rng.normal(size=(len(found.rows), 2)).astype(np.float32)
    assert space.place_particles(z, found, noise)[1] < 0.2, "what does not follow the latents is not told"


@pytest.mark.parametrize("linkage", space.LINKAGES)
def test_states_are_found_and_numbered_along_their_likeness(linkage: str) -> None:
    rng = np.random.default_rng(2)
    truth = rng.permutation(np.repeat(np.arange(4), 15))
    scores = (np.stack([truth * 10.0, 0 * truth], axis=-1) + rng.normal(size=(60, 2))).astype(np.float32)
    chosen = space.Sketch(np.arange(60), rng.integers(1, 9, 60), np.arange(60))
    labels = space.states(scores, chosen, 4, linkage)
    assert adjusted_rand_score(truth, labels) == 1.0
    means = [scores[labels == k, 0].mean() for k in range(4)]
    assert means == sorted(means) or means == sorted(means, reverse=True)
    middle = space.medoids(scores, labels, chosen.counts)
    np.testing.assert_array_equal(labels[middle], np.arange(4))
    with pytest.raises(InputError, match="ward, average, complete"):
        space.states(scores, chosen, 4, "single")


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Sets drawn with known shares: about 95 % of the intervals hold the expected count."""
    rng, share, held = np.random.default_rng(3), np.array([0.1, 0.3, 0.6]), 0
    for seed in range(60):
        labels = rng.choice(3, 500, p=share)
        interval = space.count_intervals(labels, 3, seed=seed)
        held += ((interval[:, 0] <= 500 * share) & (500 * share <= interval[:, 1])).sum()
    assert 0.90 < held / 180 < 0.99


def test_micrographs_that_resemble_themselves_widen_the_intervals() -> None:
    rng = np.random.default_rng(4)
    of_micrograph = rng.integers(0, 2, 40)
    blocks = np.repeat(np.arange(40), 25)
    labels = of_micrograph[blocks]  # all particles of a micrograph have one state
    alone = np.diff(space.count_intervals(labels, 2)).ravel()
    together = np.diff(space.count_intervals(labels, 2, blocks)).ravel()
    np.testing.assert_allclose(together / alone, 5.0, rtol=0.15)  # square root of 25 particles


def test_energy_is_minus_the_logarithm_of_the_density() -> None:
    """Two round groups of one width, one with e^2 times the particles: 2 kT apart; a Gaussian rises by 1/2 r^2."""
    rng = np.random.default_rng(5)
    big, small = rng.normal(size=(40_000, 2)), rng.normal(size=(round(40_000 / np.e**2), 2)) + [9, 0]
    found = space.landscape(np.concatenate([big, small]))
    low, high, side = found.at(np.array([[0, 0], [9, 0], [0, 2.0]]))
    assert low < 0.15 and high - low == pytest.approx(2.0, abs=0.25)
    assert side - low == pytest.approx(2.0, abs=0.3)
    assert np.isnan(found.at(np.array([[4.5, 3.8], [99, 0]]))).all(), "no particles, no number"


def test_landscape_of_few_and_of_equal_points() -> None:
    for xy in (np.zeros((5, 2)), np.array([[0, 0], [1, 1.0]]), np.array([[0.0, 0]])):
        found = space.landscape(xy)
        assert found.energy.shape == (space.GRID, space.GRID) and np.isfinite(found.energy).any()


def test_mean_and_spread_of_a_state() -> None:
    rng = np.random.default_rng(6)
    maps, labels = rng.normal(size=(6, 4, 4, 4)).astype(np.float32), np.array([0, 1, 0, 1, 1, 0])
    counts = np.array([3, 1, 2, 5, 1, 4])
    mean, spread = space.state_maps(maps, labels, counts)
    repeated = np.repeat(maps[labels == 0], counts[labels == 0], axis=0)
    np.testing.assert_allclose(mean[0], repeated.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(spread[0], repeated.std(axis=0), atol=1e-5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """One landscape that several tests look at; row 7 is NaN."""
    z, truth = three_groups()
    z[7] = np.nan
    index = np.arange(len(z), dtype=np.int64) * 2 + 5
    particles = ParticleSet.from_array(np.zeros((len(z), D, D), np.float32), PIXEL, index=index)
    out = AnalysisDir(tmp_path_factory.mktemp("run") / "analyze.3").landscape
    umap = np.nan_to_num(z[:, :2])
    options = LandscapeOptions(count=40, states=3, volumes=VolumeOptions())
    found = make_landscape(out, z, decode, PIXEL, D, options, particles=particles, umap=umap, pixels=40)
    return out, found, truth, particles


def test_every_particle_has_its_state(finished) -> None:
    out, found, truth, particles = finished
    labels = read_labels(out.labels, unlabelled=True)
    assert labels[7] == -1 and set(labels) == {-1, 0, 1, 2}
    assert adjusted_rand_score(truth[labels >= 0], labels[labels >= 0]) == 1.0
    lists = [read_indices(AnalysisDir(out.path).cluster_indices(k)) for k in range(3)]
    np.testing.assert_array_equal(lists[1], particles.index[labels == 1])
    coordinates = safe_load(out.coordinates)[0]
    assert len(coordinates) == len(labels) and np.isnan(coordinates[7]).all()


def test_tables_and_maps_of_states(finished) -> None:
    out, found, truth, _ = finished
    table = pd.read_csv(out.table)
    labels = read_labels(out.labels, unlabelled=True)
    np.testing.assert_array_equal(table["particles"], np.bincount(labels[labels >= 0]))
    assert ((table["particles_low_95"] < table["particles"]) & (table["particles"] < table["particles_high_95"])).all()
    np.testing.assert_allclose(table["minus_ln_share_kT"], -np.log(table["share"]), rtol=1e-4)
    assert list(table["colour"]) == found.colours
    for k, row in enumerate(table["row_from_0"]):
        assert labels[row] == k
        assert read_map(out.states.volume(k)).data.shape == (D, D, D)
        place = np.sign(truth[row] - 1)
        mean, spread = read_map(out.mean(k)), read_map(out.spread(k))
        assert mean.pixel_size == pytest.approx(PIXEL)
        ball = mean.data[D // 2 + 3].max(axis=0)
        assert np.sign(ball.argmax() - D // 2) == place, "the ball lies where this state has it"
        assert spread.data.max() < 0.5 * mean.data.max() and spread.data.min() >= 0


def test_files_plots_and_scripts(finished) -> None:
    out, found, _, _ = finished
    names = """states.png states.csv sketch.csv components.csv volume_pca.png volume_pca.csv landscape_volume_pca.png
        landscape_volume_pca.csv umap.png landscape_umap.png landscape_umap.csv volumes.png view.cxc clusters.cxc
        mask.mrc mean.mrc component1/vol_006.mrc component1/trajectory.cxc vol_002.png landscape.yaml"""
    assert [name for name in names.split() if not (out.path / name).is_file()] == []
    assert not out.scratch.exists()
    summary = read_yaml(out.summary)
    assert summary["states"] == 3 and sum(summary["variance"][:2]) > 0.9, "three places span a plane"
    for colour in found.colours:
        assert colour in out.chimerax.read_text() and colour in out.overlay.read_text()
    walk = [read_map(out.walk(1).volume(i)).data[D // 2 + 3].max(axis=0).argmax() for i in (0, 6)]
    assert abs(walk[1] - walk[0]) >= 3, "the first volume component moves the ball"


def test_a_mask_says_where_volumes_are_compared(tmp_path: Path) -> None:
    """Two things change; under a mask around one of them the other one makes no states."""

    def both(z: np.ndarray) -> np.ndarray:
        return spot(4 * np.tanh(z[:, 0]), np.zeros(len(z))) + spot(0 * z[:, 0], z[:, 1])[:, ::-1]

    rng = np.random.default_rng(0)
    z = rng.choice([-2.0, 2.0], size=(200, 2)).astype(np.float32)
    z += 0.05 * rng.normal(size=z.shape).astype(np.float32)
    mask = np.zeros((D, D, D), np.float32)
    mask[D // 2 + 1 :] = 1
    write_map(tmp_path / "mask.mrc", mask, PIXEL)
    options = LandscapeOptions(count=24, states=2, mask=tmp_path / "mask.mrc")
    out = AnalysisDir(tmp_path / "a").landscape
    make_landscape(out, z, both, PIXEL, D, options, pixels=24)
    labels = read_labels(out.labels)
    assert abs(adjusted_rand_score(z[:, 0] > 0, labels)) == pytest.approx(1.0)
    write_map(tmp_path / "mask.mrc", mask[8:, :8, :8], PIXEL)
    with pytest.raises(InputError, match="mask of .*expected a box of 16"):
        make_landscape(out, z, both, PIXEL, D, options)


@pytest.mark.parametrize(
    ("z", "words"),
    [(np.ones((1, 3)), "all latents are equal"), (np.ones((30, 3)), "all latents are equal"),
     (np.full((3, 2), np.nan), "none of the 3"), (np.arange(20.0)[:, None] + 40, "all volumes are the same")],
    ids=["one particle", "all equal", "no numbers", "equal volumes"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::cryosuite.errors.UserNotice")
def test_nothing_to_compare_is_said(tmp_path: Path, z: np.ndarray, words: str) -> None:
    out = AnalysisDir(tmp_path / "a").landscape
    with pytest.raises(InputError, match=words):
        make_landscape(out, z.astype(np.float32), decode, PIXEL, D, LandscapeOptions(count=5))
    with pytest.raises(InputError, match="makes no volumes"):
        make_landscape(out, z.astype(np.float32), None, PIXEL, D, LandscapeOptions(count=5))


def test_an_earlier_landscape_leaves_nothing(tmp_path: Path) -> None:
    z, _ = three_groups((20, 20, 20))
    out, options = AnalysisDir(tmp_path / "a").landscape, LandscapeOptions(count=12, states=2)
    particles = ParticleSet.from_array(np.zeros((60, D, D), np.float32), PIXEL)
    make_landscape(out, z, decode, PIXEL, D, options, umap=z[:, :2], particles=particles, pixels=24)
    assert out.plot("landscape_umap").is_file() and out.walk(2).volumes()
    line = np.linspace(-1, 1, 60, dtype=np.float32)[:, None]
    make_landscape(out, line, decode, PIXEL, D, replace(options, components=1), pixels=24)
    assert not list(out.path.glob("*umap*")) and not out.walk(2).path.exists() and out.walk(1).volumes()
    assert not list(out.path.glob("clusters/*")) and not out.plot("volume_pca").exists() and out.summary.is_file()


def test_two_particles_of_one_number_have_two_states(tmp_path: Path) -> None:
    out = AnalysisDir(tmp_path / "a").landscape
    with pytest.warns(UserNotice, match="2 states at most"):
        found = make_landscape(
            out, np.array([[-1.0], [1.0]], np.float32), decode, PIXEL, D, LandscapeOptions(), pixels=24
        )
    assert list(found.sizes) == [1, 1] and sorted(read_labels(out.labels)) == [0, 1]
