"""Scenes of tomograms: what the wedge takes, what the target keeps, and what they are made of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cryosuite.kernels.wedge import wedge_mask
from cryosuite.simulate.map_options import PairOptions
from cryosuite.simulate.map_pairs import MapPairs
from cryosuite.simulate.map_scenes import cells, crowd, filament, membrane, scene
from cryosuite.simulate.map_structures import Molecule
from cryosuite.simulate.map_volume import Draws, Volume

SIZE = 48
QUIET = PairOptions(
    task="wedge", crop=16, volume=SIZE, crops_per_volume=4, scene_noise=(0.0, 0.0), tilt_low=(-60.0, -60.0),
    tilt_high=(60.0, 60.0), soft=(1.0, 1.0), clean=0.0, norm="paper", affine=(0.0, 0.0),
)  # fmt: skip


def blob(seed: int = 0, n: int = 4000, radius: float = 45.0) -> Molecule:
    rng = np.random.default_rng(seed)
    xyz = (rng.normal(size=(n, 3)) * radius / 2).astype(np.float32)
    return Molecule(f"blob{seed}", xyz - xyz.mean(0), np.full(n, 7, np.uint8), (np.arange(n) // 8).astype(np.int32))


def seen(options: PairOptions, seed: int = 0) -> Volume:
    return scene([blob(0), blob(1)], options, torch.Generator().manual_seed(seed))


def test_the_wedge_is_empty_in_the_input_and_filled_in_the_target() -> None:
    found = seen(QUIET)
    sharp = wedge_mask((SIZE,) * 3, (-60.0, 60.0), "y", 10.0, 1.0)
    inside, kept = sharp == 0, sharp == 1
    a, b = (torch.fft.rfftn(volume) for volume in (found.input, found.target))
    assert float(a[inside].abs().max()) < 1e-3 * float(b[inside].abs().max())
    assert float(b[inside].abs().square().sum()) > 0.1 * float(b[kept].abs().square().sum() - b[0, 0, 0].abs() ** 2)
    assert float((a[kept] - b[kept]).abs().max()) < 1e-3 * float(b.abs().max())


def test_noise_comes_through_the_same_wedge() -> None:
    clean, noisy = seen(QUIET), seen(replace(QUIET, scene_noise=(1.0, 1.0), noise_b=(0.0, 0.0)))
    noise = torch.fft.rfftn(noisy.input - clean.input)
    sharp = wedge_mask((SIZE,) * 3, (-60.0, 60.0), "y", 10.0, 1.0)
    assert float(noise[sharp == 0].abs().max()) < 1e-3 * float(noise.abs().max())
    expected = (float(clean.target.std()) ** 2) * SIZE**3
    assert float(noise[sharp == 1].abs().square().mean()) == pytest.approx(expected, rel=0.05)
    assert torch.equal(noisy.target, clean.target)


def test_tilts_are_drawn_from_their_ranges() -> None:
    options = replace(QUIET, tilt_low=(-70.0, -45.0), tilt_high=(45.0, 70.0))
    drawn = [seen(replace(options, volume=16, crop=8), seed).drawn for seed in range(20)]
    low, high = (np.array([one[name] for one in drawn]) for name in ("tilt_low", "tilt_high"))
    assert -70 <= low.min() < low.max() <= -45 and 45 <= high.min() < high.max() <= 70
    assert np.ptp(low) > 10 and np.ptp(high) > 10


def test_molecules_keep_their_mass_and_do_not_overlap() -> None:
    molecules = [blob(0), blob(1)]
    points, weights = crowd(molecules, SIZE, 10.0, 0.02, Draws(torch.Generator().manual_seed(2)), torch.Generator())
    count = float(weights.sum()) / (4000 * 7)
    assert count == pytest.approx(round(count), abs=1e-3) and count >= 2
    assert float(points.min()) >= -SIZE / 2 and float(points.max()) < SIZE / 2
    more = crowd(molecules, SIZE, 10.0, 0.06, Draws(torch.Generator().manual_seed(2)), torch.Generator())[1]
    assert float(more.sum()) > 1.4 * float(weights.sum())


def test_cells_are_the_molecule_seen_coarsely() -> None:
    molecule = blob()
    centre, weight, spread = cells(molecule, 10.0)
    assert len(centre) < len(molecule) and float(weight.sum()) == pytest.approx(4000 * 7)
    assert np.allclose(weight @ centre / weight.sum(), molecule.xyz.mean(0), atol=0.05)
    assert spread == pytest.approx(float(np.sqrt((molecule.xyz**2).sum(1).mean())), rel=0.02)


def test_a_membrane_has_two_leaflets_and_a_microtubule_a_wall() -> None:
    shell = membrane(96, 5.0, Draws(torch.Generator().manual_seed(1)))
    assert 0.9 < float(shell.max()) < 1.4 and float((shell > 0.5).float().mean()) < 0.4
    profile = []
    for seed in range(8):
        tube = filament(64, 5.0, Draws(torch.Generator().manual_seed(seed)))
        assert float(tube.min()) >= 0 and float(tube.max()) <= 1.0
        profile.append(float((tube > 0.5).float().sum()))
    assert max(profile) > 1.5 * min(profile)  # tubes and rods


def test_crops_of_scenes() -> None:
    pairs = MapPairs([blob(i) for i in range(3)], QUIET, hold_out="blob1")
    batch = pairs.draw(torch.Generator().manual_seed(5))
    assert batch.wedge is not None and batch.wedge.shape == (4, 16, 16, 9)
    assert float((batch.wedge == 0).float().mean()) == pytest.approx(1 / 3, abs=0.08)
    assert float(batch.input.min()) >= 0 and float(batch.input.max()) <= 1
    again = pairs.draw(torch.Generator().manual_seed(5))
    assert torch.equal(batch.input, again.input) and torch.equal(batch.target, again.target)
    assert int(pairs.held(0, 1)[0].index[0]) == 1
    correlation = torch.corrcoef(torch.stack([batch.input.flatten(), batch.target.flatten()]))[0, 1]
    assert float(correlation) > 0.5
