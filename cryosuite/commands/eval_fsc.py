"""``cryosuite eval-fsc``: two maps, half maps, a map against an atomic model, or a whole run against its truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from cryosuite.commands.options import check_seed, typed_beside

RUN, MAPS, MODEL = "A run against its truth", "Two maps", "A map against an atomic model"

# options that mean something, by what is compared
OF_ALL = {"outdir", "seed", "threads"}
OF_MODEL = {"map_", "model", "half1", "half2", "resolution", "apix"}
OF_MAPS = {"mask", "compat", "apix", "half_maps", "align"}
OF_POLISHED = {"truth", "mask", "compat", "images", "sampler", "polished", "shapes", "local", "align", "oracle"}
OF_RUN = OF_POLISHED | {"epoch", "no_clustering", "cluster_seeds", "gmm_seeds", "umap", "volume_from"}
OF_SET = {"truth", "mask", "compat", "oracle"}


def _option(default: Any, *names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(default, *names, help=help, rich_help_panel=panel, show_default=default is not None, **more)


def main(
    context: typer.Context,
    inputs: list[Path] = typer.Argument(
        None,
        help="Two maps; or a folder of backproject; or the folder of a training run; or a simulated set.",
        metavar="MAP1 MAP2 | FOLDER",
    ),
    mask: str = typer.Option(
        None,
        "--mask",
        help="Mask file; auto: made from the maps; none: no mask. Default for a run: the truth's own mask.",
    ),
    outdir: Path = typer.Option(
        None, "-o", "--outdir", help="Folder for CSV, JSON and PNG. For a run the default is RUN/eval.EPOCH."
    ),
    compat: str = typer.Option(
        None, "--compat", help="cryobench: that benchmark's shells, sampler and absolute FSC, for published tables."
    ),
    apix: float = typer.Option(
        None, "--Apix", "--apix", help="Pixel size in Angstrom, in place of the maps' own.", show_default=False
    ),
    seed: int = typer.Option(0, "--seed", help="Random seed of phases and of the images judged.", callback=check_seed),
    map_: Path = _option(None, "--map", help="Map to judge by a model: any shape, voxels, axis order.", panel=MODEL),
    model: Path = _option(
        None, "--model", "--model-pdb", help="Atomic model of the map: .cif or .pdb, also .gz.", panel=MODEL
    ),
    half1: Path = _option(None, "--half1", help="First half map: adds local resolution and their FSC.", panel=MODEL),
    half2: Path = _option(None, "--half2", help="Second half map, with --half1.", panel=MODEL),
    resolution: float = _option(
        None,
        "--resolution",
        help="Resolution in Angstrom at which the model's map is cut; nothing: FSC .143 of the half maps, or d_model.",
        panel=MODEL,
    ),
    half_maps: bool = _option(
        False, "--half-maps", help="The two maps are half maps: correct the FSC for the mask.", panel=MAPS
    ),
    truth: Path = _option(
        None,
        "--truth",
        help="Folder that holds the truth: of simulate, or of CryoBench as published; nothing: found by itself.",
        panel=RUN,
    ),
    epoch: int = _option(None, "--epoch", help="Epoch of the run, counted from 1; nothing: the last.", panel=RUN),
    images: int = _option(100, "--images", help="Volumes to decode and judge.", panel=RUN),
    sampler: str = _option(
        None,
        "--sampler",
        help="random-per-class (default): equally many of each state. compat: every n-th particle sorted by state.",
        panel=RUN,
    ),
    oracle: bool = _option(
        False,
        "--oracle",
        help="Add the floor (all particles in one map) and the ceiling (true classes backprojected); kept on disk.",
        panel=RUN,
    ),
    no_clustering: bool = _option(False, "--no-clustering", help="Leave out ARI, AMI and kNN.", panel=RUN),
    cluster_seeds: int = _option(10, "--cluster-seeds", help="Random starts of k-means to average over.", panel=RUN),
    gmm_seeds: int = _option(
        3, "--gmm-seeds", help="Random starts of Gaussian mixtures, which are slow, to average over.", panel=RUN
    ),
    umap: bool = _option(False, "--umap", help="Also cluster after UMAP to 16 dimensions.", panel=RUN),
    polished: bool = _option(
        False, "--polished", help="Judge the maps that `cryosuite polish RUN` made instead of the run's own.", panel=RUN
    ),
    shapes: bool = _option(
        False, "--shapes", help="Add Chamfer distance and overlap of the volumes' shapes.", panel=RUN
    ),
    local: bool = _option(False, "--local", help="Add the FSC in windows of 25 A around the true density.", panel=RUN),
    align: bool = typer.Option(
        False,
        "--align",
        help="First turn and move each map (or the first of two) onto the truth, trying both hands: for ab-initio "
        "maps. About 10 s per map.",
    ),
    volume_from: str = _option(
        None, "--volume-from", help="How the run makes its volumes, if not as trained (image, knn, ...).", panel=RUN
    ),
    threads: int = typer.Option(0, "--threads", min=0, help="Processor threads to use; 0: all."),
) -> None:
    """Compare maps shell by shell (FSC), or judge a run against a known truth.

    Two maps give the resolution in Angstrom where their FSC falls below 0.5
    and 0.143, and the area under the curve (AUC). Half maps are also
    corrected for the mask by randomising phases. A run on simulated particles
    gets the benchmark's scores: FSC of the decoded volumes with the true ones,
    and how well the latents separate the true states. A map and its atomic
    model give correlations in and out of the mask, map-model FSC, d_model and
    Q-scores of every atom and residue.

        cryosuite eval-fsc map1.mrc map2.mrc --mask mask.mrc

        cryosuite eval-fsc half_map_a.mrc half_map_b.mrc --half-maps

        cryosuite eval-fsc map/            (a folder of backproject)

        cryosuite eval-fsc run/ --oracle

        cryosuite eval-fsc maps/ --truth simulated/   (a folder of polish)

        cryosuite eval-fsc --map map.mrc --model model.cif -o scores/
    """

    import torch

    if threads > 0:
        torch.set_num_threads(threads)
    if compat not in (None, "cryobench"):
        raise _error(f"--compat {compat}: unknown; there is cryobench.")
    if any(path is not None for path in (map_, model, half1, half2)):
        from cryosuite.commands.eval_model import ModelOptions, evaluate_model

        if inputs:
            raise _error(f"{inputs[0]}: give either maps and folders to compare, or --map and --model, not both")
        _require_meaning(context, OF_MODEL, "with --model, which makes its masks itself")
        evaluate_model(ModelOptions(map_, model, half1, half2, resolution, apix, outdir))
        return
    if not inputs:
        raise _error("nothing to compare: give two maps, a folder, or --map MAP.mrc --model MODEL.cif")
    if len(inputs) > 2:
        raise _error(f"{len(inputs)} inputs given: two maps or one folder are expected")
    if len(inputs) == 2 or not inputs[0].is_dir():
        _require_meaning(context, OF_MAPS, "for two maps")
        _two_maps(inputs, mask, outdir, bool(compat), half_maps, apix, seed, align)
        return
    from cryosuite.data.results import MapsDir

    folder = MapsDir(inputs[0])
    if folder.half_a.exists() and folder.half_b.exists():
        here = f"for the half maps of {inputs[0]} (another comparison: give its {folder.map.name} and another map)"
        _require_meaning(context, OF_MAPS - {"align"}, here)
        own = str(folder.mask) if mask is None and folder.mask.exists() else mask
        _two_maps([folder.half_a, folder.half_b], own, outdir, bool(compat), True, apix, seed)
        return
    from cryosuite.commands.eval_run import (
        RunOptions,
        evaluate_polished,
        evaluate_run,
        evaluate_set,
        is_polished,
        is_run,
    )

    options = RunOptions(
        truth, epoch, images, sampler, oracle, bool(compat), mask, not no_clustering, cluster_seeds, gmm_seeds, umap,
        seed, outdir, volume_from, shapes, polished, local, align,
    )  # fmt: skip
    if is_run(inputs[0]):
        _require_meaning(context, OF_RUN, "for a run")
        evaluate_run(inputs[0], options)
    elif is_polished(inputs[0]):
        _require_meaning(context, OF_POLISHED, "for a folder of polish")
        evaluate_polished(inputs[0], options)
    elif polished:
        raise _error(f"--polished: {inputs[0]} is not a training run")
    else:
        _require_meaning(context, OF_SET, "for a particle set")
        evaluate_set(inputs[0], options)


def _require_meaning(context: typer.Context, used: set[str], here: str) -> None:
    """InputError for options that were typed and would be ignored: a score they do not change would be misread."""
    idle = typed_beside(context, OF_ALL | used)
    if idle:
        many = "have" if len(idle) > 1 else "has"
        raise _error(f"{', '.join(idle)} {many} no meaning {here}; leave {'them' if len(idle) > 1 else 'it'} out")


def _error(message: str) -> Exception:
    from cryosuite.errors import InputError

    return InputError(message)


def _two_maps(
    paths: list[Path],
    mask: str | None,
    outdir: Path | None,
    compat: bool,
    half_maps: bool,
    apix: float | None,
    seed: int,
    align: bool = False,
) -> None:
    """FSC of two maps: table on screen, files when a folder is given."""
    from cryosuite.metrics.fsc import fsc_table

    if len(paths) != 2:
        raise _error(f"{paths[0]}: one map alone cannot be compared; give two maps, or a folder")
    a, b, pixel_size = _read_pair(paths, apix)
    if align:
        a = _aligned(a, b, pixel_size)
    chosen = _mask_of(mask, a, b, half_maps, pixel_size)
    table = fsc_table(a, b, pixel_size, chosen, corrected=half_maps, compat=compat, seed=seed)
    _print(table, paths)
    if outdir is not None:
        _write(table, outdir, paths)


def _read_pair(paths: list[Path], apix: float | None) -> tuple[Any, Any, float]:
    """Two maps as tensors and their pixel size; InputError when they do not lie on one grid."""
    import torch

    from cryosuite.errors import notice
    from cryosuite.formats.mrc import read_map

    first, second = (read_map(path) for path in paths)
    for path, one in zip(paths, (first, second), strict=True):
        if len(set(one.data.shape)) != 1 or one.data.shape[0] % 2:
            raise _error(f"{path}: has shape {one.data.shape}; cubic maps with an even box are needed")
    if first.data.shape != second.data.shape:
        raise _error(
            f"{paths[0]} has a box of {first.data.shape[0]}, {paths[1]} one of {second.data.shape[0]}: "
            "bring both to one grid first"
        )
    sizes = [one.pixel_size for one in (first, second) if one.pixel_size]
    if apix is None and len(sizes) == 2 and abs(sizes[0] - sizes[1]) > 0.005 * sizes[0]:
        raise _error(
            f"{paths[0]} has {sizes[0]:.4g} A per pixel, {paths[1]} has {sizes[1]:.4g} A: they are not on one grid. "
            "If a header is wrong, give the pixel size with --Apix."
        )
    pixel_size = apix or (sizes[0] if sizes else None)
    if pixel_size is None:
        notice(f"{paths[0]}: no pixel size in the header: 1 A is assumed; give --Apix")
        pixel_size = 1.0
    if not pixel_size > 0:
        raise _error(f"--Apix {apix}: a positive number of Angstrom is needed")
    for path, one in zip(paths, (first, second), strict=True):
        if not _finite(one.data):
            raise _error(f"{path}: holds values that are not finite (NaN or infinite)")
    return torch.from_numpy(first.data), torch.from_numpy(second.data), float(pixel_size)


def _aligned(a: Any, b: Any, pixel_size: float) -> Any:
    """The first map on the second, and a line that says how it was moved."""
    import numpy as np

    from cryosuite import console
    from cryosuite.metrics.align import align_map

    found = align_map(a, b)
    degrees = np.rad2deg(np.arccos(np.clip((np.trace(found.rotation) - 1) / 2, -1, 1)))
    console.say(
        f"aligned: turned by {degrees:.1f} degrees, moved by {np.linalg.norm(found.shift) * pixel_size:.1f} A"
        f"{', mirrored' if found.mirrored else ''}; correlation {found.correlation:.3f}"
    )
    return found.volume


def _finite(data: Any) -> bool:
    """Whether all values are finite: their sum is, unless some are not."""
    import numpy as np

    return bool(np.isfinite(data.sum(dtype=np.float64)))


def _mask_of(mask: str | None, a: Any, b: Any, half_maps: bool, pixel_size: float) -> Any:
    """The mask tensor: from a file, made from the mean of the maps, or None."""
    import torch

    from cryosuite.data.masks import read_mask
    from cryosuite.kernels import shells
    from cryosuite.reconstruct.masks import half_map_mask

    if mask == "none" or (mask is None and not half_maps):
        return None
    if mask in (None, "auto"):
        return half_map_mask((a + b) / 2, shells.fsc(a, b) if half_maps else None)
    return torch.from_numpy(read_mask(Path(mask), a.shape[-1], pixel_size))


def _print(table: Any, paths: list[Path]) -> None:
    from cryosuite import console

    rows = []
    for row in table.summary():
        if row["curve"] == "random":
            continue
        cells = [f"{row['resolution_0.5_A']:.2f}", f"{row['resolution_0.143_A']:.2f}"]
        rows.append([row["curve"], *cells, f"{row['auc']:.4f}", f"{row['auc_normalised']:.4f}"])
    title = f"{paths[0].name} and {paths[1].name}: D = {table.box_size}, {table.pixel_size:.4g} A per pixel"
    if table.mask_fraction is not None:
        title += f", mask {table.mask_fraction:.3f} of the box"
    console.table(title, ["FSC", "A at 0.5", "A at 0.143", "AUC", "AUC normalised"], rows)
    if table.curves["unmasked"][: table.box_size // 4].mean() < -0.2:
        console.say("note: the FSC is negative: one of the maps has inverted contrast")
    if table.randomised_from is not None:
        where = table.box_size * table.pixel_size / table.randomised_from
        console.say(f"phases randomised beyond {where:.2f} A (shell {table.randomised_from})")


def _write(table: Any, outdir: Path, paths: list[Path]) -> None:
    """CSV, text, JSON and PNG of one comparison."""
    from cryosuite.data.results import ScoresDir
    from cryosuite.formats.atomic import atomic_path, write_text
    from cryosuite.formats.json_text import write_json
    from cryosuite.metrics.fsc import write_png

    out = ScoresDir(outdir)
    outdir.mkdir(parents=True, exist_ok=True)
    write_text(out.curves, table.as_csv())
    write_text(out.text, table.as_text())
    summary = {
        "maps": [str(path) for path in paths], "box_size": table.box_size, "pixel_size_A": table.pixel_size,
        "mask_fraction": table.mask_fraction, "randomised_from_shell": table.randomised_from,
        "shells": "cryobench" if table.compat else "ours", "curves": table.summary(),
    }  # fmt: skip
    write_json(out.summary, summary)
    with atomic_path(out.plot) as temporary:
        write_png(temporary, table, f"{paths[0].name} and {paths[1].name}")
