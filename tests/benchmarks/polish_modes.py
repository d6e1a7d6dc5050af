"""The modes of polish side by side on a loop whose latent is known up to an error (BENCHMARKS, section 5, last rows).

    python tests/benchmarks/polish_modes.py SIM [--errors 0 0.3 0.5] [--every 1] [--modes default kernel prior]

SIM is a folder of `cryosuite simulate --recipe loop` (or --preset mini-igg10 --states 24). The latent of a particle is
(cos a, sin a), a = 2 pi state / states + error x normal. Every mode makes one map per state, at its true angle; maps
are judged by masked and unmasked AUC. "best fixed kernel" is chosen by the truth; nothing else looks at it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from judge import Judge

from cryosuite.kernels import shells
from cryosuite.metrics.fsc import raw_auc
from cryosuite.reconstruct.backproject import reconstruct
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
    parser.add_argument("sim", type=Path)
    parser.add_argument("--errors", type=float, nargs="+", default=[0.0, 0.3, 0.5], help="radians")
    parser.add_argument("--every", type=int, default=1, help="judge every n-th state only")
    parser.add_argument("--modes", nargs="+", default=["default", "kernel", "prior"])
    parser.add_argument("--windows", type=float, nargs="+", default=[12.5], help="of the kernel, Angstrom")
    options = parser.parse_args()
    torch.set_num_threads(1)
    judge = Judge(options.sim)
    count = len(judge.truth.volumes)
    states = np.arange(0, count, options.every)
    consensus = reconstruct(judge.particles, halves=False, passes=0).map
    show(judge, "consensus", None, states, [consensus] * len(states), 0)
    for error in options.errors:
        angle = 2 * np.pi * judge.labels / count
        angle = angle + error * np.random.default_rng([SEED, count]).standard_normal(len(angle))
        z = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
        points = 2 * np.pi * states / count
        points = np.stack([np.cos(points), np.sin(points)], 1)
        for mode in options.modes:
            MODES[mode](judge, error, z, points, states, options.windows)


def default(judge: Judge, error: float, z: np.ndarray, points: np.ndarray, states: np.ndarray, _: list[float]) -> None:
    """Bins, then the modal filter; the map of a state is that of the bin nearest to its angle."""
    start = time.process_time()
    weights, means = bins_of(z)
    nearest = ((points[:, None] - means[None]) ** 2).sum(2).argmin(1)
    with accumulate(judge.particles, weights) as sums:
        maps = polish(sums).maps
    show(judge, f"default, {weights.n_classes} bins", error, states, maps[nearest], time.process_time() - start)


def kernel(
    judge: Judge, error: float, z: np.ndarray, points: np.ndarray, states: np.ndarray, windows: list[float]
) -> None:
    """Bandwidths chosen per window and band, per band only, and fixed ones."""
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
                name = f"kernel h(window {window:g} A, band)"
                out.setdefault(name, []).append(choose(steps, h, window / sums.pixel_size)[0])
            for J, width in enumerate(h):
                out.setdefault(f"kernel fixed h {width:.3f}", []).append(steps[2, J])
    for name, maps in out.items():
        show(judge, name, error, states, maps, time.process_time() - start)


def prior(judge: Judge, error: float, z: np.ndarray, points: np.ndarray, states: np.ndarray, _: list[float]) -> None:
    """The consensus of the same half in place of a network's map: the weakest prior there is."""
    start = time.process_time()
    angles = 2 * np.pi * np.arange(len(judge.truth.volumes)) / len(judge.truth.volumes)
    bins = (z @ np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)).argmax(1)
    with accumulate(judge.particles, ClassWeights.from_labels(bins, len(angles))) as sums:
        halves = reconstruct(judge.particles, halves=True, passes=0)
        both = torch.stack([halves.half_a, halves.half_b])[:, None].expand(2, len(angles), *halves.map.shape)
        maps = prior_mean(sums, both).maps
    show(judge, "prior: consensus of the half", error, states, maps[states], time.process_time() - start)


def show(judge: Judge, name: str, error: float | None, states: np.ndarray, maps: object, seconds: float) -> None:
    """One line: name, error, AUC inside the mask and without, inside it by CryoBench's shells, CPU seconds."""
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
    print(json.dumps({"mode": name, "error": error, **found, "cpu_s": round(seconds, 1)}), flush=True)


MODES = {"default": default, "kernel": kernel, "prior": prior}

if __name__ == "__main__":
    main()
