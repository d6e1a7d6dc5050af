"""Speed of CryoDECO's decoder on this machine's processor: ours against the network as the paper writes it.

    python tests/benchmarks/deco_decoder_speed.py

Plain: Hartley value at every point of the disc but the origin (both of each Friedel pair), phases as sums over (points,
m, 3) products, latent concatenated to the features of every point, torch's layers. Ours: the complex value on the half
disc. Same weights sizes (3 x 256, z = 128, 192 frequencies), one thread, alternating runs, CPU seconds of the process,
the best of each. The two evaluations are also checked against each other with the same (Hartley) weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from common import save
from torch import Tensor

from cryosuite.kernels.fourier import half_disc
from cryosuite.kernels.rotations import random_rotations
from cryosuite.nets.deco_field import DecoField

ZDIM = 128


def plain(field: DecoField, q: Tensor, z: Tensor) -> Tensor:
    """The published order of operations on our weights: (b, P, 3), (b, zdim) -> (b, P, 1)."""
    angle = (q[..., None, :] * field.features.frequencies.T).sum(-1)
    h = torch.cat([angle.sin(), angle.cos(), z[:, None].expand(-1, q.shape[1], -1)], dim=-1)
    for number, (layer, norm) in enumerate(zip([field.first, *field.hidden], field.norms, strict=True)):
        y = norm(layer(h))
        h = torch.relu(y + h if number else y)
    return field.last(h)


def step(run: Callable[[Tensor, Tensor], Tensor], q: Tensor, z: Tensor) -> None:
    """Forward and backward pass to weights, points and latents."""
    run(q.detach().requires_grad_(), z.detach().requires_grad_()).square().mean().backward()


def race(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least CPU seconds of each of several functions, called in turn."""
    best = {}
    for number in range(rounds + 1):
        for name, run in runs.items():
            began = time.process_time()
            run()
            spent = time.process_time() - began
            if number:  # the first round compiles
                best[name] = min(spent, best.get(name, spent))
    return best


def measure(box_size: int, images: int, rounds: int) -> dict:
    """Times, ratios and agreement at one box size."""
    torch.manual_seed(0)
    half = half_disc(box_size).frequency @ random_rotations(images)[:, :2]
    whole = torch.cat([half, -half], dim=1)
    z = torch.randn(images, ZDIM)
    published = DecoField(ZDIM, field="hartley", box_size=box_size)
    ours = DecoField(ZDIM, box_size=box_size)
    with torch.no_grad():
        difference = float((published.network(whole, z) - plain(published, whole, z)).abs().max())
        base = ours.base_features(half[0])
        seconds = race({
            "plain": lambda: plain(published, whole, z),
            "plain, half disc": lambda: plain(published, half, z),
            "ours": lambda: ours(half, z),
            "ours, points shared by the images": lambda: ours.from_features(base, z),
        }, rounds)  # fmt: skip
    seconds |= race({
        "plain, with gradients": lambda: step(lambda q, z: plain(published, q, z), whole, z),
        "ours, with gradients": lambda: step(ours, half, z),
    }, rounds)  # fmt: skip
    result = {
        "box_size": box_size, "images": images, "points_of_the_disc": whole.shape[1],
        "cpu_s": {name: round(value, 4) for name, value in seconds.items()},
        "images_per_s": {name: round(images / value, 1) for name, value in seconds.items()},
        "times_plain": round(seconds["plain"] / seconds["ours"], 2),
        "times_plain_shared_points": round(seconds["plain"] / seconds["ours, points shared by the images"], 2),
        "times_plain_with_gradients": round(seconds["plain, with gradients"] / seconds["ours, with gradients"], 2),
        "difference_on_the_same_weights": difference,
    }  # fmt: skip
    print(result)
    return result


def main() -> None:
    """Measure at D = 64 and 128 and write results/deco_decoder_speed.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = [measure(64, 8, rounds), measure(128, 2, rounds)]
    save("deco_decoder_speed", {"seed": 0, "threads": 1, "rounds": rounds, "results": rows})


if __name__ == "__main__":
    main()
