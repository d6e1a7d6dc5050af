"""Train the map networks that ship with the package (d = 16) on one core: sharpen (in two stages), superres, wedge.

    CRYOSUITE_SHARED=../shared python tests/benchmarks/train_lvm_small.py --work bench/lvm-small --install

Pre-trains an encoder (``pretrain-lvm``, JEPA) and trains a network for each task (``train-lvm``) on simulated maps of
the structures of ``atomic/train`` and of made-up molecules, never of ``atomic/bench``. Budgets are minutes of training
per stage; 0 leaves a stage out, and without a pre-trained encoder sharpen starts from random weights. ``quiet`` goes on
from sharpen with a quarter of the volumes nothing but noise, and is what is installed as sharpen. The learning rate
stays constant for four fifths of a budget; the number of crops seen by then sets the end, so a busy machine gets fewer
crops and not a broken schedule. Start it again and it goes on where it stopped; with a larger budget a stage that is
done is trained further (its learning rate rises once more). ``--only sharpen`` runs one stage, ``--install`` copies
weights and cards to cryosuite/weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from cryosuite.data.map_weights import load_map_weights, save_map_weights
from cryosuite.data.multiview_weights import WEIGHTS
from cryosuite.data.workdir import RunDir
from cryosuite.formats.atomic import write_text
from cryosuite.training.logs import read_metrics

CONSTANT = 0.8  # of the budget, before the learning rate falls
RATE = 480  # crops a minute that one idle core manages at most
COMMON = (
    "--structures both:{train} --hold-out 6 --crop 32 --schedule flat --seed {seed} --log-interval 20 --images {images}"
)
# measured: at alpha .9 the divergence pulls ten to twenty times as hard at the maps as the square error does (at .98
# one to four times); and the square error alone is soon won by contrast, which no correlation gains from
TASK = "-b 4 --lr 1e-3 --encoder-lr 1e-3 --alpha 0.98 --cc 0.1 --hist-sample 4096 --every 1k --warmup 0.01"
NOISE = "--noise-only 0.08"  # of an answer to noise alone, whose target is empty
QUIET = "--noise-only 0.25"  # with .08, two fifths of the energy of noise still passed after 43,516 crops
STAGES = {
    "pretrain": "pretrain-lvm --size small -b 16 --lr 1e-3 --every 1k --warmup 0.02",
    "sharpen": f"train-lvm --task sharpen {{start}} {TASK} {NOISE}",
    "quiet": f"train-lvm --task sharpen --weights {{work}}/sharpen {TASK} {QUIET}",
    "superres": f"train-lvm --task superres --weights {{work}}/quiet {TASK} {NOISE}",
    "wedge": f"train-lvm --task wedge --norm paper --init {{work}}/quiet/weights.safetensors --frozen 0 {TASK}",
}
MINUTES = {"pretrain": 12.0, "sharpen": 40.0, "quiet": 30.0, "superres": 25.0, "wedge": 20.0}


def stage(name: str, work: Path, shared: Path, minutes: float) -> None:
    """One stage, from wherever it is to its end."""
    run = RunDir(work / name)
    plan = work / f"{name}.json"
    known = json.loads(plan.read_text()) if plan.is_file() else {}
    left = CONSTANT * minutes - spent(run)
    if known.get("minutes") != minutes and left > 0:
        most = str(max(1024, round(RATE * minutes)))
        pretrained = RunDir(work / "pretrain").encoder.is_file()
        start = f"--init {work}/pretrain --frozen 0" if pretrained else "--size small"
        places = {"start": start, "train": shared / "data" / "atomic" / "train", "work": work, "images": most}
        places["seed"] = "1" if name == "quiet" else "0"  # not the crops of the stage before once more
        command = (STAGES[name] + " " + COMMON).format(**places).split()
        if run.checkpoint.is_file():
            command = [command[0], "--resume", "--images", most]
        call([*command, "-o", str(run.path), "--max-minutes", f"{max(left, 0.05):.3f}"])
    if known.get("minutes") != minutes:
        every = run.read_config()["epoch_images"]
        batch = run.read_config()["training"]["batch_size"]
        done = max(record["step"] for record in read_metrics(run.metrics)) * batch
        known = {"minutes": minutes, "images": math.ceil(done / CONSTANT / every) * every}
        write_text(plan, json.dumps(known) + "\n")
    epochs = known["images"] // run.read_config()["epoch_images"]
    if max(record["epoch"] for record in read_metrics(run.metrics)) < epochs:
        call([STAGES[name].split()[0], "--resume", "-o", str(run.path), "--images", str(known["images"])])


def spent(run: RunDir) -> float:
    """Minutes that a run has been trained for."""
    return max((record.get("seconds", 0.0) for record in read_metrics(run.metrics)), default=0.0) / 60


def call(arguments: list[str]) -> None:
    """Run a command of cryosuite on one core."""
    print(" ".join(arguments), flush=True)
    subprocess.run(
        [sys.executable, "-m", "cryosuite", *arguments], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def install(name: str, work: Path, shared: Path) -> None:
    """Copy a stage's weights and card to where cryosuite looks for them, without the folders of this machine."""
    run, task = RunDir(work / name), "sharpen" if name == "quiet" else name
    found = load_map_weights(run.network)

    def clean(text: str) -> str:
        text = re.sub(r"[^\s`]*(__main__\.py|bin/cryosuite)(?= )", "cryosuite", text)
        for folder, name in ((shared, "../shared"), (work, "bench/lvm-small")):
            text = text.replace(str(folder.resolve()), name).replace(str(folder), name)
        return text

    notes = {key: clean(value) if isinstance(value, str) else value for key, value in found.notes.items()}
    notes["made_by"] = "tests/benchmarks/train_lvm_small.py"
    target = WEIGHTS / f"lvm-{task}.safetensors"
    save_map_weights(
        target, found.net, task=task, voxel=found.voxel, norm=found.norm, notes=notes, spectrum=found.spectrum
    )
    said = clean(run.card.read_text(encoding="utf-8"))
    minutes = f"- trained for {spent(run):.0f} minutes on one busy core, by tests/benchmarks/train_lvm_small.py\n"
    write_text(target.with_suffix(".md"), said.replace("- seed:", minutes + "- seed:", 1))
    print(f"installed {target}")


def main() -> None:
    """Train, install."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench/lvm-small"))
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("CRYOSUITE_SHARED", "../shared")))
    parser.add_argument("--only", choices=list(STAGES), default=None, help="one stage; those before it must be done")
    parser.add_argument("--start-over", action="store_true", help="delete what an earlier start left of these stages")
    parser.add_argument("--install", action="store_true")
    for name, minutes in MINUTES.items():
        parser.add_argument(f"--{name}-minutes", type=float, default=minutes, metavar="M", help=f"default {minutes:g}")
    given = parser.parse_args()
    work, shared = given.work.resolve(), given.shared.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for name in [given.only] if given.only else STAGES:
        if not getattr(given, f"{name}_minutes"):
            continue
        if given.start_over:
            shutil.rmtree(work / name, ignore_errors=True)
            (work / f"{name}.json").unlink(missing_ok=True)
        stage(name, work, shared, getattr(given, f"{name}_minutes"))
        if given.install and name not in ("pretrain", *(["sharpen"] if given.only is None else [])):
            install(name, work, shared)


if __name__ == "__main__":
    main()
