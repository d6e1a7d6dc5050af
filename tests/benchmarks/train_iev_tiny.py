"""Train the small encoder that ships with the package, judge it on molecules it has not seen, and write its card.

    CRYOSUITE_SHARED=../shared python tests/benchmarks/train_iev_tiny.py --work bench/iev-tiny

Trains with ``cryosuite pretrain-iev`` (on one core, under 45 minutes where the core is not shared), then measures the
accuracy of 10 nearest neighbours on the ten molecules that were held out, at two box sizes and two signal to noise
ratios, beside a random start of the same encoder and principal components of the pixels. ``--install`` copies the
encoder to cryosuite/weights. ``--judge FILE`` measures an encoder that exists.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from cryosuite.data.encoder_images import circle_mask, normalise
from cryosuite.data.encoder_weights import SHIPPED, load_encoder, save_encoder
from cryosuite.methods.iev_run import SimulateOptions, _in_words, held_out_particles, molecules
from cryosuite.metrics.features import feature_spread, knn_accuracy, pixel_components
from cryosuite.nets.ief import IefEncoder

RECIPE = (
    "--preset tiny --simulate {train},phantom:60 --hold-out 10 --momentum 0.98 --positives same-view --snr 0.02:0.3 "
    "--boxes 32,48,64,96 --lr 1e-3 --keep 1 --batch-size 32 --images 14k --every 3500 --log-interval 10 --seed 0"
)
LONGER = "--resume --images 24500"  # the first part was too short: the learning rate rises again
# box size, signal to noise ratio at 128 pixels (nominal 0.1 and 0.01 of `cryosuite simulate`, counted at 2D, D = 64)
SETTINGS = ((32, 0.024), (64, 0.024), (32, 0.0024), (64, 0.0024))


def train(work: Path, shared: Path, threads: str) -> None:
    """Run the command in a process of its own."""
    arguments = RECIPE.format(train=shared / "data" / "atomic" / "train").split()
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    command = [sys.executable, "-m", "cryosuite", "pretrain-iev", *arguments, "-o", str(work), "--overwrite"]
    began = time.monotonic()
    subprocess.run(command, check=True, env=environment)
    longer = [*command[:4], *LONGER.split(), "-o", str(work)]
    subprocess.run(longer, check=True, env=environment)
    print(f"trained in {(time.monotonic() - began) / 60:.1f} minutes")


@torch.inference_mode()
def features_of(encoder: IefEncoder, images: torch.Tensor, mean: float, std: float) -> np.ndarray:
    """Features of eight-bit images as at inference."""
    inside = torch.from_numpy(circle_mask(images.shape[-1]))
    parts = [encoder(normalise(part * inside, mean, std)) for part in images.split(64)]
    return torch.cat(parts).float().numpy()


def probe(z: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy of a linear classifier (logistic regression, 3 folds) on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    return float(
        cross_val_score(LogisticRegression(max_iter=2000, C=0.1), (z - z.mean(0)) / z.std(0), labels, cv=3).mean()
    )


def judge(weights: Path, work: Path, shared: Path) -> list[dict]:
    """Accuracies of nearest neighbours on the held-out molecules, one row per setting."""
    loaded = load_encoder(weights)
    torch.manual_seed(0)
    fresh = IefEncoder(loaded.spec).eval()
    simulated = SimulateOptions(f"{shared / 'data' / 'atomic' / 'train'},phantom:60", "10")
    rows = []
    for box, snr in SETTINGS:
        images, labels = held_out_particles(
            lambda: molecules(simulated)[1], f"held out of {_in_words(simulated)}", loaded.spec.image_size, loaded.prep,
            work / "heldout.f16", simulated.pool, box, snr,
        )  # fmt: skip
        z = features_of(loaded.encoder, images, loaded.mean, loaded.std)
        inside = (images * torch.from_numpy(circle_mask(images.shape[-1])))[:, ::2, ::2].numpy()
        pixels = pixel_components(inside)
        spread, rank = feature_spread(torch.from_numpy(z))
        rows.append(
            {
                "box": box,
                "snr_at_128": snr,
                "knn": knn_accuracy(z, labels),
                "knn_random": knn_accuracy(features_of(fresh, images, loaded.mean, loaded.std), labels),
                "knn_pixels": knn_accuracy(pixels, labels, cosine=False),
                "probe": probe(z, labels),
                "probe_pixels": probe(pixels, labels),
                "spread": float(spread),
                "effective_rank": float(rank),
                "images": len(labels),
            }
        )
        print(json.dumps({name: round(value, 4) for name, value in rows[-1].items()}), flush=True)
    return rows


def main() -> None:
    """Train, judge, install."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench/iev-tiny"))
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("CRYOSUITE_SHARED", "../shared")))
    parser.add_argument("--judge", type=Path, default=None, metavar="FILE", help="train nothing, measure this encoder")
    parser.add_argument("--no-judge", action="store_true", help="with --install: without measuring")
    parser.add_argument("--install", action="store_true", help="copy the encoder to where cryosuite looks for it")
    parser.add_argument("--threads", default="1")
    given = parser.parse_args()
    torch.set_num_threads(int(given.threads))
    if given.judge is None:
        train(given.work, given.shared, given.threads)
    weights = given.judge or given.work / "encoder.safetensors"
    if not given.no_judge:
        rows = judge(weights, given.work, given.shared)
        (given.work / "judged.json").write_text(json.dumps(rows, indent=1) + "\n")
    if given.install:
        loaded = load_encoder(weights)
        command = loaded.notes.get("command", "").replace(str(given.shared.resolve()), "../shared")
        command = re.sub(r"-o \S+", "-o RUN", command)
        notes = loaded.notes | {"command": command, "made_by": "tests/benchmarks/train_iev_tiny.py"}
        save_encoder(SHIPPED, loaded.encoder, loaded.prep, loaded.mean, loaded.std, notes)
        print(f"installed as {SHIPPED}")


if __name__ == "__main__":
    main()
