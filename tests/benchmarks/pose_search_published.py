"""The published hierarchical pose search written plainly, as the peer of `cryosuite.kernels.pose_search`.

CryoDECO's and DRGN-AI's procedure from its description (DECO.md, section 3): Hartley transforms on the full disc,
base level of 192 slices times CTF turned in the plane by bilinear interpolation to 4,608, every shift of a 14 x 14 grid
at every level, the 8 best kept, 8 of 16 candidate children each, exact slices at a rising radius, no whitening.
Volume values come from a trilinear lookup in the Hartley transform of the volume padded to twice its size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cryosuite.kernels import fourier, so3_grid

CHUNK = 4  # images at once


def hartley_volume(volume: Tensor) -> Tensor:
    """(D, D, D) -> Hartley transform of the padded volume on the inclusive grid -D .. D: (2D+1, 2D+1, 2D+1)."""
    D = volume.shape[0]
    padded = F.pad(volume, (D // 2,) * 6)
    coeffs = fourier.fft3c(padded)
    hartley = coeffs.real - coeffs.imag
    for axis in range(3):  # +Nyquist is -Nyquist
        hartley = torch.cat([hartley, hartley.narrow(axis, 0, 1)], axis)
    return hartley


def lookup(hartley: Tensor, points: Tensor) -> Tensor:
    """Values at (..., 3) x, y, z in Fourier pixels of the original box; trilinear."""
    half = (hartley.shape[0] - 1) // 2
    grid = (points * 2 / half).reshape(1, 1, 1, -1, 3)
    return F.grid_sample(hartley[None, None], grid, align_corners=True).reshape(points.shape[:-1])


def full_disc(radius: int) -> Tensor:  # (P, 2)
    """Integer points 0 < |k| <= radius, both of each Friedel pair."""
    axis = torch.arange(-radius, radius + 1)
    ky, kx = torch.meshgrid(axis, axis, indexing="ij")
    inside = (kx * kx + ky * ky <= radius * radius) & ((kx != 0) | (ky != 0))
    return torch.stack([kx[inside], ky[inside]], 1).float()


class Published:
    """One volume and the settings of the published search; `search` takes Hartley images and CTFs as (b, D+1, D+1)."""

    def __init__(
        self, volume: Tensor, l_min: int = 12, l_max: int = 32, extent: float = 5.0, levels: int = 4, keep: int = 8
    ) -> None:
        self.box_size, self.levels, self.keep, self.extent = volume.shape[0], levels, keep, extent
        self.hartley = hartley_volume(volume)
        self.radii = [int(l_min + (l_max - l_min) * i / levels) for i in range(levels + 1)]
        axis = ((torch.arange(14) + 0.5) / 7 - 1) * extent
        self.shifts = torch.cartesian_prod(axis, axis)  # (196, 2) pixels

    def search(self, images: Tensor, ctf: Tensor) -> tuple[Tensor, Tensor]:
        """Best rotation (b, 3, 3) and shift (b, 2) in pixels."""
        found = [self._some(images[i : i + CHUNK], ctf[i : i + CHUNK]) for i in range(0, len(images), CHUNK)]
        return torch.cat([r for r, _ in found]), torch.cat([t for _, t in found])

    def _some(self, images: Tensor, ctf: Tensor) -> tuple[Tensor, Tensor]:
        node, shift = self._base(images, ctf)
        for level in range(1, self.levels + 1):
            order = 2 + level
            node = published_children(node, order - 1).flatten(1)  # (b, keep * 8)
            parent_shift = shift.repeat_interleave(8, 1)
            rotation = so3_grid.rotations_at(node, order)
            points = full_disc(self.radii[level])
            plane = torch.cat([points, torch.zeros(len(points), 1)], 1)
            model = lookup(self.hartley, plane @ rotation) * self._at(ctf, points)[:, None]
            keep = 1 if level == self.levels else self.keep
            cost, which = [], []
            for j in range(self.keep):  # one parent's children share their shifts
                grid = shift[:, j, None] + self.shifts / 2**level
                moved = self._moved(images, points, grid)  # (b, 196, P)
                mine = model[:, j * 8 : (j + 1) * 8]
                E = mine.square().sum(-1)[:, None] / 2 - moved @ mine.transpose(1, 2)  # (b, 196, 8)
                low, place = E.min(1)
                cost.append(low)
                which.append(place)
            cost, which = torch.cat(cost, 1), torch.cat(which, 1)
            best = cost.topk(keep, 1, largest=False).indices
            shift = parent_shift.gather(1, best[..., None].expand(-1, -1, 2))
            shift = shift + self.shifts[which.gather(1, best)] / 2**level
            node = node.gather(1, best)
        return so3_grid.rotations_at(node[:, 0], 2 + self.levels), shift[:, 0]

    def _base(self, images: Tensor, ctf: Tensor) -> tuple[Tensor, Tensor]:
        radius = self.radii[0]
        points = full_disc(radius)
        frames = so3_grid.view_frames(2)
        plane = torch.cat([points, torch.zeros(len(points), 1)], 1)
        slices = lookup(self.hartley, plane @ frames)  # (192, P)
        square = torch.zeros(len(images), 192, 2 * radius + 1, 2 * radius + 1)
        column, row = (points + radius).long().unbind(1)
        square[..., row, column] = slices * self._at(ctf, points)[:, None]
        psi = (torch.arange(24) + 0.5) * (2 * torch.pi / 24)
        turned = []
        for angle in psi:  # the slice of Rz(psi) R0 at k is the slice of R0 at k turned by psi
            c, s = torch.cos(angle), torch.sin(angle)
            where = points @ torch.stack([torch.stack([c, s]), torch.stack([-s, c])])
            grid = (where / radius)[None, None].expand(len(images), 1, -1, 2)
            turned.append(F.grid_sample(square, grid, align_corners=True)[:, :, 0])
        model = torch.stack(turned, 2).flatten(1, 2)  # (b, 4608, P)
        moved = self._moved(images, points, self.shifts.expand(len(images), -1, 2))
        cost = model.square().sum(-1)[:, None] / 2 - moved @ model.transpose(1, 2)  # (b, 196, 4608)
        low, which = cost.min(1)
        node = low.topk(self.keep, 1, largest=False).indices
        return node, self.shifts[which.gather(1, node)]

    def _at(self, square: Tensor, points: Tensor) -> Tensor:
        """Values (b, P) of (b, D+1, D+1) at integer points."""
        column, row = (points + self.box_size // 2).long().unbind(1)
        return square[..., row, column]

    def _moved(self, images: Tensor, points: Tensor, shift: Tensor) -> Tensor:
        """Hartley values (b, T, P) of images whose content is moved by shifts (b, T, 2) pixels."""
        angle = 2 * torch.pi / self.box_size * (shift @ points.T)
        here, mate = self._at(images, points)[:, None], self._at(images, -points)[:, None]
        return torch.cos(angle) * here + torch.sin(angle) * mate


def published_children(node: Tensor, order: int) -> Tensor:
    """(...) points of an order -> (..., 8): of 4 sub-pixels times 4 angles the 8 nearest."""
    n_psi = so3_grid.n_in_plane(order)
    direction, m = node // n_psi, node % n_psi
    child = (direction[..., None] * 4 + torch.arange(4))[..., None] * (2 * n_psi)
    angles = (2 * m[..., None] + torch.arange(-1, 3)) % (2 * n_psi)
    candidates = (child + angles[..., None, :]).flatten(-2)  # (..., 16)
    mine, theirs = so3_grid.rotations_at(node, order), so3_grid.rotations_at(candidates, order + 1)
    trace = (mine[..., None, :, :] * theirs).sum((-1, -2))
    return candidates.gather(-1, trace.topk(8, -1).indices)


def symmetric_hartley(images: Tensor) -> Tensor:
    """(b, D, D) -> (b, D+1, D+1) Hartley transform, the lines at +Nyquist copied from -Nyquist."""
    values = fourier.hartley(images)
    values = torch.cat([values, values[..., :1]], -1)
    return torch.cat([values, values[..., :1, :]], -2)
