"""What a map network must not do: make molecules of noise, invent detail, depend on the frame or on the tiles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from lvm_cases import Judge, Structure, as_grid

from cryosuite.data.map_grid import MapGrid
from cryosuite.data.map_weights import MapWeights
from cryosuite.errors import InputError
from cryosuite.kernels.atom_grid import squared_frequency
from cryosuite.kernels.degrade import coloured_noise, soft_lowpass
from cryosuite.kernels.map_norm import auto_mask, to_unit
from cryosuite.kernels.map_spectrum import match_spectrum
from cryosuite.kernels.tiles import turned, turned_back
from cryosuite.methods.lvm_sharpen import EnhanceOptions, enhance
from cryosuite.metrics.model_cc import correlation
from cryosuite.simulate.map_options import PairOptions

PLAIN = PairOptions(
    resolution=(3.0, 3.0), noise=(0.5, 0.5), b=(80.0, 80.0), clean=0.0, nothing=0.0, chance_missing=0.0,
    affine=(0.0, 0.0), chance_tight=0.0, chance_lipid=0.0,
)  # fmt: skip
SIZE = 72  # of the noise
PART = 48  # of the part that is turned
BEYOND = 6.0  # A: phases beyond are random
TURNS = 24


def noise_energy(structures: list[Structure], weights: MapWeights, seeds: int = 1) -> list[dict[str, float]]:
    """Energy (sum of squares, grey values 0 .. 1, levels taken off) of the answer to noise over that of the noise.

    White noise, and the noise of a map: coloured as its signal is, low-passed at 4 A. All of it goes through the
    network here; "refused": whether the command as it is used says that there is no molecule and stops.
    """
    found = []
    case = structures[0].case(replace(PLAIN, resolution=(4.0, 4.0), noise=(0.0, 0.0)), 3)
    like = torch.nn.functional.interpolate(torch.from_numpy(case.grid.data)[None, None], (SIZE,) * 3)[0]
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        white = torch.randn(1, SIZE, SIZE, SIZE, generator=generator)
        coloured = soft_lowpass(coloured_noise(like, 1.0, 4.0, generator), 1.0, 4.0)
        for kind, noise in (("white", white), ("of a map", coloured)):
            grid = as_grid(noise[0], 1.0)
            seen, answer = noise[0], enhance(grid, weights, EnhanceOptions(skip=False, resolution=4.0, flat=False))
            if weights.spectrum == "matched":
                mask = auto_mask(seen, 1.0)
                seen = match_spectrum(seen, 1.0, mask if bool(mask.any()) else torch.ones_like(mask), 4.0)[0]
            seen, made = to_unit(seen, *answer.span), answer.map.data.astype(np.float64)
            energy = float((seen - seen.mean()).square().sum())
            share = round(made.var() * made.size / energy, 5)
            found.append({"kind": kind, "seed": seed, "share": share, "refused": refused(grid, weights)})
            print("noise", found[-1], flush=True)
    return found


def refused(grid: MapGrid, weights: MapWeights) -> bool:
    """Whether a map is not enhanced at all since nothing stands out of its noise."""
    try:
        enhance(grid, weights, EnhanceOptions(resolution=4.0))
    except InputError:
        return True
    return False


def random_phases(values: np.ndarray, limit: float, seed: int) -> np.ndarray:
    """A map whose phases beyond 1/``limit`` (voxels of 1 A) are those of white noise, amplitudes kept."""
    size = values.shape[0]
    spectrum = torch.fft.rfftn(torch.from_numpy(values))
    other = torch.fft.rfftn(torch.randn(values.shape, generator=torch.Generator().manual_seed(seed)))
    beyond = squared_frequency(size, 1.0).sqrt() > 1 / limit
    mixed = torch.where(beyond, spectrum.abs() * other / other.abs().clamp(min=1e-12), spectrum)
    return torch.fft.irfftn(mixed, s=values.shape).numpy()


def invented(structure: Structure, weights: MapWeights, seed: int) -> dict[str, float]:
    """Mean map-model FSC beyond BEYOND (to 3.5 A) of input and answer, with true and with random phases there."""
    case = structure.case(PLAIN, seed)
    judge = Judge(case)
    out = {}
    for name, values in (("true", case.grid.data), ("random", random_phases(case.grid.data, BEYOND, seed))):
        grid = as_grid(values, 1.0)
        made = enhance(grid, weights, EnhanceOptions(resolution=case.resolution)).map.data
        for kind, one in (("input", values), ("ours", made)):
            frequency, fsc = judge.shells(one)
            chosen = (frequency > 1.1 / BEYOND) & (frequency < 1 / 3.5)
            out[f"{kind}_{name}"] = round(float(fsc[chosen].mean()), 4)
    print("phases", structure.name, out, flush=True)
    return out


def frames(structure: Structure, weights: MapWeights) -> dict[str, float]:
    """Correlation of answers: over 24 frames (a part of PART^3, mean and least), and with tiles moved half a stride."""
    case = structure.case(PLAIN, 11)
    middle = case.grid.data.shape[0] // 2
    part = slice(middle - PART // 2, middle + PART // 2)
    inner = torch.from_numpy(np.ascontiguousarray(case.grid.data[part, part, part]))
    first, found, d = None, [], case.resolution
    for turn in range(TURNS):
        made = enhance(as_grid(turned(inner, turn), 1.0), weights, EnhanceOptions(skip=False, resolution=d)).map.data
        back = turned_back(torch.from_numpy(made), turn).numpy()
        first = back if first is None else first
        if turn:
            found.append(correlation(first, back))
    plain, moved = (enhance(case.grid, weights, EnhanceOptions(offset=o, resolution=d)).map.data for o in (0, 12))
    out = {"turns_mean": float(np.mean(found)), "turns_least": min(found), "tiles": correlation(plain, moved)}
    print("frames", structure.name, out, flush=True)
    return {name: round(value, 5) for name, value in out.items()}


def run_safety(structures: list[Structure], weights: MapWeights, cases: int = 1) -> dict:
    """All of it, on a few structures."""
    return {
        "noise": noise_energy(structures, weights),
        "phases": [invented(structure, weights, 20 + i) for i, structure in enumerate(structures[:cases])],
        "frames": [frames(structure, weights) for structure in structures[:1]],
        "beyond_A": BEYOND,
    }
