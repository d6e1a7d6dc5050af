"""``--zdim auto``: the length of the latent, chosen on images that had no part in the training."""

from __future__ import annotations

import json
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cryosuite.console import say, table
from cryosuite.data.loader import BatchLoader
from cryosuite.data.particles import ParticleSet
from cryosuite.data.spectra import slice_matrices
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError
from cryosuite.formats.atomic import write_text
from cryosuite.kernels import fourier
from cryosuite.methods.deco import FEWEST, Deco
from cryosuite.methods.deco_model import DecoModel
from cryosuite.methods.deco_options import ZDIMS, DecoOptions
from cryosuite.training.launch import meet, resolve_accelerator
from cryosuite.training.loop import fit
from cryosuite.training.options import TrainOptions

SUBSET = 4000  # images trained on
HELD = 1000  # images it is judged by
IMAGES_SEEN = 32000  # of one trial, over all its epochs
HARDLY = 1.0  # standard errors of the difference within which a shorter latent is as good


class Interrupted(Exception):  # noqa: N818 -- a signal asked for it, nothing is wrong
    """A trial was stopped; its text is the name of the signal."""


def check_auto(particles: ParticleSet) -> None:
    """Raises InputError where too few particles would be left to train on."""
    left = len(particles) - _held(len(particles))
    if left < FEWEST:
        raise InputError(
            f"--zdim auto: of {len(particles)} particles {left} would be left to try lengths on, too few to learn "
            "from. Give a number"
        )


def _held(count: int) -> int:
    """How many of ``count`` particles the lengths are judged by."""
    return min(HELD, count // 5)


def choose_zdim(particles: ParticleSet, run: RunDir, options: DecoOptions, training: TrainOptions) -> int:
    """Train shortly with each length of ``ZDIMS`` on a subset; the shortest whose held-out loss is not clearly worse
    than the best one's.

    Poses are those of ``particles``. Results are kept in zdim.json as they come, so an interrupted choice goes on with
    the next length. Says what it found. Several processes train together and go by what the first one finds. Raises
    Interrupted where a signal stopped a trial, and after the trial in which ``max_minutes`` have passed.
    """
    processes, began, limit = meet(training), time.monotonic(), training.max_minutes

    def keep(found: dict[str, list[float]]) -> dict[str, list[float]]:
        write_text(run.zdim, json.dumps(found) + "\n")
        return found

    tried = processes.first_does(lambda: keep(_read(run.zdim)))
    lengths = [z for z in ZDIMS if z < len(particles)]
    for zdim in lengths:
        if str(zdim) in tried:
            continue
        if processes.first_does(lambda: limit is not None and time.monotonic() - began > 60 * limit):
            raise Interrupted("max_minutes")
        say(f"--zdim auto: trying {zdim}")
        losses = _trial(particles, options, training, zdim)
        tried = processes.first_does(lambda more={str(zdim): losses}, before=tried: keep(before | more))
    losses = {z: np.asarray(tried[str(z)]) for z in lengths}
    chosen, why = decide(losses)
    rows = [[z, f"{loss.mean():.5f}", "chosen" if z == chosen else ""] for z, loss in losses.items()]
    table("--zdim auto: loss of images that were not trained on", ["zdim", "held-out loss", ""], rows)
    say(f"--zdim {chosen}: {why}")
    return chosen


def decide(losses: dict[int, np.ndarray]) -> tuple[int, str]:
    """The length chosen from per-image held-out losses (n,) of the same images, and why."""
    best = min(losses, key=lambda z: losses[z].mean())
    for zdim in sorted(losses):
        difference = losses[zdim] - losses[best]
        error = difference.std(ddof=1) / math.sqrt(len(difference))
        if difference.mean() <= HARDLY * error or zdim == best:
            if zdim == best:
                return zdim, "the lowest loss, clearly below that of every shorter latent"
            return zdim, f"as good as {best} within the error ({difference.mean():.1e} +- {error:.1e}), and shorter"
    return best, "the lowest loss"


def _trial(particles: ParticleSet, options: DecoOptions, training: TrainOptions, zdim: int) -> list[float]:
    """Loss of every held-out image after a short training with a latent of this length."""
    order = np.random.default_rng([training.seed, 5]).permutation(len(particles))
    held = np.sort(order[: _held(len(particles))])
    rows = np.sort(order[len(held) : len(held) + SUBSET])
    trained = particles.subset(rows)
    poses = options.changed(zdim=zdim, zdim_auto=False, poses="known", refine_poses=False, search="exact")
    epochs = max(2, min(training.epochs, IMAGES_SEEN // len(rows)))
    short = replace(training, epochs=epochs, save_every=epochs, max_minutes=None, requeue=False)
    with tempfile.TemporaryDirectory() as folder:
        method = Deco(poses, None, epochs, training.precision, resolve_accelerator(training.accelerator))
        fitted = fit(method, trained, RunDir(Path(folder)), short)
        if fitted.stopped:
            raise Interrupted(fitted.stopped)
        return held_out(method, fitted.model, particles.subset(held))


@torch.no_grad()
def held_out(method: Deco, model: DecoModel, particles: ParticleSet) -> list[float]:
    """Whitened squared error per coefficient of every image, encoded and decoded."""
    spec = model.encoder.spec
    images = Deco(method.options, precision=method.precision)
    images.attach(model, particles, spec.image_size, method.cache.prep, trained=False)
    disc = fourier.half_disc(model.box_size, device=model.envelope.device)
    out: list[float] = []
    for batch in BatchLoader(particles, 128, shuffle=False, device=model.envelope.device).epoch(0):
        target = model.target(batch)
        q = disc.frequency @ slice_matrices(batch, method.pixel_size)[:, :2]
        values = model.values(q, q.norm(dim=-1) * model.box_size, images.encode(model, batch))
        error = torch.view_as_real(target.values) - target.ctf[..., None] * values
        out += error.square().sum(-1).mean(1).tolist()
    return out


def _read(path: Path) -> dict[str, list[float]]:
    """What earlier trials left; nothing where the file is absent or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
