"""config.yaml: what a run was started with, and the rules for starting over or going on."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from cryosuite import __version__
from cryosuite.data.workdir import DATASET, RunDir
from cryosuite.errors import InputError
from cryosuite.formats.checks import printable
from cryosuite.formats.config import write_yaml
from cryosuite.training.launch import meet, process_rank, was_restarted
from cryosuite.training.options import TrainOptions, plain

KEPT = ("epochs", "save_every", "log_every", "checkpoint_every_minutes")  # options that a continued run keeps


def make_config(
    method: str, particles: Path | str, run: RunDir, method_options: object, options: TrainOptions, **extra: Any
) -> dict[str, Any]:
    """The contents of config.yaml: everything a run can be understood and continued by.

    ``particles`` is written as an absolute path and relative to the run's folder, so that both can be moved together.
    ``extra``: how the particles were opened (poses, ctf, ind, datadir, ...).
    """
    absolute = Path(particles).absolute()
    return {
        "method": method,
        "version": __version__,
        "command": shlex.join(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "particles": str(absolute),
        "particles_relative": os.path.relpath(absolute, run.path.absolute()),
        **{
            name: str(Path(value).absolute()) if isinstance(value, Path) else plain(value)
            for name, value in extra.items()
        },
        "options": plain(method_options),
        "training": plain(options),
    }


def start_run(
    run: RunDir, config: dict[str, Any], *, resume: bool | str = False, overwrite: bool = False
) -> dict[str, Any]:
    """Make a run's folder and config.yaml, or find them again; returns the config to train with.

    Fresh: writes ``config`` and returns it. With ``resume`` the stored config is returned, so that no option needs to
    be typed again; "auto" resumes where there is a checkpoint and starts (over) where there is none, as a job that may
    be requeued at any moment wants it; a job that torchrun or SLURM started again does so unasked. ``overwrite``
    deletes the files of the run of before (not the analyses). A limit of minutes is of the call it was given to:
    ``resume`` forgets that of before, a job that was started again keeps its own.

    Raises InputError for a folder that holds a run (without resume or overwrite), one that holds none (with resume)
    and one that belongs to another method. Under torchrun or srun only the first process writes or deletes.
    """
    first, asked = process_rank() == 0, resume is True
    if not resume and was_restarted():
        resume, overwrite = "auto", False
    if resume is True and not run.checkpoint.exists():
        what = "its training had not reached a first checkpoint" if run.exists() else "it holds no run"
        raise InputError(
            f"{run.path}: nothing to resume: {what} (no {run.checkpoint.name}). Leave --resume out to start"
            + (" and add --overwrite." if run.exists() else " one.")
        )
    if resume and run.checkpoint.exists():
        stored = read_run_config(run)
        if stored["method"] != config["method"]:
            raise InputError(f"{run.path}: is a run of train-{stored['method']}, not of train-{config['method']}")
        stored = with_particles(stored, config["particles"], run)
        return without_limit(stored) if asked else stored
    if not first:
        return config
    if run.exists() and not overwrite and resume is False:
        hint = "add --resume to go on with it, " if run.checkpoint.exists() else ""
        raise InputError(
            f"{run.path}: holds a run already: {hint}--overwrite to replace it, or choose another folder with -o"
        )
    run.path.mkdir(parents=True, exist_ok=True)
    remove_run(run)
    write_yaml(run.config, config)
    return config


def begin_run(
    run: RunDir, config: dict[str, Any], training: TrainOptions | None, *, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """``start_run`` in all processes of a training: a folder that the first one refuses ends every one of them.

    To be told they must meet first, as ``training`` says (None for a run that is gone on with). Where one is gone on
    with, or was started again, nothing is written and each sees for itself.
    """
    if resume or training is None or was_restarted():
        return start_run(run, config, resume=resume, overwrite=overwrite)
    return meet(training).first_does(lambda: start_run(run, config, resume=resume, overwrite=overwrite))


def without_limit(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a run that is gone on with until its end, however long it may take."""
    return config | {"training": config["training"] | {"max_minutes": None}}


def remove_run(run: RunDir) -> None:
    """Delete the files a training writes: checkpoint first, config last."""
    images = run.encoder_images
    stale = [run.checkpoint, run.metrics, run.log, run.start, run.zdim, images, images.with_name(images.name + ".json")]
    if any(run.path.glob("occupancy.*.csv")):  # else the maps in the folder are somebody's own
        stale += run.volumes()
    kinds = {
        "weights.*.pkl": run.weights, "z.*.pkl": run.z, "poses.*.pkl": run.poses, "latent.*.pkl": run.latent_space,
        "p.*.pkl": run.shares, "codes.*.pkl": run.codes, "labels.*.pkl": run.labels, "occupancy.*.csv": run.occupancy,
        "margins.*.npz": run.margins,
    }  # fmt: skip
    for pattern, of in kinds.items():
        for found in run.path.glob(pattern):
            number = found.name.split(".")[1]
            if number.isdigit() and of(int(number)) == found:
                stale.append(found)
    for path in [*stale, run.index, run.config]:
        path.unlink(missing_ok=True)


def read_run_config(run: RunDir) -> dict[str, Any]:
    """config.yaml of a run.

    Raises InputError where there is none or it lacks what every run has.
    """
    if not run.exists():
        raise InputError(f"{run.path}: not a training run (it has no {run.config.name})")
    config = run.read_config()
    for name in ("method", "particles", "options", "training"):
        if name not in config:
            raise InputError(f"{run.config}: has no {name!r}: not the config.yaml of a cryosuite training")
    for name, kind in (("method", str), ("particles", str), ("options", dict), ("training", dict)):
        if not isinstance(config[name], kind):
            raise InputError(f"{run.config}: {name!r} is damaged: found {printable(config[name])}")
    return config


def train_options(config: dict[str, Any], **changed: Any) -> TrainOptions:
    """The TrainOptions of a config.yaml, with some of them changed (those the user typed again)."""
    stored = config["training"]
    known = {name: stored[name] for name in TrainOptions.__dataclass_fields__ if name in stored}
    return TrainOptions(**{**known, **changed})


def go_on_with(run: RunDir, config: dict[str, Any], **changed: Any) -> TrainOptions:
    """``train_options`` of a run that goes on; another end and other intervals are kept in its config.yaml, so that
    the next ``--resume`` goes on with them."""
    options = train_options(config, **changed)
    kept = {name: getattr(options, name) for name in KEPT if name in changed}
    if any(config["training"].get(name) != value for name, value in kept.items()) and process_rank() == 0:
        write_yaml(run.config, config | {"training": config["training"] | kept})
    return options


def with_particles(config: dict[str, Any], given: Path | str, run: RunDir) -> dict[str, Any]:
    """The config of a run that goes on with the particles the user names, which may have been moved since.

    Raises InputError for other particles than the run's.
    """
    now = Path(given).absolute()
    try:
        then = particles_path(config, run)
    except InputError:
        return config | {"particles": str(now), "particles_relative": os.path.relpath(now, run.path.absolute())}
    folders = [path.parent if path.name == DATASET else path for path in (now, then)]
    if not (now.exists() and os.path.samefile(*folders)):
        raise InputError(
            f"{given}: {run.path} was begun with {then}. Give these particles with --resume, or start a new run in "
            "another folder (-o)"
        )
    return config


def particles_path(config: dict[str, Any], run: RunDir) -> Path:
    """Where the particles of a run lie: the absolute path, or else relative to the run's folder.

    Raises InputError where neither exists any more.
    """
    absolute = Path(config["particles"])
    relative = run.path / str(config.get("particles_relative", config["particles"]))
    for path in (absolute, relative):
        if os.path.exists(path):
            return path
    raise InputError(f"{run.config}: the particles are neither at {absolute} nor at {relative}: were they moved?")
