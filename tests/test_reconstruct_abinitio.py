"""Poses, classes and maps from nothing: the E-step against brute force, and whole searches on small sets."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hype_toy import blob_particles, blobs

from cryosuite.data.loader import BatchLoader
from cryosuite.data.open import open_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.data.spectra import measure_spectra, whitened
from cryosuite.errors import InputError
from cryosuite.kernels import ctf, fourier, pose_search
from cryosuite.kernels.pose_search import Candidates
from cryosuite.kernels.rotations import expmap, geodesic_deg, random_rotations
from cryosuite.kernels.slices import extract_slices, volume_transform
from cryosuite.metrics.clustering import agreement
from cryosuite.metrics.poses import pose_errors, pose_report
from cryosuite.reconstruct import abinitio_em as em
from cryosuite.reconstruct import abinitio_restarts as restarts
from cryosuite.reconstruct import abinitio_rounds as rounds
from cryosuite.reconstruct import abinitio_starts as starts
from cryosuite.reconstruct.abinitio import ANEW, ANYWHERE, NEAR, OWN, REPEATS, AbInitio, AbInitioOptions, planned
from cryosuite.reconstruct.abinitio_starts import choose_maps, options_for
from cryosuite.reconstruct.backproject import reconstruct_classes

BOX = 24
QUICK = AbInitioOptions(
    starts=1, iterations=16, batch=150, radius=(3, 5), shift_extent=0.06, rounds=((5, True), (8, True), (12, False))
)


def test_opposite_in_plane_angles_give_the_conjugate_slice() -> None:
    """The grid's second half is the first one turned by 180 degrees about the view."""
    grid = em.make_grid(1, 0.1, 3)
    angle = geodesic_deg(grid.rotation, grid.opposite)
    assert torch.allclose(angle, torch.full_like(angle, 180.0), atol=0.05)
    assert torch.allclose(grid.rotation[:, 2], grid.opposite[:, 2], atol=1e-5)
    assert len(torch.unique(torch.cat([grid.rotation, grid.opposite]).round(decimals=4), dim=0)) == 4608 // 8
    disc, transform = fourier.half_disc(BOX, 6), volume_transform(blobs(BOX, 0))
    there, back = (extract_slices(transform, part[:50], disc) for part in (grid.rotation, grid.opposite))
    assert torch.allclose(there, back.conj(), atol=1e-3 * float(there.abs().max()))


def test_expectation_equals_brute_force() -> None:
    """Posterior, evidence and both sums of the M-step, against a loop over every candidate in float64."""
    generator = torch.Generator().manual_seed(0)
    disc = fourier.half_disc(16, 3)
    P, K, b, T = len(disc), 2, 3, 2.5
    grid = em.make_grid(0, 0.08, 2)
    Q = len(grid)
    complex_ = lambda *shape: torch.complex(*(torch.randn(*shape, generator=generator) for _ in range(2)))  # noqa: E731
    slices, y = complex_(K, Q, P), complex_(b, P)
    c = torch.randn(b, P, generator=generator)
    bias = torch.tensor([0.2, -0.2])
    got = em.expect(slices, y, c, grid, disc, T, bias)

    both = torch.cat([slices, slices.conj()], 1).to(torch.complex128)  # (K, 2Q, P)
    moved = torch.stack([fourier.phase_shift(y, disc, t.expand(b, 2)) for t in grid.shift], 1).to(torch.complex128)
    c64 = c.double()
    cross = 2 * torch.einsum("bp,bsp,kqp->bskq", c64.to(moved.dtype), moved, both.conj()).real
    norm = torch.einsum("bp,kqp->bkq", c64.square(), both.abs().square())
    logits = (cross - norm[:, None]) / T + bias.double()[:, None] + grid.log_prior.double()[:, None, None]
    p = logits.flatten(1).softmax(1).view_as(logits)
    assert torch.allclose(got.evidence.double(), logits.flatten(1).logsumexp(1), rtol=1e-5)
    assert torch.allclose(got.share.double(), p.sum((1, 3)), atol=1e-5)
    folded = p[..., :Q], p[..., Q:]
    data = torch.einsum("bskq,bp,bsp->kqp", folded[0].to(moved.dtype), c64.to(moved.dtype), moved)
    data = data + torch.einsum("bskq,bp,bsp->kqp", folded[1].to(moved.dtype), c64.to(moved.dtype), moved.conj())
    assert torch.allclose(got.data.to(data.dtype), data, atol=1e-4)
    weight = torch.einsum("bskq,bp->kqp", folded[0] + folded[1], c64.square())
    assert torch.allclose(got.weight.double(), weight, atol=1e-4)
    place = logits.flatten(1).argmax(1)
    s, k, q = torch.unravel_index(place, (len(grid.shift), K, 2 * Q))
    assert torch.equal(got.label, k) and torch.equal(got.best, q) and torch.equal(got.shift, s)


def test_expectation_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images handled one at a time or together give the same sums."""
    generator = torch.Generator().manual_seed(1)
    disc, grid = fourier.half_disc(16, 3), em.make_grid(0, 0.08, 2)
    slices = torch.randn(1, len(grid), len(disc), dtype=torch.complex64, generator=generator)
    y = torch.randn(7, len(disc), dtype=torch.complex64, generator=generator)
    c = torch.randn(7, len(disc), generator=generator)
    whole = em.expect(slices, y, c, grid, disc, 1.0, torch.zeros(1))
    monkeypatch.setattr(em, "LOGITS", 1)
    parts = em.expect(slices, y, c, grid, disc, 1.0, torch.zeros(1))
    assert torch.allclose(whole.data, parts.data, atol=1e-4) and torch.allclose(whole.weight, parts.weight, atol=1e-4)
    assert torch.allclose(whole.evidence, parts.evidence, atol=1e-4)


def _run(engine: AbInitio) -> AbInitio:
    while not engine.done:
        engine.advance()
    return engine


@pytest.mark.slow
def test_poses_of_one_molecule_are_found() -> None:
    """Median rotation error after alignment and hand below 3 degrees, shifts below half a pixel."""
    particles, _ = blob_particles([blobs(BOX, 3, 8)], 600, noise=1.0)
    options = AbInitioOptions(starts=2, iterations=40, shift_extent=0.06, rounds=QUICK.rounds)
    engine = _run(AbInitio(particles, options))
    found = engine.found
    errors = pose_errors(found.rotation, particles.rotation, found.shift * BOX, particles.shift * BOX).summary()
    assert errors["rotation_median_deg"] < 3 and errors["shift_median"] < 0.5, errors
    assert engine.position == engine.total
    assert (found.margin >= 0).all() and (found.score > 0).mean() > 0.9


@pytest.mark.slow
def test_poses_of_groups_with_other_pixels_are_found() -> None:
    """Images with pixels 6 % larger among others end as near to the truth."""
    particles, _ = at_two_scales(blobs(BOX, 3, 8), 600, 1.0)
    options = AbInitioOptions(starts=2, iterations=40, shift_extent=0.06, rounds=QUICK.rounds)
    found = _run(AbInitio(particles, options)).found
    errors = pose_errors(found.rotation, particles.rotation, found.shift * BOX, particles.shift * BOX).degrees
    one, other = (float(np.median(part)) for part in (errors[:300], errors[300:]))
    assert one < 3 and other < 1.3 * one, (one, other)


@pytest.mark.slow
def test_two_molecules_are_told_apart() -> None:
    """Classes of a mixture of two agree with the truth."""
    particles, labels = blob_particles([blobs(BOX, 3, 8), blobs(BOX, 11, 4)], 800, noise=0.7)
    options = AbInitioOptions(classes=2, starts=2, iterations=40, shift_extent=0.06, rounds=QUICK.rounds)
    found = _run(AbInitio(particles, options)).found
    assert agreement(labels, found.label)[0] > 0.9


def at_two_scales(volume: torch.Tensor, n: int, noise: float, larger: float = 1.06) -> tuple[ParticleSet, torch.Tensor]:
    """Projections of one molecule, those of the second half with larger pixels; and the molecule as dark as there."""
    particles, _ = blob_particles([volume], n)
    table, scale = particles.ctf.copy(), torch.ones(n)
    table[n // 2 :, 1] *= larger
    scale[n // 2 :] /= larger  # a point of such an image lies further in
    disc, t = fourier.half_disc(BOX), torch.from_numpy(particles.shift)
    slices = extract_slices(volume_transform(volume), torch.from_numpy(particles.rotation) * scale[:, None, None], disc)
    slices = slices * ctf.ctf(disc.frequency, ctf.CtfParams.from_table(torch.from_numpy(table)))
    images = fourier.from_half_disc(fourier.phase_shift(slices, disc, -t), disc)
    dark = float(images.std())
    images = images / dark + noise * torch.randn(images.shape)
    pixel = table[:, 1].astype(np.float32)
    made = ParticleSet.from_array(images.numpy(), pixel, rotation=particles.rotation, shift=particles.shift)
    spectrum = np.full((1, BOX // 2 + 1), noise**2 * BOX**2, np.float32)
    return replace(made, ctf=table, noise=spectrum), volume / dark


def test_images_of_other_pixels_are_refined_at_their_own_scale() -> None:
    """Poses off by some degrees come as near to the truth in a group with pixels 6 % larger as in the other."""
    particles, volume = at_two_scales(blobs(BOX, 3, 8), 64, 0.3)
    truth, turned = torch.from_numpy(particles.rotation), expmap(torch.randn(64, 3) * np.deg2rad(3))
    place, reach = rounds.image_scales(particles)
    assert torch.allclose(place[0], torch.eye(2)) and torch.allclose(place[-1], torch.eye(2) / 1.06) and reach == 1
    assert rounds.image_scales(particles.subset(np.arange(32))) == (None, 1.0)
    target = whitened(
        BatchLoader(replace(particles, shift=None), 64, shuffle=False, prefetch=0).batch(np.arange(64)),
        fourier.half_disc(BOX, 12), torch.from_numpy(particles.noise).sqrt(), False, torch.ones(BOX, BOX),
    )  # fmt: skip
    maps = rounds.RoundMaps(volume[None], None, 12, NEAR, AbInitioOptions(), torch.device("cpu"), reach)
    before = Candidates((turned @ truth)[:, None], torch.from_numpy(particles.shift)[:, None] * BOX, torch.zeros(64, 1))

    def errors(place: torch.Tensor | None) -> tuple[float, float]:
        none = torch.zeros(64, dtype=torch.int64)
        found = maps.search(target.values, target.ctf, none, none, before, place)[0]
        off = geodesic_deg(found.rotation[:, 0], truth)
        return float(off[:32].median()), float(off[32:].median())

    one, other = errors(place)
    assert other < 1.5 * one and one < 1.5
    assert errors(None)[1] > 1.5 * other


def test_images_are_brought_onto_their_mean() -> None:
    """Shifts by the mean of all images: off by less than half of what they were, whatever the orientations."""
    whole = small_blobs(32)
    whole = whole + whole.flip(0, 1, 2).roll((1, 1, 1), (0, 1, 2))  # its middle is that of the box
    particles, _ = blob_particles([whole], 500, noise=1.0)
    disc = fourier.half_disc(32, 4)
    batch = BatchLoader(replace(particles, shift=None), 500, shuffle=False, prefetch=0).batch(np.arange(500))
    target = whitened(batch, disc, torch.from_numpy(particles.noise).sqrt(), False, torch.ones(32, 32))
    signal = measure_spectra(particles, True).signal
    found = em.middles(target.values, target.ctf, signal, disc, 0.08).numpy()
    off, was = (float(np.sqrt(np.mean(x**2))) for x in (found - particles.shift, particles.shift))
    assert off < was / 2, (off * 32, was * 32)


@pytest.mark.slow
def test_a_small_molecule_in_a_large_box_is_found(shared: Path, tmp_path: Path) -> None:
    """3e0c, 120 A of 320: right up to the radius of single maps; up to 7 there is nothing to be seen of its poses."""
    given = "--structures", shared / "data" / "atomic" / "train" / "3e0c.cif.gz", "-n", 1000, "-D", 32, "--snr", 0.1
    command = [sys.executable, "-m", "cryosuite", "simulate", *given, "--seed", 0, "-o", tmp_path / "set"]
    subprocess.run([str(part) for part in command], check=True)
    particles = open_particles(tmp_path / "set")

    def median_error(options: AbInitioOptions) -> float:
        found = _run(AbInitio(particles, options)).found
        truth = particles.rotation, particles.shift
        return pose_report(found.rotation, truth[0], found.shift, truth[1], 32).aligned["median_deg"]

    assert median_error(options_for(1, starts=1, heat=(0.1,))) < 8
    assert median_error(AbInitioOptions(starts=1)) > 30


def small_blobs(box: int) -> torch.Tensor:
    """An elongated molecule whose ends differ little, in a box twice as large as it is long."""
    axis = torch.arange(box) - box // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    volume = torch.zeros(box, box, box)
    for cx, cy, cz, height in (
        (-4, 0, 0, 1.0), (-1.5, 0.8, 0, 1.0), (1.5, -0.8, 0, 1.0), (4, 0, 0, 1.0), (4, 2, 0.5, 0.6), (-3, 0, 2.2, 0.6),
    ):  # fmt: skip
        volume += height * torch.exp(-((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2) / 2.0)
    return volume


def test_maps_are_chosen_for_what_they_add() -> None:
    """Greedy alone takes the map that is fair for all first; exchanges find the two specialists."""
    generator = torch.Generator().manual_seed(0)
    evidence = torch.zeros(100, 4)
    evidence[:50, 0], evidence[50:, 1], evidence[:, 2] = 10.0, 10.0, 6.0
    evidence += 0.01 * torch.rand(100, 4, generator=generator)
    assert choose_maps(evidence, 1) == [2]
    assert choose_maps(evidence, 2) == [0, 1]
    assert choose_maps(evidence, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("coarse", [7, 2])
def test_goes_on_exactly_from_any_unit(coarse: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state saved after any unit leads to the same poses, bit by bit; also where images carry their shifts along."""
    monkeypatch.setattr(starts, "COARSE", coarse)
    particles, _ = blob_particles([blobs(BOX, 3, 8)], 520, noise=1.0)
    options = AbInitioOptions(starts=2, iterations=3, batch=40, settle=2, radius=(2, 3), rounds=((4, True), (6, False)))
    straight = AbInitio(particles, options)
    states = []
    while not straight.done:
        states.append(torch.load(_stored(straight.state_dict()), weights_only=True))
        straight.advance()
    for at in (1, 3, 7, 9, len(states) - 1):
        again = AbInitio(particles, options)
        again.load_state_dict(states[at])
        _run(again)
        assert np.array_equal(again.found.rotation, straight.found.rotation), at
        assert np.array_equal(again.found.shift, straight.found.shift), at


@pytest.mark.slow
def test_a_mixture_goes_on_exactly_from_any_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its starts, its rounds, and while its classes begin anew; the position only grows, and ends at the total."""
    monkeypatch.setattr(restarts, "STARTS", 1)
    for name, value in (("iterations", 2), ("settle", 1), ("batch", 100), ("radius", (7, 8))):
        monkeypatch.setitem(starts.ONE, name, value)
    particles, _ = blob_particles([blobs(BOX, 3, 8), blobs(BOX, 11, 4)], 300, noise=0.7)
    options = AbInitioOptions(
        classes=2, starts=1, iterations=3, batch=40, settle=1, radius=(2, 3), rounds=((4, True), (6, False))
    )
    straight, states, positions, stages = AbInitio(particles, options), [], [], []
    while not straight.done:
        states.append(torch.load(_stored(straight.state_dict()), weights_only=True))
        positions.append(straight.position)
        stages.append("anew" if states[-1]["anew"] else "")
        straight.advance()
    assert positions == sorted(positions) and straight.position == straight.total
    inside = [number for number, stage in enumerate(stages) if stage]
    assert len(inside) >= 3
    for at in (2, inside[0], inside[-1], len(states) - 1):
        again = AbInitio(particles, options)
        again.load_state_dict(states[at])
        assert again.position == positions[at]
        _run(again)
        assert np.array_equal(again.found.rotation, straight.found.rotation), at
        assert np.array_equal(again.found.label, straight.found.label), at


def test_rounds_of_a_mixture_are_repeated() -> None:
    """Cheap global rounds of a mixture are repeated, and follow the new starts; one molecule has each round once."""
    options = AbInitioOptions(rounds=((8, True), (24, True), (32, False), (32, False)))
    last = [(24, ANYWHERE), (32, NEAR), (32, NEAR)]
    assert planned(options, 32) == [(8, ANYWHERE), *last]
    low = [(8, ANYWHERE)] * REPEATS
    assert planned(replace(options, classes=3), 32) == [*low, ANEW, (8, OWN), *low, *last]
    both = replace(options, classes=3, rounds=((6, True), *options.rounds))
    assert planned(both, 32) == [*[(6, ANYWHERE)] * REPEATS, *low, ANEW, (8, OWN), *low, *last]
    assert planned(options, 16) == [(8, ANYWHERE), (16, ANYWHERE), (16, NEAR), (16, NEAR)]


def _true_maps(particles, labels: np.ndarray) -> torch.Tensor:
    """(K, D, D, D) maps with the true poses and classes, in the grey values of the images."""
    maps = reconstruct_classes(particles, labels, regularise="fsc")
    return torch.stack([maps[k].map for k in range(int(labels.max()) + 1)])


def test_an_image_is_judged_by_the_other_half_set() -> None:
    """Without half map 0 the images of half set 1, and they alone, do not know their class."""
    particles, labels = blob_particles([blobs(BOX, 3, 8), blobs(BOX, 11, 4)], 200, noise=0.3)
    true, found = _true_maps(particles, labels), []
    for first in (true, torch.zeros_like(true)):
        engine = AbInitio(particles, AbInitioOptions(classes=2, rounds=((8, True), (8, False))))
        engine.starts.state.update(start=engine.options.starts, settled=engine.options.settle)
        engine.state.update(volumes=true, halves=torch.stack([first, true]))
        engine.advance()
        found.append(engine.state["poses"]["label"].numpy().copy())
    half = engine.half.numpy()
    assert (found[0] == labels).mean() > 0.9
    assert np.array_equal(found[0][half == 0], found[1][half == 0])
    assert (found[1][half == 1] == 0).all()


@pytest.mark.slow
def test_new_starts_are_taken_where_they_explain_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class with the map of another molecule gets a new one, a class with its own keeps it, a tiny one too."""
    monkeypatch.setattr(restarts, "STARTS", 1)
    for name, value in (("iterations", 12), ("batch", 200), ("radius", (4, 8))):
        monkeypatch.setitem(starts.ONE, name, value)
    particles, labels = blob_particles([blobs(BOX, 3, 8), blobs(BOX, 11, 4)], 400, noise=0.5)
    maps = _true_maps(particles, labels)[[0, 0, 0]]
    labels[:10] = 2
    engine = AbInitio(particles, AbInitioOptions(classes=3, radius=(3, 5), batch=100, shift_extent=0.06))
    again = restarts.Restarts(
        engine._white, labels, maps, engine.signal, BOX, engine.options, engine.device, lambda text, record: None
    )
    while not again.done:
        again.advance()
    assert again.state["renewed"] == [1]
    small = restarts.cropped(maps[0], again.state["volumes"][0].shape[-1])
    assert torch.equal(again.state["volumes"][0], small) and torch.equal(again.state["volumes"][2], small)


@pytest.mark.parametrize("box", [32, 34, 40])
def test_kept_and_fresh_maps_come_in_one_box(box: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class too small to begin anew, one that gains nothing by it and one that does, with maps of any box."""
    particles, _ = blob_particles([blobs(BOX, 3, 8)], 330)
    labels = np.repeat([0, 1, 2], [30, 150, 150])
    gains = iter([5.0, 5.0, 5.0, 9.0])  # of the kept and the fresh map of class 1, then of class 2
    monkeypatch.setattr(restarts.Restarts, "_evidence", lambda *_: next(gains))
    engine = AbInitio(particles, AbInitioOptions(classes=3))
    rest = (engine.signal, 64, engine.options, engine.device, lambda text, record: None)
    again = restarts.Restarts(engine._white, labels, torch.ones(3, box, box, box), *rest)
    for _ in range(3):
        fresh = again._current()
        assert fresh.small == 34
        fresh.state["volumes"] = torch.full((1, 34, 34, 34), 2.0)
        again._end_class(fresh)
    assert again.state["renewed"] == [2]
    assert {tuple(one.shape) for one in again.state["volumes"]} == {(min(box, 34),) * 3}


def _stored(state: dict):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_wrong_poses_of_the_set_are_not_looked_at() -> None:
    """The search sees images and CTF only."""
    particles, _ = blob_particles([blobs(BOX, 3, 8)], 300, noise=1.0)
    options = AbInitioOptions(starts=1, iterations=2, batch=30, radius=(2, 3), rounds=((4, True),))
    first = _run(AbInitio(particles, options)).found
    particles.rotation = random_rotations(300).numpy()
    particles.shift = np.full((300, 2), 0.3, np.float32)
    assert np.array_equal(_run(AbInitio(particles, options)).found.rotation, first.rotation)


def test_too_few_particles_are_refused() -> None:
    """Before anything is computed."""
    particles, _ = blob_particles([blobs(BOX, 3)], 60)
    with pytest.raises(InputError, match="too few"):
        AbInitio(particles, AbInitioOptions(classes=4))


@pytest.mark.parametrize("mode", [ANYWHERE, OWN, NEAR])
def test_a_round_searches_on_its_device(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Poses, classes and half sets are kept on the processor; whatever the search is given lies beside the images."""
    device, seen = torch.device("meta"), []

    def search(source, values, transfer, index, options, carried=None, prepared=None) -> Candidates:
        given = [source.transform, values, transfer, index, *(vars(carried).values() if carried else ())]
        seen.extend(one.device for one in given)
        found = torch.zeros(len(values), 1, 3, 3), torch.zeros(len(values), 1, 2), torch.zeros(len(values), 1)
        return Candidates(*(one.to(device) for one in found))

    monkeypatch.setattr(pose_search, "search", search)
    monkeypatch.setattr(pose_search, "prepare", lambda *_: None)
    maps = rounds.RoundMaps(torch.zeros(2, 16, 16, 16), None, 5, mode, AbInitioOptions(classes=2), device)
    points, label = len(fourier.half_disc(16, 5)), torch.tensor([0, 1, 1])
    before = Candidates(torch.zeros(3, 1, 3, 3), torch.zeros(3, 1, 2), torch.zeros(3, 1))
    values = torch.zeros(3, points, dtype=torch.complex64, device=device)
    found, _ = maps.search(values, torch.zeros(3, points, device=device), label, torch.zeros(3).long(), before)
    assert len(seen) >= 4 and set(seen) == {device} == {found.score.device}
