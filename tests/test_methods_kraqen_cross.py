"""train-kraqen with held-out scores: no image judges the map it is part of, wrong shares are left again, twins join."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hype_toy import blob_particles, blobs
from sklearn.metrics import adjusted_rand_score

from cryosuite.data.images import ArrayImages
from cryosuite.data.workdir import RunDir
from cryosuite.errors import UserNotice
from cryosuite.methods.kraqen_codes import finish, merge
from cryosuite.methods.kraqen_cross import CrossEM, engine_for
from cryosuite.methods.kraqen_options import KraqenOptions
from cryosuite.methods.kraqen_voxel import VoxelEM, VoxelResult
from cryosuite.reconstruct.class_sums import accumulate
from cryosuite.reconstruct.polish import polish
from cryosuite.reconstruct.weights import ClassWeights
from cryosuite.training import checkpoint
from cryosuite.training.options import plain

BOX = 16
SMALL = KraqenOptions(n_codes=5, iterations=10)


@pytest.fixture(scope="module")
def toy():
    """480 images of three molecules, SNR 1 or so per pixel, and their labels."""
    return blob_particles([blobs(BOX, seed) for seed in (1, 2, 3)], 480, noise=1.0, seed=4)


@pytest.fixture(scope="module")
def found(toy) -> VoxelResult:
    return CrossEM(toy[0], SMALL).run(progress=False)


def same(a: VoxelResult, b: VoxelResult) -> bool:
    parts = zip(a.p.to_arrays(), b.p.to_arrays(), strict=True)
    return torch.equal(a.codes, b.codes) and all(np.array_equal(x, y) for x, y in parts)


def test_wrong_shares_are_left_again():
    """30 noisy images per state, most in the wrong code: an image that lies in the map that judges it stays there."""
    particles, labels = blob_particles([blobs(24, seed) for seed in (1, 2, 3)], 90, noise=8.0, seed=4)
    generator = np.random.default_rng(3)
    wrong = np.where(generator.random(90) < 0.6, generator.integers(0, 3, 90), labels)
    start = ClassWeights.from_labels(wrong, 3)
    options = SMALL.changed(n_codes=3, em_finish=8)
    held_out = CrossEM(particles, options).run(start=start, progress=False).p.labels()
    included = VoxelEM(particles, options).run(start=start, progress=False).p.labels()
    assert (included == wrong).mean() > (held_out == wrong).mean() + 0.05
    assert adjusted_rand_score(labels, held_out) > adjusted_rand_score(labels, included) + 0.1
    assert adjusted_rand_score(labels, held_out) > adjusted_rand_score(labels, wrong) + 0.3


def test_an_image_is_scored_with_maps_of_the_other_half_alone(toy):
    """Other images in half set 0 change the shares of half set 1, never those of half set 0."""
    particles, labels = toy
    half = particles.half_sets()
    start = ClassWeights.from_labels(labels, 3)
    other = np.where(half == 0, (labels + 1) % 3, labels)  # half 0 put into the wrong codes
    options = SMALL.changed(n_codes=3, em_finish=1)
    one, two = (
        CrossEM(particles, options).run(start=shares, progress=False).p.labels()
        for shares in (start, ClassWeights.from_labels(other, 3))
    )
    assert (one == labels).mean() > 0.95
    # judged by half 1, which is as it was; only the gains, common to both halves, know of the disagreement
    assert (two[half == 0] == one[half == 0]).mean() > 0.8
    assert (two[half == 1] == (one[half == 1] + 1) % 3).mean() > 0.8


def test_states_are_found_and_twins_joined(toy, found):
    labels = toy[1]
    merged, groups = merge(found)
    assert len(merged.codes) == 3 and set(groups[groups >= 0]) == {0, 1, 2}
    assert adjusted_rand_score(labels, merged.p.labels()) > 0.95
    assert list(merged.usage) == sorted(merged.usage, reverse=True)


def test_never_fewer_codes_are_left_than_there_are_states(toy, found):
    """Asked for more than there are, those that share most are joined, and it is said; else all twins are."""
    used = int((found.p.usage() > 0.5).sum())
    plain = merge(found)[0].p.labels()
    for states, left in ((4, 4), (3, 3), (2, 3)):
        found.engine.options = SMALL.changed(n_states=states)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            merged, groups = merge(found)
        assert merged.p.n_classes == left == len(np.unique(groups[groups >= 0])) and used > 4
        assert any(f"--n-states {states}" in str(one.message) for one in said) == (left > 3)
        assert np.array_equal(merged.p.labels(), plain) == (left == 3)
    found.engine.options = SMALL
    assert not SMALL.changed(n_states=4).without_effect(["n_states"])  # beside --n-codes: what is left at least
    assert SMALL.changed(n_states=4, merge="none").without_effect(["n_states"])


def test_maps_are_those_of_polish(toy):
    """From the engine's own sums in the cluster box, or by the way of `polish` itself: the same half maps."""
    particles, labels = toy
    p = ClassWeights.from_labels(labels, 3)
    engine = CrossEM(particles, SMALL.changed(n_codes=3))
    with engine.threads_of_torch():
        maps = engine.local_maps(p)
    with accumulate(particles, p) as sums:
        expected = polish(sums)
    for mine, theirs in zip(maps, (expected.half_a, expected.half_b), strict=True):
        scale = torch.tensordot(mine, theirs, 4) / theirs.square().sum()  # whitened by one number, or by another
        assert float((mine - scale * theirs).norm() / mine.norm()) < 0.02
        assert 0.9 < float(scale) < 1.1


def test_groups_of_codes_on_disk_give_the_same(toy):
    few = SMALL.changed(iterations=3)
    whole = CrossEM(toy[0], few).run(progress=False)
    engine = CrossEM(toy[0], few, memory_gib=1e-3, cache_gib=0.0)
    assert len(engine._groups(8, 2)) > 1
    grouped = engine.run(progress=False)
    assert (whole.p.labels() == grouped.p.labels()).mean() > 0.98


def test_threads_do_not_change_the_result(toy, found):
    torch.set_num_threads(2)
    try:
        assert same(CrossEM(toy[0], SMALL).run(progress=False), found)
    finally:
        torch.set_num_threads(1)


def test_resume_is_exact(toy, found, tmp_path: Path):
    class Enough(Exception):  # noqa: N818
        pass

    def stop(state, record):
        if state.iteration == 4:
            raise Enough

    run = RunDir(tmp_path)
    with pytest.raises(Enough):
        CrossEM(toy[0], SMALL).run(run=run, progress=False, on_iteration=stop)
    assert same(CrossEM(toy[0], SMALL).run(run=run, resume=True, progress=False), found)


def test_the_last_iterations_take_a_finer_box():
    particles, labels = blob_particles([blobs(48, seed) for seed in (1, 2)], 60, noise=1.0, seed=4)
    coarse = engine_for(particles, SMALL.changed(n_codes=2))
    assert isinstance(coarse, CrossEM) and coarse.box == 32
    assert finish(particles, ClassWeights.from_labels(labels, 2), SMALL.changed(em_finish=1)).codes.shape[-1] == 48
    assert engine_for(particles, SMALL.changed(n_codes=2, cluster_box=40)).box == 40


def test_too_few_images_are_all_put_into_the_maps(toy):
    engine = engine_for(toy[0].subset(np.arange(5)), SMALL.changed(n_codes=2))
    assert not isinstance(engine, CrossEM)
    found = engine.run(progress=False)
    assert bool(torch.isfinite(merge(found)[0].codes).all())


def test_an_empty_half_set_is_said_and_replaced(toy):
    particles = replace(toy[0], half=np.zeros(480, np.int8))
    with pytest.warns(UserNotice, match="half set"):
        engine = CrossEM(particles, SMALL)
    assert 200 < engine.half.sum() < 280


def test_pure_noise_tells_nothing_apart(toy):
    """Codes of noise share their images at three times the temperature: one or two are left of five."""
    noise = np.random.default_rng(0).normal(size=(480, BOX, BOX)).astype(np.float32)
    merged, _ = merge(CrossEM(replace(toy[0], images=ArrayImages(noise)), SMALL).run(progress=False))
    assert len(merged.codes) <= 2


@pytest.fixture(scope="module")
def moved():
    """Three states of one molecule, shifts wrong by .8 pixel; the particles as they should be, and the labels."""
    body, part = blobs(24, 1), [blobs(24, seed, 2) for seed in (5, 6, 7)]
    good, labels = blob_particles([body + one for one in part], 420, noise=2.5, seed=4)
    error = np.random.default_rng(0).normal(0, 0.8 / 24, (420, 2))
    return replace(good, shift=(good.shift + error).astype(np.float32)), good, labels


def test_wrong_shifts_are_refined_before_states_are_looked_for(moved):
    bad, good, labels = moved
    agreement = {}
    for refine in (True, False):
        engine = CrossEM(bad, SMALL.changed(n_codes=3, refine_shifts=refine))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserNotice)
            result, _ = merge(engine.run(progress=False))
        agreement[refine] = adjusted_rand_score(labels, result.p.labels())
        off = (result.engine.particles.shift - good.shift).std() * 24
        assert off < 0.3 if refine else off == pytest.approx(0.8, rel=0.1)
    assert agreement[True] > 0.7 > 0.3 > agreement[False], "without it codes are shifted copies"


def test_refined_shifts_go_into_the_run_and_survive_a_resume(moved, tmp_path: Path):
    bad = moved[0]
    options = SMALL.changed(n_codes=3, iterations=4)
    run, seen = RunDir(tmp_path / "run"), []
    run.path.mkdir()
    with pytest.warns(UserNotice, match=r"off by 0\.\d+ pixels .* were refined"):
        whole = CrossEM(bad, options).run(progress=False)
    with pytest.warns(UserNotice, match="refined"):
        CrossEM(bad, options).run(run=run, progress=False, max_minutes=0)
    engine = CrossEM(bad, options)
    resumed = engine.run(run=run, resume=True, progress=False, on_iteration=lambda s, _: seen.append(s.shift))
    assert same(whole, resumed)
    assert np.array_equal(engine.particles.shift, whole.engine.particles.shift)
    assert all(np.array_equal(shift, engine.refined_shift) for shift in seen) and len(seen) < len(whole.history)


def test_a_run_begun_before_shifts_were_refined_goes_on(toy, tmp_path: Path):
    options = KraqenOptions.from_dict(plain(SMALL) | {"refine_shifts": False})
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    whole = CrossEM(toy[0], options).run(progress=False)
    CrossEM(toy[0], options).run(run=run, progress=False, max_minutes=0)
    stored = checkpoint.load_state(run.checkpoint, "a checkpoint")
    stored.pop("shift")
    del stored["method"]["options"]["refine_shifts"]
    checkpoint.save_state(run.checkpoint, stored)
    kept = {name: value for name, value in plain(options).items() if name != "refine_shifts"}  # of its config.yaml
    resumed = CrossEM(toy[0], KraqenOptions.from_dict(kept)).run(run=run, resume=True, progress=False)
    assert same(whole, resumed)


def test_right_shifts_change_nothing(toy, found):
    plain = CrossEM(toy[0], SMALL.changed(refine_shifts=False)).run(progress=False)
    assert found.engine.refined_shift is None and same(found, plain)
    assert all(
        np.array_equal(a, b) for a, b in zip(merge(found)[0].p.to_arrays(), merge(plain)[0].p.to_arrays(), strict=True)
    )
