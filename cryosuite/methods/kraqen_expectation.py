"""The E-step of the voxel field: from sums over slices to the shares of images in codes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryosuite.kernels import assignment
from cryosuite.kernels import class_slices as kernel
from cryosuite.reconstruct.weights import ClassWeights

if TYPE_CHECKING:
    from cryosuite.methods.kraqen_voxel import VoxelEM
    from cryosuite.reconstruct.class_images import Chunk


class Expectation:
    """The E-step: from sums to shares, chunk by chunk, with what is counted on the way."""

    def __init__(self, engine: VoxelEM, usage: np.ndarray, temperature: float, strength: float, r_max: int) -> None:
        self.engine, self.r_max, self.temperature, self.strength = engine, r_max, temperature, strength
        self.usage = torch.from_numpy(usage).to(engine.device)
        self.parts: list[ClassWeights] = []
        self.log_likelihood = 0.0

    def score(self, chunk: Chunk, sums: list) -> None:
        """Shares of a chunk from its sums (h, g) with every group of codes."""
        o, images = self.engine.options, self.engine.images
        h, g = (torch.cat([part[i] for part in sums], 1).double() for i in (0, 1))
        power = kernel.disc_power(chunk.values, chunk.weights)
        points = 2.0 * chunk.values.shape[1]
        values = assignment.scores_from_sums(o.assign, h, g, power)
        logits = assignment.logits(o.assign, values, points, images.signal, o.kernel)
        p = torch.softmax(assignment.balance(logits, self.usage, self.strength) / self.temperature, 1).cpu().numpy()
        p[images.bad[chunk.rows]] = 0
        self.parts.append(ClassWeights.from_dense(p, o.sparse))
        likelihood = assignment.likelihood_from_sums(h, g)
        self.log_likelihood += float((torch.logsumexp(likelihood, 1) - math.log(likelihood.shape[1])).sum())

    def shares(self, number: int) -> ClassWeights:
        """Shares of one chunk."""
        return self.parts[number]

    def table(self, rows: np.ndarray | None = None, count: int = 0) -> ClassWeights:
        """Shares of all chunks so far; with ``rows`` as a table of ``count`` particles, empty where not in ``rows``."""
        lengths = np.concatenate([np.diff(part.indptr) for part in self.parts])
        if rows is not None:
            spread = np.zeros(count, np.int64)
            spread[rows] = lengths
            lengths = spread
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        data = np.concatenate([part.data for part in self.parts])
        return ClassWeights(data, np.concatenate([part.indices for part in self.parts]), starts, self.engine.codes)
