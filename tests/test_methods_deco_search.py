"""Poses searched for again: which particles, whoever has them in a batch that several processes share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hype_toy import blob_particles, blobs
from pose_toy import Cloud, cloud

from cryosuite.data.loader import BatchLoader
from cryosuite.data.particles import ParticleSet
from cryosuite.kernels import ctf as ctf_kernel
from cryosuite.kernels import fourier
from cryosuite.kernels.rotations import geodesic_deg, random_rotations
from cryosuite.methods import deco_search
from cryosuite.methods.deco import Deco
from cryosuite.methods.deco_options import DecoOptions
from cryosuite.methods.deco_search import of_all, rows_of, worst

SEARCHED = DecoOptions(
    encoder="random", encoder_size="micro", zdim=4, width=32, layers=1, n_frequencies=16, lr_encoder=1.0, lr_poses=1.0,
    refine_poses=True, research_every=1,
)  # fmt: skip


def test_the_worst_of_a_batch_do_not_depend_on_who_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch shared by four processes, the last of which was given a row again: the same particles are chosen."""
    misfit = torch.rand(40, generator=torch.Generator().manual_seed(0))
    misfit[[3, 9]] = 2.0  # equal
    misfit[[31, 5]] = -1.0
    index = torch.tensor([9, 31, 3, 17, 5, 22, 8, 30, 11])
    whole = index[worst(misfit, index, 0.25)]
    assert {3, 9} <= set(whole.tolist()) and len(whole) == 3
    parts = [index[0::3], index[1::3], index[2::3], index[:1]]
    assert parts[1].tolist() == [31, 5, 30]
    misfit[30] = -1.0
    monkeypatch.setattr(deco_search, "everywhere", lambda values: [(part,) for part in parts])
    chosen = [part[worst(misfit, part, 0.25)] for part in parts]
    assert set(torch.cat(chosen).tolist()) == set(whole.tolist())
    assert len(chosen[1]) == 0  # all its images fit well


def test_what_belongs_to_particles_comes_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [(torch.tensor([7, 2]), torch.tensor([0.7, 0.2])), (torch.tensor([5, 7]), torch.tensor([0.5, 0.7]))]
    monkeypatch.setattr(deco_search, "everywhere", lambda values: parts)
    index, values = of_all(*parts[0])
    assert index.tolist() == [2, 5, 7] and torch.equal(values, torch.tensor([0.2, 0.5, 0.7]))
    monkeypatch.setattr(deco_search, "everywhere", lambda values: [values])
    assert len(of_all(torch.zeros(0, dtype=torch.int64))[0]) == 0


def test_a_process_without_rows_takes_part_in_a_search() -> None:
    """Nothing is searched for and nothing is written."""
    particles, _ = blob_particles([blobs(16, 3, 8)], 32, noise=0.5)
    torch.manual_seed(0)
    method = Deco(SEARCHED, None, 2)
    model = method.build(particles)
    before = model.table.six.clone()
    batch = BatchLoader(particles, 8, shuffle=False, prefetch=0).batch(np.arange(8))
    method.searcher.search(rows_of(batch, torch.zeros(0, dtype=torch.int64)), torch.zeros(0, 4))
    assert torch.equal(model.table.six, before) and torch.isnan(model.table.margin).all()
    method.searcher.search(rows_of(batch, torch.tensor([2, 5])), torch.zeros(2, 4))
    assert torch.nonzero(~torch.isnan(model.table.margin)).flatten().tolist() == [2, 5]


def two_groups(thing: Cloud, each: int, place: torch.Tensor, pixel: float, **extras: np.ndarray) -> ParticleSet:
    """Images of a molecule without poses to start from; those of the second half lie at ``place`` (2, 2)."""
    generator = torch.Generator().manual_seed(0)
    D, n = thing.box_size, 2 * each
    disc = fourier.half_disc(D)
    table = torch.zeros(n, 9)
    table[:, 0], table[:each, 1], table[each:, 1] = D, 6.0, pixel
    table[:, 2] = 9000 + 8000 * torch.rand(n, generator=generator)
    table[:, 3] = table[:, 2] - 1500
    table[:, 5], table[:, 6], table[:, 7] = 300, 2.7, 0.1
    rotation = random_rotations(n, generator, dtype=torch.float32)
    shift = 0.02 * torch.randn(n, 2, generator=generator)
    at = torch.stack([torch.eye(2), place]).repeat_interleave(each, 0)
    slices = thing.values((disc.frequency @ at @ rotation[:, :2]).double()).to(torch.complex64)
    known = replace(ParticleSet.from_array(np.zeros((n, D, D), np.float32), 6.0), ctf=table.numpy(), extras=extras)
    slices = slices * ctf_kernel.ctf(disc.frequency, known.ctf_params())
    images = fourier.from_half_disc(fourier.phase_shift(slices, disc, -shift), disc)
    noise = 0.15 * float(images.std())
    images = images + noise * torch.randn(images.shape, generator=generator)
    spectrum = np.full((1, D // 2 + 1), noise**2 * D * D, np.float32)
    return replace(
        ParticleSet.from_array(images.numpy(), table[:, 1].numpy(), rotation=rotation.numpy(), shift=shift.numpy()),
        ctf=table.numpy(), extras=extras, noise=spectrum,
    )  # fmt: skip


@pytest.mark.parametrize("search", ["exact", "cached"])
@pytest.mark.parametrize("magnified", ["pixel size", "anisotropic"])
def test_poses_of_groups_at_other_scales(search: str, magnified: str) -> None:
    """One molecule in images of which half have pixels 5 % larger, or are stretched by 4 % along one direction."""
    each, thing, extras, pixel = 16, cloud(24, seed=1), {}, 6.0
    if magnified == "pixel size":
        pixel = 6.3
        place = torch.eye(2) * 6.0 / 6.3
    else:
        matrix = torch.tensor([[1.03, 0.015], [0.015, 0.98]])
        extras = {"mag_matrix": torch.stack([torch.eye(2), matrix]).repeat_interleave(each, 0).numpy()}
        place = matrix.T
    particles = two_groups(thing, each, place, pixel, **extras)
    torch.manual_seed(0)
    method = Deco(replace(SEARCHED, window=False, search=search, cached_volumes=1), None, 2)
    model = method.build(particles)
    model.volumes = lambda z: thing.volume()[None].expand(len(z), -1, -1, -1)
    method.searcher._values = lambda q, z: thing.values(q.double()).to(torch.complex64)
    truth = model.table(torch.arange(2 * each))
    model.table.put(torch.arange(2 * each), random_rotations(2 * each), torch.zeros(2 * each, 2))
    batch = BatchLoader(particles, 2 * each, shuffle=False, prefetch=0).batch(np.arange(2 * each))

    def errors() -> list[float]:
        """Median degrees and pixels of both groups."""
        method.searcher.search(batch, torch.zeros(2 * each, 4))
        found = model.table(torch.arange(2 * each))
        off = geodesic_deg(found[0], truth[0]), 24 * (found[1] - truth[1]).norm(dim=1)
        return [float(some.median()) for one in off for some in (one[:each], one[each:])]

    degrees, other_degrees, pixels, other_pixels = errors()
    assert max(degrees, other_degrees) < 0.6 and other_degrees < 1.5 * degrees
    assert max(pixels, other_pixels) < 0.05 and other_pixels < 1.5 * pixels
    method.searcher.pixel_size = None  # as if all were at one scale
    assert errors()[1] > 1.5 * other_degrees
