"""``cryosuite eval-fsc``: two maps, half maps, a run against its truth."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import cryosuite.methods
from cryosuite.cli import app
from cryosuite.commands import eval_run
from cryosuite.data.results import run_polish
from cryosuite.data.truth import find_truth
from cryosuite.errors import InputError, UserNotice
from cryosuite.formats.config import write_yaml
from cryosuite.formats.mrc import read_map, write_map
from cryosuite.formats.pickles import safe_load, write_pickle

RUNNER = CliRunner()


def run(*arguments: object) -> str:
    result = RUNNER.invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_two_maps_and_half_maps(golden, tmp_path):
    relion = golden / "relion"
    pair = (relion / "half1.mrc", relion / "half2.mrc")
    assert "masked" not in run("eval-fsc", *pair).replace("unmasked", "")
    output = run("eval-fsc", *pair, "--half-maps", "--mask", relion / "mask.mrc", "-o", tmp_path)
    assert "corrected" in output
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["randomised_from_shell"] == 9
    corrected = next(row for row in scores["curves"] if row["curve"] == "corrected")
    assert 12 < corrected["resolution_0.143_A"] < 15
    compat = run("eval-fsc", *pair, "--compat", "cryobench", "--Apix", 3)
    assert "unmasked" in compat


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{half1}", "{half2}", "--truth", "nowhere"], "--truth has no meaning for two maps"),
        (["{half1}", "{half2}", "--oracle", "--epoch", "3"], "--epoch, --oracle have no meaning for two maps"),
        (["{folder}", "--align"], "--align has no meaning for the half maps of"),
        (["--map", "{half1}", "--model", "x.cif", "--images", "5"], "--images has no meaning with --model"),
    ],
)
def test_options_that_would_be_ignored_are_refused(golden, tmp_path, words, message):
    relion = golden / "relion"
    for name, to in (("half1", "half_map_a"), ("half2", "half_map_b")):
        (tmp_path / f"{to}.mrc").write_bytes((relion / f"{name}.mrc").read_bytes())
    paths = {"half1": relion / "half1.mrc", "half2": relion / "half2.mrc", "folder": tmp_path}
    with pytest.raises(InputError, match=message):
        run("eval-fsc", *(word.format(**paths) for word in words))


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "not finite"), (0.0, "hides everything"), (2.0, "between 0 and 1")]
)
def test_masks_that_are_none_are_refused(golden, tmp_path, value, message):
    half = golden / "relion" / "half1.mrc"
    write_map(tmp_path / "mask.mrc", np.full(read_map(half).data.shape, value, np.float32), 3.0)
    for words in ((half, golden / "relion" / "half2.mrc"), ("--half-maps", half, golden / "relion" / "half2.mrc")):
        with pytest.raises(InputError, match=f"mask.mrc: .*{message}"):
            run("eval-fsc", *words, "--mask", tmp_path / "mask.mrc")


def test_maps_that_do_not_fit(golden, tmp_path):
    half = golden / "relion" / "half1.mrc"
    data = read_map(half).data
    write_map(tmp_path / "small.mrc", data[16:48, 16:48, 16:48], 3.0)
    write_map(tmp_path / "scale.mrc", data, 2.5)
    write_map(tmp_path / "mask.mrc", data * 100, 3.0)
    data = data.copy()
    data[0, 0, 0] = np.nan
    write_map(tmp_path / "nan.mrc", data, 3.0)
    for other, words in (("small.mrc", "one of 32"), ("scale.mrc", "not on one grid"), ("nan.mrc", "not finite")):
        with pytest.raises(InputError, match=words):
            run("eval-fsc", half, tmp_path / other)
    run("eval-fsc", half, tmp_path / "scale.mrc", "--Apix", 3)
    with pytest.raises(InputError, match="between 0 and 1"):
        run("eval-fsc", half, half, "--mask", tmp_path / "mask.mrc")
    with pytest.raises(InputError, match="one map alone"):
        run("eval-fsc", half)
    with pytest.raises(InputError, match="unknown; there is cryobench"):
        run("eval-fsc", half, half, "--compat", "other")


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    out = tmp_path_factory.mktemp("sim") / "sim"
    run("simulate", "-o", out, "--structures", "phantom:3", "-n", 240, "-D", 32, "--snr", 0.5, "--seed", 3)
    return out


def test_a_run_against_its_truth(simulated, tmp_path, monkeypatch):
    """A run that knows the truth exactly scores the maximum; one that decodes the consensus gains nothing."""
    from cryosuite.data.open import open_particles

    particles = open_particles(simulated)
    truth = find_truth(simulated)
    labels = truth.labels_of(particles.index)
    volumes = np.stack([read_map(path).data for path in truth.volumes])
    z = np.eye(3, dtype=np.float32)[labels] * 4 + np.random.default_rng(0).normal(0, 0.1, (240, 3)).astype(np.float32)

    def loaded(run_path, epoch=None, **options):
        return SimpleNamespace(
            name="perfect", particles=particles, z=z, epoch=4, pixel_size=10.0, box_size=32,
            decode=lambda points: volumes[points.argmax(1)], config={},
        )  # fmt: skip

    monkeypatch.setattr("cryosuite.methods.load_run", loaded)
    folder = tmp_path / "run"
    folder.mkdir()
    write_yaml(folder / "config.yaml", {"method": "perfect", "particles": str(simulated)})
    options = ("--images", 12, "--oracle", "--shapes", "--cluster-seeds", 2, "--gmm-seeds", 1)
    output = run("eval-fsc", folder, *options)
    assert "ARI, k-means" in output
    out = folder / "eval.4"
    assert {entry.name for entry in out.iterdir()} == {
        "fsc.csv", "fsc.png", "per_image.csv", "per_conformation.csv", "scores.json",
    }  # fmt: skip
    for name in ("per_image.csv", "per_conformation.csv"):
        assert (out / name).read_text().startswith("row_from_0,state_from_0,auc_")
    scores = json.loads((out / "scores.json").read_text())
    assert scores["per_image"]["auc_masked_normalised"] == pytest.approx(1.0, abs=1e-3)
    assert scores["per_image"]["viou"] == 1.0
    assert scores["per_conformation"]["volumes"] == 3
    assert scores["clustering"]["kmeans_ari"] == 1.0
    assert scores["clustering"]["knn10_accuracy"] == 1.0
    assert scores["oracle"]["gain_masked"] > 1.0  # better than backprojection of noisy images
    assert scores["oracle"]["label_backprojection_masked"] > scores["oracle"]["consensus_masked"] + 0.05
    assert (simulated / "oracle.json").exists()
    monkeypatch.setattr(eval_run, "oracle_scores", lambda *_: pytest.fail("the cached scores were not used"))
    run("eval-fsc", folder, *options, "--no-clustering", "-o", tmp_path / "again")


def test_a_folder_of_polish_against_its_truth(simulated, tmp_path):
    """Right labels score near the maximum, the same maps given to the wrong particles do not; -1 is not judged."""
    labels = safe_load(find_truth(simulated).labels)[0]
    labels[:9] = -1
    scores = []
    for name, found in (("right", labels), ("wrong", np.where(labels < 0, -1, (labels + np.arange(240) % 2) % 3))):
        write_pickle(tmp_path / f"{name}.pkl", found)
        run("polish", simulated, "--labels", tmp_path / f"{name}.pkl", "-o", tmp_path / name, "--passes", 0)
        output = run("eval-fsc", tmp_path / name, "--images", 30)  # finds the truth by itself
        assert "ARI, its own labels" in output and f"{tmp_path / name} epoch" not in output
        scores.append(json.loads((tmp_path / name / "scores" / "scores.json").read_text()))
    right, wrong = scores
    assert right["labels"]["ari"] == 1.0 and right["n_particles"] == right["labels"]["judged"] == 231
    assert right["per_image"]["auc_masked"] > wrong["per_image"]["auc_masked"] + 0.03
    with pytest.raises(InputError, match="floor and ceiling"):
        run("eval-fsc", tmp_path / "right", "--oracle")
    with pytest.raises(InputError, match="not a training run"):
        run("eval-fsc", simulated, "--polished")


def test_polished_maps_of_a_run(simulated, tmp_path, monkeypatch):
    """--polished judges the maps of polish in place of the run's own; those of another set of particles are refused."""
    truth = find_truth(simulated)
    labels, volumes = safe_load(truth.labels)[0], np.zeros((3, 32, 32, 32), np.float32)
    z = np.eye(3, dtype=np.float32)[labels]
    fake_run(tmp_path / "run", simulated, z, volumes, monkeypatch)
    words = ("eval-fsc", tmp_path / "run", "--no-clustering", "--images", 6, "--polished")
    with pytest.raises(InputError, match="no polished maps"):
        run(*words)
    loaded = cryosuite.methods.load_run(tmp_path / "run")
    out = run_polish(tmp_path / "run", loaded.epoch)
    run("polish", simulated, "--labels", truth.labels, "-o", out.path, "--passes", 0)
    run(*words)
    scores = json.loads(out.scores.summary.read_text())
    assert scores["polished"] and scores["per_image"]["auc_masked_normalised"] > 0.8
    partly = np.where(np.arange(240) < 60, -1, labels)
    write_pickle(tmp_path / "partly.pkl", partly)
    run("polish", simulated, "--labels", tmp_path / "partly.pkl", "-o", out.path, "--passes", 0, "--overwrite")
    with pytest.warns(UserNotice, match="60 particles that polish left in no class"):
        run(*words)
    scores = json.loads(out.scores.summary.read_text())
    assert scores["n_particles"] == 180 and scores["per_image"]["auc_masked_normalised"] > 0.8
    write_pickle(tmp_path / "few.pkl", np.arange(200))
    few = ("--ind", tmp_path / "few.pkl", "--labels", truth.labels)
    run("polish", simulated, *few, "-o", out.path, "--passes", 0, "--overwrite")
    with pytest.raises(InputError, match="maps of 200 particles, the run has 240"):
        run(*words)


def fake_run(folder, simulated, z, volumes, monkeypatch, rotation=None):
    """A run folder whose latents and decoder are given."""
    from dataclasses import replace

    from cryosuite.data.open import open_particles

    particles = open_particles(simulated)
    if rotation is not None:
        particles = replace(particles, rotation=rotation)
    monkeypatch.setattr("cryosuite.methods.load_run", lambda *_, **__: SimpleNamespace(
        name="fake", particles=particles, z=z, epoch=1, pixel_size=float(particles.pixel_size[0]),
        box_size=particles.box_size, decode=lambda points: volumes[np.zeros(len(points), int)], config={},
    ))  # fmt: skip
    folder.mkdir()
    write_yaml(folder / "config.yaml", {"method": "fake", "particles": str(simulated)})


def test_latents_that_are_not_numbers_are_left_out(simulated, tmp_path, monkeypatch):
    volumes = np.stack([read_map(path).data for path in find_truth(simulated).volumes])
    z = np.random.default_rng(0).normal(size=(240, 2)).astype(np.float32)
    z[7] = np.nan
    fake_run(tmp_path / "run", simulated, z, volumes, monkeypatch)
    (tmp_path / "run" / "analyze.1").mkdir()  # whose clusters leave the same particle out
    write_pickle(tmp_path / "run" / "analyze.1" / "labels.pkl", np.where(np.isnan(z[:, 0]), -1, np.arange(240) % 3))
    run("eval-fsc", tmp_path / "run", "--images", 6, "--cluster-seeds", 1, "--gmm-seeds", 1, "--local")
    scores = json.loads((tmp_path / "run" / "eval.1" / "scores.json").read_text())
    assert scores["n_particles"] == 239 and scores["analysis"]["clusters"] == 3
    assert 0 < scores["per_image"]["local_auc_median"] < 1
    assert "landscape" not in scores and "poses" not in scores  # unrelated states; the true poses


@pytest.mark.parametrize(
    ("lacks", "words"), [("decode", "no volumes.*--polished"), ("particles", "images .* not there")]
)
def test_a_run_without_volumes_or_images_is_told_so(simulated, tmp_path, monkeypatch, lacks, words):
    """pretrain-iev decodes nothing; the images of a cryoDRGN run may be elsewhere."""
    fake_run(tmp_path / "run", simulated, np.zeros((240, 2), np.float32), np.zeros((3, 32, 32, 32)), monkeypatch)
    whole = cryosuite.methods.load_run(tmp_path / "run")
    setattr(whole, lacks, None)
    monkeypatch.setattr("cryosuite.methods.load_run", lambda *_, **__: whole)
    with pytest.raises(InputError, match=words):
        run("eval-fsc", tmp_path / "run")


def test_a_landscape_clusters_and_poses_are_judged(tmp_path, monkeypatch):
    from cryosuite.formats.pickles import read_poses, write_pickle

    sim = tmp_path / "loop"
    run("simulate", "-o", sim, "--recipe", "loop", "--structures", "phantom:1", "--states", 5, "-n", 100, "-D", 32)
    truth = find_truth(sim)
    labels = truth.labels_of(np.arange(100))
    z = np.asarray(truth.dataset["truth"]["embedding"], np.float32)[labels]
    volumes = np.stack([read_map(path).data for path in truth.volumes])
    rotation = read_poses(sim / "poses.pkl")[0]
    rng = np.random.default_rng(0)
    turn = np.deg2rad(np.where(labels == 2, 8, 2))
    spin = np.stack([np.stack([np.cos(turn), -np.sin(turn), 0 * turn], 1),
                     np.stack([np.sin(turn), np.cos(turn), 0 * turn], 1),
                     np.tile([0.0, 0.0, 1.0], (100, 1))], 1)  # fmt: skip
    fake_run(tmp_path / "run", sim, z, volumes, monkeypatch, (spin @ rotation).astype(np.float32))
    (tmp_path / "run" / "analyze.1").mkdir()
    write_pickle(tmp_path / "run" / "analyze.1" / "labels.pkl", 2 * labels + rng.integers(0, 2, 100))
    output = run("eval-fsc", tmp_path / "run", "--images", 5, "--cluster-seeds", 1, "--gmm-seeds", 1)
    assert "imbalance z -> landscape" in output and "V-measure" in output and "pose error" in output
    scores = json.loads((tmp_path / "run" / "eval.1" / "scores.json").read_text())
    found = scores["landscape"]
    assert found["similarity"]["25"] > 0.8  # ties within a state are broken at random
    assert found["imbalance_z_to_landscape"]["10"] < 0.25 < 0.8 < found["imbalance_z_to_pose"]["10"]
    assert scores["analysis"]["clusters"] == 10 and 0.7 < scores["analysis"]["v_measure"] < 0.95
    rows = {row["state"]: row["rotation_median_deg"] for row in scores["poses"]["per_state"]}
    assert rows[2] > max(rows[0], rows[1]) + 3


def test_kept_floor_and_ceiling_are_those_of_the_set_that_lies_there(simulated, monkeypatch):
    run("eval-fsc", simulated)
    made = []
    genuine = eval_run.oracle_scores
    monkeypatch.setattr(eval_run, "oracle_scores", lambda *values: made.append(1) or genuine(*values))
    run("eval-fsc", simulated)
    assert not made
    truth = find_truth(simulated)
    for path in (truth.labels, truth.volumes[1], truth.mask):  # as a second simulation into the same folder writes them
        made.clear()
        path.touch()
        run("eval-fsc", simulated)
        assert made, path


def test_kept_floor_and_ceiling_are_those_of_these_poses_and_optics(simulated):
    from dataclasses import replace

    from cryosuite.data.open import open_particles

    one = open_particles(simulated)
    changes = {
        "rotation": one.rotation[::-1], "shift": one.shift + 0.01, "ctf": one.ctf * 1.01, "sign": -one.sign,
        "index": one.index[::-1], "extras": {"bfactor": np.ones(len(one), np.float32)},
    }  # fmt: skip
    prints = {eval_run._fingerprint(replace(one, **{name: value})) for name, value in changes.items()}
    assert len(prints) == len(changes) and eval_run._fingerprint(one) not in prints
    assert eval_run._fingerprint(open_particles(simulated)) == eval_run._fingerprint(one)


def test_volume_from_is_of_train_hype(tmp_path):
    made = {"method": "kraqen", "particles": "x", "options": {}, "training": {}}
    write_yaml(tmp_path / "config.yaml", made)
    with pytest.raises(InputError, match="--volume-from .* one of kraqen"):
        run("eval-fsc", tmp_path, "--volume-from", "image")


@pytest.mark.slow
def test_a_map_is_aligned_before_it_is_compared(simulated, tmp_path):
    volume = read_map(find_truth(simulated).volumes[0])
    turned = np.rot90(volume.data, 1, (0, 2)).copy()
    write_map(tmp_path / "turned.mrc", turned, volume.pixel_size)
    output = run("eval-fsc", tmp_path / "turned.mrc", find_truth(simulated).volumes[0], "--align", "-o", tmp_path / "o")
    assert "aligned: turned by" in output
    scores = json.loads((tmp_path / "o" / "scores.json").read_text())
    assert scores["curves"][0]["auc_normalised"] > 0.8


def test_floor_and_ceiling_of_a_simulated_set(simulated):
    output = run("eval-fsc", simulated, "--compat", "cryobench")
    assert "consensus" in output


def test_a_folder_without_truth(golden, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    write_yaml(folder / "dataset.yaml", {"kind": "preprocessed"})
    with pytest.raises(InputError):
        run("eval-fsc", folder)
