"""The particles of each class as files that RELION and cryoSPARC refine: un-binned rows with the run's poses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryosuite.data.export import export_particles, load_metadata, origin, some_rows, source_rows
from cryosuite.data.export_relion import relion_form
from cryosuite.data.particles import ParticleSet
from cryosuite.errors import InputError, notice
from cryosuite.formats.pickles import write_pickle

TABLE = "cluster_files.csv"


@dataclass(frozen=True)
class ClassFiles:
    """Files of one class.

    Attributes:
        label: counted from 0. particles: how many. star: for RELION, None for an empty class or where there is no
            file to take rows from. cs: for cryoSPARC, None unless the particles come from a .cs file.
    """

    label: int
    particles: int
    star: Path | None = None
    cs: Path | None = None


def write_classes(
    folder: Path | str, particles: ParticleSet, labels: np.ndarray, poses: bool | None = None, binned: bool = False,
    relion: str | None = None, lists: bool = False,
) -> list[ClassFiles]:  # fmt: skip
    """Write cluster_000.star (and .cs for particles from cryoSPARC) for each class, and cluster_files.csv.

    Rows are those of the original, un-binned images with all columns, optics and uids of the file the particles were
    first taken from.

    Args:
        labels: (N,) class of each particle from 0, -1 for none.
        poses: write the set's own poses in place of the source's; None: where it has any.
        binned, relion: as ``export_particles`` takes them. lists: original indices (.ind.pkl) too.

    Raises:
        InputError: another number of labels, or a folder that cannot be written.
    """
    folder, labels = Path(folder), np.asarray(labels)
    if len(labels) != len(particles):
        raise InputError(f"{len(labels)} labels for {len(particles)} particles")
    poses = particles.rotation is not None if poses is None else poses
    relion_form(relion)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("star", "cs", *(["ind.pkl"] if lists else [])):
        for old in folder.glob(f"cluster_*.{kind}"):
            old.unlink()  # of an earlier run with more classes
    endings = _endings(particles, binned)
    # read once, however many classes there are
    try:
        source = None if not endings else load_metadata(particles) if binned else source_rows(particles)
    except InputError as error:  # the file has changed since preprocess read it
        notice(f"no star or cs files per class: {error}")
        source, endings = None, ()
    rows = []
    for label in range(int(labels.max(initial=-1)) + 1):
        own = np.flatnonzero(labels == label)
        written = {}
        for ending in endings if len(own) else ():
            path = folder / f"cluster_{label:03d}.{ending}"
            part = some_rows(source, own)
            written[ending] = export_particles(
                particles.subset(own), path, binned, poses, metadata=part, relion=relion if ending == "star" else None
            )
        if lists and len(own):
            write_pickle(folder / f"cluster_{label:03d}.ind.pkl", particles.index[own])
        rows.append(ClassFiles(label, len(own), written.get("star"), written.get("cs")))
    _write_table(folder / TABLE, rows, len(labels))
    return rows


def _endings(particles: ParticleSet, binned: bool = False) -> tuple[str, ...]:
    """Kinds of file these particles can be written as; a notice says why when there is none."""
    if binned:
        return ("star",)
    try:
        start = origin(particles)
    except InputError as error:
        notice(f"no star or cs files per class: {error}")
        return ()
    if start.table.suffix.lower() == ".cs":
        return ("star", "cs")
    if load_metadata(particles) is None and start.table.suffix.lower() != ".star" and particles.ctf is None:
        notice(f"no star files per class: {start.table} is a bare stack and its CTF is not known")
        return ()
    return ("star",)


def _write_table(path: Path, rows: list[ClassFiles], total: int) -> None:
    from cryosuite.analysis.plots import write_csv

    write_csv(path, {
        "class_from_0": [row.label for row in rows],
        "particles": [row.particles for row in rows],
        "share": [row.particles / max(total, 1) for row in rows],
        "star": [row.star.name if row.star else "" for row in rows],
        "cs": [row.cs.name if row.cs else "" for row in rows],
    })  # fmt: skip
