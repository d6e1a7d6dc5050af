"""fastar-infer without its command: its three modes from prediction to map, with networks that know the truth."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastar_toy import SPEC, StarOracle, TargetOracle
from hype_toy import blob_particles, blobs

from cryosuite.data.particles import ParticleSet
from cryosuite.errors import InputError
from cryosuite.kernels.planar import mirror
from cryosuite.kernels.rotations import geodesic_deg, random_rotations
from cryosuite.methods import fastar_infer as infer
from cryosuite.methods.fastar_images import Window
from cryosuite.methods.fastar_predict import Clock, StarPredictor
from cryosuite.methods.fastar_star import StarOptions
from cryosuite.metrics.poses import pose_report
from cryosuite.nets.multiview import Multiview, MultiviewSpec
from cryosuite.reconstruct.abinitio_starts import AbInitioOptions
from cryosuite.reconstruct.backproject import flip_hand

NO_CTF = Window(32, 32, 32)


# --- target mode -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def molecule() -> tuple[ParticleSet, torch.Tensor]:
    volume = blobs(32, 3, count=12)
    return blob_particles([volume], 400, 1.5, seed=1)[0], volume


def targeted(particles: ParticleSet, volume: torch.Tensor, oracle: TargetOracle, **options):
    """A whole run in target mode."""
    chosen, clock = infer.InferOptions(batch=64, **options), Clock()
    predicted = infer.predict_target(particles, oracle, NO_CTF, chosen, clock, progress=False)
    reference = infer.Reference(volume, 20.0, "map", 0.17)
    return infer.finish(particles, predicted, chosen, clock, reference, progress=False)


@pytest.mark.filterwarnings("ignore")
def test_target_mode_from_prediction_to_map(molecule) -> None:
    """10 degrees off, a fifth anywhere: after two rounds the poses are precise and the map is that of the molecule."""
    particles, volume = molecule
    oracle = TargetOracle(particles.rotation, particles.shift, bad=0.2)
    result = targeted(particles, volume, oracle)
    report = pose_report(
        result.posed.rotation, particles.rotation, result.posed.shift, particles.shift, 32,
        result.judged.confidence[:, 0],
    )  # fmt: skip
    before = pose_report(result.predicted.rotation, particles.rotation, result.predicted.shift, particles.shift, 32)
    assert before.raw["median_deg"] > 9 and report.raw["median_deg"] < 3
    assert report.raw["under_10_deg"] > 0.9  # the unsure were searched for: the wrong ones are found too
    assert result.predicted.facts["searched_everywhere"] == int(oracle.wrong.sum())
    assert np.array_equal(result.predicted.rotation, oracle.rotation.numpy())  # what was predicted stays as it was
    assert report.raw["shift_median_px"] < 0.5 < before.raw["shift_median_px"]
    assert result.hand == "reference"
    score = torch.corrcoef(torch.stack([result.reconstruction.map.flatten(), volume.flatten()]))[0, 1]
    assert float(score) > 0.85
    assert {"load", "refine", "back-project"} <= set(result.seconds)
    # the unsure ones were left out of the map
    assert oracle.wrong[torch.from_numpy(result.judged.rejected)].float().mean() > 0.5


@pytest.mark.filterwarnings("ignore")
def test_rivals_alone_find_what_was_wrong(molecule) -> None:
    """Nobody is searched for: the true pose is found where the network named it second."""
    particles, volume = molecule
    oracle = TargetOracle(particles.rotation, particles.shift, bad=0.2)
    result = targeted(particles, volume, oracle, rescue=0.0)
    report = pose_report(result.posed.rotation, particles.rotation, result.posed.shift, particles.shift, 32)
    assert "searched_everywhere" not in result.predicted.facts
    assert report.raw["under_10_deg"] > 0.9


@pytest.mark.filterwarnings("ignore")
def test_shifts_of_a_window_are_those_of_the_box(molecule) -> None:
    """The network speaks of fractions of what it sees."""
    particles, _ = molecule
    window = Window(32, 24, 32)
    oracle = TargetOracle(particles.rotation, particles.shift, 0.0, share=window.share, shift_error=0.0)
    found = infer.predict_target(particles, oracle, window, infer.InferOptions(batch=100), Clock(), progress=False)
    assert np.allclose(found.shift, particles.shift, atol=1e-6)
    assert np.allclose(found.rotation, particles.rotation, atol=1e-5)


def test_without_ctf_there_are_poses_but_no_map(molecule) -> None:
    """Unless the user says that none is needed."""
    particles, volume = molecule
    bare = replace(particles, ctf=None)
    oracle = TargetOracle(particles.rotation, particles.shift)
    with pytest.warns(UserWarning, match="no CTF"):
        result = targeted(bare, volume, oracle)
    assert result.reconstruction is None and not result.history
    assert np.allclose(result.posed.rotation, oracle.rotation.numpy(), atol=1e-6)
    told = targeted(particles, volume, oracle, use_ctf=False, refine=0)
    assert told.reconstruction is not None and told.posed.ctf is not None


def test_too_few_particles_are_posed_but_not_refined(molecule) -> None:
    particles, volume = molecule
    few = particles.subset(np.arange(24))
    oracle = TargetOracle(few.rotation, few.shift)
    with pytest.warns(UserWarning, match="not refined"):
        result = targeted(few, volume, oracle)
    assert not result.history and result.reconstruction is not None
    one = particles.subset(np.arange(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = targeted(one, volume, TargetOracle(one.rotation, one.shift), reject=0.0)
    assert result.posed.rotation.shape == (1, 3, 3) and result.reconstruction.half_a is None


def test_doubt_is_said(molecule) -> None:
    """Images that hold nothing and a network that is not sure."""
    particles, volume = molecule
    images = particles.read(slice(0, 400)).copy()
    images[7] = 0
    broken = replace(particles, images=ParticleSet.from_array(images, 6.0).images)
    oracle = TargetOracle(particles.rotation, particles.shift, bad=0.9)
    with pytest.warns(UserWarning) as said:
        result = targeted(broken, volume, oracle, refine=0)
    texts = " ".join(str(one.message) for one in said)
    assert "1 images hold nothing" in texts and "not sure" in texts
    assert result.judged.rejected[7] and np.isfinite(result.posed.rotation).all()


# --- without a reference ---------------------------------------------------------------------------------------------


def starred(particles: ParticleSet, oracle: StarOracle, **star):
    options = infer.InferOptions(mode="ab-initio", star=StarOptions(**star))
    return infer.predict_star(particles, oracle, NO_CTF, options, progress=False)


def star_error(found: infer.Predicted, particles: ParticleSet) -> tuple[float, dict]:
    report = pose_report(found.rotation, particles.rotation, found.shift, particles.shift, 32)
    return report.aligned["median_deg"], found.facts


@pytest.mark.filterwarnings("ignore")
def test_chunks_of_either_hand_make_one_frame(molecule) -> None:
    """Every chunk has its own noise and hand; anchors bring all particles into one frame."""
    particles, _ = molecule
    oracle = StarOracle(particles.rotation, particles.shift)
    found = starred(particles, oracle, views=40)
    error, facts = star_error(found, particles)
    assert error < 7 and facts["chunks"] == 13 and 0 < facts["flips"] < 13 and facts["undecided"] == 0
    alone = star_error(
        starred(particles, StarOracle(particles.rotation, particles.shift, hands=False), views=40), particles
    )
    assert alone[0] < 7 and alone[1]["flips"] == 0


@pytest.mark.filterwarnings("ignore")
def test_the_reference_is_the_one_the_network_is_surest_of(molecule) -> None:
    """Of all candidates the favourite is taken: its rotation is the frame."""
    particles, _ = molecule
    few = particles.subset(np.arange(30))
    oracle = StarOracle(few.rotation, few.shift, 0.0, hands=False)
    found = starred(few, oracle, views=128, candidates=30)
    assert np.allclose(found.rotation[oracle.favourite], np.eye(3), atol=1e-4)
    assert star_error(found, few)[0] < 0.1


@pytest.mark.filterwarnings("ignore")
def test_several_references_lower_the_error(molecule) -> None:
    particles, _ = molecule
    oracle = StarOracle(particles.rotation, particles.shift, 15.0)
    one = star_error(starred(particles, oracle, views=60), particles)[0]
    three, facts = star_error(starred(particles, oracle, views=60, references=3), particles)
    assert three < one and facts["references"] == 3


@pytest.mark.filterwarnings("ignore")
def test_fewer_particles_than_views(molecule) -> None:
    """Any number from three on."""
    particles, _ = molecule
    for count in (3, 5, 12):
        few = particles.subset(np.arange(count))
        found = starred(few, StarOracle(few.rotation, few.shift, 0.0), views=128)
        assert star_error(found, few)[0] < 0.1 and found.facts["chunks"] == 1
    with pytest.raises(InputError, match="at least 3"):
        two = particles.subset(np.arange(2))
        starred(two, StarOracle(two.rotation, two.shift))
    with pytest.raises(InputError, match="fewer anchors than"):
        StarOptions(views=8, anchors=8)


class SureOfDark(StarOracle):
    """A network of the released layout that was trained on dark particles."""

    spec = MultiviewSpec(32, 8, 32, 1, 2, 32, 1, 2, "patch", "table", "dense", False, 1, 0)

    def encode(self, images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        self.range = float(images.abs().max())
        self.dark = float(images.flatten(1).pow(3).mean()) < 0  # white particles have a positive skew
        return super().encode(images, rows)

    def decode(self, tokens: torch.Tensor):
        rotation, shift, confidence = super().decode(tokens)
        return rotation, shift, confidence + 2.0 * self.dark


def test_the_released_network_is_shown_either_contrast() -> None:
    """The surer one is taken; grey values lie within -1 and 1, one channel."""
    particles, _ = blob_particles([blobs(32, 3, count=12)], 60, 0.2, seed=4)
    oracle = SureOfDark(particles.rotation, particles.shift, 0.0, hands=False)
    with pytest.warns(UserWarning, match="inverted"):
        found = starred(particles, oracle, views=40)
    assert oracle.dark and 0.5 < oracle.range <= 1.5
    assert star_error(found, particles)[0] < 0.1


def test_the_reference_of_a_single_chunk_has_the_answer_of_the_network() -> None:
    """Its frame may be turned against that of the reference: all poses are in the one frame."""
    particles, _ = blob_particles([blobs(32, 3, count=12)], 30, 0.2, seed=4)
    frame = random_rotations(1, torch.Generator().manual_seed(1))[0]

    class Turned(StarOracle):
        def decode(self, tokens):
            rotation, shift, confidence = super().decode(tokens)
            return rotation @ frame, shift, confidence

    oracle = Turned(particles.rotation, particles.shift, 0.0, hands=False)
    found = starred(particles, oracle, views=40)
    assert found.facts["chunks"] == 1
    off = torch.from_numpy(np.asarray(found.rotation)).transpose(1, 2) @ torch.from_numpy(particles.rotation)
    assert geodesic_deg(off, off[:1]).max() < 0.1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["ours", "released"])
def test_real_networks_run_in_stars(kind: str) -> None:
    """Random weights of either layout: rotations of the reference's frame, the same twice."""
    torch.manual_seed(0)
    spec = SureOfDark.spec if kind == "released" else replace(SPEC, enc_dim=40, enc_depth=1, dec_dim=40, dec_depth=1)
    predictor = StarPredictor(Multiview(spec))
    particles, _ = blob_particles([blobs(32, 0)], 50, 0.5, seed=4)
    found = [starred(particles, predictor, views=20, anchors=4, candidates=3) for _ in range(2)]
    assert np.allclose(np.linalg.det(found[0].rotation), 1, atol=1e-3)
    assert np.array_equal(found[0].rotation, found[1].rotation) and found[0].facts["chunks"] >= 3
    assert {"encode", "decode", "Kabsch", "select", "load"} <= set(predictor.clock.totals())


def test_the_hand_is_taken_from_a_map_given_beside(molecule) -> None:
    """Poses of the wrong hand: map and poses are turned over where the reference says so."""
    particles, volume = molecule
    other = mirror(torch.from_numpy(particles.rotation)).numpy()
    wrong = infer.Predicted(
        other, particles.shift, np.ones(400), np.ones(400), np.ones(400, bool)
    )  # fmt: skip
    options = infer.InferOptions(mode="ab-initio", refine=0, reject=0.0)
    result = infer.finish(particles, wrong, options, Clock(), progress=False)
    assert result.hand == "undetermined"
    settled = infer.settle_hand(result, infer.Reference(volume, 20.0, "map", 0.17))
    assert settled.hand == "fitted"
    assert np.allclose(settled.posed.rotation, particles.rotation, atol=1e-5)
    again = infer.settle_hand(settled, infer.Reference(flip_hand(volume), 20.0, "map", 0.17))
    assert np.allclose(again.posed.rotation, other, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_search_takes_the_network_as_second_opinion(molecule, monkeypatch) -> None:
    """A search with a quarter of its poses wrong, a network that knows better: the likelihood decides."""
    particles, volume = molecule
    engine = _FakeSearch(particles)
    monkeypatch.setattr(infer, "AbInitio", lambda *_, **how: engine)
    oracle = TargetOracle(particles.rotation, particles.shift, 8.0)
    seen = []

    def guess(found: torch.Tensor, low_pass: float) -> infer.Predicted:
        seen.append(found)
        return infer.predict_target(particles, oracle, NO_CTF, infer.InferOptions(), Clock(), progress=False)

    options = infer.InferOptions(mode="search", refine=2)
    errors = []
    for helper in (None, guess):
        predicted = infer.predict_search(particles, options, Clock(), helper, progress=False)
        result = infer.finish(particles, predicted, options, Clock(), progress=False)
        errors.append(pose_report(result.posed.rotation, particles.rotation, result.posed.shift, particles.shift, 32))
        assert result.hand == "undetermined"
    assert seen[0].shape == (32, 32, 32)
    assert errors[1].raw["under_10_deg"] > errors[0].raw["under_10_deg"] + 0.1


def test_broken_images_get_no_pose_and_no_place_in_the_map_when_all_are_searched_for() -> None:
    """One image in eight is not a number: none of them is good, none is counted, and that they are left out is said."""
    images = np.random.default_rng(0).standard_normal((200, 16, 16)).astype(np.float32)
    bad = np.arange(0, 200, 8)
    images[bad] = np.nan
    table = np.tile(np.array([[16, 4, 15000, 15000, 0, 300, 2.7, 0.1, 0]], np.float32), (200, 1))
    particles = ParticleSet.from_array(images, 4.0, ctf=table)
    options = infer.InferOptions(mode="search", refine=0, reject=0.0)
    short = AbInitioOptions(starts=1, iterations=2, settle=1, batch=50, radius=(3, 5), rounds=((5, True),))
    with pytest.warns(UserWarning, match="25 images hold nothing"):
        predicted = infer.predict_search(particles, options, Clock(), None, short, progress=False)
        result = infer.finish(particles, predicted, options, Clock(), progress=False)
    assert not predicted.good[bad].any() and predicted.good.sum() == 175
    assert result.judged.rejected[bad].all() and result.reconstruction.count == 175
    assert predicted.facts["joint_maps_to_A"] == pytest.approx(16 * 4 / 5)


class _FakeSearch:
    """An ab initio search that is done at once."""

    total, position, done, joint_radius = 1, 0, True, 16

    def __init__(self, particles: ParticleSet) -> None:
        oracle = TargetOracle(particles.rotation, particles.shift, 5.0, bad=0.25, seed=3)
        n = len(particles)
        self.found = type("Found", (), {})()
        self.found.rotation, self.found.shift = oracle.rotation.numpy(), oracle.shift.numpy()
        self.found.score, self.found.margin = np.ones(n, np.float32), np.ones(n, np.float32)
        self.found.good = np.ones(n, bool)
