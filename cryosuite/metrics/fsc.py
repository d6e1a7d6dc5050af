"""Fourier shell correlation as users read it: curves, resolutions in Angstrom, areas, tables and a picture.

The shells themselves are computed by `kernels.shells`. Here the curves of one pair of maps are gathered (unmasked,
masked, with randomised phases, corrected for the mask) and written down.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from cryosuite.kernels import shells

THRESHOLDS = (0.5, 0.143)
RANDOMISE_BELOW = 0.8  # RELION: phases are randomised from the first shell whose unmasked FSC is below this
CORRECT_AFTER = 2  # and the correction starts two shells later


@dataclass
class FscTable:
    """The FSC curves of one pair of maps.

    Attributes:
        box_size: D of the maps.
        pixel_size: Angstrom per voxel.
        curves: name -> (D/2,) array. In our convention entry i is the shell of radius i + 1 (1 .. D/2); in the
            CryoBench convention entry i is at frequency i / D (0 .. D/2 - 1) and entry 0 is 1 by definition.
        compat: True for CryoBench's shells.
        randomised_from: first shell with randomised phases (None when nothing was corrected).
        mask_fraction: share of the box inside the mask (sum of the mask / number of voxels), None without mask.
    """

    box_size: int
    pixel_size: float
    curves: dict[str, np.ndarray] = field(default_factory=dict)
    compat: bool = False
    randomised_from: int | None = None
    mask_fraction: float | None = None

    @property
    def frequency(self) -> np.ndarray:
        """Spatial frequency of each entry, cycles per pixel, (D/2,)."""
        first = 0 if self.compat else 1
        return (np.arange(self.box_size // 2) + first) / self.box_size

    def resolution(self, name: str, threshold: float) -> float:
        """Resolution in Angstrom where a curve first falls below ``threshold``.

        Ours: linear interpolation between shells; Nyquist (2 pixels) if it never falls. CryoBench: the first entry
        whose (signed) value is below the threshold, not interpolated; 2 pixels too if there is none.
        """
        curve = self.curves[name]
        if self.compat:
            below = np.nonzero(curve < threshold)[0]
            cycles = self.frequency[below[0]] if len(below) else 0.5
            return float(self.pixel_size / max(cycles, 1e-9))
        return shells.resolution(curve, threshold, self.box_size, self.pixel_size)

    def auc(self, name: str) -> float:
        """Raw area under a curve, cycles per pixel: at most (D/2 - 1) / D. CryoBench: of its absolute value."""
        curve = self.curves[name]
        return float(raw_auc(np.abs(curve) if self.compat else curve, self.box_size))

    def auc_normalised(self, name: str) -> float:
        """Area divided by its maximum, so that 1 is perfect at any box size."""
        return self.auc(name) / auc_maximum(self.box_size)

    def summary(self) -> list[dict[str, float | str]]:
        """One row per curve: name, resolutions at 0.5 and 0.143 (A), raw and normalised AUC."""
        rows: list[dict[str, float | str]] = []
        for name in self.curves:
            row: dict[str, float | str] = {"curve": name}
            for threshold in THRESHOLDS:
                row[f"resolution_{threshold}_A"] = self.resolution(name, threshold)
            row["auc"] = self.auc(name)
            row["auc_normalised"] = self.auc_normalised(name)
            rows.append(row)
        return rows

    def rows(self) -> list[dict[str, float]]:
        """One row per shell: index, frequency (1/px and 1/A), resolution (A) and every curve."""
        out = []
        for i, cycles in enumerate(self.frequency):
            row: dict[str, float] = {
                "shell": int(round(cycles * self.box_size)),
                "cycles_per_pixel": float(cycles),
                "per_angstrom": float(cycles / self.pixel_size),
                "resolution_A": float(self.pixel_size / cycles) if cycles else float("inf"),
            }
            row.update({name: float(curve[i]) for name, curve in self.curves.items()})
            out.append(row)
        return out

    def as_csv(self) -> str:
        """The table of `rows` as comma-separated text."""
        return rows_as_csv(self.rows())

    def as_text(self) -> str:
        """Space-separated columns as cryoDRGN writes them: ``pixres`` (cycles per pixel), then the curves."""
        names = list(self.curves)
        lines = [" ".join(["pixres", *(name.replace(" ", "_") for name in names)])]
        for i, cycles in enumerate(self.frequency):
            lines.append(" ".join([f"{cycles:.6f}", *(f"{self.curves[name][i]:.6f}" for name in names)]))
        return "\n".join(lines) + "\n"


def fsc_table(
    a: torch.Tensor,
    b: torch.Tensor,
    pixel_size: float,
    mask: torch.Tensor | None = None,
    corrected: bool = False,
    compat: bool = False,
    seed: int = 0,
) -> FscTable:
    """Compare two maps shell by shell.

    Args:
        a, b: (D, D, D) maps on the same grid.
        pixel_size: Angstrom per voxel.
        mask: (D, D, D) soft mask in 0..1; adds the curve "masked".
        corrected: for half maps: adds "random" (masked, phases randomised beyond the shell where the unmasked FSC
            falls under 0.8) and "corrected" = (masked - random) / (1 - random) (Chen et al. 2013, RELION's way).
        compat: CryoBench's shells instead of ours.
        seed: of the random phases.

    Returns:
        FscTable with the curves "unmasked" and, where asked, "masked", "random" and "corrected".
    """
    box_size = a.shape[-1]
    shell_fsc = shells.fsc_cryobench if compat else shells.fsc
    table = FscTable(box_size, float(pixel_size), compat=compat)
    unmasked = shell_fsc(a, b)
    table.curves["unmasked"] = _numpy(unmasked)
    if mask is None:
        return table
    table.mask_fraction = float(mask.double().mean())
    masked = shell_fsc(a * mask, b * mask)
    table.curves["masked"] = _numpy(masked)
    if corrected:
        start = randomisation_start(table.curves["unmasked"]) + (0 if compat else 1)
        generator = torch.Generator().manual_seed(seed)
        random = shell_fsc(*(randomise_phases(x, start, generator) * mask for x in (a, b)))
        table.curves["random"] = _numpy(random)
        table.curves["corrected"] = correct(
            table.curves["masked"], table.curves["random"], start + CORRECT_AFTER - (0 if compat else 1)
        )
        table.randomised_from = start
    return table


def randomisation_start(unmasked: np.ndarray) -> int:
    """Index of the first entry below 0.8 (the last entry if none is)."""
    below = np.nonzero(np.asarray(unmasked) < RANDOMISE_BELOW)[0]
    return int(below[0]) if len(below) else len(unmasked) - 1


def randomise_phases(volume: torch.Tensor, first_shell: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Give every coefficient with round(|k|) >= ``first_shell`` a random phase and keep its amplitude.

    The phases are those of the transform of real white noise, hence Hermitian by construction: the result is real
    without loss. Chen et al., Ultramicroscopy 135 (2013) 24-35.

    Args:
        volume: (D, D, D) real.
        first_shell: radius in Fourier pixels.
        generator: seeds the phases.
    """
    size = volume.shape[-1]
    transform = torch.fft.rfftn(volume)
    noise = torch.fft.rfftn(torch.randn(volume.shape, generator=generator, dtype=volume.dtype))
    noise = noise / noise.abs().clamp_min(torch.finfo(volume.dtype).tiny)
    full = (torch.fft.fftfreq(size, dtype=torch.float64) * size) ** 2
    half = (torch.fft.rfftfreq(size, dtype=torch.float64) * size) ** 2
    square = full[:, None, None] + full[None, :, None] + half[None, None, :]
    beyond = square >= (first_shell - 0.5) ** 2
    transform = torch.where(beyond, transform.abs() * noise, transform)
    return torch.fft.irfftn(transform, s=volume.shape)


def correct(masked: np.ndarray, random: np.ndarray, start: int) -> np.ndarray:
    """FSC freed from what the mask alone correlates: (masked - random) / (1 - random) from entry ``start`` on."""
    out = np.array(masked, dtype=np.float64)
    beyond = slice(start, None)
    gap = 1.0 - np.asarray(random, dtype=np.float64)[beyond]
    out[beyond] = np.where(gap > 1e-6, (out[beyond] - random[beyond]) / np.maximum(gap, 1e-6), 0.0)
    return out


def raw_auc(curves: np.ndarray, box_size: int) -> np.ndarray:
    """Trapezoid area under curves (..., D/2) over frequency in cycles per pixel, not normalised, float64."""
    return shells.auc(torch.from_numpy(np.ascontiguousarray(curves, dtype=np.float64)), box_size).numpy()


def auc_maximum(box_size: int) -> float:
    """The area of a perfect curve: (D/2 - 1) / D."""
    return (box_size / 2 - 1) / box_size


def rows_as_csv(rows: list[dict]) -> str:
    """Rows of one table (same keys) as comma-separated text; numbers with 6 significant digits."""
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0].keys())
    for row in rows:
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row.values()])
    return text.getvalue()


def write_png(path: Path, table: FscTable, title: str = "") -> None:
    """Draw the curves of a table with the two thresholds; the horizontal axis is marked in Angstrom."""
    from cryosuite.metrics.plot import line_plot

    names = {
        name: name if name == "random" else f"{name} ({table.resolution(name, 0.143):.1f} A at 0.143)"
        for name in table.curves
    }
    lines = [(names[name], table.frequency / table.pixel_size, curve) for name, curve in table.curves.items()]
    nyquist = 0.5 / table.pixel_size
    ticks = [(nyquist * part / 5, f"{5 / (part * nyquist):.1f}") for part in range(1, 6)]
    line_plot(path, lines, (0.0, nyquist), (-0.1, 1.05), ticks, list(THRESHOLDS), title, "resolution (A)", "FSC")


def _numpy(curve: torch.Tensor) -> np.ndarray:
    return curve.detach().cpu().double().numpy()
