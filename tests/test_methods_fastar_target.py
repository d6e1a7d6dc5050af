"""Tuning on one molecule: particles of a map, and real ones with known poses, are those of their projections."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import each
from hype_toy import blob_particles, blobs
from test_data_broken import told

from cryosuite.data.images import ArrayImages
from cryosuite.data.processes import Processes
from cryosuite.errors import InputError
from cryosuite.formats.mrc import write_map
from cryosuite.kernels import fourier
from cryosuite.kernels.rotations import random_rotations
from cryosuite.methods import fastar_target
from cryosuite.methods.fastar_loader import Molecules, SetLoader
from cryosuite.methods.fastar_options import HELD_OUT, FastarOptions
from cryosuite.methods.fastar_target import MapViews, PosedViews, open_target
from cryosuite.simulate.view_sets import ViewOptions

D, PIXEL = 32, 6.0
CLEAN = ViewOptions(
    images=24, views=(24, 24), templates=4, snr=(1e5, 1e5), ctf=0.0, coloured=0.0, neighbours=0.0, cones=0.0,
    jitter_deg=0.0,
)  # fmt: skip


@pytest.fixture
def ref(tmp_path: Path) -> Path:
    """A map of blobs."""
    write_map(tmp_path / "ref.mrc", blobs(D, 3, count=12).numpy(), PIXEL)
    return tmp_path / "ref.mrc"


def likeness(batch, shift_back: bool = True) -> tuple[float, float]:
    """Mean correlation of each image, centred by its shift, with its own projection and with another particle's."""
    disc = fourier.half_disc(D, 9)
    spectra = fourier.to_half_disc(batch.images[0, :, 0], disc)
    images = fourier.from_half_disc(fourier.phase_shift(spectra, disc, batch.shift[0]), disc).flatten(1)
    views = batch.candidates[0, : len(images), 0]
    views = fourier.from_half_disc(fourier.to_half_disc(views, disc), disc).flatten(1)
    both = torch.corrcoef(torch.cat([images, views]))[: len(images), len(images) :]
    own = both.diagonal()
    return float(own.mean()), float((both.sum() - own.sum()) / (both.numel() - len(own)))


def test_particles_of_a_map_are_its_projections(ref):
    target = open_target(FastarOptions("micro", map=str(ref)), D)
    stream = target.stream(CLEAN, 0, torch.device("cpu"), 1)
    assert isinstance(stream, MapViews)
    own, other = likeness(stream.batch(0))
    assert own > 0.95 and other < own - 0.2
    again = target.stream(CLEAN, 0, torch.device("cpu"), 1).batch(3)
    assert torch.equal(again.images, stream.batch(3).images)
    views = stream.views_of(0, random_rotations(7))
    assert views.shape == (1, 7, 2, D, D) and torch.isfinite(views).all()


def test_full_map_keeps_details_and_says_what_it_costs(ref):
    plain = open_target(FastarOptions("micro", map=str(ref)), D)
    with pytest.warns(match="biased"):
        full = open_target(FastarOptions("micro", map=str(ref), full_map=True), D)
    assert full.reference.volume.std() > plain.reference.volume.std() and full.key != plain.key


def test_real_particles_are_used_with_their_poses(ref, monkeypatch):
    particles, _ = blob_particles([blobs(D, 3, count=12)], 200, 0.3, seed=1)
    monkeypatch.setattr(fastar_target, "open_particles", lambda path: particles)
    target = open_target(FastarOptions("micro", map=str(ref), finetune="p.star"), D)
    stream = target.stream(CLEAN, 0, torch.device("cpu"), 1)
    assert isinstance(stream, PosedViews)
    batch = stream.batch(0)
    assert batch.images.shape == (1, 24, 2, D, D) and batch.candidates.shape == (1, 48, 2, D, D)
    flipped = replace(batch, images=batch.images.flip(2))  # the phase-flipped channel
    own, other = likeness(flipped)
    assert own > 0.4 and other < own - 0.2
    held = target.stream(CLEAN, HELD_OUT, torch.device("cpu"), 1)
    assert not set(held.rows) & set(stream.rows) and len(held.rows) + len(stream.rows) == 200
    assert torch.equal(batch.images, target.stream(CLEAN, 0, torch.device("cpu"), 1).batch(0).images)


def test_two_processes_share_the_sets_of_one(ref, monkeypatch):
    """Particles, candidates and all that is drawn are those of one process; each has every second set."""
    particles, _ = blob_particles([blobs(D, 3, count=12)], 200, 0.3, seed=1)
    monkeypatch.setattr(fastar_target, "open_particles", lambda path: particles)
    target = open_target(FastarOptions("micro", map=str(ref), finetune="p.star"), D)
    four = replace(CLEAN, images=32, views=(8, 8), jitter_deg=4.0, low_pass=(12.0, 28.0))
    whole = target.stream(four, 0, torch.device("cpu"), 1).batch(5)
    assert whole.images.shape == (4, 8, 2, D, D) and whole.candidates.shape == (4, 16, 2, D, D)
    own = replace(four, images=16)  # of each process
    for part in (0, 1):
        batch = target.stream(own, 0, torch.device("cpu"), 2).batch(5, part=part)
        for field in fields(whole):
            ours, theirs = getattr(batch, field.name), getattr(whole, field.name)[part::2]
            assert torch.allclose(ours, theirs, atol=1e-4), field.name
    assert not torch.allclose(whole.images[0], whole.images[1])


def test_broken_images_that_another_process_met_are_told_by_the_first(ref, tmp_path, monkeypatch):
    """Fifteen of 200 images, found by two processes in sets of their own."""
    posed, _ = blob_particles([blobs(D, 3, count=12)], 200, 0.3, seed=1)
    images = posed.read(np.arange(200))
    images[1::14] = np.nan
    particles = replace(posed, images=ArrayImages(images))
    monkeypatch.setattr(fastar_target, "open_particles", lambda path: particles)
    target = open_target(FastarOptions("micro", map=str(ref), finetune="p.star"), D)
    molecules = Molecules(replace(CLEAN, views=(8, 8)), 64, target=target)

    def work(processes: Processes) -> None:
        loader = SetLoader(molecules, 32, processes.rank, 2)
        broken = loader.stream.loader.broken
        said = told(lambda: list(loader.epoch(0)))
        mine = broken.rows.copy()
        said += told(lambda: loader.share_broken(processes))
        met = np.any(processes.everyone(lambda: mine), 0)
        assert met.sum() > mine.sum() > 0 and np.array_equal(broken.rows, met)
        named = " ".join(said).replace(",", " ").split()
        assert not processes.first or all(str(row) in named for row in np.flatnonzero(met))

    each(tmp_path, work, 2)


def test_too_few_particles_are_refused(ref, monkeypatch):
    particles, _ = blob_particles([blobs(D, 3)], 20, 0.3, seed=1)
    monkeypatch.setattr(fastar_target, "open_particles", lambda path: particles)
    with pytest.raises(InputError, match="20 particles"):
        open_target(FastarOptions("micro", map=str(ref), finetune="p.star"), D)


def test_a_map_without_pixel_size_is_refused(tmp_path):
    write_map(tmp_path / "bare.mrc", blobs(D, 3).numpy(), None)
    with pytest.raises(InputError, match="pixel size"), pytest.warns():
        open_target(FastarOptions("micro", map=str(tmp_path / "bare.mrc")), D)
