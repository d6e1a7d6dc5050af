"""One simulated cube of a molecule: the degraded map and its target, in as few Fourier transforms as it takes.

The input is built of electron form factors, the target of atomic numbers as ChimeraX's molmap (LVM, section 7). Both
come from one set of atoms in one frame. All gains of Fourier space (form factors, B-factor, anisotropy, low-pass, the
source's Nyquist cube) are one product; the B-factor field mixes three transforms.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryosuite.formats.form_factors import electron_factors
from cryosuite.kernels.atom_grid import splat_correction, splat_many, squared_frequency, two_factors
from cryosuite.kernels.degrade import anisotropy_gain, coloured_noise, frequencies, random_spd, smooth_field
from cryosuite.kernels.density import MOLMAP_SIGMA
from cryosuite.kernels.fourier import real_inverse
from cryosuite.kernels.rotations import random_rotations
from cryosuite.simulate.map_options import PairOptions, Range
from cryosuite.simulate.map_structures import Molecule

MASK_SIGMA = 2.5  # A: blur of the atoms that the molecule's mask is a level of
MASK_LEVEL = 0.08  # atomic numbers per A^3; the inside of a protein has .4
SOFT_LEVEL = 0.3  # where the soft mask reaches 1
LIPID_OUT = 12.0  # A: how far a lipid-like belt reaches from the molecule
EDGE = 5  # shells of the low-pass filter's edge
FINEST = 2.7  # voxels: resolution of the finest molmap whose atoms are still sampled well enough
ABUNDANT = {6: 0.63, 7: 0.17, 8: 0.19, 16: 0.02, 15: 0.02}  # heavy atoms of proteins and nucleic acids
NODES = 256  # of a table of form factors
WANDER = 10.0  # A from the atom that the cube is centred on


@dataclass(frozen=True)
class Volume:
    """A simulated cube: input and target (n, n, n) in their own units, mask (n, n, n) bool of the molecule, resolution
    of the target in A, and what was drawn (nothing for the user's maps)."""

    input: Tensor
    target: Tensor
    mask: Tensor
    resolution: float
    drawn: dict[str, float]


class Draws:
    """Numbers in 0..1 for the choices of one volume, drawn at once: one wait for the device instead of forty."""

    def __init__(self, generator: torch.Generator, count: int = 64) -> None:
        values = torch.rand(count, generator=generator, device=generator.device).tolist()
        self._values: Iterator[float] = iter(values)

    def uniform(self, bounds: Range) -> float:
        """Evenly between two bounds."""
        return bounds[0] + (bounds[1] - bounds[0]) * next(self._values)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return next(self._values) < probability

    def below(self, count: int) -> int:
        """An integer 0 .. count - 1."""
        return min(int(next(self._values) * count), count - 1)


def _top(voxel: float) -> float:
    """Largest s^2 on the half grid, (cycles per A)^2."""
    return 0.75 / voxel**2


@functools.lru_cache(maxsize=4)
def _elements(top: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tables of p(s^2), q(s^2) at NODES frequencies up to s^2 = ``top`` and w of every atomic number 0 .. 98."""
    numbers = np.arange(99)
    s = np.sqrt(np.linspace(0.0, top, NODES))
    factors = electron_factors(numbers, s)
    like = factors[6]  # relative errors count: without it high frequencies would not
    fitted = list(ABUNDANT)
    p, q, _ = two_factors(factors[fitted] / like, numbers[fitted], np.array([ABUNDANT[z] for z in fitted]))
    rest = factors / like - numbers[:, None] * p
    return p * like, q * like, rest @ q / (q @ q)


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)
def _factor_grids(size: int, voxel: float, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """p and q of ``_elements`` on the half grid, with the correction of the splat kernel in them."""
    squared = squared_frequency(size, voxel, device)
    top = _top(voxel)
    place = (squared * ((NODES - 1) / top)).clamp(max=NODES - 1.001)
    low = place.long()
    share = place - low
    correction = splat_correction(size, device)
    grids = []
    for table in _elements(top)[:2]:
        values = torch.as_tensor(table, dtype=torch.float32, device=device)
        grids.append((values[low] * (1 - share) + values[low + 1] * share) * correction)
    return grids[0], grids[1]


def place_atoms(
    molecule: Molecule, size: int, voxel: float, draws: Draws, generator: torch.Generator, as_is: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Atoms about a random one of them in a random frame: grid points (n, 3), numbers, residues (n,), rotation.

    ``as_is``: the frame of the molecule, its centre of mass at voxel size//2.
    """
    rotation = random_rotations(1, generator=generator, device=generator.device)[0].float()
    shift = torch.randn(3, generator=generator, device=generator.device) * WANDER
    xyz = torch.from_numpy(molecule.xyz).to(generator.device)
    centre = xyz[draws.below(len(xyz))]
    if as_is:
        rotation, shift, centre = torch.eye(3, device=xyz.device), torch.zeros_like(shift), torch.zeros_like(centre)
    points = ((xyz - centre) @ rotation.T + shift) / voxel
    inside = ((points >= -(size // 2)) & (points < size - size // 2)).all(1)
    kept = inside.nonzero()[:, 0]
    numbers = torch.from_numpy(molecule.number).to(kept.device)[kept].long()
    residues = torch.from_numpy(molecule.residue).to(kept.device)[kept]
    return points[kept], numbers, residues, rotation


def lacking(residues: Tensor, share: float, draws: Draws) -> Tensor:  # (n,) bool
    """Atoms of about ``share`` of the residues, in three stretches along the chain: what nobody has modelled."""
    out = torch.zeros_like(residues, dtype=torch.bool)
    if not len(residues) or share <= 0:
        return out
    first, last = int(residues.min()), int(residues.max())
    length = (last - first + 1) * share / 3
    for _ in range(3):
        start = draws.uniform((first, last - length + 1))
        out |= (residues >= start) & (residues < start + length)
    return out


def simulate(
    molecule: Molecule,
    options: PairOptions,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    as_is: bool = False,
) -> Volume:
    """Tasks sharpen, superres and pretrain: a cube of ``options.volume`` voxels about some place of a molecule.

    ``as_is``: in the molecule's own frame, its centre of mass at voxel volume//2 (whole maps for tests).
    """
    size, voxel = options.volume, options.voxel_size
    draws = Draws(generator)
    drawn = _drawn(options, draws)
    if drawn["nothing"]:
        return _nothing(drawn, options, generator, device)
    points, numbers, residues, _ = place_atoms(molecule, size, voxel, draws, generator, as_is)
    points, numbers = points.to(device), numbers.to(device)
    spectra = _spectra(points, numbers, lacking(residues, drawn["missing"], draws).to(device), size, voxel)
    squared = squared_frequency(size, voxel, device)
    correction = splat_correction(size, device)
    sigma = MOLMAP_SIGMA * drawn["target"]
    blur = torch.exp(-2 * math.pi**2 * sigma**2 * squared) * correction
    whole = spectra[0] if len(spectra) == 2 else spectra[0] - spectra[2]
    target = _real(whole * blur, size) / voxel**3
    mask = _real(spectra[0] * (torch.exp(-2 * math.pi**2 * MASK_SIGMA**2 * squared) * correction), size) / voxel**3
    if drawn["clean"]:
        return Volume(target.clone(), target, mask > MASK_LEVEL, drawn["target"], drawn)
    p, q = _factor_grids(size, voxel, device)
    spectrum = (spectra[0] * p + spectra[1] * q) * _gain(options, drawn, size, voxel, generator, device)
    signal = _blurred(spectrum, drawn, options, voxel, generator)
    out = signal + _surroundings(signal, mask, drawn, options, voxel, generator)
    if drawn["noise"] > 0:
        out = out + _noise(signal, drawn, voxel, generator)
    if drawn["tight"]:
        out = out * (mask > MASK_LEVEL)
    return Volume(out, target, mask > MASK_LEVEL, drawn["target"], drawn)


def _nothing(
    drawn: dict[str, float], options: PairOptions, generator: torch.Generator, device: torch.device | str
) -> Volume:
    """White noise through the filters of a map, and an empty target: what noise looks like when it fills the range."""
    size, voxel = options.volume, options.voxel_size
    white = torch.randn(size, size, size, generator=generator, device=generator.device).to(device)
    noise = _real(torch.fft.rfftn(white) * _gain(options, drawn, size, voxel, generator, device), size)
    empty = torch.zeros_like(noise)
    return Volume(noise, empty, empty > 0, drawn["target"], drawn)


def _drawn(options: PairOptions, draws: Draws) -> dict[str, float]:
    """One value of every property; all are drawn whether used or not, so that one switch does not change the rest."""
    superres = options.task == "superres"
    out = {"resolution": draws.uniform(options.resolutions)}
    finest = FINEST * options.voxel_size
    out["target"] = max(finest, options.superres_target if superres else out["resolution"])
    out["clean"] = float(draws.chance(options.clean) and not superres)
    out["cut"] = draws.uniform(options.cut)
    b, share = draws.uniform(options.b), draws.uniform(options.sharpened)
    out["b"] = b
    out["sharpened"] = share if draws.chance(options.chance_sharpened) else 0.0
    chances = {
        "local_b": options.chance_local,
        "anisotropy": options.chance_anisotropy,
        "anisotropy_b": 1.0,
        "noise": 1.0,
        "centre": 1.0,
        "solvent": 1.0,
        "lipid": options.chance_lipid,
        "missing": options.chance_missing if options.task != "pretrain" else 0.0,
        "source_voxel": 1.0,
    }
    for name, chance in chances.items():
        value, used = draws.uniform(getattr(options, name)), draws.chance(chance)
        out[name] = value if used else 0.0
    out["tight"] = float(draws.chance(options.chance_tight))
    out["nothing"] = float(draws.chance(options.nothing) and not out["clean"] and options.task != "pretrain")
    if out["clean"]:
        out["missing"] = 0.0
    return out


def _spectra(points: Tensor, numbers: Tensor, missing: Tensor, size: int, voxel: float) -> Tensor:
    """(2 or 3, size, size, size//2 + 1): of atomic numbers, of the second factor, of the numbers that are missing."""
    second = torch.as_tensor(_elements(_top(voxel))[2], dtype=torch.float32, device=points.device)
    weights = [numbers.float(), second[numbers]]
    if bool(missing.any()):
        weights.append(numbers.float() * missing)
    return torch.fft.rfftn(splat_many(points, torch.stack(weights), size), dim=(-3, -2, -1))


def _real(spectrum: Tensor, size: int) -> Tensor:
    return real_inverse(spectrum, (size,) * 3)


def _gain(
    options: PairOptions,
    drawn: dict[str, float],
    size: int,
    voxel: float,
    generator: torch.Generator,
    device: torch.device | str,
) -> Tensor:
    """Everything of the input that is a product in Fourier space but the form factors, (size, size, size//2 + 1)."""
    squared = squared_frequency(size, voxel, device)
    b = drawn["b"] * (1 - drawn["sharpened"])
    gain = torch.exp(-b / 4 * squared)
    beyond = (squared.sqrt() - 1 / (drawn["cut"] * drawn["resolution"])) * (size * voxel / EDGE)
    gain = gain * (0.5 - 0.5 * torch.cos(math.pi * (0.5 - beyond).clamp(0, 1)))
    like = torch.empty(1, size, size, size, device=device)
    if drawn["anisotropy"] > 0:
        smallest, ratio = torch.tensor([[drawn["anisotropy_b"]], [drawn["anisotropy"]]], device=generator.device)
        gain = gain * anisotropy_gain(like, voxel, random_spd(smallest, ratio, generator).to(device))[0]
    nyquist = 0.5 / drawn["source_voxel"]
    if nyquist * voxel < 0.5:  # a coarser source, brought to our voxel by Fourier padding: a cube of its frequencies
        for axis in frequencies(like, voxel):
            gain = gain * (axis.abs() < nyquist)
    return gain


def _blurred(
    spectrum: Tensor, drawn: dict[str, float], options: PairOptions, voxel: float, generator: torch.Generator
) -> Tensor:
    """The signal, with the B-factor field where one was drawn: linear between no, half and full blur."""
    size = spectrum.shape[0]
    top = drawn["local_b"]
    if top <= 0:
        return _real(spectrum, size) / voxel**3
    half = torch.exp(-top / 8 * squared_frequency(size, voxel, spectrum.device))
    first, second, third = _real(torch.stack([spectrum, spectrum * half, spectrum * half * half]), size) / voxel**3
    like = torch.empty(1, size, size, size, device=generator.device)
    place = 2 * smooth_field(like, voxel, options.field_scale, 0.0, 1.0, generator)[0].to(spectrum.device)
    return torch.where(
        place < 1, torch.lerp(first, second, place.clamp(max=1)), torch.lerp(second, third, (place - 1).clamp(min=0))
    )


def _surroundings(
    signal: Tensor,
    mask: Tensor,
    drawn: dict[str, float],
    options: PairOptions,
    voxel: float,
    generator: torch.Generator,
) -> Tensor:
    """Flat solvent and lipid-like blobs, in units of the mean signal inside the molecule."""
    inside = mask > MASK_LEVEL
    mean = (signal * inside).sum() / inside.sum().clamp(min=1)
    solid = (mask / SOFT_LEVEL).clamp(0, 1)
    out = (1 - solid) * (drawn["solvent"] * mean)
    if drawn["lipid"] > 0:
        like = torch.empty(1, *signal.shape, device=generator.device)
        blobs = smooth_field(like, voxel, LIPID_OUT, -1.0, 1.0, generator)[0].to(signal.device)
        out = out + (1 - solid) * (drawn["lipid"] * mean * (4 * blobs - 1).clamp(0, 1))
    return out


def _noise(signal: Tensor, drawn: dict[str, float], voxel: float, generator: torch.Generator) -> Tensor:
    """Noise of the mean of two half maps at the resolution, sigma^2(s) = |F|^2 (1 - FSC) / (2 FSC), F the signal."""
    like = signal[None]
    return coloured_noise(like, voxel, drawn["resolution"], generator, drawn["centre"])[0] * drawn["noise"]
