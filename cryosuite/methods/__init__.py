"""One file per published system; ``load_run`` opens any trained run without knowing which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryosuite.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from cryosuite.data.particles import ParticleSet

# name in config.yaml -> module with load(run, epoch) -> LoadedRun
METHODS = {
    "hype": "cryosuite.methods.hype_run",
    "kraqen": "cryosuite.methods.kraqen_run",
    "deco": "cryosuite.methods.deco_run",
    "iev": "cryosuite.methods.iev_run",
    "fastar": "cryosuite.methods.fastar_run",
    "lvm": "cryosuite.methods.lvm_run",
    "lvm-pretrain": "cryosuite.methods.lvm_run",
}
CRYODRGN = "cryosuite.methods.cryodrgn_run"  # its config.yaml has no method


@dataclass
class LoadedRun:
    """One epoch of a trained run, ready to be looked at.

    z (N, zdim) float32, a row per particle of ``particles``; pixel_size in Angstrom; ``decode`` takes latents
    (k, zdim) and gives volumes (k, D, D, D) float32 in the grey values of the images; None: latents without volumes.
    particles: None for a run of cryoDRGN whose images are not there.
    """

    name: str
    particles: ParticleSet | None
    z: np.ndarray
    epoch: int
    pixel_size: float
    box_size: int
    decode: Callable[[np.ndarray], np.ndarray] | None
    config: dict[str, Any] = field(repr=False)


def load_run(run: Path | str, epoch: int | None = None, **options: Any) -> LoadedRun:
    """Open a run folder, ours or cryoDRGN's, at an epoch (None or -1: the last one with latents).

    ``options`` go to the method, e.g. ``volume_from`` of CryoHype; ``datadir``: folder of the image stacks, of any run.
    Raises InputError for a folder that holds no run, a missing epoch, and a method this version does not know.
    """
    from cryosuite.data.cryodrgn_run import is_cryodrgn_run
    from cryosuite.data.latents import last_whole_epoch
    from cryosuite.data.workdir import RunDir
    from cryosuite.training.runs import read_run_config

    folder = RunDir(Path(run))
    if is_cryodrgn_run(folder.path):
        return _within_memory(import_module(CRYODRGN).load(folder, epoch, **options))
    config = read_run_config(folder)
    if config["method"] not in METHODS:
        raise InputError(
            f"{folder.config}: method {config['method']!r} is not known; expected one of {', '.join(METHODS)}"
        )
    datadir = options.pop("datadir", None)
    if datadir is not None:
        config = {**config, "datadir": str(Path(datadir).absolute())}
    if options and config["method"] != "hype":
        raise InputError(
            f"{folder.path}: --volume-from chooses how a run of train-hype makes volumes; this is one of "
            f"{config['method']}: leave it out"
        )
    number = folder.epoch(epoch) if epoch not in (None, -1) else last_whole_epoch(folder)
    return _within_memory(import_module(METHODS[config["method"]]).load(folder, config, number, **options))


def _within_memory(loaded: LoadedRun) -> LoadedRun:
    """The run with a ``decode`` that goes on with half as many volumes at a time where memory runs out."""
    decode = loaded.decode
    if decode is None:
        return loaded
    from cryosuite.kernels.memory import Portions

    portions = Portions("volumes")

    def decode_in_portions(points: np.ndarray) -> np.ndarray:
        import numpy as np

        points = np.atleast_2d(points)
        parts = [found for _, found in portions.over(lambda rows: decode(points[rows]), len(points))]
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else decode(points)

    return replace(loaded, decode=decode_in_portions)
