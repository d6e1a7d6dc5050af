"""An analysis read back from its folder, and what a report needs of the run besides."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cryosuite.analysis import latents
from cryosuite.analysis.palette import palette
from cryosuite.data.particles import ParticleSet
from cryosuite.data.typed import typed
from cryosuite.data.workdir import AnalysisDir, VolumeDir
from cryosuite.errors import InputError
from cryosuite.formats.checks import printable
from cryosuite.formats.config import read_yaml
from cryosuite.formats.pickles import read_array, read_labels

COLOUR = re.compile(r"#[0-9a-fA-F]{6}")


@dataclass(frozen=True)
class RunFacts:
    """What a report needs of the run besides the analysis' own files.

    Attributes:
        z: (N, zdim) latents of ``epoch``. particles: the set of the rows, or None.
        name: of the run. run: its folder, for commands and polished maps. method, command: from its config.
        records: lines of metrics.jsonl. maps: folders of ``polish`` or ``backproject`` to look for maps of clusters in.
        codes: (N,) the run's own classes, or None.
    """

    z: np.ndarray
    epoch: int
    particles: ParticleSet | None = None
    name: str = ""
    run: Path | None = None
    method: str = ""
    command: str = ""
    records: Sequence[Mapping[str, float]] = ()
    maps: Sequence[Path] = ()
    codes: np.ndarray | None = None


@dataclass(frozen=True)
class Found:
    """An analysis read back from its folder: labels (N,), colours per cluster, coordinates with NaN where left out."""

    out: AnalysisDir
    summary: dict[str, Any]
    labels: np.ndarray
    colours: list[str]
    folder: VolumeDir
    levels: list[float | None]
    first_volume: int
    scores: np.ndarray | None
    ratio: np.ndarray
    umap: np.ndarray | None
    confidence: np.ndarray | None
    groups: tuple[np.ndarray, np.ndarray] | None


def read_analysis(out: AnalysisDir, z: np.ndarray) -> Found:
    """Read an analysis back, its principal components made again from the latents (N, zdim).

    Raises:
        InputError: a folder without an analysis, one that did not end, or one of another number of particles.
    """
    if not out.labels.is_file() or not out.summary.is_file():
        raise InputError(f"{out.path}: holds no finished analysis (run `cryosuite analyze RUN` first)")
    summary = read_yaml(out.summary)
    labels = read_labels(out.labels, unlabelled=True)
    if len(labels) != len(z):
        raise InputError(f"{out.labels}: {len(labels)} labels, but the run has {len(z)} latents: not its analysis")
    known = _part(out, summary, "kmeans")
    count = max(int(labels.max(initial=-1)) + 1, _whole(out, known, "clusters"))
    if count > max(len(labels), 1):
        raise InputError(f"{out.path}: {count} clusters of {len(labels)} particles: damaged; run analyze again")
    noted = _several(known, "particles")
    if noted and noted != np.bincount(labels[labels >= 0], minlength=len(noted)).tolist():
        raise InputError(
            f"{out.labels}: not the clusters that {out.summary.name} tells of: the last analysis did not come to its "
            "end; run analyze again"
        )
    colours = [c for c in _several(known, "colours") if isinstance(c, str) and COLOUR.fullmatch(c)]
    levels = [level if isinstance(level, float | int) else None for level in _several(known, "levels")]
    folder = VolumeDir(out.path / (Path(str(known.get("folder") or "")).name.strip(".") or f"kmeans{count}"))
    scores, ratio = latents.all_scores(z)
    umap = read_array(out.umap, (len(z), 2), "UMAP coordinates") if out.umap.is_file() else None
    mixture = _whole(out, _part(out, summary, "gmm"), "groups")
    groups = _groups(out.gmm(mixture), len(z)) if mixture else None
    confidence = read_array(folder.confidence, (len(z),), "confidences") if folder.confidence.is_file() else None
    first = _whole(out, _part(out, summary, "volumes"), "start_index")
    return Found(
        out, summary, labels, colours if len(colours) == count else palette(count), folder,
        levels if len(levels) == count else [None] * count, first, scores, ratio, umap,
        confidence, groups,
    )  # fmt: skip


def _part(out: AnalysisDir, summary: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of analyze.yaml, empty where it is not there; InputError where it is something else."""
    part = summary.get(name) or {}
    if not isinstance(part, dict):
        raise InputError(f"{out.summary}: {name} is {printable(part)}, expected name: value lines; run analyze again")
    return part


def _whole(out: AnalysisDir, part: Mapping[str, Any], name: str) -> int:
    """A whole number from 0, 0 where it is not there."""
    value = part.get(name) or 0
    if type(value) is not int or not 0 <= value < 2**31:
        raise InputError(f"{out.summary}: {name} is {printable(value)}, expected a whole number; run analyze again")
    return value


def _several(part: Mapping[str, Any], name: str) -> list[Any]:
    value = part.get(name)
    return value if isinstance(value, list) else []


def _groups(folder: VolumeDir, count: int) -> tuple[np.ndarray, np.ndarray] | None:
    if not (folder.labels.is_file() and folder.confidence.is_file()):
        return None
    return read_labels(folder.labels, count, unlabelled=True), read_array(folder.confidence, (count,), "confidences")


def shown_path(path: Path) -> str:
    """A path as one types it: relative where it lies below the present folder, quoted where a shell needs it."""
    relative = os.path.relpath(path)
    return typed(path if relative.startswith("..") else relative)
