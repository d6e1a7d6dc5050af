"""A toy method and particle set for the tests of the training loop; also run as a program by those that kill it.

python training_toy.py RUN '{"epochs": 3, ...}' [--resume] [--slow SECONDS] [--nan-at STEP]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cryosuite.data.particles import ParticleSet
from cryosuite.data.workdir import RunDir
from cryosuite.kernels import chance
from cryosuite.training.inference import encode_all
from cryosuite.training.launch import world
from cryosuite.training.loop import FitResult, fit
from cryosuite.training.options import TrainOptions

BOX = 8


def toy_particles(n: int = 100, seed: int = 1) -> ParticleSet:
    """n images of box 8 that mix three patterns."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(n, 3)) @ rng.normal(size=(3, BOX * BOX)) / 2
    images = images.reshape(n, BOX, BOX).astype(np.float32)
    return ParticleSet.from_array(images, pixel_size=2.0, index=np.arange(n) + 1000)


@dataclass(frozen=True)
class ToyOptions:
    """Options of the toy."""

    zdim: int = 3
    noise: float = 0.1


class Toy:
    """A linear autoencoder of the pixels, with noise on the latent so that random states matter."""

    name = "toy"

    def __init__(self, options: ToyOptions = ToyOptions(), slow: float = 0.0, nan_at: int = -1) -> None:
        self.options, self.slow, self.nan_at = options, slow, nan_at
        self.starved = -1  # the process whose memory runs out at step 5

    def build(self, particles: ParticleSet) -> nn.Module:
        """Encoder and decoder."""
        pixels = particles.box_size**2
        return nn.Sequential(nn.Linear(pixels, self.options.zdim), nn.Linear(self.options.zdim, pixels))

    def loss(self, model: nn.Module, batch, step) -> dict[str, torch.Tensor]:
        """Mean squared error of the noisy reconstruction."""
        if self.slow:
            time.sleep(self.slow)
        if step.index == 5 and self.starved == world()[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        flat = batch.images.flatten(1)
        z = model[0](flat)
        if self.options.noise:
            z = z + self.options.noise * chance.randn(*z.shape)
        error = (model[1](z) - flat).square().mean()
        if step.index == self.nan_at:
            error = error * float("nan")
        return {"loss": error, "size": z.square().mean()}

    def encode(self, model: nn.Module, batch) -> torch.Tensor:
        """The latent (b, zdim)."""
        return model[0](batch.images.flatten(1))

    def decode(self, model: nn.Module, z: torch.Tensor) -> torch.Tensor:
        """Something of the right shape (k, D, D, D)."""
        return model[1](z).reshape(-1, 1, BOX, BOX).expand(-1, BOX, -1, -1)


def options(**changed) -> TrainOptions:
    """Short runs on the CPU."""
    values = {"epochs": 3, "batch_size": 16, "lr": 1e-2, "log_every": 5, "accelerator": "cpu", **changed}
    return TrainOptions(**values)


def train(run: Path | str, method: Toy | None = None, n: int = 100, resume: bool | str = False, **changed) -> FitResult:
    """Fit the toy; on_epoch writes the latents and draws random numbers, as real methods do."""
    method = method or Toy()
    particles = toy_particles(n)
    folder = RunDir(Path(run))

    def on_epoch(epoch: int, model: nn.Module) -> None:
        z = encode_all(method, model, particles, 32, progress=False)
        torch.rand(3)
        if torch.distributed.is_initialized() and torch.distributed.get_rank():
            return
        np.save(folder.path / f"z{epoch}.npy", z)

    return fit(method, particles, folder, options(**changed), resume=resume, on_epoch=on_epoch)


def main() -> None:
    """Train in this process and leave with the result's exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("options", type=json.loads)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--nan-at", type=int, default=-1)
    parser.add_argument("--starved", type=int, default=-1)
    parser.add_argument("--noise", type=float, default=0.1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    method = Toy(ToyOptions(noise=arguments.noise), slow=arguments.slow, nan_at=arguments.nan_at)
    method.starved = arguments.starved
    result = train(arguments.run, method, resume=arguments.resume, **arguments.options)
    sys.exit(result.exit_code)


if __name__ == "__main__":
    main()
