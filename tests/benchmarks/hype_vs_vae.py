"""CPU time of train-hype to the loss that cryoDRGN's train_vae has after its epochs: same decoder, box, images, loss.

    CRYODRGN_VENV=DIR python tests/benchmarks/hype_vs_vae.py [--images 3000] [--epochs 5]

Both programs minimise the mean squared difference over the disc |k| <= D/2 of the same windowed images, each divided by
the square of its own scalar: ours is brought to cryoDRGN's unit (the standard deviation of the un-windowed Hartley
values, in its config.yaml), so the two training losses are one quantity. train_vae's is its printed average over the
last epoch (KL term left out); ours the average over a logging interval. Both on one thread. Finished runs in the work
folder are read again, not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from common import CRYOSUITE, peer, save, timed

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def train_vae(program: str, source: Path, out: Path, arguments: argparse.Namespace) -> dict:
    """The peer's CPU seconds and its average loss of each epoch."""
    options = ["--poses", str(source / "poses.pkl"), "--ctf", str(source / "ctf.pkl"), "--uninvert-data"]
    options += ["--zdim", "8", "-n", str(arguments.epochs), "--no-amp", "--no-analysis", "--seed", str(arguments.seed)]
    for side in ("enc", "dec"):
        options += [f"--{side}-dim", str(arguments.width), f"--{side}-layers", str(arguments.depth)]
    timing = timed([program, "train_vae", str(source / "particles.mrcs"), *options, "-o", str(out)], env=ONE_THREAD)
    log = (out / "run.log").read_text() + timing.output
    losses = {int(n): float(x) for n, x in re.findall(r"Epoch: (\d+) Average gen loss = ([\d.]+)", log)}
    scale = float(yaml.safe_load((out / "config.yaml").read_text())["dataset_args"]["norm"][1])
    return {"cpu_s": round(timing.cpu_s, 1), "losses": [losses[n] for n in sorted(losses)], "unit": scale}


def train_hype(source: Path, out: Path, arguments: argparse.Namespace) -> dict:
    """Our CPU seconds and the loss at each logging interval."""
    options = ["--preset", "small", "--inr-dim", str(arguments.width), "--inr-layers", str(arguments.depth)]
    options += ["--loss", "mse", "--march", "1", "-n", str(arguments.epochs), "--seed", str(arguments.seed)]
    options += ["--reading", "whole", "--other-views", "0"]  # each image read once, and its loss is that of the VAE
    command = [*CRYOSUITE, "train-hype", str(source), "-o", str(out), *options, "--overwrite"]
    timing = timed(command, env=ONE_THREAD)
    curve = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    points = [(row["seconds"], row["loss"]) for row in curve if "loss" in row]
    weights = torch.load(out / f"weights.{arguments.epochs}.pkl", weights_only=True)["model_state_dict"]
    result = {"cpu_s": round(timing.cpu_s, 1), "wall_s": round(timing.wall_s, 1), "curve": points}
    return result | {"unit": float(weights["noise_amplitude"].max()), "command": " ".join(command[2:])}


def once(path: Path, make: Callable[[], dict]) -> dict:
    """The result in a file, made and written first when it is not there."""
    if not path.exists():
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def main() -> None:
    """Train both, find where our curve passes theirs, save the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "cryosuite-vae")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("-D", dest="box", type=int, default=64)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    program = peer("cryodrgn", "", os.path.join(os.environ.get("CRYODRGN_VENV", "/nonexistent"), "bin", "cryodrgn"))
    if program is None:
        raise SystemExit("no cryoDRGN: set CRYODRGN_VENV to an environment with `pip install cryodrgn`")
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    size = ["-n", str(arguments.images), "-D", str(arguments.box), "--Apix", str(320 / arguments.box), "--snr", "0.1"]
    if not (work / "sim" / "dataset.yaml").exists():
        timed([*CRYOSUITE, "simulate", "-o", str(work / "sim"), "--structures", "phantom:4", *size, "--seed", "7"])
    theirs = once(work / "vae.json", lambda: train_vae(program, work / "sim", work / "vae", arguments))
    ours = once(work / "hype.json", lambda: train_hype(work / "sim", work / "hype", arguments))
    target = theirs["losses"][-1]
    # the clock of the curve is wall time; what other processes took of it is taken out in proportion, and imports,
    # encoding and writing at the end are charged in full
    share = ours["cpu_s"] / ours["wall_s"]
    startup = ours["cpu_s"] - share * ours["curve"][-1][0]
    unit = (ours["unit"] / theirs["unit"]) ** 2
    ours["curve"] = [[round(share * seconds + startup, 1), round(unit * loss, 5)] for seconds, loss in ours["curve"]]
    reached = next((seconds for seconds, loss in ours["curve"] if loss <= target), None)
    result = {"seed": arguments.seed, "box": arguments.box, "width": arguments.width, "depth": arguments.depth}
    result |= {"images": arguments.images, "cryodrgn": theirs, "hype": ours, "target_loss": target}
    result |= {"reached_cpu_s": reached, "time_fraction": reached and round(reached / theirs["cpu_s"], 3)}
    save("hype_vs_vae", result)


if __name__ == "__main__":
    main()
