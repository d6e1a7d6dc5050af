"""On a pretend GPU (pretend_gpu.py) nothing mixes devices, and kernels give what they give on the processor."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hype_toy import blobs
from pose_toy import F64, cloud, ctf_rows, shoot
from pretend_gpu import GpuTensor, pretend_gpu
from torch import Tensor
from torch.utils._pytree import tree_map_only

from cryosuite.kernels import (
    assignment,
    atom_grid,
    ball,
    class_slices,
    ctf,
    degrade,
    density,
    fourier,
    histogram,
    layers,
    local_cc,
    map_losses,
    map_norm,
    map_spectrum,
    planar,
    pose_search,
    rotations,
    shells,
    slices,
    so3_grid,
    tiles,
    triplet,
    wedge,
)
from cryosuite.kernels.pose_search import Candidates, SearchOptions, VolumeSource

D = 16

# the pretend GPU itself -----------------------------------------------------------------------------------------------


def test_what_a_gpu_refuses() -> None:
    """Each of these ends with an error on a real one."""
    with pretend_gpu() as gpu:
        there, here = torch.ones(3, 3, device=gpu), torch.ones(3, 3)
        row, generator = torch.tensor([1]), torch.Generator(gpu).manual_seed(0)
        refused: list[Callable[[], Any]] = [
            lambda: there + here, lambda: there @ here, lambda: torch.cat([there, here]), lambda: here[row.to(gpu)],
            lambda: there.index_select(0, row), lambda: torch.stack([there.sum(), here.sum()]),
            lambda: here.add_(there[0, 0]), lambda: here.index_put_((row,), there[0]), lambda: there.add_(here),
            lambda: there[row].index_put_((row,), here[0]), lambda: torch.randn(2, generator=generator),
            lambda: torch.randn(2, device=gpu, generator=torch.Generator()), lambda: there.pin_memory(),
            lambda: torch.nn.Linear(3, 3).to(gpu)(here), lambda: there.long() @ there.long(),
        ]  # fmt: skip
        for number, attempt in enumerate(refused):
            with pytest.raises(RuntimeError):
                attempt()
                pytest.fail(f"number {number} was let through")
        for attempt in (there.numpy, lambda: np.asarray(there), lambda: np.add(there, 1)):
            with pytest.raises(TypeError, match="cuda:0"):
                attempt()


def test_what_a_gpu_allows() -> None:
    with pretend_gpu() as gpu:
        there, here, row = torch.arange(9.0, device=gpu).view(3, 3), torch.ones(3, 3), torch.tensor([1])
        half = there * torch.tensor(0.5)
        assert half.device == gpu and half.is_cuda and there[row].device == there[[0, 2], 1].device == gpu
        there[row] = torch.tensor(5.0)
        here.copy_(there, non_blocking=True)
        here[1] = there[2]
        assert here.tolist() == [[0, 1, 2], [6, 7, 8], [6, 7, 8]] and there.cpu().numpy()[1, 0] == 5
        assert here.pin_memory().to(gpu, torch.float64, non_blocking=True).dtype == torch.float64
        assert torch.tensor([1, 2], device=gpu).device == there.new_tensor([1]).device == gpu
        assert torch.as_tensor(there, device="cpu").device == there.to(here).device == torch.device("cpu")
        assert float(there.to("cpu").sum()) == float(there.sum()) and there.new_zeros(2).device == gpu
        assert torch.randn(2, device=gpu, generator=torch.Generator(gpu).manual_seed(1)).device == gpu


@pytest.mark.parametrize("half", [False, True])
def test_a_network_learns_as_on_the_processor(half: bool) -> None:
    """Optimiser, clipping, autocast, copies and gradients across devices."""

    def learnt(device: Any) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv1d(1, 4, 3), torch.nn.BatchNorm1d(4), torch.nn.GELU())
        first, start = next(net.parameters()), torch.ones(5, 1, 8, requires_grad=True)
        net = net.to(device)
        assert first is next(net.parameters()) and first.device == torch.device(device)
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        for _ in range(2):
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
                out = net(start.to(device) * torch.arange(8.0, device=device))
                loss = out.float().square().mean()
            assert out.dtype == (torch.bfloat16 if half else torch.float32)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().cpu() for p in copy.deepcopy(net).parameters()], start.grad

    there, gradient = _there(learnt)
    here, expected = learnt("cpu")
    torch.testing.assert_close(there, here)
    torch.testing.assert_close(gradient, expected)


def test_threads_see_it_and_nothing_stays_of_it() -> None:
    before = (torch.cuda.is_available, torch.Generator, torch.autocast, threading.Thread.run, Tensor.pin_memory)
    seen: list[torch.device] = []
    with pretend_gpu():
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1
        thread = threading.Thread(target=lambda: seen.append(torch.zeros(1, device="cuda").device))
        thread.start()
        thread.join()
    assert seen == [torch.device("cuda:0")]
    after = (torch.cuda.is_available, torch.Generator, torch.autocast, threading.Thread.run, Tensor.pin_memory)
    assert before == after and not torch.__future__.get_swap_module_params_on_conversion()
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            torch.zeros(1, device="cuda")


# kernels --------------------------------------------------------------------------------------------------------------


def _there(function: Callable[[Any], Any]) -> Any:
    """What a function of a device gives on the pretend GPU, brought to the processor."""
    with pretend_gpu() as gpu:
        return tree_map_only(Tensor, lambda t: t.detach().cpu(), function(gpu))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turns(count: int, seed: int = 0) -> Tensor:
    return rotations.random_rotations(count, torch.Generator().manual_seed(seed))


@functools.cache
def _protein() -> Tensor:
    """A map of (24, 26, 28) voxels with something in the middle."""
    volume = torch.zeros(24, 26, 28)
    volume[4:20, 5:21, 6:22] = blobs(16, 3, 8)
    return volume + 0.01 * noise(24, 26, 28)


def _ctf(d: Any) -> Tensor:
    params = ctf_rows(4, torch.Generator().manual_seed(0)).to(d)
    return ctf.ctf(fourier.half_disc(D, device=d).frequency_as(F64), params)


def _slices(d: Any) -> Any:
    disc, R = fourier.half_disc(D, 6, d), turns(4).to(d).requires_grad_()
    transform = slices.volume_transform(torch.stack([blobs(D, 0), blobs(D, 1)]).to(d)).requires_grad_()
    which = torch.tensor([0, 1, 1, 0], device=d)
    made = slices.extract_slices(transform, R, disc, volume_index=which)
    made.abs().square().mean().backward()
    acc = slices.insert_slices(slices.new_accumulator(D, device=d), made, torch.ones_like(made.real), R, disc)
    return made, R.grad, transform.grad, acc.data


def _classes(d: Any) -> Any:
    disc, R, some = fourier.half_disc(D, 6, d), turns(5).to(d), torch.tensor
    ready = class_slices.class_transforms(torch.stack([blobs(D, k) for k in range(3)]).to(d), 6)
    values = torch.complex(noise(5, len(disc)), noise(5, len(disc), seed=1)).to(d)
    weights = noise(5, len(disc), seed=2).square().to(d)
    acc = class_slices.new_class_accumulator(3, 6, device=d)
    rows = some([1.0, 0.5, 0.5, 1, 1, 1]).to(d), some([0, 1, 2, 2, 0, 1]).to(d), some([0, 1, 3, 4, 5, 6]).to(d)
    class_slices.insert_classes(acc, values, weights, rows, R, disc)
    found = class_slices.class_sums(ready, values, weights, R, disc)
    return (
        *found,
        *class_slices.class_gram(ready, values, weights, R, disc),
        acc.data,
        class_slices.disc_power(values, weights),
    )


def _poses(base: str) -> Callable[[Any], Any]:
    thing = cloud(D, seed=1)
    shots = shoot(thing, 4, snr=3.0)

    def found(d: Any) -> Any:
        source = VolumeSource(thing.volume().to(d), r_max=7)
        images, transfer, index = shots.images.to(d), shots.ctf.to(d), shots.index.to(d) * 0
        options = SearchOptions(4, 7, 1, 1, keep=3, shift_grid=5, base=base, refine=2, fit_scale=base == "exact")
        carried = Candidates(shots.rotation.to(d)[:, None], shots.shift.to(d)[:, None], torch.zeros(4, 1, device=d))
        prepared = pose_search.prepare(source, options, device=d) if base == "gemm" else None
        best = pose_search.search(source, images, transfer, index, options, carried, prepared)
        again = pose_search.score_poses(source, images, transfer, index, best, options, steps=1)
        return best.rotation[:, 0], best.shift[:, 0], best.score[:, 0], again.score[:, 0], pose_search.margin(best) > 0

    return found


def _density(d: Any) -> Any:
    points, weight = 6 * noise(50, 3).to(d), (1 + noise(50).square()).to(d)
    width = torch.linspace(1.0, 2.0, 50, device=d)
    return (
        density.density_map(points, weight, D, 3.0, 2.0),
        density.projection_spectrum(points[None, :, :2], weight, D, 3.0, 6.0),
        density.molmap(points, weight, (16, 14, 12), (-16.0, -14.0, -12.0), (2.0, 2.0, 2.0), width),
        atom_grid.splat_many(points / 3, torch.stack([weight, width]), D),
        atom_grid.splat_correction(D, d), atom_grid.squared_frequency(D, 3.0, d),
    )  # fmt: skip


def _degrade(d: Any) -> Any:
    maps, g = torch.stack([_protein()] * 2).to(d), torch.Generator(d).manual_seed(0)
    low, far = torch.tensor([8.0, 10.0], device=d), torch.tensor([50.0, 100.0], device=d)
    spd = degrade.random_spd(far, torch.tensor([2.0, 4.0], device=d), g)
    return (
        degrade.soft_lowpass(maps, 2.0, low), degrade.anisotropy_gain(maps, 2.0, spd),
        degrade.smooth_field(maps, 2.0, 10.0, 0.0, low, g), degrade.coloured_noise(maps, 2.0, low, g, 2.0),
        degrade.coloured_noise(maps, 2.0, 8.0, torch.Generator().manual_seed(1)),
    )  # fmt: skip


def _grids(d: Any) -> Any:
    some = torch.arange(0, 500, 7, device=d)
    return (
        so3_grid.grid_rotations(1, device=d), so3_grid.rotations_at(some, 2), so3_grid.children_at(some, 2),
        so3_grid.view_frames(1, device=d), so3_grid.children(0, d), so3_grid.fibre_offsets(1, d),
    )  # fmt: skip


def _rotations(d: Any) -> Any:
    R, a = turns(6).to(d), noise(6, 9, 3).to(d)
    q = rotations.matrix_to_quaternion(R)
    return (
        rotations.euler_to_matrix(rotations.matrix_to_euler(R)), rotations.expmap(rotations.logmap(R)),
        rotations.quaternion_to_matrix(q), rotations.six_d_to_matrix(rotations.matrix_to_six_d(R)),
        rotations.kabsch(a, a @ R.transpose(1, 2)), rotations.geodesic_deg(R, R.flip(0)),
        rotations.random_rotations(3, torch.Generator().manual_seed(1), device=d),
        rotations.random_rotations(3, torch.Generator(d).manual_seed(1), device=d),
        planar.mirror(R), planar.relative(R), planar.local_mean(noise(2, 6).to(d), R), planar.best_rotation(R + 0.1),
        planar.kabsch_dense(noise(2, 8, 8, 3).to(d), noise(2, 8, 8).abs().to(d)),
    )  # fmt: skip


def _codes(d: Any) -> Any:
    basis = torch.complex(noise(4, 30, 3), noise(4, 30, 3, seed=1)).to(d)
    x = torch.complex(noise(4, 30, seed=2), noise(4, 30, seed=3)).to(d)
    codes, weight = noise(5, 3).to(d).requires_grad_(), noise(4, 30).to(d)
    system = assignment.gram(basis, weight, x)
    scores = [assignment.scores(rule, system, codes) for rule in ("likelihood", "zcos")]
    p = torch.softmax(scores[0], 1)
    f = assignment.map_codes(system, p @ codes.detach(), assignment.code_variance(codes.detach()))
    loss = triplet.triplet_loss(f, codes, p, 1 - p, triplet.triplet_margin(codes.detach(), 0.2))
    (loss + triplet.alignment_loss(f, codes, p)).sum().backward()
    close = assignment.merge_groups(torch.corrcoef(codes.detach()), 0.3)
    usage = torch.full((5,), 0.2, device=d)
    return system, scores, f, loss, codes.grad, close, assignment.balance(scores[0], usage, 0.5)


def _grey(d: Any) -> Any:
    a, b = torch.stack([_protein()[:, :24, :24]] * 2).to(d), noise(2, 24, 24, 24).to(d) * 0.1
    inside, g = a > 0.3, torch.Generator(d).manual_seed(0)
    x = (a + b).requires_grad_()
    loss = histogram.histogram_divergence(x, a, inside, 500, generator=g).sum()
    loss = loss + map_losses.masked_correlation(x, a, inside) + map_losses.ssim(x[:, None], a[:, None]).sum()
    loss = loss + map_losses.shell_loss(x[:, None], a[:, None]).sum()
    loss.backward()
    low, high = torch.tensor([-60.0, -40.0], device=d), torch.tensor([60.0, 50.0], device=d)
    mask = wedge.wedge_mask((24, 24, 24), (low, high), device=d)
    return loss, x.grad, mask, wedge.data_consistency(a, b, mask), wedge.wedge_mask((8, 9, 10), tilt_axis="x", device=d)


def _maps(d: Any) -> Any:
    volume = _protein().to(d)
    inside = map_norm.auto_mask(volume, 2.0)
    tiling = tiles.Tiling(tuple(volume.shape), 16, 8)
    total = torch.zeros_like(volume)
    tiling.add(total, tiling.cut(volume, tiling.corners()), tiling.corners())
    tiling.divide(total)
    cube = volume[:, :24, :24]
    return (
        inside, map_norm.occupied(volume, 2.0), map_norm.grey_range(volume, 2.0, mask=inside),
        map_norm.auto_mask(volume, 2.0, 0.4), map_spectrum.match_spectrum(volume, 2.0, inside, 8.0),
        map_spectrum.flattened(volume, 2.0, 8.0), map_spectrum.estimate_resolution(volume, 2.0, inside),
        local_cc.local_correlation(volume, volume.square(), 5), total, tiling.occupied(inside),
        shells.fsc(cube, cube + 0.1 * noise(24, 24, 24).to(d), inside[:, :24, :24].float()),
        shells.fsc_cryobench(cube, cube.square()), ball.zero_background(cube),
        tiles.turned_back(tiles.turned(cube, 5), 5),
    )  # fmt: skip


def _fourier(d: Any) -> Any:
    images, disc = noise(3, D, D).to(d), fourier.half_disc(D, 6, d)
    coeffs = fourier.to_half_disc(images, disc)
    xyz = ball.half_ball(D).to(d)
    return (
        coeffs, fourier.from_half_disc(coeffs, disc), fourier.fourier_crop(images, 8), fourier.hartley(images),
        fourier.fourier_crop_volume(blobs(D, 0).to(d), 8), fourier.window_mask(D, device=d),
        fourier.phase_shift(coeffs, disc, noise(3, 2).to(d)),
        ball.volume_of_half_ball(torch.complex(noise(len(xyz)), noise(len(xyz), seed=1)).to(d), xyz, D),
        shells.radial_mean(images, shells.shell_index(D, 2, d), 9),
    )  # fmt: skip


def _layers(d: Any) -> Any:
    x, w, b = (noise(*shape).to(d).requires_grad_() for shape in ((40, 16), (16, 16), (16,)))
    q = noise(40, 3).to(d).requires_grad_()
    features = layers.fourier_features(q, noise(3, 8).to(d))
    out = layers.norm_relu(layers.product(features, w, b) * 1, x, b, b)
    out.square().sum().backward()
    return features, out, x.grad, w.grad, b.grad, q.grad


KERNELS = {
    "ctf": _ctf, "slices": _slices, "class slices": _classes, "density": _density, "degrade": _degrade,
    "so3 grid": _grids, "rotations": _rotations, "assignment, triplet": _codes, "histogram, wedge, losses": _grey,
    "maps": _maps, "fourier": _fourier, "layers": _layers,
    **{f"pose search {base}": _poses(base) for base in ("gemm", "polar", "exact", "none")},
}  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_agree_with_the_processor(name: str) -> None:
    """To rounding: the processor has compiled loops where a GPU has torch's operations."""
    kinds: list[type] = []

    def run(device: Any) -> Any:
        out = KERNELS[name](device)
        tree_map_only(Tensor, lambda t: kinds.append(type(t)), out)
        return out

    there, here = _there(run), KERNELS[name]("cpu")
    assert set(kinds) == {GpuTensor}
    here = tree_map_only(Tensor, lambda t: t.detach().resolve_conj(), here)
    torch.testing.assert_close(there, here, rtol=1e-3, atol=2e-4)
