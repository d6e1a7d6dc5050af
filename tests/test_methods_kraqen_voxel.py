"""The voxel field of train-kraqen: finds the states, goes on exactly, same for any threads, speaks on bad days."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
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
from cryosuite.errors import InputError, UserNotice
from cryosuite.kernels import assignment, fourier, rotations, slices
from cryosuite.kernels import class_slices as cs
from cryosuite.methods.kraqen_codes import collapsed, embed, finish, merge, principal_components
from cryosuite.methods.kraqen_maps import Wiener, code_maps, split_dead
from cryosuite.methods.kraqen_options import KraqenOptions
from cryosuite.methods.kraqen_voxel import VoxelEM, VoxelResult
from cryosuite.reconstruct.class_images import ClusterImages
from cryosuite.reconstruct.weights import ClassWeights

BOX = 16
SMALL = KraqenOptions(m_step="wiener", n_codes=5, iterations=8, start_images=200, images_per_code=40)


@pytest.fixture(scope="module")
def toy():
    """480 images of three molecules, SNR 1 or so per pixel, and their labels."""
    return blob_particles([blobs(BOX, seed) for seed in (1, 2, 3)], 480, noise=1.0, seed=4)


@pytest.fixture(scope="module")
def found(toy) -> VoxelResult:
    return VoxelEM(toy[0], SMALL).run(progress=False)


def same(a: VoxelResult, b: VoxelResult) -> bool:
    parts = zip(a.p.to_arrays(), b.p.to_arrays(), strict=True)
    return torch.equal(a.codes, b.codes) and all(np.array_equal(x, y) for x, y in parts)


# --- parts


def test_a_map_of_clean_slices_is_the_map():
    volume = blobs(32, 5)
    disc = fourier.half_disc(32)
    rotation = rotations.random_rotations(1500, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    S = slices.extract_slices(slices.volume_transform(volume), rotation, disc)
    rows = (torch.ones(1500), torch.zeros(1500, dtype=torch.int32), torch.arange(1501))
    acc = cs.insert_classes(cs.new_class_accumulator(1, 16), S, torch.ones(S.shape), rows, rotation, disc)
    power = torch.full((17,), float(S.abs().square().mean()))
    out = code_maps(acc, Wiener(32, 16, power, 1e-6))[0]
    inside = blobs(32, 5) > 0.05
    error = (out - volume)[inside].square().mean().sqrt() / volume[inside].square().mean().sqrt()
    assert float(error) < 0.08


def test_cluster_images_know_noise_and_signal():
    """The whitened power of pure noise is 1 per coefficient, whatever its level and the cluster box."""
    particles, _ = blob_particles([blobs(32, 1) * 0], 300, seed=2)
    images = np.random.default_rng(0).normal(0, 3.0, (300, 32, 32)).astype(np.float32)
    spectrum = np.full((1, 17), 9.0 * 32 * 32, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserNotice)  # of no signal above the noise, where chance has it so
        noise = ClusterImages(replace(particles, images=ArrayImages(images), noise=spectrum), box=16)
    assert noise.signal < 0.02 and bool((noise.power > 0).all())


def test_cached_and_streamed_coefficients_agree(toy):
    kept, read = ClusterImages(toy[0], cache_gib=1.0), ClusterImages(toy[0], cache_gib=0.0)
    rows = np.array([3, 5, 77, 400])
    for a, b in zip(kept.chunks(rows, 6), read.chunks(rows, 6), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))
    assert torch.equal(kept.power, read.power)


def test_a_dead_code_and_the_busiest_become_its_two_sides():
    volumes = torch.stack([blobs(BOX, k) for k in range(4)])
    before = volumes.clone()
    pairs = split_dead(volumes, np.array([100, 40, 0, 30]), 0.05, torch.Generator().manual_seed(0))
    assert pairs == [(2, 0)]
    up, down = volumes[2] - before[0], volumes[0] - before[0]
    torch.testing.assert_close(up, -down, atol=1e-6, rtol=1e-4)  # neither is worse than the other from the start
    assert float(up.square().mean().sqrt() / before[0].square().mean().sqrt()) == pytest.approx(0.2, rel=1e-3)
    assert torch.equal(volumes[[1, 3]], before[[1, 3]])


def test_several_dead_codes_take_several_busy_ones():
    volumes = torch.stack([blobs(BOX, k) for k in range(4)])
    pairs = split_dead(volumes, np.array([100, 60, 0, 1]), 0.05, torch.Generator().manual_seed(0))
    assert pairs == [(2, 0), (3, 1)]  # 100, then 60 against the halves of 50


# --- the whole


def test_states_are_found(toy, found):
    merged, groups = merge(found)
    assert adjusted_rand_score(toy[1], merged.p.labels()) > 0.95
    assert len(merged.codes) == 3 == len(set(groups[groups >= 0]))
    assert merged.p.usage().sum() == pytest.approx(480, rel=1e-4)
    assert (np.diff(merged.usage) <= 1e-3).all()
    assert collapsed(merged.usage, merged.p) is None
    record = found.history[-1]
    assert {"iteration", "usage_entropy", "live", "log_likelihood", "temperature", "r_max", "seconds"} <= record.keys()


def test_the_embedding_separates_states_and_its_codes_are_where_their_particles_are(toy, found):
    merged, _ = merge(found)
    z, codes = embed(merged)
    assert z.shape == (480, 2) and codes.shape == (3, 2) and z.dtype == np.float32
    labels = merged.p.labels()
    nearest = np.linalg.norm(z[:, None] - codes[None], axis=2).argmin(1)
    assert (nearest == labels).mean() > 0.95
    for k in range(3):
        assert np.linalg.norm(z[labels == k].mean(0) - codes[k]) < 0.2 * np.linalg.norm(codes[k] - codes.mean(0))


def test_principal_components_rebuild_the_maps():
    maps = torch.stack([blobs(BOX, k) for k in range(4)])
    mean, basis, codes = principal_components(maps, np.array([4.0, 3, 2, 1]))
    assert torch.allclose(mean + torch.tensordot(codes, basis, 1), maps, atol=1e-4)
    assert torch.allclose(basis.flatten(1) @ basis.flatten(1).T, torch.eye(3), atol=1e-4)


def test_threads_and_groups_of_codes_do_not_change_the_result(toy, found):
    torch.set_num_threads(2)
    try:
        assert same(VoxelEM(toy[0], SMALL).run(progress=False), found)
    finally:
        torch.set_num_threads(1)
    few = SMALL.changed(iterations=5)
    whole = VoxelEM(toy[0], few).run(progress=False)
    grouped = VoxelEM(toy[0], few, memory_gib=2.5e-4, cache_gib=0.0).run(progress=False)
    assert len(VoxelEM(toy[0], few, memory_gib=2.5e-4)._groups(8)) > 1
    assert torch.allclose(whole.codes, grouped.codes, atol=1e-3)


@pytest.mark.parametrize("rule", ["likelihood", "zcos", "kernel"])
def test_rules_do_not_depend_on_the_scale_of_the_images(toy, rule):
    particles, labels = toy
    loud = replace(particles, images=ArrayImages(particles.read(slice(None)) * 10), noise=particles.noise * 100)
    options = SMALL.changed(assign=rule, iterations=5)
    one, ten = (VoxelEM(data, options).run(progress=False) for data in (particles, loud))
    assert (one.p.labels() == ten.p.labels()).mean() > 0.98
    assert adjusted_rand_score(labels, one.p.labels()) > 0.5


def test_finish_improves_given_shares(toy):
    particles, labels = toy
    generator = np.random.default_rng(0)
    p = 0.4 * np.eye(3)[labels] + 0.6 * generator.dirichlet(np.ones(3), len(labels))
    result = finish(particles, ClassWeights.from_dense(p), SMALL.changed(em_finish=3))
    assert (result.p.labels() == labels).mean() > 0.95 > (p.argmax(1) == labels).mean()


def test_pixel_sizes_of_rows_are_honoured(toy):
    """A finer pixel makes a coefficient's true frequency higher: it belongs further out in the common volume."""
    particles, _ = toy
    table, pixel = particles.ctf.copy(), particles.pixel_size.copy()
    table[1::4, 1] /= 1.1
    pixel[1::4] /= 1.1
    engine = VoxelEM(replace(particles, pixel_size=pixel, ctf=table), SMALL)
    chunk = next(engine.images.chunks(np.arange(4), 8))
    scale = torch.linalg.det(chunk.rotation) ** (1 / 3)
    assert torch.allclose(scale, torch.tensor([1, 1.1, 1, 1]), atol=1e-4)


# --- stopping and going on


def test_resume_is_exact(toy, found, tmp_path: Path):
    class Enough(Exception):  # noqa: N818
        pass

    def stop(state, record):
        if state.iteration == 3:
            raise Enough

    run = RunDir(tmp_path)
    with pytest.raises(Enough):
        VoxelEM(toy[0], SMALL).run(run=run, progress=False, on_iteration=stop)
    again = VoxelEM(toy[0], SMALL).run(run=run, resume=True, progress=False)
    assert same(again, found)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(found.history) + 1))
    assert same(VoxelEM(toy[0], SMALL).run(run=run, resume=True, progress=False), found)
    with pytest.raises(InputError, match="cannot be continued"):
        VoxelEM(toy[0], SMALL.changed(prior=0.3)).run(run=run, resume=True, progress=False)


SCRIPT = """
    import sys, time
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    from pathlib import Path
    from hype_toy import blob_particles, blobs
    from cryosuite.data.workdir import RunDir
    from cryosuite.methods.kraqen_options import KraqenOptions
    from cryosuite.methods.kraqen_voxel import VoxelEM
    particles, _ = blob_particles([blobs(16, seed) for seed in (1, 2, 3)], 480, noise=1.0, seed=4)
    options = KraqenOptions(m_step="wiener", n_codes=5, iterations=8, start_images=200, images_per_code=40)
    def told(state, record):
        print(state.iteration, flush=True)
        time.sleep(0.4)
    found = VoxelEM(particles, options).run(run=RunDir(Path({run!r})), progress=False, on_iteration=told)
    sys.exit(found.exit_code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGKILL"])
def test_killed_and_resumed_gives_the_same(toy, found, tmp_path: Path, name: str):
    script = textwrap.dedent(SCRIPT).format(tests=str(Path(__file__).parent), run=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "3":
            break
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=60)
    assert process.returncode == (-9 if name == "SIGKILL" else 85)
    assert same(VoxelEM(toy[0], SMALL).run(run=RunDir(tmp_path), resume=True, progress=False), found)


def test_a_signal_after_the_last_look_is_not_lost(toy, found, tmp_path: Path):
    """It came while the last maps were made, and minutes of joining codes followed."""
    last = len(found.history)

    def ask(state, record):
        if state.iteration == last:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = VoxelEM(toy[0], SMALL).run(run=RunDir(tmp_path), progress=False, on_iteration=ask)
    assert (stopped.stopped, stopped.exit_code, len(stopped.history)) == ("SIGTERM", 85, last)
    whole = VoxelEM(toy[0], SMALL).run(run=RunDir(tmp_path), resume=True, progress=False)
    assert whole.stopped == "" and same(whole, found)


# --- bad days


def test_more_codes_than_images(toy):
    with pytest.warns(UserNotice, match="codes for 4 images"):
        engine = VoxelEM(toy[0].subset(np.arange(4)), SMALL.changed(n_codes=50, iterations=3))
    merged, _ = merge(engine.run(progress=False))
    assert merged.p.usage().sum() == pytest.approx(4, rel=1e-4)
    z, codes = embed(merged)
    assert np.isfinite(z).all() and len(codes) == len(merged.codes)


def test_one_image(toy):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserNotice)
        found = VoxelEM(toy[0].subset(np.arange(1)), SMALL.changed(iterations=2)).run(progress=False)
    merged, _ = merge(found)
    assert merged.p.labels().tolist() == [0] and bool(torch.isfinite(merged.codes).all())
    assert "one code" in (collapsed(merged.usage, merged.p) or "")
    assert embed(merged)[0].shape == (1, 1)


def test_one_state_ends_as_one_code_and_says_so():
    particles, _ = blob_particles([blobs(BOX, 1)], 400, noise=1.0, seed=4)
    merged, _ = merge(VoxelEM(particles, SMALL.changed(n_codes=3)).run(progress=False))
    assert len(merged.codes) == 1
    assert "same state" in (collapsed(merged.usage, merged.p) or "")


def test_undecided_assignments_are_told():
    p = np.full((50, 4), 0.25)
    assert "undecided" in (collapsed(p.sum(0), ClassWeights.from_dense(p)) or "")
    skewed = np.r_[np.full(98, 0), 1, 2]
    assert "collapsed" in (collapsed(np.bincount(skewed), ClassWeights.from_labels(skewed)) or "")


def test_images_without_ctf_signal_get_the_usage(toy):
    """Zero-CTF images say nothing: they are shared out as the others are, and leave the maps alone."""
    particles, labels = toy
    scale = np.ones(480, np.float32)
    scale[:20] = 0
    found = VoxelEM(replace(particles, extras={"scale": scale}), SMALL).run(progress=False)
    assert bool(torch.isfinite(found.codes).all())
    merged, _ = merge(found)
    assert adjusted_rand_score(labels[20:], merged.p.labels()[20:]) > 0.9
    with pytest.raises(InputError, match="CTF is zero everywhere"):
        VoxelEM(replace(particles, extras={"scale": np.zeros(480, np.float32)}), SMALL)


def test_a_nan_image_is_left_out_and_named(toy):
    particles, labels = toy
    images = particles.read(slice(None)).copy()
    images[7, 3, 3] = np.nan
    with pytest.warns(UserNotice, match="1 of 480 images were left out.*image 7 of the original"):
        found = VoxelEM(replace(particles, images=ArrayImages(images)), SMALL).run(progress=False)
    assert found.p.labels()[7] == -1 and bool(torch.isfinite(found.codes).all())
    merged, _ = merge(found)
    assert adjusted_rand_score(np.delete(labels, 7), np.delete(merged.p.labels(), 7)) > 0.9


def test_no_poses_and_bad_boxes_are_said(toy):
    with pytest.raises(InputError, match="rotations"):
        VoxelEM(replace(toy[0], rotation=None), SMALL)
    with pytest.raises(InputError, match="cluster-box"):
        VoxelEM(toy[0], SMALL.changed(cluster_box=7))
    with pytest.raises(InputError, match="do not fit"):
        VoxelEM(toy[0], SMALL).run(start=ClassWeights.from_labels(np.zeros(480)), progress=False)


def test_temperature_follows_the_options(toy):
    found = VoxelEM(toy[0], SMALL.changed(t_max=8.0)).run(progress=False)
    expected = [assignment.annealed(i / 7, 8.0, 1.0, 0.8) for i in range(8)]
    assert [line["temperature"] for line in found.history] == pytest.approx(expected[: len(found.history)])
    assert math.isclose(found.history[-1]["temperature"], 1.0)


@pytest.mark.parametrize("changes", [{"t_max": 30.0}, {"march_from": 0.25, "march_over": 1.0}])
def test_a_run_does_not_end_before_its_last_temperature_and_radius(changes):
    """Two easy states: no image changes its code from the second or third iteration on."""
    particles, _ = blob_particles([blobs(BOX, 3, 8), blobs(BOX, 11, 3)], 60, noise=0.1)
    options = SMALL.changed(n_codes=2, iterations=16, split=False, **changes)
    last = VoxelEM(particles, options).run(progress=False).history[-1]
    assert (last["temperature"], last["r_max"]) == (1.0, BOX // 2)


def test_finish_begins_at_the_last_temperature(toy):
    shares = ClassWeights.from_labels(toy[1])
    found = finish(toy[0], shares, SMALL.changed(n_codes=3, em_finish=3, t_max=30.0))
    assert {line["temperature"] for line in found.history} == {1.0}


def test_finish_takes_more_codes_than_images(toy):
    """As a network may have; the numbers of the codes stay."""
    few, shares = toy[0].subset(np.arange(4)), ClassWeights.from_labels(np.array([0, 6, 3, 6]), 9)
    found = finish(few, shares, SMALL.changed(em_finish=2))
    assert found.p.n_classes == len(found.codes) == 9 and np.isfinite(found.codes.numpy()).all()


def test_a_broken_image_has_no_latent(toy):
    images = toy[0].read(slice(None)).copy()
    images[7, 3, 3] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserNotice)
        found = VoxelEM(replace(toy[0], images=ArrayImages(images)), SMALL).run(progress=False)
        z, _ = embed(merge(found)[0])
    assert np.flatnonzero(~np.isfinite(z).all(1)).tolist() == [7]
