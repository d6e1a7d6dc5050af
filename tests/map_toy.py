"""A small protein-like model and empty grids for tests of map-model scores."""

from __future__ import annotations

import numpy as np

from cryosuite.data.map_grid import MapGrid
from cryosuite.formats.atoms import Atoms
from cryosuite.formats.mrc import Map


def toy_atoms(n: int = 120, seed: int = 0, centre=(20.0, -30.0, 12.0)) -> Atoms:
    """A chain of carbon, nitrogen and oxygen atoms 1.5 A apart in a blob, in residues of five, one ion, one water."""
    rng = np.random.default_rng(seed)
    xyz = [np.zeros(3)]
    while len(xyz) < n:
        step = rng.normal(size=3) - 0.15 * xyz[-1]
        new = xyz[-1] + 1.5 * step / np.linalg.norm(step)
        if min(np.linalg.norm(new - old) for old in xyz) > 1.2:
            xyz.append(new)
        elif rng.random() < 0.1:
            xyz.append(xyz[rng.integers(len(xyz))] + 1.5 * rng.normal(size=3))
    xyz = np.array(xyz) - np.mean(xyz, 0) + centre
    number = rng.choice([6, 6, 6, 7, 8], n)
    residue = np.arange(n) // 5 + 1
    kind = np.full(n, "protein", dtype="<U8")
    name = np.full(n, "ALA")
    kind[-2:], name[-2:] = ("ion", "water"), ("ZN", "HOH")
    residue[-2:] = residue[-3] + [1, 2]
    return Atoms(
        xyz, number, number * 2.0, np.where(np.arange(n) < n // 2, "A", "B"), residue, np.full(n, 30.0), np.ones(n),
        np.full(n, "CA"), name, residue.astype(str), kind, "toy",
    )  # fmt: skip


def toy_grid(atoms: Atoms, voxel=(1.1, 1.0, 1.2), margin: float = 12.0) -> MapGrid:
    """An empty map around the atoms."""
    origin = tuple((atoms.xyz.min(0) - margin).tolist())
    shape = np.ceil((atoms.xyz.max(0) + margin - origin) / voxel).astype(int)[::-1]
    data = np.zeros(tuple(shape.tolist()), np.float32)
    return MapGrid(data, voxel, origin, Map(data, voxel[0], path="toy.mrc"))
