"""What ``eval-fsc RUN`` says beyond volumes: neighbours in a continuous landscape, clusters of `analyze`, poses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryosuite.data.particles import ParticleSet
from cryosuite.data.truth import Truth
from cryosuite.data.workdir import RunDir, WorkDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.pickles import read_labels, read_poses

if TYPE_CHECKING:
    from cryosuite.methods import LoadedRun

SMALLEST_ERROR = 0.01  # degrees: poses nearer to the truth than this are the truth


def finite_rows(z: np.ndarray) -> np.ndarray:
    """Rows of the latents (N, zdim) that hold numbers; InputError when none does."""
    good = np.flatnonzero(np.isfinite(z).all(axis=1))
    if not len(good):
        raise InputError(f"none of the {len(z)} latents is a number (NaN or infinite): this training went wrong.")
    return good


def latent_scores(
    run: Path, loaded: LoadedRun, truth: Truth, labels: np.ndarray, good: np.ndarray, seed: int
) -> dict[str, Any]:
    """Neighbour scores where the truth is continuous, agreement of the run's own labels (methods with a codebook) and
    the V-measure of the clusters that `analyze` found.

    Args:
        labels: (M,) true states of the particles ``good`` (M,).
    """
    out: dict[str, Any] = {}
    landscape = truth.dataset["truth"].get("embedding")
    if landscape is not None and len(good) >= 20:
        out["landscape"] = _landscape(loaded, np.asarray(landscape, float)[labels], good, seed)
    path = RunDir(run).labels(loaded.epoch)
    if path.exists():
        found = read_labels(path, n=len(loaded.z), unlabelled=True)[good]
        if (found >= 0).any():
            out["labels"] = label_scores(labels, found)
    path = RunDir(run).analysis(loaded.epoch).labels
    if path.exists():
        from cryosuite.metrics.clustering import v_measure

        found = np.asarray(read_labels(path, unlabelled=True))
        if len(found) == len(loaded.z):
            known = found[good] >= 0
            clusters = len(np.unique(found[good][known]))
            value = v_measure(labels[known], found[good][known])
            out["analysis"] = {"clusters": clusters, "v_measure": value}
        else:
            notice(f"{path}: {len(found)} labels for {len(loaded.z)} latents: not judged")
    return out


def label_scores(truth: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """ARI, AMI and V-measure of the labels (M,) that a run gives its particles itself; -1: none, not judged."""
    from cryosuite.metrics.clustering import agreement, v_measure

    known = found >= 0
    ari, ami = agreement(truth[known], found[known])
    value = v_measure(truth[known], found[known])
    return {
        "codes": len(np.unique(found[known])),
        "judged": int(known.sum()),
        "ari": ari,
        "ami": ami,
        "v_measure": value,
    }


def _landscape(loaded: LoadedRun, place: np.ndarray, good: np.ndarray, seed: int) -> dict[str, Any]:
    """Do neighbours in z lie together in the landscape, and does z know of pose and CTF, which it should not?"""
    from cryosuite.metrics.neighbours import information_imbalance, neighbourhood_similarity

    z, particles = loaded.z[good], loaded.particles
    out: dict[str, Any] = {"similarity": neighbourhood_similarity(z, place, seed=seed)}
    spaces = {"landscape": place}
    if particles.rotation is not None:
        spaces["pose"] = particles.rotation[good].reshape(len(good), 9)
    if particles.ctf is not None:
        ctf = np.asarray(particles.ctf, float)[good]
        varies = ctf.std(0) > 1e-9
        if varies.any():
            spaces["ctf"] = ((ctf - ctf.mean(0)) / np.maximum(ctf.std(0), 1e-12))[:, varies]
    for name, space in spaces.items():
        out[f"imbalance_z_to_{name}"] = information_imbalance(z, space, seed=seed)
        out[f"imbalance_{name}_to_z"] = information_imbalance(space, z, seed=seed)
    return out


def pose_scores(particles: ParticleSet, truth: Truth, labels: np.ndarray) -> dict[str, Any] | None:
    """Errors of the poses of a set, over all and per state; None when it has no poses or the true ones."""
    from cryosuite.metrics.poses import class_rows, pose_errors

    name = truth.dataset["truth"].get("poses")
    path = truth.path / name if name else WorkDir(truth.path).poses
    if particles.rotation is None or not path.exists():
        return None
    rotation, shift = read_poses(path)
    rotation = rotation[particles.index]
    moved = particles.shift is not None and shift is not None
    mine, true = (particles.shift, shift[particles.index]) if moved else (None, None)
    same = np.abs(particles.rotation - rotation).max() < np.deg2rad(SMALLEST_ERROR)
    if same and (not moved or np.abs(mine - true).max() < 1e-4):
        return None
    errors = pose_errors(particles.rotation, rotation, mine, true)
    return {**errors.summary(), "box_size": particles.box_size, "per_state": class_rows(errors, labels)}


def extra_rows(result: dict[str, Any]) -> list[list[str]]:
    """Rows of the table for shapes, windows, landscape, clusters and poses, where there are such scores."""
    rows, found = [], result["per_image"]
    if "viou" in found:
        rows.append(["shape, per image", f"{found['viou']:.3f} vIoU", f"Chamfer distance {found['chamfer_A']:.2f} A"])
    if "local_auc_median" in found:
        text = f"10th percentile {found['local_auc_p10']:.3f}, {found['local_resolution_median_A']:.1f} A at 0.5"
        rows.append(["local AUC, 25-A windows", f"{found['local_auc_median']:.3f}", f"share of its maximum; {text}"])
    if "landscape" in result:
        rows += _landscape_rows(result["landscape"])
    if "labels" in result:
        own, states = result["labels"], result["n_states"]
        text = f"AMI {own['ami']:.4f}, V-measure {own['v_measure']:.4f}; {own['codes']} codes, {states} states"
        rows.append(["ARI, its own labels", f"{own['ari']:.4f}", text])
    if "analysis" in result:
        text = f"{result['analysis']['clusters']} clusters of analyze, {result['n_states']} states"
        rows.append(["V-measure", f"{result['analysis']['v_measure']:.4f}", text])
    if "poses" in result:
        found = result["poses"]
        worst = max(found["per_state"], key=lambda row: row["rotation_median_deg"])
        text = (
            f"mean {found['rotation_mean_deg']:.2f}; worst state {worst['state']}: {worst['rotation_median_deg']:.2f}"
        )
        if "shift_median" in found:
            pixels = found["shift_median"] * found["box_size"]
            text += f"; shift {pixels:.2f} px, {pixels * result['pixel_size_A']:.2f} A"
        rows.append(["pose error, median", f"{found['rotation_median_deg']:.2f} deg", text])
    return rows


def _landscape_rows(found: dict[str, Any]) -> list[list[str]]:
    """Similarity at its smallest and largest neighbourhood; imbalance of ten neighbours, both ways."""
    similar = found["similarity"]
    few, many = min(similar), max(similar)
    rows = [["neighbours kept", f"{similar[few]:.3f}", f"of the {few} nearest; {similar[many]:.3f} of {many}"]]
    for name in ("landscape", "pose", "ctf"):
        if f"imbalance_z_to_{name}" in found:
            there, back = (found[key][10] for key in (f"imbalance_z_to_{name}", f"imbalance_{name}_to_z"))
            text = f"{name} -> z {back:.3f}; 0: knows it, 1: knows nothing"
            rows.append([f"imbalance z -> {name}", f"{there:.3f}", text])
    return rows
