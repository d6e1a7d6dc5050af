"""Scenes of test structures with a missing wedge: what a network puts into it, and what it leaves of the rest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from lvm_cases import Structure, as_grid

from cryosuite.data.map_weights import MapWeights
from cryosuite.kernels.atom_grid import squared_frequency
from cryosuite.kernels.wedge import data_consistency, wedge_mask
from cryosuite.methods.lvm_sharpen import EnhanceOptions, enhance
from cryosuite.simulate.map_options import PairOptions
from cryosuite.simulate.map_scenes import scene

TILTS = (-60.0, 60.0)
SCENE = PairOptions(
    task="wedge", volume=72, tilt_low=(TILTS[0],) * 2, tilt_high=(TILTS[1],) * 2, soft=(1.5, 1.5), clean=0.0
)
EDGES = (100.0, 50.0, 33.0, 25.0)  # A, limits of the shells that are reported; voxels of 10 A hold 20 A
NOISES = (0.2, 0.6, 1.2)  # standard deviation of the noise over that of the scene, one per seed


def correlations(values: np.ndarray, truth: np.ndarray, voxel: float) -> dict[str, list[float]]:
    """Fourier correlation with the truth in three shells (and all of them), for missing and measured coefficients.

    0 where a map holds nothing, as the missing ones of the input.
    """
    size = truth.shape[0]
    radius = squared_frequency(size, voxel).sqrt()
    mask = wedge_mask(truth.shape, TILTS, "y", voxel, 1.5)
    twice = torch.full((size // 2 + 1,), 2.0)
    twice[0] = twice[-1] = 1.0
    a, b = (
        torch.fft.rfftn(torch.from_numpy(np.asarray(v, np.float32) - np.float32(v.mean()))) for v in (values, truth)
    )
    shells = [(1 / low, 1 / high) for low, high in zip(EDGES[:-1], EDGES[1:], strict=True)]
    out: dict[str, list[float]] = {}
    for name, region in (("missing", mask < 0.02), ("measured", mask > 0.98), ("all", mask >= 0)):
        out[name] = []
        for low, high in (*shells, (1 / EDGES[0], 1 / EDGES[-1])):
            weight = (region & (radius >= low) & (radius < high)) * twice
            cross, power_a, power_b = (
                float((weight * product).double().sum())
                for product in ((a * b.conj()).real, a.abs().square(), b.abs().square())
            )
            held = power_a > 1e-6 * power_b
            out[name].append(round(cross / (power_a * power_b) ** 0.5, 4) if held else 0.0)
    return out


def run_wedge(structures: list[Structure], seeds: int, weights: MapWeights, scenes: int = 2) -> dict:
    """``scenes`` scenes per noise level; the input with zeros in the wedge, the network's answer, and both joined."""
    molecules = [structure.molecule for structure in structures]
    found = []
    for seed in range(seeds):
        noise = NOISES[seed % len(NOISES)]
        for number in range(scenes):
            options = replace(SCENE, scene_noise=(noise, noise))
            truth = scene(molecules[number:] + molecules[:number], options, _generator(seed, number))
            grid = as_grid(truth.input, options.voxel_size)
            made = enhance(grid, weights, EnhanceOptions(tilt_range=TILTS, consistent=False)).map.data
            mask = wedge_mask(made.shape, TILTS, "y", options.voxel_size)
            joined = data_consistency(torch.from_numpy(grid.data), torch.from_numpy(made), mask).numpy()
            maps = {"input": grid.data, "network": made, "ours": joined}  # the last is what the command gives
            rows = {name: correlations(one, truth.target.numpy(), options.voxel_size) for name, one in maps.items()}
            found.append({"seed": seed, "scene": number, "noise": noise, "rows": rows})
            print(seed, number, noise, {n: [r["missing"][-1], r["measured"][-1]] for n, r in rows.items()}, flush=True)
    levels = {str(noise): [one for one in found if one["noise"] == noise] for noise in NOISES}
    return {
        "tilts": list(TILTS), "shells_A": list(EDGES), "scenes": scenes, "means": _means(found),
        "levels": {noise: _means(some) for noise, some in levels.items() if some}, "maps": found,
    }  # fmt: skip


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + number)


def _means(found: list[dict]) -> dict:
    return {
        row: {
            region: np.mean([one["rows"][row][region] for one in found], axis=0).round(4).tolist()
            for region in found[0]["rows"][row]
        }
        for row in found[0]["rows"]
    }
