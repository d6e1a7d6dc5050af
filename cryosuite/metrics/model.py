"""How well a map and a model agree: every score of LVM's tables at once, and the rows that are written down.

Correlations and FSC are in ``model_cc``, the calculated map and the masks in ``model_map``, Q-scores in ``qscore``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cryosuite.data.map_grid import MapGrid
from cryosuite.errors import InputError, notice
from cryosuite.formats.atoms import Atoms
from cryosuite.metrics.model_cc import RealSpace, Shells, d99, d_model, real_space, shell_correlation
from cryosuite.metrics.model_map import ModelOnGrid
from cryosuite.metrics.qscore import SIGMAS, expected_q, q_scores

RADIUS = 3.0  # A around atoms: the plain mask, and where the soft one begins to fall
THRESHOLDS = (0.5, 0.143)


@dataclass(frozen=True)
class ModelScores:
    """Scores of a map against a model.

    Attributes:
        atoms, inside: the model and which of its atoms lie in the map.
        solvent, plain: correlations with the mask of Jiang and Bruenger, and with one of 3 A around atoms.
        d_min: where the calculated map was cut for them (A); ``d_min_from`` says what gave it.
        fsc: curves "unmasked" and "masked", map against model; with half maps also "half maps" and "half maps masked".
        d_model: resolution and B factor (A, A^2) by "unmasked" and "masked".
        d99: A.
        q: (n, 2) Q of every atom at sigma .4 and .6, NaN outside the map.
    """

    atoms: Atoms
    inside: np.ndarray
    solvent: RealSpace
    plain: RealSpace
    d_min: float
    d_min_from: str
    fsc: dict[str, Shells]
    d_model: dict[str, tuple[float, float]]
    d99: float
    q: np.ndarray = field(repr=False)

    def mean_q(self, kind: str | None = None) -> list[float]:
        """Mean Q over the atoms in the map, of one kind (protein, nucleic, water, ion, other) or all but waters."""
        chosen = self.atoms.kind == kind if kind else self.atoms.kind != "water"
        chosen = chosen & np.isfinite(self.q[:, 0])
        return self.q[chosen].mean(0).tolist() if chosen.any() else [float("nan")] * len(SIGMAS)

    def atom_rows(self) -> list[dict]:
        """One row per atom in the map."""
        a, rows = self.atoms, []
        for i in np.flatnonzero(np.isfinite(self.q[:, 0])).tolist():
            row = {
                "chain": a.chain[i],
                "residue": a.residue_label[i],
                "name": a.residue_name[i],
                "atom": a.atom_name[i],
            }
            row |= dict(zip(("x", "y", "z"), a.xyz[i].tolist(), strict=True))
            rows.append(row | {"b_iso": float(a.b_iso[i])} | _named_q(self.q[i]))
        return rows

    def residue_rows(self) -> list[dict]:
        """One row per residue with atoms in the map: kind, number of atoms, mean Q."""
        a = self.atoms
        keep = np.flatnonzero(np.isfinite(self.q[:, 0]))
        if not len(keep):
            return []
        names = [one[keep] for one in (a.chain, a.residue_label, a.residue_name)]
        new = np.any([one[1:] != one[:-1] for one in names], axis=0)
        rows = []
        for part in np.split(np.arange(len(keep)), np.flatnonzero(new) + 1):
            i = keep[part[0]]
            row = {"chain": a.chain[i], "residue": a.residue_label[i], "name": a.residue_name[i], "kind": a.kind[i]}
            rows.append(row | {"atoms": len(part)} | _named_q(self.q[keep[part]].mean(0)))
        return rows

    def expected(self, resolution: float) -> dict[str, float]:
        """Q at sigma .6 that each kind of residue in the model usually has at a resolution (A)."""
        kinds = sorted(set(self.atoms.kind[np.isfinite(self.q[:, 0])].tolist()))
        found = {kind: expected_q(kind, resolution) for kind in kinds}
        return {kind: value for kind, value in found.items() if value is not None}

    def summary(self) -> dict[str, float | int | str]:
        """All numbers by name: correlations, resolutions (A), mean Q."""
        out: dict[str, float | int | str] = {
            "atoms": len(self.atoms), "atoms_in_map": int(self.inside.sum()),
            "cc_box": self.solvent.box, "cc_mask": self.solvent.mask, "cc_volume": self.solvent.volume,
            "cc_peaks": self.solvent.peaks, "mask_voxels": self.solvent.voxels,
            "cc_mask_3A": self.plain.mask, "cc_volume_3A": self.plain.volume, "cc_peaks_3A": self.plain.peaks,
            "calculated_map_cut_at_A": self.d_min, "calculated_map_cut_from": self.d_min_from, "d99_A": self.d99,
        }  # fmt: skip
        for name, (d, b) in self.d_model.items():
            out |= {f"d_model_{name}_A": d, f"d_model_{name}_b": b}
        for name, curve in self.fsc.items():
            out |= {f"fsc_{name.replace(' ', '_')}_{limit}_A": curve.resolution(limit) for limit in THRESHOLDS}
        for kind in (None, *sorted(set(self.atoms.kind.tolist()))):
            name = "q" if kind is None else f"q_{kind}"
            out |= {f"{name}_{sigma}": q for sigma, q in zip(SIGMAS, self.mean_q(kind), strict=True)}
        return out

    def fsc_rows(self) -> list[dict]:
        """One row per curve and shell (a masked curve has the shells of a smaller box): 1/A, A and FSC."""
        return [
            {"curve": name, "per_angstrom": float(s), "resolution_A": float(1.0 / s), "fsc": float(value)}
            for name, curve in self.fsc.items()
            for s, value in zip(curve.frequency, curve.fsc, strict=True)
        ]


def _named_q(values: np.ndarray) -> dict[str, float]:
    return {f"q_{sigma}": float(value) for sigma, value in zip(SIGMAS, values, strict=True)}


def score_model(
    grid: MapGrid, atoms: Atoms, resolution: float | None = None, halves: tuple[np.ndarray, np.ndarray] | None = None
) -> ModelScores:
    """All scores of a map against a model.

    Args:
        grid: the map. atoms: the model, without hydrogens; waters may be in it.
        resolution: A, where the calculated map is cut for the correlations. By default the FSC of the half maps at
            .143 (masked) if they are given, else d_model.
        halves: two half maps (z, y, x) on the same grid.

    Raises:
        InputError: the map is constant, no atom lies in it, or the resolution is not positive.
    """
    if not float(grid.data.std(dtype=np.float64)) > 0:
        raise InputError(f"{grid.path}: the map is constant: nothing can be compared with it")
    if min(grid.data.shape) < 4:
        raise InputError(f"{grid.path}: has the shape {grid.data.shape}: at least 4 voxels are needed on each axis")
    if resolution is not None and not (np.isfinite(resolution) and resolution > 0):
        raise InputError(f"a resolution of {resolution} A was given; a positive number is needed")
    model = ModelOnGrid(atoms, grid)
    outside = len(atoms) - int(model.inside.sum())
    if outside:
        notice(f"{atoms.name}: {outside} of {len(atoms)} atoms lie outside {grid.path}: they have no Q-score")
    soft, cut, voxel = model.soft_mask(RADIUS), model.cut, grid.voxel
    solvent = soft == 0

    def inner(values: np.ndarray) -> np.ndarray:
        """Masked and cut out, the solvent's level taken off first: else the mask's own shape would be compared."""
        level = values[solvent].mean(dtype=np.float64) if solvent.any() else values.mean(dtype=np.float64)
        return (values[cut] - np.float32(level)) * soft[cut]

    observed, own_b, sharp = grid.data, model.calculated(), model.calculated(b_iso=0.0)
    fsc = {
        "unmasked": shell_correlation(observed, own_b, voxel),
        "masked": shell_correlation(inner(observed), inner(own_b), voxel),
    }
    if halves is not None:
        fsc["half maps"] = shell_correlation(*halves, voxel)
        fsc["half maps masked"] = shell_correlation(*(inner(half) for half in halves), voxel)
    limits = {
        "unmasked": d_model(observed, sharp, voxel), "masked": d_model(inner(observed), inner(sharp), voxel),
    }  # fmt: skip
    d_min, source = _cut_off(resolution, fsc, limits)
    calculated = model.calculated(d_min=d_min)
    return ModelScores(
        atoms, model.inside, real_space(observed, calculated, model.mask()),
        real_space(observed, calculated, model.mask(RADIUS)), d_min, source, fsc, limits, d99(observed, voxel),
        q_scores(observed, voxel, grid.origin, atoms.xyz),
    )  # fmt: skip


def _cut_off(
    resolution: float | None, fsc: dict[str, Shells], limits: dict[str, tuple[float, float]]
) -> tuple[float, str]:
    """Where the calculated map is cut (A), and the words that say why."""
    if resolution is not None:
        return float(resolution), "given"
    if "half maps masked" in fsc:
        return fsc["half maps masked"].resolution(0.143), "half maps"
    return limits["masked"][0], "d_model"
