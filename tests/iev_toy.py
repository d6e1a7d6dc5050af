"""A small momentum-contrast model, also run as one of two processes by the tests: python iev_toy.py RANK WORLD DIR."""

from __future__ import annotations

import sys

import torch

from cryosuite.nets.ief import IefEncoder, IefSpec
from cryosuite.nets.moco import MoCo

SPEC = IefSpec("toy", dim=16, depth=2, heads=2, patch=4, image_size=16, norm2="bn")


def toy(seed: int = 0) -> MoCo:
    """The model in float64; its encoder has batch norms."""
    torch.manual_seed(seed)
    return MoCo(IefEncoder(SPEC), SPEC.dim, hidden=24, out=8, tau=0.3).double()


def views(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views of each image."""
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(count, 1, 16, 16, generator=generator, dtype=torch.float64)
    return first, first + 0.3 * torch.randn(first.shape, generator=generator, dtype=torch.float64)


def two_steps(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Two steps of gradient descent on this process's rows; loss, gradients and state afterwards."""
    model, (first, second) = toy(), views()
    mine = slice(rank, None, world)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    out: dict[str, torch.Tensor] = {}
    for step in range(2):
        model.follow(0.9)
        loss, _ = model(first[mine], second[mine])
        model.zero_grad()
        loss.backward()
        loss = loss.detach().clone()
        for value in [loss, *(p.grad for p in parameters.values())]:
            if world > 1:
                torch.distributed.all_reduce(value)
            value /= world
        out[f"loss{step}"] = loss
        out |= {f"grad{step} {name}": p.grad.clone() for name, p in parameters.items()}
        with torch.no_grad():
            for p in parameters.values():
                p -= 0.1 * p.grad
    return out | {f"state {name}": value for name, value in model.state_dict().items()}


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(two_steps(rank, world), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()
