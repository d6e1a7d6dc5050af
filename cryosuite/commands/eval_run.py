"""What ``eval-fsc RUN`` does: a run's volumes and latents against a known truth, with floor and ceiling."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryosuite.commands.eval_latents import extra_rows, finite_rows, label_scores, latent_scores, pose_scores
from cryosuite.console import say, table
from cryosuite.data.masks import read_mask
from cryosuite.data.particles import ParticleSet
from cryosuite.data.results import PolishDir, ScoresDir, oracle_cache, run_polish, run_scores
from cryosuite.data.truth import Truth, find_truth
from cryosuite.data.typed import typed
from cryosuite.data.workdir import RunDir, WorkDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.atomic import atomic_path, write_text
from cryosuite.formats.json_text import write_json
from cryosuite.formats.mrc import read_map
from cryosuite.metrics.fsc import FscTable, auc_maximum, rows_as_csv, write_png
from cryosuite.metrics.oracle import OracleScores, add_to_cache, oracle_scores, read_cached
from cryosuite.metrics.truth import Extra, VolumeScores, gain, per_conformation, per_image, sample_rows

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RunOptions:
    """Options of the evaluation of a run; see the command's help."""

    truth: Path | None = None
    epoch: int | None = None
    images: int = 100
    sampler: str | None = None
    oracle: bool = False
    compat: bool = False
    mask: str | None = None
    clustering: bool = True
    seeds: int = 10
    gmm_seeds: int = 3
    umap: bool = False
    seed: int = 0
    outdir: Path | None = None
    volume_from: str | None = None
    shapes: bool = False
    polished: bool = False
    local: bool = False
    align: bool = False


@dataclass
class TruthMaps:
    """The true maps brought to a box: ``read(state)`` -> (D, D, D); mask (D, D, D) or None."""

    truth: Truth
    box_size: int
    pixel_size: float
    mask: torch.Tensor | None

    def read(self, state: int) -> torch.Tensor:
        """The true map of a state, Fourier cropped to the box."""
        return _true_map(self.truth.volumes[state], self.box_size, self.pixel_size, self.truth.no_size)


@lru_cache(maxsize=16)
def _true_map(path: Path, box_size: int, pixel_size: float, no_size: float | None = None) -> torch.Tensor:
    """A true map on the grid of the run; InputError when it shows another field of view.

    no_size: a voxel size (A) that means nothing in these headers.
    """
    import torch

    from cryosuite.kernels.fourier import fourier_crop_volume

    found = read_map(path)
    own = found.data.shape[-1]
    said = found.pixel_size if found.pixel_size != no_size else 0
    if said and abs(found.pixel_size * own - pixel_size * box_size) > 0.01 * pixel_size * box_size:
        raise InputError(
            f"{path}: is {found.pixel_size * own:.0f} A wide, the particles' box {pixel_size * box_size:.0f} A. "
            "The truth must show the same field of view: give the right --truth or --Apix."
        )
    if own < box_size:
        raise InputError(f"{path}: has a box of {own}, smaller than the run's {box_size}")
    return fourier_crop_volume(torch.from_numpy(found.data), box_size)


def open_truth(where: Path, options: RunOptions, box_size: int, pixel_size: float) -> TruthMaps:
    """The truth behind a run or particle set, or the one the user names, with its mask."""
    import torch

    from cryosuite.kernels.fourier import fourier_crop_volume
    from cryosuite.reconstruct.masks import union_mask

    truth = find_truth(options.truth or where)
    if truth is None or not truth.volumes:
        raise InputError(
            f"{options.truth or where}: no ground truth found. Scores need a simulated set: name its folder with "
            "--truth. For two maps or half maps give the two .mrc files."
        )
    maps = TruthMaps(truth, box_size, float(pixel_size), None)
    if options.mask == "none":
        return maps
    path = Path(options.mask) if options.mask not in (None, "auto") else truth.mask
    if path is None or options.mask == "auto":
        maps.mask = union_mask(torch.stack([maps.read(state) for state in range(len(truth.volumes))]))
    else:
        mask = torch.from_numpy(read_mask(path))
        if mask.shape[-1] < box_size:
            raise InputError(f"{path}: has a box of {mask.shape[-1]}, the volumes one of {box_size}")
        maps.mask = fourier_crop_volume(mask, box_size).clamp(0, 1)
    return maps


def evaluate_run(run: Path, options: RunOptions) -> None:
    """Score a run against its truth, print the table, write CSV, JSON and PNG."""
    from cryosuite.methods import load_run

    more = {"volume_from": options.volume_from} if options.volume_from else {}
    loaded = load_run(run, options.epoch, **more)
    if loaded.particles is None:
        raise InputError(f"{run}: the images it was trained on are not there, so nobody knows which particle is which")
    if loaded.decode is None and not options.polished:
        raise InputError(
            f"{run}: this run has no volumes to judge: make some with cryosuite polish {typed(run)} and give --polished"
        )
    maps = open_truth(run, options, loaded.box_size, loaded.pixel_size)
    good = finite_rows(loaded.z)
    if len(good) < len(loaded.z):
        notice(f"{len(loaded.z) - len(good)} particles whose latents are not numbers (NaN, infinite) are not judged")
    folder, decode, points = run_polish(run, loaded.epoch), loaded.decode, loaded.z
    if options.polished:
        decode, shares = _polished(folder, loaded.box_size)
        if len(shares) != len(loaded.z):
            raise InputError(
                f"{folder.path}: maps of {len(shares)} particles, the run has {len(loaded.z)}: made of an earlier run? "
                f"Run cryosuite polish {typed(run)} --overwrite."
            )
        if folder.summary.stat().st_mtime_ns < _stamp(RunDir(run).z(loaded.epoch)):
            notice(f"{folder.path} is older than the latents of the run: if it was trained anew, polish it again")
        points, classed = shares, shares[good].sum(1) > 0
        if not classed.all():
            notice(f"{(~classed).sum()} particles that polish left in no class are not judged: they have no map")
        good = good[classed]
    labels = maps.truth.labels_of(loaded.particles.index)[good]
    sampler = options.sampler or ("compat" if options.compat else "random-per-class")
    rows = sample_rows(labels, options.images, sampler, options.seed)
    shared = (decode, points[good], labels, maps.read, loaded.pixel_size)
    say(f"decoding {len(rows)} volumes")
    extra = Extra(options.shapes, options.local, options.align)
    images = per_image(*shared, rows, maps.mask, options.compat, extra=extra)
    states = per_conformation(*shared, maps.mask, options.compat, extra=Extra(align=options.align))
    images.rows, states.rows = good[images.rows], good[states.rows]
    everyone = maps.truth.labels_of(loaded.particles.index)
    floor = oracle(loaded.particles, everyone, maps, options, run) if options.oracle else None
    result: dict[str, Any] = {
        "run": str(run), "epoch": loaded.epoch, "method": loaded.name, "n_particles": len(labels),
        "n_states": len(np.unique(labels)), "box_size": loaded.box_size, "pixel_size_A": loaded.pixel_size,
        "shells": "cryobench" if options.compat else "ours", "sampler": sampler, "seed": options.seed,
        "polished": options.polished, "per_image": images.summary(), "per_conformation": states.summary(),
    }  # fmt: skip
    if floor is not None:
        result["oracle"] = summarise_oracle(floor, images)
    if options.clustering:
        result["clustering"] = cluster(loaded.z[good], labels, options)
        result |= latent_scores(run, loaded, maps.truth, labels, good, options.seed)
    if (found := pose_scores(loaded.particles, maps.truth, everyone)) is not None:
        result["poses"] = found
    inverted = images.inverted()
    if inverted:
        result["per_image"]["inverted"] = inverted
        notice(f"{inverted} of {len(images.labels)} volumes have inverted contrast against the truth")
    own = folder.scores if options.polished else run_scores(run, loaded.epoch)
    out = ScoresDir(options.outdir) if options.outdir else own
    _write(out, images, states, floor, result)
    print_scores(result, out.path)


def evaluate_polished(where: Path, options: RunOptions) -> None:
    """Score a folder of `polish`, of any program's latents or labels, against the truth of the particles."""
    from cryosuite.formats.config import read_yaml
    from cryosuite.formats.pickles import read_indices

    folder = PolishDir(where)
    if options.oracle:
        raise InputError(
            "--oracle: floor and ceiling belong to the particle set: cryosuite eval-fsc PARTICLES; or judge the run: "
            "cryosuite eval-fsc RUN --polished --oracle"
        )
    made = read_yaml(folder.summary)
    box, pixel_size = int(made["box_size"]), float(made["pixel_size"])
    decode, shares = _polished(folder, box)
    maps = open_truth(Path(str(made.get("source", where))), options, box, pixel_size)
    labels = maps.truth.labels_of(read_indices(folder.index))
    good = np.flatnonzero(shares.sum(1) > 0)
    sampler = options.sampler or ("compat" if options.compat else "random-per-class")
    rows = sample_rows(labels[good], options.images, sampler, options.seed)
    shared = (decode, shares[good], labels[good], maps.read, pixel_size)
    images = per_image(
        *shared, rows, maps.mask, options.compat, extra=Extra(options.shapes, options.local, options.align)
    )
    states = per_conformation(*shared, maps.mask, options.compat, extra=Extra(align=options.align))
    images.rows, states.rows = good[images.rows], good[states.rows]
    result: dict[str, Any] = {
        "run": str(where), "epoch": None, "method": "polish", "n_particles": len(good),
        "n_states": len(np.unique(labels[good])), "box_size": box, "pixel_size_A": pixel_size,
        "shells": "cryobench" if options.compat else "ours", "sampler": sampler, "seed": options.seed,
        "polished": True, "per_image": images.summary(), "per_conformation": states.summary(),
        "labels": label_scores(labels[good], shares[good].argmax(1)),
    }  # fmt: skip
    out = ScoresDir(options.outdir) if options.outdir else folder.scores
    _write(out, images, states, None, result)
    print_scores(result, out.path)


def _polished(folder: PolishDir, box_size: int) -> tuple[Any, np.ndarray]:
    """(shares -> volumes, shares (N, K)): the polished maps in place of a decoder and latents.

    The volume of a particle is the mean of the maps of its classes, weighted by its shares.
    """
    from cryosuite.analysis.polished import read_polished

    weights, volumes = read_polished(folder)
    if volumes.shape[-1] != box_size:
        raise InputError(f"{folder.path}: maps of box {volumes.shape[-1]}, the run has {box_size}: polish without -d")
    flat = volumes.reshape(len(volumes), -1).numpy()

    def decode(shares: np.ndarray) -> np.ndarray:
        return (np.asarray(shares, np.float32) @ flat).reshape(-1, *volumes.shape[1:])

    return decode, weights.dense()


def evaluate_set(where: Path, options: RunOptions) -> None:
    """Floor and ceiling of a particle set with known truth (simulated, or of CryoBench) that no method has seen yet."""
    from cryosuite.data.cryobench import open_published
    from cryosuite.data.open import open_particles

    particles = open_published(where) if not WorkDir(where).exists() else None
    particles = open_particles(where) if particles is None else particles
    maps = open_truth(where, options, particles.box_size, float(particles.pixel_size[0]))
    found = oracle(particles, maps.truth.labels_of(particles.index), maps, options, where)
    rows = [[name, f"{found.floor(name):.4f}", f"{found.ceiling(name):.4f}"] for name in found.labels]
    most = auc_maximum(particles.box_size)
    table(
        f"{where}: mean AUC over {len(found.states)} states (at most {most:.3f})",
        ["FSC", "consensus (floor)", "true classes backprojected (ceiling)"],
        rows,
    )


def oracle(particles: ParticleSet, labels: np.ndarray, maps: TruthMaps, options: RunOptions, run: Path) -> OracleScores:
    """Floor and ceiling: from the cache beside the truth (or the run, where that cannot be written), or made now."""
    from cryosuite.reconstruct.backproject import reconstruct, reconstruct_classes

    settings = {
        "particles": str(particles.path), "n": len(particles), "posed": _fingerprint(particles),
        "box_size": particles.box_size, "shells": "cryobench" if options.compat else "ours",
        "mask": options.mask or "truth", "estimator": "plain, 0.1 of the shell mean, sphere",
        "made": [_stamp(path) for path in (maps.truth.labels, *maps.truth.volumes, options.mask or maps.truth.mask)],
    }  # fmt: skip
    caches = [oracle_cache(maps.truth.path), oracle_cache(run if run.is_dir() else run.parent)]
    for cache in caches:
        found = read_cached(cache, settings)
        if found is not None:
            return found
    plain: dict[str, Any] = {"halves": False, "passes": 0}
    classes = reconstruct_classes(particles, labels, progress="true classes", **plain)
    consensus = reconstruct(particles, progress="consensus", **plain).map
    found = oracle_scores(
        consensus, {k: one.map for k, one in classes.items()}, maps.read, maps.pixel_size, maps.mask, options.compat
    )
    for cache in caches:
        try:
            write_text(cache, add_to_cache(cache.read_bytes() if cache.exists() else None, settings, found))
            break
        except (InputError, OSError):
            continue  # the truth may lie where nobody may write
    return found


def _fingerprint(particles: ParticleSet) -> str:
    """Of all that floor and ceiling depend on besides the images: which particles, their poses, optics and sign."""
    import hashlib

    made = hashlib.sha256(repr((particles.sign, particles.ctf_premultiplied, sorted(particles.extras))).encode())
    arrays = [particles.index, particles.rotation, particles.shift, particles.pixel_size, particles.optics_group]
    arrays += [particles.ctf, particles.noise, *(particles.extras[name] for name in sorted(particles.extras))]
    for array in arrays:
        made.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
    return made.hexdigest()[:16]


def _stamp(path: Path | str | None) -> int:
    """When a file was written (ns): scores of a set that was made anew are not those kept; 0 for no file."""
    return Path(path).stat().st_mtime_ns if path and Path(path).is_file() else 0


def summarise_oracle(found: OracleScores, images: VolumeScores) -> dict[str, float]:
    """Floor, ceiling and gain for the states of the judged images."""
    out: dict[str, float] = {}
    for name in images.curves:
        floor, ceiling = (of(name, images.labels) for of in (found.floor, found.ceiling))
        out[f"consensus_{name}"], out[f"label_backprojection_{name}"] = floor, ceiling
        out[f"gain_{name}"] = gain(images.headline(name), floor, ceiling)
    return out


def cluster(z: np.ndarray, labels: np.ndarray, options: RunOptions) -> dict[str, float]:
    """ARI, AMI and kNN accuracy, and the same after UMAP to 16 dimensions when asked for."""
    from cryosuite.metrics.clustering import cluster_scores

    say("clustering the latents")
    out = cluster_scores(z, labels, options.seeds, options.gmm_seeds, gmm_n_init=5).summary()
    if options.umap and z.shape[1] > 16:
        from umap import UMAP

        small = UMAP(n_components=16, n_neighbors=30, min_dist=0.0, random_state=options.seed).fit_transform(z)
        more = cluster_scores(small, labels, options.seeds, options.gmm_seeds, gmm_n_init=5).summary()
        out.update({f"umap16_{name}": value for name, value in more.items() if name != "n_classes"})
    return out


def _write(
    out: ScoresDir, images: VolumeScores, states: VolumeScores, floor: OracleScores | None, result: dict[str, Any]
) -> None:
    out.path.mkdir(parents=True, exist_ok=True)
    mean = images.mean_table()
    curves: FscTable = states.mean_table()
    mean.curves.update({f"{name} per conformation": values for name, values in curves.curves.items()})
    write_text(out.curves, mean.as_csv())
    write_text(out.volumes, rows_as_csv(images.table_rows()))
    write_text(out.conformations, rows_as_csv(states.table_rows()))
    if floor is not None:
        result["oracle"]["per_state"] = floor.as_dict()
    write_json(out.summary, result)
    with atomic_path(out.plot) as temporary:
        write_png(temporary, mean, f"mean FSC with the truth, {len(images.labels)} volumes")


def print_scores(result: dict[str, Any], folder: Path) -> None:
    """The table on screen."""
    box = result["box_size"]
    rows: list[list[str]] = []
    best = {"masked": "AUC masked", "unmasked": "AUC unmasked"}
    for key, title in (("per_image", "per image"), ("per_conformation", "per conformation")):
        scores = result[key]
        for name, text in best.items():
            if f"auc_{name}" in scores:
                mean, spread = scores[f"auc_{name}"], scores[f"auc_{name}_std"]
                more = f"normalised {scores[f'auc_{name}_normalised']:.3f}, median {scores[f'auc_{name}_median']:.4f}"
                for threshold in (0.5, 0.143):
                    more += f", {scores[f'resolution_{name}_{threshold}_A']:.1f} A at {threshold}"
                rows.append([f"{text}, {title}", f"{mean:.4f} ± {spread:.4f}", more])
    for name in best:
        found = result.get("oracle", {})
        if f"consensus_{name}" in found:
            floor, ceiling = found[f"consensus_{name}"], found[f"label_backprojection_{name}"]
            text = f"consensus {floor:.4f} (floor), true classes backprojected {ceiling:.4f}"
            rows.append([f"gain, {name}", f"{found[f'gain_{name}']:.3f}", text])
    found = result.get("clustering", {})
    for key, text in (("kmeans", "k-means"), ("gmm", "Gaussian mixture")):
        for prefix, where in (("", ""), ("umap16_", " on UMAP-16")):
            name = f"{prefix}{key}"
            if f"{name}_ari" in found:
                value = f"{found[f'{name}_ari']:.4f} ± {found[f'{name}_ari_std']:.4f}"
                rows.append([f"ARI, {text}{where}", value, f"AMI {found[f'{name}_ami']:.4f}"])
    if "knn10_accuracy" in found:
        rows.append(["10-NN accuracy", f"{found['knn10_accuracy']:.4f}", "cosine, the particle itself left out"])
    rows += extra_rows(result)
    fraction = result["per_image"].get("mask_fraction")
    epoch = f" epoch {result['epoch']}" if result["epoch"] is not None else ""
    title = f"{result['run']}{epoch}: D = {box}, {result['pixel_size_A']:.3g} A per pixel; AUC in cycles "
    title += f"per pixel, at most {(box / 2 - 1) / box:.3f}; {result['per_image']['volumes']} volumes"
    table(title + (f"; mask {fraction:.3f} of the box" if fraction else ""), ["score", "value", ""], rows)
    say(f"written to {folder}")


def is_run(path: Path) -> bool:
    """True for a folder that holds a training run."""
    return path.is_dir() and RunDir(path).exists()


def is_polished(path: Path) -> bool:
    """True for a folder that `polish` wrote to the end."""
    return path.is_dir() and PolishDir(path).summary.is_file()
