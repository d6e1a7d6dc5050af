"""What ``select`` and ``export`` start from: a run, an analysis, a work folder or a particle file, opened alike."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cryosuite.data.cryodrgn_run import is_cryodrgn_run, open_cryodrgn_run
from cryosuite.data.latents import fingerprint, last_latents
from cryosuite.data.open import open_particles, open_run_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.data.typed import typed
from cryosuite.data.workdir import AnalysisDir, RunDir, VolumeDir, WorkDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.checks import read_bytes
from cryosuite.formats.config import read_yaml
from cryosuite.formats.pickles import read_labels


@dataclass
class Source:
    """Particles and what is known of them; None where there is nothing of the kind.

    Attributes:
        z: (N, zdim) float32 latents of ``epoch``, a row per particle.
        analysis: of that epoch. labels: (N,) int64 from 0, -1 for none, read from ``labels_from``.
        run: the run's folder. poses_found: the run's own poses replace those of the source file.
    """

    particles: ParticleSet
    z: np.ndarray | None = None
    epoch: int | None = None
    run: RunDir | None = None
    analysis: AnalysisDir | None = None
    labels: np.ndarray | None = None
    labels_from: Path | None = None
    poses_found: bool = False
    labels_problem: InputError | None = None  # of the labels of the analysis: said when they are needed

    @property
    def name(self) -> str:
        """The run's name, or the file's."""
        path = self.run.path if self.run is not None else self.particles.path
        return path.resolve().name if path is not None else "particles"

    def need_labels(self) -> np.ndarray:
        """The labels; InputError where there are none."""
        if self.labels_problem is not None:
            raise self.labels_problem
        if self.labels is None:
            where = (
                f"{self.run.path} has no analysis yet: run `cryosuite analyze {typed(self.run.path)}`, or"
                if self.run
                else ""
            )
            raise InputError(
                f"{where or self.particles.path}{'' if where else ':'} give the clusters: --labels labels.pkl"
            )
        return self.labels

    def centre_row(self, cluster: int) -> int | None:
        """Row of the particle at whose latent ``analyze`` decoded the volume of a cluster; None where it is not known.

        Only for the labels of the analysis itself.
        """
        if self.analysis is None or self.labels_from != self.analysis.labels or not self.analysis.summary.is_file():
            return None
        known = read_yaml(self.analysis.summary).get("kmeans")
        named = known.get("folder") if isinstance(known, dict) else None
        folder = Path(named).name.strip(".") if isinstance(named, str) else ""
        if not folder:  # '..' would be another analysis, or anything
            return None
        path = VolumeDir(self.analysis.path / folder).centers_index
        words = read_bytes(path, "rows").decode("utf-8", "replace").split() if path.is_file() else []
        word = words[cluster] if 0 <= cluster < len(words) else ""
        return int(word) if re.fullmatch(r"\d{1,18}", word) and int(word) < len(self.particles) else None

    def need_latents(self) -> np.ndarray:
        """The latents; InputError where there are none."""
        if self.z is None:
            raise InputError(f"{self.particles.path}: has no latents: give the folder of a training run")
        return self.z


def open_source(
    path: Path,
    *,
    epoch: int | None = None,
    labels: Path | None = None,
    analysis: Path | None = None,
    datadir: Path | None = None,
    passthrough: Sequence[Path] = (),
) -> Source:
    """Open a run (ours or cryoDRGN's), the folder of an analysis, a work folder, or a particle file.

    Args:
        epoch: of the run; None: that of the analysis, else the last.
        labels: in place of those of the analysis. analysis: in place of the newest one of the run.
        datadir, passthrough: as ``open_particles`` takes them.

    Raises:
        InputError: nothing of the kind; labels or latents of other particles, an analysis of another epoch. Labels of
            an analysis of other particles are refused when they are needed. An analysis of latents that are no longer
            those of the run (it was trained anew) is told and taken.
    """
    path = Path(path)
    looked = AnalysisDir(path) if AnalysisDir(path).summary.is_file() else None
    if looked is not None:
        run = _run_of(looked)
        analysis = analysis or path
    else:
        run = RunDir(path) if path.is_dir() and not WorkDir(path).exists() and _is_run(path) else None
    if run is None:
        if epoch is not None or analysis is not None:
            raise InputError(f"--{'epoch' if epoch is not None else 'analysis'}: {path} is not a training run")
        found = open_particles(path, datadir=datadir, need_poses=False, need_ctf=False, passthrough=passthrough)
        source = Source(found)
    else:
        source = _open_run(run, epoch, analysis, datadir)
    _read_labels(source, labels)
    return source


def newest_analysis(run: RunDir, epoch: int | None = None) -> AnalysisDir | None:
    """The analysis of an epoch, or of the last epoch that has one; None where there is none."""
    found = []
    for entry in run.path.glob("analyze.*"):
        match = re.fullmatch(r"analyze\.(\d+)(\.cryosuite)?", entry.name)
        if match and AnalysisDir(entry).labels.is_file() and epoch in (None, int(match.group(1))):
            found.append((int(match.group(1)), entry))
    return AnalysisDir(max(found)[1]) if found else None


def _is_run(path: Path) -> bool:
    return RunDir(path).exists() or is_cryodrgn_run(path)


def _run_of(analysis: AnalysisDir) -> RunDir:
    """The run that was analysed: the one that analyze.yaml names, else the folder above."""
    named = read_yaml(analysis.summary).get("run")
    places = [*([Path(os.path.normpath(analysis.path.absolute() / str(named)))] if named else [])]
    places.append(analysis.path.absolute().parent)
    for place in places:
        if _is_run(place):
            return RunDir(place)
    raise InputError(f"{analysis.path}: the run it belongs to is not there (looked for {places[0]}): give the run")


def _open_run(run: RunDir, epoch: int | None, analysis: Path | None, datadir: Path | None) -> Source:
    epoch = None if epoch == -1 else epoch  # the last one, as for analyze
    looked = AnalysisDir(analysis) if analysis is not None else newest_analysis(run, epoch)
    if analysis is not None and not looked.labels.is_file():
        raise InputError(f"{analysis}: has no {looked.labels.name}: give the folder that `cryosuite analyze` wrote")
    of_analysis = None if looked is None else _epoch_of(looked)
    if epoch is None:
        epoch = of_analysis
    elif of_analysis not in (None, epoch):
        raise InputError(f"--epoch {epoch}: {looked.path} is an analysis of epoch {of_analysis}: give one of the two")
    if is_cryodrgn_run(run.path):
        opened = open_cryodrgn_run(run.path, epoch, datadir=datadir, need_poses=False)
        source = Source(opened.particles, opened.z, opened.epoch, run, looked, poses_found=opened.poses_found)
    else:
        chosen: dict[str, Any] = {} if datadir is None else {"datadir": datadir}
        number, z = last_latents(run, epoch) if run.epochs() else (None, None)
        found = open_run_particles(run, number, need_poses=False, need_ctf=False, **chosen)
        source = Source(found, z, number, run, looked, poses_found=bool(run.read_config().get("poses_found")))
    if source.z is not None and len(source.z) != len(source.particles):
        raise InputError(
            f"{run.z(source.epoch)}: {len(source.z)} latents for {len(source.particles)} particles: did the set change?"
        )
    made_of = read_yaml(looked.summary).get("latents") if looked is not None and looked.summary.is_file() else None
    if source.z is not None and made_of is not None and made_of != fingerprint(source.z):
        notice(
            f"{looked.path}: was made of other latents than {run.z(source.epoch)} holds now (trained anew?): its "
            "clusters and columns are of those; run analyze again"
        )
    return source


def _epoch_of(analysis: AnalysisDir) -> int | None:
    if analysis.summary.is_file():
        epoch = read_yaml(analysis.summary).get("epoch")
        return epoch if isinstance(epoch, int) and epoch >= 0 else None
    match = re.fullmatch(r"analyze\.(\d+).*", analysis.path.name)
    return int(match.group(1)) if match else None


def _read_labels(source: Source, given: Path | None) -> None:
    """The labels given, or else those of the analysis; of these a problem is only noted."""
    path = given if given is not None else source.analysis.labels if source.analysis is not None else None
    if path is None:
        return
    try:
        source.labels, source.labels_from = _labels_of(source, path), path
    except InputError as error:
        if given is not None:
            raise
        source.labels_problem = error


def _labels_of(source: Source, path: Path) -> np.ndarray:
    values = read_labels(path, unlabelled=True)
    count = len(source.particles)
    if len(values) != count:
        raise InputError(
            f"{path}: {len(values)} labels, but {source.particles.path} has {count} particles. Give the labels of this "
            "run."
        )
    return values
