"""A landscape on disk: sketch, maps, states, plots, tables, scripts (see ``landscape`` for what is computed)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cryosuite import __version__
from cryosuite.analysis import chimerax, landscape_plots, plots, sheets
from cryosuite.analysis.landscape import (
    Landscape,
    Sketch,
    VolumePca,
    count_intervals,
    landscape,
    medoids,
    place_particles,
    sketch,
    state_maps,
    states,
    volume_pca,
)
from cryosuite.analysis.latents import finite_rows
from cryosuite.analysis.leftovers import drop_walk
from cryosuite.analysis.lists import write_lists
from cryosuite.analysis.palette import palette
from cryosuite.analysis.path_files import UMAP_NAMES, write_path
from cryosuite.analysis.trajectory import of_points
from cryosuite.analysis.volumes import (
    BATCH_VOXELS,
    Decode,
    VolumeFile,
    VolumeOptions,
    check_options,
    draw_volumes,
    prepare,
    write_volumes,
)
from cryosuite.console import Progress, say
from cryosuite.data.analysis_dir import AnalysisDir, LandscapeDir
from cryosuite.data.claim import claim, finished
from cryosuite.data.latents import fingerprint
from cryosuite.data.masks import read_mask
from cryosuite.data.particles import ParticleSet
from cryosuite.errors import InputError, notice
from cryosuite.formats.atomic import reserve
from cryosuite.formats.config import write_yaml
from cryosuite.formats.mrc import write_map
from cryosuite.formats.pickles import write_pickle

SKETCH_BOX = 64  # voxels: maps are compared at this size unless -d says otherwise
MASKED_FROM = 24  # maps that the mask is made of
WALKS, STEPS = 2, 7  # volume components that maps are made along, and how many
LEAST_VARIANCE = 1e-6  # of the mean map's: below, all maps are the same


@dataclass(frozen=True)
class LandscapeOptions:
    """What to do.

    Attributes:
        count: volumes of the sketch. box: to which they are cropped for the comparison; None: at most ``SKETCH_BOX``.
        components: kept of the volume PCA. states, linkage: of the agglomeration. mask: file, or None for one found.
        volumes: what is done to every decoded volume (its ``downsample`` is ``box``'s business).
    """

    count: int = 300
    box: int | None = None
    components: int = 20
    states: int = 10
    linkage: str = "ward"
    mask: Path | None = None
    seed: int = 0
    volumes: VolumeOptions = field(default_factory=VolumeOptions)


@dataclass
class Found:
    """What a landscape found: rows (M,) with latents, labels (N,) states (-1: left out), per-state numbers."""

    rows: np.ndarray
    labels: np.ndarray
    sketch: Sketch
    pca: VolumePca
    sketch_states: np.ndarray
    coordinates: np.ndarray
    placed: float
    sizes: np.ndarray
    intervals: np.ndarray
    colours: list[str]
    by_micrograph: bool
    middle: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    files: list[VolumeFile] = field(default_factory=list)
    energy: np.ndarray | None = None


def make_landscape(
    out: LandscapeDir,
    z: np.ndarray,  # (N, zdim)
    decode: Decode | None,
    pixel_size: float,
    box_size: int,
    options: LandscapeOptions,
    *,
    particles: ParticleSet | None = None,
    umap: np.ndarray | None = None,
    pixels: int = 320,
) -> Found:
    """Sketch the latents, decode, compare the maps, find states and write everything to ``out``.

    Args:
        umap: (N, 2) of an analysis, or None. pixels: side of the pictures of volumes.

    Raises:
        InputError: a run that makes no volumes, fewer than two different latents, options that cannot be met.
    """
    if decode is None:
        raise InputError("this run makes no volumes of latents, so there is no landscape of them.")
    box = options.box or min(box_size, SKETCH_BOX)
    small = replace(options.volumes, downsample=box)
    check_options(small, box_size)
    given = _given_mask(options.mask, box, box_size)
    rows = finite_rows(np.asarray(z))
    good = np.ascontiguousarray(z[rows], np.float32)
    chosen = sketch(good, options.count, options.seed)
    if len(chosen.rows) < 2:
        raise InputError("all latents are equal: there is one volume, and no landscape.")
    claim(out.path, out.summary, [*out.names(), "vol_[0-9]*.mrc", "clusters/cluster_*", "component*/vol_[0-9]*.mrc"])
    say(f"{len(chosen.rows)} volumes stand for {len(rows):,} particles, compared at {box} voxels")
    with _decoded(out, good[chosen.rows], decode, pixel_size, box_size, small) as (maps, size):
        mask = _found_mask(maps, box) if given is None else given
        found = _among_maps(good, rows, len(z), chosen, maps, mask, options, particles)
        _drop_earlier(out)
        write_map(out.mask, mask, size)
        _write_maps(out, found, maps, mask, size, VolumeOptions(mass_kda=options.volumes.mass_kda), pixels)
    points = good[chosen.rows[found.middle]]
    with Progress(2 * len(points), "volumes of states", unit="steps") as progress:
        found.files = write_volumes(points, decode, out.states, pixel_size, options.volumes, found.colours, box_size,
                                    progress)  # fmt: skip
        pictures = draw_volumes(found.files, out.states, pixels, progress)
    final = (options.volumes.pixel_size or pixel_size) * box_size / (options.volumes.downsample or box_size)
    sizes = [int(n) for n in found.sizes]
    chimerax.cluster_script(out.chimerax, found.files, sizes, final)
    chimerax.overlay_script(out.overlay, found.files, sizes, final)
    heads = [str(k) for k in range(len(sizes))]
    sheets.contact_sheet(out.plot("volumes"), pictures, found.colours, heads, sheets.percent(sizes))
    _plots(out, found, None if umap is None else umap[rows])
    _tables(out, found, particles)
    _summarise(out, found, options, box, size, z)
    return found


def _drop_earlier(out: LandscapeDir) -> None:
    """Remove what an earlier landscape left and this one may not write again."""
    out.summary.unlink(missing_ok=True)  # until the end this folder is not complete
    for name in ("volume_pca", "umap"):
        for picture in (out.plot(name), out.plot(f"landscape_{name}")):
            for old in (picture, picture.with_suffix(".csv")):
                old.unlink(missing_ok=True)
    for component in range(1, WALKS + 1):
        drop_walk(out.walk(component))
    clusters = AnalysisDir(out.path).cluster_indices(0).parent
    for old in [*clusters.glob("cluster_*.ind.pkl"), *clusters.glob("cluster_*.star")]:
        old.unlink()


@contextmanager
def _decoded(
    out: LandscapeDir, z: np.ndarray, decode: Decode, pixel_size: float, box_size: int, options: VolumeOptions
) -> Iterator[tuple[np.ndarray, float]]:
    """Maps (s, d, d, d) at latents in a file that is gone afterwards, and their pixel size in A."""
    box, path = int(options.downsample or box_size), out.scratch
    batch, size, maps = max(1, min(len(z), BATCH_VOXELS // box_size**3)), pixel_size, None
    try:
        reserve(path, 4 * len(z) * box**3)
        maps = np.memmap(path, np.float32, "r+", shape=(len(z), box, box, box))
        with Progress(len(z), "decoding", unit="volumes") as progress:
            for start in range(0, len(z), batch):
                part = slice(start, start + batch)
                maps[part], size = prepare(np.asarray(decode(z[part])), pixel_size, options)
                progress.advance(len(z[part]))
        yield maps, size
    finally:
        del maps
        path.unlink(missing_ok=True)


def _given_mask(path: Path | None, box: int, box_size: int) -> np.ndarray | None:
    """The user's mask (d, d, d) in 0..1, brought to the box of the comparison."""
    if path is None:
        return None
    import torch

    from cryosuite.kernels.fourier import fourier_crop_volume

    given = read_mask(path)
    if given.shape[0] not in (box, box_size):
        raise InputError(f"{path}: a mask of {given.shape[0]} voxels; expected a box of {box_size} (or {box}).")
    mask = torch.from_numpy(np.array(given, np.float32))
    return (fourier_crop_volume(mask[None], box)[0] if given.shape[0] != box else mask).clamp(0, 1).numpy()


def _found_mask(maps: np.ndarray, box: int) -> np.ndarray:
    """A mask (d, d, d) around what is dense in any of some maps."""
    import torch

    from cryosuite.reconstruct.masks import auto_mask, soft_sphere

    some = np.linspace(0, len(maps) - 1, min(len(maps), MASKED_FROM)).astype(int)
    return auto_mask(torch.from_numpy(maps[some]) * soft_sphere(box)).numpy()


def _among_maps(
    z: np.ndarray, rows: np.ndarray, count: int, chosen: Sketch, maps: np.ndarray, mask: np.ndarray,
    options: LandscapeOptions, particles: ParticleSet | None,
) -> Found:  # fmt: skip
    """Components, coordinates, states, counts."""
    inside = mask > 0.01
    masked = np.stack([one[inside] * mask[inside] for one in maps])
    pca = volume_pca(masked, chosen.counts, options.components)
    signal = float(np.square(pca.mean).sum())
    change = float(np.average(np.square(masked - pca.mean).sum(axis=1), weights=chosen.counts))
    if change <= LEAST_VARIANCE * signal or not len(pca.ratio):
        raise InputError("all volumes are the same inside the mask: there is no landscape. Give another --mask?")
    coordinates, placed = place_particles(z, chosen, pca.scores)
    of_sketch = states(pca.scores, chosen, options.states, options.linkage)
    own = of_sketch[chosen.cell]
    labels = np.full(count, -1, np.int64)
    labels[rows] = own
    total = int(of_sketch.max()) + 1
    blocks = micrographs(particles)
    intervals = count_intervals(own, total, None if blocks is None else blocks[rows], options.seed)
    if placed < 0.5:
        notice(
            f"volumes that are left out are placed with {100 * max(placed, 0):.0f} % of the variance: the maps do not "
            "follow the latents smoothly, or -N is too small; the landscape of particles is coarse."
        )
    sizes, middle = np.bincount(own, minlength=total), medoids(pca.scores, of_sketch, chosen.counts)
    return Found(
        rows, labels, chosen, pca, of_sketch, coordinates, placed, sizes, intervals, palette(total),
        blocks is not None, middle,
    )  # fmt: skip


def micrographs(particles: ParticleSet | None) -> np.ndarray | None:
    """Micrograph (N,) of each particle as a number; None where the particle file does not say it for all."""
    if particles is None:
        return None
    from cryosuite.analysis.particle_table import particle_columns

    nothing = np.full(len(particles), -1)
    columns = particle_columns(np.zeros((len(particles), 2), np.float32), nothing, particles)
    found = next((column.values for column in columns if column.name == "micrograph"), None)
    return None if found is None or (found < 0).any() or len(np.unique(found)) < 20 else found


def _write_maps(
    out: LandscapeDir, found: Found, maps: np.ndarray, mask: np.ndarray, size: float, options: VolumeOptions,
    pixels: int,
) -> None:  # fmt: skip
    """Mean maps, standard deviation maps, and maps along the first volume components.

    options: what is still to be done to maps that were prepared already.
    """
    with Progress(len(maps), "maps of states", unit="volumes") as progress:
        mean, spread = state_maps(maps, found.sketch_states, found.sketch.counts, progress)
    out.maps.mkdir(exist_ok=True)
    for old in out.maps.glob("state_*.mrc"):
        old.unlink()  # of an earlier landscape with more states
    for k in range(len(mean)):
        write_map(out.mean(k), mean[k], size)
        write_map(out.spread(k), spread[k], size)
    share = np.bincount(found.sketch_states, found.sketch.counts) / found.sketch.counts.sum()
    whole = np.tensordot(share.astype(np.float32), mean, axes=1)
    write_map(out.mean_map, whole, size)
    inside = mask > 0.01
    for component in range(min(WALKS, len(found.pca.ratio))):
        along = np.linspace(*np.percentile(found.coordinates[:, component], [2, 98]), STEPS).astype(np.float32)

        def decode(at: np.ndarray, axis: np.ndarray = found.pca.components[component]) -> np.ndarray:
            volumes = np.repeat(whole[None], len(at), axis=0)
            volumes[:, inside] += at[:, :1] * axis
            return volumes

        name = f"along volume component {component + 1}"
        texts = [f"{value:.3g}" for value in along]
        write_path(out.walk(component + 1), of_points(along[:, None], name, "pc"), decode, size, len(whole),
                   options, texts, pixels=pixels)  # fmt: skip


def _plots(out: LandscapeDir, found: Found, umap: np.ndarray | None) -> None:
    """Particles by state and landscapes, among maps and on the UMAP."""
    own, ratio = found.labels[found.rows], found.pca.ratio
    names = [f"volume component {i + 1} ({100 * r:.0f} %)" for i, r in enumerate(ratio[:2])]
    spaces: list[tuple[str, np.ndarray, Sequence[str], str]] = []
    if len(ratio) > 1:
        spaces.append(("volume_pca", found.coordinates[:, :2], names, "maps"))
    if umap is not None and np.isfinite(umap).all():
        spaces.append(("umap", umap, UMAP_NAMES, "UMAP"))
    middle = found.sketch.rows[found.middle]
    for name, xy, axes, title in spaces:
        plots.scatter(out.plot(name), xy, axes, f"{title}: {len(found.sizes)} states", own, found.colours)
        columns = {"row_from_0": found.rows, "state_from_0": own, "x": xy[:, 0], "y": xy[:, 1]}
        plots.write_csv(out.plot(name).with_suffix(".csv"), columns)
        surface = landscape(xy)
        landscape_plots.draw_landscape(out.plot(f"landscape_{name}"), surface, axes, xy[middle], found.colours)
        _landscape_csv(out.plot(f"landscape_{name}").with_suffix(".csv"), surface)
        if found.energy is None:
            found.energy = surface.at(xy[middle])
    landscape_plots.draw_counts(out.plot("states"), found.sizes, found.intervals, found.colours)


def _landscape_csv(path: Path, surface: Landscape) -> None:
    row, column = np.nonzero(np.isfinite(surface.energy))
    centre = [(edge[1:] + edge[:-1]) / 2 for edge in (surface.x, surface.y)]
    values = surface.energy[row, column]
    plots.write_csv(path, {"x": centre[0][column], "y": centre[1][row], "minus_ln_density_kT": values})


def _tables(out: LandscapeDir, found: Found, particles: ParticleSet | None) -> None:
    """labels.pkl, states, sketch, coordinates, lists of particles per state."""
    write_pickle(out.labels, found.labels)
    total = found.sizes.sum()
    energy = np.full(len(found.sizes), np.nan) if found.energy is None else found.energy
    plots.write_csv(out.table, {
        "state_from_0": np.arange(len(found.sizes)), "particles": found.sizes,
        "particles_low_95": found.intervals[:, 0], "particles_high_95": found.intervals[:, 1],
        "share": found.sizes / total, "minus_ln_share_kT": -np.log(np.maximum(found.sizes, 1) / total),
        "minus_ln_density_kT": energy, "sketch_volumes": np.bincount(found.sketch_states),
        "volume": [file.path.name for file in found.files], "row_from_0": found.rows[found.sketch.rows[found.middle]],
        "level": [file.level for file in found.files], "colour": found.colours,
    })  # fmt: skip
    shown = found.pca.scores[:, :8]
    plots.write_csv(out.path / "sketch.csv", {
        "sketch_from_0": np.arange(len(shown)), "row_from_0": found.rows[found.sketch.rows],
        "particles": found.sketch.counts, "state_from_0": found.sketch_states,
        **{f"volume_pc{i + 1}": shown[:, i] for i in range(shown.shape[1])},
    })  # fmt: skip
    plots.write_csv(out.path / "components.csv", {
        "volume_pc": np.arange(1, len(found.pca.ratio) + 1), "share_of_variance": found.pca.ratio,
    })  # fmt: skip
    write_pickle(out.coordinates, _full(found))
    if particles is not None:
        write_lists(AnalysisDir(out.path), particles, found.labels, len(found.sizes))


def _full(found: Found) -> np.ndarray:
    values = np.full((len(found.labels), found.coordinates.shape[1]), np.nan, np.float32)
    values[found.rows] = found.coordinates
    return values


def _summarise(
    out: LandscapeDir, found: Found, options: LandscapeOptions, box: int, size: float, z: np.ndarray
) -> None:
    """landscape.yaml, written last."""
    write_yaml(out.summary, {
        "kind": "landscape", "version": __version__, "n_particles": len(z), "latents": fingerprint(z),
        "sketch": len(found.sketch.rows),
        "counting": "states, volumes and rows count from 0; volume components from 1",
        "box_size": box, "pixel_size": float(size), "states": len(found.sizes), "linkage": options.linkage,
        "seed": options.seed, "mask": None if options.mask is None else options.mask.name,
        "variance": [float(f"{r:.6g}") for r in found.pca.ratio],
        "left_out_volumes_placed": None if np.isnan(found.placed) else round(found.placed, 4),
        "intervals": "95 %, " + ("micrographs" if found.by_micrograph else "particles") + " drawn again",
        "colours": list(found.colours), "levels": [file.level for file in found.files],
    })  # fmt: skip
    finished(out.path)
