"""Molecules as a few hundred Gaussian beads, and their projections as one batched product.

For endless training streams on a device: a projection is separable, image = Gy^T diag(w) Gx, so it costs 2 D^2 K
operations and no interpolation, and a shift goes into the coordinates. Lengths are fractions of the box's edge, so that
one molecule serves any box; the centre of mass lies at the origin. Phantoms here are shapeless beside those of
`phantoms.py` (no helices), but thousands of them cost milliseconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cryosuite.errors import InputError
from cryosuite.kernels.density import MOLMAP_SIGMA
from cryosuite.kernels.rotations import quaternion_to_matrix
from cryosuite.simulate.sources import ATOM_FILES, Structure, find_files, has_ending, read_structure

LOBES = 6  # at most, of a phantom
RADIUS = (0.13, 0.22)  # root mean square, of a molecule, fraction of the box
FARTHEST = 0.45  # beads farther out than this are left out
MAX_MATES = 24  # structures of higher symmetry (capsids) are not used: their poses say little
SMALLEST = 0.6  # pixels: beads narrower than this are widened, so that sampling at pixel centres is exact enough
SAME = 2.5  # A: mean distance after a symmetry operation below which a structure counts as symmetric
ALIKE = 0.7  # share of the residues of a chain that another must have to be its copy
CHUNK = 1 << 25  # values of Gx held at once


@dataclass
class Beads:
    """M molecules of K Gaussian beads each, padded with beads of weight 0.

    Attributes:
        xyz: (M, K, 3) fraction of the box, centre of mass at the origin.
        weight: (M, K) mass of each bead; a molecule's weights sum to 1.
        width: (M, K) standard deviation, fraction of the box.
        mates: (M, G, 3, 3) rotations S of the volume frame that leave the molecule as it is; the first is the
            identity, repeated where a molecule has fewer than G.
    """

    xyz: Tensor
    weight: Tensor
    width: Tensor
    mates: Tensor

    def __len__(self) -> int:
        return len(self.xyz)

    def rows(self, index: Tensor | slice) -> Beads:
        """Some of the molecules."""
        return Beads(self.xyz[index], self.weight[index], self.width[index], self.mates[index])

    def to(self, device: torch.device | str) -> Beads:
        """The same molecules on another device."""
        return Beads(*(v.to(device) for v in (self.xyz, self.weight, self.width, self.mates)))

    def turned(self, rotation: Tensor) -> Beads:
        """Molecules turned by rotations (M, 3, 3) of the volume frame, x -> Q x; their symmetry turns with them."""
        Q = rotation[:, None]
        return Beads(
            self.xyz @ rotation.transpose(-1, -2), self.weight, self.width, Q @ self.mates @ Q.transpose(-1, -2)
        )

    def scaled(self, factor: Tensor) -> Beads:
        """Molecules magnified by factors (M,), e.g. from Angstrom to fractions of a box."""
        return Beads(self.xyz * factor[:, None, None], self.weight, self.width * factor[:, None], self.mates)

    def radius(self) -> Tensor:
        """(M,) distance of the farthest bead from the centre."""
        return torch.where(self.weight > 0, self.xyz.norm(dim=-1), 0).amax(1)


def phantom_beads(
    count: int, generator: torch.Generator, beads: int = 96, symmetric: float = 0.1, radius: tuple = RADIUS
) -> Beads:
    """Random molecules: 2-6 lobes, each something between a random walk and a ball, a share of them C2 to C4.

    Args:
        count: M. generator: all randomness; the molecules are made on its device. beads: K, a multiple of 12.
        symmetric: share of molecules with a rotation axis (along z; turn them by ``turned``). radius: of gyration,
            from, to.

    Raises ValueError where K is no multiple of 12 (the copies of C2, C3 and C4 must fit).
    """
    if beads % 12:
        raise ValueError(f"the number of beads must be a multiple of 12, not {beads}")
    device = generator.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator, device=device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator, device=device)

    per = beads // LOBES
    walk = normal(LOBES, per, 3).cumsum(2)
    walk = walk - walk.mean(2, keepdim=True)
    walk = walk / walk.square().sum(-1).mean(2)[..., None, None].sqrt()
    ball = normal(LOBES, per, 3)
    ball = ball / ball.norm(dim=-1, keepdim=True) * uniform(0, 1, LOBES, per, 1).pow(1 / 3) * 1.29  # unit rms
    compact = uniform(0.3, 1.0, 1, 1, 1)
    lobe = compact.sqrt() * ball + (1 - compact).sqrt() * walk
    size = uniform(0.5, 1.6, LOBES, 1, 1)
    frames = quaternion_to_matrix(normal(LOBES, 4))
    lobe = (lobe * uniform(0.5, 1.6, LOBES, 1, 3) * size) @ frames
    # each lobe sits beside the one before it
    step = normal(LOBES, 3)
    step = step / step.norm(dim=-1, keepdim=True)
    reach = (size + torch.roll(size, 1, 1))[..., 0] * uniform(0.6, 1.2, LOBES, 1)
    centre = (step * reach).cumsum(1)
    xyz = (lobe + centre[:, :, None]).flatten(1, 2)
    lobes = torch.randint(2, LOBES + 1, (count,), generator=generator, device=device)
    there = torch.arange(LOBES, device=device) < lobes[:, None]
    density = size[..., 0, 0].pow(2) * uniform(0.6, 1.6, LOBES) * there
    weight = (density[..., None] * uniform(0.4, 1.6, LOBES, per)).flatten(1)
    weight = weight * (uniform(0, 1, beads) < uniform(0.5, 1.0, 1))
    weight = weight + 1e-6 * there.repeat_interleave(per, 1)  # never an empty molecule
    width = uniform(0.02, 0.06, 1) * uniform(0.7, 1.4, beads)
    fold = torch.where(uniform(0, 1) < symmetric, torch.randint(2, 5, (count,), generator=generator, device=device), 1)
    made = _copies(xyz, weight, width, fold, uniform(0.3, 1.2))
    return _normalised(made, uniform(*radius))


def _copies(xyz: Tensor, weight: Tensor, width: Tensor, fold: Tensor, out: Tensor) -> Beads:
    """Cn molecules about z: bead j becomes copy j mod n of bead j // n, moved out by ``out`` of the unit's size."""
    j = torch.arange(xyz.shape[1], device=xyz.device)
    # beads are shuffled by a fixed stride (coprime to K) so that the unit's first beads come from all lobes
    stride = next(s for s in range(xyz.shape[1] // 3 | 1, xyz.shape[1]) if math.gcd(s, xyz.shape[1]) == 1)
    source = torch.where(fold[:, None] > 1, (j // fold[:, None]) * stride % xyz.shape[1], j)
    unit = torch.gather(xyz, 1, source[..., None].expand(-1, -1, 3))
    weight, width = torch.gather(weight, 1, source), torch.gather(width, 1, source)
    mean = (unit * weight[..., None]).sum(1, keepdim=True) / weight.sum(1)[:, None, None]
    spread = ((unit - mean).square().sum(-1) * weight).sum(1) / weight.sum(1)
    move = torch.zeros_like(mean)
    move[:, 0, 0] = out * spread.sqrt() * (fold > 1)
    angle = 2 * math.pi * (j % fold[:, None]) / fold[:, None]
    unit = _turn_z(unit - mean + move, angle)
    g = torch.arange(4, device=xyz.device)
    about = torch.where(g < fold[:, None], 2 * math.pi * g / fold[:, None], 0.0)
    eye = torch.eye(3, device=xyz.device).expand(len(xyz), 4, 3, 3)
    mates = _turn_z(eye.reshape(-1, 3, 3), about.reshape(-1, 1).expand(-1, 3)).view(-1, 4, 3, 3).transpose(-1, -2)
    return Beads(unit, weight, width, mates)


def _turn_z(points: Tensor, angle: Tensor) -> Tensor:
    """Points (m, n, 3) turned about z by angles (m, n)."""
    c, s = torch.cos(angle), torch.sin(angle)
    x, y, z = points.unbind(-1)
    return torch.stack([c * x - s * y, s * x + c * y, z], -1)


def _normalised(beads: Beads, radius: Tensor) -> Beads:
    """Weights summing to 1, centre of mass at the origin, ``radius`` (M,) of gyration; widths are left alone."""
    weight = beads.weight / beads.weight.sum(1, keepdim=True)
    xyz = beads.xyz - (beads.xyz * weight[..., None]).sum(1, keepdim=True)
    size = (xyz.square().sum(-1) * weight).sum(1).sqrt()
    xyz = xyz * (radius / size.clamp(min=1e-6))[:, None, None]
    weight = torch.where(xyz.norm(dim=-1) < FARTHEST, weight, 0)
    weight = weight / weight.sum(1, keepdim=True)
    xyz = xyz - (xyz * weight[..., None]).sum(1, keepdim=True)
    return Beads(xyz, weight, beads.width, beads.mates)


def structure_beads(files: list[Path], beads: int, resolution: float = 8.0) -> tuple[Beads, list[str]]:
    """Atomic models as beads in ANGSTROM (not fractions; see ``scaled``), and the names of those that could be used.

    Residues are merged on a grid just coarse enough for ``beads`` beads; a bead is as wide as its cell and
    ``resolution`` (A, as ChimeraX molmap counts it). Structures with more than MAX_MATES symmetry mates are left out.

    Raises InputError for files that cannot be read or when none is left.
    """
    found, names = [], []
    for path in files:
        if not has_ending(path, ATOM_FILES):
            continue
        structure = read_structure(path)
        mates = symmetry_mates(structure)
        if len(mates) <= MAX_MATES:
            found.append((*merged(structure.centred(), structure.weight, beads, resolution), mates))
            names.append(structure.name)
    if not found:
        raise InputError("--structures: none of the files is an atomic model that can be used to train poses on")
    count = max(len(mates) for *_, mates in found)
    padded = [np.concatenate([mates, np.tile(np.eye(3), (count - len(mates), 1, 1))]) for *_, mates in found]
    columns = [np.stack(column) for column in zip(*[row[:3] for row in found], strict=True)]
    return Beads(*(torch.from_numpy(v).float() for v in (*columns, np.stack(padded)))), names


def find_structures(spec: str) -> list[Path]:
    """Atomic models of a folder, or of names and files separated by commas."""
    return [path for path in find_files(spec) if has_ending(path, ATOM_FILES)]


def merged(xyz: np.ndarray, weight: np.ndarray, beads: int, resolution: float) -> tuple[np.ndarray, ...]:
    """Atoms (n, 3) A as at most ``beads`` beads: xyz (K, 3), weight (K,), width (K,) A, padded with weight 0."""
    extent = float(np.ptp(xyz, axis=0).max()) + 1e-6
    low, high = 3.0, max(extent, 6.0)
    for _ in range(12):
        cell = (low + high) / 2
        if len(np.unique(np.floor(xyz / cell).astype(np.int64), axis=0)) > beads:
            low = cell
        else:
            high = cell
    label, inverse = np.unique(np.floor(xyz / high).astype(np.int64), axis=0, return_inverse=True)
    inverse, count = inverse.ravel(), len(label)
    mass = np.bincount(inverse, weight, count)
    centre = np.stack([np.bincount(inverse, weight * xyz[:, i], count) / mass for i in range(3)], 1)
    spread = np.bincount(inverse, weight * ((xyz - centre[inverse]) ** 2).mean(1), count) / mass
    width = np.sqrt(spread + (MOLMAP_SIGMA * resolution) ** 2)
    out = np.zeros((beads, 3)), np.zeros(beads), np.full(beads, float(width.mean()))
    out[0][:count], out[1][:count], out[2][:count] = centre, mass / mass.sum(), width
    return out


def symmetry_mates(structure: Structure) -> np.ndarray:
    """Rotations (G, 3, 3) about the centre of mass that bring a structure back onto itself, the identity first.

    Candidates come from superposing the largest chain onto every other by the residues of the same number that both
    have (Kabsch; at least ALIKE of them); one counts when it brings all atoms to within SAME of others on average.
    """
    from scipy.spatial import cKDTree

    xyz = structure.centred()
    chains = {name: _residues(structure, xyz, structure.chain == name) for name in dict.fromkeys(structure.chain)}
    mates = [np.eye(3)]
    first = max(chains, key=lambda name: len(chains[name][0]))
    number, centre = chains[first]
    sample, tree = xyz[:: max(1, len(xyz) // 3000)], cKDTree(xyz)
    for name, (other, there) in chains.items():
        both, i, j = np.intersect1d(number, other, return_indices=True)
        if name == first or len(both) < max(3, ALIKE * len(number)):
            continue
        u, _, vh = np.linalg.svd(centre[i].T @ there[j])
        turn = (u @ np.diag([1, 1, np.linalg.det(u @ vh)]) @ vh).T  # x -> turn x
        if np.mean(tree.query(sample @ turn.T)[0]) < SAME and min(np.linalg.norm(turn - m) for m in mates) > 0.1:
            mates.append(turn)
    return np.stack(mates)


def _residues(structure: Structure, xyz: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the residues of some atoms (n,) and their centres (n, 3)."""
    number, inverse = np.unique(structure.residue[rows], return_inverse=True)
    inverse, count = inverse.ravel(), len(number)
    centre = [np.bincount(inverse, xyz[rows, axis], count) for axis in range(3)]
    return number, np.stack(centre, 1) / np.bincount(inverse, minlength=count)[:, None]


def project_beads(
    beads: Beads,
    which: Tensor,  # (b,) int64
    rotation: Tensor,  # (b, 3, 3) volume frame -> image frame
    shift: Tensor,  # (b, 2) fraction of the box that centres the particle
    size: int,
    blur: Tensor | None = None,  # (b,) further standard deviation, fraction of the box
) -> Tensor:  # (b, D, D)
    """Clean projections, white particles, the sum over the pixels 1; the content lies at minus ``shift``.

    Exact for Gaussians no narrower than SMALLEST pixels (narrower ones are widened to that): the image is the sum of
    the beads' Gaussians at the pixel centres, the box's origin being pixel D // 2.
    """
    rows = max(1, CHUNK // (size * beads.xyz.shape[1]))
    parts = [beads.xyz.new_zeros(0, size, size)]
    for start in range(0, len(which), rows):
        part = slice(start, start + rows)
        k = which[part]
        points = beads.xyz[k] @ rotation[part, :2].transpose(1, 2) - shift[part, None]  # (b, K, 2)
        variance = beads.width[k].square()
        if blur is not None:
            variance = variance + blur[part, None].square()
        variance = variance.clamp(min=(SMALLEST / size) ** 2)
        axis = (torch.arange(size, device=points.device, dtype=points.dtype) - size // 2) / size
        distance = axis[:, None] - points.transpose(1, 2)[:, :, None]  # (b, 2, D, K)
        # below e^-30 nothing is seen, and denormal numbers are slow
        gauss = distance.square_().mul_(-0.5 / variance[:, None, None]).clamp_(min=-30.0).exp_()
        amplitude = beads.weight[k] / (2 * math.pi * variance * size**2)
        parts.append((gauss[:, 1] * amplitude[:, None]) @ gauss[:, 0].transpose(1, 2))
    return torch.cat(parts)
