"""The E-step of the voxel field: from sums over slices to the shares of images in codes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from cryosuite.kernels import assignment
from cryosuite.kernels import class_slices as kernel
from cryosuite.methods.kraqen_options import KraqenOptions
from cryosuite.reconstruct.class_images import Chunk
from cryosuite.reconstruct.class_work import ClassWork
from cryosuite.reconstruct.weights import ClassWeights, stacked


class Expectation:
    """The E-step: from sums to shares, chunk by chunk, with what is counted on the way.

    Args:
        work: the images and who shares them. usage: (K,) share of the images in each code, sum 1.
        temperature: in units of the Bayes temperature. strength: of the balance. r_max: of the slices, pixels.

    Attributes:
        parts: shares of the chunks of this process. log_likelihood: of its images, after `share` of all.
        whole: shares of the images of all processes in their order, after `share`.
    """

    def __init__(
        self,
        options: KraqenOptions,
        work: ClassWork,
        usage: np.ndarray,
        temperature: float,
        strength: float,
        r_max: int,
    ) -> None:
        self.options, self.work = options, work
        self.temperature, self.strength, self.r_max = temperature, strength, r_max
        self.usage = torch.from_numpy(usage).to(work.device)
        self.restart()

    def restart(self) -> None:
        """Forget what was scored."""
        self.parts: list[ClassWeights] = []
        self.log_likelihood = 0.0
        self.whole: ClassWeights | None = None

    def score(self, chunk: Chunk, sums: list) -> None:
        """Shares of a chunk from its sums (h, g) with every group of codes."""
        o, images = self.options, self.work.images
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

    def share(self, order: np.ndarray) -> None:
        """Put together what the processes found; ``order``: where the own images lie among the chunks, one by one."""
        own = stacked(self.parts, len(self.usage))
        self.whole = self.work.table(own.rows(order))
        self.log_likelihood = sum(self.work.processes.everyone(lambda: self.log_likelihood))

    def spread(self, rows: np.ndarray, count: int) -> ClassWeights:
        """The shares of all images, which are ``rows``, as a table of ``count`` particles; the other rows are empty."""
        lengths = np.zeros(count, np.int64)
        lengths[rows] = np.diff(self.whole.indptr)
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return replace(self.whole, indptr=starts)
