"""Polished maps on disk: sums of all classes, the polish itself, and the files and numbers a user judges it by."""

from __future__ import annotations

import csv
import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryosuite.console import track
from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.data.results import PolishDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.atomic import atomic_path, write_text
from cryosuite.formats.config import write_yaml
from cryosuite.formats.mrc import write_map
from cryosuite.formats.pickles import write_pickle
from cryosuite.kernels import shells
from cryosuite.metrics.plot import line_plot
from cryosuite.reconstruct.class_sums import MEMORY_GIB, ClassSums, accumulate
from cryosuite.reconstruct.local import local_gain, local_resolution
from cryosuite.reconstruct.masks import auto_mask, soft_sphere
from cryosuite.reconstruct.polish import Polished, PolishOptions, polish, raw_fsc, raw_maps
from cryosuite.reconstruct.polish_kernel import kernel_maps
from cryosuite.reconstruct.polish_prior import prior_mean
from cryosuite.reconstruct.shifts import refined_within_classes
from cryosuite.reconstruct.views import LARGE, view_share
from cryosuite.reconstruct.weights import ClassWeights

MODES = ("modal", "kernel", "prior")
SHOWN_CURVES = 12  # more would hide each other


@dataclass
class PolishedClass:
    """One line of the table: particles (sum of shares), in each half; Angstrom where the raw halves' FSC is .143 and
    .5 inside the mask; median local resolution; mean gain inside the mask."""

    number: int
    particles: float
    half_a: float
    half_b: float
    resolution: float
    resolution_half: float
    local_resolution: float
    gain: float


def polish_to(
    folder: PolishDir,
    particles: ParticleSet,
    weights: ClassWeights,
    options: PolishOptions,
    *,
    box: int | None = None,
    memory_gib: float = MEMORY_GIB,
    mode: str = "modal",
    latents: tuple[np.ndarray, np.ndarray] | None = None,
    prior: torch.Tensor | None = None,
    processes: Processes = ALONE,
    refine_shifts: bool = True,
    **notes: Any,
) -> list[PolishedClass]:
    """Polish the classes of a particle set and write everything into a folder; returns the table.

    Args:
        box: of the maps when smaller than the particles'.
        mode: "modal" (`polish`), "kernel" (`polish_kernel`; needs ``latents``), "prior" (`polish_prior`; ``prior``).
        latents: (N, d) latents and (K, d) the points of the classes. prior: (K, D, D, D) maps of a network.
        processes: that share the images in the modes modal and prior; all but the first return an empty table.
        refine_shifts: where they are measurably wrong; each half set against its own maps.
        notes: whatever else polish.yaml is to say.

    Raises:
        InputError: classes that cannot be polished. A folder made for this call is gone again then.
    """
    check_classes(particles, weights)
    if mode == "kernel":  # its sums are made in several passes, by the first process alone
        processes = Processes(processes.rank)
    if refine_shifts and (processes.first or processes.count > 1):
        particles = _with_refined_shifts(particles, weights, processes, notes)
    if processes.first:
        notes["view_told_by_class"] = _warned_of_views(particles, weights)
    else:
        if processes.count > 1:
            accumulate(particles, weights, box=box, memory_gib=memory_gib, processes=processes).close()
        return []
    new = not folder.path.exists()
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.poses.unlink(missing_ok=True)
    folder.summary.unlink(missing_ok=True)  # until the end this folder is not complete
    try:
        how = {"box": box, "memory_gib": memory_gib, "scratch": folder.path, "processes": processes}
        return _polish_into(folder, particles, weights, options, how, mode, latents, prior, notes)
    except BaseException:
        if new:
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


def _with_refined_shifts(
    particles: ParticleSet, weights: ClassWeights, processes: Processes, notes: dict[str, Any]
) -> ParticleSet:
    """The particles with the shifts that their classes' maps ask for; how wrong they were goes into the notes."""
    particles, found = refined_within_classes(particles, weights, processes)
    if found is not None:
        notes["shift_error_px"] = round(found.error, 4)
        done = "for these maps, each half set by itself; poses.pkl beside them has them"
        notice(found.said(float(np.mean(particles.pixel_size)), done))
    return particles


def _warned_of_views(particles: ParticleSet, weights: ClassWeights) -> float:
    """How much of the view the class tells; said where it is much."""
    told = view_share(weights, particles.rotation)
    if told > LARGE:
        notice(
            f"the class of a particle tells {told:.0%} of the side it was seen from: these classes may be views of one "
            "shape and not shapes. Where a class shows nothing its map is that of all particles together; trust no "
            "difference between maps before cryosuite report has shown what the latents follow"
        )
    return round(told, 4)


def check_classes(particles: ParticleSet, weights: ClassWeights) -> None:
    """InputError for classes that nothing can be learnt from, before anything is computed."""
    if particles.rotation is None:
        raise InputError(f"{particles.path}: polish needs poses; none are given (--poses poses.pkl)")
    if len(weights) != len(particles):
        raise InputError(f"classes of {len(weights)} particles, but there are {len(particles)}: one each is needed")
    if weights.n_classes > len(particles):
        raise InputError(
            f"{weights.n_classes} classes for {len(particles)} particles: are these really labels, counted from 0?"
        )
    half = particles.half_sets()
    in_half = [weights.rows(np.flatnonzero(half == h)).usage() > 0 for h in (0, 1)]
    if not (in_half[0] | in_half[1]).any():
        raise InputError("no particle has a share in any class: check the labels and --ind")
    if not (in_half[0] & in_half[1]).any():
        raise InputError(
            "no class has particles in both half sets, so signal cannot be told from noise: give more particles or "
            "fewer classes, or check the half sets (rlnRandomSubset)"
        )


def _polish_into(
    folder: PolishDir,
    particles: ParticleSet,
    weights: ClassWeights,
    options: PolishOptions,
    how: dict[str, Any],
    mode: str,
    latents: tuple[np.ndarray, np.ndarray] | None,
    prior: torch.Tensor | None,
    notes: dict[str, Any],
) -> list[PolishedClass]:
    with accumulate(particles, weights, progress="backprojection", **how) as sums:
        if mode == "kernel" and latents is not None:
            found = _by_kernel(particles, weights, latents, options, sums, how)
        elif mode == "prior" and prior is not None:
            made = prior_mean(sums, prior)
            found = Polished(made.maps, made.half_a, made.half_b, made.mask, made.pixel_size, sums.counts, mode)
        else:
            found = polish(sums, options, prior, "polish")
        rows, curves = _write_classes(folder, sums, found)
    write_map(folder.mask, found.mask.numpy(), found.pixel_size)
    write_pickle(folder.labels, weights.labels())
    write_pickle(folder.shares, weights.to_arrays())
    write_pickle(folder.index, np.asarray(particles.index, np.int64))
    if "shift_error_px" in notes:
        write_pickle(folder.poses, (particles.rotation, particles.shift))
    write_text(folder.fsc, _fsc_csv(curves, found.maps.shape[-1], found.pixel_size))
    write_text(folder.classes, _classes_csv(rows))
    _plot(folder, curves, found)
    write_yaml(
        folder.summary,
        {
            "classes": weights.n_classes, "particles": int((weights.labels() >= 0).sum()), "basis": found.basis,
            "box_size": int(found.maps.shape[-1]), "pixel_size": float(found.pixel_size),
            "passes": options.passes, "window_A": options.window_A,
            "mean_gain_per_pass": [] if found.gain is None else [round(float(g), 4) for g in found.gain.mean(1)],
            "from_mean_of_others": found.from_mean, **notes,
        },
    )  # fmt: skip
    return rows


def _by_kernel(
    particles: ParticleSet,
    weights: ClassWeights,
    latents: tuple[np.ndarray, np.ndarray],
    options: PolishOptions,
    sums: ClassSums,
    how: dict[str, Any],
) -> Polished:
    """Kernel maps at the points of the classes; particles without class or latent take no part."""
    used = np.nonzero((weights.labels() >= 0) & np.isfinite(latents[0]).all(1))[0]
    made = kernel_maps(
        particles.subset(used),
        latents[0][used],
        latents[1],
        window_A=options.window_A,
        progress="kernels",
        **{name: value for name, value in how.items() if name != "processes"},
    )
    mask = auto_mask(made.maps * soft_sphere(made.maps.shape[-1]))
    return Polished(made.maps, made.half_a, made.half_b, mask, made.pixel_size, sums.counts, "kernel")


def read_polished(folder: PolishDir) -> tuple[ClassWeights, torch.Tensor]:
    """Shares and polished maps (K, D, D, D) of a complete folder; InputError where it is not one."""
    from cryosuite.formats.mrc import read_map
    from cryosuite.formats.pickles import safe_load

    if not folder.summary.is_file():
        raise InputError(
            f"{folder.path}: no polished maps here ({folder.summary.name} is absent). Run cryosuite polish."
        )
    weights = ClassWeights.from_arrays(safe_load(folder.shares)[0], str(folder.shares))
    maps = [torch.from_numpy(read_map(folder.map(k)).data) for k in range(weights.n_classes)]
    return weights, torch.stack(maps)


def _write_classes(
    folder: PolishDir, sums: ClassSums, found: Polished
) -> tuple[list[PolishedClass], dict[int, np.ndarray]]:
    """Maps of every class and what can be read from its raw halves; those of an earlier polish are removed."""
    for path in folder.maps():
        path.unlink()
    for path in (folder.half(0, 0), folder.raw(0), folder.gain(0)):
        path.parent.mkdir(exist_ok=True)
    pixel, mask = found.pixel_size, found.mask
    inside = mask > 0.5
    rows, curves = [], {}
    for k in track(range(sums.n_classes), sums.n_classes, "writing maps", "maps"):
        joint, a, b = raw_maps(sums, k)
        fsc = raw_fsc(a, b, mask)
        gain = local_gain(joint, found.maps[k], mask, pixel)
        files: list[tuple[Path, torch.Tensor | None]] = [
            (folder.map(k), found.maps[k]), (folder.raw(k), joint), (folder.gain(k), gain),
            (folder.half(k, 0), found.half_a[k]), (folder.half(k, 1), found.half_b[k]),
            (folder.raw_half(k, 0), a), (folder.raw_half(k, 1), b),
        ]  # fmt: skip
        at = [float("nan")] * 3
        if fsc is not None:
            place = local_resolution(a, b, mask, pixel)
            files.append((folder.local_resolution(k), place))
            curves[k] = fsc.numpy()
            D = joint.shape[-1]
            at = [shells.resolution(fsc, level, D, pixel) for level in (0.143, 0.5)] + [float(place[inside].median())]
        for path, volume in files:
            if volume is not None:
                write_map(path, volume.numpy(), pixel)
        counts = sums.counts[k]
        rows.append(PolishedClass(k, float(counts.sum()), *map(float, counts), *at, float(gain[inside].mean())))
    return rows, curves


def _fsc_csv(curves: dict[int, np.ndarray], box_size: int, pixel_size: float) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["shell", "resolution_A", *(f"class_{k:03d}" for k in curves)])
    for shell in range(1, box_size // 2 + 1):
        values = (f"{curve[shell - 1]:.5f}" for curve in curves.values())
        writer.writerow([shell, f"{box_size * pixel_size / shell:.3f}", *values])
    return out.getvalue()


def _classes_csv(rows: list[PolishedClass]) -> str:
    out = io.StringIO()
    names = ["class_from_0", "particles", "half_a", "half_b", "resolution_0.143_A", "resolution_0.5_A",
             "median_local_resolution_A", "mean_gain"]  # fmt: skip
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([row.number, *(f"{value:.4g}" for value in list(vars(row).values())[1:])])
    return out.getvalue()


def _plot(folder: PolishDir, curves: dict[int, np.ndarray], found: Polished) -> None:
    if not curves:
        return
    D, pixel = found.maps.shape[-1], found.pixel_size
    shell = np.arange(1, D // 2 + 1)
    ticks = [(float(r), f"{D * pixel / r:.0f} A") for r in np.linspace(0, D // 2, 6)[1:]]
    lines = [(f"class {k}", shell, curve) for k, curve in list(curves.items())[:SHOWN_CURVES]]
    with atomic_path(folder.plot) as temporary:
        line_plot(
            temporary, lines, (0, D / 2), (-0.1, 1), ticks, (0.143, 0.5), "plain half maps inside the mask",
            "resolution", "FSC",
        )  # fmt: skip
