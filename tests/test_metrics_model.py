"""Map against model: the calculated map, masks, correlations, FSC, d_model, d99, and all scores together."""

from __future__ import annotations

from dataclasses import replace

import gemmi
import numpy as np
import pytest
import torch
from map_toy import toy_atoms, toy_grid

from cryosuite.data.map_grid import read_grid
from cryosuite.errors import InputError
from cryosuite.formats.atoms import read_atoms
from cryosuite.kernels import shells
from cryosuite.metrics.local import grid_centres, local_fsc, spread
from cryosuite.metrics.model import score_model
from cryosuite.metrics.model_cc import correlation, d99, d_model, highest, real_space, shell_correlation
from cryosuite.metrics.model_map import ModelOnGrid
from cryosuite.metrics.qscore import expected_q, q_scores

ATOMS = toy_atoms()
GRID = toy_grid(ATOMS)
MODEL = ModelOnGrid(ATOMS, GRID)
RNG = np.random.default_rng(0)


def noisy(values: np.ndarray, level: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=values.shape)
    return (values + level * values.std() * noise).astype(np.float32)


def test_the_calculated_map_is_the_sum_over_atoms():
    """Its transform is sum f(s) exp(-B s^2/4) exp(-2 pi i s.x) with tabulated electron scattering factors."""
    transform = np.fft.fftn(MODEL.calculated().astype(np.float64)) * np.prod(GRID.voxel)
    for k in ((0, 0, 0), (1, 2, 3), (4, -3, 6), (7, 5, -2), (0, 9, 8)):  # z y x
        s = np.array([k[2] / GRID.extent[0], k[1] / GRID.extent[1], k[0] / GRID.extent[2]])
        square = float(s @ s)
        factor = np.array([gemmi.Element(int(z)).c4322.calculate_sf(square / 4) for z in ATOMS.atomic_number])
        wave = np.exp(-2j * np.pi * ((ATOMS.xyz - GRID.origin) @ s))
        expected = (factor * np.exp(-ATOMS.b_iso * square / 4) * wave).sum()
        assert abs(transform[k] - expected) < 0.003 * abs(factor.sum())


def test_resolution_and_b_factor_of_the_calculated_map():
    full = MODEL.calculated()
    cut = np.fft.rfftn(MODEL.calculated(d_min=4.0))
    z, y, x = (
        np.fft.fftfreq(full.shape[0], 1.2),
        np.fft.fftfreq(full.shape[1], 1.0),
        np.fft.rfftfreq(full.shape[2], 1.1),
    )
    s = np.sqrt(z[:, None, None] ** 2 + y[:, None] ** 2 + x**2)
    assert np.abs(cut[s > 1 / 3.6]).max() < 0.02 * np.abs(cut).max()
    near = (s > 1 / 6) & (s < 1 / 5)
    np.testing.assert_allclose(cut[near], np.fft.rfftn(full)[near], atol=0.05 * np.abs(np.fft.rfftn(full)[near]).max())
    blurred = np.fft.rfftn(MODEL.calculated(b_iso=130.0))[near] / np.fft.rfftn(full)[near]
    np.testing.assert_allclose(np.median(blurred.real / np.exp(-100 * s[near] ** 2 / 4)), 1.0, atol=0.01)


def test_a_cropped_map_sees_atoms_beyond_its_edge():
    """The model's map on a crop is the crop of the model's map: nothing wraps around, no atom near it is lost."""
    part = (slice(14, 30), slice(13, 33), slice(15, 28))
    origin = tuple(np.add(GRID.origin, np.multiply([one.start for one in reversed(part)], GRID.voxel)).tolist())
    crop = replace(GRID, data=GRID.data[part], origin=origin)
    small = ModelOnGrid(ATOMS, crop)
    assert 0 < small.inside.sum() < len(ATOMS)
    whole = MODEL.calculated()
    np.testing.assert_allclose(small.calculated(), whole[part], atol=0.01 * whole.max())
    for radius in (None, 3.0):
        assert (small.mask(radius) != MODEL.mask(radius)[part]).mean() < 0.002


def test_masks():
    """The plain mask is all voxels within 3 A of an atom; the solvent's mask is near it; the soft one falls outside."""
    at = GRID.position_of(np.argwhere(np.ones(GRID.data.shape, bool)))
    from scipy.spatial import cKDTree

    distance = cKDTree(ATOMS.xyz).query(at)[0].reshape(GRID.data.shape)
    plain = MODEL.mask(3.0)
    assert (plain != (distance <= 3.0)).mean() < 1e-3
    solvent = MODEL.mask()
    assert solvent[distance < 1.6].all() and not solvent[distance > 4.0].any()
    assert 0.7 < solvent.sum() / plain.sum() < 1.2
    soft = MODEL.soft_mask(3.0, 3.0)
    assert (soft[plain] == 1).all() and (soft[distance > 7.5] == 0).all()
    cut = MODEL.cut
    assert plain[cut].sum() == plain.sum() and soft[cut].size < soft.size


def test_correlations():
    calculated = MODEL.calculated(d_min=3.0)
    mask = MODEL.mask()
    perfect = real_space(5 * calculated - 3, calculated, mask)
    assert min(perfect.box, perfect.mask, perfect.volume, perfect.peaks) > 0.9999 and perfect.voxels == mask.sum()
    observed = noisy(calculated, 1.0)
    found = real_space(observed, calculated, mask)
    assert found.mask == pytest.approx(np.corrcoef(observed[mask], calculated[mask])[0, 1], abs=1e-6)
    cleaned = real_space(np.where(mask, observed, 0.0), calculated, mask)  # solvent set to zero: nothing was learnt
    assert cleaned.box > found.box + 0.05 and cleaned.mask == pytest.approx(found.mask, abs=1e-6)
    np.testing.assert_allclose(
        [getattr(real_space(1e3 * observed + 7, calculated, mask), name) for name in ("box", "mask", "peaks")],
        [found.box, found.mask, found.peaks], atol=1e-5,
    )  # fmt: skip
    assert highest(np.arange(10.0), 3).sum() == 3
    assert highest(np.array([0.0, 0.0, 0.0, 5.0, 7.0]), 3).sum() == 2  # zeros have no rank among themselves
    assert np.isnan(correlation(np.ones(5), np.arange(5.0)))
    with pytest.raises(InputError, match="no voxel"):
        real_space(observed, calculated, np.zeros_like(mask))


def test_fsc_on_any_grid():
    """On a cubic map the curve is that of kernels.shells; on others two resolutions of noise meet where they should."""
    a, b = (RNG.normal(size=(24, 24, 24)).astype(np.float32) for _ in range(2))
    b = b + 0.7 * a
    found = shell_correlation(a, b, (1.5,) * 3)
    theirs = shells.fsc(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    np.testing.assert_allclose(found.fsc, theirs, atol=1e-6)
    assert found.resolution(0.3) == pytest.approx(shells.resolution(torch.from_numpy(theirs), 0.3, 24, 1.5))
    calculated = MODEL.calculated(b_iso=20.0)
    cut = MODEL.calculated(b_iso=20.0, d_min=4.0)
    curve = shell_correlation(noisy(cut, 0.05), calculated, GRID.voxel)
    assert curve.resolution(0.5) == pytest.approx(4.0, abs=0.3)  # shells of 1/40 A
    assert curve.nyquist == pytest.approx(2.4) and curve.frequency[-1] <= 1 / 2.4 + 1e-9
    assert (shell_correlation(a, a, (1.5, 1.2, 1.0)).fsc > 0.9999).all()


@pytest.mark.parametrize(("d", "b"), [(3.5, 80.0), (5.0, 150.0)])
def test_d_model_finds_resolution_and_b(d, b):
    observed = MODEL.calculated(b_iso=b, d_min=d)
    found, b_found = d_model(noisy(observed, 0.05), MODEL.calculated(b_iso=0.0), GRID.voxel)
    assert found == pytest.approx(d, abs=0.3) and b_found == pytest.approx(b, abs=30)


def test_d99():
    """A map cut at d99 correlates by .99 with itself; a blurred map has its d99 at a lower resolution."""
    sharp, blurred = (d99(MODEL.calculated(b_iso=b), GRID.voxel) for b in (10.0, 200.0))
    assert 1.5 < sharp < blurred
    values = MODEL.calculated(b_iso=200.0)
    transform = np.fft.rfftn(values)
    z, y, x = (
        np.fft.fftfreq(values.shape[0], 1.2),
        np.fft.fftfreq(values.shape[1], 1.0),
        np.fft.rfftfreq(values.shape[2], 1.1),
    )
    keep = np.sqrt(z[:, None, None] ** 2 + y[:, None] ** 2 + x**2) <= 1 / blurred
    assert correlation(np.fft.irfftn(transform * keep, s=values.shape), values) == pytest.approx(0.99, abs=0.003)


def test_all_scores():
    """Half maps of known resolution: everything fits together, and noise in the map lowers every score."""
    truth = MODEL.calculated(b_iso=40.0, d_min=3.5)
    halves = (noisy(truth, 2.0, 1), noisy(truth, 2.0, 2))
    grid = GRID.with_data((halves[0] + halves[1]) / 2)
    found = score_model(grid, ATOMS, halves=halves)
    assert found.d_min_from == "half maps" and 3.0 < found.d_min < 4.0
    assert found.fsc["half maps masked"].resolution(0.5) <= found.fsc["half maps"].resolution(0.5)
    assert found.d_model["masked"][0] == pytest.approx(3.5, abs=0.3)
    summary = found.summary()
    assert summary["cc_mask"] > 0.7 and summary["atoms_in_map"] == len(ATOMS)
    worse = score_model(grid.with_data(noisy(grid.data, 2.0)), ATOMS, resolution=3.5)
    assert worse.d_min_from == "given" and worse.d_min == 3.5
    for name in ("cc_box", "cc_mask", "cc_peaks", "q_0.4", "q_0.6"):
        assert worse.summary()[name] < summary[name]
    rows = found.residue_rows()
    assert len(found.atom_rows()) == len(ATOMS)
    assert [row["kind"] for row in rows[-2:]] == ["ion", "water"] and sum(row["atoms"] for row in rows) == len(ATOMS)
    kept = ATOMS.kind == "protein"
    assert summary["q_protein_0.4"] == pytest.approx(found.q[kept, 0].mean())
    assert set(found.expected(3.0)) == {"protein", "ion", "water"}
    assert {row["curve"] for row in found.fsc_rows()} == set(found.fsc)


def test_what_is_refused():
    with pytest.raises(InputError, match="constant"):
        score_model(GRID, ATOMS)
    with pytest.raises(InputError, match=r"none of its 120 atoms.*the map covers.*origin"):
        ModelOnGrid(replace(ATOMS, xyz=ATOMS.xyz + 500.0), GRID)
    thin = replace(GRID, data=RNG.normal(size=(1, 20, 20)).astype(np.float32))
    with pytest.raises(InputError, match="at least 4 voxels"):
        score_model(thin, ATOMS)
    with pytest.raises(InputError, match="positive"):
        score_model(GRID.with_data(RNG.normal(size=GRID.data.shape).astype(np.float32)), ATOMS, resolution=-3.0)


def test_local_resolution_between_half_maps():
    """One side of the box is noisier: its windows have the lower resolution, on a map that is no cube."""
    signal = RNG.normal(size=(40, 48, 64)).astype(np.float32)
    level = np.where(np.arange(64) < 32, 0.3, 3.0)
    halves = [torch.from_numpy((signal + level * RNG.normal(size=signal.shape)).astype(np.float32)) for _ in range(2)]
    where = np.zeros(signal.shape, bool)
    where[10:30, 10:38, 8:56] = True
    centres = grid_centres(where, 6)
    assert where[tuple(centres.T)].all() and len(grid_centres(where, 1, most=50)) <= 50
    found = local_fsc(*halves, 2.0, centres=centres)
    values = found.resolution()
    left, right = values[centres[:, 2] < 22], values[centres[:, 2] > 42]
    assert np.percentile(left, 90) < 5.0 and np.percentile(right, 10) > 8.0
    field = spread(found, values, where)
    assert (field[~where] == 0).all() and values.min() <= field[where].min() <= field[where].max() <= values.max()


def test_a_map_of_another_program(shared):
    """IMP's map of 3SFD has origin and nstart both set: the origin wins, the sum or a small error correlates less."""
    data = shared / "data"
    grid = read_grid(data / "maps_simulated" / "imp" / "3sfd_15.mrc.gz")
    assert any(grid.source.origin) and any(grid.source.nstart)
    atoms = read_atoms(data / "atomic" / "train" / "3sfd.cif.gz")
    found = []
    nstart = np.multiply(grid.source.nstart, grid.voxel)
    for shift in ((0, 0, 0), (0, 1.5, 0), nstart):
        moved = replace(grid, origin=tuple(np.add(grid.origin, shift)))
        found.append(correlation(moved.data, ModelOnGrid(atoms, moved).calculated(b_iso=1500.0, d_min=12.0)))
    assert found[0] > 0.95 and found[0] > found[1] > found[2] and found[2] < 0.8


def test_q_follows_the_published_line(shared):
    """Perfect maps of a protein: Q (sigma .6) falls with resolution as the published line does, from somewhat above."""
    atoms = read_atoms(shared / "data" / "atomic" / "bench" / "3d2f.cif.gz")
    near = np.linalg.norm(atoms.xyz - atoms.xyz[2000], axis=1) < 14
    fields = {name: getattr(atoms, name)[near] for name in atoms.__dataclass_fields__ if name != "name"}
    ball = type(atoms)(**fields)
    means = []
    for d in (2.5, 4.0):
        grid = toy_grid(ball, (d / 3.5,) * 3, 8.0)
        values = ModelOnGrid(ball, grid).calculated(b_iso=8 * d * d, d_min=d)
        means.append(q_scores(values, grid.voxel, grid.origin, ball.xyz)[:, 1].mean())
        assert 0.0 < means[-1] - expected_q("protein", d) < 0.25
    slope = (means[1] - means[0]) / 1.5
    assert slope == pytest.approx(-0.1775, abs=0.06)
