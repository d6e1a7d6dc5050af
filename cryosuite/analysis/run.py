"""The sequence of an analysis: latents -> components, map, clusters -> volumes, pictures, scripts, lists.

Knows no method: it takes latents and a function that decodes them. Names of files are those cryoDRGN users expect;
labels, file numbers, rows and indices count from 0.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cryosuite import __version__
from cryosuite.analysis import chimerax, latents, plots, sheets
from cryosuite.analysis.latents import Clusters, Pca
from cryosuite.analysis.leftovers import drop_pages, drop_umap_of_others, drop_volumes_of_others
from cryosuite.analysis.overview import overview
from cryosuite.analysis.palette import palette
from cryosuite.analysis.path_files import UMAP_NAMES, plot_path, write_path
from cryosuite.analysis.trajectory import of_points
from cryosuite.analysis.volumes import (
    Decode,
    VolumeFile,
    VolumeOptions,
    check_options,
    draw_volumes,
    write_volumes,
)
from cryosuite.console import Progress, say
from cryosuite.data.claim import claim, finished
from cryosuite.data.latents import fingerprint
from cryosuite.data.particles import ParticleSet
from cryosuite.data.workdir import AnalysisDir, VolumeDir
from cryosuite.errors import InputError
from cryosuite.formats.atomic import atomic_path
from cryosuite.formats.config import write_yaml
from cryosuite.formats.pickles import write_pickle

PREVIEW = 320  # pixels on a side of the pictures of volumes


@dataclass(frozen=True)
class AnalyzeOptions:
    """What to do; defaults are cryoDRGN's.

    Attributes:
        ksample: clusters of k-means. cluster: another way to find them (``clusters.KINDS``), with ``k`` of them or
            ``auto``; None: k-means with ``ksample``. gmm: groups of the Gaussian mixture, or None to choose by BIC.
        components: principal components to walk along, with ``per_component`` volumes between the percentiles.
        volumes: what is done to each volume.
    """

    ksample: int = 20
    gmm: int | None = None
    cluster: str | None = None
    k: int | str = "auto"
    components: int = 2
    per_component: int = 10
    percentiles: tuple[float, float] = (5.0, 95.0)
    skip_umap: bool = False
    skip_volumes: bool = False
    seed: int = 0
    volumes: VolumeOptions = field(default_factory=VolumeOptions)


@dataclass
class Analysis:
    """What an analysis found and wrote.

    Attributes:
        rows: (M,) rows of the latents that are numbers. labels: (N,) int64, -1 where left out.
        umap: (N, 2) float32, NaN where left out, or None. colours: one ``#rrggbb`` per cluster.
        folder: of the cluster volumes. files: the volumes, in the order of the labels; empty when skipped.
    """

    out: AnalysisDir
    rows: np.ndarray
    labels: np.ndarray
    colours: list[str]
    clusters: Clusters
    pca: Pca
    folder: VolumeDir
    umap: np.ndarray | None = None
    mixture: Clusters | None = None
    files: list[VolumeFile] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)
    walks: list[VolumeDir] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def analyze(
    z: np.ndarray,  # (N, zdim)
    decode: Decode | None,
    out: AnalysisDir,
    pixel_size: float,
    box_size: int,
    options: AnalyzeOptions | None = None,
    *,
    particles: ParticleSet | None = None,
    epoch: int = 0,
    records: Sequence[Mapping[str, float]] = (),
    run: Path | None = None,
) -> Analysis:
    """Analyse latents and write everything to ``out``.

    Args:
        z: latents, one row per particle; rows that are not finite are named and left out.
        decode: (k, zdim) -> (k, D, D, D) float32; None leaves the volumes out.
        pixel_size: of the decoded box, A. box_size: D.
        particles: the particle set of the rows, for original indices and lists per cluster.
        records: lines of metrics.jsonl, for the learning curve up to ``epoch``.
        run: folder of the run, noted in analyze.yaml so that ``select`` finds it from ``out``.

    Raises:
        InputError: no finite latent, options that cannot be met, a folder that cannot be written.
    """
    options = options or AnalyzeOptions()
    check_options(options.volumes, box_size)
    _check(options, particles, len(z))
    rows = latents.finite_rows(np.asarray(z))
    good = np.ascontiguousarray(z[rows], np.float32)
    claim(out.path, out.summary, out.of_analyze())
    clock = _Clock()

    model = latents.pca(good)
    clusters, folder = _clusters(good, out, options)
    result = Analysis(out, rows, _full(clusters.labels, rows, len(z), -1), palette(clusters.count), clusters, model,
                      folder)  # fmt: skip
    clock.lap(result, options.cluster or "k-means", f"{clusters.count} clusters of {len(rows):,} particles")
    result.mixture = latents.mixture(good, model, options.gmm, seed=options.seed)
    if result.mixture is not None:
        clock.lap(result, "Gaussian mixture", f"{result.mixture.count} groups")
    if not options.skip_umap:
        say(f"UMAP of {len(rows):,} particles ...")
        embedded = latents.umap(good, options.seed)
        if embedded is not None:
            result.umap = _full(embedded, rows, len(z), np.nan)
            clock.lap(result, "UMAP", "done")
    if result.umap is None:
        drop_umap_of_others(out, z)
    drop_pages(out)
    _write_numbers(result, good, particles)
    _plot(result, good, epoch, records)
    clock.lap(result, "plots", "drawn")
    if decode is not None and not options.skip_volumes:
        _volumes(result, good, decode, pixel_size, box_size, options)
        clock.lap(result, "volumes", "decoded and drawn")
    made = drop_volumes_of_others(out, z, folder, bool(result.files), len(result.walks), options.volumes)
    _summarise(result, options, epoch, pixel_size, z, run, *made)
    return result


def _clusters(z: np.ndarray, out: AnalysisDir, options: AnalyzeOptions) -> tuple[Clusters, VolumeDir]:
    """The clusters that volumes are made of, and their folder."""
    if options.cluster is None:
        found = latents.kmeans(z, options.ksample, options.seed)
        return found, out.kmeans(found.count)
    from cryosuite.analysis.clusters import cluster, plot_choice

    chosen = cluster(z, options.cluster, options.k, options.seed)
    folder = out.clusters(options.cluster, chosen.k)
    folder.path.mkdir(parents=True, exist_ok=True)
    plot_choice(folder.plot("bic"), chosen)
    scores = chosen.bic or None
    found = Clusters(chosen.labels, chosen.centres, chosen.centres_index, chosen.confidence, scores, chosen.asked)
    return found, folder


def _check(options: AnalyzeOptions, particles: ParticleSet | None, count: int) -> None:
    if options.gmm is not None and options.gmm < 1:
        raise InputError(f"--gmm {options.gmm}: expected at least 1 cluster.")
    if particles is not None and len(particles) != count:
        raise InputError(f"the run has {count} latents, but its particle set has {len(particles)} particles.")
    for name, value in (("--pc", options.components), ("--n-per-pc", options.per_component)):
        if value < 0:
            raise InputError(f"{name} {value}: expected 0 or more.")


class _Clock:
    """Says after each step what was done and how long it took."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def lap(self, result: Analysis, name: str, text: str) -> None:
        now = time.monotonic()
        result.seconds[name] = round(now - self.last, 2)
        say(f"{name}: {text} ({now - self.last:.1f} s)")
        self.last = now


def _full(values: np.ndarray, rows: np.ndarray, count: int, missing: float) -> np.ndarray:
    """Values of the rows as an array of all particles."""
    result = np.full((count, *values.shape[1:]), missing, values.dtype)
    result[rows] = values
    return result


def _columns(result: Analysis, particles: ParticleSet | None) -> dict[str, np.ndarray]:
    """The first columns of every table of particles."""
    index = result.rows if particles is None else particles.index[result.rows]
    labels = result.clusters.labels
    return {
        "row_from_0": result.rows,
        "original_index_from_0": index,
        "cluster_from_0": labels,
        "colour": plots.colours_of(labels, result.colours),
    }


def _write_numbers(result: Analysis, z: np.ndarray, particles: ParticleSet | None) -> None:
    """Labels, centres, coordinates and lists, as pickles, text and CSV."""
    out, clusters = result.out, result.clusters
    write_pickle(out.labels, result.labels)
    _write_clusters(result.folder, clusters, result.rows, result.labels)
    columns = _columns(result, particles)
    scores = {f"pc{i + 1}": result.pca.scores[:, i] for i in range(min(result.pca.scores.shape[1], 8))}
    name = "z_pca" if z.shape[1] > 1 else "z"
    plots.write_csv(out.plot(name).with_suffix(".csv"), columns | (scores if z.shape[1] > 1 else {"z": z[:, 0]}))
    if result.umap is not None:
        write_pickle(out.umap, result.umap)
        places = result.umap[result.rows]
        plots.write_csv(out.plot("umap").with_suffix(".csv"), columns | {"umap1": places[:, 0], "umap2": places[:, 1]})
    if clusters.confidence is not None:
        write_pickle(result.folder.confidence, _full(clusters.confidence, result.rows, len(result.labels), np.nan))
    if result.mixture is not None:
        folder = out.gmm(result.mixture.count)
        labels = _full(result.mixture.labels, result.rows, len(result.labels), -1)
        _write_clusters(folder, result.mixture, result.rows, labels)
        write_pickle(folder.confidence, _full(result.mixture.confidence, result.rows, len(result.labels), np.nan))
        own = {"gmm_from_0": result.mixture.labels, "confidence": result.mixture.confidence}
        plots.write_csv(folder.labels.with_suffix(".csv"), columns | own)
    if particles is not None:
        from cryosuite.analysis.lists import write_lists

        write_lists(out, particles, result.labels, clusters.count)


def _write_clusters(folder: VolumeDir, clusters: Clusters, rows: np.ndarray, labels: np.ndarray) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    write_pickle(folder.labels, labels)
    for path, values, form in ((folder.centers, clusters.centers, "%.8g"),
                               (folder.centers_index, rows[clusters.centers_index], "%d")):  # fmt: skip
        with atomic_path(path) as temporary:
            np.savetxt(temporary, values, fmt=form)


def _plot(result: Analysis, z: np.ndarray, epoch: int, records: Sequence[Mapping[str, float]]) -> None:
    """All plots of latents."""
    out, labels, colours = result.out, result.clusters.labels, result.colours
    if records:
        plots.learning_curve(out.learning_curve(epoch), records, epoch)
    spaces = []
    if z.shape[1] > 1:
        names = [f"PC{i + 1} ({100 * result.pca.ratio[i]:.0f} % of the variance)" for i in (0, 1)]
        spaces.append(("z_pca", result.pca.scores[:, :2], names, "Principal components"))
    else:
        plots.one_dimension(out.plot("z"), out.plot("z_hist"), z[:, 0])
    if result.umap is not None:
        spaces.append(("umap", result.umap[result.rows], UMAP_NAMES, "UMAP"))
    for name, xy, axes, title in spaces:
        clustered = f"{title}: {len(colours)} clusters"
        plots.scatter(out.plot(name), xy, axes, clustered, labels, colours)
        plots.scatter(result.folder.plot(name), xy, axes, clustered, labels, colours)
        plots.hexbin(out.plot(f"{name}_hexbin"), xy, axes, f"{title}: density of particles")
        plots.marginals(out.plot(f"{name}_marginals"), xy, axes)
        if result.mixture is not None:
            folder, groups = out.gmm(result.mixture.count), result.mixture
            text = f"{title}: {groups.count} Gaussian groups"
            plots.scatter(folder.plot(name), xy, axes, text, groups.labels, palette(groups.count))
    if result.mixture is not None and result.mixture.scores and len(result.mixture.scores) > 1:
        folder = out.gmm(result.mixture.count)
        plots.model_choice(folder.plot("bic"), result.mixture.scores, result.mixture.asked)
        columns = {"groups": list(result.mixture.scores), "bic": list(result.mixture.scores.values())}
        plots.write_csv(folder.plot("bic").with_suffix(".csv"), columns)


def _volumes(
    result: Analysis, z: np.ndarray, decode: Decode, pixel_size: float, box_size: int, options: AnalyzeOptions
) -> None:
    """Volumes at the cluster centres and along the components, their pictures and scripts."""
    clusters, out = result.clusters, result.out
    walks = min(options.components, z.shape[1]) if result.pca.spread and options.per_component > 0 else 0
    total = 2 * (clusters.count + walks * options.per_component)
    final = (options.volumes.pixel_size or pixel_size) * box_size / (options.volumes.downsample or box_size)
    with Progress(total, "volumes", unit="steps") as progress:
        result.files = write_volumes(clusters.centers, decode, result.folder, pixel_size, options.volumes,
                                     result.colours, box_size, progress)  # fmt: skip
        result.pictures = draw_volumes(result.files, result.folder, PREVIEW, progress)
        for component in range(walks):
            result.walks.append(_walk(result, component, decode, pixel_size, box_size, options, progress))
    sizes = [int(size) for size in clusters.sizes]
    chimerax.cluster_script(out.chimerax, result.files, sizes, final)
    chimerax.overlay_script(out.chimerax_overlay, result.files, sizes, final)
    heads, texts = [str(label) for label in range(clusters.count)], sheets.percent(sizes)
    sheets.contact_sheet(result.folder.plot("volumes"), result.pictures, result.colours, heads, texts)
    xy, names = (result.umap, UMAP_NAMES) if result.umap is not None else _fallback_map(result, z)
    overview(out.plot("overview"), xy, result.labels, result.colours, result.pictures, names)
    plots.write_csv(result.folder.plot("volumes").with_suffix(".csv"), {
        "cluster_from_0": np.arange(clusters.count),
        "volume": [file.path.name for file in result.files],
        "particles": sizes,
        "colour": result.colours,
        "level": [file.level for file in result.files],
        "center_row_from_0": result.rows[clusters.centers_index],
    })  # fmt: skip


def _fallback_map(result: Analysis, z: np.ndarray) -> tuple[np.ndarray, tuple[str, str]]:
    """Coordinates (N, 2) to show the clusters in when there is no UMAP: the first two components, or z itself."""
    if z.shape[1] > 1:
        return _full(result.pca.scores[:, :2], result.rows, len(result.labels), np.nan), ("PC 1", "PC 2")
    line = np.stack([np.arange(len(z), dtype=np.float32), z[:, 0]], axis=1)
    return _full(line, result.rows, len(result.labels), np.nan), ("particle", "z")


def _walk(
    result: Analysis,
    component: int,
    decode: Decode,
    pixel_size: float,
    box_size: int,
    options: AnalyzeOptions,
    progress: Progress,
) -> VolumeDir:
    """Volumes along one component (from 0; its folder counts from 1), all shown at their median level."""
    folder, count = result.out.pc(component + 1), options.per_component
    along = latents.traversal(result.pca, component, count, *options.percentiles)
    path = of_points(along, f"along principal component {component + 1}", "pc")
    score = (along - result.pca.mean) @ result.pca.components[component]
    texts = [f"PC{component + 1} = {value:.3g}" for value in score]
    files = write_path(
        folder, path, decode, pixel_size, box_size, options.volumes, texts, folder.chimerax.name, PREVIEW, progress
    )
    close = latents.nearest(result.pca.scores, (along - result.pca.mean) @ result.pca.components.T)
    columns = {"volume": [file.path.name for file in files], f"pc{component + 1}": score,
               "nearest_row_from_0": result.rows[close], "level": [file.level for file in files]}  # fmt: skip
    plots.write_csv(folder.plot("pca_traversal").with_suffix(".csv"), columns)
    xy = None if result.umap is None else result.umap[result.rows]
    plot_path(folder, path, result.pca, xy, options.volumes.start_index, path.title.capitalize())
    if xy is not None:
        plots.coloured(folder.plot("umap"), xy, result.pca.scores[:, component], UMAP_NAMES, f"PC{component + 1}")
    return folder


def _summarise(
    result: Analysis,
    options: AnalyzeOptions,
    epoch: int,
    pixel_size: float,
    z: np.ndarray,
    run: Path | None,
    made: Mapping[str, Any],
    levels: Sequence[float],
) -> None:
    """analyze.yaml: what was done and found, for people and for later commands.

    ``made``: options of the volumes that are there now, ``levels`` of those that stayed.
    """
    mixture = result.mixture
    way = {} if run is None else {"run": os.path.relpath(run.absolute(), result.out.path.absolute()),
                                  "command": shlex.join(["cryosuite", *sys.argv[1:]])}  # fmt: skip
    write_yaml(result.out.summary, {
        "kind": "analysis",
        "version": __version__,
        **way,
        "epoch": epoch,
        "n_particles": len(z),
        "latents": fingerprint(z),
        "left_out": [int(row) for row in np.setdiff1d(np.arange(len(z)), result.rows)],
        "zdim": int(result.pca.components.shape[1]),
        "counting": "labels, volumes, rows and indices count from 0; epochs and principal components from 1",
        "pixel_size": float(made.get("pixel_size") or pixel_size),
        "seed": options.seed,
        "clustering": options.cluster or "kmeans",
        "kmeans": {"clusters": result.clusters.count, "particles": [int(n) for n in result.clusters.sizes],
                   "colours": list(result.colours), "levels": [file.level for file in result.files] or list(levels),
                   "folder": result.folder.path.name},
        "gmm": None if mixture is None else {"groups": mixture.count, "particles": [int(n) for n in mixture.sizes],
                                             "mean_confidence": float(mixture.confidence.mean())},
        "variance": [float(f"{ratio:.6g}") for ratio in result.pca.ratio[:20]],
        "volumes": dict(made),
        "seconds": dict(result.seconds),
    })  # fmt: skip
    finished(result.out.path)
