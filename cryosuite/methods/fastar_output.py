"""What fastar-infer leaves behind: confidence, poses in the forms other programs read, a map and how good it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cryosuite.data.export import export_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.data.results import PosesDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.atomic import atomic_path, write_text
from cryosuite.formats.config import write_yaml
from cryosuite.formats.mrc import write_map
from cryosuite.formats.pickles import write_pickle
from cryosuite.kernels.planar import mirror
from cryosuite.kernels.so3_grid import view_frames
from cryosuite.metrics.fsc import FscTable, fsc_table, rows_as_csv, write_png
from cryosuite.reconstruct.backproject import Reconstruction
from cryosuite.reconstruct.diagnose import best_trial, compare_hands, try_alternatives
from cryosuite.reconstruct.masks import half_map_mask

CONE_ORDER = 1  # 48 directions of view: particles seen from about the same side
FEWEST = 20  # particles in a cone whose mean and spread are its own
CHECKED, CHECK_BOX = 500, 32  # particles by which conventions are checked, and the box of the maps made for it


@dataclass
class Judged:
    """Confidence (N, 3): score, z among particles seen from the same side, margin; and who is left out (N,) bool."""

    confidence: np.ndarray
    rejected: np.ndarray


def judge(
    score: np.ndarray,  # (N,)
    margin: np.ndarray,  # (N,)
    rotation: np.ndarray,  # (N, 3, 3)
    good: np.ndarray,  # (N,) bool, False for images that hold nothing
    reject: float,
) -> Judged:
    """Compare scores with those of particles of the same view, as some views are harder than others.

    The lowest ``reject`` of every cone of views is left out, and every image that holds nothing.
    """
    cone = view_cones(rotation)
    values = score.astype(np.float64)
    z = np.zeros(len(values))
    rejected = ~good
    whole = _spread(values[good]) if good.any() else (0.0, 1.0)
    for number in np.unique(cone[good]):
        own = good & (cone == number)
        few = int(own.sum()) < FEWEST
        mean, sd = whole if few else _spread(values[own])
        z[own] = (values[own] - mean) / sd
        if reject > 0 and not few:
            rejected |= own & (values < np.quantile(values[own], reject))
    # cones with few particles are judged together
    rest = good & np.isin(cone, [n for n in np.unique(cone[good]) if (good & (cone == n)).sum() < FEWEST])
    if reject > 0 and rest.any():
        rejected |= rest & (z < np.quantile(z[rest], reject))
    z[~good] = -10.0
    table = np.stack([np.where(good, values, 0.0), z, np.where(good, margin, 0.0)], 1)
    return Judged(table.astype(np.float32), rejected)


def _spread(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), max(float(values.std()), 1e-6)


def view_cones(rotation: np.ndarray) -> np.ndarray:
    """Number of the cone of views (N,) each rotation's viewing direction lies in."""
    axes = view_frames(CONE_ORDER)[:, 2].numpy()
    return (rotation[:, 2].astype(np.float32) @ axes.T).argmax(1)


# --- files -----------------------------------------------------------------------------------------------------------


def write_poses(out: PosesDir, particles: ParticleSet, judged: Judged, flipped: bool) -> None:
    """poses.pkl, poses.star, confidence and index lists of posed particles; ``flipped``: the other hand's poses too."""
    out.path.mkdir(parents=True, exist_ok=True)
    write_pickle(out.poses, (particles.rotation, particles.shift))
    write_pickle(out.index, np.asarray(particles.index, np.int64))
    write_pickle(out.rejected, np.asarray(particles.index[judged.rejected], np.int64))
    write_pickle(out.kept, np.asarray(particles.index[~judged.rejected], np.int64))
    with atomic_path(out.confidence) as temporary, open(temporary, "wb") as stream:
        np.save(stream, judged.confidence)
    columns = {
        "rlnRandomSubset": particles.half_sets().astype(np.int64) + 1,
        "rlnParticleFigureOfMerit": np.round(judged.confidence[:, 0].astype(np.float64), 6),
    }
    if hasattr(particles.images, "files"):
        export_particles(particles, out.star, binned=True, poses=True, columns=columns)
    if flipped:
        other = mirror(torch.from_numpy(particles.rotation)).numpy()
        write_pickle(out.flipped_poses, (other, particles.shift))


def write_maps(
    out: PosesDir, one: Reconstruction, biased_to: float | None, flipped: bool, title: str
) -> tuple[FscTable | None, dict[str, Any]]:
    """The map, half maps, mask and FSC; what they come to as numbers.

    biased_to: resolution in Angstrom down to which what the poses come from (a reference, or maps of all images) may
    have made the half maps agree; None where there was neither, 0 where all of a reference was used.
    """
    write_map(out.map, one.map.numpy(), one.pixel_size)
    if flipped:
        write_map(out.flipped_map, one.flipped().map.numpy(), one.pixel_size)
    facts: dict[str, Any] = {"particles": one.count, "pixel_size": one.pixel_size}
    if one.half_a is None:
        return None, facts
    for number, half in ((1, one.half_a), (2, one.half_b)):
        write_map(out.half(number), half.numpy(), one.pixel_size)
    mask = half_map_mask(one.map, one.fsc)
    write_map(out.mask, mask.numpy(), one.pixel_size)
    table = fsc_table(one.half_a, one.half_b, one.pixel_size, mask, corrected=True)
    rows = table.rows()
    for row in rows:
        row["reference_biased"] = int(biased_to is not None and row["resolution_A"] >= biased_to)
    write_text(out.fsc, rows_as_csv(rows))
    with atomic_path(out.plot) as temporary:
        write_png(temporary, table, title)
    for name in ("unmasked", "masked"):
        for threshold in (0.143, 0.5):
            facts[f"resolution_{name}_{threshold}_A"] = table.resolution(name, threshold)
    facts["reference_biased_to_A"] = biased_to
    return table, facts


def write_timing(out: PosesDir, seconds: Mapping[str, float], count: int) -> dict[str, float]:
    """timing.json: seconds of each stage, their sum, and images per second of prediction and in all."""
    predicting = sum(seconds.get(name, 0.0) for name in ("load", "encode", "select", "decode", "Kabsch", "grid"))
    total = sum(seconds.values())
    facts = {name: round(value, 4) for name, value in seconds.items()} | {
        "total": round(total, 4),
        "images": count,
        "images_per_s_prediction": round(count / max(predicting, 1e-9), 1),
        "images_per_s_total": round(count / max(total, 1e-9), 1),
    }
    write_text(out.timing, json.dumps(facts, indent=1) + "\n")
    return facts


def write_summary(out: PosesDir, facts: Mapping[str, Any]) -> None:
    """infer.yaml, last: the folder is complete."""
    write_yaml(out.summary, facts)


def require_free(out: PosesDir, overwrite: bool, clear: bool = True) -> None:
    """InputError when the folder holds poses already; with ``overwrite`` those of an earlier run are removed, if told
    to (``clear``)."""
    if not out.summary.exists() and not out.poses.exists():
        return
    if not overwrite:
        raise InputError(f"{out.path}: holds poses already. Add --overwrite to replace them, or choose another -o.")
    if not clear:
        return
    stale = (out.summary, out.flipped_map, out.flipped_poses, out.truth, out.map, out.half(1), out.half(2), out.fsc,
             out.mask, out.plot)  # fmt: skip
    for path in stale:
        path.unlink(missing_ok=True)


# --- checks ----------------------------------------------------------------------------------------------------------


def check_conventions(posed: ParticleSet, kept: np.ndarray) -> dict[str, Any]:
    """Do the poses predict held-out images better than poses mixed up, and than their usual misreadings?

    A notice says so when they do not. kept: (N,) bool, particles to judge by.
    """
    rows = np.flatnonzero(kept)
    if len(rows) < 100:
        return {"checked": 0}
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(CHECKED, len(rows))).astype(np.int64))]
    trials = try_alternatives(replace(posed.subset(rows), half=posed.half_sets()[rows]), CHECKED, CHECK_BOX)
    box = trials[0].map.shape[-1]
    best, clearly = best_trial(trials, len(rows), round(np.pi * box**2 / 8))
    given, control = trials[0], trials[-1]
    facts = {
        "checked": len(rows),
        "agreement": given.agreement,
        "agreement_of_mixed_poses": control.agreement,
        "best_reading": best.alternative.name if clearly else given.alternative.name,
    }
    if given.agreement <= control.agreement * 1.02:
        notice("the poses explain the images no better than poses of other particles do: they are not to be trusted")
    elif clearly:
        notice(f"the images fit better when {best.alternative.meaning}: {best.alternative.advice}")
    return facts


def check_hand(volume: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Mean FSC at low resolution of the map and of its mirror with the reference; a notice where the mirror wins."""
    same, other = compare_hands(volume, reference)
    if other > same + 0.05:
        notice("the map fits the reference better in a mirror: is the hand of the reference right for these images?")
    return {"hand_as_reference": same, "hand_mirrored": other}
