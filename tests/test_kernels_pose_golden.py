"""Pose search on the golden images (by RELION, SNR 0.1, astigmatic) against the peer's errors on the same images."""

from __future__ import annotations

import json
from pathlib import Path

import mrcfile
import numpy as np
import starfile
import torch

from cryosuite.kernels import fourier
from cryosuite.kernels.ctf import CtfParams, ctf
from cryosuite.kernels.pose_search import SearchOptions, VolumeSource, search
from cryosuite.kernels.rotations import geodesic_deg

BOX, PIXEL = 64, 3.2


def test_errors_are_the_peers_or_better(golden: Path) -> None:
    folder = golden / "pose_search"
    peer, settings = np.load(folder / "peer_result.npz"), json.loads((folder / "result.json").read_text())
    table = starfile.read(folder / "particles.star")
    rows, optics = table["particles"], table["optics"].iloc[0]
    n = len(rows)
    columns = [np.full(n, BOX), np.full(n, PIXEL), rows.rlnDefocusU, rows.rlnDefocusV, rows.rlnDefocusAngle]
    fixed = (optics.rlnVoltage, optics.rlnSphericalAberration, optics.rlnAmplitudeContrast, 0.0)
    columns += [np.full(n, value) for value in fixed]
    params = CtfParams.from_table(torch.from_numpy(np.stack([np.asarray(c, np.float64) for c in columns], 1)))
    disc, sigma = fourier.half_disc(BOX), settings["noise_sd"] * BOX
    transfer = ctf(disc.frequency, params).float() / sigma
    source = VolumeSource(torch.from_numpy(mrcfile.read(folder / "volume.mrc").astype(np.float32)))
    options = SearchOptions(shift_extent=settings["search"]["t_extent"] / BOX)
    found = {}
    for name, stack in (("noisy", mrcfile.read(folder / "images.mrcs")), ("clean", peer["clean_first"])):
        images = fourier.to_half_disc(torch.from_numpy(stack.astype(np.float32)), disc) / sigma
        index = torch.zeros(len(images), dtype=torch.int64)
        poses = search(source, images, transfer[: len(images)], index, options)
        angle = geodesic_deg(poses.rotation[:, 0], torch.from_numpy(peer["R_true"][: len(images)]).float())
        shift = poses.shift[:, 0] - torch.from_numpy(peer["t_true_px"][: len(images)]).float()
        found[name] = angle, shift.norm(dim=1)
    angle, shift = found["noisy"]
    assert angle.median() <= settings["noisy"]["median_deg"] + 0.1
    assert (angle < 5).float().mean() >= settings["noisy"]["frac_lt5"] - 0.02
    assert shift.median() <= settings["noisy"]["median_shift_err_px"] + 0.02
    assert found["clean"][0].median() <= settings["clean"]["median_deg"] + 0.05
