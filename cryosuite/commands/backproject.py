"""``cryosuite backproject``: the map that particles with known poses show, with half maps and FSC."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cryosuite.commands.options import check_seed

if TYPE_CHECKING:
    import numpy as np

    from cryosuite.data.particles import ParticleSet
    from cryosuite.data.results import MapsDir
    from cryosuite.metrics.fsc import FscTable
    from cryosuite.reconstruct.backproject import Reconstruction

INPUT, SELECT, MAP = "Particles", "Which particles", "The map"


def _option(default: Any, *names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(default, *names, help=help, rich_help_panel=panel, show_default=default is not None, **more)


def main(
    particles: Path = typer.Argument(
        ..., help="Work folder of preprocess or simulate; or a .star, .cs or .mrcs file.", metavar="PARTICLES"
    ),
    outdir: Path = typer.Option(..., "-o", "--outdir", help="Folder to write the maps to."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the maps that are in the folder."),
    poses: Path = _option(None, "--poses", help="Poses as cryoDRGN writes them (poses.pkl).", panel=INPUT),
    ctf: Path = _option(None, "--ctf", help="CTF parameters as cryoDRGN writes them (ctf.pkl).", panel=INPUT),
    datadir: Path = _option(None, "--datadir", help="Folder in which the image stacks lie.", panel=INPUT),
    apix: float = _option(None, "--Apix", help="Pixel size in Angstrom, where no file says it.", panel=INPUT),
    invert_data: bool = _option(False, "--invert-data", help="Particles are dark in the images.", panel=INPUT),
    no_ctf: bool = _option(False, "--no-ctf", help="The images need no CTF correction.", panel=INPUT),
    ind: Path = _option(None, "--ind", help="Use only these particles (a .pkl of indices).", panel=SELECT),
    first: int = _option(None, "--first", help="Use only the first N particles.", panel=SELECT),
    labels: Path = _option(
        None, "--labels", help="One map per class of these labels (labels.pkl of analyze or simulate).", panel=SELECT
    ),
    class_column: str = _option(
        None, "--class-column", help="One map per class of this star or cs column, e.g. rlnClassNumber.", panel=SELECT
    ),
    cluster: list[int] = _option(None, "--cluster", help="Only this class; may be given several times.", panel=SELECT),
    regularise: str = _option(
        "0.1",
        "--regularise",
        help="Added to each shell's weights as a fraction of their mean; or fsc: a filter from the half maps' FSC.",
        panel=MAP,
    ),
    passes: int = _option(
        1, "--passes", help="Rounds in which gaps between views are filled from the map so far.", panel=MAP
    ),
    downsample: int = _option(
        None,
        "-d",
        "--downsample",
        help="Box of the map in pixels, smaller than the images'; nothing: theirs.",
        panel=MAP,
    ),
    mask: Path = _option(None, "--mask", help="Mask for the FSC; nothing: one found in the map.", panel=MAP),
    flip: bool = _option(False, "--flip", help="Mirror the maps (the other hand).", panel=MAP),
    no_half_maps: bool = _option(False, "--no-half-maps", help="Leave out half maps and FSC.", panel=MAP),
    no_plot: bool = _option(False, "--no-plot", help="Leave out the picture of the FSC.", panel=MAP),
    seed: int = _option(
        0, "--seed", help="Random seed of the phases behind the corrected FSC.", panel=MAP, callback=check_seed
    ),
    threads: int = typer.Option(0, "--threads", min=0, help="Processor threads to use; 0: all."),
) -> None:
    """Reconstruct a map from particles whose orientations are known.

    Writes backproject.mrc, half_map_a.mrc, half_map_b.mrc, mask.mrc,
    fsc-vals.txt and fsc.png. The resolution in Angstrom is where the half
    maps' FSC falls below 0.143. With --labels or --class-column every class
    gets its own folder, in one pass over the images; which particle is in
    which class is noted beside them, for the report.

        cryosuite backproject work/ -o map

        cryosuite backproject work/ -o maps --labels run/analyze.20/labels.pkl

        cryosuite backproject p.star -o maps --class-column rlnClassNumber
    """

    import torch

    from cryosuite.data.open import open_particles
    from cryosuite.data.results import MapsDir
    from cryosuite.data.workdir import WorkDir
    from cryosuite.reconstruct.backproject import reconstruct_classes
    from cryosuite.training.launch import join_processes

    if threads > 0:
        torch.set_num_threads(threads)
    if labels is not None and class_column is not None:
        raise _error("give either --labels or --class-column, not both")
    out = MapsDir(outdir)
    there = next((path for path in _files(out, mask) if path.exists()), None)
    if there is not None and not overwrite:
        raise _error(f"{there}: is already there. Add --overwrite to replace it, or choose another -o.")
    if WorkDir(outdir).exists() and WorkDir(outdir).read_dataset().get("truth"):
        raise _error(f"{outdir}: holds a simulated set, whose true mask would be replaced. Choose another -o.")
    given = _read_mask(mask)
    processes = join_processes()
    found = open_particles(
        particles, poses=poses, ctf=ctf, ind=ind, datadir=datadir, pixel_size=apix, need_ctf=not no_ctf,
        sign=-1 if invert_data else None,
    )  # fmt: skip
    if no_ctf:
        found.ctf = None
    keys = class_labels(found, labels, class_column, cluster, first)
    box = downsample or found.box_size
    if not 8 <= box <= found.box_size or box % 2:
        raise _error(f"--downsample {downsample}: an even box from 8 to {found.box_size} is needed")
    if given is not None and given.shape != (box,) * 3:
        raise _error(f"{mask}: this mask has a box of {given.shape[0]}, the map one of {box}")
    maps = reconstruct_classes(
        found, keys, halves=not no_half_maps, regularise=_fraction(regularise), passes=passes, progress="backproject",
        map_box=box, processes=processes,
    )  # fmt: skip
    if not processes.first:
        return
    rows = []
    several = labels is not None or class_column is not None
    outdir.mkdir(parents=True, exist_ok=True)
    if overwrite:
        _remove(out, mask)
    for label, one in maps.items():
        folder = out.of_class(label) if several and not (cluster and len(cluster) == 1) else out
        table = _write(folder, one.flipped() if flip else one, given, not no_plot, seed)
        rows.append(_row(label if several else "all", one, table, folder))
    if several:
        _note_classes(out, found, keys)
    _print(rows, next(iter(maps.values())), outdir)


def _files(folder: MapsDir, mask: Path | None) -> list[Path]:
    """What is written to a folder of maps, but not the mask that the user gave."""
    files = [folder.labels, folder.index, folder.map, folder.half_a, folder.half_b, folder.fsc, folder.plot]
    return files if mask is not None and folder.mask.resolve() == mask.resolve() else [*files, folder.mask]


def _remove(out: MapsDir, mask: Path | None) -> None:
    """Delete the maps of before, of which not all may be written again, and what is beside them; not the mask given."""
    from cryosuite.data.results import MapsDir

    for folder in (out, *(MapsDir(path) for path in out.path.glob("class_[0-9]*") if path.is_dir())):
        for path in _files(folder, mask):
            path.unlink(missing_ok=True)
        if folder is not out and not any(folder.path.iterdir()):
            folder.path.rmdir()


def _error(message: str) -> Exception:
    from cryosuite.errors import InputError

    return InputError(message)


def _fraction(text: str) -> float | str:
    """The regulariser of the command line: a number or the word fsc."""
    if text == "fsc":
        return text
    try:
        return float(text)
    except ValueError:
        raise _error(f"--regularise {text}: give a positive number such as 0.1, or fsc") from None


def _read_mask(path: Path | None) -> Any:
    """A mask file as a tensor (D, D, D), or None."""
    if path is None:
        return None
    import torch

    from cryosuite.data.masks import read_mask

    return torch.from_numpy(read_mask(path))


def class_labels(
    particles: ParticleSet, labels: Path | None, column: str | None, clusters: list[int] | None, first: int | None
) -> np.ndarray:
    """Class (N,) of every particle, -1 for those left out; class 0 for all when no classes are asked for."""
    import numpy as np

    n = len(particles)
    if labels is not None:
        keys = _file_labels(labels, particles)
    elif column is not None:
        keys = _column_labels(column, particles)
    else:
        keys = np.zeros(n, np.int64)
        if clusters:
            raise _error("--cluster needs --labels or --class-column to say what the classes are")
    if first is not None:
        if first < 1:
            raise _error(f"--first {first}: give a number of particles, at least 1")
        keys = np.where(np.arange(n) < first, keys, -1)
    if clusters:
        absent = sorted(set(clusters) - set(keys.tolist()))
        if absent:
            present = np.unique(keys[keys >= 0])
            raise _error(f"--cluster {absent[0]}: no particle has this class; classes here: {_some(present)}")
        keys = np.where(np.isin(keys, clusters), keys, -1)
    return keys


def _some(values: np.ndarray) -> str:
    text = ", ".join(str(value) for value in values[:12])
    return text + (", ..." if len(values) > 12 else "")


def _file_labels(path: Path, particles: ParticleSet) -> np.ndarray:
    """Labels of a file for the particles: one per particle, or one per row of the original set."""
    import numpy as np

    from cryosuite.formats.pickles import read_labels

    values = np.asarray(read_labels(path, unlabelled=True)).astype(np.int64)
    if len(values) == len(particles):
        return values
    if len(particles) and len(values) > int(particles.index.max()):
        return values[particles.index]
    raise _error(
        f"{path}: holds {len(values)} labels, the set {len(particles)} particles (original indices up to "
        f"{int(particles.index.max())}). Give the labels that belong to this set."
    )


def _column_labels(column: str, particles: ParticleSet) -> np.ndarray:
    """A column of the star or cs file the particles came from, as integers."""
    import numpy as np

    from cryosuite.data.export import load_metadata

    metadata = load_metadata(particles)
    names = [column, column.lstrip("_"), f"rln{column}"]
    table = getattr(metadata, "particles", metadata)
    present = list(getattr(table, "columns", None) if hasattr(table, "columns") else (table.dtype.names or ()))
    name = next((name for name in names if name in present), None)
    if name is None:
        classes = [entry for entry in present if "class" in entry.lower()]
        hint = f" Columns about classes: {', '.join(classes)}." if classes else ""
        raise _error(f"{particles.path}: has no column {column}.{hint}")
    try:
        return np.asarray(table[name]).astype(float).astype(np.int64)
    except ValueError:
        raise _error(f"{particles.path}: column {name} does not hold class numbers") from None


def _write(folder: MapsDir, one: Reconstruction, mask: Any, plot: bool, seed: int) -> FscTable | None:
    """Write the maps of one class, its mask and its FSC; returns the FSC table (None without half maps)."""
    from cryosuite.formats.atomic import atomic_path, write_text
    from cryosuite.formats.mrc import write_map
    from cryosuite.metrics.fsc import fsc_table, write_png
    from cryosuite.reconstruct.masks import half_map_mask

    folder.path.mkdir(parents=True, exist_ok=True)
    write_map(folder.map, one.map.numpy(), one.pixel_size)
    if one.half_a is None:
        return None
    write_map(folder.half_a, one.half_a.numpy(), one.pixel_size)
    write_map(folder.half_b, one.half_b.numpy(), one.pixel_size)
    mask = half_map_mask(one.map, one.fsc) if mask is None else mask
    table = fsc_table(one.half_a, one.half_b, one.pixel_size, mask, corrected=True, seed=seed)
    write_map(folder.mask, mask.numpy(), one.pixel_size)
    write_text(folder.fsc, table.as_text())
    if plot:
        with atomic_path(folder.plot) as temporary:
            write_png(temporary, table, f"half maps, {one.count} particles")
    return table


def _note_classes(out: MapsDir, particles: ParticleSet, keys: np.ndarray) -> None:
    """Which particle is in which class, beside the maps: the report compares it with the clusters."""
    import numpy as np

    from cryosuite.formats.pickles import write_pickle

    write_pickle(out.index, np.asarray(particles.index, np.int64))
    write_pickle(out.labels, np.maximum(keys, -1).astype(np.int64))


def _row(label: object, one: Reconstruction, table: FscTable | None, folder: MapsDir) -> list[str]:
    """One line of the table on screen."""
    cells = [str(label), str(one.count), f"{one.count_a} + {one.count_b}" if table else "-"]
    for curve in ("unmasked", "masked", "corrected"):
        cells.append(f"{table.resolution(curve, 0.143):.1f}" if table and curve in table.curves else "-")
    return [*cells, str(folder.map)]


def _print(rows: list[list[str]], one: Reconstruction, outdir: Path) -> None:
    from cryosuite.console import table

    columns = ["class", "particles", "half sets", "unmasked", "masked", "corrected", "map"]
    box, pixel = one.box_size, one.pixel_size
    if len(rows) > 60:
        rows = [*rows[:30], ["..."] * len(columns), *rows[-30:]]
    table(
        f"{outdir}: D = {box}, {pixel:.3g} A per pixel; resolution in A where the half maps' FSC falls below 0.143 "
        f"(Nyquist {2 * pixel:.3g} A)",
        columns,
        rows,
    )
