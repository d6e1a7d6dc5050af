"""The modes of polish side by side on a loop whose latent is known up to an error (BENCHMARKS, section 5, last rows).

    CRYOSUITE_SHARED=../shared python tests/benchmarks/polish_modes.py [--errors 0 0.3 0.5] [--snr 0.01] [--seeds 0 1 2]
        [--modes default kernel prior] [--work DIR]

The sets are the loops of 24 states of polish.py. The latent of a particle is (cos a, sin a), a = 2 pi state / states +
error x normal. Every mode makes one map per state, at its true angle; maps are judged by masked and unmasked AUC. Of
the kernels of one fixed width the one that the truth likes best is kept, nothing else looks at it. "prior" has the
consensus of each half set in place of a network's map, the weakest prior there is. One JSON per set.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import save
from judge import Judge
from sets import FAMILIES, WORK, make

from cryosuite.kernels import shells
from cryosuite.metrics.fsc import raw_auc
from cryosuite.reconstruct.backproject import reconstruct, reconstruct_classes
from cryosuite.reconstruct.bins import bins_of
from cryosuite.reconstruct.class_sums import accumulate
from cryosuite.reconstruct.polish import polish
from cryosuite.reconstruct.polish_kernel import bandwidths, choose, ladder, ring_weights, squared_distances
from cryosuite.reconstruct.polish_prior import prior_mean
from cryosuite.reconstruct.weights import ClassWeights

SEED = 20240526


def main() -> None:
    """Run the modes that were asked for and print one line each, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--errors", type=float, nargs="+", default=[0.0, 0.3, 0.5], help="radians")
    parser.add_argument("--snr", type=float, nargs="+", default=[0.01])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--every", type=int, default=1, help="judge every n-th state only")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--windows", type=float, nargs="+", default=[12.5], help="of the kernel, Angstrom")
    parser.add_argument("--work", type=Path, default=WORK)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for recipe in FAMILIES["polish"]:
        if recipe.kind == "igg24" and recipe.snr in options.snr and recipe.seed in options.seeds:
            rows = run_set(Judge(make(recipe, options.work)), options)
            facts = {"recipe": recipe.title, "seed": recipe.seed, "snr": recipe.snr, "every": options.every}
            save(f"modes_{recipe.name}", {**facts, "threads": 1, "rows": rows})


def run_set(judge: Judge, options: argparse.Namespace) -> list[dict]:
    """The rows of one set: what has no latent first, then every mode with every error of the latents."""
    count = len(judge.truth.volumes)
    states = np.arange(0, count, options.every)
    consensus = reconstruct(judge.particles, halves=False, passes=0).map
    rows = [score(judge, "consensus", None, states, [consensus] * len(states), 0)]
    plain = reconstruct_classes(judge.particles, judge.labels, halves=False, passes=0)
    rows.append(score(judge, "labels", None, states, [plain[int(k)].map for k in states], 0))
    for error in options.errors:
        angle = 2 * np.pi * judge.labels / count
        angle = angle + error * np.random.default_rng([SEED, count]).standard_normal(len(angle))
        z = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
        points = 2 * np.pi * states / count
        points = np.stack([np.cos(points), np.sin(points)], 1)
        for mode in options.modes:
            rows += MODES[mode](judge, error, z, points, states, options.windows)
    return rows


def default(
    judge: Judge, error: float, z: np.ndarray, points: np.ndarray, states: np.ndarray, _: list[float]
) -> list[dict]:
    """Bins, then the modal filter; the map of a state is that of the bin nearest to its angle."""
    start = time.process_time()
    weights, means = bins_of(z)
    nearest = ((points[:, None] - means[None]) ** 2).sum(2).argmin(1)
    with accumulate(judge.particles, weights) as sums:
        maps = polish(sums).maps
    spent = time.process_time() - start
    return [score(judge, "default", error, states, maps[nearest], spent) | {"bins": weights.n_classes}]


def kernel(
    judge: Judge, error: float, z: np.ndarray, points: np.ndarray, states: np.ndarray, windows: list[float]
) -> list[dict]:
    """Bandwidths chosen per window and band, and the best fixed one."""
    start = time.process_time()
    distances = squared_distances(z, points)
    h = bandwidths(distances)
    out: dict[str, list] = {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        accumulate(judge.particles, ring_weights(distances, h), scratch=Path(scratch)) as sums,
    ):
        for k in range(len(points)):
            steps = ladder(sums, k, h)
            for window in windows:
                name = "kernel" if window == windows[0] else f"kernel, windows of {window:g} A"
                out.setdefault(name, []).append(choose(steps, h, window / sums.pixel_size)[0])
            for J, width in enumerate(h):
                out.setdefault(f"width {width:.3f}", []).append(steps[2, J])
    spent = time.process_time() - start
    rows = [score(judge, name, error, states, maps, spent) for name, maps in out.items()]
    fixed = [row for row in rows if row["mode"].startswith("width")]
    best = max(fixed, key=lambda row: row["masked"])
    return [row for row in rows if row not in fixed] + [best | {"mode": "best fixed kernel", "width": best["mode"]}]


def prior(
    judge: Judge, error: float, z: np.ndarray, points: np.ndarray, states: np.ndarray, _: list[float]
) -> list[dict]:
    """The consensus of the same half in place of a network's map: the weakest prior there is."""
    start = time.process_time()
    angles = 2 * np.pi * np.arange(len(judge.truth.volumes)) / len(judge.truth.volumes)
    bins = (z @ np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)).argmax(1)
    with accumulate(judge.particles, ClassWeights.from_labels(bins, len(angles))) as sums:
        halves = reconstruct(judge.particles, halves=True, passes=0)
        both = torch.stack([halves.half_a, halves.half_b])[:, None].expand(2, len(angles), *halves.map.shape)
        maps = prior_mean(sums, both).maps
    return [score(judge, "prior", error, states, maps[states], time.process_time() - start)]


def score(judge: Judge, name: str, error: float | None, states: np.ndarray, maps: object, seconds: float) -> dict:
    """One row: mode, error, AUC inside the mask and without, inside it by CryoBench's shells, CPU seconds."""
    found = {}
    ways = {
        "masked": (judge.mask, shells.fsc),
        "unmasked": (None, shells.fsc),
        "cryobench": (judge.mask, shells.fsc_cryobench),
    }
    for key, (mask, fsc) in ways.items():
        pairs = zip(maps, (judge.read_truth(int(s)) for s in states), strict=True)
        curves = np.stack([fsc(a, b, mask).numpy() for a, b in pairs])
        found[key] = round(float(raw_auc(curves, curves.shape[1] * 2).mean()), 4)
    row = {"mode": name, "error": error, **found, "cpu_s": round(seconds, 1)}
    print(json.dumps(row), flush=True)
    return row


MODES = {"default": default, "kernel": kernel, "prior": prior}

if __name__ == "__main__":
    main()
