"""Pose search in a few voxel volumes instead of one network volume per particle (``--search cached``).

Latents of many particles lie close together, and so do their volumes. k-means of the last latents gives K centres;
their volumes are made once and searched by the kernels for voxels, every particle in that of its nearest centre; the
poses that are left are scored again, exactly, with the particle's own volume. Particles far from every centre take the
exact way from the start (DECO, section 4.6).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cryosuite.kernels.pose_search import VolumeSource

__all__ = ["CachedVolumes"]

RECENT = 4096  # latents that centres are found in
REFRESHED = 8  # times per pass over the particles
ROUNDS = 10  # of k-means
FAR = 2.0  # mean distances from particles to their centre beyond which a particle takes the exact way


class CachedVolumes(nn.Module):
    """Volumes at the centres of the latents, and whose centre is nearest; all of it buffers, so that a resumed run goes
    on exactly.

    Args:
        r_max: Fourier pixels up to which slices will be asked for; None: all of them.

    Attributes:
        latents: (RECENT, zdim) the last that were seen; ``seen``: how many there were in all.
        centres: (K, zdim). volumes: (K, D, D, D) float32, or where that is less (``spectral``), as in large boxes,
            their transforms up to ``r_max`` as a source of slices has them. reach: (), distance from where on the
            exact way is taken. age: () particles searched for since the volumes were made; -1: there are none.
    """

    def __init__(self, count: int, zdim: int, box_size: int, r_max: int | None = None) -> None:
        super().__init__()
        self.box_size, self.r_max = box_size, min(r_max or box_size // 2, box_size // 2)
        boxes, transforms = (box_size,) * 3, transform_shape(self.r_max)
        self.spectral = math.prod(transforms) < math.prod(boxes)
        self.register_buffer("latents", torch.zeros(RECENT, zdim))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("centres", torch.zeros(count, zdim))
        self.register_buffer("volumes", torch.zeros(count, *(transforms if self.spectral else boxes)))
        self.register_buffer("reach", torch.zeros(()))
        self.register_buffer("age", torch.full((), -1, dtype=torch.int64))
        self.made: VolumeSource | None = None  # of ``volumes``, made when it is first asked for

    @torch.no_grad()
    def note(self, z: Tensor, particles: int, make: Callable[[Tensor], Tensor]) -> None:
        """Take the latents z (b, zdim) of a batch, of all processes, and make the volumes anew where it is time.

        Args:
            particles: in the set; volumes are made ``REFRESHED`` times while so many are searched for.
            make: latents (k, zdim) -> volumes (k, D, D, D).
        """
        z = z[-RECENT:].to(self.latents)
        place = (int(self.seen) + torch.arange(len(z), device=z.device)) % RECENT
        self.latents[place] = z
        self.seen += len(z)
        if 0 <= int(self.age) < particles / REFRESHED:
            self.age += len(z)
            return
        known = self.latents[: min(int(self.seen), RECENT)]
        self.centres.copy_(_centres(known, len(self.centres)))
        self.reach.copy_(FAR * _distances(known, self.centres).amin(1).mean())
        for k in range(len(self.centres)):  # one at a time: the network's own temporaries are large enough
            volume = make(self.centres[k : k + 1])[0].to(self.volumes)
            self.volumes[k] = VolumeSource(volume, r_max=self.r_max).transform[0] if self.spectral else volume
        self.age.fill_(len(z))
        self.made = None

    def source(self) -> VolumeSource:
        """All volumes as one source of slices up to radius ``r_max``; the particles' volumes are not yet said."""
        if self.spectral:
            return VolumeSource.of_transforms(self.volumes, self.box_size, self.r_max)
        if self.made is None:
            self.made = VolumeSource(self.volumes, r_max=self.r_max)
        return self.made

    def nearest(self, z: Tensor) -> tuple[Tensor, Tensor]:  # (b,), (b,)
        """Number of the centre nearest to each latent, and whether it lies too far for its volume to stand for it."""
        distance, which = _distances(z.to(self.centres), self.centres).min(1)
        return which, distance > self.reach


def transform_shape(r_max: int) -> tuple[int, ...]:
    """Of the transform that a source of slices keeps of a volume: half of the padded cube, real and imaginary parts."""
    side = 2 * (2 * r_max + 1) + 1
    return side, side, side // 2 + 1, 2


def _distances(a: Tensor, b: Tensor) -> Tensor:  # (n, zdim), (m, zdim) -> (n, m)
    """Not by matrix products, whose digits depend on how many latents there are."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _centres(z: Tensor, count: int) -> Tensor:  # (n, zdim) -> (count, zdim)
    """k-means from points spread over the latents, the farthest from all before it first; the same on every machine.

    With fewer latents than centres some centres are equal.
    """
    centres = z.mean(0, keepdim=True)
    distance = torch.full((len(z),), torch.inf, device=z.device)
    for _ in range(count):
        distance = torch.minimum(distance, (z - centres[-1]).square().sum(1))
        centres = torch.cat([centres, z[distance.argmax()][None]])
    centres = centres[1:]
    for _ in range(ROUNDS):
        which = _distances(z, centres).argmin(1)
        number = torch.bincount(which, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, which, z)
        centres = torch.where(number[:, None] > 0, sums / number[:, None].clamp(min=1), centres)
    return centres
