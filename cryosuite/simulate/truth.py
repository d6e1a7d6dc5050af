"""Ground-truth maps and their mask, made from the same atoms by the same splat in 3-D."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cryosuite.data.workdir import WorkDir
from cryosuite.formats.mrc import write_map
from cryosuite.kernels.density import density_map
from cryosuite.reconstruct.masks import soft_mask
from cryosuite.simulate.images import Optics
from cryosuite.simulate.states import State, StateSet

MASK_LEVEL, MASK_PERCENTILE = 0.1, 99.9  # voxels above this share of that percentile
MASK_DILATE, MASK_SOFT = 2.0, 3.0  # px


def state_map(state: State, optics: Optics) -> np.ndarray:
    """Map (D, D, D) float32 [z, y, x] of a state; its projections are the clean images (without the B-factor)."""
    xyz, weight = torch.from_numpy(state.xyz), torch.from_numpy(state.weight)
    return density_map(xyz, weight, optics.box_size, optics.pixel_size, optics.sigma).numpy()


def support(volume: np.ndarray) -> np.ndarray:
    """Voxels above a tenth of the 99.9 percentile: (D, D, D) bool."""
    return volume > MASK_LEVEL * np.percentile(volume, MASK_PERCENTILE)


def write_truth(work: WorkDir, states: StateSet, optics: Optics, scale: np.ndarray) -> dict[str, Any]:
    """Write one map per state in the grey scale of the images, and the soft mask around all of them.

    Args:
        work: where.
        states: the states.
        optics: boxes and pixel.
        scale: (K,) what the clean images of each state were multiplied with.

    Returns:
        The ``truth`` mapping of dataset.yaml: file names relative to the folder.
    """
    work.volume(0).parent.mkdir(exist_ok=True)
    inside = np.zeros((optics.box_size,) * 3, bool)
    names = []
    for k, state in enumerate(states.states):
        volume = state_map(state, optics) * np.float32(scale[k])
        inside |= support(volume)
        write_map(work.volume(k), volume, optics.pixel_size)
        names.append(str(work.volume(k).relative_to(work.path)))
    mask = soft_mask(torch.from_numpy(inside), MASK_DILATE, MASK_SOFT).numpy()
    write_map(work.mask, mask, optics.pixel_size)
    truth: dict[str, Any] = {"volumes": names, "labels": work.labels.name, "mask": work.mask.name}
    if states.embedding is not None:
        truth["embedding"] = np.round(states.embedding, 6).tolist()
    return truth
