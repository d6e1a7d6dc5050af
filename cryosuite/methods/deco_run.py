"""A run of CryoDECO on disk: start, training, the files of an epoch, and how it is opened again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryosuite.data.encoder_weights import shipped_encoder
from cryosuite.data.open import open_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.data.spectra import Spectra, measure_spectra
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.atomic import atomic_path
from cryosuite.formats.pickles import read_latent, write_pickle
from cryosuite.kernels.rotations import six_d_to_matrix
from cryosuite.methods import LoadedRun
from cryosuite.methods.deco import Deco
from cryosuite.methods.deco_auto import Interrupted, check_auto, choose_zdim
from cryosuite.methods.deco_encoder import encoder_of_state, open_encoder
from cryosuite.methods.deco_finish import ClassRow, finish
from cryosuite.methods.deco_model import DecoModel, PoseTable
from cryosuite.methods.deco_options import FROM_NOTHING, RANDOM, DecoOptions, Preset
from cryosuite.methods.deco_start import SAVE_SECONDS, options_of, start_margins, start_record, voxel_start
from cryosuite.reconstruct.abinitio import AbInitio
from cryosuite.reconstruct.backproject import common_pixel_size
from cryosuite.training.checkpoint import load_into, load_state
from cryosuite.training.launch import meet, process_rank, resolve_accelerator, training_processes
from cryosuite.training.loop import fit
from cryosuite.training.options import TrainOptions, plain
from cryosuite.training.poses import with_poses
from cryosuite.training.runs import particles_path, read_run_config
from cryosuite.training.signals import StopNow, exit_code, left_at_once, requeue_job

OPENED_WITH = ("poses", "ctf", "ind", "datadir", "pixel_size", "sign")
LITTLE_SIGNAL = 4.0  # standard errors of the power above the noise


@dataclass
class Trained:
    """What a run gives back; ``classes`` is empty when it was stopped before the end."""

    epoch: int
    stopped: str = ""
    exit_code: int = 0
    classes: tuple[ClassRow, ...] = ()


def open_for(path: Path, how: dict[str, Any]) -> ParticleSet:
    """The particle set of a training, opened as its config says; it may have no poses."""
    return open_particles(path, **{name: how.get(name) for name in OPENED_WITH}, need_poses=False)


def without_poses(particles: ParticleSet) -> ParticleSet:
    """The particles as if nothing were known of their poses."""
    return replace(particles, rotation=None, shift=None)


def check(particles: ParticleSet, options: DecoOptions, training: TrainOptions) -> None:
    """Everything that can be refused is refused here, before a folder is touched.

    Raises:
        InputError: no CTF, too few particles, weights that do not fit, a latent longer than the set.
    """
    if options.poses == "none":
        particles = without_poses(particles)
    Deco(options).check(particles)
    if options.k > len(particles) // 2:
        raise InputError(f"--k {options.k}: more classes than {len(particles)} particles can fill")
    if options.finetune != "none" and not options.zdim_auto and options.zdim >= len(particles):
        raise InputError(
            f"--zdim {options.zdim}: a latent as long as the set is large ({len(particles)} particles) can hold every "
            "image by heart: give a smaller one"
        )
    if options.poses == "none" and options.start == "voxel":
        AbInitio(particles, options_of(options, training.seed))
    if options.poses == "none" and options.start == "network":
        _check_network_start(options, training.epochs * len(particles))
    if options.zdim_auto and options.finetune == "none":
        raise InputError(
            "--zdim auto: with --finetune none the latent is as long as the encoder's feature. Leave it out"
        )
    if options.zdim_auto:
        check_auto(particles)
    open_encoder(options, particles)


def _check_network_start(options: DecoOptions, images: int) -> None:
    """Raises InputError where the network start would search for no pose; ``images``: that the training sees."""
    if options.zdim_auto:
        raise InputError("--zdim auto: needs poses before the training: not with --start network. Give a number")
    if options.search_epochs < 1:
        raise InputError("--hps-epochs 0: no pose would be searched for: with --start network at least 1 is needed")
    if options.warmup_images >= images:
        raise InputError(
            f"--warmup-images {options.warmup_images}: the training sees {images:,} images in all, so that no pose "
            "would be searched for. Give fewer, or more epochs (-n)"
        )


def available_encoder(chosen: Preset, typed_lr: float | None = None) -> Preset:
    """The preset with an encoder that is installed: where its own is not, the small one of the package, else none.

    Says what was taken instead. ``typed_lr``: the encoder's learning rate where the user gave it.
    """
    wanted = chosen.options.encoder
    for encoder in dict.fromkeys((wanted, "iev-tiny", RANDOM)):
        try:
            if encoder != RANDOM:
                shipped_encoder(encoder)
        except InputError:
            continue
        if encoder != wanted:
            notice(f"the weights {wanted} are not installed: --encoder {encoder} is used (or give a file of weights)")
        learning = FROM_NOTHING if encoder == RANDOM and typed_lr is None else {}
        return replace(chosen, options=chosen.options.changed(encoder=encoder, **learning))
    return chosen


def can_resume(run: RunDir) -> bool:
    """Whether the folder holds a run of deco-classify that can go on: in start, choice of --zdim or training."""
    if not any(path.exists() for path in (run.checkpoint, run.start, run.zdim)) or not run.exists():
        return False
    return read_run_config(run)["method"] == "deco"


def train(
    particles: ParticleSet,
    run: RunDir,
    options: DecoOptions,
    training: TrainOptions,
    resume: bool = False,
    files: bool = True,
) -> Trained:
    """Find first poses (where none are known), train, classify, and write everything.

    Several processes share all of the work; the first one writes, and all come back with the same.
    """
    began = time.monotonic()
    if options.poses == "none":
        particles = without_poses(particles)
    warn_of_noise(particles)
    run.path.mkdir(parents=True, exist_ok=True)
    if options.poses == "none" and options.start == "voxel":
        particles, stopped = _started(particles, run, options, training)
        if stopped:
            return _stopped(stopped, training)
    if options.zdim_auto:
        try:
            options = options.changed(
                zdim=choose_zdim(particles, run, options, _left(training, began)), zdim_auto=False
            )
        except Interrupted as stop:
            return _stopped(str(stop), training)
    training = _left(training, began)
    accelerator = resolve_accelerator(training.accelerator)
    method = Deco(options, run.encoder_images, training.epochs, training.precision, accelerator)
    fitted = fit(
        method, particles, run, training, resume="auto" if resume else False,
        on_epoch=epoch_writer(method, particles, run, options),
    )  # fmt: skip
    if fitted.stopped:
        return Trained(fitted.epochs_done, fitted.stopped, fitted.exit_code)
    processes = training_processes()
    epoch = processes.first_does(run.last_epoch)
    now = {"training": plain(training)}  # --accelerator may be another one than the run began with
    loaded = processes.each(lambda: load(run, read_run_config(run) | now, epoch))
    try:
        with left_at_once():
            classes = finish(run, loaded, options, training.seed, files, processes, accelerator)
    except StopNow as stop:  # the training itself is in its checkpoint
        return _stopped(str(stop), training, epoch)
    for path in (run.encoder_images, run.encoder_images.with_name(run.encoder_images.name + ".json")):
        if processes.first:
            path.unlink(missing_ok=True)
    return Trained(epoch, classes=tuple(classes))


def _left(training: TrainOptions, began: float) -> TrainOptions:
    """The options with the minutes that are left of a limit."""
    minutes = training.max_minutes
    if minutes is None:
        return training
    return replace(training, max_minutes=max(minutes - (time.monotonic() - began) / 60, 0.01))


def _stopped(reason: str, training: TrainOptions, epochs: int = 0) -> Trained:
    """What comes back when a signal came before or after the training; the job is put back where that is asked for."""
    if training.requeue and process_rank() == 0:
        requeue_job(reason)
    return Trained(epochs, reason, exit_code(reason))


def _started(
    particles: ParticleSet, run: RunDir, options: DecoOptions, training: TrainOptions
) -> tuple[ParticleSet, str]:
    """The voxel start, made by all processes of the training together."""
    processes = meet(training)
    device = resolve_accelerator(training.accelerator)
    every = min(SAVE_SECONDS, 60 * training.checkpoint_every_minutes)
    return voxel_start(
        particles, run, options, training.seed, device, training.max_minutes, every=every, processes=processes
    )


def warn_of_noise(particles: ParticleSet) -> float:
    """Say so where the images show no signal above the noise; returns its strength in standard errors."""
    spectra = measure_spectra(particles, True)
    half = particles.box_size // 2
    shells = np.arange(1, half + 1)
    images = min(len(particles), 2000)
    ratio = (spectra.signal / spectra.noise.mean(0))[1:].double().numpy()
    points = np.pi * shells  # of a half disc
    # a coefficient's noise power scatters as much as its mean; `measure_spectra` never gives less than 0.003
    strength = float(((ratio - 0.006).clip(min=0) * np.sqrt(points * images)).max() * 0.5)
    if strength < LITTLE_SIGNAL:
        notice(
            f"{particles.path}: the images show nothing above the noise ({strength:.1f} standard errors): whatever is "
            "found in them is not to be trusted. Is this stack empty, or its noise spectrum wrong (cryosuite check)?"
        )
    return strength


def epoch_writer(
    method: Deco, particles: ParticleSet, run: RunDir, options: DecoOptions
) -> Callable[[int, DecoModel], None]:
    """What ``fit`` calls after an epoch: one clean pass for z.N.pkl; poses.N.pkl, margins.N.npz and index.pkl."""

    def write(epoch: int, model: DecoModel) -> None:
        z = method.embed(model, len(particles))
        if process_rank() != 0:
            return
        rotation, shift, margin = poses_of(model, particles, run, options)
        write_pickle(run.poses(epoch), (rotation, shift))
        write_pickle(run.index, np.asarray(particles.index, np.int64))
        if margin is not None:
            with atomic_path(run.margins(epoch), suffix=".npz") as temporary:
                np.savez(temporary, margin=margin, index=np.asarray(particles.index, np.int64))
        write_pickle(run.z(epoch), z)  # last: its presence says that the epoch is complete

    return write


def poses_of(
    model: DecoModel, particles: ParticleSet, run: RunDir, options: DecoOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Rotations, shifts (fraction of the box) and, where they were searched for, margins."""
    if model.table is None:
        shift = np.zeros((len(particles), 2), np.float32) if particles.shift is None else particles.shift
        return particles.rotation, shift, None
    with torch.no_grad():
        rotation = six_d_to_matrix(model.table.six).float().cpu().numpy()
    shift, margin = model.table.shift.detach().float().cpu().numpy(), model.table.margin.cpu().numpy()
    if options.poses == "none" and options.start == "voxel":
        first = start_margins(start_record(run)).numpy()
        margin = np.where(np.isnan(margin), first, margin)
    return rotation, shift, None if np.isnan(margin).all() else margin


# --- opening a run again ---------------------------------------------------------------------------------------------


def load(run: RunDir, config: dict[str, Any], epoch: int) -> LoadedRun:
    """Open an epoch of a run; volumes come from its network, poses are those of that epoch."""
    options = DecoOptions.from_dict(config["options"])
    particles = with_poses(open_for(particles_path(config, run), config), run, epoch)
    state = load_state(run.weights(epoch), "weights")["model_state_dict"]
    if "head.1.weight" in state:  # --zdim auto is not settled in config.yaml
        options = options.changed(zdim=len(state["head.1.weight"]), zdim_auto=False)
    noise = state.get("noise_amplitude")
    if noise is None or noise.shape[1] != particles.box_size // 2 + 1:
        raise InputError(f"{run.weights(epoch)}: not made for particles of box {particles.box_size} ({particles.path})")
    nothing = Spectra(torch.ones_like(noise), torch.ones_like(noise[0]))
    model = DecoModel(particles.box_size, options, nothing, encoder_of_state(state), particles.ctf_premultiplied)
    if "table.six" in state:
        model.table = PoseTable(
            torch.eye(3).expand(len(state["table.six"]), 3, 3), torch.zeros_like(state["table.shift"])
        )
    load_into(model, state, run.weights(epoch))
    no_gpu = config["training"].get("accelerator") == "cpu" or not torch.cuda.is_available()
    model = model.eval().to("cpu" if no_gpu else "cuda")
    z = read_latent(run.z(epoch), finite=False)[0]
    if len(z) != len(particles):
        raise InputError(f"{run.z(epoch)}: {len(z)} latents for {len(particles)} particles: did the set change?")

    def decode(points: np.ndarray) -> np.ndarray:
        return model.volumes(torch.from_numpy(np.atleast_2d(np.asarray(points, np.float32)))).cpu().numpy()

    pixel_size = common_pixel_size(particles.pixel_size)
    return LoadedRun("deco", particles, z, epoch, pixel_size, particles.box_size, decode, config)
