"""Speed of the map network: crops per second, and what window attention and filter-response norm add.

    python tests/benchmarks/lvm_speed.py [--size default] [--batch 1] [--device cpu] [--dtype bf16] [--train]

One network is timed whole, without attention (its norm, products, scores and the windows; the mlp stays), without the
filter-response norms, and without both. "overhead" is the time of the whole over that without both, less 1. The least
time of several rounds counts: CPU seconds on a CPU, wall seconds between synchronisations on an accelerator.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from common import save
from torch import Tensor

from cryosuite.nets.scunet import SPECS, Scunet, flops
from cryosuite.nets.scunet_blocks import FilterResponseNorm, Transformer

EDGE = 48


def least(work: Callable[[], object], rounds: int, device: str) -> float:
    """Seconds of the fastest of several calls, after two that warm up."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    wait = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    spent = []
    for _ in range(rounds + 2):
        wait()
        began = clock()
        work()
        wait()
        spent.append(clock() - began)
    return min(spent[2:])


def _mlp_only(self: Transformer, x: Tensor, visible: object = None) -> Tensor:
    return x + self.wide(x)


@contextmanager
def without(attention: bool, norm: bool) -> Iterator[None]:
    """Inside the block networks skip attention, or the filter-response norms, or both."""
    kept = Transformer.forward, FilterResponseNorm.forward
    if attention:
        Transformer.forward = _mlp_only
    if norm:
        FilterResponseNorm.forward = lambda self, x, visible=None: x
    try:
        yield
    finally:
        Transformer.forward, FilterResponseNorm.forward = kept


def measure(size: str, batch: int, device: str, dtype: torch.dtype, rounds: int, train: bool) -> dict:
    """Seconds per crop of the four variants, and what follows from them."""
    torch.manual_seed(0)
    spec = SPECS[size]
    model = Scunet(spec).to(device).train(train)
    x = torch.rand(batch, 1, EDGE, EDGE, EDGE, device=device)

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32), torch.set_grad_enabled(train):
            loss = model(x).float().square().mean()
        if train:
            loss.backward()

    seconds = {}
    for name, options in {
        "whole": (False, False), "no attention": (True, False), "no norm": (False, True), "neither": (True, True),
    }.items():  # fmt: skip
        with without(*options):
            seconds[name] = least(step, rounds, device) / batch
    whole, bare = seconds["whole"], seconds["neither"]
    products = sum(flops(spec, EDGE)) * (3 if train else 1)
    result = {
        "size": size, "batch": batch, "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "dtype": str(dtype).removeprefix("torch."), "train": train,
        "ms_per_crop": {name: round(1e3 * value, 3) for name, value in seconds.items()},
        "crops_per_s": round(1 / whole, 2), "gflop_per_s": round(products / whole / 1e9, 1),
        "overhead": round(whole / bare - 1, 3),
        "attention": round((whole - seconds["no attention"]) / bare, 3),
        "norm": round((whole - seconds["no norm"]) / bare, 3),
    }  # fmt: skip
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return result


def main() -> None:
    """Measure as asked; with ``--save`` write results/lvm_speed.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="default", choices=list(SPECS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--train", action="store_true", help="forward and backward instead of forward")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for batch in arguments.batch:
        for name in arguments.dtype:
            dtype = torch.bfloat16 if name == "bf16" else torch.float32
            common = (arguments.size, batch, arguments.device, dtype, arguments.rounds, arguments.train)
            rows.append(measure(*common))
            print(rows[-1], flush=True)
    if arguments.save:
        save("lvm_speed", {"edge": EDGE, "rows": rows})


if __name__ == "__main__":
    main()
