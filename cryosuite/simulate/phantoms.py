"""Procedural proteins: helices and strands packed into domains, domains into distinct complexes of 100-600 kDa.

A phantom is drawn from a seed alone, so that a simulated set needs no download. Geometry and density are a protein's:
helices rise 1.5 A per residue at 10 A spacing, strands 3.3 A at 4.8 A within a sheet and 10 A between sheets (which
gives the 0.81 Da/A^3 of proteins by itself), about 8 heavy atoms per residue. Loops are left out: they carry little
mass and no shape. At 5-10 A the helices are visible as rods.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

RESIDUE_DA = 110.0  # mean mass of an amino acid in a protein
DENSITY = 0.81  # Da/A^3
MASS_RANGE = (100e3, 600e3)  # Da
MAX_RADIUS = 125.0  # A: fits a box of 320 A with shifts
CLASH = 4.5  # A: nearer C-alphas of another domain are taken away

# one residue: radius (A), angle (deg) and height (A) of N, CA, C, O, CB and three side-chain atoms about a helix axis
_HELIX = np.array(
    [
        [1.55, -27.8, -0.9], [2.28, 0.0, 0.0], [1.66, 26.3, 1.1], [2.03, 22.0, 2.3],
        [3.30, -15.0, -0.6], [4.40, -5.0, -1.2], [5.30, -17.0, -0.7], [5.60, 5.0, -2.0],
    ]
)  # fmt: skip
# the same about a strand: along, within the sheet, out of the sheet (A); the last flips sign from residue to residue
_STRAND = np.array(
    [
        [-1.2, 0.3, 0.4], [0.0, 0.0, 0.9], [1.2, -0.3, 0.4], [1.3, -1.5, 0.4],
        [0.0, 0.8, 2.3], [0.5, 0.3, 3.6], [-0.4, 1.3, 4.5], [0.8, -0.9, 4.4],
    ]
)  # fmt: skip
_ATOMIC_NUMBER = np.array([7, 6, 6, 8, 6, 6, 6, 7], np.float64)
ATOMS = len(_ATOMIC_NUMBER)


@dataclass
class Phantom:
    """A procedural protein.

    Attributes:
        xyz: (n, 3) float64, A, the centre of mass at the origin.
        atomic_number: (n,) float64, the weight of each atom.
        domain: (n,) int, the domain of each atom (symmetry copies keep their domain's number).
        mass: Da.
        symmetry: n of Cn about z.
    """

    xyz: np.ndarray
    atomic_number: np.ndarray
    domain: np.ndarray
    mass: float
    symmetry: int


def _helix(count: int, phase: float) -> np.ndarray:
    """An alpha helix along z, starting at 0: (count, 8, 3) A."""
    residue = np.arange(count)[:, None]
    angle = np.deg2rad(_HELIX[:, 1] + 100.0 * residue + phase)
    return np.stack([_HELIX[:, 0] * np.cos(angle), _HELIX[:, 0] * np.sin(angle), _HELIX[:, 2] + 1.5 * residue], axis=-1)


def _strand(count: int, sign: int) -> np.ndarray:
    """A strand along z in the sheet plane xz, starting at 0: (count, 8, 3) A."""
    residue = np.arange(count)[:, None]
    side = sign * (1 - 2 * (residue % 2))
    along, within, out = _STRAND.T
    return np.stack(np.broadcast_arrays(within * np.ones_like(side), out * side, along + 3.3 * residue), axis=-1)


def _rods(semi_axes: np.ndarray, spacing: np.ndarray, stagger: bool, rng: np.random.Generator) -> list[tuple]:
    """Straight pieces along z that fill an ellipsoid: (x, y, z from, z to), cut into pieces of 12-40 A."""
    span = np.ceil(semi_axes[:2] / spacing).astype(int) + 1
    offset = rng.uniform(0, 1, 2)
    pieces = []
    for row in range(-span[1], span[1] + 1):
        for column in range(-span[0], span[0] + 1):
            x = (column + offset[0] + (0.5 * (row % 2) if stagger else 0.0)) * spacing[0]
            y = (row + offset[1]) * spacing[1]
            room = 1.0 - (x / semi_axes[0]) ** 2 - (y / semi_axes[1]) ** 2
            if room <= 0.02:
                continue
            top = semi_axes[2] * np.sqrt(room)
            z = -top
            while top - z > 8.0:
                end = min(z + rng.uniform(15.0, 40.0), top)
                end = top if top - end < 10.0 else end
                pieces.append((x, y, z, end))
                z = end + 2.0  # the turn
    return pieces


def _domain(mass: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A globular domain: residues (n, 8, 3) in its own frame, and its semi-axes (3,) A."""
    shape = rng.uniform(0.7, 1.5, 3)
    semi_axes = shape * (mass / DENSITY / (4 / 3 * np.pi) / shape.prod()) ** (1 / 3)
    is_helix = rng.random() < 0.65
    spacing = np.array([10.2, 8.8]) if is_helix else np.array([4.8, 10.0])
    residues = []
    for x, y, start, end in _rods(semi_axes, spacing, is_helix, rng):
        rise = 1.5 if is_helix else 3.3
        count = max(2, int((end - start) / rise))
        piece = _helix(count, rng.uniform(0, 360)) if is_helix else _strand(count, 1 if rng.random() < 0.5 else -1)
        tilt = rng.normal(0, 0.10 if is_helix else 0.03, 2)  # packed elements are never quite parallel
        piece = piece + np.array([0.0, 0.0, start + (end - start - count * rise) / 2])
        piece = piece + piece[..., 2:] * np.array([tilt[0], tilt[1], 0.0]) + np.array([x, y, 0.0])
        residues.append(piece)
    if not residues:
        residues.append(_helix(max(4, int(mass / RESIDUE_DA)), 0.0))
    residues = np.concatenate(residues)
    twist = rng.uniform(-0.006, 0.006)  # rad/A: a left- or right-handed twist of the whole bundle
    angle = twist * residues[..., 2]
    x, y = residues[..., 0].copy(), residues[..., 1].copy()
    residues[..., 0] = x * np.cos(angle) - y * np.sin(angle)
    residues[..., 1] = x * np.sin(angle) + y * np.cos(angle)
    side_chain = rng.normal(0, 0.4, (len(residues), 3, 3))
    residues[:, 5:] += side_chain
    return residues, semi_axes


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """One uniform rotation matrix (3, 3) float64."""
    w, x, y, z = (q := rng.normal(size=4)) / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def turn_about(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rotation matrix (3, 3) for column vectors by ``angle`` (rad) about ``axis`` (3,) (Rodrigues)."""
    a = np.asarray(axis, np.float64) / np.linalg.norm(axis)
    cross = np.array([[0, -a[2], a[1]], [a[2], 0, -a[0]], [-a[1], a[0], 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def _turn_z(points: np.ndarray, turns: float) -> np.ndarray:
    """Points turned about z by a fraction of a full turn."""
    return points @ turn_about(np.array([0.0, 0.0, 1.0]), 2 * np.pi * turns).T


def _place(
    semi_axes: np.ndarray, centres: list[np.ndarray], radii: list[float], elongation: float, rng: np.random.Generator
) -> np.ndarray:
    """Where the next domain goes: touching an earlier one, the last one when the complex is a long one."""
    radius = float(np.mean(semi_axes))
    best, best_room = None, -np.inf
    for _ in range(12):
        host = len(centres) - 1 if rng.random() < elongation else int(rng.integers(len(centres)))
        direction = rng.normal(size=3)
        if len(centres) > 1 and elongation > 0.5:  # go on in the direction of the chain
            chain = centres[-1] - centres[0]
            direction += 2.0 * elongation * chain / max(np.linalg.norm(chain), 1e-9)
        direction /= np.linalg.norm(direction)
        centre = centres[host] + direction * 0.93 * (radii[host] + radius)
        room = min(np.linalg.norm(centre - c) / (r + radius) for c, r in zip(centres, radii, strict=True))
        if room > best_room:
            best, best_room = centre, room
        if room > 0.85:
            break
    return best


def _without_clashes(residues: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The residues (n, 8, 3) whose C-alpha is not near any point of ``others`` (m, 3)."""
    distance, _ = cKDTree(others).query(residues[:, 1], distance_upper_bound=CLASH)
    return residues[~np.isfinite(distance)]


def make_phantom(rng: np.random.Generator, mass: float, symmetry: int = 1, domains: int | None = None) -> Phantom:
    """Draw a procedural protein.

    Args:
        rng: all randomness comes from here.
        mass: Da, of the whole complex (met to a few per cent).
        symmetry: n of Cn.
        domains: number of domains of one subunit; None: one per 25-60 kDa.

    Returns:
        The phantom, centred.
    """
    unit = mass / symmetry
    count = domains or int(np.clip(round(unit / rng.uniform(25e3, 60e3)), 2 if symmetry == 1 else 1, 12))
    elongation = rng.uniform(0, 1)
    share = rng.uniform(0.6, 1.4, count)
    share *= unit / share.sum()
    radius_unit = (unit / DENSITY / (4 / 3 * np.pi)) ** (1 / 3)
    # distance of the first domain from the symmetry axis: rings of three and four leave a hole
    start = 0.0 if symmetry == 1 else radius_unit * rng.uniform(0.8, 1.1) / np.sin(np.pi / symmetry) ** 0.7
    centres, radii, parts, lost = [], [], [], 0.0
    for i in range(count):
        target = share[i] + lost  # what was cut from one domain is given to the next
        residues, semi_axes = _domain(target, rng)
        residues = residues @ random_rotation(rng).T
        centre = np.array([start, 0.0, 0.0]) if i == 0 else _place(semi_axes, centres, radii, elongation, rng)
        residues = residues + centre
        if parts:
            residues = _without_clashes(residues, np.concatenate(parts)[:, 1])
        if symmetry > 1 and len(residues):
            copies = [_turn_z(np.concatenate([*parts, residues])[:, 1], k / symmetry) for k in range(1, symmetry)]
            residues = _without_clashes(residues, np.concatenate(copies))
        lost = float(np.clip(target - len(residues) * RESIDUE_DA, -0.5 * unit / count, unit / count))
        centres.append(centre)
        radii.append(float(np.mean(semi_axes)))
        parts.append(residues)
    domain = np.repeat(np.arange(count), [len(p) for p in parts])
    residues = np.concatenate(parts)
    copies = np.concatenate([_turn_z(residues, k / symmetry) for k in range(symmetry)])
    xyz = copies.reshape(-1, 3)
    number = np.tile(_ATOMIC_NUMBER, len(copies))
    xyz = xyz - np.average(xyz, axis=0, weights=number)
    return Phantom(xyz, number, np.repeat(np.tile(domain, symmetry), ATOMS), len(copies) * RESIDUE_DA, symmetry)


def make_phantoms(count: int, rng: np.random.Generator, mass_range: tuple[float, float] = MASS_RANGE) -> list[Phantom]:
    """``count`` distinct phantoms: masses spread evenly (in logarithm) over the range, almost half of them symmetric.

    Shapes that reach farther than MAX_RADIUS from their centre are drawn again.
    """
    low, high = np.log(mass_range[0] * 1.1), np.log(mass_range[1] * 0.9)
    masses = np.exp(low + (high - low) * (rng.permutation(count) + rng.uniform(0, 1, count)) / count)
    cycle = (1, 2, 1, 3, 1, 1, 4, 1, 2)
    phantoms = []
    for i, mass in enumerate(masses):
        for _ in range(30):
            phantom = make_phantom(rng, float(mass), cycle[i % len(cycle)])
            if np.linalg.norm(phantom.xyz, axis=1).max() <= MAX_RADIUS:
                break
        phantoms.append(phantom)
    return phantoms
