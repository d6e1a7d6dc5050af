"""Scenes of tomograms for the missing wedge: many molecules, membranes and filaments in one periodic cube.

The whole cube is seen by a tilt series (noise added before, as the camera adds it to the projections), and crops are
cut from it afterwards, so that streaks of what lies outside a crop run through it, as they do in a tomogram. The cube
is periodic, so its wedge is exact without padding. The target is the same scene complete and without noise.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from cryosuite.kernels.atom_grid import splat_correction, splat_many, squared_frequency
from cryosuite.kernels.density import MOLMAP_SIGMA
from cryosuite.kernels.rotations import random_rotations
from cryosuite.kernels.wedge import wedge_mask
from cryosuite.simulate.map_options import PairOptions
from cryosuite.simulate.map_structures import Molecule
from cryosuite.simulate.map_volume import Draws, Volume

CELL = 1.0  # voxels: atoms this near count as one
PROTEIN = 0.4  # atomic numbers per A^3 inside a protein
LEAFLET = 20.0  # A from the middle of a membrane to its head groups
LEAFLET_SIGMA = 8.0  # A
KINDS = 6  # of molecules in one scene
FIRST_TRIES = 4  # places tried for every molecule
LIMIT = 400  # molecules


@functools.lru_cache(maxsize=512)
def cells(molecule: Molecule, voxel: float) -> tuple[np.ndarray, np.ndarray, float]:
    """A molecule as cells of CELL voxels: centres (n, 3) A, sums of atomic numbers (n,), radius of gyration A."""
    cell = np.floor(molecule.xyz / (CELL * voxel)).astype(np.int64)
    _, inverse = np.unique(cell, axis=0, return_inverse=True)
    inverse = inverse.ravel()
    weight = np.bincount(inverse, molecule.number.astype(np.float64))
    centre = np.stack([np.bincount(inverse, molecule.number * molecule.xyz[:, i]) / weight for i in range(3)], 1)
    spread = float(np.sqrt((centre**2).sum(1) @ weight / weight.sum()))
    return centre.astype(np.float32), weight.astype(np.float32), spread


def scene(
    molecules: list[Molecule], options: PairOptions, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Volume:
    """Task wedge: a crowd of a few of the molecules (the first is among them) with what surrounds them in a cell."""
    size, voxel = options.volume, options.voxel_size
    draws = Draws(generator)
    drawn = _drawn(options, draws)
    points, weights = crowd(molecules, size, voxel, drawn["crowding"], draws, generator)
    density = splat_many(points.to(device), weights.to(device)[None], size)[0] / voxel**3
    squared = squared_frequency(size, voxel, device)
    sigma = MOLMAP_SIGMA * drawn["resolution"]
    blur = torch.exp(-2 * math.pi**2 * sigma**2 * squared)
    spectrum = torch.fft.rfftn(density) * (blur * splat_correction(size, device))
    walls = [membrane(size, voxel, draws, device) for _ in range(round(drawn["membranes"]))]
    walls += [filament(size, voxel, draws, device) for _ in range(round(drawn["filaments"]))]
    if walls:
        spectrum = spectrum + torch.fft.rfftn(torch.stack(walls).amax(0) * PROTEIN) * blur
    target = torch.fft.irfftn(spectrum, s=(size,) * 3)
    white = torch.randn(target.shape, generator=generator, device=generator.device).to(target.device)
    noise = torch.fft.rfftn(white) * torch.exp(-drawn["noise_b"] / 4 * squared)
    noise = noise * (drawn["noise"] * float(target.std()))
    mask = wedge_mask(
        (size,) * 3, (drawn["tilt_low"], drawn["tilt_high"]), "y", voxel, drawn["soft"], device=target.device
    )
    seen = torch.fft.irfftn((spectrum + noise) * mask, s=(size,) * 3)
    inside = target > 0.15 * PROTEIN
    if drawn["clean"]:
        seen = target.clone()
    return Volume(seen, target, inside, drawn["resolution"], drawn)


def _drawn(options: PairOptions, draws: Draws) -> dict[str, float]:
    names = ("crowding", "membranes", "filaments", "tilt_low", "tilt_high", "soft", "scene_noise", "noise_b")
    out = {name: draws.uniform(getattr(options, name)) for name in names}
    out["noise"] = out.pop("scene_noise")
    out["resolution"] = draws.uniform(options.resolutions)
    out["clean"] = float(draws.chance(options.clean))
    return out


def crowd(
    molecules: list[Molecule], size: int, voxel: float, fill: float, draws: Draws, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Molecules in random frames, spheres of their size not overlapping much, until ``fill`` of the cube is taken.

    Returns:
        points (n, 3), grid points, wrapped into the periodic cube, and weights (n,).
    """
    kinds = [cells(m, voxel) for m in molecules[: 1 + draws.below(min(KINDS, len(molecules)))]]
    rng = np.random.default_rng(int(draws.uniform((0, 2**31))))
    edge, taken = size * voxel, 0.0
    centres, radii, points, weights = np.zeros((0, 3)), np.zeros(0), [], []
    while taken < fill * edge**3 and len(points) < LIMIT:
        xyz, weight, spread = kinds[rng.integers(len(kinds))]
        radius = 1.15 * spread
        for _ in range(FIRST_TRIES):
            centre = rng.uniform(-edge / 2, edge / 2, 3)
            apart = np.abs(centres - centre)
            apart = np.minimum(apart, edge - apart)
            if not len(centres) or ((apart**2).sum(1) > (radii + radius) ** 2).all():
                break
        else:
            taken += weight.sum() / PROTEIN  # no room: counted, so that the search ends
            continue
        centres, radii = np.vstack([centres, centre]), np.append(radii, radius)
        points.append((len(points), xyz, centre))
        weights.append(weight)
        taken += weight.sum() / PROTEIN
    if not points:
        return torch.zeros(0, 3), torch.zeros(0)
    turns = random_rotations(len(points), generator=generator).cpu().numpy()
    placed = np.concatenate([xyz @ turns[i].T + centre for i, xyz, centre in points]) / voxel
    placed = np.remainder(placed + size / 2, size) - size / 2
    return torch.from_numpy(placed.astype(np.float32)), torch.from_numpy(np.concatenate(weights))


def _bilayer(distance: Tensor) -> Tensor:
    """Density over the distance (A) from the middle of a membrane: two leaflets and little between, at most 1."""
    leaflets = torch.exp(-((distance.abs() - LEAFLET) ** 2) / (2 * LEAFLET_SIGMA**2))
    return leaflets + 0.3 * (distance.abs() < LEAFLET)


def _axes(size: int, voxel: float, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    axis = (torch.arange(size, device=device, dtype=torch.float32) - size // 2) * voxel
    return axis[:, None, None], axis[None, :, None], axis[None, None, :]


def membrane(size: int, voxel: float, draws: Draws, device: torch.device | str = "cpu") -> Tensor:  # (z, y, x)
    """A vesicle, an ellipsoid of two leaflets 40 A apart somewhere in or near the cube; up to a bit above 1."""
    half = size * voxel / 2
    radii = [draws.uniform((0.15, 0.9)) * half for _ in range(3)]
    radii = [0.7 * r + 0.3 * radii[0] for r in radii]  # not too flat
    centre = [draws.uniform((-0.9, 0.9)) * half for _ in range(3)]
    scaled = [(axis - c) / r for axis, c, r in zip(_axes(size, voxel, device), centre, radii, strict=True)]
    level = (scaled[0] ** 2 + scaled[1] ** 2 + scaled[2] ** 2).sqrt()
    slope = sum((s / r) ** 2 for s, r in zip(scaled, radii, strict=True)).sqrt() / level.clamp(min=1e-3)
    return _bilayer((level - 1) / slope.clamp(min=1e-6))


def filament(size: int, voxel: float, draws: Draws, device: torch.device | str = "cpu") -> Tensor:  # (z, y, x)
    """A straight tube (a microtubule: walls of 40 A) or rod (actin) through the cube, in any direction; 0..1."""
    half = size * voxel / 2
    tilt, turn = draws.uniform((-1.0, 1.0)), draws.uniform((0.0, 2 * math.pi))
    side = math.sqrt(1 - tilt * tilt)
    along = (tilt, side * math.sin(turn), side * math.cos(turn))
    axes = [axis - draws.uniform((-0.8, 0.8)) * half for axis in _axes(size, voxel, device)]
    on = sum(axis * a for axis, a in zip(axes, along, strict=True))
    away = (axes[0] ** 2 + axes[1] ** 2 + axes[2] ** 2 - on * on).clamp(min=0).sqrt()
    radius, wall = (105.0, 20.0) if draws.chance(0.5) else (0.0, 35.0)
    return torch.sigmoid((wall - (away - radius).abs()) / (0.3 * voxel))
