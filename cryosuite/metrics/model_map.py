"""A model on the grid of a map: the map calculated from its atoms, and masks around them.

The calculated map uses electron scattering factors, B factors and occupancies (gemmi's density calculator). Atoms are
spread a little wider than they are on a grid twice as fine, and both are undone in Fourier space, so that the map is
right up to the grid's Nyquist frequency. All is done in a box around the model that may reach beyond the map's edges:
nothing wraps around, and atoms just outside a cropped map still count.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryosuite.data.map_grid import MapGrid
from cryosuite.errors import InputError
from cryosuite.formats.atoms import Atoms
from cryosuite.kernels.fourier import resize_axis

if TYPE_CHECKING:
    import gemmi

PAD = 10.0  # A around the model in which density is calculated
WIDTH = 20.0  # smallest B of an atom on the fine grid, in units of the voxel squared: aliasing below 1e-4


FINE_POINTS = 4e8  # beyond, the finer grid is left out
LARGEST_B = 999.0
PROBE, SHRINK = 1.11, 0.9  # A, of the solvent mask (Jiang and Bruenger, J. Mol. Biol. 243, 100, 1994)
BOX_MARGIN = 5.0  # A around the model that a cut box keeps


@dataclass(frozen=True)
class ModelOnGrid:
    """The atoms of a model and the grid of a map.

    Raises:
        InputError: no atom lies in the map.
    """

    atoms: Atoms
    grid: MapGrid

    def __post_init__(self) -> None:
        if not self.inside.any():
            lines = (np.round(np.stack(ends, 1), 1).tolist() for ends in (self._ends(), self._atom_ends()))
            box, model = (" x ".join(f"{low:g}..{high:g}" for low, high in one) for one in lines)
            raise InputError(
                f"{self.atoms.name}: none of its {len(self.atoms)} atoms lies in {self.grid.path}: the map covers "
                f"{box} A (x, y, z), the model {model} A. Check that the two belong together and that the map's origin "
                "is right"
            )

    def _ends(self) -> tuple[np.ndarray, np.ndarray]:
        low = np.array(self.grid.origin)
        return low, low + np.array(self.grid.extent) - self.grid.voxel

    def _atom_ends(self) -> tuple[np.ndarray, np.ndarray]:
        return self.atoms.xyz.min(0), self.atoms.xyz.max(0)

    @cached_property
    def inside(self) -> np.ndarray:
        """(n,) bool: atoms within the map."""
        low, high = self._ends()
        return ((self.atoms.xyz >= low) & (self.atoms.xyz <= high)).all(1)

    @cached_property
    def cut(self) -> tuple[slice, slice, slice]:
        """The part (z, y, x) of the map that holds its atoms and 5 A around."""
        return self._around(BOX_MARGIN)

    def _around(self, margin: float) -> tuple[slice, slice, slice]:
        """The part of the map within ``margin`` A of the box around the atoms in or near it."""
        shape, steps = np.array(self.grid.data.shape), margin / np.array(self.grid.voxel[::-1])
        index = self.grid.index_of(self.atoms.xyz)
        index = index[((index >= -steps) & (index <= shape - 1 + steps)).all(1)]
        low = np.maximum(np.floor(index.min(0) - steps), 0).astype(int)
        high = np.minimum(np.ceil(index.max(0) + steps) + 1, shape).astype(int)
        return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))

    def calculated(self, b_iso: float | None = None, d_min: float | None = None) -> np.ndarray:
        """The map of the atoms, (z, y, x) float32, electron scattering lengths (A) per A^3.

        Args:
            b_iso: one B factor (A^2) for all atoms; None: each its own.
            d_min: spatial frequencies beyond 1/d_min (A) are cut off; None: all up to Nyquist.
        """
        box = self._box(max(PAD, 3.0 * (d_min or 0.0)))
        fine = 2 if 8.0 * np.prod(box.shape, dtype=np.float64) < FINE_POINTS else 1
        b = self.atoms.b_iso if b_iso is None else np.full(len(self.atoms), float(b_iso))
        b = np.clip(b, 0.0, LARGEST_B)
        lowest = float(b[box.keep].min())
        blur = max(0.0, (WIDTH if fine == 2 else 5 * WIDTH) * max(self.grid.voxel) ** 2 - lowest)
        values = _gemmi_density(self.atoms, b, box, fine, blur)
        for axis, n in enumerate(box.shape):
            values = resize_axis(values, n, axis)
        square = frequency_squared(box.shape, self.grid.voxel)
        gain = torch.exp(blur / 4.0 * square)
        if d_min is not None:
            gain = gain * (square <= 1.0 / d_min**2)
        values = torch.fft.irfftn(torch.fft.rfftn(values) * gain, s=box.shape)
        return box.into(self.grid.data.shape, values.numpy())

    def mask(self, radius: float | None = None) -> np.ndarray:
        """(z, y, x) bool: voxels of the model: within ``radius`` A of an atom, or (None) what solvent cannot reach.

        The latter is the solvent mask of Jiang and Bruenger: van der Waals radii plus 1.11 A, shrunk by .9 A.
        """
        import gemmi

        box = self._box((radius or 4.0) + PROBE)
        kind = gemmi.AtomicRadiiSet.Cctbx if radius is None else gemmi.AtomicRadiiSet.Constant
        masker = gemmi.SolventMasker(kind, radius or 0.0)
        masker.rprobe, masker.rshrink = (PROBE, SHRINK) if radius is None else (0.0, 0.0)
        grid = box.set_up(gemmi.FloatGrid(), 1)
        masker.put_mask_on_float_grid(grid, _gemmi_model(self.atoms, self.atoms.b_iso, box)[0])
        solvent = np.array(grid, copy=False).transpose(2, 1, 0)
        return box.into(self.grid.data.shape, (solvent < 0.5).astype(np.float32)) > 0.5

    def soft_mask(self, radius: float = 3.0, soft: float = 3.0) -> np.ndarray:
        """(z, y, x) float32: 1 within ``radius`` A of an atom, falling as a cosine over ``soft`` A more."""
        from scipy.ndimage import distance_transform_edt

        part, out = self._around(radius + soft), np.zeros(self.grid.data.shape, np.float32)
        distance = distance_transform_edt(~self.mask(radius)[part], sampling=self.grid.voxel[::-1])
        out[part] = 0.5 + 0.5 * np.cos(np.pi * np.clip(distance / soft, 0.0, 1.0))
        return out

    def _box(self, pad: float) -> _Box:
        """The box around the atoms in or near the map, in whole voxels of the map."""
        from scipy.fft import next_fast_len

        shape, voxel = np.array(self.grid.data.shape), np.array(self.grid.voxel[::-1])
        index, margin = self.grid.index_of(self.atoms.xyz), pad / voxel
        keep = ((index >= -margin) & (index <= shape - 1 + margin)).all(1)
        low = np.maximum(np.floor(index[keep].min(0) - margin), np.floor(-2 * margin)).astype(int)
        high = np.minimum(np.ceil(index[keep].max(0) + margin), np.ceil(shape + 2 * margin)).astype(int) + 1
        size = tuple(next_fast_len(int(n), real=True) for n in high - low)
        return _Box(tuple(low.tolist()), size, self.grid.voxel, self.grid.origin, keep)


@dataclass(frozen=True)
class _Box:
    """A part of space on the map's grid: ``start`` and ``shape`` (z, y, x) in voxels; ``keep``: the atoms in it."""

    start: tuple[int, int, int]
    shape: tuple[int, int, int]
    voxel: tuple[float, float, float]
    origin: tuple[float, float, float]
    keep: np.ndarray

    @property
    def corner(self) -> np.ndarray:
        """Position (x, y, z) of voxel 0 0 0, A."""
        return np.array(self.start[::-1]) * self.voxel + self.origin

    def set_up(self, grid: gemmi.FloatGrid, fine: int) -> gemmi.FloatGrid:
        """Make a grid of gemmi one over the box, ``fine`` times finer, of zeros."""
        import gemmi

        grid.set_size(*(n * fine for n in reversed(self.shape)))
        lengths = [n * size for n, size in zip(reversed(self.shape), self.voxel, strict=True)]
        grid.set_unit_cell(gemmi.UnitCell(*lengths, 90, 90, 90))
        grid.spacegroup = gemmi.SpaceGroup("P 1")
        return grid

    def into(self, shape: tuple[int, ...], values: np.ndarray) -> np.ndarray:
        """The values of this box in a map of zeros."""
        out = np.zeros(shape, np.float32)
        here, there = [], []
        for start, size, n in zip(self.start, self.shape, shape, strict=True):
            low, high = max(start, 0), min(start + size, n)
            here.append(slice(low - start, high - start))
            there.append(slice(low, high))
        out[tuple(there)] = values[tuple(here)]
        return out


def frequency_squared(shape: tuple[int, ...], voxel: tuple[float, float, float]) -> torch.Tensor:
    """1/d^2 (A^-2) of every point of the half transform (rfftn) of a map (z, y, x) with voxels (x, y, z)."""
    sizes = voxel[::-1]
    z, y = (torch.fft.fftfreq(n, size) for n, size in zip(shape[:2], sizes[:2], strict=True))
    x = torch.fft.rfftfreq(shape[2], sizes[2])
    return z[:, None, None] ** 2 + y[:, None] ** 2 + x**2


def _gemmi_density(atoms: Atoms, b_iso: np.ndarray, box: _Box, fine: int, blur: float) -> torch.Tensor:
    """Density of the atoms on the grid of the box, ``fine`` times finer, each blurred by a further B."""
    import gemmi

    calculator = gemmi.DensityCalculatorE()
    box.set_up(calculator.grid, fine)
    calculator.blur = blur
    calculator.add_model_density_to_grid(_gemmi_model(atoms, b_iso, box)[0])
    values = np.array(calculator.grid, copy=False).transpose(2, 1, 0)
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def _gemmi_model(atoms: Atoms, b_iso: np.ndarray, box: _Box) -> gemmi.Structure:
    """The atoms of the box, moved into its frame."""
    import gemmi

    structure, chain = gemmi.Structure(), gemmi.Chain("A")
    residue = gemmi.Residue()
    residue.name = "ALL"
    elements = {number: gemmi.Element(int(number)) for number in np.unique(atoms.atomic_number)}
    xyz = atoms.xyz - box.corner
    for i in np.flatnonzero(box.keep & (atoms.atomic_number > 0)).tolist():
        atom = gemmi.Atom()
        atom.pos = gemmi.Position(*xyz[i])
        atom.element = elements[atoms.atomic_number[i]]
        atom.b_iso, atom.occ = b_iso[i], atoms.occupancy[i]
        residue.add_atom(atom)
    chain.add_residue(residue)
    structure.add_model(gemmi.Model(1))
    structure[0].add_chain(chain)
    return structure
