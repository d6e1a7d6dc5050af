"""Images per second of train-hype against the same architecture evaluated the way it was published.

    python tests/benchmarks/hype_published_way.py [--sizes small-32 small-64 paper-64] [--rounds 5]

One training step (forward, backward, AdamW) on one thread. The published way: one Hartley value at every point of the
whole disc, the bias as an extra row of every matrix and an extra column of ones on every activation, columns
normalised by plain arithmetic, float32, all frequencies from the first step on. Ours is taken apart: each row of the
table adds one change to the row above, so that it is seen what gives what. Rounds alternate between the variants and
the least CPU time of each counts, because the machine's noise only ever adds. "over a run" is the mean over the
frequencies of a whole training, as frequency marching makes the early steps cheaper.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from common import save
from torch import Tensor

from cryosuite.data.loader import Batch
from cryosuite.kernels import fourier, rotations
from cryosuite.kernels.ctf import CtfParams
from cryosuite.methods.hype import Hype
from cryosuite.methods.hype_model import HypeModel, Spectra
from cryosuite.methods.hype_options import PRESETS
from cryosuite.training.launch import fast_bf16, tune_process
from cryosuite.training.method import Step

FRACTIONS = (0.05, 0.15, 0.25, 0.35, 0.5, 0.7, 0.9)  # of the training; the schedule is flat after 0.4
SHARES = (0.1, 0.1, 0.1, 0.1, 0.2, 0.25, 0.15)  # how much of it each of them stands for


@dataclass(frozen=True)
class Size:
    """A model and a batch."""

    preset: str
    box: int
    batch: int
    changes: dict


SIZES = {
    "small-32": Size("small", 32, 64, {}),
    "small-64": Size("small", 64, 32, {}),
    "paper-32": Size("default", 32, 4, {}),
    "paper-64": Size("default", 64, 2, {}),
}


def random_batch(box: int, size: int) -> Batch:
    """Noise images with poses and a CTF."""
    table = torch.zeros(size, 9)
    table[:, 0], table[:, 1], table[:, 2], table[:, 3] = box, 320 / box, 15000, 14500
    table[:, 5], table[:, 6], table[:, 7] = 300, 2.7, 0.1
    rotation = rotations.random_rotations(size, dtype=torch.float32)
    group = torch.zeros(size, dtype=torch.int64)
    images, shift = torch.randn(size, box, box), torch.zeros(size, 2)
    return Batch(torch.arange(size), images, rotation, shift, CtfParams.from_table(table), group)


def published_mlp(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """The network with the bias as last row of each matrix: cat([x, 1]) W for every layer."""
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        column = bias[None, :, None].expand(len(weight), -1, 1)
        full = torch.cat([weight, column], dim=-1).transpose(1, 2)  # (b, fan_in + 1, fan_out)
        out = torch.bmm(torch.cat([x, torch.ones_like(x[..., :1])], dim=-1), full)
        if layer == len(weights) - 1:
            return out
        x = torch.relu(out + x if layer else out)
    return x


def published_weights(model: HypeModel, tokens: Tensor) -> list[Tensor]:
    """Modulated, normalised matrices by plain arithmetic: base times scale, divided by the norm of each column."""
    weights = []
    parts = tokens.split(model.layer_tokens, dim=1)
    for base, head, part in zip(model.hyper.bases, model.hyper.heads, parts, strict=True):
        scale = head(part)
        fan_out, fan_in = base.weight.shape
        weight = (base.weight.view(1, -1, scale.shape[1], fan_in) * scale[:, None]).view(-1, fan_out, fan_in)
        weights.append(weight / weight.norm(dim=-1, keepdim=True))
    return weights


def published_loss(model: HypeModel, batch: Batch) -> Tensor:
    """Mean squared error over the whole disc of one Hartley value per point."""
    target, image = model.prepare(batch)
    disc = fourier.half_disc(model.box_size)
    weights = published_weights(model, model.tokens(image, batch))
    whole = torch.cat([disc.frequency, -disc.frequency])
    coordinates = torch.cat([whole, torch.zeros(len(whole), 1)], dim=1) @ batch.rotation
    phase = coordinates @ model.field.features.frequencies
    features = torch.cat([phase.sin(), phase.cos()], dim=-1)
    value = published_mlp(features, weights, [base.bias for base in model.hyper.bases])[..., 0]
    data = torch.cat([target.values.real - target.values.imag, target.values.real + target.values.imag], dim=1)
    return (value * torch.cat([target.ctf, target.ctf], dim=1) - data).square().mean()


class Variant:
    """A way to compute one step; ``run`` gives its CPU seconds at a fraction of the training."""

    def __init__(self, name: str, size: Size, *, published: bool = False, plain: bool = False, bf16: bool = False,
                 **changes: object) -> None:  # fmt: skip
        torch.manual_seed(0)
        options = replace(PRESETS[size.preset].options, **size.changes, **changes)
        spectra = Spectra(torch.ones(1, size.box // 2 + 1), torch.ones(size.box // 2 + 1))
        self.name, self.bf16, self.plain, self.method = name, bf16, plain, Hype(options)
        self.model = HypeModel(size.box, options, spectra)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=not published)
        self.batch = random_batch(size.box, size.batch)
        self.loss: Callable[[float], Tensor] = lambda fraction: self.method.loss(
            self.model, self.batch, Step(round(1000 * fraction), 1000)
        )["loss"]
        if published:
            self.loss = lambda fraction: published_loss(self.model, self.batch)

    def run(self, fraction: float) -> float:
        """CPU seconds of one step."""
        from cryosuite.nets import hypernet, inr

        kept = inr.mlp, hypernet.modulate
        if self.plain:  # ours, but layers and norms computed the published way
            inr.mlp, hypernet.modulate = published_mlp, plain_modulate
        began = time.process_time()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            loss = self.loss(fraction)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        spent = time.process_time() - began
        inr.mlp, hypernet.modulate = kept
        return spent


def plain_modulate(base: Tensor, scale: Tensor) -> Tensor:
    """``hypernet.modulate`` by plain arithmetic."""
    weight = (base.view(1, -1, scale.shape[1], base.shape[1]) * scale[:, None]).view(len(scale), *base.shape)
    return weight / weight.norm(dim=-1, keepdim=True)


def measure(name: str, rounds: int) -> list[dict]:
    """Images per second of every variant of one size."""
    size = SIZES[name]
    whole = {"reading": "whole", "other_views": 0.0}  # images read once, as published
    full = {"march_from": 1.0, **whole}
    bf16 = fast_bf16()
    variants = [
        Variant(
            "published way (whole disc, Hartley, cat bias, float32)", size, published=True, field="hartley", **full
        ),
        Variant("half disc, complex value", size, plain=True, **full),
        Variant("one baddbmm per layer, fused modulation", size, **full),
    ]
    if bf16:
        variants.append(Variant("bfloat16 products", size, bf16=True, **full))
    sampled = {"sample_coefficients": True, **whole}
    over_a_run = [
        Variant("frequency marching, over a run (the default)", size, bf16=bf16, **whole),
        Variant("--sample-coefficients, over a run", size, bf16=bf16, **sampled),
        Variant("without it, images read as two halves", size, bf16=bf16, reading="halves"),
    ]
    seconds: dict[str, list[float]] = {}
    for number in range(rounds + 1):  # the first round warms up
        for variant in variants:
            spent = variant.run(0.9)
            if number:
                seconds.setdefault(variant.name, []).append(spent)
    rows = [{"variant": variant.name, "seconds": min(seconds[variant.name])} for variant in variants]
    for variant in over_a_run:
        times = [min(variant.run(fraction) for _ in range(max(2, rounds))) for fraction in FRACTIONS]
        rows.append({"variant": variant.name, "seconds": sum(t * w for t, w in zip(times, SHARES, strict=True))})
    for row in rows:
        row["images_per_s"] = round(size.batch / row["seconds"], 2)
        row["ratio"] = round(rows[0]["seconds"] / row["seconds"], 2)
        row["seconds"] = round(row["seconds"], 5)
    return rows


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small-32", "small-64"])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tune_process()
    assert math.isclose(sum(SHARES), 1)
    result = {}
    for name in arguments.sizes:
        result[name] = measure(name, arguments.rounds)
        print(name)
        for row in result[name]:
            print(f"  {row['variant']:58s} {row['images_per_s']:9.2f} images/s   x{row['ratio']:.2f}")
    save("hype_published_way", {"seed": 0, "threads": 1, "bf16": fast_bf16(), "sizes": result})


if __name__ == "__main__":
    main()
