"""A training folder of cryoDRGN (train_vae, train_dec, abinit): its particles and latents, and what its config says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cryosuite.data.latents import last_latents
from cryosuite.data.open import open_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.checks import check_rotations, check_shifts, printable
from cryosuite.formats.config import read_yaml
from cryosuite.formats.pickles import read_poses, safe_load

FILES = ("particles", "poses", "ctf", "ind")


@dataclass
class CryodrgnRun:
    """Particles, latent means (N, zdim) and the epoch they were read from.

    config: as read. norm: (mean, sd) its images were normalised by. poses_found: poses are those the run found.
    """

    particles: ParticleSet
    z: np.ndarray
    epoch: int
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    poses_found: bool = False


def config_file(folder: Path) -> Path | None:
    """config.yaml, or the config.pkl of versions before 2.0; None where there is neither."""
    for path in (RunDir(folder).config, Path(folder) / "config.pkl"):
        if path.is_file():
            return path
    return None


def is_cryodrgn_run(folder: Path) -> bool:
    """True when a folder's config is one of cryoDRGN's."""
    path = config_file(folder)
    if path is None:
        return False
    if path.suffix == ".pkl":
        return True
    found = read_yaml(path)
    return isinstance(found.get("dataset_args"), dict) and "method" not in found


def read_cryodrgn_config(folder: Path) -> dict[str, Any]:
    """The config of a run, through the safe readers.

    Raises:
        InputError: no config, a hostile one, or one without ``dataset_args``.
    """
    path = config_file(folder)
    if path is None:
        raise InputError(f"{folder}: has neither config.yaml nor config.pkl: not a run of cryoDRGN")
    # config.pkl: a second pickle holds the date and the command, which nothing here asks for
    found = read_yaml(path) if path.suffix != ".pkl" else safe_load(path, only_first=True)[0]
    if not isinstance(found, dict) or not isinstance(found.get("dataset_args"), Mapping):
        raise InputError(f"{path}: has no `dataset_args`: not the config of a cryoDRGN run")
    return found


def open_cryodrgn_run(
    folder: Path,
    epoch: int | None = None,
    pixel_size: float | None = None,
    datadir: Path | None = None,
    need_poses: bool = True,
) -> CryodrgnRun:
    """Open the particles a cryoDRGN run was trained on, with their latents.

    Its config often names paths of another machine: every file is looked for as written, relative to the folder, in
    ``datadir``, and beside the folder, also by its last names alone. cryoDRGN counts saved epochs from 1 in recent
    versions and from 0 in old ones: the number is that of the file z.N.pkl.

    Raises:
        InputError: files that are missing, with all places looked at; latents of another number of particles.
    """
    run, folder = RunDir(folder), Path(folder)
    config = read_cryodrgn_config(folder)
    given: Mapping[str, Any] = config["dataset_args"]
    wanted, z = last_latents(run, epoch)
    named = {name: _located(name, given.get(name), folder, datadir) for name in FILES}
    where = config_file(folder)
    if named["particles"] is None:
        raise InputError(f"{where}: names no particles. Use: cryosuite polish PARTICLES --z Z.pkl")
    found = _found_poses(folder, wanted, config)
    needed = need_poses and found is None
    if needed and named["poses"] is None and named["particles"].suffix not in (".star", ".cs"):
        raise InputError(f"{where}: names no poses. Use: cryosuite polish PARTICLES --poses poses.pkl --z Z.pkl")
    # its CTF is minus ours, so inverted data with its CTF are data as they are with ours
    sign = 1 if given.get("invert_data", True) else -1
    particles = open_particles(
        named["particles"], poses=named["poses"], ctf=named["ctf"], ind=named["ind"],
        datadir=_data_folder(given.get("datadir"), folder, datadir), pixel_size=pixel_size, need_poses=needed,
        need_ctf=need_poses and named["ctf"] is not None, sign=sign,
    )  # fmt: skip
    if len(z) != len(particles):
        raise InputError(f"{run.z(wanted)}: {len(z)} latents for {len(particles)} particles of {named['particles']}")
    if found is not None:
        try:
            particles = _with_poses(particles, found, config)
        except InputError as error:  # latents are worth looking at without them
            if need_poses:
                raise
            notice(f"the poses that the run found are left out: {error}")
            found = None
    return CryodrgnRun(particles, z, wanted, config, found is not None)


def _located(name: str, value: Any, folder: Path, datadir: Path | None) -> Path | None:
    """The file that an entry of the config names; InputError listing the places where it was looked for."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise InputError(
            f"{config_file(folder)}: dataset_args.{name} is {printable(value)}, expected the name of a file"
        )
    written = Path(value)
    tails = [Path(*written.parts[-count:]) for count in range(min(3, len(written.parts)), 0, -1) if written.name]
    tails = [tail for tail in tails if not tail.is_absolute() and ".." not in tail.parts]
    bases = [*([datadir] if datadir is not None else []), folder, folder.absolute().parent]
    places = [*([folder / written, written] if not written.is_absolute() else [written])]
    places += [base / tail for base in bases for tail in tails]
    for place in places:
        if os.path.isfile(place):  # False also for folders that may not be looked into
            if place != written and written.is_absolute():
                notice(f"{config_file(folder)}: {printable(value)} is not there: {place} is used as {name}")
            return place
    looked = ", ".join(dict.fromkeys(map(str, places)))
    raise InputError(
        f"{config_file(folder)}: its {name} {printable(value)} are not there. Looked for: {looked}. Say where they "
        "are: --datadir FOLDER."
    )


def _data_folder(value: Any, folder: Path, datadir: Path | None) -> Path | None:
    """Where the stacks lie: as the user says, else as the config says where that folder exists."""
    if datadir is not None or not isinstance(value, str):
        return datadir
    return next((place for place in (folder / value, Path(value)) if os.path.isdir(place)), None)


def _found_poses(folder: Path, epoch: int, config: Mapping[str, Any]) -> Path | None:
    """The poses that the run found or refined itself (pose.N.pkl, pose.pkl), where it did."""
    args = config["dataset_args"]
    if args.get("poses") is not None and not args.get("do_pose_sgd"):
        return None
    return next((path for path in (folder / f"pose.{epoch}.pkl", folder / "pose.pkl") if path.is_file()), None)


def _with_poses(particles: ParticleSet, path: Path, config: Mapping[str, Any]) -> ParticleSet:
    """The particles with the poses the run found, their shifts as a fraction of the box.

    All its programs slice at (kx, ky, 0) R and add t to centre the particle, as we do. ``abinit`` writes t in pixels;
    the older ab initio programs write pixels over D + 1, the side of their lattice.
    """
    rotation, shift = read_poses(path, checked=False)
    box, given = particles.box_size, config["dataset_args"]
    if "data_norm_std" in config:  # abinit
        shift = shift / np.float32(box)
    elif given.get("poses") is None:
        shift = shift * np.float32((box + 1) / box)
    check_rotations(rotation, path)
    check_shifts(shift, path)
    if len(rotation) == particles.n_source != len(particles):
        rotation, shift = rotation[particles.index], shift[particles.index]
    if len(rotation) != len(particles):
        raise InputError(f"{path}: {len(rotation)} poses for {len(particles)} particles")
    return replace(particles, rotation=rotation, shift=shift, poses_from=path)
