"""From the sums of a backprojection to a map: regularised division, made consistent with a compact particle.

Division alone, V = F^-1[B / (W + lambda)], shrinks the map by the regulariser and leaves wrong values in the gaps
between slices. A particle inside a sphere has a smooth transform, so its neighbours tell what a gap holds: each further
pass fills them with the transform of the masked map so far,

    V_0 = F^-1[B / (W + lambda)],    V_n = F^-1[(B + lambda F(m V_n-1)) / (W + lambda)],   m: soft sphere

(Papoulis, IEEE Trans. Circuits Syst. 22 (1975) 735; the pass of BENCHMARKS section 5 with a sphere for the mask).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cryosuite.kernels import fourier
from cryosuite.kernels.slices import Accumulator
from cryosuite.reconstruct.masks import soft_sphere

REGULARISER = 0.1  # of the shell mean of W
PASSES = 1  # beyond the plain division


class PaddedGrid:
    """What the padded rfft grids of all sums of one box share.

    Attributes:
        half: S/2 with S = pad D. shell: (S, S, S/2 + 1) int64, round of the radius in padded Fourier pixels, clipped to
            S/2 + 1. inside: shell <= S/2. sign: of the move of the origin to the centre of the padded box, 0 outside.
        count: (S/2 + 2,) coefficients per shell.
    """

    def __init__(self, box_size: int, pad: int = 2) -> None:
        size = pad * box_size
        self.half = size // 2
        full = torch.fft.fftfreq(size, 1 / size)
        column = torch.arange(self.half + 1, dtype=torch.float32)
        square = full[:, None, None] ** 2 + full[None, :, None] ** 2 + column**2
        self.shell = square.sqrt_().round_().clamp_(max=self.half + 1).long()
        self.inside = self.shell <= self.half
        sign, column_sign = 1 - 2 * (full.abs() % 2), 1 - 2 * (column % 2)
        self.sign = sign[:, None, None] * sign[None, :, None] * column_sign * self.inside
        self.count = torch.bincount(self.shell.reshape(-1), minlength=self.half + 2)


class Sums:
    """The sums B and W of an accumulator on the padded rfft grid, origin of the map at the centre of the padded box.

    Attributes:
        B: (S, S, S/2 + 1) complex; W: the same shape, real; S = pad D. Zero beyond the radius of the slices.
        shell: `PaddedGrid.shell`. mean: (S/2 + 2,) shell mean of W.
    """

    def __init__(self, acc: Accumulator, grid: PaddedGrid | None = None) -> None:
        """Of an accumulator; ``grid``: that of its box, made once for many."""
        self.box_size, self.pad = acc.box_size, acc.pad
        grid = grid or PaddedGrid(acc.box_size, acc.pad)
        half, N = grid.half, acc.data.shape[2] - 1
        # what was inserted at qx < 0 lies at -q: the plane x = 0 holds only its own half of such pairs
        plane = acc.data[:, :, 0]
        mates = plane.flip((0, 1)) * plane.new_tensor([1.0, -1.0, 1.0])
        window = acc.data[N - half : N + half, N - half : N + half, : half + 1].clone()
        window[:, :, 0] += mates[N - half : N + half, N - half : N + half]
        window = torch.roll(window, (-half, -half), (0, 1))
        self.shell = grid.shell
        self.B = torch.view_as_complex(window[..., :2].contiguous()) * grid.sign
        self.W = window[..., 2] * grid.inside
        sums = torch.bincount(grid.shell.reshape(-1), weights=self.W.reshape(-1), minlength=half + 2)
        self.mean = (sums / grid.count.clamp(min=1)).float()

    def regulariser(self, fraction: float | torch.Tensor) -> torch.Tensor:
        """lambda on the grid: a fraction of the shell mean of W, one number or one per shell 0 .. D/2 of the map."""
        if isinstance(fraction, torch.Tensor):
            shell = (torch.arange(len(self.mean)) / self.pad).round().long().clamp(max=len(fraction) - 1)
            fraction = fraction[shell]
        level = self.mean * fraction
        # a shell without any data has nothing to divide: the floor keeps 0/0 away
        return level.clamp(min=torch.finfo(torch.float32).tiny * 1e6)[self.shell]


def solve(
    acc: Accumulator | Sums,
    fraction: float | torch.Tensor = REGULARISER,
    passes: int = PASSES,
    sphere: bool = True,
) -> torch.Tensor:
    """The map (D, D, D) float32 of an accumulator, or of its sums.

    Args:
        fraction: regulariser relative to the shell mean of W, one number or one per shell 0 .. D/2.
        passes: passes beyond the plain division.
        sphere: multiply the map by the soft sphere of radius 0.47 D, as RELION does: the corners of the box are
            poorly determined and hold artefacts only.
    """
    sums = acc if isinstance(acc, Sums) else Sums(acc)
    D, size = sums.box_size, sums.box_size * sums.pad
    mask = soft_sphere(D)
    level = sums.regulariser(fraction)
    total = sums.W + level
    volume = crop_padded(torch.fft.irfftn(sums.B / total, s=(size, size, size)), D)
    for _ in range(passes):
        prior = torch.fft.rfftn(pad_map(volume * mask, sums.pad))
        prior *= level
        prior += sums.B
        prior /= total
        prior[sums.shell > size // 2] = 0
        volume = crop_padded(torch.fft.irfftn(prior, s=(size, size, size)), D)
    if sphere:
        volume = volume * mask
    return volume / gridding(D, sums.pad)


def gridding(box_size: int, pad: int = 2) -> torch.Tensor:
    """(D, D, D): what trilinear insertion multiplies a map by, sinc^2(x / (pad D)) along each axis."""
    kernel = torch.sinc((torch.arange(box_size) - box_size // 2) / (pad * box_size)) ** 2
    return kernel[:, None, None] * kernel[None, :, None] * kernel


def pad_map(volume: torch.Tensor, pad: int = 2) -> torch.Tensor:
    """A map (D, D, D) in the middle of a box of pad D."""
    D = volume.shape[-1]
    before = pad * D // 2 - D // 2
    return torch.nn.functional.pad(volume, (before, pad * D - D - before) * 3)


def crop_padded(padded: torch.Tensor, box_size: int) -> torch.Tensor:
    """The map inside the padded box, less the mean of what lies around it.

    The half disc has no zero frequency, so a map comes with an unknown constant; particles float in nothing.
    """
    start = padded.shape[-1] // 2 - box_size // 2
    volume = padded[(slice(start, start + box_size),) * 3]
    if volume.numel() == padded.numel():
        return volume
    around = padded.double().sum() - volume.double().sum()
    return volume - (around / (padded.numel() - volume.numel())).to(volume.dtype)


def tau_from_fsc(fsc: torch.Tensor) -> torch.Tensor:
    """Regulariser per shell 0 .. D/2 as a fraction of the joint shell mean of W: 1/signal from the half maps' FSC.

    A half map's FSC is S/(S + 1/W_h), and W = 2 W_h, hence 1/S = W (1 - FSC)/(2 FSC).
    """
    bounded = fsc.clamp(1e-3, 0.999)
    # beyond the first shell without signal the estimate is noise: keep it down
    silent = torch.cummax((fsc < 0.02).int(), 0).values.bool()
    bounded = torch.where(silent, torch.full_like(bounded, 1e-3), bounded)
    tau = (1 - bounded) / (2 * bounded)
    return torch.cat([tau[:1], tau]).float()


def cropped(volume: Tensor, size: int) -> Tensor:
    """A map in a smaller Fourier box (or as it is); coefficients, not grey values, stay those of the large one."""
    box = volume.shape[-1]
    return volume if size >= box else fourier.fourier_crop_volume(volume, size) * (box / size) ** 3
