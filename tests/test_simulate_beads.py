"""Molecules of beads: their projections are those of their density, and symmetry is what it says."""

import numpy as np
import pytest
import torch

from cryosuite.kernels import fourier
from cryosuite.kernels.density import MOLMAP_SIGMA, density_map
from cryosuite.kernels.rotations import random_rotations
from cryosuite.kernels.slices import extract_slices, volume_transform
from cryosuite.simulate.beads import Beads, merged, phantom_beads, project_beads, structure_beads, symmetry_mates
from cryosuite.simulate.images import Optics, Renderer
from cryosuite.simulate.sources import Structure
from cryosuite.simulate.states import State


def some_beads(width: float = 0.05, count: int = 12) -> Beads:
    """One molecule of beads of one width."""
    generator = torch.Generator().manual_seed(3)
    xyz = 0.12 * torch.randn(1, count, 3, generator=generator)
    weight = torch.rand(1, count, generator=generator)
    weight = weight / weight.sum()
    xyz = xyz - (xyz * weight[..., None]).sum(1, keepdim=True)
    return Beads(xyz, weight, torch.full((1, count), width), torch.eye(3).view(1, 1, 3, 3))


def rotations(n: int, seed: int = 0) -> torch.Tensor:
    return random_rotations(n, torch.Generator().manual_seed(seed))


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_projections_are_slices_of_the_rasterised_density():
    size = 32
    beads, turns = some_beads(), rotations(6)
    volume = density_map(beads.xyz[0] * size, beads.weight[0], size, 1.0, 0.05 * size)
    disc = fourier.half_disc(size)
    wanted = extract_slices(volume_transform(volume), turns, disc)
    images = project_beads(beads, torch.zeros(6, dtype=torch.int64), turns, torch.zeros(6, 2), size)
    found = fourier.to_half_disc(images, disc)
    for shell in range(1, int(0.7 * size / 2)):
        at = disc.shell == shell
        a, b = found[:, at], wanted[:, at]
        frc = (a * b.conj()).real.sum() / (a.abs().square().sum() * b.abs().square().sum()).sqrt()
        assert frc > 0.99
    assert torch.allclose(found, wanted, atol=0.03 * float(wanted.abs().max()))  # what interpolation costs


def test_projections_are_those_of_the_command_simulate():
    size, pixel, resolution = 32, 5.0, 30.0
    edge = size * pixel
    beads = some_beads(MOLMAP_SIGMA * resolution / edge)
    state = State("toy", (beads.xyz[0] * edge).numpy(), beads.weight[0].numpy())
    turns, shift = rotations(5), 0.1 * (torch.rand(5, 2) - 0.5)
    nothing = torch.zeros(5, dtype=torch.int64)
    renderer = Renderer([state], Optics(size, pixel, 2 * size, resolution))
    wanted = renderer.to_images(renderer.spectra(nothing, turns, shift))
    found = project_beads(beads, nothing, turns, shift, size)
    assert torch.allclose(found, wanted, atol=2e-3 * float(wanted.max()))


def test_a_shift_is_a_phase_ramp():
    size = 32
    beads, turns, none = some_beads(), rotations(4), torch.zeros(4, dtype=torch.int64)
    shift = torch.tensor([[0.03, -0.05], [0.0, 0.1], [1 / 32, 0.0], [-0.07, 0.02]])
    disc = fourier.half_disc(size, 12)
    moved = fourier.to_half_disc(project_beads(beads, none, turns, shift, size), disc)
    still = fourier.to_half_disc(project_beads(beads, none, turns, torch.zeros(4, 2), size), disc)
    back = fourier.phase_shift(moved, disc, shift)  # a pose's shift is ADDED to centre
    assert torch.allclose(back, still, atol=2e-3 * float(still.abs().max()))


def test_images_cannot_tell_the_hand():
    J = torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    beads, turns, none = some_beads(), rotations(4), torch.zeros(4, dtype=torch.int64)
    flipped = Beads(beads.xyz @ J, beads.weight, beads.width, beads.mates)
    still = torch.zeros(4, 2)
    assert torch.allclose(
        project_beads(beads, none, turns, still, 32), project_beads(flipped, none, J @ turns @ J, still, 32), atol=1e-7
    )


def test_a_phantom_is_centred_normalised_and_a_function_of_the_seed():
    made, again = (phantom_beads(16, torch.Generator().manual_seed(5), 96) for _ in range(2))
    assert torch.equal(made.xyz, again.xyz) and torch.equal(made.weight, again.weight)
    assert torch.allclose(made.weight.sum(1), torch.ones(16), atol=1e-5)
    assert (made.xyz * made.weight[..., None]).sum(1).abs().max() < 1e-5
    assert made.radius().max() < 0.5
    with pytest.raises(ValueError, match="12"):
        phantom_beads(1, torch.Generator(), 50)


def test_symmetry_mates_show_the_same_image_also_after_a_turn():
    made = phantom_beads(12, torch.Generator().manual_seed(1), 96, symmetric=1.0).turned(rotations(12, 4))
    turns, which, still = rotations(12), torch.arange(12), torch.zeros(12, 2)
    first = project_beads(made, which, turns, still, 32)
    folds = set()
    for g in range(made.mates.shape[1]):
        other = project_beads(made, which, turns @ made.mates[:, g], still, 32)
        assert torch.allclose(first, other, atol=1e-5 * float(first.max()))
    for mates in made.mates:
        folds.add(1 + int(((mates[1:] - torch.eye(3)).abs().amax((1, 2)) > 0.1).sum()))
    assert folds == {2, 3, 4}


def trimer() -> Structure:
    """Three copies of a random chain about z, far enough apart to be told."""
    rng = np.random.default_rng(0)
    unit = rng.normal(0, 8, (300, 3)) + [25, 0, 0]
    weight = rng.choice([6.0, 7.0, 8.0], 300)
    copies = []
    for k in range(3):
        c, s = np.cos(2 * np.pi * k / 3), np.sin(2 * np.pi * k / 3)
        copies.append(unit @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]))
    chain = np.repeat(["A", "B", "C"], 300)
    return Structure("toy", np.concatenate(copies) + 50.0, np.tile(weight, 3), 1e5, chain, np.tile(np.arange(300), 3))


def test_the_symmetry_of_a_structure_is_found():
    structure = trimer()
    mates = symmetry_mates(structure)
    assert len(mates) == 3 and np.allclose(mates[0], np.eye(3))
    assert np.allclose(np.linalg.det(mates), 1)
    for mate in mates[1:]:
        assert np.trace(mate) == pytest.approx(1 + 2 * np.cos(2 * np.pi / 3), abs=1e-3)
    keep = np.ones(900, bool)
    keep[650:] = False  # most of chain C is gone
    broken = Structure(
        "b", structure.xyz[keep], structure.weight[keep], 1e5, structure.chain[keep], structure.residue[keep]
    )
    assert len(symmetry_mates(broken)) == 1


def test_merged_atoms_keep_mass_centre_and_shape():
    structure = trimer()
    xyz, weight, width = merged(structure.centred(), structure.weight, 60, 8.0)
    assert len(xyz) == 60 and (weight > 0).sum() > 30 and weight.sum() == pytest.approx(1)
    assert np.abs((xyz * weight[:, None]).sum(0)).max() < 1e-6
    radius = np.sqrt((((xyz**2).mean(1) + width**2) * weight).sum() * 3)
    true = np.sqrt(np.average((structure.centred() ** 2).sum(1), weights=structure.weight) + 3 * (0.225 * 8) ** 2)
    assert radius == pytest.approx(true, rel=0.02)


def test_structures_are_read_as_beads(shared):
    files = [shared / "data" / "atomic" / "train" / f"{name}.cif.gz" for name in ("1hfe", "1a4l")]
    beads, names = structure_beads(files, 120)
    assert names == ["1hfe", "1a4l"] and beads.xyz.shape == (2, 120, 3)
    assert 10 < beads.radius()[0] < 120  # Angstrom
    images = project_beads(
        beads.scaled(torch.full((2,), 1 / 150.0)), torch.tensor([0, 1]), rotations(2), torch.zeros(2, 2), 32
    )
    assert images.sum((1, 2)) == pytest.approx(1, abs=0.02)
