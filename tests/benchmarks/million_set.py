"""A particle set of any size that hardly takes disk space: many stacks in a star file, few of them different.

    python tests/benchmarks/million_set.py FOLDER [--particles 1000000] [--stacks 2000] [--box 64] [--seed 0]

Images of Gaussian blobs in random poses, with CTF and noise, in stacks of ``particles / stacks`` images; there are
``DISTINCT`` stacks per optics group, all others are hard links to them (copies where the disk has none), so the rows of
linked stacks share poses and CTF. They share half sets too: no image is in both. Three optics groups differ in voltage,
Cs and pixel size. The star file has the 25 columns of a RELION 3.1 refinement.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import numpy as np
import torch

from cryosuite.data.orientations import from_euler
from cryosuite.formats.mrc import StackWriter
from cryosuite.kernels.ctf import CtfParams, ctf

DISTINCT = 8  # stacks per optics group
OPTICS = ((300.0, 2.7, 0.1, 3.0), (200.0, 2.7, 0.1, 3.0), (300.0, 0.01, 0.07, 3.06))  # kV, mm, contrast, A per pixel
BLOBS = np.array([[10.0, 0, 0, 3.2, 1.0], [-6, 8, 2, 4.0, 0.8], [0, -10, 6, 3.6, 1.2], [2, 4, -12, 4.4, 0.9]])
BLOB_BOX = 64  # that the blobs (x, y, z, sigma in pixels, height) are for
NOISE = 2.0  # standard deviation, of that of the signal
COLUMNS = (
    "CoordinateX", "CoordinateY", "ImageName", "MicrographName", "OpticsGroup", "CtfMaxResolution",
    "CtfFigureOfMerit", "DefocusU", "DefocusV", "DefocusAngle", "CtfBfactor", "CtfScalefactor", "PhaseShift",
    "AngleRot", "AngleTilt", "AnglePsi", "OriginXAngst", "OriginYAngst", "ClassNumber", "NormCorrection",
    "LogLikeliContribution", "MaxValueProbDistribution", "NrOfSignificantSamples", "GroupNumber", "RandomSubset",
)  # fmt: skip


def make_set(folder: Path, particles: int, stacks: int, box: int = 64, seed: int = 0) -> Path:
    """Write FOLDER/particles.star and FOLDER/Extract/*.mrcs; returns the star file."""
    (folder / "Extract").mkdir(parents=True, exist_ok=True)
    per_stack = particles // stacks
    if per_stack * stacks != particles or stacks % len(OPTICS) and stacks < len(OPTICS) * DISTINCT:
        raise SystemExit("the particles must divide evenly over the stacks, of which there must be enough")
    tails: list[list[str]] = []
    for stack in range(stacks):
        path = folder / "Extract" / stack_name(stack)
        if stack < len(OPTICS) * DISTINCT:
            tails.append(
                _distinct_stack(path, stack % len(OPTICS), per_stack, box, np.random.default_rng([seed, stack]))
            )
        else:
            _link(folder / "Extract" / stack_name(stack % len(tails)), path)
    star = folder / "particles.star"
    with open(star, "w") as file:
        file.write("\n# version 30001\n\ndata_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnOpticsGroupName #2\n")
        names = ("Voltage", "SphericalAberration", "AmplitudeContrast", "ImagePixelSize")
        file.writelines(f"_rln{name} #{number}\n" for number, name in enumerate(names, 3))
        file.write("_rlnImageSize #7\n_rlnImageDimensionality #8\n")
        for number, values in enumerate(OPTICS, 1):
            file.write(f"{number} opticsGroup{number} {' '.join(map(str, values))} {box} 2\n")
        file.write("\n\n# version 30001\n\ndata_particles\n\nloop_\n")
        file.writelines(f"_rln{name} #{number}\n" for number, name in enumerate(COLUMNS, 1))
        rng = np.random.default_rng([seed, 1 << 20])
        for stack in range(stacks):
            place = rng.uniform(0, 4000, (per_stack, 2)).tolist()
            name = stack_name(stack)
            micrograph = f"MotionCorr/{Path(name).stem}.mrc"
            file.writelines(
                f"{x:.3f} {y:.3f} {row:06d}@Extract/{name} {micrograph} {tail}\n"
                for row, ((x, y), tail) in enumerate(zip(place, tails[stack % len(tails)], strict=True), 1)
            )
    return star


def stack_name(number: int) -> str:
    """Name of a stack, the micrograph's."""
    return f"mic_{number:05d}.mrcs"


def _link(source: Path, path: Path) -> None:
    path.unlink(missing_ok=True)
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)


def _distinct_stack(path: Path, group: int, count: int, box: int, rng: np.random.Generator) -> list[str]:
    """Write a stack of new images; returns what stands in their rows from the optics group on."""
    kv, cs, contrast, pixel_size = OPTICS[group]
    half = (int(path.stem.rpartition("_")[2]) // len(OPTICS)) % 2  # both in every group
    euler = rng.uniform([-180, 0, -180], [180, 180, 180], (count, 3)).round(4)
    euler[:, 1] = np.rad2deg(np.arccos(rng.uniform(-1, 1, count))).round(4)
    origin = rng.uniform(-2, 2, (count, 2)).round(4) * pixel_size
    u = rng.uniform(8000, 25000, count).round(1)
    v, angle = (u - rng.uniform(0, 400, count)).round(1), rng.uniform(0, 180, count).round(2)
    table = np.zeros((count, 9), np.float32)
    table[:] = [box, pixel_size, 0, 0, 0, kv, cs, contrast, 0]
    table[:, 2], table[:, 3], table[:, 4] = u, v, angle
    images = _images(from_euler(euler), origin / pixel_size, table, box, rng)
    with StackWriter(path, count, box, pixel_size) as writer:
        writer.write(images)
    norm, likely, most, number = (rng.uniform(size=(4, count)) * [[0.2], [1e3], [1], [50]]).tolist()
    return [
        f"{group + 1} 3.4{i % 10}0000 0.08{i % 10} {u[i]:.1f} {v[i]:.1f} {angle[i]:.2f} 0.000000 1.000000 0.000000 "
        f"{euler[i, 0]:.4f} {euler[i, 1]:.4f} {euler[i, 2]:.4f} {origin[i, 0]:.6f} {origin[i, 1]:.6f} 1 "
        f"{0.9 + norm[i]:.6f} {1e4 + likely[i]:.6f} {most[i]:.6f} {1 + int(number[i])} {1 + i % 100} {half + 1}"
        for i in range(count)
    ]


def _images(
    rotation: np.ndarray, origin: np.ndarray, table: np.ndarray, box: int, rng: np.random.Generator
) -> np.ndarray:
    """CTF x projections of the blobs + noise, (count, box, box) float32, background near mean 0; origin in pixels."""
    scale = box / BLOB_BOX
    axis = np.arange(box) - box // 2
    place = np.einsum("nij,kj->nki", rotation, BLOBS[:, :3] * scale)[..., :2] - origin[:, None]
    images = np.zeros((len(rotation), box, box))
    for k, (sigma, height) in enumerate(zip(BLOBS[:, 3] * scale, BLOBS[:, 4], strict=True)):
        x, y = (np.exp(-((axis - place[:, k, i, None]) ** 2) / (2 * sigma**2)) for i in (0, 1))
        images += height * y[:, :, None] * x[:, None, :]
    f = torch.fft.fftfreq(box, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(f, f, indexing="xy"), -1).reshape(-1, 2)
    transfer = ctf(grid, CtfParams.from_table(torch.from_numpy(table))).reshape(-1, box, box)
    seen = torch.fft.ifft2(torch.fft.fft2(torch.from_numpy(images)) * transfer).real.numpy()
    return (seen + NOISE * seen.std() * rng.standard_normal(seen.shape)).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--particles", type=int, default=1_000_000)
    parser.add_argument("--stacks", type=int, default=2000)
    parser.add_argument("--box", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(make_set(given.folder, given.particles, given.stacks, given.box, given.seed))


if __name__ == "__main__":
    main()
