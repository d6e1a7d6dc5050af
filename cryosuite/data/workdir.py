"""Where the files of a work directory, a run and an analysis lie: the one place that knows their names.

    particles.star --preprocess--> WorkDir --train-*--> RunDir --analyze--> RunDir.analysis(n)

A folder made by ``simulate`` is a work directory too and carries its ground truth (see truth.py).
Epochs in file names count from 1, labels and volumes from 0.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from cryosuite.data.analysis_dir import AnalysisDir, VolumeDir
from cryosuite.data.folder import File, Folder
from cryosuite.data.links import follow_config, follow_dataset
from cryosuite.errors import InputError

DATASET = "dataset.yaml"
CONFIG = "config.yaml"


class WorkDir(Folder):
    """A folder with one particle set in the form all commands take: stack, star, poses, CTF, noise, dataset.yaml."""

    particles = File("particles.mrcs")  # the image stack
    star = File("particles.star")  # the particle table in RELION 3.1 form; image names are relative to this folder
    poses = File("poses.pkl")  # rotations and shifts as cryoDRGN writes them
    ctf = File("ctf.pkl")  # CTF table as cryoDRGN writes it
    # what the poses and CTF do not say of each particle: a dict of arrays (N, ...). ``index`` (position in the
    # original set), ``optics_group`` (from 0), ``half`` and aberrations where known. Absent in folders of other
    # programs; then the star file is read.
    rows = File("rows.pkl")
    noise = File("noise.pkl")  # noise power per optics group and shell, (G, D//2 + 1) float32
    # what this folder is and where it came from; written last, so its presence says the folder is complete
    dataset = File(DATASET)
    labels = File("labels.pkl")  # ground-truth state of each particle (simulated sets only)
    mask = File("mask.mrc")  # ground-truth mask (simulated sets only)

    def volume(self, state: int) -> Path:
        """Ground-truth map of a state, counted from 0 (simulated sets only)."""
        return self.path / "volumes" / f"vol_{state:03d}.mrc"

    def exists(self) -> bool:
        """True when the folder holds a finished particle set."""
        return self.dataset.is_file()

    def read_dataset(self) -> dict[str, Any]:
        """The contents of dataset.yaml, its paths where the files lie now; InputError when there is none."""
        from cryosuite.formats.config import read_yaml

        if not self.exists():
            raise InputError(
                f"{self.path}: not a work directory (it has no {DATASET}). Give a folder made by "
                "`cryosuite preprocess` or `cryosuite simulate`, or a .star, .cs or .mrcs file."
            )
        return follow_dataset(read_yaml(self.dataset), self.path)


class RunDir(Folder):
    """A folder with one training run: config, weights, latents and poses per epoch, logs, checkpoint."""

    config = File(CONFIG)  # the options of the run and the method's name
    metrics = File("metrics.jsonl")  # one JSON object per line: loss and rates
    log = File("run.log")  # what was printed
    checkpoint = File("checkpoint.pt")  # everything needed to go on exactly where the run stopped
    start = File("start.pt")  # the first poses of particles without poses, or how far the search for them is
    zdim = File("zdim.json")  # what `--zdim auto` tried and what came of it
    encoder_images = File("encoder_images.u8")  # the particles as an encoder sees them; kept while the run trains
    # the averaged weights of a map network, half precision, as lvm-sharpen and train-lvm take them
    network = File("weights.safetensors")
    encoder = File("encoder.safetensors")  # a pre-trained map encoder, as ``train-lvm --init`` takes it
    card = File("model_card.md")  # what a network was trained on and how good it is, in words
    index = File("index.pkl")  # original index of each row of the latents, (N,) int64

    def margins(self, epoch: int) -> Path:
        """How certain the pose of each particle is, after an epoch."""
        return self.path / f"margins.{epoch}.npz"

    def weights(self, epoch: int) -> Path:
        """Averaged model weights after an epoch, counted from 1."""
        return self.path / f"weights.{epoch}.pkl"

    def z(self, epoch: int) -> Path:
        """Latents (N, zdim) after an epoch, counted from 1."""
        return self.path / f"z.{epoch}.pkl"

    def poses(self, epoch: int) -> Path:
        """Poses after an epoch, counted from 1."""
        return self.path / f"poses.{epoch}.pkl"

    def latent_space(self, epoch: int) -> Path:
        """How latents of an epoch were made and are turned back: principal axes, token bank (method's own format)."""
        return self.path / f"latent.{epoch}.pkl"

    def shares(self, epoch: int) -> Path:
        """Shares of the particles in codes or classes, sparse (see `reconstruct.weights`); methods with a codebook."""
        return self.path / f"p.{epoch}.pkl"

    def codes(self, epoch: int) -> Path:
        """The codebook (K, M) after an epoch."""
        return self.path / f"codes.{epoch}.pkl"

    def labels(self, epoch: int) -> Path:
        """Code with the largest share of each particle, counted from 0."""
        return self.path / f"labels.{epoch}.pkl"

    def occupancy(self, epoch: int) -> Path:
        """How many particles each code stands for, as CSV."""
        return self.path / f"occupancy.{epoch}.csv"

    def volume(self, k: int) -> Path:
        """The map of code k of the last epoch, counted from 0."""
        return self.path / f"vol_{k:03d}.mrc"

    def volumes(self) -> list[Path]:
        """The maps of codes that are present, in order of their numbers."""
        return VolumeDir(self.path).volumes()

    def epochs(self) -> list[int]:
        """Epochs with latents on disk, in order."""
        found = (re.fullmatch(r"z\.(\d+)\.pkl", entry.name) for entry in self.path.glob("z.*.pkl"))
        return sorted(int(match.group(1)) for match in found if match)

    def last_epoch(self) -> int:
        """The last epoch with latents on disk; InputError when there is none."""
        epochs = self.epochs()
        if not epochs and self.exists():
            raise InputError(f"{self.path}: no epoch is finished yet (no z.N.pkl, which the end of each epoch writes)")
        if not epochs:
            raise InputError(
                f"{self.path}: no z.N.pkl here. Give the folder of a training run (-o of `cryosuite train-hype`)."
            )
        return epochs[-1]

    def epoch(self, wanted: int | None) -> int:
        """The epoch asked for (None or -1: the last); InputError when its latents are absent."""
        if wanted is None or wanted == -1:
            return self.last_epoch()
        if not self.z(wanted).is_file():
            have = ", ".join(map(str, self.epochs())) or "none"
            raise InputError(f"{self.path}: epoch {wanted} has no {self.z(wanted).name}; epochs here: {have}.")
        return wanted

    def analysis(self, epoch: int) -> AnalysisDir:
        """The folder of an epoch's analysis; beside cryoDRGN's own, which has files of the same names."""
        folder = AnalysisDir(self.path / f"analyze.{epoch}")
        theirs = not folder.summary.is_file() and any(folder.path.glob("*.ipynb"))
        return AnalysisDir(self.path / f"analyze.{epoch}.cryosuite") if theirs else folder

    def exists(self) -> bool:
        """True when the folder holds a run."""
        return self.config.is_file()

    def read_config(self) -> dict[str, Any]:
        """The contents of config.yaml, its paths where the files lie now; InputError when the folder holds no run."""
        from cryosuite.formats.config import read_yaml

        if not self.exists():
            raise InputError(
                f"{self.path}: not a training run (it has no {CONFIG}). Give the -o folder of a train command."
            )
        return follow_config(read_yaml(self.config), self.path)


def resolve_link(link: str, folder: Path) -> Path:
    """A path written into a YAML file of ``folder``: absolute, relative to that folder, or to where we are."""
    path = Path(link)
    if path.is_absolute() or not os.path.exists(folder / path):  # False, too, for names that no file can have
        return path
    return folder / path
