"""A run of CryoKRAQEN on disk: from particles to merged codes, maps and tables, and how it is opened again."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryosuite.data.open import open_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.data.spectra import Spectra
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.atomic import write_text
from cryosuite.formats.config import read_yaml, write_yaml
from cryosuite.formats.mrc import read_map, write_map
from cryosuite.formats.pickles import read_latent, safe_load, write_pickle
from cryosuite.kernels import shells
from cryosuite.methods import LoadedRun
from cryosuite.methods.kraqen import Kraqen, describe
from cryosuite.methods.kraqen_codes import collapsed, embed, finish, merge
from cryosuite.methods.kraqen_cross import engine_for
from cryosuite.methods.kraqen_model import KraqenModel
from cryosuite.methods.kraqen_options import KraqenOptions
from cryosuite.methods.kraqen_voxel import VoxelEM, VoxelResult
from cryosuite.reconstruct.backproject import common_pixel_size
from cryosuite.reconstruct.class_sums import ClassSums, accumulate, class_groups
from cryosuite.reconstruct.masks import half_map_mask
from cryosuite.reconstruct.solve import solve
from cryosuite.reconstruct.weights import ClassWeights
from cryosuite.training.checkpoint import load_into, load_state
from cryosuite.training.launch import (
    join_processes,
    meet,
    process_rank,
    resolve_accelerator,
    training_processes,
    was_restarted,
)
from cryosuite.training.loop import fit
from cryosuite.training.options import TrainOptions
from cryosuite.training.poses import begin_with_refined_shifts, with_poses
from cryosuite.training.runs import particles_path
from cryosuite.training.signals import StopNow, exit_code, left_at_once, requeue_job

OPENED_WITH = ("poses", "ctf", "ind", "datadir", "pixel_size", "sign")
NEIGHBOURS = 25  # whose codes are averaged where a continuous latent is turned into a volume


@dataclass
class Code:
    """One row of the occupancy table.

    particles: sum of shares; labelled: particles whose largest share this is; A at FSC .143 of the half maps (NaN
    where a half set is empty; a little too good, as images chose their codes by maps of the other half set).
    """

    number: int
    particles: float
    labelled: int
    share: float
    resolution: float


@dataclass
class Trained:
    """What a training gives back; ``codes`` is empty when it was stopped before the end."""

    epoch: int
    stopped: str = ""
    exit_code: int = 0
    codes: tuple[Code, ...] = ()
    merged: int = 0  # codes that were twins of another
    warning: str = ""


def open_for(path: Path, how: dict[str, Any]) -> ParticleSet:
    """The particle set of a training, opened as its config says."""
    return open_particles(path, **{name: how.get(name) for name in OPENED_WITH})


def prepare(particles: ParticleSet, options: KraqenOptions, training: TrainOptions) -> VoxelEM | None:
    """Everything that can be refused is refused here, before a folder is touched; the engine of the voxel field.

    For the voxel field the processes that torchrun or srun started, or that the options ask for, come together here.

    Raises:
        InputError: no poses, no images that say anything, options that do not fit the particles.
    """
    if particles.rotation is None:
        raise InputError(f"{particles.path}: train-kraqen needs poses; none are given (--poses poses.pkl)")
    if training.seed < 0:
        raise InputError(f"--seed {training.seed}: expected 0 or more")
    if options.field != "voxel":
        common_pixel_size(particles.pixel_size)
        return None
    device = resolve_accelerator(training.accelerator)
    processes = join_processes(training.devices, training.num_nodes, device)
    return processes.each(lambda: engine_for(particles, options, training.seed, device, processes=processes))


def train(
    particles: ParticleSet,
    run: RunDir,
    options: KraqenOptions,
    training: TrainOptions,
    resume: bool | str = False,
    engine: VoxelEM | None = None,
) -> Trained:
    """Train any field, finish in closed form, merge twins and write everything.

    Args:
        engine: what `prepare` gave; made here where there is none.

    Several processes share all of the work; the first one writes, and all come back with the same.
    """
    engine = prepare(particles, options, training) if engine is None else engine
    if engine is None:
        found = _train_network(particles, run, options, training, resume)
    else:
        found = _train_voxels(particles, run, options, training, resume, engine)
    if found.stopped and training.requeue and process_rank() == 0:
        requeue_job(found.stopped)
    return found


def _train_voxels(
    particles: ParticleSet,
    run: RunDir,
    options: KraqenOptions,
    training: TrainOptions,
    resume: bool | str,
    engine: VoxelEM,
) -> Trained:
    processes = engine.processes

    def begin() -> bool:
        run.path.mkdir(parents=True, exist_ok=True)
        return run.checkpoint.exists() and (bool(resume) or was_restarted())

    found = engine.run(run=run, resume=processes.first_does(begin), max_minutes=training.max_minutes)
    if found.stopped:
        return Trained(len(found.history), found.stopped, found.exit_code)
    return _finish(particles, run, options.iterations, found, None, options)


def _train_network(
    particles: ParticleSet, run: RunDir, options: KraqenOptions, training: TrainOptions, resume: bool | str
) -> Trained:
    resume = run.checkpoint.exists() and (bool(resume) or was_restarted())
    wanted = {"refine_shifts": options.refine_shifts}
    particles = begin_with_refined_shifts(particles, run, wanted, meet(training))
    fitted = fit(Kraqen(options), particles, run, replace(training, requeue=False), resume=resume)
    if fitted.stopped:
        return Trained(fitted.epochs_done, fitted.stopped, fitted.exit_code)
    p, z = describe(fitted.model, particles, precision=training.precision)
    device = resolve_accelerator(training.accelerator)
    found = finish(particles, p, options, training.seed, device, training_processes())
    if found.stopped:
        return Trained(fitted.epochs_done, found.stopped, found.exit_code)
    codes = fitted.model.codes.detach().cpu().numpy().astype(np.float32)
    return _finish(particles, run, training.epochs, found, (z, codes), options)


def _finish(
    particles: ParticleSet,
    run: RunDir,
    epoch: int,
    found: VoxelResult,
    latents: tuple[np.ndarray, np.ndarray] | None,
    options: KraqenOptions,
) -> Trained:
    """Merge twins, make the maps of the codes at full box, write the run's files."""
    before, processes = found.codes.shape[0], found.engine.processes
    try:
        with left_at_once():
            merged, groups = merge(found, rule=options.merge)
            warning = collapsed(merged.usage, merged.p)
            particles = merged.engine.particles  # with the shifts they were given
            if latents is None:
                z, codes = embed(merged)
            else:
                z, codes = latents[0], _grouped(latents[1], groups, found.usage)
            table = write_maps(particles, merged.p, run, processes)
            moved = merged.engine.refined_shift is not None
            processes.first_does(lambda: _write(particles, run, epoch, merged.p, (z, codes), table, moved))
    except StopNow as stop:  # the training itself is in its checkpoint
        return Trained(epoch, str(stop), exit_code(str(stop)))
    return Trained(epoch, codes=tuple(table), merged=before - merged.codes.shape[0], warning=warning or "")


def _write(
    particles: ParticleSet,
    run: RunDir,
    epoch: int,
    p: ClassWeights,
    latents: tuple[np.ndarray, np.ndarray],
    table: list[Code],
    moved: bool,
) -> None:
    """The files of an epoch other than maps; ``moved``: the shifts are the run's own."""
    write_text(run.occupancy(epoch), occupancy_csv(table))
    write_pickle(run.shares(epoch), p.to_arrays())
    write_pickle(run.labels(epoch), p.labels())
    write_pickle(run.codes(epoch), latents[1])
    shift = np.zeros((len(particles), 2), np.float32) if particles.shift is None else particles.shift
    write_pickle(run.poses(epoch), (particles.rotation, shift))
    write_pickle(run.index, np.asarray(particles.index, np.int64))
    if moved and run.exists():
        write_yaml(run.config, read_yaml(run.config) | {"poses_found": True})
    write_pickle(run.z(epoch), latents[0])  # last: its presence says that the epoch is complete


def _grouped(codes: np.ndarray, groups: np.ndarray, usage: np.ndarray) -> np.ndarray:
    """Codes (K, M) of a network averaged over the groups they were merged into, weighted by use."""
    weight = np.maximum(np.asarray(usage, np.float64), 1e-9)
    out = np.zeros((int(groups.max()) + 1, codes.shape[1]))
    np.add.at(out, groups[groups >= 0], (codes * weight[:, None])[groups >= 0])
    return (out / np.bincount(groups[groups >= 0], weight[groups >= 0])[:, None]).astype(np.float32)


def write_maps(particles: ParticleSet, p: ClassWeights, run: RunDir, processes: Processes = ALONE) -> list[Code]:
    """vol_k.mrc of every code at the particles' own box and the occupancy table.

    As many codes at a time as their sums fit the memory: nothing waits on disk, and an image is read once for each
    group of codes that it has a share in. The map of a code without images is zero.
    """
    used = np.flatnonzero(p.usage() > 0)
    if not len(used):
        raise InputError(f"{run.path}: no particle has a share in any code: are all images broken?")
    labelled = np.bincount(p.labels()[p.labels() >= 0], minlength=p.n_classes)
    total = max(float(p.usage().sum()), 1e-30)

    def write(sums: ClassSums, codes: list[int]) -> list[Code]:
        rows: list[Code] = []
        for at, k in enumerate(codes):
            joint = solve(sums.joint(at))
            write_map(run.volume(k), joint.numpy(), sums.pixel_size)
            resolution = float("nan")
            if (sums.counts[at] > 0).all():
                a, b = (solve(sums.load(at, h)) for h in (0, 1))
                mask = half_map_mask(joint, shells.fsc(a, b))
                resolution = shells.resolution(shells.fsc(a, b, mask), 0.143, joint.shape[-1], sums.pixel_size)
            count = float(sums.counts[at].sum())
            rows.append(Code(k, count, int(labelled[k]), count / total, resolution))
        return rows

    def write_empty() -> list[Code]:
        nothing, pixel_size = np.zeros((particles.box_size,) * 3, np.float32), common_pixel_size(particles.pixel_size)
        empty = [int(k) for k in np.setdiff1d(np.arange(p.n_classes), used)]
        for k in empty:
            write_map(run.volume(k), nothing, pixel_size)
        return [Code(k, 0.0, 0, 0.0, float("nan")) for k in empty]

    processes.first_does(lambda: [old.unlink() for old in run.volumes()])
    table: list[Code] = processes.first_does(write_empty)
    groups = [used[group] for group in class_groups(len(used), particles.box_size)]
    for group in groups:
        label = "maps of the codes" if len(groups) == 1 else f"maps of codes {group[0]} to {group[-1]}"
        with accumulate(particles, p.columns(group), progress=label, processes=processes) as sums:
            table += processes.first_does(lambda sums=sums, codes=group.tolist(): write(sums, codes))
    return sorted(table, key=lambda code: code.number)


def occupancy_csv(rows: list[Code]) -> str:
    """The occupancy table as text."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["code_from_0", "particles", "labelled", "share", "resolution_0.143_A"])
    for row in rows:
        resolution = "" if np.isnan(row.resolution) else f"{row.resolution:.3f}"
        writer.writerow([row.number, f"{row.particles:.2f}", row.labelled, f"{row.share:.5f}", resolution])
    return out.getvalue()


# --- opening a run again ---------------------------------------------------------------------------------------------


def load(run: RunDir, config: dict[str, Any], epoch: int) -> LoadedRun:
    """Open a run.

    Mixtures: the volume at a latent is that of the nearest particle, i.e. the codes' maps weighted by its shares.
    Continuous sets (network fields): the network's linear read-out at the mean of the nearest particles' codes.
    """
    options = KraqenOptions.from_dict(config["options"])
    particles = open_for(particles_path(config, run), config)
    z = read_latent(run.z(epoch), finite=False)[0]
    if len(z) != len(particles):
        raise InputError(f"{run.z(epoch)}: {len(z)} latents for {len(particles)} particles: did the set change?")
    if config.get("poses_found"):
        particles = with_poses(particles, run, epoch)
    decode = _from_maps(run, epoch, z) if options.field == "voxel" else _from_network(run, epoch, z, options, particles)
    pixel_size = common_pixel_size(particles.pixel_size)
    return LoadedRun("kraqen", particles, z, epoch, pixel_size, particles.box_size, decode, config)


def _near(z: np.ndarray, count: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function points (k, M) -> rows (k, count) of the nearest finite latents."""
    from scipy.spatial import cKDTree

    rows = np.flatnonzero(np.isfinite(z).all(1))
    tree, count = cKDTree(z[rows].astype(np.float64)), min(count, len(rows))

    def near(points: np.ndarray) -> np.ndarray:
        found = tree.query(np.atleast_2d(np.asarray(points, np.float64)), k=count)[1]
        return rows[found.reshape(-1, count)]

    return near


def _from_maps(run: RunDir, epoch: int, z: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Decoder of the voxel field. The maps are read when first asked for; they are those of the last epoch."""
    p = read_shares(run, epoch, len(z))
    near = _near(z, 1)

    @cache
    def maps() -> np.ndarray:
        if epoch != run.last_epoch():
            notice(f"the maps in {run.path} are those of epoch {run.last_epoch()}, not of epoch {epoch}")
        return np.stack([read_map(run.volume(k)).data for k in range(p.n_classes)])

    def decode(points: np.ndarray) -> np.ndarray:
        shares = p.rows(near(points)[:, 0]).dense()
        return np.tensordot(shares, maps(), 1).astype(np.float32)

    return decode


def read_shares(run: RunDir, epoch: int, count: int) -> ClassWeights:
    """p.N.pkl of a run; InputError where it is missing or holds another number of particles."""
    path = run.shares(epoch)
    p = ClassWeights.from_arrays(safe_load(path)[0], str(path))
    if len(p) != count:
        raise InputError(f"{path}: shares of {len(p)} particles, the run has {count}: did the set change?")
    return p


def _from_network(
    run: RunDir, epoch: int, z: np.ndarray, options: KraqenOptions, particles: ParticleSet
) -> Callable[[np.ndarray], np.ndarray]:
    """Decoder of a network field."""
    state = load_state(run.weights(epoch), "weights")["model_state_dict"]
    noise = state.get("noise_amplitude")
    if noise is None or noise.shape[1] != particles.box_size // 2 + 1:
        raise InputError(f"{run.weights(epoch)}: not made for particles of box {particles.box_size} ({particles.path})")
    method = Kraqen(options)
    nothing = Spectra(torch.ones_like(noise), torch.ones_like(noise[0]))
    pixel_size = common_pixel_size(particles.pixel_size)
    model = KraqenModel(particles.box_size, options, nothing, particles.ctf_premultiplied, len(particles), pixel_size)
    load_into(model, state, run.weights(epoch))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.eval().to(device)
    near = _near(z, NEIGHBOURS)

    def decode(points: np.ndarray) -> np.ndarray:
        smooth = torch.from_numpy(z[near(points)].mean(1).astype(np.float32)).to(device)
        with torch.no_grad():
            return method.decode(model, smooth).float().cpu().numpy()

    return decode
