"""Where pose search takes its slices from: anything that gives the Fourier values of a volume on the half disc.

Slices follow the conventions of `slices.extract_slices`: rotation R samples the transform at `(kx, ky, 0) @ R`, values
are unnormalised like `fourier.to_half_disc`, points are in the order of `fourier.half_disc`.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .fourier import half_disc
from .slices import extract_slices, volume_transform

__all__ = ["SliceSource", "VolumeSource", "PointSource", "MagnifiedSource", "AutocastSource", "in_autocast"]


@runtime_checkable
class SliceSource(Protocol):
    """What pose search asks of a volume representation. `box_size` is the D of its half disc."""

    box_size: int

    def slices(
        self,
        rotation: Tensor,  # (b, q, 3, 3)
        radius: int,
        index: Tensor,  # (b,) int64, particle numbers
    ) -> Tensor:  # (b, q, P) complex
        """Slices of each particle's volume on the half disc of this radius."""
        ...

    def groups(self, index: Tensor) -> Tensor | None:
        """(b,) int64: particles of equal group share one volume; None: all particles share one."""
        ...


class PointSource:
    """A source made of a function for values at arbitrary frequencies, such as a coordinate network.

    `values(q, index)` takes q (b, n, 3) in cycles per pixel and particle numbers (b,) and returns (b, n) complex.
    """

    def __init__(
        self,
        values: Callable[[Tensor, Tensor], Tensor],
        box_size: int,
        groups: Callable[[Tensor], Tensor | None] | None = None,
    ) -> None:
        self.values, self.box_size, self._groups = values, box_size, groups

    def slices(self, rotation: Tensor, radius: int, index: Tensor) -> Tensor:
        """(b, q, 3, 3) -> (b, q, P) complex."""
        plane = half_disc(self.box_size, radius, rotation.device).frequency_as(rotation.dtype)
        with torch.autocast(rotation.device.type, enabled=False):  # frequencies keep their digits
            q = plane @ rotation[..., :2, :]
        return self.values(q.flatten(1, 2), index).unflatten(1, (rotation.shape[1], -1))

    def groups(self, index: Tensor) -> Tensor | None:
        """As the function given says; by default every particle has a volume of its own."""
        return index if self._groups is None else self._groups(index)


class VolumeSource:
    """K voxel volumes, 2x padded, trilinear, with the gridding of the interpolation divided out.

    Args:
        volumes: (D, D, D) or (K, D, D, D) real.
        volume_index: (N,) int64, the volume of every particle; None: particle numbers are volume numbers when there
            are several volumes.
        r_max: Fourier pixels up to which slices will be asked for (D/2 by default): a smaller transform stays in
            the processor's cache.
        pad: oversampling of the transform.
    """

    def __init__(
        self, volumes: Tensor, volume_index: Tensor | None = None, r_max: int | None = None, pad: int = 2
    ) -> None:
        D = volumes.shape[-1]
        stack = volumes.reshape(-1, D, D, D)
        radius = D // 2 if r_max is None else min(int(r_max), D // 2)
        self.box_size, self.pad, self.r_max = D, pad, radius
        self.volume_index = volume_index
        # one volume at a time: the padded box is eight times larger than what is kept
        self.transform = torch.stack([_crop(volume_transform(v, pad), pad * radius + 1) for v in stack])

    @classmethod
    def of_transforms(cls, transform: Tensor, box_size: int, r_max: int, pad: int = 2) -> VolumeSource:
        """The source of transforms that were taken from another source of this radius; nothing is copied."""
        source = cls.__new__(cls)
        source.box_size, source.pad, source.r_max = box_size, pad, min(r_max, box_size // 2)
        source.volume_index, source.transform = None, transform
        return source

    def __len__(self) -> int:
        return self.transform.shape[0]

    def slices(self, rotation: Tensor, radius: int, index: Tensor) -> Tensor:
        """(b, q, 3, 3) -> (b, q, P) complex."""
        if radius > self.r_max:
            raise ValueError(f"these volumes were transformed up to radius {self.r_max}, not {radius}")
        b, q = rotation.shape[:2]
        which = None if len(self) == 1 else self.which(index).repeat_interleave(q)
        disc = half_disc(self.box_size, radius, rotation.device)
        return extract_slices(self.transform, rotation.flatten(0, 1), disc, self.pad, which).unflatten(0, (b, q))

    def of(self, volume_index: Tensor) -> VolumeSource:
        """The same volumes, with the volume of every particle said; nothing is copied."""
        other = copy(self)
        other.volume_index = volume_index
        return other

    def which(self, index: Tensor) -> Tensor:
        """(b,) int64, the number of each particle's volume."""
        if len(self) == 1:
            return torch.zeros_like(index)
        return index if self.volume_index is None else self.volume_index[index]

    def groups(self, index: Tensor) -> Tensor | None:
        """The volume of each particle, None when there is one."""
        return None if len(self) == 1 else self.which(index)


class MagnifiedSource:
    """A source for images whose pixels are not those of the volumes, or which are magnified anisotropically.

    Args:
        source: of slices at the scale of the volumes.
        place: (N, 2, 2), for every particle what rows x and y of its rotation are multiplied with from the left: the
            point k of an image belongs at (k @ place, 0) @ R. Poses stay those of the volume's frame, and shifts in
            pixels of the image.
    """

    def __init__(self, source: SliceSource, place: Tensor) -> None:
        self.source, self.place, self.box_size = source, place, source.box_size

    def slices(self, rotation: Tensor, radius: int, index: Tensor) -> Tensor:
        """(b, q, 3, 3) -> (b, q, P) complex."""
        rows = self.place[index][:, None].to(rotation.dtype) @ rotation[..., :2, :]
        return self.source.slices(torch.cat([rows, rotation[..., 2:, :]], -2), radius, index)

    def groups(self, index: Tensor) -> Tensor:
        """Every particle has slices of its own, whoever shares its volume."""
        return index

    def round(self) -> MagnifiedSource:
        """The same without anisotropy: a turn of the image is then a turn of its slice."""
        scale = torch.linalg.det(self.place).abs().sqrt()
        return MagnifiedSource(self.source, scale[:, None, None] * torch.eye(2).to(self.place))


class AutocastSource:
    """A source that computes its slices in the reduced precision that was on when the search was called.

    The search itself always runs in full precision: scores are differences of large sums.
    """

    def __init__(self, source: SliceSource, device_type: str) -> None:
        self.source, self.box_size = source, source.box_size
        self.settings = {"device_type": device_type, "dtype": torch.get_autocast_dtype(device_type)}

    def slices(self, rotation: Tensor, radius: int, index: Tensor) -> Tensor:
        """(b, q, 3, 3) -> (b, q, P) complex."""
        with torch.autocast(**self.settings):
            return self.source.slices(rotation, radius, index)

    def groups(self, index: Tensor) -> Tensor | None:
        """As the source says."""
        return self.source.groups(index)


def in_autocast(source: SliceSource, device_type: str) -> SliceSource:
    """The source to use once autocast is switched off: the same where it is off, or where the source has no network."""
    if isinstance(source, MagnifiedSource):
        return MagnifiedSource(in_autocast(source.source, device_type), source.place)
    if not torch.is_autocast_enabled(device_type) or isinstance(source, VolumeSource | AutocastSource):
        return source
    return AutocastSource(source, device_type)


def _crop(transform: Tensor, N: int) -> Tensor:
    """(2M+1, 2M+1, M+1, 2) -> (2N+1, 2N+1, N+1, 2), the frequencies up to N padded pixels."""
    M = transform.shape[-2] - 1
    cut = slice(M - N, M + N + 1)
    return transform[..., cut, cut, : N + 1, :].contiguous()
