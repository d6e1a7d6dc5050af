"""Speed of pose prediction on a processor: the simulator's share of a training step, and images per second of nano64.

    python tests/benchmarks/fastar_speed.py --work DIR [--presets micro,nano64] [--images 4096]

simulator: CPU seconds to make a batch over those of making it and taking a step with it (forward, backward, AdamW).
inference: ``fastar-infer --map --refine 0`` as a user runs it, poses on disk included. Its weights are random where the
package has none of a preset: the time does not depend on what a network has learnt.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from common import save
from fastar import Case, infer

from cryosuite.data.multiview_weights import save_multiview
from cryosuite.data.workdir import RunDir, WorkDir
from cryosuite.methods.fastar import Fastar
from cryosuite.methods.fastar_options import FastarOptions
from cryosuite.methods.fastar_run import make_molecules
from cryosuite.nets.multiview import SPECS, Multiview
from cryosuite.training.inference import autocast
from cryosuite.training.launch import fast_bf16
from cryosuite.training.method import Step

MOLECULE = "1t6b"


def simulator(preset: str, batch: int, rounds: int, work: Path) -> dict:
    """CPU seconds of a batch and of a step with it, the least of several."""
    torch.manual_seed(0)
    options = FastarOptions(preset=preset)
    molecules, _ = make_molecules(options, batch * 100, RunDir(work / "none"))
    method = Fastar(options)
    model = method.build(molecules).train()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-4)
    precision = "bf16" if fast_bf16() else "32"
    batches = iter(method.loader(molecules, batch, 0, 1, seed=0).epoch(0))
    next(batches)
    making, stepping = [], []
    for number in range(rounds):
        began = time.process_time()
        made = next(batches)
        between = time.process_time()
        optimiser.zero_grad(set_to_none=True)
        with autocast(torch.device("cpu"), precision):
            loss = method.loss(model, made, Step(number, 1000))["loss"]
        loss.backward()
        optimiser.step()
        making.append(between - began)
        stepping.append(time.process_time() - between)
    share = min(making) / (min(making) + min(stepping))
    row = {"batch": batch, "precision": precision, "make_s": round(min(making), 4), "step_s": round(min(stepping), 4)}
    return {**row, "share": round(share, 4)}


def inference(preset: str, images: int, work: Path) -> dict:
    """Images per second of a whole command with D = 64, and of its prediction alone."""
    case = Case(MOLECULE, 64, images, 0)
    source = case.make(work)
    torch.manual_seed(0)
    weights = work / f"random-{preset}.safetensors"
    save_multiview(weights, Multiview(SPECS[preset]), {"mode": "target", "answers": "match"})
    known = ["--map", str(WorkDir(source).volume(0)), "--weights", str(weights), "--refine", "0"]
    out, costs = infer(source, work / f"speed-{preset}", *known)
    timing = json.loads(out.timing.read_text())
    predicting = sum(timing.get(key, 0.0) for key in ("load", "encode", "decode", "Kabsch", "grid"))
    return {
        "images": images, "images_per_s": round(images / predicting, 1), "command_images_per_cpu_s": round(
            images / costs["cpu_s"], 1), **costs, "timing": timing,
    }  # fmt: skip


def main() -> None:
    """Measure, print, write results/fastar_speed.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--presets", default="micro,nano64")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for preset in given.presets.split(","):
        rows[preset] = {
            "simulator": simulator(preset, given.batch, given.rounds, given.work),
            "inference": inference(preset, given.images, given.work),
        }
        print(preset, rows[preset], flush=True)
    save("fastar_speed", {"seed": 0, "threads": 1, "molecule": MOLECULE, "rows": rows})


if __name__ == "__main__":
    main()
