"""Errors of shifts are measured and taken back, and nothing moves where shifts are right or no map tells them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import each
from hype_toy import blob_particles, blobs

from cryosuite.data.images import ArrayImages
from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.kernels import fourier, slices
from cryosuite.kernels.ctf import ctf
from cryosuite.reconstruct import held_out, shifts
from cryosuite.reconstruct.class_images import ClusterImages
from cryosuite.reconstruct.class_work import ClassWork
from cryosuite.reconstruct.weights import ClassWeights

BOX, COUNT = 24, 240
ERROR = 0.6  # pixels


@pytest.fixture(scope="module")
def toy() -> ParticleSet:
    """Noisy images of one molecule."""
    return blob_particles([blobs(BOX, 1)], COUNT, noise=2.0, seed=4)[0]


def wrong(particles: ParticleSet, pixels: float, seed: int = 0) -> ParticleSet:
    """The particles with errors of their shifts."""
    error = np.random.default_rng(seed).normal(0, pixels / BOX, (len(particles), 2))
    return replace(particles, shift=(particles.shift + error).astype(np.float32))


def refined(particles: ParticleSet, labels: np.ndarray | None = None, rounds: int = 3, processes: Processes = ALONE):
    """What is found, and the work it was found with."""
    work = ClassWork(ClusterImages(particles), processes=processes)
    p = ClassWeights.from_labels(np.zeros(len(particles), int) if labels is None else labels)
    with work.threads_of_torch():
        return shifts.refine_shifts(work, p, particles.half_sets(), particles.shift, rounds), work


def off(particles: ParticleSet, shift: np.ndarray) -> float:
    """Standard deviation of the errors per coordinate, pixels."""
    return float((shift - particles.shift).std() * BOX)


def test_errors_are_measured_and_taken_back(toy):
    bad = wrong(toy, ERROR)
    found, work = refined(bad)
    assert found.error == pytest.approx(ERROR, rel=0.15)
    assert off(toy, found.shift) < 0.35 * ERROR
    assert np.array_equal(work.images.particles.shift, found.shift)
    images = torch.cat([chunk.values for chunk in work.images.chunks(np.arange(COUNT), BOX // 2)])
    again = torch.cat([c.values for c in ClusterImages(replace(bad, shift=found.shift)).chunks(np.arange(COUNT), 12)])
    assert torch.allclose(images, again, atol=1e-4 * float(again.abs().max())), "they are those of the new shifts"


def test_right_shifts_stay_as_they_are_to_the_bit(toy):
    found, work = refined(toy)
    assert found is None and work.images.particles.shift is toy.shift
    work.images.move(wrong(toy, ERROR).shift)  # somebody moved them: they go back
    assert shifts.refine_shifts(work, shifts_alone(COUNT), toy.half_sets(), toy.shift) is None
    assert work.images.particles.shift is toy.shift


def test_particles_without_shifts_count_as_centred(toy):
    """Their images are up to 1.2 pixels off, .69 in the mean square."""
    work = ClassWork(ClusterImages(replace(toy, shift=None)))
    found = shifts.refine_shifts(work, shifts_alone(COUNT), toy.half_sets(), None, 3)
    assert found.error == pytest.approx(0.69, rel=0.15)
    assert off(toy, found.shift) < 0.3


def shifts_alone(count: int) -> ClassWeights:
    """All in one class."""
    return ClassWeights.from_labels(np.zeros(count, int))


@pytest.mark.parametrize("molecules", [2, 8])
def test_one_map_of_unlike_molecules_moves_nothing_and_their_own_maps_do(molecules):
    volumes = [blobs(BOX, seed, 3) for seed in range(molecules)]
    particles, labels = blob_particles(volumes, 80 * molecules, noise=2.0, seed=5)
    bad = wrong(particles, ERROR)
    assert refined(particles)[0] is None and refined(particles, labels)[0] is None
    assert refined(bad)[0] is None, "their mean explains too little of them"
    found, _ = refined(bad, labels)
    assert off(particles, found.shift) < 0.5 * ERROR


def test_classes_that_mix_molecules_pull_no_shifts():
    """Unlike molecules in one class pull right shifts off by more than a tenth of a pixel, and farther each time."""
    particles, labels = blob_particles([blobs(BOX, seed, 3) for seed in range(4)], 320, noise=2.0, seed=5)
    work, half = ClassWork(ClusterImages(particles)), particles.half_sets()
    for mixed in (labels // 2, np.random.default_rng(0).integers(0, 16, len(labels))):
        with work.threads_of_torch():
            maps = held_out.half_maps(work, ClassWeights.from_labels(mixed), half).flip(0)
            assert shifts.measure(work, maps, mixed, half, particles.shift).error > shifts.LEAST
        assert refined(particles, mixed, rounds=1)[0] is None and refined(particles, mixed)[0] is None
    assert refined(wrong(particles, ERROR), labels)[0].error == pytest.approx(ERROR, rel=0.15)


def test_images_multiplied_by_their_ctf_move_as_if_they_were_not(toy):
    params = toy.ctf_params()
    frequency = torch.fft.fftfreq(BOX)
    grid = torch.stack(torch.meshgrid(frequency, frequency, indexing="xy"), -1).reshape(-1, 2)
    transfer = ctf(grid, params).reshape(-1, BOX, BOX)
    images = torch.from_numpy(toy.read(np.arange(COUNT)))
    again = torch.fft.ifft2(torch.fft.fft2(images) * transfer).real.numpy()
    disc = fourier.half_disc(BOX)
    square = ctf(disc.frequency, params).square().mean(0)
    shells = torch.zeros(BOX // 2 + 1).index_add_(0, disc.shell, square) / torch.bincount(disc.shell)
    noise = toy.noise * shells.numpy()  # that of the multiplied images
    multiplied = replace(toy, images=ArrayImages(again), noise=noise, ctf_premultiplied=True)
    plain, made = (next(ClusterImages(one).chunks(np.arange(9), BOX // 2)) for one in (toy, multiplied))
    assert torch.allclose(made.weights, plain.weights, rtol=1e-3, atol=1e-3 * float(plain.weights.max()))
    assert torch.allclose(made.values, plain.values, rtol=0, atol=2e-3 * float(plain.values.abs().max()))
    assert refined(multiplied)[0] is None
    assert refined(wrong(multiplied, ERROR))[0].error == pytest.approx(ERROR, rel=0.15)


def test_noise_moves_nothing(toy):
    noise = np.random.default_rng(0).normal(0, 2, (COUNT, BOX, BOX)).astype(np.float32)
    table = toy.ctf
    fresh = ParticleSet.from_array(noise, 6.0, rotation=toy.rotation, shift=toy.shift, ctf=table, noise=toy.noise)
    found, work = refined(fresh)
    assert found is None and work.images.particles.shift is fresh.shift


def test_score_and_information_are_derivatives_of_the_likelihood(toy):
    """By finite differences of the log-likelihood; the information is that of a noise-free image."""
    work = ClassWork(ClusterImages(toy))
    half, rows = toy.half_sets(), np.arange(6)
    with work.threads_of_torch():
        maps = held_out.half_maps(work, shifts_alone(COUNT), half)
        sums = shifts._sums(work, maps, rows, np.zeros(COUNT, int), half)
    disc = fourier.half_disc(BOX)

    def likelihood(offset: np.ndarray) -> np.ndarray:
        moved = toy.shift.astype(np.float64).copy()
        moved[rows] += offset
        chunk = next(ClusterImages(replace(toy, shift=moved)).chunks(rows, BOX // 2))
        out = []
        for i in range(len(rows)):
            transform = slices.volume_transform(maps[1 - half[i], 0], correct_gridding=True)
            S = slices.extract_slices(transform, chunk.rotation[i : i + 1], disc)[0]
            out.append(2 * float((S.conj() * chunk.values[i]).real.double().sum()))
        return np.array(out)

    step = 0.02 / BOX
    for axis in range(2):
        e = np.eye(2)[axis] * step
        slope = (likelihood(e) - likelihood(-e)) / (2 * step)
        np.testing.assert_allclose(sums[rows, axis], slope, rtol=2e-3, atol=2e-3 * np.abs(slope).max())
    # of an image that is its own slice the curvature of the likelihood is minus the information
    work.images.move(toy.shift)
    for i in range(len(rows)):
        chunk = next(work.images.chunks(rows[i : i + 1], BOX // 2))
        transform = slices.volume_transform(maps[1 - half[i], 0], correct_gridding=True)
        S = slices.extract_slices(transform, chunk.rotation, disc)[0].to(torch.complex128)
        weight = chunk.weights[0].double()

        def own(offset: torch.Tensor, S=S, weight=weight) -> torch.Tensor:
            phase = -2 * np.pi * disc.xy.double() @ offset
            return 2 * (S.abs().square() * weight * torch.cos(phase)).sum()

        curvature = torch.autograd.functional.hessian(own, torch.zeros(2, dtype=torch.float64)).numpy()
        np.testing.assert_allclose(sums[i, [2, 3, 3, 4]].reshape(2, 2), -curvature, rtol=1e-4)


def test_two_processes_find_what_one_finds(toy, tmp_path: Path):
    bad = wrong(toy, ERROR)
    alone = refined(bad)[0]

    def work(processes: Processes) -> None:
        found = refined(bad, processes=processes)[0]
        np.testing.assert_allclose(found.shift, alone.shift, atol=1e-4 / BOX)
        assert found.error == pytest.approx(alone.error, rel=1e-3)

    each(tmp_path, work, 2)


def test_half_sets_measured_each_by_itself_find_the_same(toy):
    bad = wrong(toy, ERROR)
    particles, found = shifts.refined_within_classes(bad, shifts_alone(COUNT))
    assert np.array_equal(particles.shift, found.shift)
    other = refined(bad, rounds=2)[0].shift
    assert off(toy, found.shift) < 0.35 * ERROR and float((found.shift - other).std() * BOX) < 0.1
    particles, found = shifts.refined_within_classes(toy, shifts_alone(COUNT))
    assert found is None and particles.shift is toy.shift
