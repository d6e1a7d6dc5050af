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
ALIKE = 0.7  # correlation of two shapes at 20 A above which one is drawn again
CONTACT = 6.0  # A: domains this near touch
INTERFACE = 0.03  # share of a subunit that may overlap the next (and is cut)

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
) -> tuple[np.ndarray, int]:
    """Where the next domain goes and beside which: an earlier one, the last one when the complex is a long one."""
    radius = float(np.mean(semi_axes))
    best, best_room = (np.zeros(3), 0), -np.inf
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
            best, best_room = (centre, host), room
        if room > 0.85:
            break
    return best


def _free(residues: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which residues (n, 8, 3) have their C-alpha away from all points of ``others`` (m, 3): (n,) bool."""
    distance, _ = cKDTree(others).query(residues[:, 1], distance_upper_bound=CLASH)
    return ~np.isfinite(distance)


def _dock(residues: np.ndarray, others: np.ndarray, towards: np.ndarray) -> np.ndarray:
    """Residues (n, 8, 3) moved along the unit vector ``towards`` until they touch ``others`` (m, 3); the shift (3,)."""
    tree, shift = cKDTree(others), np.zeros(3)
    for _ in range(10):
        gap = float(tree.query(residues[:, 1] + shift)[0].min())
        if gap < CONTACT:
            break
        shift = shift + towards * (gap - CLASH)
    return shift


def _ring(unit: np.ndarray, symmetry: int) -> tuple[np.ndarray, np.ndarray]:
    """A subunit (n, 8, 3) moved out along x until its copies about z just touch, and which residues do not overlap."""
    unit = unit - unit[:, 1].mean(0)
    low, high = 0.0, 2.0 * float(np.linalg.norm(unit[:, 1], axis=1).max()) / np.sin(np.pi / symmetry)
    for _ in range(10):
        middle = (low + high) / 2
        alpha_carbon = unit[:, 1] + np.array([middle, 0.0, 0.0])
        clashes = cKDTree(_turn_z(alpha_carbon, 1 / symmetry)).query(alpha_carbon)[0] < CLASH
        low, high = (middle, high) if clashes.mean() > INTERFACE else (low, middle)
    unit = unit + np.array([high, 0.0, 0.0])
    others = np.concatenate([_turn_z(unit[:, 1], k / symmetry) for k in range(1, symmetry)])
    return unit, _free(unit, others)


def _subunit(mass: float, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Domains (n_i, 8, 3) in contact with one another, ``count`` of them; what overlaps an earlier one is cut."""
    elongation = rng.uniform(0, 1)
    share = rng.uniform(0.6, 1.4, count)
    share *= mass / share.sum()
    centres: list[np.ndarray] = []
    radii: list[float] = []
    parts: list[np.ndarray] = []
    lost = 0.0
    for target in share:
        residues, semi_axes = _domain(target + lost, rng)  # what was cut from one domain is given to the next
        residues = residues @ random_rotation(rng).T
        centre = np.zeros(3)
        if parts:
            centre, host = _place(semi_axes, centres, radii, elongation, rng)
            placed = np.concatenate(parts)[:, 1]
            towards = (centres[host] - centre) / np.linalg.norm(centres[host] - centre)
            centre = centre + _dock(residues + centre, placed, towards)
            residues = residues + centre
            residues = residues[_free(residues, placed)]
        lost = float(np.clip(target + lost - len(residues) * RESIDUE_DA, -0.5 * mass / count, mass / count))
        centres.append(centre)
        radii.append(float(np.mean(semi_axes)))
        parts.append(residues)
    return parts


def make_phantom(rng: np.random.Generator, mass: float, symmetry: int = 1, domains: int | None = None) -> Phantom:
    """Draw a procedural protein.

    Args:
        rng: all randomness comes from here.
        mass: Da, of the whole complex (met to about a tenth).
        symmetry: n of Cn.
        domains: number of domains of one subunit; None: one per 25-60 kDa.

    Returns:
        The phantom, centred.
    """
    unit = mass / symmetry
    count = domains or int(np.clip(round(unit / rng.uniform(25e3, 60e3)), 2 if symmetry == 1 else 1, 12))
    parts = _subunit(unit, count, rng)
    domain = np.repeat(np.arange(count), [len(p) for p in parts])
    residues = np.concatenate(parts)
    if symmetry > 1:
        residues, kept = _ring(residues, symmetry)
        residues, domain = residues[kept], domain[kept]
    copies = np.concatenate([_turn_z(residues, k / symmetry) for k in range(symmetry)])
    xyz = copies.reshape(-1, 3)
    number = np.tile(_ATOMIC_NUMBER, len(copies))
    xyz = xyz - np.average(xyz, axis=0, weights=number)
    return Phantom(xyz, number, np.repeat(np.tile(domain, symmetry), ATOMS), len(copies) * RESIDUE_DA, symmetry)


def _coarse(phantom: Phantom) -> np.ndarray:
    """C-alphas counted in cells of 20 A, as a unit vector without its mean: to compare shapes."""
    edges = np.arange(-140.0, 141.0, 20.0)
    count = np.histogramdd(phantom.xyz[1::ATOMS], bins=[edges] * 3)[0].ravel()
    count -= count.mean()
    return count / max(np.linalg.norm(count), 1e-9)


def make_phantoms(count: int, rng: np.random.Generator, mass_range: tuple[float, float] = MASS_RANGE) -> list[Phantom]:
    """``count`` distinct phantoms: masses spread evenly (in logarithm) over the range, almost half of them symmetric.

    Shapes that reach farther than MAX_RADIUS from their centre, or that resemble an earlier one, are drawn again.
    """
    low, high = np.log(mass_range[0] * 1.25), np.log(mass_range[1] * 0.95)  # cuts at contacts cost up to a fifth
    masses = np.exp(low + (high - low) * (rng.permutation(count) + rng.uniform(0, 1, count)) / count)
    cycle = (1, 2, 1, 3, 1, 1, 4, 1, 2)
    phantoms: list[Phantom] = []
    shapes = np.zeros((0, 14**3))
    for i, mass in enumerate(masses):
        for _ in range(30):
            phantom = make_phantom(rng, float(mass), cycle[i % len(cycle)])
            shape = _coarse(phantom)
            alike = float((shapes @ shape).max(initial=0.0))
            if np.linalg.norm(phantom.xyz, axis=1).max() <= MAX_RADIUS and alike < ALIKE:
                break
        phantoms.append(phantom)
        shapes = np.vstack([shapes, shape])
    return phantoms
