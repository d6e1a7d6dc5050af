"""``open_particles``: one door for work directories, RELION, cryoSPARC and cryoDRGN inputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cryosuite.data.assemble import Sources, assemble
from cryosuite.data.cs_rows import cs_rows
from cryosuite.data.locate import StackFinder
from cryosuite.data.particles import ParticleSet
from cryosuite.data.rows import Given, Rows
from cryosuite.data.star_rows import star_rows
from cryosuite.data.workdir import DATASET, RunDir, WorkDir, resolve_link
from cryosuite.errors import InputError
from cryosuite.formats.checks import printable
from cryosuite.formats.mrc import read_header
from cryosuite.formats.pickles import read_array, read_poses, safe_load

KINDS = "a work directory, a .star, .cs, .mrcs, .mrc or .txt file"
PIXEL_SIZES = ("pixel_size", "file_pixel_size")  # columns of rows.pkl
# columns of rows.pkl that are whole numbers from 0
LARGEST = {"index": 2**53, "optics_group": 99_999, "half": 1, "image": 2**53, "row_key": 2**32 - 1}


def open_particles(
    path: Path | str,
    *,
    poses: Path | str | None = None,
    ctf: Path | str | None = None,
    ind: Path | str | np.ndarray | None = None,
    datadir: Path | str | None = None,
    pixel_size: float | None = None,
    need_poses: bool = True,
    need_ctf: bool = True,
    passthrough: Sequence[Path | str] = (),
    sign: int | None = None,
    voltage_kv: float | None = None,
    cs_mm: float | None = None,
    amplitude_contrast: float | None = None,
    mixed_boxes: bool = False,
    keep_tables: bool = False,
) -> ParticleSet:
    """Open a particle set and check it; no pixel is read.

    Args:
        path: a work directory (or its dataset.yaml), a training run, .star, .cs, .mrcs, .mrc, or a .txt list of stacks.
        poses, ctf: cryoDRGN pickles; they replace what a star or cs says.
        ind: pickle or array of ORIGINAL indices to keep, in that order.
        datadir: folder of the stacks.
        pixel_size: Angstrom, for files that do not say it.
        need_poses, need_ctf: raise when they are missing; otherwise the set has None.
        passthrough: cryoSPARC passthrough files, joined by uid.
        sign: +1 white, -1 dark particles in the file; None: what the file says, else white.
        voltage_kv, cs_mm, amplitude_contrast: for files that do not say them.
        mixed_boxes: allow stacks of several box sizes (``preprocess`` brings them to one).
        keep_tables: hold on to the star or cs tables, so that writing them again need not read them again.

    Raises:
        InputError: one message that names the file, the row or field, and what to do.
    """
    path = Path(path)
    if pixel_size is not None and not 0 < pixel_size < float("inf"):
        raise InputError(f"--Apix {pixel_size:g}: the pixel size must be a positive number of Angstrom")
    given = Given(pixel_size, voltage_kv, cs_mm, amplitude_contrast)
    sources = Sources(
        path=path,
        poses=None if poses is None else Path(poses),
        ctf=None if ctf is None else Path(ctf),
        ind=ind if ind is None or isinstance(ind, np.ndarray) else Path(ind),
        datadir=None if datadir is None else Path(datadir),
        given=given,
        need_poses=need_poses,
        need_ctf=need_ctf,
        sign=sign,
        mixed_boxes=mixed_boxes,
        keep_tables=keep_tables,
        passthrough=tuple(Path(extra) for extra in passthrough),
    )
    sources.user_poses, sources.user_ctf = sources.poses, sources.ctf
    if path.name == DATASET:
        path = path.parent
    if os.path.isdir(path):
        if not WorkDir(path).exists() and RunDir(path).exists():
            said = {
                "poses": poses, "ctf": ctf, "ind": ind, "datadir": datadir, "pixel_size": pixel_size, "sign": sign,
                "voltage_kv": voltage_kv, "cs_mm": cs_mm, "amplitude_contrast": amplitude_contrast,
                "passthrough": tuple(passthrough) or None,
            }  # fmt: skip
            return open_run_particles(
                RunDir(path), need_poses=need_poses, need_ctf=need_ctf, mixed_boxes=mixed_boxes,
                keep_tables=keep_tables, **{name: value for name, value in said.items() if value is not None},
            )  # fmt: skip
        return _open_work(WorkDir(path), sources)
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file or folder. Give {KINDS}.")
    return assemble(_rows_of(path, sources), sources)


def open_run_particles(run: RunDir, epoch: int | None = None, **options: Any) -> ParticleSet:
    """The particles a run was trained on, as its config.yaml says (particles and how they were opened: poses, ctf, ind,
    datadir, pixel_size, sign).

    ``epoch``: whose poses they have where the run found them itself; None: the last. ``options`` of ``open_particles``
    stand in place of what the config says, poses also in place of those that the run found.
    """
    config = run.read_config()
    path = _particles_of(run, config)
    _require_no_circle(run, path)
    how: dict[str, Any] = {
        key: resolve_link(str(config[key]), run.path) for key in ("poses", "ctf", "ind", "datadir") if config.get(key)
    }
    if config.get("pixel_size"):
        how["pixel_size"] = _positive(run.config, config, "pixel_size")
    if config.get("sign"):
        if config["sign"] not in (1, -1):
            raise InputError(f"{run.config}: sign is {printable(config['sign'])}, expected 1 or -1")
        how["sign"] = config["sign"]
    if not config.get("poses_found") or options.get("poses") is not None:
        return open_particles(path, **{**how, **options})
    found = open_particles(path, **{**how, **options, "need_poses": False})
    return _with_found_poses(found, run, run.last_epoch() if epoch is None else epoch)


def _particles_of(run: RunDir, config: dict[str, Any]) -> Path:
    """What the config.yaml of a run names as its particles."""
    if not config.get("particles"):
        raise InputError(f"{run.config}: does not say which particles were used (no `particles` entry).")
    return resolve_link(str(config["particles"]), run.path)


def _require_no_circle(run: RunDir, path: Path) -> None:
    """A run may have been trained on the particles of another run; InputError where that leads back to itself."""
    met = {os.path.realpath(run.path)}
    while os.path.isdir(path) and not WorkDir(path).exists() and RunDir(path).exists():
        if os.path.realpath(path) in met:
            raise InputError(f"{run.config}: its particles {printable(path)} lead back to a run that names them")
        met.add(os.path.realpath(path))
        path = _particles_of(RunDir(path), RunDir(path).read_config())


def _with_found_poses(particles: ParticleSet, run: RunDir, epoch: int) -> ParticleSet:
    """The particles with the poses that the run itself found up to an epoch; joined by original index."""
    path = run.poses(epoch)
    rotation, shift = read_poses(path, checked=False)
    known = read_array(run.index, (None,), "original indices", "iu")
    if not len(known):
        raise InputError(f"{run.index}: holds no indices: the run is damaged")
    order = np.argsort(known)
    place = order[np.searchsorted(known, particles.index, sorter=order).clip(max=len(known) - 1)]
    if len(rotation) != len(known) or not np.array_equal(known[place], particles.index):
        raise InputError(f"{path}: holds no poses for some of the particles of {particles.path}: did the set change?")
    return replace(particles, rotation=rotation[place], shift=shift[place], poses_from=path)


def _rows_of(path: Path, sources: Sources) -> Rows:
    """Read the table or list, by the file's ending."""
    need_poses = sources.need_poses and sources.poses is None
    need_ctf = sources.need_ctf and sources.ctf is None
    from cryosuite.formats.star import read_stack_list

    suffix = path.suffix.lower()
    if suffix == ".star":
        return star_rows(path, sources.given, need_poses, need_ctf)
    if suffix == ".cs":
        return cs_rows(path, sources.given, need_poses, need_ctf, sources.passthrough)
    if suffix in (".mrcs", ".mrc"):
        return _stack_rows(path, [path], sources)
    if suffix == ".txt":
        finder = StackFinder(path, sources.datadir)
        return _stack_rows(path, [finder.find(name) for name in read_stack_list(path)], sources)
    raise InputError(f"{path}: unknown kind of file. Give {KINDS}.")


def _stack_rows(path: Path, stacks: list[Path], sources: Sources) -> Rows:
    """Rows of bare stacks: all images in order, numbered through from 0."""
    counts = [read_header(stack).nz for stack in stacks]
    file_id = np.repeat(np.arange(len(stacks), dtype=np.int32), counts)
    slices = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
    rows = Rows(path, sum(counts), [str(stack) for stack in stacks], file_id, slices, found=True)
    if sources.given.pixel_size is not None:
        rows.pixel_size = np.full(rows.n, sources.given.pixel_size)
    for need, have, what, option in (
        (sources.need_poses, sources.poses, "orientations", "--poses poses.pkl"),
        (sources.need_ctf, sources.ctf, "CTF", "--ctf ctf.pkl"),
    ):
        if need and have is None:
            raise InputError(
                f"{path}: a bare stack has no {what}. Add {option}, or give the .star or .cs file instead."
            )
    return rows


def _open_work(work: WorkDir, sources: Sources) -> ParticleSet:
    """A work directory: everything comes from its own files; poses and CTF given by the user replace its own."""
    dataset = work.read_dataset()
    sources.dataset = dataset
    sources.datadir = None  # the stack lies in the folder
    if sources.poses is None and work.poses.is_file():
        sources.poses = work.poses
    if sources.ctf is None and work.ctf.is_file():
        sources.ctf = work.ctf
    if sources.need_poses and sources.poses is None:
        raise InputError(f"{work.path}: this set has no orientations (no {work.poses.name}). Give them: --poses.")
    if sources.need_ctf and sources.ctf is None:
        raise InputError(f"{work.path}: this set has no CTF (no {work.ctf.name}). Give it: --ctf.")
    if not work.particles.is_file():
        raise InputError(f"{work.particles}: the stack is missing; was the folder copied completely?")
    if work.rows.is_file() or not work.star.is_file():
        rows = _stack_rows(work.particles, [work.particles], sources)
        table = _apply_table(work, rows) if work.rows.is_file() else {}
    else:
        rows = star_rows(work.star, sources.given, False, False)
        table = {}
    if rows.own_pixel_size is None and dataset.get("pixel_size"):
        rows.own_pixel_size = np.full(rows.n, _positive(work.dataset, dataset, "pixel_size"))
    if rows.pixel_size is None:
        rows.pixel_size = rows.own_pixel_size
    if "file_pixel_size" in table:
        rows.own_pixel_size = table["file_pixel_size"]
    if dataset.get("source_particles"):
        _positive(work.dataset, dataset, "source_particles")
    rows.ctf_premultiplied = rows.ctf_premultiplied or bool(dataset.get("ctf_premultiplied"))
    noise = read_array(work.noise, (None, None), "noise power (groups, shells)") if work.noise.is_file() else None
    noise = None if noise is None else noise.astype(np.float32)
    found = assemble(rows, sources, index=table.get("index"), noise=noise, source=work.star)
    if noise is not None and noise.shape[1] != found.box_size // 2 + 1:
        raise InputError(
            f"{work.noise}: {noise.shape[1]} shells for images of {found.box_size} pixels; run preprocess again"
        )
    return found


def _positive(path: Path, said: dict[str, Any], name: str) -> float:
    """A number above 0 of a YAML file."""
    value = said[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e15:
        raise InputError(f"{path}: {name} is {printable(value)}, expected a positive number")
    return float(value)


def _apply_table(work: WorkDir, rows: Rows) -> dict[str, np.ndarray]:
    """Fill in what rows.pkl of a work directory says; InputError when it is damaged or does not belong to the stack."""
    table = safe_load(work.rows, only_first=True)[0]
    if not isinstance(table, dict):
        raise InputError(f"{work.rows}: is no table of columns; run preprocess again")
    for name, value in table.items():
        fits = isinstance(value, np.ndarray) and value.ndim > 0 and len(value) == rows.n
        if not isinstance(name, str) or not fits or value.dtype.kind not in "biuf":
            raise InputError(f"{work.rows}: does not fit {work.particles} with {rows.n} images; run preprocess again")
        if name in LARGEST and not _whole_numbers(value, LARGEST[name]):
            raise InputError(f"{work.rows}: {name} is damaged: whole numbers from 0 are expected; run preprocess again")
    rows.optics_group = table.get("optics_group")
    rows.half = table.get("half")
    rows.image, rows.row_key = table.get("image"), table.get("row_key")
    for name in [name for name in PIXEL_SIZES if name in table]:
        size = table[name] = np.asarray(table[name], np.float64)
        if size.ndim != 1 or not ((size > 0) & np.isfinite(size)).all():
            raise InputError(f"{work.rows}: {name} is damaged: positive numbers (A) are expected")
    rows.own_pixel_size = table.get("pixel_size")
    known = {*LARGEST, *PIXEL_SIZES}
    rows.extras = {name: np.asarray(value, np.float32) for name, value in table.items() if name not in known}
    return table


def _whole_numbers(values: np.ndarray, largest: int) -> bool:
    """Is it a column of whole numbers from 0 to ``largest``?"""
    return values.ndim == 1 and values.dtype.kind in "iu" and values.min() >= 0 and values.max() <= largest
