"""Rows of a particle set back to the programs they came from: star, cs or index lists, un-binned by original index."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from cryosuite.data.contrast import box_of
from cryosuite.data.export_poses import with_poses
from cryosuite.data.export_relion import as_relion_30, columns_of_cs, relion_form
from cryosuite.data.locate import StackFinder, plain_name
from cryosuite.data.particles import ParticleSet
from cryosuite.data.row_keys import require_rows, require_same_rows, row_keys
from cryosuite.data.rows import Given
from cryosuite.data.star_tables import star_tables
from cryosuite.data.workdir import DATASET, WorkDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.cs import read_cs, write_cs
from cryosuite.formats.pickles import write_pickle
from cryosuite.formats.star import ParticleTables, particle_tables, pixel_sizes_from_star, write_star


@dataclass(frozen=True)
class Origin:
    """Where rows came from first: a table or stack and the rows of it; ``how``: other options it was opened with.

    keys (n,): ``row_keys`` of the rows when preprocess read them, or None.
    """

    source: Path  # what was opened
    table: Path  # the star, cs or stack itself
    rows: np.ndarray
    passthrough: tuple[Path, ...] = ()
    datadir: Path | None = None
    how: dict[str, Any] = field(default_factory=dict)
    keys: np.ndarray | None = None


def load_metadata(particles: ParticleSet) -> ParticleTables | np.ndarray | None:
    """The star tables or cs rows the set was opened from, one row per particle in its order; None for bare stacks.

    Read again from disk each time: a set keeps no text in memory.
    """
    if particles.source is None or particles.rows is None:
        return None
    if particles.tables is None:
        return _rows_of(particles.source, particles.rows, particles.passthrough)
    whole = particles.tables
    return whole[particles.rows] if isinstance(whole, np.ndarray) else take_rows(whole, particles.rows)


def source_rows(particles: ParticleSet) -> ParticleTables | np.ndarray | None:
    """Rows of the set these particles were first taken from (``origin``), in their order; None for bare stacks."""
    start = origin(particles)
    return _rows_of(start.table, start.rows, start.passthrough, start.keys)


def some_rows(metadata: ParticleTables | np.ndarray | None, rows: np.ndarray) -> ParticleTables | np.ndarray | None:
    """Some of the particles of ``source_rows`` or ``load_metadata``."""
    if isinstance(metadata, ParticleTables):
        return take_rows(metadata, rows)
    return None if metadata is None else metadata[rows]


def _rows_of(
    table: Path, rows: np.ndarray, passthrough: Sequence[Path], keys: np.ndarray | None = None
) -> ParticleTables | np.ndarray | None:
    suffix = table.suffix.lower()
    if suffix == ".star" and table.is_file():
        whole: ParticleTables | np.ndarray = particle_tables(table)
    elif suffix == ".cs":
        whole = read_cs(table, passthrough=passthrough)
    else:
        return None
    require_rows(table, len(whole), rows)
    found = take_rows(whole, rows) if isinstance(whole, ParticleTables) else whole[rows]
    require_same_rows(table, None if keys is None else row_keys(found), rows, keys)
    return found


def take_rows(tables: ParticleTables, rows: np.ndarray) -> ParticleTables:
    """The tables with some of the particles; all other blocks stay."""
    if np.array_equal(rows, np.arange(len(tables))):
        return tables
    return replace(
        tables, particles=tables.particles.iloc[rows].reset_index(drop=True), group=np.asarray(tables.group)[rows]
    )


def origin(particles: ParticleSet) -> Origin:
    """The set these particles were first taken from: un-binned rows, joined by original index.

    Follows ``source`` of dataset.yaml through any number of preprocessings; images are not looked for, so stacks that
    were moved do not matter. Raises InputError when the source is gone.
    """
    if particles.source is None:
        raise InputError("these particles are in no file")
    dataset, found, passed = particles.dataset, None, set()
    while dataset.get("kind") == "preprocessed" and dataset.get("source"):
        source = Path(str(dataset["source"]))
        if source in passed:
            raise InputError(f"{particles.path}: {DATASET} says it was made from itself (source: {source})")
        passed.add(source)
        if not os.path.exists(source):
            raise InputError(
                f"{particles.path}: was made from {source}, which is not there any more. Put it back, or export the "
                "rows of the work directory itself with --binned."
            )
        folder = source.parent if source.name == DATASET else source
        found = Origin(
            source=source,
            table=WorkDir(folder).star if folder.is_dir() else source,
            rows=particles.index,
            passthrough=tuple(Path(path) for path in dataset.get("passthrough") or ()),
            datadir=Path(dataset["datadir"]) if dataset.get("datadir") else None,
            how=_opened_with(dataset),
            keys=particles.row_key,
        )
        dataset = WorkDir(folder).read_dataset() if folder.is_dir() else {}
    here = Origin(
        particles.path or particles.source, particles.source, particles.rows, particles.passthrough, particles.datadir,
        dict(particles.given),
    )  # fmt: skip
    return found or here


def _opened_with(dataset: dict[str, Any]) -> dict[str, Any]:
    """How the source of a work directory was opened: arguments of ``open_particles``."""
    how: dict[str, Any] = {key: dataset[key] for key in ("poses", "ctf") if dataset.get(key)}
    given = dataset.get("given")
    if isinstance(given, dict):
        how |= {entry.name: given[entry.name] for entry in fields(Given) if type(given.get(entry.name)) in (int, float)}
    if dataset.get("sign_from") in ("data", "option") and dataset.get("sign") in (1, -1):
        how["sign"] = dataset["sign"]
    return how


def export_all(
    particles: ParticleSet, outs: Sequence[Path | str], binned: bool = False, poses: bool = False,
    relion: str | None = None,
) -> None:  # fmt: skip
    """``export_particles`` to several files: all are checked before the first is written."""
    outs = [Path(out) for out in outs]
    twice = [out for number, out in enumerate(outs) if out.absolute() in [other.absolute() for other in outs[:number]]]
    if twice:
        raise InputError(f"{twice[0]}: was given twice")
    for out in outs:
        _checked(particles, out, binned)
    table = any(out.suffix.lower() != ".pkl" for out in outs)
    metadata = (load_metadata(particles) if binned else source_rows(particles)) if table else None
    for out in outs:
        export_particles(particles, out, binned, poses, metadata=metadata, relion=relion)


def export_particles(
    particles: ParticleSet, out: Path | str, binned: bool = False, poses: bool = False,
    columns: Mapping[str, np.ndarray] | None = None, metadata: ParticleTables | np.ndarray | None = None,
    relion: str | None = None,
) -> Path:  # fmt: skip
    """Write the rows of ``particles`` to ``out``: .star, .cs (from a cs source), or .pkl with original indices.

    Rows are those of the original, un-binned set (``binned``: of the work directory itself); every column, block and
    uid of the source is kept, and the order is that of ``particles``. With ``poses`` the set's own poses stand in place
    of the source's. ``columns`` (n,) are added to the particle table of a star file. ``metadata``: the source's rows of
    these particles (``source_rows``) where they have been read before. ``relion``: the version that is to read a star
    file; None: the form of the source, of other sources 3.1. Raises InputError for other endings, a .cs of particles
    that cryoSPARC never saw, and a source that is gone.
    """
    out, form = Path(out), relion_form(relion)
    start = _checked(particles, out, binned)
    if out.suffix.lower() == ".pkl":
        write_pickle(out, particles.index)
        return out
    if metadata is None:
        metadata = _rows_of(start.table, start.rows, start.passthrough, start.keys)
    if poses and metadata is not None:
        width = particles.width_in_file
        if binned and particles.dataset:  # its own table has its own measure
            width = particles.box_size * pixel_sizes_from_star(metadata)
        metadata = with_poses(metadata, particles, width, start.how.get("pixel_size"))
    if out.suffix.lower() == ".cs":
        write_cs(out, metadata)
        return out
    blocks, name = _star_blocks(particles, start, metadata, out, binned, poses, form)
    write_star(out, {**blocks, name: blocks[name].assign(**(columns or {}))})
    return out


def _checked(particles: ParticleSet, out: Path, binned: bool) -> Origin:
    """Where the rows come from; InputError for a name that cannot be written."""
    suffix = out.suffix.lower()
    if suffix not in (".star", ".cs", ".pkl"):
        raise InputError(f"{out}: give a name that ends in .star, .cs, or .pkl (a list of indices)")
    if suffix == ".pkl":
        _require_not_source(out, [particles.path, particles.source, particles.poses_from, particles.ctf_from])
        return Origin(Path(), Path(), particles.index)
    if binned and particles.source is not None:
        start = Origin(
            particles.source, particles.source, particles.rows, particles.passthrough, particles.datadir,
            dict(particles.given),
        )  # fmt: skip
    else:
        start = origin(particles)
    _require_not_source(out, [particles.path, particles.source, start.source, start.table, *start.passthrough])
    if suffix == ".cs" and start.table.suffix.lower() != ".cs":
        raise InputError(
            f"{out}: the particles come from {start.table}, which is no .cs file, so there are no uids for cryoSPARC. "
            "Give a name that ends in .star."
        )
    return start


def _require_not_source(out: Path, sources: Sequence[Path | None]) -> None:
    """InputError when ``out`` is a file the particles come from: the rows left out would be lost for good."""
    if out.exists() and any(path is not None and path.exists() and out.samefile(path) for path in sources):
        raise InputError(f"{out}: the particles come from this very file; give another name with -o")


def _star_blocks(
    particles: ParticleSet, start: Origin, metadata: Any, out: Path, binned: bool, poses: bool, form: str | None
) -> tuple[dict[str, Any], str]:
    """The blocks to write and the name of the particle table.

    The source's own tables with fewer rows; of a cs file, a bare stack, or where another form is asked for, the tables
    we make.
    """
    from cryosuite.data.open import open_particles

    own = isinstance(metadata, ParticleTables)
    if own and form in (None, metadata.version):
        return metadata.blocks(particles=_reachable(metadata, start, out)), metadata.block
    if own and form == "3.0":
        older = as_relion_30(replace(metadata, particles=_reachable(metadata, start, out)))
        return older.blocks(), older.block
    if not binned and particles.dataset:
        opened = open_particles(
            start.source, passthrough=start.passthrough, datadir=start.datadir, need_poses=False, need_ctf=False,
            mixed_boxes=True, **start.how,
        )  # fmt: skip
        require_rows(start.source, len(opened), start.rows)
        found = opened.subset(start.rows)
        particles = replace(found, **_moved(particles, found)) if poses else found
    box = box_of(particles, np.arange(len(particles)))
    if own:  # 3.0 to 3.1: names stay, optics groups are made
        names = list(_reachable(metadata, start, out)["rlnImageName"])
        blocks = star_tables(particles, names, box, particles.pixel_size, metadata)
        blocks["particles"] = blocks["particles"].drop(columns="rlnImageOriginalName", errors="ignore")
        return blocks, "particles"
    _warn_relion(particles, out)
    blocks = star_tables(particles, _image_names(particles, out), box, particles.pixel_size)
    if isinstance(metadata, np.ndarray):
        blocks["particles"] = blocks["particles"].assign(**columns_of_cs(metadata))
    if form == "3.0":
        older = as_relion_30(_tables_of(out, blocks))
        return older.blocks(), older.block
    return blocks, "particles"


def _tables_of(out: Path, blocks: dict[str, Any]) -> ParticleTables:
    """Blocks we made, as ``particle_tables`` would read them."""
    group = blocks["particles"]["rlnOpticsGroup"].to_numpy() - 1
    return ParticleTables(out, blocks["particles"], blocks["optics"], {}, "3.1", "particles", list(blocks), group)


def _moved(particles: ParticleSet, onto: ParticleSet) -> dict[str, np.ndarray | None]:
    """Poses of a set for images of another box: shifts, fractions of the box, by way of Angstrom."""
    factor = particles.width_in_file / onto.width_in_file
    shift = None if particles.shift is None else (particles.shift * factor[:, None]).astype(np.float32)
    return {"rotation": particles.rotation, "shift": shift}


def _warn_relion(particles: ParticleSet, out: Path) -> None:
    """Say what RELION takes otherwise than the program these stacks come from."""
    if particles.sign < 0 or getattr(particles.images, "signs", None) is not None:
        notice(
            f"{out}: particles are dark in these stacks, and RELION takes them as white: extract again "
            "with white particles, or invert the stacks (relion_image_handler --multiply_constant -1)"
        )


def _reachable(tables: ParticleTables, start: Origin, out: Path) -> Any:
    """The particle table with image names that also work where ``out`` lies.

    Names relative to the project (the --datadir that was given), that mean the same file from ``out``, or found
    nowhere stay as they are: RELION knows the particles by them. Others, such as names relative to the source star's
    own folder, become absolute.
    """
    table = tables.particles
    parts = table["rlnImageName"].astype(str).str.partition("@")
    bare = (parts[1] == "").to_numpy()
    stacks = parts[2].where(~bare, parts[0])
    here, there = StackFinder(out), StackFinder(start.table, start.datadir)
    changed = {}
    for name in stacks.unique():
        in_project = start.datadir is not None and (Path(start.datadir) / plain_name(name)).is_file()
        meant, reached = _exists(there, name), _exists(here, name)
        if not in_project and meant and not (reached and reached.samefile(meant)):
            changed[name] = str(meant.absolute()) + name[len(plain_name(name)) :]  # a forced type such as :mrcs stays
    if not changed:
        return table
    table = table.copy()
    renamed = stacks.map(lambda name: changed.get(name, name))
    table["rlnImageName"] = renamed.where(bare, parts[0] + "@" + renamed)
    return table


def _exists(finder: StackFinder, name: str) -> Path | None:
    return next((path for path in finder.candidates(name) if os.path.isfile(path)), None)


def _image_names(particles: ParticleSet, out: Path) -> list[str]:
    """NUMBER@STACK for sets that come from cs files or bare stacks.

    RELION reads .mrc as one map unless ':mrcs' is behind the name.
    """
    images = particles.images
    if not hasattr(images, "files"):
        raise InputError(f"{out}: these particles are in no file")
    files = [str(Path(path).resolve()) if Path(path).exists() else str(path) for path in images.files]
    files = [f"{name}:mrcs" if name.lower().endswith(".mrc") else name for name in files]
    return [f"{number + 1:06d}@{files[file]}" for file, number in zip(images.file_id, images.slices, strict=True)]
