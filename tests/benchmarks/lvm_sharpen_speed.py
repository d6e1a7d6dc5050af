"""Speed and memory of lvm-sharpen: a 300^3 map at 1 A per voxel beside the published way of tiling; 400^3.

    python tests/benchmarks/lvm_sharpen_speed.py [--size 300] [--net default] [--kda 500] [--device cpu]
    python tests/benchmarks/lvm_sharpen_speed.py --memory 400

The published way (EMReady's network and stride): d = 32 with two blocks per stage, boxes of 48 voxels 12 apart, that is
ceil(N / 12)^3 of them, none left out. The whole would take hours on two cores, so it is NOT run: a sample of its boxes
is timed, the least of several, and scaled by their number, in float32 (as published) and in bf16 (as ours). Ours is run
whole, from the array to the array, on a phantom in noise. CPU: seconds of CPU time, since the machine may be shared
(both sides scale alike with cores). "memory": largest resident set of the whole command in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import save

from cryosuite.data.map_grid import MapGrid
from cryosuite.data.map_weights import MapWeights, save_map_weights
from cryosuite.formats.mrc import Map, write_map
from cryosuite.kernels.density import molmap
from cryosuite.methods.lvm_sharpen import EDGE, EnhanceOptions, enhance
from cryosuite.nets.scunet import SPECS, Scunet
from cryosuite.simulate.phantoms import make_phantom
from cryosuite.training.launch import fast_bf16

RESOLUTION, NOISE = 4.0, 0.05
PEER, PEER_STRIDE = "large", 12
LIMIT_GIB = 4.0
WATCHED = """
from cryosuite.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""  # the command, then its largest resident set in KiB


def phantom_map(size: int, kda: float, seed: int = 0) -> MapGrid:
    """A procedural protein of a mass in the middle of a box of ``size`` A, 1 A per voxel, in white noise."""
    phantom = make_phantom(np.random.default_rng(seed), 1e3 * kda, symmetry=2)
    points = torch.from_numpy(phantom.xyz).float() + size / 2
    number = torch.from_numpy(phantom.atomic_number).float()
    data = molmap(points, number, (size,) * 3, (0.0,) * 3, 1.0, 0.225 * RESOLUTION)
    generator = torch.Generator().manual_seed(seed)
    data += NOISE * data.max() * torch.randn(data.shape, generator=generator)
    array = data.numpy()
    return MapGrid(array, (1.0,) * 3, (0.0,) * 3, Map(array, 1.0, path=Path("phantom.mrc")))


def clock(device: str) -> Callable[[], float]:
    """Seconds: of the processor, or of the wall behind a GPU."""
    if device == "cpu":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


def peer_seconds(device: str, bf16: bool, rounds: int = 4) -> float:
    """Seconds per box of the published way's network, the least of several."""
    net, now = Scunet(SPECS[PEER]).eval().to(device), clock(device)
    batch = 1 if device == "cpu" else 8
    crops = torch.rand(batch, 1, EDGE, EDGE, EDGE, device=device)
    cast = torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext()
    spent = []
    with torch.inference_mode(), cast:
        for _ in range(rounds + 1):
            began = now()
            net(crops)
            spent.append((now() - began) / batch)
    return min(spent[1:])


def speed(size: int, net: str, kda: float, device: str, stride: int) -> dict:
    """Ours whole, the published way by its sample."""
    grid = phantom_map(size, kda)
    weights = MapWeights(Scunet(SPECS[net]).eval(), "sharpen", 1.0, "robust", {}, "matched")
    now, wall = clock(device), time.perf_counter()
    began = now()
    found = enhance(grid, weights, EnhanceOptions(stride=stride), device)
    ours, wall = now() - began, time.perf_counter() - wall
    boxes = math.ceil(size / PEER_STRIDE) ** 3
    per_box = {name: peer_seconds(device, bf16) for name, bf16 in (("float32", False), ("bf16", True))}
    whole = {name: seconds * boxes for name, seconds in per_box.items()}
    return {
        "size": size, "net": net, "kda": kda, "device": device, "stride": stride, "threads": torch.get_num_threads(),
        "fast_bf16": fast_bf16(), "tiles": found.tiles, "tiles_run": found.run, "seconds": ours, "wall_seconds": wall,
        "seconds_per_tile": ours / found.run, "peer_boxes": boxes, "peer_seconds_per_box": per_box,
        "peer_seconds_scaled": whole, "ratio": {name: seconds / ours for name, seconds in whole.items()},
        "ratio_without_skipping": {name: s / (ours / found.run * found.tiles) for name, s in whole.items()},
    }  # fmt: skip


def memory(size: int, net: str, kda: float) -> dict:
    """Largest resident set of `cryosuite lvm-sharpen` on a map of this size, with and without further outputs."""
    out = {"size": size, "net": net, "limit_GiB": LIMIT_GIB}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_map(folder / "map.mrc", phantom_map(size, kda).data, 1.0)
        network = Scunet(SPECS[net])
        save_map_weights(
            folder / "w.safetensors", network, task="sharpen", voxel=1.0, norm="robust", spectrum="matched"
        )
        more = ["--tta", "2", "--uncertainty", str(folder / "std.mrc"), "--local-cc", str(folder / "cc.mrc")]
        for title, extra in (("plain", []), ("with uncertainty and local correlation", more)):
            command = ["lvm-sharpen", str(folder / "map.mrc"), "-o", str(folder / "out.mrc"), *extra]
            command += ["--weights", str(folder / "w.safetensors"), "--threads", "1", "--accelerator", "cpu"]
            done = subprocess.run([sys.executable, "-c", WATCHED, *command], capture_output=True, text=True, check=True)
            out[title] = {"peak_GiB": int(done.stdout.split()[-1]) / 2**20}
    out["within_limit"] = out["plain"]["peak_GiB"] < LIMIT_GIB
    return out


def main() -> None:
    """Run what is asked for and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=300)
    parser.add_argument("--net", choices=sorted(SPECS), default="default")
    parser.add_argument("--kda", type=float, default=1000.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stride", type=int, default=24)
    parser.add_argument("--memory", type=int, metavar="SIZE")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.memory:
        found, name = memory(options.memory, options.net, options.kda), f"lvm_sharpen_memory_{options.memory}"
    else:
        found = speed(options.size, options.net, options.kda, options.device, options.stride)
        name = f"lvm_sharpen_speed_{options.device}_{options.net}_{options.size}"
    print(json.dumps(found, indent=1))
    save(name, {"seed": 0, **found})


if __name__ == "__main__":
    main()
