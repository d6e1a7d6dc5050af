"""The training loop: knows no method by name and can be read in one sitting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from cryosuite.console import Progress
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError
from cryosuite.formats.atomic import remove_leftovers
from cryosuite.training.guard import TrainingDiverged
from cryosuite.training.launch import was_restarted
from cryosuite.training.logs import MetricsLog
from cryosuite.training.lookout import Lookout
from cryosuite.training.method import Method, Step
from cryosuite.training.options import TrainOptions
from cryosuite.training.session import Session
from cryosuite.training.signals import StopNow, StopSignals, exit_code, requeue_job

if TYPE_CHECKING:
    from cryosuite.data.particles import ParticleSet

OnEpoch = Callable[[int, nn.Module], None]


@dataclass
class FitResult:
    """What a training gives back.

    ``model`` holds the averaged (EMA) weights, in eval mode. ``stopped`` is "" when all epochs are done, else the
    signal's name, "max_minutes" or the reason of ``on_epoch`` (StopNow); ``exit_code`` is what the command should leave
    with (see signals.py).
    """

    model: nn.Module
    epochs_done: int
    stopped: str = ""
    loss: float = float("nan")

    @property
    def exit_code(self) -> int:
        """0, or the code that asks to be started again."""
        return exit_code(self.stopped)


def fit(
    method: Method,
    particles: ParticleSet,
    run: RunDir,
    options: TrainOptions,
    *,
    resume: bool | str = False,
    on_epoch: OnEpoch | None = None,
) -> FitResult:
    """Train a method on a particle set, writing into ``run``.

    Writes checkpoint.pt (every ``checkpoint_every_minutes``, at the end of saved epochs and when stopped),
    weights.N.pkl after every ``save_every`` epochs, metrics.jsonl and run.log. ``on_epoch(epoch, model)`` is called in
    every process before weights.N.pkl is written, epochs counted from 1, the model holding the averaged weights; it
    may draw random numbers freely. ``resume=True`` goes on exactly where the checkpoint was written; "auto" does so
    where there is one, and is what False means in a job that torchrun or SLURM started again.

    Raises InputError for a checkpoint that is missing, foreign or in the way, TrainingDiverged for NaN, Inf or an
    exploding loss (the checkpoint of before stays).
    """
    resume = resume or ("auto" if was_restarted() else False)
    if resume is False and run.checkpoint.exists():
        raise InputError(f"{run.path}: holds a run already: go on with it by --resume, or choose another folder")
    if resume is True and not run.checkpoint.exists():
        raise InputError(f"{run.path}: nothing to resume: there is no {run.checkpoint.name} in it")
    run.path.mkdir(parents=True, exist_ok=True)
    session = Session(method, particles, run, options)
    if resume and run.checkpoint.exists():
        session.restore()
    if session.main:
        remove_leftovers(run.checkpoint)
    metrics = session.open_logs()
    try:
        with Lookout(session.rank, session.processes):
            stopped, loss = _train(session, metrics, on_epoch)
            if not stopped:  # from here on nobody looks whether the others have ended: all come to it together
                session.together()
    except TrainingDiverged as error:
        session.log.write(str(error))
        raise
    if stopped:
        session.log.write(f"stopped by {stopped} at step {session.place.step}; checkpoint {run.checkpoint} written")
        if session.main and options.requeue:
            requeue_job(stopped)
    else:
        session.log.write(f"finished {session.place.epoch} epochs, {session.total} steps")
    session.ema.apply()
    return FitResult(session.model.eval(), session.place.epoch, stopped, loss)


def _train(session: Session, metrics: MetricsLog, on_epoch: OnEpoch | None) -> tuple[str, float]:
    """The loop itself; returns why it stopped early ("" when it did not) and the last loss reported."""
    place, options, loader, meter = session.place, session.options, session.loader, session.meter
    on_cpu, loss = session.device.type == "cpu", float("nan")
    session.model.train()
    session.mark = time.monotonic()
    with StopSignals() as signals, _progress(session) as bar:
        if place.batch == 0 and _saved_epoch(session) and not session.epoch_is_finished():
            stopped = _finish_epoch(session, signals, on_epoch)
            if stopped:
                return stopped, loss
        while place.epoch < options.epochs:
            for batch in _batches(session):
                images = loader.global_size(place.batch)
                losses, norm = session.descend(batch, Step(place.step, session.total))
                meter.add(place.step, losses, norm, loader.weight(place.batch), images, batch.index)
                place.step, place.batch = place.step + 1, place.batch + 1
                if on_cpu:
                    meter.collect()
                if place.step % options.log_every == 0 or place.step == session.total:
                    loss = _report(session, metrics)
                if bar is not None:
                    bar.advance(images, f"loss {loss:.4g}" if loss == loss else None)
                stopped, due = session.decide(signals.received)
                if stopped or due:
                    session.save(even_if_not_calm=bool(stopped))
                if stopped:
                    session.share_broken()
                    session.together()  # a launcher that sees one of them leave ends the others: not while one writes
                    return stopped, loss
            session.share_broken()
            place.epoch, place.batch = place.epoch + 1, 0
            if _saved_epoch(session):
                saved = session.save(even_if_not_calm=False)
                stopped = _finish_epoch(session, signals if saved else None, on_epoch)
                if stopped:
                    return stopped, loss
    return "", loss


def _batches(session: Session) -> Iterator[Any]:
    """The batches of the epoch from the session's place on.

    Where images cannot be read any more (a stack that was moved, cut short or replaced) a checkpoint is written before
    the error is passed on, so that the training goes on from there once the file is back. With several processes the
    others do not know of it, so there the last regular checkpoint has to do.
    """
    place = session.place
    try:
        yield from session.loader.epoch(place.epoch, start=place.batch)
    except (InputError, OSError) as error:
        if session.processes > 1 or place.step == 0 or not session.save(even_if_not_calm=False):
            raise
        reason = str(error).rstrip(".")
        raise InputError(
            f"{reason}. A checkpoint of step {place.step} was written: go on with --resume once the images are back"
        ) from error


def _saved_epoch(session: Session) -> bool:
    """Whether the epoch just finished is one whose weights and latents are kept."""
    epoch, options = session.place.epoch, session.options
    return epoch > 0 and (epoch % options.save_every == 0 or epoch == options.epochs)


def _finish_epoch(session: Session, signals: StopSignals | None, on_epoch: OnEpoch | None) -> str:
    """The work after an epoch. The checkpoint of this very moment is on disk, so a signal may end it at once."""
    try:
        with signals.leave_at_once() if signals is not None else nullcontext():
            session.finish_epoch(on_epoch)
    except StopNow as stop:
        return str(stop)
    return ""


def _report(session: Session, metrics: MetricsLog) -> float:
    """Read the losses of the interval, write their line; returns the mean loss."""
    session.meter.collect()
    session.tick()
    place = session.place
    averages = session.meter.averages()
    images = averages.pop("images")
    record = {
        "step": place.step,
        "epoch": place.epoch + place.batch / len(session.loader),
        **averages,
        "lr": session.optimizer.param_groups[0]["lr"],
        "images_per_s": images / max(place.seconds - place.reported, 1e-9),
        "seconds": place.seconds,
    }
    place.reported = place.seconds
    metrics.write(record)
    return averages["loss"]


def _progress(session: Session) -> Progress | nullcontext:
    """The progress display of the first process."""
    if not session.main:
        return nullcontext()
    images = len(session.particles)
    done = session.place.epoch * images + session.place.batch * session.options.batch_size
    return Progress(session.options.epochs * images, f"train {session.method.name}", "images", done)
