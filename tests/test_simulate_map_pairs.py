"""Simulated pairs of maps: the physics of input and target, what is drawn, what is held out, what it costs."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from cryosuite.errors import InputError
from cryosuite.formats.form_factors import electron_factors
from cryosuite.kernels.atom_grid import squared_frequency
from cryosuite.kernels.density import MOLMAP_SIGMA, molmap
from cryosuite.kernels.map_norm import grey_range
from cryosuite.simulate.map_options import MapBatch, PairOptions
from cryosuite.simulate.map_pairs import MapPairs, robust_range
from cryosuite.simulate.map_structures import Molecule
from cryosuite.simulate.map_volume import Draws, Volume, _drawn, simulate

PLAIN = PairOptions(
    crop=16, volume=64, crops_per_volume=4, resolution=(4.0, 4.0), cut=(1.0, 1.0), b=(60.0, 60.0), noise=(0.0, 0.0),
    solvent=(0.0, 0.0), source_voxel=(0.5, 0.5), affine=(0.0, 0.0), clean=0.0, nothing=0.0, chance_sharpened=0.0,
    chance_local=0.0,    chance_anisotropy=0.0, chance_lipid=0.0, chance_missing=0.0, chance_tight=0.0,
)  # fmt: skip


def ball(seed: int = 0, n: int = 1200, radius: float = 18.0, name: str = "ball") -> Molecule:
    """Atoms in a ball of a protein's density, eight per residue along a space-filling order."""
    rng = np.random.default_rng(seed)
    xyz = rng.normal(size=(n, 3))
    xyz *= (radius * rng.random(n) ** (1 / 3) / np.linalg.norm(xyz, axis=1))[:, None]
    xyz = xyz[np.lexsort(xyz.T)]
    number = rng.choice([6, 7, 8, 16], n, p=[0.63, 0.17, 0.19, 0.01])
    xyz -= np.average(xyz, axis=0, weights=number)
    return Molecule(name, xyz.astype(np.float32), number.astype(np.uint8), (np.arange(n) // 8).astype(np.int32))


def made(options: PairOptions, seed: int = 0, molecule: Molecule | None = None, as_is: bool = True) -> Volume:
    return simulate(molecule or ball(), options, torch.Generator().manual_seed(seed), as_is=as_is)


def shells(volume: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Re F G* summed over shells of width 1, (n//2 + 1,) float64."""
    n = volume.shape[0]
    index = (squared_frequency(n, 1.0).sqrt() * n).round().long().flatten()
    cross = (torch.fft.rfftn(volume) * torch.fft.rfftn(other).conj()).real.flatten().double()
    return torch.bincount(index, cross)[: n // 2 + 1]


def displacement(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """By how many voxels b must be moved to lie on a: the peak of the correlation, refined by parabolas."""
    spectrum = torch.fft.rfftn(a - a.mean()) * torch.fft.rfftn(b - b.mean()).conj()
    cc = torch.fft.irfftn(spectrum, s=a.shape)
    peak = np.unravel_index(int(cc.argmax()), cc.shape)
    found = []
    for axis, n in enumerate(a.shape):
        at = [float(cc[tuple((p + (step if i == axis else 0)) % n for i, p in enumerate(peak))]) for step in (-1, 0, 1)]
        fine = (at[0] - at[2]) / (2 * (at[0] - 2 * at[1] + at[2]))
        found.append((peak[axis] + n // 2) % n - n // 2 + fine)
    return np.array(found)


def test_target_is_molmap_and_keeps_its_mass() -> None:
    molecule = ball()
    found = made(PLAIN, molecule=molecule)
    mass = float(molecule.number.sum(dtype=np.float64))
    assert float(found.target.double().sum()) == pytest.approx(mass, rel=1e-4)
    points, weights = torch.from_numpy(molecule.xyz), torch.from_numpy(molecule.number).float()
    sigma = MOLMAP_SIGMA * 4.0
    wanted = molmap(points, weights, (64,) * 3, (-32.0,) * 3, 1.0, sigma)
    assert float((found.target - wanted).abs().max()) < 0.01 * float(wanted.max())


def test_input_scatters_as_electrons_do() -> None:
    molecule = ball()
    found = made(PLAIN, molecule=molecule)
    forward = electron_factors(molecule.number, np.zeros(1)).sum()
    assert float(found.input.double().sum()) == pytest.approx(forward, rel=0.04)  # two grids for all elements


def test_b_factor_is_the_guinier_slope_of_the_pair() -> None:
    sharp, blurred = (made(replace(PLAIN, b=(b, b))).input for b in (0.0, 140.0))
    n = len(shells(sharp, sharp))
    s2 = (torch.arange(n) / 64.0).double() ** 2
    inside = (s2 > (1 / 12) ** 2) & (s2 < (1 / 4.5) ** 2)
    ratio = torch.log(shells(blurred, blurred) / shells(sharp, sharp))[inside]
    slope = np.polyfit(s2[inside].numpy(), ratio.numpy(), 1)[0]
    assert -2 * slope == pytest.approx(140.0, rel=0.03)


def test_sharpening_takes_its_share_of_b_back() -> None:
    half = made(replace(PLAIN, b=(100.0, 100.0), sharpened=(0.5, 0.5), chance_sharpened=1.0)).input
    plain = made(replace(PLAIN, b=(50.0, 50.0))).input
    assert torch.allclose(half, plain, atol=1e-5 * float(plain.max()))


def test_noise_is_that_of_the_half_maps() -> None:
    """At the resolution d the FSC of half maps is 1/7, so that of their mean with the truth sqrt(2/7 / (8/7)) = 1/2."""
    options = replace(PLAIN, volume=96, resolution=(5.0, 5.0), cut=(0.8, 0.8))
    clean, noisy = (made(replace(options, noise=(x, x)), seed=1).input for x in (0.0, 1.0))
    fsc = shells(noisy, clean) / (shells(clean, clean) * shells(noisy, noisy)).sqrt()
    s = torch.arange(len(fsc)) / 96
    assert float(fsc[(s > 0.17) & (s < 0.23)].mean()) == pytest.approx(0.5, abs=0.08)
    assert float(fsc[(s > 0.03) & (s < 0.1)].min()) > 0.95
    assert float(fsc[s > 0.24].abs().mean()) < 0.5


def test_nothing_lies_beyond_the_filter_nor_the_source_voxel() -> None:
    noisy = made(replace(PLAIN, resolution=(5.0, 5.0), noise=(1.0, 1.0))).input
    power = shells(noisy, noisy)
    s = torch.arange(len(power)) / 64
    assert float(power[s > 0.2 + 3 / 64].max()) < 1e-4 * float(power[(s > 0.1) & (s < 0.2)].mean())
    coarse = made(replace(PLAIN, resolution=(2.5, 2.5), source_voxel=(2.0, 2.0))).input
    spectrum = torch.fft.rfftn(coarse).abs()
    assert float(spectrum[:, :, 17:].max()) < 1e-4 * float(spectrum.max())  # 1/(2 x 2 A) = 16/64
    assert float(spectrum[0, 12, 12]) > 0


def test_the_field_blurs_unevenly_and_only_downwards() -> None:
    flat = made(PLAIN).input
    options = replace(PLAIN, chance_local=1.0, local_b=(200.0, 200.0))
    uneven = made(options).input
    assert float(uneven.sum()) == pytest.approx(float(flat.sum()), rel=0.02)
    contrast = torch.nn.functional.avg_pool3d((uneven - flat).square()[None], 16) / torch.nn.functional.avg_pool3d(
        flat.square()[None], 16
    ).clamp(min=1e-12)
    inner = contrast[0, 1:3, 1:3, 1:3]
    assert float(inner.max()) > 2 * float(inner.min())
    assert float(shells(uneven, uneven)[12:16].sum()) < float(shells(flat, flat)[12:16].sum())


def test_anisotropy_blurs_one_direction_most() -> None:
    options = replace(PLAIN, chance_anisotropy=1.0, anisotropy=(4.0, 4.0), anisotropy_b=(40.0, 40.0))
    ratio = torch.fft.rfftn(made(options).input).abs() / torch.fft.rfftn(made(PLAIN).input).abs().clamp(min=1e-9)
    radius = squared_frequency(64, 1.0).sqrt()
    ring = ratio[(radius > 0.19) & (radius < 0.21)]
    low, high = math.exp(-40 * 0.04 / 4), math.exp(-160 * 0.04 / 4)
    assert float(ring.max()) == pytest.approx(low, rel=0.15)
    assert float(ring.min()) == pytest.approx(high, rel=0.3)


def test_solvent_lipid_and_tight_masks() -> None:
    plain = made(PLAIN)
    wet = made(replace(PLAIN, solvent=(0.5, 0.5)))
    level = float(wet.input[0, 0, 0])
    inside = float(plain.input[plain.mask].mean())
    assert level == pytest.approx(0.5 * inside, rel=0.05)
    assert float(wet.input[32, 32, 32]) == pytest.approx(float(plain.input[32, 32, 32]), abs=0.1 * inside)
    fatty = made(replace(PLAIN, chance_lipid=1.0, lipid=(0.5, 0.5)))
    more = fatty.input - plain.input
    assert float(more[~plain.mask].max()) == pytest.approx(0.5 * inside, rel=0.1)
    assert float(more[plain.mask].mean()) < 0.05 * inside
    tight = made(replace(PLAIN, chance_tight=1.0, noise=(1.0, 1.0)))
    assert not tight.input[~tight.mask].any()
    assert torch.equal(fatty.target, plain.target)


def test_missing_residues_lack_in_the_target_only() -> None:
    plain, less = made(PLAIN), made(replace(PLAIN, chance_missing=1.0, missing=(0.1, 0.1)))
    share = 1 - float(less.target.sum()) / float(plain.target.sum())
    assert 0.03 < share < 0.11  # stretches may overlap
    assert torch.allclose(less.input, plain.input, atol=1e-5)


def test_input_and_target_lie_on_one_another() -> None:
    options = PairOptions(
        volume=64, crop=16, chance_missing=0.0, chance_lipid=0.0, clean=0.0, nothing=0.0, resolution=(3.0, 6.0)
    )
    for seed in range(6):
        found = made(options, seed, as_is=False)
        assert np.abs(displacement(found.input, found.target)).max() < 0.1
    found = made(replace(PLAIN, chance_local=0.0))
    axis = torch.arange(64.0)
    for dims in ((1, 2), (0, 2), (0, 1)):
        at = [float((v.sum(dims) * axis).sum() / v.sum()) for v in (found.input, found.target)]
        assert at[0] == pytest.approx(at[1], abs=0.1)
        assert at[1] == pytest.approx(32.0, abs=0.02)  # the centre of mass is voxel size//2


def test_clean_input_is_the_target() -> None:
    pairs = MapPairs([ball()], replace(PLAIN, clean=1.0))
    for seed in range(3):
        batch = pairs.draw(torch.Generator().manual_seed(seed))
        assert torch.allclose(batch.input, batch.target, atol=1e-4)


def test_noise_alone_has_an_empty_target() -> None:
    batch = MapPairs([ball()], replace(PLAIN, nothing=1.0)).draw(torch.Generator().manual_seed(0))
    assert not batch.target.any()
    assert 0.1 < float(batch.input.std()) < 0.4  # it fills the range, as noise does that is given to the command
    power = shells(*(2 * [made(replace(PLAIN, nothing=1.0)).input]))
    assert float(power[25:].max()) < 1e-4 * float(power[:16].max())  # low-passed at 4 A as the map would be


def test_grey_values() -> None:
    """1 is the .99 quantile inside the molecule, whatever lies around it; the input's range is that of the command."""
    small, large = (
        MapPairs([ball()], replace(PLAIN, volume=size)).volume(0, torch.Generator().manual_seed(4)) for size in (64, 96)
    )
    for found in (small, large):
        assert float((found.target[found.mask] >= 1).float().mean()) == pytest.approx(0.01, abs=0.004)
        assert float(found.target.min()) == 0.0
    raw = [made(replace(PLAIN, volume=size)) for size in (64, 96)]
    inner = slice(16, 80)
    assert torch.allclose(raw[0].target, raw[1].target[inner, inner, inner], atol=2e-3)
    scales = [robust_range(volume.target, volume.mask)[1] for volume in raw]
    assert scales[0] == pytest.approx(scales[1], rel=0.02)
    noisy = made(replace(PLAIN, volume=96, noise=(0.5, 0.5), solvent=(0.2, 0.2)))
    known, found = robust_range(noisy.input, noisy.mask), grey_range(noisy.input, 1.0)
    assert found[0] == pytest.approx(known[0], abs=0.03 * known[1])
    assert found[1] == pytest.approx(known[1], rel=0.05)


def test_what_is_drawn_stays_in_its_range() -> None:
    options = PairOptions(task="sharpen")
    drawn = [_drawn(options, Draws(torch.Generator().manual_seed(seed))) for seed in range(300)]
    low, high = options.resolutions
    for name in ("resolution", "b", "local_b", "noise", "centre", "solvent", "source_voxel", "missing", "anisotropy"):
        bounds = (low, high) if name == "resolution" else getattr(options, name)
        values = np.array([one[name] for one in drawn if one[name] != 0])
        width = bounds[1] - bounds[0]
        assert values.min() >= bounds[0] and values.max() <= bounds[1]
        assert values.min() < bounds[0] + 0.1 * width and values.max() > bounds[1] - 0.1 * width
    assert min(one["target"] for one in drawn) == 2.7
    assert np.mean([one["clean"] for one in drawn]) == pytest.approx(options.clean, abs=0.05)
    assert np.mean([one["local_b"] > 0 for one in drawn]) == pytest.approx(options.chance_local, abs=0.08)


def test_superres_targets_are_finer_than_their_inputs() -> None:
    options = PairOptions(task="superres", volume=64, crop=16, crops_per_volume=4)
    drawn = [_drawn(options, Draws(torch.Generator().manual_seed(seed))) for seed in range(100)]
    assert {one["target"] for one in drawn} == {3.0}
    assert min(one["resolution"] for one in drawn) >= 4.0 and max(one["resolution"] for one in drawn) <= 8.0
    assert not any(one["clean"] for one in drawn)
    assert float(MapPairs([ball()], options).draw(torch.Generator().manual_seed(0)).resolution[0]) == 3.0


def test_a_seed_is_a_batch() -> None:
    pairs = MapPairs([ball(), ball(1, name="other")], PairOptions(volume=64, crop=16, crops_per_volume=5))
    first, again, other = (pairs.draw(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    for a, b in zip(first, again, strict=True):
        assert a is b is None or torch.equal(a, b)
    assert not torch.equal(first.input, other.input)
    assert first.input.shape == first.target.shape == first.mask.shape == (5, 1, 16, 16, 16)
    assert first.input.dtype == first.target.dtype == first.mask.dtype == torch.float32
    assert first.index.dtype == torch.int64
    for values in (first.input, first.target):
        assert float(values.min()) >= 0 and float(values.max()) <= 1
    assert torch.equal(first.mask > 0, (first.input > 0.02) | (first.target > 0.02))


def test_held_out_molecules_are_never_trained_on() -> None:
    molecules = [ball(seed, name=f"m{seed}") for seed in range(4)]
    options = replace(PLAIN, crops_per_volume=1)
    pairs = MapPairs(molecules, options, hold_out="m1,m3")
    drawn = {int(pairs.draw(torch.Generator().manual_seed(seed)).index[0]) for seed in range(24)}
    assert drawn == {0, 2}
    held = pairs.held(7, 4)
    assert [pairs.names[int(batch.index[0])] for batch in held] == ["m1", "m3", "m1", "m3"]
    assert all(torch.equal(a.input, b.input) for a, b in zip(held, pairs.held(7, 4), strict=True))
    assert MapPairs(molecules, options).held(0, 3) == []
    assert len(MapPairs(molecules, options, hold_out="2").testing) == 2
    with pytest.raises(InputError, match="m9"):
        MapPairs(molecules, options, hold_out="m9")


def test_what_is_held_out_does_not_follow_the_training() -> None:
    """Two trainings with other shares of clean maps and of noise are judged by the same crops."""
    molecules = [ball(seed, name=f"m{seed}") for seed in range(2)]
    batches = [
        MapPairs(molecules, replace(PLAIN, clean=clean, nothing=nothing), hold_out="m1").held(3, 2)
        for clean, nothing in ((0.0, 0.0), (0.9, 0.1))
    ]
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.input, other.input) and torch.equal(one.target, other.target)


def test_crops_hold_molecule_but_for_a_tenth() -> None:
    options = replace(PLAIN, volume=96, crop=16, crops_per_volume=20, solvent_crops=0.1)
    pairs = MapPairs([ball()], options)
    batch = pairs.draw(torch.Generator().manual_seed(0))
    filled = (batch.target > 0.05).float().mean((1, 2, 3, 4))
    assert int((filled > 0.02).sum()) >= 18
    anywhere = MapPairs([ball()], replace(options, solvent_crops=1.0)).draw(torch.Generator().manual_seed(0))
    assert int(((anywhere.target > 0.05).float().mean((1, 2, 3, 4)) > 0.02).sum()) < 18


def test_pretraining_needs_no_target() -> None:
    batch: MapBatch = MapPairs([ball()], replace(PLAIN, task="pretrain")).draw(torch.Generator().manual_seed(0))
    assert torch.equal(batch.input, batch.target)


def test_options_that_cannot_be() -> None:
    for wrong in ({"task": "denoise"}, {"volume": 90}, {"volume": 32, "crop": 48}):
        with pytest.raises(ValueError):
            PairOptions(**wrong)


@pytest.mark.slow
def test_a_draw_is_cheap(shared) -> None:
    """Less than 15 % of the step that 16 crops of 32^3 take to train on (.11 s each on one core)."""
    pairs = MapPairs.open(str(shared / "data/atomic/train/1gxd.cif.gz"), PairOptions(crop=32))
    generator = torch.Generator().manual_seed(0)
    spent = []
    for _ in range(8):
        began = time.process_time()
        pairs.draw(generator)
        spent.append(time.process_time() - began)
    assert min(spent) < 0.25
