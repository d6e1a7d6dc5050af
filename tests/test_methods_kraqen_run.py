"""A run of CryoKRAQEN on disk: what is written, opened again, refused, and left alone."""

from __future__ import annotations

import sys
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import reconstruct_toy as toy

from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, UserNotice
from cryosuite.formats.mrc import read_map, write_map
from cryosuite.formats.pickles import safe_load, write_pickle
from cryosuite.methods import kraqen_run
from cryosuite.methods.kraqen_options import KraqenOptions, preset
from cryosuite.reconstruct.weights import ClassWeights
from cryosuite.training.options import TrainOptions
from cryosuite.training.runs import remove_run

D, N = 16, 24


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunDir:
    """A finished run of three codes, written by hand: code k is a map of the number k + 1."""
    folder = RunDir(tmp_path / "run")
    folder.path.mkdir()
    p = np.zeros((N, 3), np.float32)
    p[np.arange(N), np.arange(N) % 3] = 1
    p[0] = [0.75, 0.25, 0]
    weights = ClassWeights.from_dense(p)
    write_pickle(folder.shares(5), weights.to_arrays())
    write_pickle(folder.labels(5), weights.labels())
    z = np.eye(3, dtype=np.float32)[np.arange(N) % 3]
    z[0] = [0.6, 0.3, 0]
    write_pickle(folder.z(5), z)
    for k in range(3):
        write_map(folder.volume(k), np.full((D, D, D), k + 1, np.float32), toy.PIXEL)
    folder.occupancy(5).write_text("code\n")
    folder.config.write_text("method: kraqen\n")
    monkeypatch.setattr(kraqen_run, "open_for", lambda path, how: toy.particles(N, D))
    monkeypatch.setattr(kraqen_run, "particles_path", lambda config, run: Path("p.mrcs"))
    return folder


CONFIG = {"options": {"field": "voxel"}, "particles": "p.mrcs"}


def test_the_volume_of_a_particle_is_the_mix_of_its_codes_and_a_centre_is_sharp(run):
    loaded = kraqen_run.load(run, CONFIG, 5)
    values = loaded.decode(np.concatenate([loaded.z[:3], [[0.9, 0.1, 0.0]]]))[:, 0, 0, 0]
    np.testing.assert_allclose(values, [1.25, 2, 3, 1])
    assert loaded.z.shape == (N, 3) and loaded.box_size == D


def test_particles_without_latents_do_not_answer_for_others(run):
    z = safe_load(run.z(5))[0]
    z[3::3] = np.nan  # all of code 0 but the mixed one
    write_pickle(run.z(5), z)
    assert kraqen_run.load(run, CONFIG, 5).decode([[1.0, 0, 0]])[0, 0, 0, 0] == pytest.approx(1.25)


def test_maps_are_read_only_when_asked_for(run):
    run.volume(1).unlink()
    loaded = kraqen_run.load(run, CONFIG, 5)  # export and polish need no maps
    with pytest.raises((InputError, FileNotFoundError), match="vol_001"):
        loaded.decode(loaded.z[:1])


@pytest.mark.parametrize("what", ["z", "shares"])
def test_a_run_whose_particles_changed_is_refused(run, what):
    if what == "z":
        write_pickle(run.z(5), np.zeros((N - 1, 3), np.float32))
    else:
        write_pickle(run.shares(5), ClassWeights.from_labels(np.zeros(N - 1, int), 3).to_arrays())
    with pytest.raises(InputError, match=f"{N - 1} .*{N}|{N - 1} particles"):
        kraqen_run.load(run, CONFIG, 5)


def test_overwriting_leaves_nothing_of_the_run_and_everything_else(run):
    (run.path / "notes.txt").write_text("mine")
    write_map(run.path / "vol_mine.mrc", np.zeros((D, D, D), np.float32), 1.0)
    remove_run(run)
    assert sorted(path.name for path in run.path.iterdir()) == ["notes.txt", "vol_mine.mrc"]


def test_maps_beside_another_methods_run_are_somebodys_own(run):
    run.occupancy(5).unlink()
    remove_run(run)
    assert run.volume(0).exists() and not run.shares(5).exists()


def test_codes_of_a_network_are_averaged_by_use():
    codes = np.array([[1.0, 0], [3, 0], [0, 5], [9, 9]], np.float32)
    found = kraqen_run._grouped(codes, np.array([1, 1, 0, -1]), np.array([30.0, 10, 7, 0]))
    np.testing.assert_allclose(found, [[0, 5], [1.5, 0]])


def test_an_empty_half_set_gives_maps_without_a_resolution(tmp_path):
    particles = toy.particles(N, D, 0.3)
    particles.half = np.zeros(N, np.int8)
    folder = RunDir(tmp_path)
    rows = kraqen_run.write_maps(particles, ClassWeights.from_labels(np.arange(N) % 2), folder)
    assert [row.labelled for row in rows] == [N // 2, N // 2] and all(np.isnan(row.resolution) for row in rows)
    assert np.isfinite(read_map(folder.volume(1)).data).all()
    head, first = kraqen_run.occupancy_csv(rows).splitlines()[:2]
    assert head.startswith("code_from_0,") and first == f"0,{N / 2:.2f},{N // 2},0.50000,"


def test_maps_are_written_a_few_codes_at_a_time(tmp_path, monkeypatch):
    """Where the sums of all codes do not fit the memory: the same maps and table, and nothing waits on disk."""
    particles = toy.particles(N, D, 0.3)
    p = ClassWeights.from_dense(np.random.default_rng(0).dirichlet(np.ones(3), N).astype(np.float32))
    at_once, in_turn = (RunDir(tmp_path / name) for name in ("a", "b"))
    at_once.path.mkdir(), in_turn.path.mkdir()
    rows = kraqen_run.write_maps(particles, p, at_once)
    monkeypatch.setattr(kraqen_run, "class_groups", lambda count, box: [np.array([0, 1]), np.array([2])])
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: pytest.fail("a folder for sums"))
    again = kraqen_run.write_maps(particles, p, in_turn)
    np.testing.assert_allclose([astuple(row) for row in again], [astuple(row) for row in rows], rtol=1e-5)
    for k in range(3):
        np.testing.assert_allclose(read_map(in_turn.volume(k)).data, read_map(at_once.volume(k)).data, atol=1e-6)


def test_codes_without_images_have_empty_maps(tmp_path, monkeypatch):
    """Also where a whole group of codes has none."""
    particles, folder = toy.particles(N, D, 0.3), RunDir(tmp_path)
    p = ClassWeights.from_labels(np.where(np.arange(N) % 2, 4, 1), 6)
    monkeypatch.setattr(kraqen_run, "class_groups", lambda count, box: [np.array([k]) for k in range(count)])
    rows = kraqen_run.write_maps(particles, p, folder)
    assert [row.number for row in rows] == list(range(6)) and [row.labelled > 0 for row in rows] == [
        False, True, False, False, True, False,
    ]  # fmt: skip
    assert [bool(read_map(folder.volume(k)).data.any()) for k in range(6)] == [row.labelled > 0 for row in rows]
    with pytest.raises(InputError, match="no particle has a share in any code"):
        kraqen_run.write_maps(particles, ClassWeights.from_labels(np.full(N, -1), 2), folder)


def test_all_is_refused_before_a_folder_is_touched():
    training = TrainOptions()
    with pytest.raises(InputError, match="poses"):
        particles = toy.particles(N, D)
        particles.rotation = None
        kraqen_run.prepare(particles, KraqenOptions(), training)
    with pytest.raises(InputError, match="no image says anything"):
        particles = toy.particles(N, D)
        particles.noise = np.ones((1, D // 2 + 1), np.float32)
        particles.ctf[:, 1] = 0.01  # far beyond any aperture
        particles.ctf[:, 7] = 0
        particles.ctf[:, 2:4] = 0
        particles.ctf[:, 6] = 0
        kraqen_run.prepare(particles, KraqenOptions(n_codes=2), training)


def test_max_minutes_stops_a_voxel_run_that_goes_on_to_the_same_end(tmp_path):
    particles = toy.particles(60, D, 0.5)
    options = KraqenOptions(n_codes=2, iterations=3)
    whole = kraqen_run.train(particles, RunDir(tmp_path / "whole"), options, TrainOptions())
    run, early = RunDir(tmp_path / "parts"), TrainOptions(max_minutes=1e-6)
    first = kraqen_run.train(particles, run, options, early)
    assert (first.stopped, first.exit_code, first.epoch) == ("max_minutes", 0, 1) and not run.epochs()
    last = kraqen_run.train(particles, run, options, TrainOptions(), resume=True)
    assert not last.stopped and len(last.codes) == len(whole.codes)
    np.testing.assert_array_equal(safe_load(run.z(3))[0], safe_load(RunDir(tmp_path / "whole").z(3))[0])


def test_a_job_started_again_goes_on_by_itself(tmp_path, monkeypatch):
    particles, run = toy.particles(60, D, 0.5), RunDir(tmp_path)
    options = KraqenOptions(n_codes=2, iterations=3)
    kraqen_run.train(particles, run, options, TrainOptions(max_minutes=1e-6))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    kraqen_run.train(particles, run, options, TrainOptions())
    assert len(run.metrics.read_text().splitlines()) == 3  # not 1 + 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_codes": -1}, "--n-codes -1"), ({"iterations": 0}, "--iterations 0"), ({"prior": 0.0}, "--prior 0.0"),
        ({"prior": float("nan")}, "--prior nan"), ({"march_from": 1.5}, "--march 1.5"), ({"width": 0}, "--width 0"),
        ({"cluster_box": 33}, "--cluster-box 33"), ({"em_finish": -1}, "--em-finish -1"),
        ({"field": "fourier", "features": 0}, "--features 0"), ({"field": "triplane", "channels": 0}, "--channels 0"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_named_as_they_are_typed(changes, message):
    with pytest.raises(InputError, match=message):
        KraqenOptions(**changes)


def test_options_without_effect_are_told():
    voxel = KraqenOptions(n_codes=4, merge="none")
    assert voxel.without_effect(["kernel", "width", "iterations", "n_states"]) == {
        "kernel": "with --assign likelihood", "width": "with --field voxel", "n_states": "with --n-codes 4",
    }  # fmt: skip
    network = KraqenOptions(field="fourier")
    assert network.without_effect(["iterations", "margin", "levels", "width"]) == {
        "iterations": "with --field fourier", "margin": "with --beta 0", "levels": "with --field fourier",
    }  # fmt: skip
    em = KraqenOptions(field="fourier", blend="em", march_from=1.0)
    assert em.without_effect(["em_last", "march_over", "anneal", "blend"]) == {
        "em_last": "with --blend em", "march_over": "with --march 1", "anneal": "with --t-max 1",
    }  # fmt: skip
    assert not em.changed(t_max=8.0, blend="blended", march_from=0.5).without_effect(
        ["em_last", "march_over", "anneal"]
    )
    assert not KraqenOptions(field="triplane", assign="kernel", beta=0.1).without_effect(["kernel", "margin", "levels"])


def test_the_published_set_with_fourier_features_has_features():
    assert preset("paper", 64, field="fourier")[1].options.features == 64
    assert preset("paper", 64)[1].options.features == 0


def test_more_codes_than_images_is_said(tmp_path):
    with pytest.warns(UserNotice, match="3 codes are used"):
        found = kraqen_run.train(toy.particles(3, D, 0.3), RunDir(tmp_path), KraqenOptions(n_codes=9), TrainOptions())
    assert 1 <= len(found.codes) <= 3


def test_a_network_may_have_more_codes_than_there_are_images(tmp_path):
    """The finish in closed form takes them as they are; it is done where the network was trained."""
    options = KraqenOptions(field="fourier", n_codes=12, rank=2, features=4, width=8, layers=1, em_finish=1)
    training = TrainOptions(epochs=1, batch_size=4, lr=1e-3, precision="32", accelerator="cpu")
    found = kraqen_run.train(toy.particles(8, D, 0.3), RunDir(tmp_path), options, training)
    assert 1 <= len(found.codes) <= 12 and RunDir(tmp_path).volume(0).exists()
