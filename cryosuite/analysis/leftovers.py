"""Results of an earlier analysis in the same folder: what does not belong to the new one is removed.

Only files under names of our own are removed; a folder goes when nothing else is in it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from cryosuite.analysis.particle_table import columns_file
from cryosuite.analysis.volumes import VolumeOptions
from cryosuite.data.latents import fingerprint
from cryosuite.data.workdir import AnalysisDir, VolumeDir
from cryosuite.errors import notice
from cryosuite.formats.config import read_yaml

OF_A_WALK = ("vol_[0-9]*.mrc", "vol_[0-9]*.png", "sharp_[0-9]*.mrc", "volumes.png", "z_values.txt", "umap.png",
             "pca_traversal.png", "pca_traversal.csv", "umap_traversal.png", "*.cxc")  # fmt: skip


def drop_walk(folder: VolumeDir) -> None:
    """Remove the volumes along a component, their pictures and scripts."""
    if not folder.path.is_dir():
        return
    for pattern in OF_A_WALK:
        for old in folder.path.glob(pattern):
            old.unlink()
    if not any(folder.path.iterdir()):
        folder.path.rmdir()


def drop_pages(out: AnalysisDir) -> None:
    """Remove page, table and tests of earlier clusters, which an analysis that is killed would leave to its labels."""
    for old in (out.report, out.particles, columns_file(out.particles), out.confounds):
        old.unlink(missing_ok=True)


def drop_umap_of_others(out: AnalysisDir, z: np.ndarray) -> None:
    """Remove the UMAP that an earlier analysis left in the folder, unless it was one of the same latents (N, zdim)."""
    before = read_yaml(out.summary).get("latents") if out.summary.is_file() else None
    if before != fingerprint(z):
        pictures = [out.plot(name) for name in ("umap", "umap_hexbin", "umap_marginals")]
        for old in (out.umap, out.plot("umap").with_suffix(".csv"), *pictures):
            old.unlink(missing_ok=True)


def drop_volumes_of_others(
    out: AnalysisDir, z: np.ndarray, folder: VolumeDir, drawn: bool, walks: int, options: VolumeOptions
) -> tuple[dict[str, Any], list[float]]:
    """Remove walks of other latents or options, and what shows volumes of other clusters, that an analysis left before.

    Args:
        folder: of the clusters found now. drawn: their volumes were made now. walks: components walked along now.
        options: of the volumes, as asked for now.

    Returns:
        Options that the volumes now in the folder were made with, which are the earlier ones where they stay
        (--skip-vol), and the levels noted for those of the clusters, empty where there are none.
    """
    asked = asdict(options)
    if not out.summary.is_file():
        return asked, []  # no earlier analysis of ours
    before = read_yaml(out.summary)
    made, known = (part if isinstance(part, dict) else {} for part in map(before.get, ("volumes", "kmeans")))
    same = before.get("latents") == fingerprint(z)
    component = walks + 1
    while (not same or (drawn and made != asked)) and out.pc(component).path.is_dir():
        drop_walk(out.pc(component))
        component += 1
    of_these = same and known.get("folder") == folder.path.name and shows_centres(folder)
    if not drawn and not of_these:
        for old in (out.chimerax, out.chimerax_overlay, out.plot("overview")):
            old.unlink(missing_ok=True)
    if drawn or not same or not made or not (folder.volumes() or out.pc(1).path.is_dir()):
        return asked, []
    if asked != made and options != VolumeOptions():
        notice(f"{out.path}: its volumes were made with other options and stay; without --skip-vol they are made anew")
    levels = known.get("levels")
    return made, levels if of_these and isinstance(levels, list) else []


def shows_centres(folder: VolumeDir) -> bool:
    """False where the volumes are of other clusters: left by an earlier analysis in the same folder (--skip-vol)."""
    drawn, centres = folder.z_values, folder.centers
    return not (drawn.is_file() and centres.is_file()) or drawn.read_bytes() == centres.read_bytes()
