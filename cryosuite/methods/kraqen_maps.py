"""The M-step of the voxel field: from the sums of K codes to K maps, and the splitting of a busy code into a dead one.

    V_k = F^-1[ B_k / (W_k + f / P(r)) ] x soft ball / gridding

P(r): unbiased power of the particles' slices, pooled over all codes. The regulariser never depends on how many images
a code has: otherwise rare codes would fade and die.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np
import torch
from torch import Tensor

from cryosuite.errors import notice
from cryosuite.kernels.class_slices import ClassAccumulator, padded_origin
from cryosuite.kernels.memory import out_of_memory
from cryosuite.reconstruct.masks import radius_grid, soft_sphere

SPLIT_NOISE = 0.2  # of the rms of the map that is split
SPLIT_SMOOTH = 8  # noise of a copy is low-passed at D / this


class Wiener:
    """Turns sums into maps of a box; what all codes share is computed once.

    Args:
        power: (D/2 + 1,) P(r) per shell of the box. prior: f. r_max: radius of the accumulators.
    """

    def __init__(self, box: int, r_max: int, power: Tensor, prior: float, pad: int = 2) -> None:
        self.box, self.pad, self.reach = box, pad, pad * r_max
        reach = self.reach
        axis, column = torch.arange(-reach, reach + 1), torch.arange(reach + 1)
        square = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + column**2).float()
        radius = square.sqrt() / pad
        low = radius.long().clamp(max=len(power) - 2)
        level = torch.lerp(power[low], power[low + 1], (radius - low).clamp(0, 1))
        self.level = prior / level
        # what lies beyond was only touched by the rim of the interpolation
        inside = radius <= r_max
        size = pad * box
        if 2 * reach == size:  # +Nyquist and -Nyquist are one place
            inside[0], inside[:, 0] = False, False
        phases = [padded_origin(index, pad).conj() for index in (axis, axis, column)]
        self.phase = phases[0][:, None, None] * phases[1][None, :, None] * phases[2] * inside
        self.rows, self.columns = axis % size, reach + 1
        kernel = torch.sinc((torch.arange(box) - box // 2) / size).square()
        self.window = soft_sphere(box) / (kernel[:, None, None] * kernel[None, :, None] * kernel)
        self.around = radius_grid(box) > 0.49 * box

    def map(self, sums: Tensor) -> Tensor:  # (2N+1, 2N+1, N+1, 3) -> (D, D, D)
        """The map of one code; it is set to zero around the particle, since no image shows the mean."""
        sums = sums.to(self.level.device)
        plane = sums[:, :, 0]
        mates = plane.flip((0, 1)) * plane.new_tensor([1.0, -1.0, 1.0])
        full = sums[1:-1, 1:-1, :-1].clone()
        full[:, :, 0] += mates[1:-1, 1:-1]
        values = torch.view_as_complex(full[..., :2].contiguous()) * (self.phase / (full[..., 2] + self.level))
        D, size = self.box, self.pad * self.box
        for dim in (0, 1):
            shape = list(values.shape)
            shape[dim] = size
            values = torch.fft.ifft(values.new_zeros(shape).index_add_(dim, self.rows, values), dim=dim)
            values = values.narrow(dim, 0, D)
        volume = torch.fft.irfft(values, n=size, dim=2)[..., :D]
        return (volume - volume[self.around].mean()) * self.window

    def to(self, device: torch.device | str) -> Wiener:
        """The same on another device, in place."""
        for name in ("level", "phase", "rows", "window", "around"):
            setattr(self, name, getattr(self, name).to(device))
        return self


def code_maps(acc: ClassAccumulator, wiener: Wiener, pool: Executor | None = None) -> Tensor:  # (K, D, D, D)
    """The maps of all codes of an accumulator, on the CPU.

    Where the GPU has no memory left for that, they are made on the processor.
    """

    def made(sums: Tensor) -> Tensor:
        return wiener.map(sums).cpu()

    run: Callable = map if pool is None or acc.data.is_cuda else pool.map
    try:
        return torch.stack(list(run(made, acc.data)))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    notice("out of memory while maps were made: they are made on the processor, one at a time")
    wiener.to("cpu")
    return torch.stack([made(sums) for sums in acc.data])


def split_dead(
    volumes: Tensor,  # (K, D, D, D), changed in place
    counts: np.ndarray,  # (K,) images whose best code this is
    threshold: float,  # share of all images below which a code is dead
    generator: torch.Generator,
    rms: Tensor | None = None,  # (K,) what the noise is measured by, default the rms of each map
) -> list[tuple[int, int]]:
    """Put the busiest code plus and minus smooth noise of 0.2 of its rms in its own place and in that of a dead code.

    Measured on 16 complexes at D = 64 (8,000 images, five starts): 16 states found five times out of five after
    merging; with noise on the copy alone 15, five times out of five.

    A code that was split counts half of its images from then on. Returns (dead, parent) pairs.
    """
    counts = np.asarray(counts, np.float64)
    dead = np.flatnonzero(counts < threshold * max(counts.sum(), 1))
    busy = [(-counts[k], int(k)) for k in np.flatnonzero(counts >= threshold * max(counts.sum(), 1))]
    heapq.heapify(busy)
    pairs = []
    for k in dead.tolist() if busy else []:
        count, parent = heapq.heappop(busy)
        offset = smooth_noise(volumes[parent], generator, None if rms is None else rms[parent])
        # both move: beside an untouched parent a copy with noise is worse for every image and dies again at once
        volumes[k], volumes[parent] = volumes[parent] + offset, volumes[parent] - offset
        for half in (parent, k):
            heapq.heappush(busy, (count / 2, half))
        pairs.append((k, parent))
    return pairs


def smooth_noise(volume: Tensor, generator: torch.Generator, level: Tensor | None = None) -> Tensor:
    """Low-passed noise within the soft ball, SPLIT_NOISE times the rms of the volume (or another level)."""
    D = volume.shape[-1]
    noise = torch.randn(D, D, D, generator=generator)
    frequency = torch.fft.fftfreq(D) ** 2
    square = frequency[:, None, None] + frequency[None, :, None] + frequency[: D // 2 + 1].abs()
    smooth = torch.fft.irfftn(torch.fft.rfftn(noise) * torch.exp(-square * SPLIT_SMOOTH**2 / 2), s=(D, D, D))
    smooth = smooth * soft_sphere(D)
    rms = smooth.square().mean().sqrt()
    level = volume.square().mean().sqrt() if level is None else level
    return (smooth * (SPLIT_NOISE / rms.clamp_min(1e-30))).to(volume) * level
