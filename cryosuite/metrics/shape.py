"""Shapes of maps: Chamfer distance and overlap at matched volume (BENCHMARKS section 3)."""

from __future__ import annotations

import numpy as np

FRACTION = 0.1  # of the truth's 99.9th percentile: where its surface is


def matched_shapes(volume: np.ndarray, truth: np.ndarray, fraction: float = FRACTION) -> tuple[np.ndarray, np.ndarray]:
    """Both maps (D, D, D) as bool shapes: the truth above ``fraction`` of its 99.9th percentile, the other map its
    densest voxels, as many. Published thresholds were tuned by hand; this one cannot be."""
    inside = truth > fraction * np.percentile(truth, 99.9)
    count = int(inside.sum())
    shape = np.zeros(volume.size, bool)
    if count:
        shape[np.argpartition(volume.ravel(), -count)[-count:]] = True
    return shape.reshape(volume.shape), inside


def volume_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """vIoU of two bool shapes: voxels in both / voxels in either; 1 for two empty ones."""
    either = int((a | b).sum())
    return float((a & b).sum() / either) if either else 1.0


def chamfer_distance(a: np.ndarray, b: np.ndarray, pixel_size: float) -> float:
    """Mean distance (A) from each voxel of a shape to the nearest of the other, both directions averaged."""
    from scipy.ndimage import distance_transform_edt

    if not a.any() or not b.any():
        return float("inf")
    there = distance_transform_edt(~b)[a].mean()
    back = distance_transform_edt(~a)[b].mean()
    return float(pixel_size * (there + back) / 2)
