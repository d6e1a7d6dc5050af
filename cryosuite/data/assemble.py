"""Rows + stacks + pickles -> a checked ParticleSet."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cryosuite.data.images import StackImages
from cryosuite.data.locate import StackFinder, open_stacks
from cryosuite.data.particles import ParticleSet
from cryosuite.data.rows import Details, Given, Rows, pixel_size_in_file, rows_of_indices
from cryosuite.errors import InputError, notice
from cryosuite.formats.checks import name_rows
from cryosuite.formats.pickles import checked_indices, read_ctf, read_indices, read_poses

RECALIBRATED = 0.1  # relative difference of two measures of one pixel size, at most


@dataclass
class Sources:
    """What the user gave to ``open_particles``."""

    path: Path
    poses: Path | None = None
    ctf: Path | None = None
    user_poses: Path | None = None
    user_ctf: Path | None = None
    ind: Path | np.ndarray | None = None
    datadir: Path | None = None
    given: Given = field(default_factory=Given)
    need_poses: bool = True
    need_ctf: bool = True
    sign: int | None = None
    mixed_boxes: bool = False
    keep_tables: bool = False
    passthrough: tuple[Path, ...] = ()
    dataset: dict[str, Any] = field(default_factory=dict)


def assemble(
    rows: Rows,
    sources: Sources,
    index: np.ndarray | None = None,
    noise: np.ndarray | None = None,
    source: Path | None = None,
) -> ParticleSet:
    """Build the set: replace poses and CTF by the user's, select ``ind``, find and check the stacks.

    ``index`` (N,) are the original indices of the rows (None: the rows are the original set).
    """
    everything = rows
    poses = None if sources.poses is None else _given_poses(rows, sources)
    table = None if sources.ctf is None else _given_ctf(rows, sources)
    chosen = np.arange(rows.n) if sources.ind is None else _chosen(sources, rows.n, index)
    rows = rows if sources.ind is None else rows.take(chosen)
    table = table if table is None else table[chosen]
    unit = {".star": "rlnImageName", ".cs": "blob/idx"}.get(rows.path.suffix.lower(), "image")
    used, file_id = np.unique(rows.file_id, return_inverse=True)
    names = [rows.files[number] for number in used]
    finder = None if rows.found else StackFinder(rows.path, sources.datadir)
    paths, boxes, header_sizes, cache = open_stacks(rows.path, names, file_id, rows.slices, finder, unit)
    images = StackImages(paths, file_id, rows.slices, cache=cache, image=rows.image)
    box = _box(rows, images, boxes, sources)
    pixel_size = _pixel_size(rows, table, box, header_sizes, file_id, sources)
    in_file = pixel_size_in_file(rows, box, pixel_size)
    found = _details(everything, chosen, box, pixel_size, in_file)
    if poses is not None:
        found.rotation, found.shift = poses[0][chosen], poses[1][chosen]
    if table is not None:
        table[:, 0], table[:, 1] = box, pixel_size
        found.ctf = table
    sign, sign_from = _sign(rows, images, sources)
    half = _unmixed_halves(rows, images)
    if unit != "rlnImageName" and rows.image is None:  # of a work directory preprocess has said it
        _notice_duplicates(rows.path, images)
    return ParticleSet(
        images=images,
        box_size=int(boxes.max()),
        pixel_size=pixel_size.astype(np.float32),
        rotation=found.rotation,
        shift=found.shift,
        ctf=found.ctf,
        extras={**found.extras, **rows.extras} if found.ctf is not None else {},
        optics_group=rows.optics_group,
        index=chosen.astype(np.int64) if index is None else np.asarray(index)[chosen].astype(np.int64),
        uid=rows.uid,
        row_key=rows.row_key,
        half=half,
        sign=sign,
        sign_from=sign_from,
        ctf_premultiplied=rows.ctf_premultiplied,
        noise=noise,
        normalised=bool(sources.dataset.get("normalised", False)),
        box_sizes=None if (boxes == boxes[0]).all() else box,
        file_pixel_size=None if in_file is None or (in_file == pixel_size).all() else in_file.astype(np.float32),
        path=sources.path,
        source=source or rows.path,
        rows=chosen,
        passthrough=sources.passthrough,
        datadir=sources.datadir,
        poses_from=sources.user_poses,
        ctf_from=sources.user_ctf,
        given={name: value for name, value in asdict(sources.given).items() if value is not None},
        n_source=everything.n,
        tables=everything.tables if sources.keep_tables else None,
        dataset=sources.dataset,
    )


def _details(rows: Rows, chosen: np.ndarray, *of_images: np.ndarray | None) -> Details:
    """Poses and CTF of the chosen rows; the table is read whole, rows left out stand with the first box and sizes."""

    def full(values: np.ndarray | None) -> np.ndarray | None:
        if values is None:
            return None
        out = np.full(rows.n, values[0])
        out[chosen] = values
        return out

    found = rows.details(*map(full, of_images))
    if len(chosen) == rows.n and (chosen == np.arange(rows.n)).all():
        return found

    def take(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values[chosen]

    extras = {name: values[chosen] for name, values in found.extras.items()}
    return Details(take(found.rotation), take(found.shift), take(found.ctf), extras)


def _given_poses(rows: Rows, sources: Sources) -> tuple[np.ndarray, np.ndarray]:
    """Rotations and shifts of a pickle; one pose per row of the particle file."""
    rotation, shift = read_poses(sources.poses)
    if len(rotation) != rows.n:
        raise InputError(
            f"{sources.poses}: {len(rotation)} poses, but {rows.path} has {rows.n} particles: give the poses of this "
            "set (all of it: --ind selects from both)"
        )
    return rotation, shift


def _given_ctf(rows: Rows, sources: Sources) -> np.ndarray:
    """The CTF table of a pickle; one row per row of the particle file."""
    table = read_ctf(sources.ctf)
    if len(table) != rows.n:
        raise InputError(
            f"{sources.ctf}: {len(table)} CTF rows, but {rows.path} has {rows.n} particles. Give the CTF of this set "
            "(all of it: --ind selects from both)."
        )
    return table


def _chosen(sources: Sources, n: int, index: np.ndarray | None) -> np.ndarray:
    """Rows (m,) that ``ind`` selects; of a work directory by original index."""
    total = n if index is None else int(sources.dataset.get("source_particles") or index.max() + 1)
    given = isinstance(sources.ind, np.ndarray)
    origin = sources.path if given else sources.ind
    wanted = checked_indices(sources.ind, origin, total) if given else read_indices(sources.ind, total)
    if len(wanted) == 0:
        raise InputError(f"{origin}: the indices select 0 particles.")
    if index is None:
        return wanted
    found, missing = rows_of_indices(index, wanted)
    if not len(found):
        raise InputError(f"{origin}: none of its {len(wanted)} original indices is in {sources.path}.")
    if missing:
        notice(f"{origin}: {missing} of {len(wanted)} original indices are not in {sources.path}.")
    return found


def _box(rows: Rows, images: StackImages, boxes: np.ndarray, sources: Sources) -> np.ndarray:
    """Box size per row (n,) int32: the stack's; InputError when the table says otherwise or boxes differ."""
    box = boxes[images.file_id]
    if rows.box is not None:
        bad = np.flatnonzero(rows.box != box)
        if len(bad) and not _changed_after(rows, box, bad, sources.given.pixel_size):
            row = bad[0]
            raise InputError(
                f"{rows.path}: says box {rows.box[row]} for {name_rows(bad)} (0-based), but the images in "
                f"{images.files[images.file_id[row]]} are {box[row]} pixels wide. If the stack was downsampled, "
                "correct the image size and the pixel size in the table, or give its pixel size (--Apix); otherwise "
                "give the right stack (--datadir)."
            )
    if not sources.mixed_boxes and (boxes != boxes[0]).any():
        other = int(np.flatnonzero(boxes != boxes[0])[0])
        raise InputError(
            f"{rows.path}: stacks of different box sizes: {images.files[0]} has {boxes[0]}, {images.files[other]} has "
            f"{boxes[other]}. Run `cryosuite preprocess` first: it brings all images to one box."
        )
    return box


def _changed_after(rows: Rows, box: np.ndarray, bad: np.ndarray, pixel_size: float | None) -> bool:
    """Does the user's pixel size say that images of another box than the table's were binned or cropped after it?"""
    if pixel_size is None or rows.own_pixel_size is None:
        return False
    own = rows.own_pixel_size[bad]
    fits = [np.abs(pixel_size / size - 1) < RECALIBRATED for size in (own * rows.box[bad] / box[bad], own)]
    if not (fits[0] | fits[1]).all():
        return False
    notice(
        f"{rows.path}: says box {rows.box[bad[0]]} for {name_rows(bad)} (0-based), the images have {box[bad[0]]}: "
        f"taken as made smaller after the table was written, with {pixel_size:g} A per pixel as you say."
    )
    return True


def _pixel_size(
    rows: Rows,
    table: np.ndarray | None,
    box: np.ndarray,
    header_sizes: list[float | None],
    file_id: np.ndarray,
    sources: Sources,
) -> np.ndarray:
    """Pixel size (n,) A: from the star or cs or the user, else ctf.pkl, else the headers of the stacks."""
    if table is not None:
        size = table[:, 1].astype(np.float64)
        if (table[:, 0] != box).any():
            # cryoDRGN's habit: the CTF of the full-size images beside a downsampled stack of the same field of view
            size = size * table[:, 0] / box
            row = int(np.flatnonzero(table[:, 0] != box)[0])
            notice(
                f"{sources.ctf}: is for box {table[row, 0]:g}, the images have {box[row]}: taken as downsampled, "
                f"{size[row]:.4g} A per pixel."
            )
        if rows.pixel_size is None:
            return size
        if abs(rows.pixel_size / size - 1).max() > 1e-2:
            notice(f"{sources.ctf}: says {size[0]:.4g} A per pixel; {rows.pixel_size[0]:.4g} A is used.")
    if rows.pixel_size is not None:
        return rows.pixel_size
    missing = [number for number, size in enumerate(header_sizes) if size is None]
    if missing:
        notice(
            f"{rows.path}: no pixel size in the stack's header or anywhere else: 1 A is assumed, so all resolutions "
            "will be in pixels. Give it: --Apix."
        )
    return np.array([size or 1.0 for size in header_sizes])[file_id]


def _sign(rows: Rows, images: StackImages, sources: Sources) -> tuple[int, str]:
    """The factor that makes particles white and who says so; rows of different sign are corrected one by one."""
    if sources.dataset:
        if sources.sign != -1:
            return 1, "dataset.yaml"
        notice(f"{sources.path}: a work folder, whose images are white; you say dark: they are multiplied by -1")
        return -1, "option"
    if sources.sign is not None:
        return int(sources.sign), "option"
    if rows.signs is None:
        return 1, "assumed"
    if (rows.signs == rows.signs[0]).all():
        return int(rows.signs[0]), "blob/sign"
    images.signs = rows.signs
    notice(f"{rows.path}: blob/sign is +1 in some rows and -1 in others: each image is corrected by its own.")
    return 1, "blob/sign"


def _notice_duplicates(path: Path, images: StackImages) -> None:
    """Say when rows show the same image; half sets then keep such rows together (``ParticleSet.half_sets``)."""
    identity = images.identity()
    repeats = len(identity) - len(np.unique(identity))
    if repeats:
        notice(
            f"{path}: {repeats} duplicate rows name an image that another row names too (as after symmetry expansion); "
            "half sets keep them together."
        )


def _unmixed_halves(rows: Rows, images: StackImages) -> np.ndarray | None:
    """The half sets of the refinement; None, with a notice, where some image is in both of them or all are in one."""
    if rows.half is None:
        return None
    if rows.n > 1 and (rows.half == rows.half[0]).all():
        notice(
            f"{rows.path}: all {rows.n} particles are of one half set of the refinement: new half sets are made, which "
            "share what the refinement took from them (its poses)"
        )
        return None
    _, number = np.unique(images.identity(), return_inverse=True)
    seen = [np.bincount(number, rows.half == half) > 0 for half in (0, 1)]
    mixed = int((seen[0] & seen[1]).sum())
    if not mixed:
        return rows.half
    notice(
        f"{rows.path}: {mixed} images are in both half sets of the refinement, so its half maps are not independent: "
        "new half sets are made"
    )
    return None
