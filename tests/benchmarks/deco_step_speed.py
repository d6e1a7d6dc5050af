"""Images per second of deco-classify's refinement stage, against a plain PyTorch step of the same networks.

    python tests/benchmarks/deco_step_speed.py

A step is: encoder, latent, decoder at the poses of the table, loss, gradients to encoder, decoder and table, AdamW.
Ours is that of `methods.deco` at full radius (half disc, complex value, whitened by the noise), in float32 and in what
deco-classify takes on this processor; marching through the radii, as a training does, is faster still and not counted.
Plain: the decoder as the paper writes it (deco_decoder_speed.py) at every point of the disc but the origin, float32,
the same encoder and table, images made Hartley values by torch.fft. One thread, in turn, the least CPU seconds.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from common import save
from deco_decoder_speed import plain, race
from torch import Tensor

from cryosuite.data.loader import BatchLoader
from cryosuite.data.particles import ParticleSet
from cryosuite.kernels import fourier
from cryosuite.kernels.ctf import ctf
from cryosuite.methods.deco import Deco
from cryosuite.methods.deco_model import DecoModel
from cryosuite.methods.deco_options import preset
from cryosuite.nets.deco_field import DecoField
from cryosuite.training.inference import autocast
from cryosuite.training.launch import fast_bf16
from cryosuite.training.method import Step

PIXEL = 4.0


def particles(count: int, box_size: int) -> ParticleSet:
    """Noise: speed does not depend on what the images show."""
    rng = np.random.default_rng(0)
    table = np.tile(np.array([box_size, PIXEL, 15000, 14500, 30, 300, 2.7, 0.1, 0], np.float32), (count, 1))
    rotation = np.linalg.qr(rng.standard_normal((count, 3, 3)))[0]
    rotation *= np.linalg.det(rotation)[:, None, None]
    images = rng.standard_normal((count, box_size, box_size)).astype(np.float32)
    shift = np.zeros((count, 2), np.float32)
    return ParticleSet.from_array(images, PIXEL, rotation=rotation.astype(np.float32), shift=shift, ctf=table)


def plain_step(model: DecoModel, field: DecoField, images: Tensor, seen: Tensor, batch) -> Tensor:
    """The loss as published: mean squared error of Hartley values over the whole disc."""
    disc = fourier.half_disc(model.box_size)
    k = torch.cat([disc.frequency, -disc.frequency])
    z = model.latent(model.features(seen))
    rotation, shift = model.table(batch.index)
    values = plain(field, k @ rotation[:, :2], z)[..., 0]
    spectrum = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(images, dim=(-1, -2))), dim=(-1, -2))
    hartley = spectrum.real - spectrum.imag
    at = (torch.cat([disc.xy, -disc.xy]) + model.box_size // 2).long() % model.box_size
    data = hartley[:, at[:, 1], at[:, 0]]
    angle = 2 * torch.pi * (k @ (shift * model.box_size).T).T
    flipped = hartley[:, (model.box_size - at[:, 1]) % model.box_size, (model.box_size - at[:, 0]) % model.box_size]
    data = data * angle.cos() + flipped * angle.sin()  # the images moved by the table's shifts
    transfer = ctf(k / PIXEL, batch.ctf)
    return (data - transfer * values).square().mean()


def measure(box_size: int, images: int, name: str, rounds: int) -> dict:
    """Rates of one preset at one box size."""
    torch.manual_seed(0)
    _, chosen = preset(name, False, encoder="random", encoder_size="micro" if name == "small" else "vit_tiny")
    options = chosen.options.changed(refine_poses=True, encoder_input="raw", hold_poses=0.0)
    known = particles(images, box_size)
    method = Deco(options, epochs=1)
    model = method.build(known).train()
    batch = next(iter(BatchLoader(known, images, shuffle=False).epoch(0)))
    last = Step(99, 100)
    published = DecoField(
        options.zdim,
        options.width,
        options.layers,
        options.n_frequencies,
        options.feat_sigma,
        True,
        "hartley",
        box_size,
    )
    groups = method.parameter_groups(model)
    ours = torch.optim.AdamW([{"params": group["params"]} for group in groups], 1e-4)
    theirs = torch.optim.AdamW([*(p for group in groups for p in group["params"]), *published.parameters()], 1e-4)
    seen = method.cache.batch(batch.index)

    def run_ours(precision: str) -> None:
        ours.zero_grad(set_to_none=True)
        with autocast(torch.device("cpu"), precision):
            loss = method.loss(model, batch, last)["loss"]
        loss.backward()
        ours.step()

    def run_plain() -> None:
        theirs.zero_grad(set_to_none=True)
        plain_step(model, published, batch.images, seen, batch).backward()
        theirs.step()

    default = "bf16" if fast_bf16() else "32"
    seconds = race({
        "plain": run_plain, "ours, float32": lambda: run_ours("32"), f"ours, {default}": lambda: run_ours(default),
    }, rounds)  # fmt: skip
    result = {
        "preset": name, "box_size": box_size, "images": images,
        "images_per_s": {key: round(images / value, 1) for key, value in seconds.items()},
        "times_plain": {key: round(seconds["plain"] / value, 2) for key, value in seconds.items() if key != "plain"},
    }  # fmt: skip
    print(result)
    return result


def main() -> None:
    """Measure both presets at D = 64 and write results/deco_step_speed.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = [measure(64, 16, "small", rounds), measure(64, 16, "default", rounds)]
    save("deco_step_speed", {"seed": 0, "threads": 1, "rounds": rounds, "results": rows})


if __name__ == "__main__":
    main()
