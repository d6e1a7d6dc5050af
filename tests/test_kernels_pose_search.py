"""Pose search: scores against brute force, all paths against each other, poses found, basins kept, poses carried."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pose_toy import F64, Cloud, Shots, cloud, shoot

from cryosuite.kernels import fourier, pose_base, pose_refine, pose_scores, so3_grid
from cryosuite.kernels.pose_options import Candidates
from cryosuite.kernels.pose_search import (
    MagnifiedSource,
    PointSource,
    SearchOptions,
    VolumeSource,
    margin,
    prepare,
    search,
)
from cryosuite.kernels.rotations import expmap, geodesic_deg, random_rotations

SMALL = SearchOptions(r_min=6, r_max=12, levels=4, base_order=1, keep=8, shift_extent=0.1, shift_grid=6)


@pytest.fixture(params=["loops", "torch"])
def path(request, monkeypatch) -> str:
    """Run a test on the compiled loops and on the torch code that GPUs use."""
    if request.param == "torch":
        for module in (pose_scores, pose_base, pose_refine):
            monkeypatch.setattr(module, "loops", lambda: None)
    return request.param


def brute_gain(thing: Cloud, shots: Shots, rotation: torch.Tensor, shift: torch.Tensor, radius: int) -> torch.Tensor:
    """|y|^2 - |T_t y - c S|^2 in float64 for rotations (q, 3, 3) and shifts (T, 2) px: (b, q, T), point by point."""
    disc = fourier.half_disc(thing.box_size, radius)
    n = len(disc)
    y, c = shots.images[:, :n].to(torch.complex128), shots.ctf[:, :n].to(F64)
    model = thing.values(disc.frequency_as(F64) @ rotation[:, :2].to(F64))  # (q, P)
    out = torch.empty(len(y), len(rotation), len(shift), dtype=F64)
    for j, t in enumerate(shift):
        moved = fourier.phase_shift(y, disc, (t.to(F64) / thing.box_size).expand(len(y), 2))
        rest = moved[:, None] - c[:, None] * model
        out[:, :, j] = moved.abs().square().sum(-1)[:, None] - rest.abs().square().sum(-1)
    return out


def pose_errors(found: Candidates, shots: Shots, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    angle = geodesic_deg(found.rotation[:, number].float(), shots.rotation.float())
    return angle, (found.shift[:, number] - shots.shift).norm(dim=1)


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["gemm", "exact", "polar"])
@pytest.mark.parametrize("fit_scale", [False, True])
def test_base_level_equals_brute_force_with_astigmatism(path: str, base: str, fit_scale: bool) -> None:
    thing = cloud(24)
    shots = shoot(thing, 5)
    options = replace(SMALL, base=base, fit_scale=fit_scale).clipped(24)
    source = thing.source()
    shifts = pose_scores.shift_grid(2.4, 6)
    g, w = pose_scores.fold_ctf(shots.images, shots.ctf)
    ready = prepare(source, options) if base == "gemm" else None
    corr, power, which = pose_base.base_scores(source, g, w, shots.index, options, shifts, ready)
    grid = so3_grid.grid_rotations(1)
    truth = brute_gain(thing, shots, grid, shifts, 6)
    best, place = truth.max(-1)
    limit = 0.02 if base == "polar" else 1e-4
    scale = truth.abs().amax()
    if fit_scale:
        model = thing.values(fourier.half_disc(24, 6).frequency_as(F64) @ grid[:, :2].to(F64)).abs().square()
        weight = w[:, : model.shape[1]].to(F64) @ model.T
        best = ((best + weight) / 2).clamp(min=0).square() / weight
    assert (pose_scores.gain(corr, power, fit_scale) - best).abs().max() < limit * scale
    if base != "polar":
        chosen = truth.gather(-1, which[..., None]).squeeze(-1)
        assert (chosen - truth.amax(-1)).abs().max() < limit * scale
        assert (which == place).float().mean() > 0.999


def test_base_level_in_double_precision() -> None:
    thing = cloud(16)
    shots = shoot(thing, 3, dtype=F64)
    options = SearchOptions(r_min=5, r_max=8, base_order=0, levels=1).clipped(16)
    shifts = pose_scores.shift_grid(1.0, 3).to(F64)
    g, w = pose_scores.fold_ctf(shots.images, shots.ctf)
    truth = brute_gain(thing, shots, so3_grid.grid_rotations(0, F64), shifts, 5).amax(-1)
    half = so3_grid.grid_rotations(0, F64).unflatten(0, (-1, so3_grid.n_in_plane(0)))
    half = half[:, : half.shape[1] // 2].flatten(0, 1)
    slices = thing.source().slices(half[None], options.radius(0), torch.zeros(1, dtype=torch.int64))
    ready = pose_base.Prepared(slices.real, slices.imag, None)
    for base in ("gemm", "exact"):
        one = replace(options, base=base)
        corr, power, _ = pose_base.base_scores(thing.source(), g, w, shots.index, one, shifts, ready)
        torch.testing.assert_close(2 * corr - power, truth, rtol=1e-9, atol=1e-9)


def test_turned_slices_are_slices() -> None:
    """The interpolation behind "polar", on content that it is made for: within .5 % of exact slices."""
    thing = cloud(32, spread=0.33)
    even, odd = pose_base.turn_operators(32, 12, 14, 24, F64, "cpu")
    frame = so3_grid.view_frames(2, F64)[5:6]
    seen = thing.source().slices(frame[None], 14, torch.zeros(1, dtype=torch.int64))[0, 0]
    turned = torch.complex(even @ seen.real, odd @ seen.imag)
    grid = so3_grid.grid_rotations(2, F64)[5 * 24 : 5 * 24 + 12]
    exact = thing.source().slices(grid[None], 12, torch.zeros(1, dtype=torch.int64))[0]
    assert (turned - exact).abs().square().sum() < 0.005**2 * exact.abs().square().sum()


@pytest.mark.parametrize("volumes", [1, 3])
def test_level_scores_equal_brute_force(path: str, volumes: int) -> None:
    things = [cloud(24, seed=k) for k in range(volumes)]
    source = VolumeSource(torch.stack([t.volume() for t in things]), r_max=10)
    shots = shoot(things[0], 4)
    shots.index = torch.tensor([0, volumes - 1, 0, volumes // 2])
    g, w = pose_scores.fold_ctf(shots.images, shots.ctf)
    generator = torch.Generator().manual_seed(3)
    rotation = random_rotations(4 * 6, generator).view(4, 6, 3, 3)
    shift = torch.randn(4, 2, 2, generator=generator)
    local = pose_scores.local_shifts(0.4, 3, w)
    corr, power, best = pose_scores.score_shifts(source, g, w, shots.index, 9, rotation, shift, local)
    for i in range(4):
        one = replace(shots, images=shots.images[i : i + 1], ctf=shots.ctf[i : i + 1])
        for j in range(6):
            exact = brute_gain(things[shots.index[i]], one, rotation[i, j : j + 1], shift[i, j // 3] + local, 9)[0, 0]
            # trilinear slices of a padded volume are not the exact ones
            assert abs(2 * corr[i, j] - power[i, j] - exact.max()) < 0.05 * power[i].max()
            assert exact[best[i, j]] > exact.max() - 0.02 * power[i].max()


def test_loops_equal_torch(monkeypatch) -> None:
    thing = cloud(32)
    source, shots = VolumeSource(thing.volume()), shoot(thing, 6)
    g, w = pose_scores.fold_ctf(shots.images, shots.ctf)
    rotation = random_rotations(6 * 4, torch.Generator().manual_seed(0)).view(6, 4, 3, 3)
    local = pose_scores.local_shifts(0.4, 5, w)
    disc = fourier.half_disc(32, 16)

    def both():
        scores = pose_scores.score_shifts(source, g, w, shots.index, 16, rotation, shots.shift[:, None], local)
        normal = pose_refine._normal_equations(source, g, w, shots.index, disc, rotation, shots.shift[:, None])
        return scores, normal

    shots.shift = shots.shift[:, None].expand(-1, 4, -1)[:, 0]
    rotation = rotation[:, :1]
    (corr, power, best), normal = both()
    for module in (pose_scores, pose_base, pose_refine):
        monkeypatch.setattr(module, "loops", lambda: None)
    (corr2, power2, best2), normal2 = both()
    torch.testing.assert_close(corr, corr2, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(power, power2, rtol=1e-5, atol=1e-5)
    assert torch.equal(best, best2)
    scale = normal2.abs().amax((0, 1))
    scale[10:12] = scale[2:7].amax()  # sums that are zero but for rounding
    assert ((normal - normal2).abs() / scale).max() < 1e-4


@pytest.mark.parametrize(("radius", "fits"), [(400, True), (410, False)])
def test_places_in_a_transform_beyond_32_bits_are_left_to_torch(radius: int, fits: bool) -> None:
    N = 2 * radius + 1
    transform = torch.zeros(()).expand(1, 2 * N + 1, 2 * N + 1, N + 1, 2)
    assert (transform.numel() <= 2**32) == fits
    source = VolumeSource.of_transforms(transform, 2 * radius, radius)
    assert pose_scores.use_loops(source, torch.zeros(1, 1, dtype=torch.complex64)) == fits


def test_normal_equations_are_the_derivatives() -> None:
    """Gradient of corr and of power / 2 along the five unknowns, by finite differences in float64."""
    thing = cloud(20)
    shots = shoot(thing, 2, dtype=F64)
    source, disc = thing.source(), fourier.half_disc(20, 8)
    g, w = pose_scores.fold_ctf(shots.images[:, : len(disc)], shots.ctf[:, : len(disc)])
    rotation, shift = shots.rotation[:, None], shots.shift[:, None]
    sums = pose_refine._normal_equations(source, g, w, shots.index, disc, rotation, shift)
    still = torch.zeros(1, 2, dtype=F64)

    def at(step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        args = expmap(step[:3]) @ rotation, shift + step[3:]
        corr, power, _ = pose_scores.score_shifts(source, g, w, shots.index, 8, *args, still)
        return corr, power

    for a in range(5):
        step = torch.zeros(5, dtype=F64)
        step[a] = 1e-3
        (corr1, power1), (corr0, power0) = at(step), at(-step)
        scale = sums[..., 2:7].abs().amax()
        assert ((corr1 - corr0) / 2e-3 - sums[..., 2 + a]).abs().max() < 0.02 * scale
        assert ((power1 - power0) / 4e-3 - sums[..., 7 + a]).abs().max() < 0.02 * scale


# --- the whole search ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["gemm", "polar"])
def test_finds_poses_of_another_projector(path: str, base: str) -> None:
    """Images of exact Gaussians, searched for with voxels; the sign of the shift is the convention's."""
    thing = cloud(32)
    shots = shoot(thing, 16, snr=1.0)
    options = replace(SMALL, r_min=8, r_max=16, base_order=2, base=base)
    found = search(VolumeSource(thing.volume()), shots.images, shots.ctf, shots.index * 0, options)
    angle, moved = pose_errors(found, shots)
    assert angle.median() < 1.5
    assert (angle < 5).float().mean() >= 0.9
    assert moved.median() < 0.2
    assert (found.score.diff(dim=1) <= 0).all()


def test_without_noise_the_end_is_off_the_grid() -> None:
    thing = cloud(24)
    shots = shoot(thing, 8, snr=1e4)
    angle, moved = pose_errors(search(thing.source(), shots.images, shots.ctf, shots.index, SMALL), shots)
    assert angle.median() < 0.05
    assert moved.median() < 0.01
    rough, _ = pose_errors(
        search(thing.source(), shots.images, shots.ctf, shots.index, replace(SMALL, refine=0)), shots
    )
    assert 0.2 < rough.median() < 2


def test_the_best_pose_scores_as_brute_force_says() -> None:
    thing = cloud(24)
    shots = shoot(thing, 4)
    found = search(thing.source(), shots.images, shots.ctf, shots.index, SMALL)
    for i in range(4):
        one = replace(shots, images=shots.images[i : i + 1], ctf=shots.ctf[i : i + 1])
        exact = brute_gain(thing, one, found.rotation[i, :1], found.shift[i, :1], 12)
        torch.testing.assert_close(found.score[i, 0].double(), exact[0, 0, 0], rtol=1e-3, atol=1e-2)


def test_groups_share_volumes(path: str) -> None:
    things = [cloud(24, seed=k) for k in range(3)]
    kind = torch.tensor([2, 0, 1, 0, 2, 2])
    parts = [shoot(things[k], 1, snr=3.0, seed=i) for i, k in enumerate(kind.tolist())]
    images, transfer = (torch.cat([getattr(p, name) for p in parts]) for name in ("images", "ctf"))
    source = VolumeSource(torch.stack([t.volume() for t in things]), volume_index=kind)
    together = search(source, images, transfer, torch.arange(6), SMALL)
    for i, k in enumerate(kind.tolist()):
        alone = search(VolumeSource(things[k].volume()), images[i : i + 1], transfer[i : i + 1], kind[:1] * 0, SMALL)
        torch.testing.assert_close(together.score[i], alone.score[0], rtol=1e-3, atol=1e-2)


def test_fit_scale_does_not_mind_the_scale_of_the_volume() -> None:
    thing = cloud(24)
    shots = shoot(thing, 4, snr=1.0)
    options = replace(SMALL, fit_scale=True)
    a, b = (search(VolumeSource(s * thing.volume()), shots.images, shots.ctf, shots.index * 0, options) for s in (1, 7))
    torch.testing.assert_close(a.score[:, 0], b.score[:, 0], rtol=1e-3, atol=1e-2)
    assert geodesic_deg(a.rotation[:, 0], b.rotation[:, 0]).max() < 0.3


def pseudo_symmetric(box_size: int) -> Cloud:
    """Two-fold but for one small blob."""
    half = cloud(box_size, n=12, seed=4)
    turned = half.centres * torch.tensor([-1.0, -1.0, 1.0], dtype=F64)
    mark = torch.tensor([[box_size * 0.25, 0, 0]], dtype=F64)
    weights = torch.cat([half.weights, half.weights, torch.tensor([0.6], dtype=F64)])
    return Cloud(torch.cat([half.centres, turned, mark]), weights, half.sigma, box_size)


def test_both_basins_of_a_pseudo_symmetric_volume_are_kept() -> None:
    thing = pseudo_symmetric(24)
    shots = shoot(thing, 12, snr=1.0)
    found = search(thing.source(), shots.images, shots.ctf, shots.index, replace(SMALL, base_order=2))
    twin = shots.rotation @ torch.diag(torch.tensor([-1.0, -1.0, 1.0]))
    near = geodesic_deg(found.rotation, shots.rotation[:, None]) < 6
    other = geodesic_deg(found.rotation, twin[:, None]) < 6
    assert near.any(1).float().mean() > 0.8
    assert other.any(1).float().mean() > 0.8
    gap = margin(found)
    assert (gap >= 0).all()
    right = geodesic_deg(found.rotation[:, 0], shots.rotation) < 6
    assert right.float().mean() > 0.7


def test_carried_poses_are_improved_and_join() -> None:
    thing = cloud(24)
    shots = shoot(thing, 6, snr=5.0)
    generator = torch.Generator().manual_seed(1)
    off = expmap(0.06 * torch.randn(6, 1, 3, generator=generator)) @ shots.rotation[:, None]
    carried = Candidates(off, shots.shift[:, None] + 0.3, torch.zeros(6, 1))
    alone = search(thing.source(), shots.images, shots.ctf, shots.index, replace(SMALL, base="none"), carried)
    before = geodesic_deg(off[:, 0], shots.rotation).median()
    assert pose_errors(alone, shots)[0].median() < before / 2
    without = search(thing.source(), shots.images, shots.ctf, shots.index, SMALL)
    joined = search(thing.source(), shots.images, shots.ctf, shots.index, SMALL, carried)
    assert (joined.score[:, 0] > without.score[:, 0] - 0.5).all()
    assert joined.rotation.shape == (6, 8, 3, 3)


def test_cached_volume_agrees_with_the_exact_source() -> None:
    """A decoder put on voxels finds the decoder's poses, and their loss under the exact source is small."""
    thing = cloud(24)
    shots = shoot(thing, 6, snr=1.0)
    exact = search(thing.source(), shots.images, shots.ctf, shots.index, SMALL)
    regret = []
    for pad in (1, 2):
        cached = search(VolumeSource(thing.volume(), pad=pad), shots.images, shots.ctf, shots.index * 0, SMALL)
        g, w = pose_scores.fold_ctf(shots.images, shots.ctf)
        corr, power, _ = pose_scores.score_shifts(
            thing.source(), g, w, shots.index, 12, cached.rotation[:, :1], cached.shift[:, :1], torch.zeros(1, 2)
        )
        regret.append(float((exact.score[:, 0] - (2 * corr - power)[:, 0]).mean() / exact.score[:, 0].mean()))
    assert regret[1] < 0.005
    assert regret[0] < 0.1


def test_reduced_precision_stays_in_the_source() -> None:
    thing = cloud(24)
    shots = shoot(thing, 3, snr=1.0)
    used = []

    def values(q: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        used.append(torch.is_autocast_enabled("cpu") and q.dtype == torch.float32)
        with torch.autocast("cpu", enabled=False):
            return thing.values(q)

    options = replace(SMALL, base_order=0, levels=3)
    source = PointSource(values, 24, lambda index: None)
    plain = search(source, shots.images, shots.ctf, shots.index, options)
    assert not any(used)
    used.clear()
    with torch.autocast("cpu", torch.bfloat16):
        reduced = search(source, shots.images, shots.ctf, shots.index, options, prepared=prepare(source, options))
    assert all(used)
    torch.testing.assert_close(reduced.score, plain.score)


# --- bad days --------------------------------------------------------------------------------------------------------


def test_refuses_what_makes_no_sense() -> None:
    thing = cloud(16)
    shots = shoot(thing, 2)
    with pytest.raises(ValueError, match="r_min"):
        SearchOptions(r_min=9, r_max=8)
    with pytest.raises(ValueError, match="base must be"):
        SearchOptions(base="fast")
    with pytest.raises(ValueError, match="points of radius"):
        search(thing.source(), shots.images[:, :20], shots.ctf[:, :20], shots.index)
    with pytest.raises(ValueError, match="no"):
        search(thing.source(), shots.images, shots.ctf, shots.index, replace(SMALL, base="none"))
    with pytest.raises(ValueError, match="transformed up to radius 5"):
        search(VolumeSource(thing.volume(), r_max=5), shots.images, shots.ctf, shots.index * 0, SMALL)
    ready = prepare(thing.source(), replace(SMALL, r_min=5))
    with pytest.raises(ValueError, match="prepared with the options"):
        search(thing.source(), shots.images, shots.ctf, shots.index, SMALL, prepared=ready)
    two = VolumeSource(torch.stack([thing.volume()] * 2), volume_index=torch.tensor([0, 7]))
    g, w = pose_scores.fold_ctf(shots.images, shots.ctf)
    with pytest.raises(ValueError, match="between 0 and 1"):
        pose_scores.score_shifts(
            two, g, w, shots.index, 4, shots.rotation[:, None], shots.shift[:, None], torch.zeros(1, 2)
        )


def test_radii_are_clipped_to_the_box() -> None:
    options = SearchOptions().clipped(16)
    assert (options.r_min, options.r_max) == (8, 8)
    assert [SearchOptions().radius(i) for i in range(5)] == [12, 17, 22, 27, 32]


def test_shifts_are_as_dense_as_the_base_radius_needs() -> None:
    assert SearchOptions().shifts_per_axis == 14  # the published search
    assert SearchOptions(shift_extent=5 / 64).shifts_per_axis == 7
    assert SearchOptions(shift_grid=5).shifts_per_axis == 5
    assert SearchOptions(shift_extent=0.0).shifts_per_axis == 1


def test_empty_and_broken_images_do_no_harm(path: str) -> None:
    thing = cloud(24)
    shots = shoot(thing, 3)
    shots.images[0] = 0
    shots.images[1] = complex("nan")
    found = search(VolumeSource(thing.volume()), shots.images, shots.ctf, shots.index * 0, SMALL)
    assert found.rotation.isfinite().all()
    assert found.score[0].isfinite().all() and found.score[2].isfinite().all()
    alone = search(VolumeSource(thing.volume()), shots.images[2:], shots.ctf[2:], shots.index[2:] * 0, SMALL)
    torch.testing.assert_close(found.score[2], alone.score[0], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("base", ["exact", "gemm", "polar"])
def test_images_at_other_scales(base: str) -> None:
    """Every image with a magnification of its own: the poses of the volume's frame, in every kind of base level."""
    thing, generator = cloud(24), torch.Generator().manual_seed(2)
    place = torch.eye(2) * (0.93 + 0.14 * torch.rand(12, 1, 1, generator=generator))
    place = place + 0.02 * torch.randn(12, 2, 2, generator=generator)
    shots = shoot(thing, 12, snr=20.0, place=place)
    source = MagnifiedSource(thing.source(), place)
    found = search(source, shots.images, shots.ctf, shots.index, replace(SMALL, base=base))
    degrees, pixels = pose_errors(found, shots)
    assert degrees.max() < 3 and degrees.median() < 1 and pixels.max() < 0.2
    plain = search(thing.source(), shots.images, shots.ctf, shots.index, replace(SMALL, base=base))
    assert pose_errors(plain, shots)[0].median() > 1.5 * degrees.median()
