"""Bring a map of unknown orientation, origin and hand onto its truth, as ab-initio maps need before they are judged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cryosuite.errors import InputError
from cryosuite.kernels.fourier import fourier_crop_volume
from cryosuite.kernels.rotations import expmap, healpix_rotations

COARSE_BOX, FINE_BOX = 16, 32  # voxels in which orientations are searched, then refined
GRID = 1  # HEALPix order: 4,608 orientations, about 30 degrees apart
CANDIDATES = 12  # of each hand, refined
BATCH = 64
COARSE_STEPS, FINE_STEPS = (15.0, 8.0, 4.0), (4.0, 2.0, 1.0, 0.5)  # degrees, in either box


@dataclass(frozen=True)
class Alignment:
    """How a map was brought onto its truth.

    Attributes:
        volume: (D, D, D) the map on the truth's grid.
        rotation: (3, 3) R with truth(x) ~ map(R (x - shift)), x y z from voxel D//2, after the mirror.
        shift: (3,) voxels x y z of the full box. mirrored: whether z was flipped first. correlation: with the truth.
    """

    volume: torch.Tensor
    rotation: np.ndarray
    shift: np.ndarray
    mirrored: bool
    correlation: float


def align_map(volume: torch.Tensor, truth: torch.Tensor) -> Alignment:
    """Search all rotations, translations and both hands for the best correlation, then resample once (cubic).

    4,608 rotations of each hand are tried in a box of 16 voxels, where one transform gives all translations; the best
    twelve of each hand are refined by ever smaller steps, the last of them in a box of 32 down to half a degree.

    Args:
        volume, truth: (D, D, D) on grids of one pixel size.

    Raises:
        InputError: the boxes differ, or a map is constant.
    """
    if volume.shape != truth.shape or truth.ndim != 3:
        raise InputError(f"a map of {tuple(volume.shape)} cannot be aligned with one of {tuple(truth.shape)}")
    if not (volume.std() > 0 and truth.std() > 0):
        raise InputError("a constant map cannot be aligned")
    found = []
    for mirrored in (False, True):
        map_ = mirror(volume) if mirrored else volume
        small, goal = (_small(x, COARSE_BOX) for x in (map_, truth))
        grid = healpix_rotations(GRID)
        score = torch.cat([_score(small, goal, part)[0] for part in grid.split(BATCH)])
        rotation = _refine(small, goal, grid[score.topk(CANDIDATES).indices], COARSE_STEPS)
        fine = [_small(x, FINE_BOX) for x in (map_, truth)]
        rotation = _refine(*fine, rotation, FINE_STEPS)[:1]
        value, field = _score(*fine, rotation)
        found.append((float(value[0]), rotation[0].double().numpy(), _peak(field[0])))
    best = max((0, 1), key=lambda hand: found[hand][0])
    _, rotation, shift = found[best]
    shift = shift * (truth.shape[-1] / min(FINE_BOX, truth.shape[-1]))
    moved = resample(mirror(volume) if best else volume, rotation, shift)
    correlation = float(np.corrcoef(moved.flatten().numpy(), truth.flatten().numpy())[0, 1])
    return Alignment(moved, rotation, shift, bool(best), correlation)


def mirror(volume: torch.Tensor) -> torch.Tensor:
    """The other hand: z reversed with voxel D//2 in place (CONVENTIONS)."""
    return torch.roll(volume.flip(0), 1 - volume.shape[0] % 2, 0)


def resample(volume: torch.Tensor, rotation: np.ndarray, shift: np.ndarray) -> torch.Tensor:
    """out(x) = volume(R (x - t)): the map turned about voxel D//2 and moved by t voxels (x y z), cubic splines."""
    from scipy.ndimage import affine_transform

    matrix = np.asarray(rotation, np.float64)[::-1, ::-1]  # z y x
    centre = volume.shape[-1] // 2
    offset = centre - matrix @ (centre + np.asarray(shift, np.float64)[::-1])
    out = affine_transform(volume.numpy().astype(np.float64), matrix, offset, order=3, mode="constant")
    return torch.from_numpy(out.astype(np.float32))


def _small(volume: torch.Tensor, box: int) -> torch.Tensor:
    """The map Fourier cropped to at most ``box`` voxels, mean 0 and norm 1."""
    size = volume.shape[-1]
    out = volume.float() if size <= box else fourier_crop_volume(volume.float(), box)
    out = out - out.mean()
    return out / out.norm()


def _turned(volume: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Trilinear samples volume(R x) for each rotation: (b, B, B, B)."""
    box = volume.shape[-1]
    axis = torch.arange(box, dtype=torch.float32) - box // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    at = torch.stack([x, y, z], -1).view(1, -1, 3) @ rotation.transpose(1, 2)  # rows: R x
    at = (2 * (at + box // 2) + 1) / box - 1
    source = volume.expand(len(rotation), 1, -1, -1, -1)
    return torch.nn.functional.grid_sample(source, at.view(-1, box, box, box, 3), align_corners=False)[:, 0]


def _score(volume: torch.Tensor, goal: torch.Tensor, rotation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Best correlation (b,) over all translations of the turned maps, and these correlations (b, B, B, B)."""
    turned = _turned(volume, rotation)
    turned = turned / turned.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]
    spectrum = torch.fft.rfftn(turned, dim=(1, 2, 3)).conj() * torch.fft.rfftn(goal)
    field = torch.fft.irfftn(spectrum, s=goal.shape, dim=(1, 2, 3))
    return field.flatten(1).amax(1), field


def _refine(volume: torch.Tensor, goal: torch.Tensor, rotation: torch.Tensor, steps: tuple[float, ...]) -> torch.Tensor:
    """Turn candidates (c, 3, 3) by smaller and smaller steps while that helps; half survive each, best first."""
    axes = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 3)
    keep = len(rotation)
    for degrees in steps:
        turns = expmap(axes * float(np.deg2rad(degrees)))
        for _ in range(2):
            tried = (rotation[:, None] @ turns).reshape(-1, 3, 3)
            score = torch.cat([_score(volume, goal, part)[0] for part in tried.split(BATCH)]).view(-1, len(turns))
            best = score.argmax(1)
            rotation = tried.view(-1, len(turns), 3, 3)[torch.arange(len(best)), best]
        keep = max(1, keep // 2)
        rotation = rotation[score.amax(1).topk(min(keep, len(rotation))).indices]
    return rotation


def _peak(field: torch.Tensor) -> np.ndarray:
    """Translation (x y z, voxels) of the highest point of a periodic correlation, by a parabola along each axis."""
    box = field.shape[0]
    at = np.array(np.unravel_index(int(field.argmax()), field.shape))
    shift = []
    for axis in range(3):
        low, mid, high = (float(field[tuple((at + step * np.eye(3, dtype=int)[axis]) % box)]) for step in (-1, 0, 1))
        curve = low - 2 * mid + high
        moved = at[axis] + (0.5 * (low - high) / curve if curve < 0 else 0.0)
        shift.append(moved - box if moved >= box / 2 else moved)
    return np.array(shift[::-1])
