"""Enhancing a map: what a known network does to it comes out, on the map's own grid, without seams or shifts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sharpen_toy import Blur, Nothing, Same, apply_wedge, correlation, toy_map, weights

from cryosuite.commands.lvm_sharpen import _solid
from cryosuite.errors import InputError, UserNotice
from cryosuite.kernels.local_cc import local_correlation
from cryosuite.kernels.tiles import turned
from cryosuite.kernels.wedge import wedge_mask
from cryosuite.methods import lvm_sharpen_tiles
from cryosuite.methods.lvm_sharpen import EnhanceOptions, _flattened, enhance
from cryosuite.nets.scunet import Scunet, ScunetSpec

ALL = EnhanceOptions(skip=False)


def changed(grid, data):
    return replace(grid, data=np.ascontiguousarray(data, np.float32))


def test_the_identity_gives_the_map_clipped_to_its_range():
    grid = toy_map()
    found = enhance(grid, weights(Same()), ALL)
    lo, hi = found.span
    np.testing.assert_allclose(found.map.data, np.clip((grid.data - lo) / (hi - lo), 0, 1), atol=1e-5)
    found = enhance(grid, weights(Same()), replace(ALL, match_scale=True))
    np.testing.assert_allclose(found.map.data, np.clip(grid.data, lo, hi), atol=1e-5 * hi)
    assert found.map.source is grid.source and found.map.origin == grid.origin


def test_a_network_that_knows_one_fall_of_amplitudes_is_shown_that_whatever_the_b_factor():
    grid = toy_map(noise=0.0)
    spectrum = torch.fft.rfftn(torch.from_numpy(grid.data))
    z, y = (torch.fft.fftfreq(n) for n in (60, 52))
    squared = z[:, None, None] ** 2 + y[:, None] ** 2 + torch.fft.rfftfreq(66) ** 2
    dull = torch.fft.irfftn(spectrum * torch.exp(-200 / 4 * squared), s=grid.data.shape).numpy()
    options = replace(ALL, resolution=4.0)
    found = [enhance(changed(grid, d), weights(Same(), spectrum="matched"), options) for d in (grid.data, dull)]
    plain = [enhance(changed(grid, d), weights(Same()), options) for d in (grid.data, dull)]
    # 200 atoms are too few for the flat amplitudes of a protein: not all of the difference goes
    assert 1 - correlation(*(one.map.data for one in found)) < 0.6 * (1 - correlation(*(one.map.data for one in plain)))
    assert [one.resolution for one in found] == [4.0, 4.0] and plain[0].resolution is None
    noisy = changed(grid, grid.data + 0.05 * grid.data.max() * np.random.default_rng(0).normal(size=grid.data.shape))
    guess = enhance(noisy, weights(Same(), spectrum="matched"), ALL).resolution
    assert 2.4 < guess < 9.0


def test_the_blur_that_a_network_was_taught_is_taken_off_unless_asked_for():
    grid = toy_map(noise=0.0)
    sharp, smooth = (
        enhance(grid, weights(Same(), spectrum="matched"), replace(ALL, resolution=4.0, flat=flat)).map.data
        for flat in (True, False)
    )
    assert smooth.min() == 0 and smooth.max() == 1 and sharp.min() < 0
    ratio = np.abs(np.fft.rfftn(sharp)) / np.abs(np.fft.rfftn(smooth))
    s = np.sqrt(np.fft.fftfreq(60)[:, None, None] ** 2 + np.fft.fftfreq(52)[:, None] ** 2 + np.fft.rfftfreq(66) ** 2)
    low, high, beyond = (np.median(ratio[(s > a) & (s < b)]) for a, b in ((0.01, 0.06), (0.22, 0.25), (0.33, 0.4)))
    assert 2 < high / low < 3 and beyond < 1e-3  # e at 1 / d


@pytest.mark.parametrize("b_factor", [0, 200])
def test_where_the_map_has_density_is_asked_of_the_map_itself(b_factor):
    """With other amplitudes it is up to three times as bright."""
    grid, network = toy_map(noise=0.0), weights(Same(), spectrum="matched")
    squared = sum(axis**2 for axis in np.meshgrid(*map(np.fft.fftfreq, grid.data.shape), indexing="ij"))
    dull = changed(grid, np.fft.ifftn(np.fft.fftn(grid.data) * np.exp(-b_factor / 4 * squared)).real)
    solid = _solid(enhance(dull, network, replace(ALL, resolution=4.0)), dull, network)
    assert 0.002 < solid.mean() < 0.005


def test_a_small_molecule_in_a_large_box_is_as_bright_without_its_blur():
    axis = torch.arange(-32.0, 32.0).square()
    made = torch.exp(-(axis[:, None, None] + axis[:, None] + axis) / (2 * 1.5**2))
    made[made < 0.2] = 0.0
    assert (made > 0).float().mean() < 0.001
    assert 0.8 < float(_flattened(made, (1.0, 1.0, 1.0), 4.0).max()) < 1.5


def test_plain_solvent_is_not_run_and_becomes_zero():
    grid = toy_map((150, 140, 130))
    found = enhance(grid, weights(Same()), EnhanceOptions())
    assert found.run < 0.6 * found.tiles
    whole = enhance(grid, weights(Same()), ALL)
    assert whole.run == whole.tiles
    assert (found.map.data[:10] == 0).all() and (whole.map.data[:10] > 0).any()
    high = grid.data > sum(found.span) / 2
    np.testing.assert_allclose(found.map.data[high], whole.map.data[high], atol=1e-5)


@pytest.mark.parametrize("voxel", [(1.37, 1.37, 1.37), (0.8, 0.8, 0.8), (1.1, 1.3, 0.9), (2.1, 2.1, 2.1)])
def test_other_voxels_come_back_without_a_shift(voxel):
    shape = tuple(int(64 / size) for size in voxel[::-1])
    grid = toy_map(shape, voxel, noise=0.0, resolution=6.0)
    found = enhance(grid, weights(Same()), replace(ALL, match_scale=True))
    assert found.map.data.shape == grid.data.shape and found.map.voxel == grid.voxel
    same = np.clip(grid.data, *found.span)
    assert correlation(found.map.data, same) > 0.998
    # the cross-correlation peaks at no shift, to a tenth of a voxel
    cross = np.fft.fftn(found.map.data) * np.conj(np.fft.fftn(same))
    for axis, n in enumerate(grid.data.shape):
        index = [0, 0, 0]
        index[axis] = 1
        assert abs(np.angle(cross[tuple(index)])) * n / (2 * np.pi) < 0.1


def test_moving_the_tiles_by_half_a_stride_changes_nothing():
    grid = toy_map((70, 66, 72))
    even = [enhance(grid, weights(Blur(even=False)), replace(ALL, offset=offset)).map.data for offset in (0, 12)]
    np.testing.assert_allclose(*even, atol=5e-3)
    # a network that changes what it gives with all that is in the tile
    one, other = (enhance(grid, weights(Normed()), replace(ALL, offset=offset)).map.data for offset in (0, 12))
    assert not np.allclose(one, other, atol=1e-3) and correlation(one, other) > 0.99


def test_turning_the_input_turns_the_output_of_an_equivariant_network():
    grid = toy_map((56, 56, 56))
    straight = enhance(grid, weights(Blur()), ALL).map.data
    for turn in range(24):
        moved = changed(grid, turned(torch.from_numpy(grid.data), turn).numpy())
        there = enhance(moved, weights(Blur()), ALL).map.data
        assert correlation(there, turned(torch.from_numpy(straight), turn).numpy()) > 0.999


def test_averaging_over_all_rotations_makes_any_network_equivariant():
    grid = toy_map((56, 56, 56))
    net, turn = weights(Blur(even=False)), 13
    moved = changed(grid, turned(torch.from_numpy(grid.data), turn).numpy())
    gaps = {}
    for turns in (1, 24):
        options = EnhanceOptions(skip=False, turns=turns, precision="32")
        here, there = (enhance(one, net, options).map.data for one in (grid, moved))
        gaps[turns] = np.abs(there - turned(torch.from_numpy(here), turn).numpy()).max()
    assert gaps[24] < 0.1 * gaps[1]


def test_uncertainty_is_the_spread_over_rotations():
    grid = toy_map((50, 50, 50), voxel=(1.2, 1.2, 1.2))
    assert enhance(grid, weights(Same()), ALL).uncertainty is None
    options = EnhanceOptions(skip=False, turns=4, precision="32", match_scale=True)
    steady = enhance(grid, weights(Same()), options).uncertainty
    assert steady.shape == grid.data.shape and steady.max() < 1e-4
    found = enhance(grid, weights(Blur(even=False)), options)
    assert found.uncertainty.min() >= 0
    assert found.uncertainty[grid.data > found.span[1] / 2].mean() > 100 * max(steady.mean(), 1e-9)


@pytest.mark.parametrize("voxel", [(10.0, 10.0, 10.0), (7.0, 7.0, 7.0), (10.0, 11.0, 13.0)])
@pytest.mark.parametrize("axis", ["x", "y"])
def test_wedge_keeps_what_was_measured(voxel, axis):
    shape = (30, 40, 36)
    data = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    mask = wedge_mask(shape, (-50.0, 60.0), axis, voxel[::-1])
    data = apply_wedge(torch.from_numpy(data), mask).numpy() + np.float32(3)
    grid = changed(replace(toy_map(), voxel=voxel), data)
    options = EnhanceOptions(skip=False, tilt_range=(-50.0, 60.0), tilt_axis=axis)
    found = enhance(grid, weights(Blur(even=False), "wedge"), options).map.data
    before, after = (np.fft.rfftn(one.astype(np.float64)) for one in (data, found))
    kept, lost = (mask == 1).numpy(), (mask == 0).numpy()
    assert kept.mean() > 0.3 and lost.mean() > 0.1
    scale = np.abs(before[kept]).max()
    assert np.abs(after[kept] - before[kept]).max() < 1e-5 * scale
    assert np.abs(before[lost]).max() < 1e-5 * scale
    free = enhance(grid, weights(Blur(even=False), "wedge"), replace(options, consistent=False)).map.data
    made = np.fft.rfftn(free.astype(np.float64))
    assert np.abs(after[lost] - made[lost]).max() < 1e-5 * scale  # and the network's own where nothing was measured
    assert np.abs(made[kept] - before[kept]).max() > 1e-2 * np.abs(before[kept]).std()


def test_tilts_about_x_are_turned_to_the_axis_that_networks_know():
    """A network that blurs along x, across a tilt axis y, must blur along y where the tilt axis is x."""
    grid = toy_map((40, 44, 48), voxel=(10.0, 10.0, 10.0))
    data = np.zeros(grid.data.shape, np.float32)
    data[20, 22, 24] = 1.0
    spread = {}
    for axis in "xy":
        options = EnhanceOptions(skip=False, norm="emready", tilt_axis=axis, consistent=False, precision="32")
        with pytest.warns(UserNotice):
            out = enhance(changed(grid, data), weights(AlongX(), "wedge"), options).map.data
        spread[axis] = {tuple(place) for place in np.argwhere(out > 0.1) - (20, 22, 24)}
    assert spread["y"] == {(0, 0, -1), (0, 0, 0)}  # x falls behind
    # the axis across the tilts keeps its direction, so that positive tilts stay positive
    assert spread["x"] == {(0, -1, 0), (0, 0, 0)}


def test_rotations_of_the_wedge_task_leave_the_wedge_alone():
    mask = wedge_mask((16, 16, 16), (-60.0, 60.0), "y")
    cut = apply_wedge(torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(0)), mask)
    for turn in range(4):
        moved = torch.fft.rfftn(turned(cut, turn))
        assert float(moved[mask == 0].abs().max()) < 1e-4 * float(moved.abs().max())
    other = torch.fft.rfftn(turned(cut, 5))
    assert float(other[mask == 0].abs().max()) > 0.1 * float(other.abs().max())
    with pytest.raises(InputError, match="at most 4"):
        enhance(toy_map(voxel=(10.0,) * 3), weights(Same(), "wedge"), EnhanceOptions(turns=8))


def test_a_wedge_is_filled_inside_the_mask_only_and_every_tile_is_run():
    grid = toy_map((40, 70, 72), voxel=(10.0, 10.0, 10.0))
    inside = np.zeros(grid.data.shape, np.float32)
    inside[10:20, 10:20, 10:20] = 1.0
    options = EnhanceOptions(consistent=False, contour=0.5 * float(grid.data.max()), precision="32")
    found = enhance(grid, weights(Blur(), "wedge"), options, mask=changed(grid, inside))
    assert found.run == found.tiles
    assert np.array_equal(found.map.data[inside == 0], grid.data[inside == 0])
    assert np.abs(found.map.data - grid.data)[inside == 1].max() > 0.1 * grid.data.std()


def test_a_mask_bounds_the_output_and_sets_the_scale():
    grid = toy_map()
    inside = np.zeros(grid.data.shape, np.float32)
    inside[20:40, 20:40, 20:40] = 1.0
    mask = changed(grid, inside)
    found = enhance(grid, weights(Same()), EnhanceOptions(), mask=mask)
    assert (found.map.data[inside == 0] == 0).all() and found.map.data[inside == 1].max() == 1
    assert found.span[1] == pytest.approx(np.quantile(grid.data[inside == 1], 0.99, method="nearest"), rel=1e-3)
    with pytest.raises(InputError, match="no part of the map"):
        enhance(grid, weights(Same()), EnhanceOptions(), mask=changed(grid, 0 * inside))
    with pytest.raises(InputError, match="--contour"):
        enhance(grid, weights(Same()), EnhanceOptions(contour=1e9))


def test_zeros_out_of_the_network_are_zeros_in_the_file():
    grid = toy_map()
    assert (enhance(grid, weights(Nothing()), ALL).map.data == 0).all()
    found = enhance(grid, weights(Nothing()), replace(ALL, match_scale=True))
    np.testing.assert_allclose(found.map.data, found.span[0], atol=1e-6)


class Normed(Blur):
    """A blur and a little of the tile over its own root mean square: the norm of the networks."""

    def forward(self, x):
        blurred = super().forward(x)
        return 0.8 * blurred + 0.05 * blurred * torch.rsqrt(x.square().mean((1, 2, 3, 4), keepdim=True) + 1e-3)


class AlongX(Same):
    """Half of each voxel goes one voxel down along x."""

    def forward(self, x):
        return 0.5 * x + 0.5 * torch.roll(x, -1, 4)


class Hungry(Same):
    """Takes at most ``most`` tiles."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def forward(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x


def test_batches_are_halved_when_memory_runs_out():
    grid = toy_map()
    plain = enhance(grid, weights(Same()), replace(ALL, batch=8)).map.data
    with pytest.warns(UserNotice, match="going on with 2"):
        found = enhance(grid, weights(Hungry(3)), replace(ALL, batch=8)).map.data
    np.testing.assert_array_equal(found, plain)
    with pytest.raises(InputError, match="not enough memory"), pytest.warns(UserNotice):
        enhance(grid, weights(Hungry(0)), ALL)


def test_other_errors_of_the_network_are_not_taken_for_memory():
    class Broken(Same):
        def forward(self, x):
            raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        enhance(toy_map(), weights(Broken()), ALL)


def test_values_that_are_not_finite_are_refused():
    class Bad(Same):
        def forward(self, x):
            return x / 0

    with pytest.raises(InputError, match="not finite"):
        enhance(toy_map(), weights(Bad()), ALL)


def test_sums_of_huge_maps_lie_in_a_file(monkeypatch, tmp_path):
    grid = toy_map()
    plain = enhance(grid, weights(Blur()), replace(ALL, turns=2))
    monkeypatch.setattr(lvm_sharpen_tiles, "MAPPED", 1000)
    found = enhance(grid, weights(Blur()), replace(ALL, turns=2), scratch=tmp_path)
    np.testing.assert_array_equal(found.map.data, plain.map.data)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.zeros((30, 30, 30)), "all values of the map are 0"),
        (np.full((30, 30, 30), 7.0), "all values of the map are 7"),
        (np.random.default_rng(0).normal(size=(1, 30, 30)), "no map of a volume"),
        (np.random.default_rng(0).normal(size=(30, 30, 3)), "thinner than 8 voxels"),
    ],
)
def test_maps_with_nothing_in_them_are_refused(data, words):
    with pytest.raises(InputError, match=words):
        enhance(changed(toy_map(), data), weights(Same()), EnhanceOptions())


def test_no_molecule_is_made_of_noise():
    grid = changed(toy_map(), np.random.default_rng(0).normal(size=(72, 70, 68)))
    with pytest.raises(InputError, match="nothing stands out of the noise.*--no-skip"):
        enhance(grid, weights(Same()), EnhanceOptions())
    assert enhance(grid, weights(Same()), ALL).map.data.any()
    assert enhance(
        replace(grid, voxel=(10.0,) * 3), weights(Same(), "wedge"), EnhanceOptions()
    ).run  # tomograms are full


def test_another_norm_than_the_trained_one_is_said():
    with pytest.warns(UserNotice, match="trained on maps scaled"):
        found = enhance(toy_map(), weights(Same()), EnhanceOptions(norm="emready", skip=False))
    assert found.span[0] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"turns": 25}, "--tta"),
        ({"stride": 25}, "--stride"),
        ({"norm": "z"}, "--norm"),
        ({"tilt_range": (60.0, -60.0)}, "--tilt-range"),
        ({"tilt_axis": "z"}, "--tilt-axis"),
        ({"batch": 0}, "--batch"),
        ({"precision": "16"}, "--precision"),
        ({"contour": float("nan")}, "--contour"),
    ],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(InputError, match=words):
        EnhanceOptions(**options)


def test_a_finer_stride_gives_nearly_the_same():
    grid = toy_map((60, 60, 60))
    one, other = (enhance(grid, weights(Normed()), EnhanceOptions(stride=n, skip=False)) for n in (24, 16))
    assert other.run > one.run and correlation(one.map.data, other.map.data) > 0.99


@pytest.mark.slow
def test_the_networks_own_kind_runs():
    torch.manual_seed(0)
    net = weights(Scunet(ScunetSpec(d=8, bottleneck=2)))
    found = enhance(toy_map((50, 50, 50)), net, EnhanceOptions(turns=2))
    assert found.map.data.std() > 0 and found.map.data.min() >= 0 and found.map.data.max() <= 1


def test_local_correlation_is_pearsons_in_a_window():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20, 22, 24, generator=generator) + 100
    b = a + torch.randn(20, 22, 24, generator=generator)
    b[12:] = 5
    found = local_correlation(a, b, 5)
    windows = [x[4:9, 8:13, 1:6].flatten() for x in (a, b)]
    assert float(found[6, 10, 3]) == pytest.approx(float(torch.corrcoef(torch.stack(windows))[0, 1]), abs=1e-4)
    corner = [x[:3, :3, :3].flatten() for x in (a, b)]
    assert float(found[0, 0, 0]) == pytest.approx(float(torch.corrcoef(torch.stack(corner))[0, 1]), abs=1e-4)
    assert (found[15:] == 0).all()
    assert float(local_correlation(a, 3 * a - 7, 3).min()) > 0.999
    assert float(local_correlation(a, -a, (3, 5, 7)).max()) < -0.999
    with pytest.raises(ValueError, match="shapes|compared"):
        local_correlation(a, b[1:], 3)


def test_local_correlation_of_an_enhanced_map():
    found = enhance(toy_map(), weights(Same()), EnhanceOptions(local_cc=True))
    high = toy_map().data > sum(found.span) / 2
    assert np.median(found.local_cc[high]) > 0.95
