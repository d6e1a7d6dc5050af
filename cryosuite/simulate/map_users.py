"""Training volumes cut from the user's own maps, with targets made of the models that were built into them."""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cryosuite.data.map_grid import read_grid, resampled
from cryosuite.data.map_sets import MapEntry, MapVolume, load_volume
from cryosuite.errors import notice
from cryosuite.formats.atoms import read_atoms
from cryosuite.kernels.atom_grid import splat_correction, splat_many, squared_frequency
from cryosuite.kernels.density import MOLMAP_SIGMA
from cryosuite.kernels.fourier import real_inverse
from cryosuite.kernels.tiles import turned
from cryosuite.metrics.model_cc import d_model
from cryosuite.metrics.model_map import ModelOnGrid
from cryosuite.simulate.map_options import PairOptions
from cryosuite.simulate.map_volume import FINEST, MASK_LEVEL, MASK_SIGMA, Draws, Volume

KEPT = 1 << 28  # voxels of maps held in memory, float32
DENSE = 0.3  # grey value above which a voxel of a map without a model is worth a crop
WANDER = 10.0  # voxels from the place that the cube is centred on
TURNS = 24


class UserMaps:
    """Maps of the user with or without models, read when they are first drawn and kept while there is room."""

    def __init__(self, entries: list[MapEntry], options: PairOptions) -> None:
        self.entries, self.options = entries, options
        self._held: OrderedDict[int, MapVolume] = OrderedDict()
        self._resolutions: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def open(self, row: int) -> tuple[MapVolume, float]:
        """A map on the working voxel and the resolution of its target, A. Raises InputError as ``load_volume``."""
        entry = self.entries[row]
        if row not in self._held:
            self._held[row] = load_volume(entry, self.options.voxel_size, self.options.norm, self.options.spectrum)
        if row not in self._resolutions:
            self._resolutions[row] = self._resolution(entry)
        self._held.move_to_end(row)
        while len(self._held) > 1 and sum(held.values.size for held in self._held.values()) > KEPT:
            self._held.popitem(last=False)
        return self._held[row], self._resolutions[row]

    def _resolution(self, entry: MapEntry) -> float:
        finest = FINEST * self.options.voxel_size
        if entry.model is None:
            return finest
        if self.options.task == "superres":
            return max(finest, self.options.superres_target)
        if entry.resolution is not None:
            return max(finest, entry.resolution)
        grid = resampled(read_grid(entry.map), self.options.voxel_size)
        model = ModelOnGrid(read_atoms(entry.model), grid)
        limit = d_model(grid.data, model.calculated(b_iso=0.0), grid.voxel)[0]
        notice(f"{entry.map}: no resolution is given; map and model agree best at {limit:.1f} A, which is used")
        return max(finest, limit)

    def volume(self, row: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Volume:
        """A cube about a random place of map ``row``: turned by one of 24 rotations, shifted by less than a voxel.

        Without a model the target is the input.
        """
        found, resolution = self.open(row)
        size, draws = self.options.volume, Draws(generator)
        shift = np.array([draws.uniform((-0.5, 0.5)) for _ in range(3)])  # x y z
        corner = self._corner(found, size, draws)
        turn = draws.below(TURNS)
        values = shifted(torch.from_numpy(cube(found.values, corner, size)).to(device), shift)
        if not len(found.points):
            return Volume(turned(values, turn), turned(values, turn), turned(values, turn) > DENSE, resolution, {})
        points = torch.from_numpy((found.points - corner[::-1] + shift - size // 2).astype(np.float32)).to(device)
        inside = ((points >= -(size // 2)) & (points < size - size // 2)).all(1)
        weights = torch.from_numpy(found.number).to(device).float()[inside]
        voxel = float(np.mean(found.voxel))
        spectrum = torch.fft.rfftn(splat_many(points[inside], weights[None], size)[0]) * splat_correction(size, device)
        squared = squared_frequency(size, voxel, device)
        target, mask = (
            torch.fft.irfftn(spectrum * torch.exp(-2 * math.pi**2 * sigma**2 * squared), s=(size,) * 3) / voxel**3
            for sigma in (MOLMAP_SIGMA * resolution, MASK_SIGMA)
        )
        return Volume(turned(values, turn), turned(target, turn), turned(mask > MASK_LEVEL, turn), resolution, {})

    def _corner(self, found: MapVolume, size: int, draws: Draws) -> np.ndarray:
        """Voxel z y x of the map where the cube begins; it may lie outside."""
        if len(found.points):
            centre = found.points[draws.below(len(found.points))][::-1]
        else:
            dense = np.flatnonzero(found.values.reshape(-1) > DENSE)
            at = int(dense[draws.below(len(dense))]) if len(dense) else draws.below(found.values.size)
            centre = np.array(np.unravel_index(at, found.values.shape))
        wander = [draws.uniform((-WANDER, WANDER)) for _ in range(3)]
        return np.round(centre + wander).astype(np.int64) - size // 2


def cube(values: np.ndarray, corner: np.ndarray, size: int) -> np.ndarray:  # (size, size, size)
    """A cube of a map from voxel ``corner`` (z y x) on; 0, the solvent, where it leaves the map."""
    out = np.zeros((size,) * 3, np.float32)
    shape = np.array(values.shape)
    low, high = np.clip(corner, 0, shape), np.clip(corner + size, 0, shape)
    source = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    place = tuple(slice(int(a), int(b)) for a, b in zip(low - corner, high - corner, strict=True))
    out[place] = values[source]
    return out


def shifted(values: Tensor, shift: np.ndarray, pad: int = 8) -> Tensor:
    """A cube moved by ``shift`` (x y z, voxels) in Fourier space, its faces mirrored so that they do not ring."""
    size = values.shape[0]
    wide = F.pad(values[None, None], (pad,) * 6, mode="reflect")[0, 0]
    n = size + 2 * pad
    spectrum = torch.fft.rfftn(wide)
    for axis, move in enumerate(shift[::-1]):
        k = torch.fft.rfftfreq(n, device=values.device) if axis == 2 else torch.fft.fftfreq(n, device=values.device)
        phase = torch.polar(torch.ones_like(k), -2 * math.pi * float(move) * k)
        spectrum = spectrum * phase.view(*(-1 if i == axis else 1 for i in range(3)))
    part = (slice(pad, pad + size),) * 3
    return real_inverse(spectrum, (n,) * 3)[part].contiguous()
