"""What `deco-classify` leaves for the user: classes, their files for RELION and cryoSPARC, maps, and pictures."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryosuite.analysis import plots
from cryosuite.analysis.class_files import write_classes
from cryosuite.analysis.clusters import Clusters, cluster, plot_choice, regrouped
from cryosuite.analysis.polished import polish_to
from cryosuite.console import say
from cryosuite.data.processes import ALONE, Processes
from cryosuite.data.results import ClustersDir, PolishDir, run_clusters, run_polish
from cryosuite.data.workdir import RunDir
from cryosuite.errors import FileError, InputError, notice
from cryosuite.formats.atomic import atomic_path
from cryosuite.formats.mrc import write_map
from cryosuite.formats.npz import read_npz
from cryosuite.formats.pickles import write_pickle
from cryosuite.methods import LoadedRun
from cryosuite.methods.deco_options import DecoOptions
from cryosuite.methods.deco_start import start_record
from cryosuite.reconstruct.cutting import settle_and_cut
from cryosuite.reconstruct.polish import PolishOptions
from cryosuite.reconstruct.weights import ClassWeights

MORE = 1.5  # clusters per class found, before twins are joined


@dataclass
class ClassRow:
    """A line of the table of classes: particles; median margin of their poses (log-likelihood; NaN where poses were
    known); A at FSC .143 of the plain half maps (NaN where it could not be made)."""

    number: int
    particles: int
    margin: float
    resolution: float


def finish(
    run: RunDir,
    loaded: LoadedRun,
    options: DecoOptions,
    seed: int,
    files: bool = True,
    processes: Processes = ALONE,
    device: str = "cpu",
) -> list[ClassRow]:
    """Classify the latents of an epoch and write clusters.N/, labels.N.pkl and polish.N/; the table of classes.

    ``files=False`` leaves out the star and cs files (for particles that are in no file). ``processes`` share the images
    where the classes are settled (on ``device``) and their maps made; the first writes.
    """
    folder = run_clusters(run.path, loaded.epoch)

    def first() -> Clusters:
        if folder.path.exists():
            shutil.rmtree(folder.path)
        folder.path.mkdir(parents=True)
        return classify(loaded.z, options, seed)

    found = of_latents = processes.first_does(first)
    if options.settle:
        found = settled(run, loaded, found, options, seed, processes, device)
    processes.first_does(lambda: _write(run, folder, loaded, found, files))
    by_maps = found is not of_latents or options.poses != "known"
    resolution = _polish(run, loaded, found.labels, by_maps, processes)
    return processes.first_does(lambda: _write_table(folder, found, _margins(run, loaded.epoch), resolution))


def _write(run: RunDir, folder: ClustersDir, loaded: LoadedRun, found: Clusters, files: bool) -> None:
    """What there is to write of the classes before their maps are polished."""
    write_pickle(folder.labels, found.labels)
    write_pickle(run.labels(loaded.epoch), found.labels)
    _write_centres(folder, found)
    if found.bic:
        plot_choice(folder.plot("bic"), found)
    for k, volume in enumerate(_in_parts(loaded, found.centres)):
        write_map(folder.volume(k), volume, loaded.pixel_size)
    if files:
        write_classes(folder.path, loaded.particles, found.labels)
    pose_spread(folder.plot("poses"), loaded.particles.rotation, found.labels)


def _write_table(
    folder: ClustersDir, found: Clusters, margin: np.ndarray | None, resolution: dict[int, float]
) -> list[ClassRow]:
    """The table of classes, written and given back."""
    rows = []
    for k in range(found.k):
        own = found.labels == k
        middle = float(np.nanmedian(margin[own])) if margin is not None and own.any() else math.nan
        rows.append(ClassRow(k, int(own.sum()), middle, resolution.get(k, math.nan)))
    plots.write_csv(folder.table, {
        "class_from_0": [row.number for row in rows], "particles": [row.particles for row in rows],
        "pose_margin": [row.margin for row in rows], "resolution_0.143_A": [row.resolution for row in rows],
    })  # fmt: skip
    return rows


def classify(z: np.ndarray, options: DecoOptions, seed: int) -> Clusters:
    """Classes of latents as the options say."""
    return cluster(z, how=options.cluster, k=options.k or "auto", seed=seed)


def settled(
    run: RunDir,
    loaded: LoadedRun,
    found: Clusters,
    options: DecoOptions,
    seed: int,
    processes: Processes = ALONE,
    device: str = "cpu",
) -> Clusters:
    """The classes once the images themselves have chosen, by half maps that they are not part of.

    With one frame for all (known poses, or found with one map or network) they choose now. Classes that were found
    together with the poses have a frame each, in which the poses of their particles are: they stay as the search left
    them.
    """
    if options.poses == "known" or options.start == "network" or options.classes == 1:
        return _settled(loaded, found, options, seed, processes, device) if found.k > 1 else found
    record = processes.first_does(lambda: start_record(run))
    if record is None or options.k not in (0, options.classes):
        return found
    new = regrouped(found, loaded.z, record["poses"]["label"].numpy())
    say(
        f"{found.k} classes of latents; the {new.k} that the poses were found with are kept, each in a frame of its own"
    )
    return new


def _settled(
    loaded: LoadedRun, found: Clusters, options: DecoOptions, seed: int, processes: Processes, device: str
) -> Clusters:
    """Classes settled in one frame, by `reconstruct.cutting`.

    Latents tell which particles are alike, but a cluster in them may hold two states or a part of one. So there are
    half as many clusters again to begin with, and the images join and part them. With ``k`` given exactly so many are
    left.
    """
    many = min(math.ceil(MORE * found.k), len(loaded.z) // 2)
    first = processes.first_does(lambda: cluster(loaded.z, "kmeans", many, seed).labels)
    try:
        labels = settle_and_cut(
            loaded.particles, first, seed, count=options.k, progress="settle the classes", device=device,
            processes=processes,
        )  # fmt: skip
    except FileError:
        raise
    except InputError as error:
        notice(f"the classes stay as the latents gave them: {error}")
        return found
    new = regrouped(found, loaded.z, labels)
    where = np.zeros((int(first.max()) + 1, int(labels.max()) + 1), np.int64)
    np.add.at(where, (first, labels), 1)
    moved = 1 - where.max(1).sum() / len(labels)
    say(f"{found.k} classes of latents; {new.k} once the images had chosen ({moved:.0%} of them left their cluster)")
    return new


def _write_centres(folder: ClustersDir, found: Clusters) -> None:
    for path, values, form in (
        (folder.centers, found.centres, "%.8g"),
        (folder.centers_index, found.centres_index, "%d"),
    ):
        with atomic_path(path) as temporary:
            np.savetxt(temporary, values, fmt=form)


def _in_parts(loaded: LoadedRun, points: np.ndarray):
    for point in points:
        yield loaded.decode(point[None])[0]


def _margins(run: RunDir, epoch: int) -> np.ndarray | None:
    path: Path = run.margins(epoch)
    if not path.exists():
        return None
    return read_npz(path, ["margin"])["margin"]


def _polish(
    run: RunDir, loaded: LoadedRun, labels: np.ndarray, by_maps: bool = False, processes: Processes = ALONE
) -> dict[int, float]:
    """Per-class maps in polish.N/ and their resolutions; nothing where the classes do not allow it.

    by_maps: classes or poses were found with maps of these images, which is said.
    """
    out: PolishDir = run_polish(run.path, loaded.epoch)
    say(f"maps of {labels.max() + 1} classes -> {out.path}")
    if by_maps:
        say(
            "Classes or poses were found with maps of both half sets, which flatters the resolution of the half maps, "
            "most of all in a class that is only a part of one state: refine a class anew before you report it."
        )
    rows, wrong = [], None
    try:
        rows = polish_to(
            out, loaded.particles, ClassWeights.from_labels(labels), PolishOptions(), source=str(run.path.absolute()),
            classes_from="latents, then maps of both half sets" if by_maps else "latents", processes=processes,
        )  # fmt: skip
    except InputError as error:
        wrong = error

    def told() -> dict[int, float]:
        if isinstance(wrong, FileError):
            raise wrong
        if wrong is not None:
            notice(f"no maps were polished: {wrong}")
        return {row.number: row.resolution for row in rows}

    return processes.first_does(told)


def pose_spread(path: Path, rotation: np.ndarray, labels: np.ndarray, most: int = 16) -> None:
    """Where particles are seen from, one map of the sphere (Mollweide) per class, at most ``most`` of them.

    The viewing direction is the third row of R: rot runs along, 90 degrees less tilt upwards.
    """
    count = min(int(labels.max()) + 1, most)
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    with plots.figure(path, 3.2 * columns, 2.0 * rows) as page:
        for k in range(count):
            axes = page.add_subplot(rows, columns, k + 1, projection="mollweide")
            view = rotation[labels == k][:, 2]
            longitude = np.arctan2(view[:, 1], view[:, 0])
            latitude = np.arcsin(np.clip(view[:, 2], -1, 1))
            bins = [np.linspace(-np.pi, np.pi, 25), np.arcsin(np.linspace(-1, 1, 13))]  # of equal area
            density, x, y = np.histogram2d(longitude, latitude, bins)
            axes.pcolormesh(x, y, density.T, cmap="viridis", vmin=0, rasterized=True)
            axes.set_title(f"class {k}: {len(view)}", fontsize=8, pad=2)
            axes.set_xticks([])
            axes.set_yticks([])
