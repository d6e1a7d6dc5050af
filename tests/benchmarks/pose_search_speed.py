"""Pose search against known volumes: speed and error beside the published search, on the same images in one run.

    python tests/benchmarks/pose_search_speed.py [--only golden,atoms] [--seeds 0,1,2] [--images 200] [--snr 0.1]

"golden": the 64 images of shared/golden/pose_search (D = 64, SNR 0.1, by RELION) and 16 without noise. "atoms": images
projected from Gaussian atoms in real space (another projector than the search's), phantoms of 300 kDa, D = 64, pixels
of 3.2 A or more so that the phantom fits, astigmatic CTF, shifts of 2 px standard deviation. Both searches have the
same volume, images and grid (radius 12 to 32, 4 levels, base order 2, 14 x 14 shifts, 8 kept). CPU seconds on one
thread; both include the transform of the volume.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import save
from pose_search_published import Published, symmetric_hartley
from torch import Tensor

from cryosuite.kernels import fourier
from cryosuite.kernels.ctf import CtfParams, ctf
from cryosuite.kernels.pose_search import SearchOptions, VolumeSource, prepare, search
from cryosuite.kernels.rotations import geodesic_deg, random_rotations
from cryosuite.simulate.images import Optics, Renderer
from cryosuite.simulate.phantoms import make_phantom
from cryosuite.simulate.states import State
from cryosuite.simulate.truth import state_map

BOX, PIXEL, EXTENT = 64, 3.2, 5.0
BATCH = 64
FILL = 0.42  # of the box: largest radius of a phantom


@dataclass
class Case:
    """Images of a known volume with their truth; `noise_sd` per pixel."""

    name: str
    volume: Tensor  # (D, D, D)
    images: Tensor  # (n, D, D)
    params: CtfParams
    rotation: Tensor  # (n, 3, 3)
    shift: Tensor  # (n, 2) px
    noise_sd: float


def golden_cases() -> list[Case]:
    """The fixture with and without noise."""
    import mrcfile
    import starfile

    folder = Path(os.environ.get("CRYOSUITE_SHARED", "../shared")) / "golden" / "pose_search"
    peer = np.load(folder / "peer_result.npz")
    table = starfile.read(folder / "particles.star")
    rows, optics = table["particles"], table["optics"].iloc[0]
    columns = [np.full(len(rows), BOX), np.full(len(rows), PIXEL)]
    columns += [rows.rlnDefocusU, rows.rlnDefocusV, rows.rlnDefocusAngle]
    fixed = (optics.rlnVoltage, optics.rlnSphericalAberration, optics.rlnAmplitudeContrast, 0.0)
    columns += [np.full(len(rows), value) for value in fixed]
    params = CtfParams.from_table(torch.from_numpy(np.stack([np.asarray(c, np.float64) for c in columns], 1)))
    volume = torch.from_numpy(mrcfile.read(folder / "volume.mrc").astype(np.float32))
    truth = [torch.from_numpy(peer[name]).float() for name in ("R_true", "t_true_px")]
    sd = json.loads((folder / "result.json").read_text())["noise_sd"]
    noisy = torch.from_numpy(mrcfile.read(folder / "images.mrcs").astype(np.float32))
    clean = torch.from_numpy(peer["clean_first"].astype(np.float32))
    few = [t[: len(clean)] for t in truth]
    return [
        Case("golden noisy", volume, noisy, params, *truth, sd),
        Case("golden clean", volume, clean, params.rows(slice(len(clean))), *few, sd),
    ]


def atoms_case(seed: int, count: int, snr: float) -> Case:
    """Projections of a phantom's Gaussian atoms, made in real space at twice the box and cropped; white noise."""
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    phantom = make_phantom(rng, 3e5)
    radius = float(np.linalg.norm(phantom.xyz, axis=1).max())
    pixel = max(PIXEL, radius / (FILL * BOX))  # a particle that leaves the box would come in from the other side
    optics = Optics(BOX, pixel, 2 * BOX, resolution=2.5 * pixel)
    state = State("phantom", phantom.xyz, phantom.atomic_number)
    renderer = Renderer([state], optics)
    rotation = random_rotations(count, generator)
    shift = (torch.randn(count, 2, generator=generator) * 2).clamp(-4, 4)
    mean, half = 12000 + 8000 * torch.rand(count, generator=generator), 200 * torch.rand(count, generator=generator)
    angle = 180 * torch.rand(count, generator=generator)
    full = [torch.full((count,), value) for value in (300.0, 2.7, 0.1, 0.0, pixel)]
    params = CtfParams(mean + half, mean - half, angle, *full)
    images = []
    for start in range(0, count, 50):
        part = slice(start, start + 50)
        spectra = renderer.spectra(
            torch.zeros(len(rotation[part]), dtype=torch.int64), rotation[part], shift[part] / BOX
        )
        images.append(renderer.to_images(spectra * renderer.contrast(params.rows(part))))
    clean = torch.cat(images)
    sd = float((clean.var((1, 2)).mean() / snr).sqrt())
    noise = torch.randn(clean.shape, generator=generator) * sd
    volume = torch.from_numpy(state_map(state, optics))
    return Case(f"atoms seed {seed} SNR {snr:g}", volume, clean + noise, params, rotation, shift, sd)


def errors(case: Case, rotation: Tensor, shift: Tensor, seconds: float) -> dict[str, float]:
    """Angles and shifts against the truth, no alignment: the volume is given."""
    count = len(rotation)
    angle = geodesic_deg(rotation, case.rotation[:count])
    moved = (shift - case.shift[:count]).norm(dim=1)
    return {
        "images": count,
        "ms_per_image": round(1e3 * seconds / count, 3),
        "images_per_s": round(count / seconds, 1),
        "median_deg": round(float(angle.median()), 3),
        "mean_deg": round(float(angle.mean()), 3),
        "below_2_deg": round(float((angle < 2).float().mean()), 4),
        "below_5_deg": round(float((angle < 5).float().mean()), 4),
        "median_shift_px": round(float(moved.median()), 4),
    }


def run_ours(case: Case, options: SearchOptions, rounds: int = 3) -> dict[str, float]:
    """The search of cryosuite, base slices included; the least CPU time of several rounds."""
    disc = fourier.half_disc(BOX, options.r_max)
    sigma = case.noise_sd * BOX
    target = fourier.to_half_disc(case.images, disc) / sigma
    transfer = ctf(disc.frequency, case.params).float() / sigma
    index = torch.zeros(len(target), dtype=torch.int64)
    spent, parts = [], []
    for _ in range(rounds + 1):
        began = time.process_time()
        source = VolumeSource(case.volume, r_max=options.r_max)
        ready = prepare(source, options)
        parts = [
            search(source, target[i : i + BATCH], transfer[i : i + BATCH], index[i : i + BATCH], options, None, ready)
            for i in range(0, len(target), BATCH)
        ]
        spent.append(time.process_time() - began)
    rotation = torch.cat([p.rotation[:, 0] for p in parts])
    shift = torch.cat([p.shift[:, 0] for p in parts])
    return errors(case, rotation, shift, min(spent[1:]))


def run_published(case: Case) -> dict[str, float]:
    """The published search on the same images, its volume's transform included."""
    axis = torch.arange(-(BOX // 2), BOX // 2 + 1) / BOX
    ky, kx = torch.meshgrid(axis, axis, indexing="ij")
    transfer = ctf(torch.stack([kx.reshape(-1), ky.reshape(-1)], 1), case.params).float().view(-1, BOX + 1, BOX + 1)
    target = symmetric_hartley(case.images)
    Published(case.volume, extent=EXTENT).search(target[:4], transfer[:4])
    began = time.process_time()
    rotation, shift = Published(case.volume, extent=EXTENT).search(target, transfer)
    return errors(case, rotation, shift, time.process_time() - began)


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="golden,atoms")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--snr", type=float, default=0.1)
    parser.add_argument("--out", default="pose_search_speed", help="name of the result file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    options = SearchOptions(r_min=12, r_max=32, levels=4, keep=8, shift_extent=EXTENT / BOX, shift_grid=14)
    cases = golden_cases() if "golden" in args.only else []
    if "atoms" in args.only:
        cases += [atoms_case(int(seed), args.images, args.snr) for seed in args.seeds.split(",")]
    results = {}
    for case in cases:
        row = {"published": run_published(case), "cryosuite": run_ours(case, options)}
        row["times_faster"] = round(row["published"]["ms_per_image"] / row["cryosuite"]["ms_per_image"], 1)
        results[case.name] = row
        print(case.name, json.dumps(row, indent=1), flush=True)
    save(args.out, {"seed": args.seeds, **results})


if __name__ == "__main__":
    main()
