"""Diagnosis: every planted mistake is named, a right set passes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import reconstruct_toy as toy

from cryosuite.data.images import ArrayImages
from cryosuite.reconstruct import inspect
from cryosuite.reconstruct.backproject import flip_hand
from cryosuite.reconstruct.diagnose import best_trial, compare_hands, map_skewness, try_alternatives, view_coverage

POINTS = 400


@pytest.fixture(scope="module")
def noisy():
    return toy.particles(n=1000, noise=1.0)


def planted(particles, mistake):
    array = particles.images.array
    if mistake == "rotations transposed":
        return replace(particles, rotation=particles.rotation.transpose(0, 2, 1).copy())
    if mistake == "shifts negated":
        return replace(particles, shift=-particles.shift)
    if mistake == "shifts x and y swapped":
        return replace(particles, shift=particles.shift[:, ::-1].copy())
    if mistake == "images mirrored":
        return replace(particles, images=ArrayImages(np.roll(array[:, ::-1], 1, axis=1)))
    if mistake == "no shifts":
        f = np.fft.fftfreq(32) * 32
        phase = np.exp(
            -2j * np.pi * (f[:, None] * particles.shift[:, 1, None, None] + f * particles.shift[:, :1, None])
        )
        return replace(particles, images=ArrayImages(np.fft.ifft2(np.fft.fft2(array) * phase).real.astype(np.float32)))
    return particles


@pytest.mark.parametrize(
    "mistake",
    ["none", "rotations transposed", "shifts negated", "shifts x and y swapped", "images mirrored", "no shifts"],
)
def test_planted_mistakes_are_named(noisy, mistake):
    particles = planted(noisy, mistake)
    trials = try_alternatives(particles, 1000, 32)
    best, clear = best_trial(trials, 1000, POINTS)
    findings = inspect.inspect_conventions(particles, trials, 1000)
    if mistake == "none":
        assert not clear
        assert findings[0].status == inspect.OK
    else:
        assert clear
        assert best.alternative.name == mistake
        assert findings[0].status == inspect.FAIL
        assert best.alternative.advice in findings[0].advice


def test_poses_of_other_particles_fail(noisy):
    shuffled = replace(noisy, rotation=noisy.rotation[np.random.default_rng(0).permutation(1000)])
    trials = try_alternatives(shuffled, 1000, 32)
    finding = inspect.inspect_conventions(shuffled, trials, 1000)[0]
    assert finding.status == inspect.FAIL
    assert "tell nothing" in finding.advice or "fits the images better" in finding.found


def test_flipped_phases_are_noticed():
    """Where the CTF changes sign well inside the box, images without these sign changes stand out."""
    from cryosuite.kernels.ctf import ctf

    particles = toy.particles(n=600)
    particles = replace(particles, pixel_size=np.full(600, 2.0, np.float32), ctf=particles.ctf.copy())
    particles.ctf[:, 1] = 2.0
    f = torch.fft.fftfreq(32)
    grid = torch.stack(torch.meshgrid(f, f, indexing="xy"), -1).reshape(-1, 2)
    wanted = ctf(grid, particles.ctf_params()).reshape(-1, 32, 32).abs()
    plain = toy.particles(n=600, with_ctf=False)
    images = torch.fft.ifft2(torch.fft.fft2(torch.from_numpy(plain.images.array)) * wanted).real.numpy()
    flipped = replace(particles, images=ArrayImages(images), rotation=plain.rotation, shift=plain.shift)
    best, clear = best_trial(try_alternatives(flipped, 600, 32), 600, POINTS)
    assert clear
    assert best.alternative.name == "phases already flipped"


def test_contrast(noisy):
    trials = try_alternatives(noisy, 500, 32)
    assert map_skewness(trials[0].map) > inspect.SKEWED
    assert inspect.inspect_contrast(noisy, trials).status == inspect.OK
    dark = replace(noisy, images=ArrayImages(-noisy.images.array))
    finding = inspect.inspect_contrast(dark, try_alternatives(dark, 500, 32))
    assert finding.status == inspect.FAIL
    assert "--invert-data" in finding.advice


def test_hand_is_told_by_a_reference_only(noisy):
    found = try_alternatives(noisy, 1000, 32)[0].map
    same, mirrored = compare_hands(found, toy.volume(32))
    assert same > 0.95
    assert mirrored < same - 0.2
    assert compare_hands(found, flip_hand(toy.volume(32)))[1] > 0.95


def test_view_coverage():
    filled, largest = view_coverage(toy.particles(n=3000, box=8).rotation)
    assert filled > 0.95
    assert largest == pytest.approx(1 / 3, abs=0.03)
    one = np.broadcast_to(np.eye(3, dtype=np.float32), (100, 3, 3))
    filled, largest = view_coverage(one)
    assert filled < 0.02
    assert largest == pytest.approx(1.0)


def test_numbers_that_stand_out(noisy):
    def status(findings, what):
        return next(one for one in findings if one.what == what).status

    assert {one.status for one in inspect.inspect_metadata(noisy)} == {"ok"}
    micrometres = replace(noisy, ctf=noisy.ctf * np.float32([1, 1, 1e-4, 1e-4, 1, 1, 1, 1, 1]))
    assert status(inspect.inspect_metadata(micrometres), "defocus") == "fail"
    far = replace(noisy, shift=noisy.shift * 20)
    assert status(inspect.inspect_metadata(far), "shifts") == "warn"
    other = replace(noisy, pixel_size=noisy.pixel_size * 2)
    assert status(inspect.inspect_numbers(other), "pixel size of the CTF") == "fail"
    broken = noisy.images.array[:100].copy()
    broken[3, 0, 0], broken[7] = np.nan, 0.0
    found = inspect.inspect_images(replace(noisy.subset(np.arange(100)), images=ArrayImages(broken)))
    assert [one.status for one in found[:2]] == ["fail", "warn"]
    assert "3" in found[0].found
    assert "7" in found[1].found
    # and the trial maps live with them
    assert np.isfinite(try_alternatives(replace(noisy.subset(np.arange(100)), images=ArrayImages(broken)))[0].agreement)


def test_optics_groups_are_listed(golden):
    from cryosuite.data.open import open_particles

    rows = inspect.optics_rows(open_particles(golden / "relion" / "particles.star"))
    assert [row[0] for row in rows] == ["1", "2"]
    assert sum(int(row[1]) for row in rows) == 200
    assert rows[1][3] == "200"


def test_a_known_trap_in_shared_data(shared):
    """cryoDRGN's toy projections come with translations that were never applied to the stack (PEERS, section 9)."""
    from cryosuite.data.open import open_particles

    folder = shared / "data" / "stacks" / "cryodrgn"
    particles = open_particles(
        folder / "toy_projections.mrc", poses=folder / "toy_rot_trans.pkl", need_ctf=False, pixel_size=1.0
    )
    best, clear = best_trial(try_alternatives(particles), 1000, POINTS)
    assert clear
    assert best.alternative.name == "no shifts"
    assert best.agreement > 0.95
