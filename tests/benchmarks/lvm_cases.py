"""What the quality tables of lvm.py are made of: whole simulated maps of test structures, baselines, scores."""

from __future__ import annotations

import json
import tempfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cryosuite.data.map_grid import MapGrid, read_grid
from cryosuite.formats.atoms import Atoms, read_atoms
from cryosuite.formats.mrc import write_map
from cryosuite.kernels.atom_grid import squared_frequency
from cryosuite.kernels.degrade import lowpass_gain, model_fsc
from cryosuite.metrics.model_cc import correlation, real_space, shell_correlation
from cryosuite.metrics.model_map import ModelOnGrid
from cryosuite.metrics.qscore import q_scores
from cryosuite.simulate.map_options import PairOptions
from cryosuite.simulate.map_structures import Molecule, load_molecules
from cryosuite.simulate.map_volume import Volume, simulate

# of `bench`, fit into 160^3 at 1 A per voxel, of different folds; none shares a sequence cluster with `train`
STRUCTURES = ("3d2f", "7ddo", "3lz0", "1tr2", "3lvk", "4jcv", "3wip", "1e4m", "3eiy", "1t6b")
PAD = 12.0  # A around the molecule
LARGEST = 160
SIGMA = 0.4  # A, of the Q-score
Q_ATOMS = 1500
GUINIER_FROM = 10.0  # A, where the fit of the B-factor begins
NEIGHBOUR = 4.0  # A: reach of the shells of one atom into those of another
Q_STEPS = (-100.0, -40.0, 40.0)  # A^2 from the best of CC_mask, tried for Q
B_STEPS = np.arange(-300, 151, 25)  # A^2 tried by the oracle; negative sharpens


def as_grid(values: torch.Tensor | np.ndarray, voxel: float) -> MapGrid:
    """Values as a map that was read from a file, its centre (voxel n//2) at 0 A."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input.mrc"
        origin = tuple(-(n // 2) * voxel for n in values.shape[::-1])
        write_map(path, np.asarray(values, np.float32), voxel, origin=origin)
        return read_grid(path)


@dataclass(frozen=True)
class Case:
    """A simulated map, what was drawn for it, and its model (B = 0) on its grid."""

    name: str
    grid: MapGrid
    truth: Volume
    model: ModelOnGrid
    resolution: float
    key: str

    @property
    def target(self) -> np.ndarray:
        """The training target of the whole molecule, in its own units."""
        return self.truth.target.numpy()


class Structure:
    """A test structure: its atoms for scoring, its molecule for simulating, and the box that it fits in."""

    def __init__(self, folder: Path, name: str) -> None:
        file = folder / f"{name}.cif.gz"
        atoms = read_atoms(file)
        centre = np.average(atoms.xyz, axis=0, weights=atoms.atomic_number)
        self.name = name
        self.atoms: Atoms = replace(atoms, xyz=atoms.xyz - centre, b_iso=np.zeros(len(atoms)))
        self.molecule: Molecule = load_molecules(str(file))[0]
        self.size = 8 * int(np.ceil(2 * (np.abs(self.atoms.xyz).max() + PAD) / 8))

    def case(self, options: PairOptions, seed: int) -> Case:
        """A whole map of the structure."""
        options = replace(options, volume=self.size, crop=min(options.crop, self.size))
        found = simulate(self.molecule, options, torch.Generator().manual_seed(seed), as_is=True)
        grid = as_grid(found.input, options.voxel_size)
        key = f"{self.name}-{options.task}-{zlib.crc32(f'{options} {seed}'.encode()):08x}"
        return Case(self.name, grid, found, ModelOnGrid(self.atoms, grid), found.drawn["resolution"], key)


class Judge:
    """Scores of maps on one case against its model, the calculated map cut at ``resolution``."""

    def __init__(self, case: Case, resolution: float | None = None) -> None:
        self.case, self.voxel = case, case.grid.voxel
        self.resolution = case.resolution if resolution is None else resolution
        self.calculated = case.model.calculated(d_min=self.resolution)
        self.sharp = case.model.calculated()
        self.mask = case.model.mask()
        self.soft = case.model.soft_mask()
        self.cut = case.model.cut

    def cc_mask(self, values: np.ndarray) -> float:
        """CC_mask alone."""
        return correlation(values, self.calculated, self.mask)

    def q(self, values: np.ndarray) -> float:
        """Mean Q-score, sigma .4 A, of a slab through the middle with about Q_ATOMS atoms (all would take long)."""
        xyz = self.case.model.atoms.xyz
        depth = np.abs(xyz[:, 0] - np.median(xyz[:, 0]))
        width = float(np.sort(depth)[min(Q_ATOMS, len(depth) - 1)])
        near = depth <= width + NEIGHBOUR  # atoms beside the slab take points away, as in the whole
        found = q_scores(values, self.voxel, self.case.grid.origin, xyz[near], (SIGMA,))[:, 0]
        return float(np.nanmean(found[depth[near] <= width]))

    def scores(self, values: np.ndarray) -> dict[str, float]:
        """All scores of a map (z, y, x): cc_box, cc_mask, cc_peaks, fsc (A at .5 inside a soft mask), q."""
        found = real_space(values, self.calculated, self.mask)
        return {
            "cc_box": found.box, "cc_mask": found.mask, "cc_peaks": found.peaks, "fsc": self.fsc(values),
            "q": self.q(values),
        }  # fmt: skip

    def fsc(self, values: np.ndarray) -> float:
        """A where the map-model FSC inside a soft mask falls to .5."""
        return shell_correlation(self._inner(values), self._inner(self.sharp), self.voxel).resolution(0.5)

    def shells(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Frequency (1/A) and masked map-model FSC."""
        found = shell_correlation(self._inner(values), self._inner(self.sharp), self.voxel)
        return found.frequency, found.fsc

    def _inner(self, values: np.ndarray) -> np.ndarray:
        level = values[self.soft == 0].mean(dtype=np.float64)
        return (values[self.cut] - np.float32(level)) * self.soft[self.cut]


def filtered(values: np.ndarray, voxel: float, b: float, resolution: float) -> np.ndarray:
    """A map with a global B-factor (negative sharpens), then cut at the resolution: what is done without a network."""
    maps = torch.from_numpy(np.ascontiguousarray(values, np.float32))[None]
    cut = lowpass_gain(maps, voxel, resolution)
    # one product: a strong negative B alone would raise rounding errors beyond the cut over everything else
    gain = torch.where(cut > 0, cut * torch.exp(-b / 4 * squared_frequency(maps.shape[-1], voxel)), 0.0)
    return torch.fft.irfftn(torch.fft.rfftn(maps[0]) * gain[0], s=values.shape).numpy()


def cut_at(values: np.ndarray, voxel: float, resolution: float) -> np.ndarray:
    """A map low-passed at the resolution, so that it holds the frequencies that the input holds."""
    return filtered(values, voxel, 0.0, resolution)


def best_b(judge: Judge) -> tuple[float, float]:
    """B-factors of the highest CC_mask and, near it, of the highest Q: nobody knows them without the model."""
    values, voxel = judge.case.grid.data, judge.voxel[0]
    cc = [judge.cc_mask(filtered(values, voxel, float(b), judge.case.resolution)) for b in B_STEPS]
    best = float(B_STEPS[int(np.argmax(cc))])
    near = [best + step for step in Q_STEPS]
    q = [judge.q(filtered(values, voxel, b, judge.case.resolution)) for b in near]
    return best, near[int(np.argmax(q))]


def baselines(judge: Judge, kept: Path | None) -> dict[str, dict[str, float]]:
    """Scores of everything that needs no network: made once, and kept in a folder where one is given."""
    case = judge.case
    file = None if kept is None else kept / f"{case.key}.json"
    rows = json.loads(file.read_text()) if file is not None and file.is_file() else {}
    values, voxel, d = case.grid.data, case.grid.voxel[0], case.resolution
    if "best_b" not in rows:
        b_cc, b_q = best_b(judge)
        rows["best_b"] = judge.scores(filtered(values, voxel, b_cc, d)) | {"b": b_cc, "b_q": b_q}
        rows["best_b"]["q"] = max(rows["best_b"]["q"], judge.q(filtered(values, voxel, b_q, d)))
    others = {
        "input": lambda: values, "guinier": lambda: guinier(case), "target": lambda: case.target,
        "target_cut": lambda: cut_at(case.target, voxel, d),
    }  # fmt: skip
    rows |= {name: judge.scores(make()) for name, make in others.items() if name not in rows}
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows))
    return rows


def guinier(case: Case) -> np.ndarray:
    """The map sharpened by the B-factor that its own spectrum shows, and cut at the resolution.

    The slope of ln(|F| sqrt(2 FSC / (1 + FSC))) over s^2 from 10 A to the resolution, FSC that of the half maps, as
    Rosenthal and Henderson (2003) do it.
    """
    values, voxel = torch.from_numpy(case.grid.data), case.grid.voxel[0]
    size = values.shape[0]
    radius = (squared_frequency(size, voxel).sqrt() * (size * voxel)).round().long().flatten()
    power = torch.fft.rfftn(values).abs().square().double().flatten()
    mean = torch.bincount(radius, power)[: size // 2] / torch.bincount(radius)[: size // 2]
    s = torch.arange(size // 2) / (size * voxel)
    fsc = model_fsc(s, torch.tensor(case.resolution))
    amplitude = 0.5 * torch.log(mean.clamp(min=1e-30) * 2 * fsc / (1 + fsc))
    chosen = (s > 1 / GUINIER_FROM) & (s <= 1 / case.resolution)
    slope = np.polyfit((s[chosen] ** 2).numpy(), amplitude[chosen].numpy(), 1)[0]
    return filtered(case.grid.data, voxel, 4 * float(slope), case.resolution)
