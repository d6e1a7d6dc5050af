"""Networks that give M basis volumes at once: planes and Fourier features of a frequency, then a small MLP.

A volume is a linear mix of the basis, F(q) = sum_m c_m b_m(q) with real c and complex b, and F(-q) = conj F(q): the
network is only evaluated in the half space q_z >= 0 and the imaginary part takes the sign. The last layer is linear, so
whatever is linear or quadratic in the basis can be had from the last hidden layer alone: the slice of one code is a
matrix-vector product per point, and the Gram matrix of the basis comes from that of the hidden layer. The (P, M) basis
itself is never needed in training, which makes M as free as K.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cryosuite.kernels.assignment import Gram

from .inr import FourierFeatures, autocast_dtype, half_space, relu_layer

CHUNK_VALUES = 1 << 20  # numbers in one weighted piece of the hidden layer

__all__ = ["TriplaneFeatures", "CoordinateFeatures", "BasisField"]


class TriplaneFeatures(nn.Module):
    """Features read from three learnt planes (xy, yz, xz) by bilinear interpolation, at one or more resolutions.

    Args:
        box_size: D. channels: per plane and level.
        size: R, samples along each axis of [-.5, .5]; 0: D + 1, one per Fourier pixel.
        levels: 2 adds planes of R / 4 samples.
    """

    def __init__(self, box_size: int, channels: int = 32, size: int = 0, levels: int = 1) -> None:
        super().__init__()
        self.size = 3 * channels * levels
        R = size or box_size + 1
        self.planes = nn.Parameter(torch.randn(3, channels, R, R) * 0.1)
        self.coarse = nn.ParameterList(
            torch.randn(3, channels, max(2, R // 4**n), max(2, R // 4**n)) * 0.1 for n in range(1, levels)
        )

    def forward(self, q: Tensor) -> Tensor:  # (b, P, 3) cycles/px in [-.5, .5] -> (b, P, 3 channels levels)
        """Points outside the cube read its border."""
        with torch.autocast(q.device.type, enabled=False):
            pairs = torch.stack([q[..., [0, 1]], q[..., [1, 2]], q[..., [0, 2]]]) * 2  # (3, b, P, 2) in [-1, 1]
            pairs = pairs.to(self.planes.dtype)
            found = [
                F.grid_sample(planes, pairs, padding_mode="border", align_corners=True)  # (3, c, b, P)
                for planes in (self.planes, *self.coarse)
            ]
            return torch.cat([level.flatten(0, 1) for level in found]).permute(1, 2, 0)


class CoordinateFeatures(nn.Module):
    """Planes, random Fourier features, or both side by side.

    Args:
        box_size: D. channels, size, levels: of the planes; channels = 0 leaves them out.
        n_frequencies: of the Fourier features (two values each); 0 leaves them out.
        spread: of the features' positions in real space, in boxes.
    """

    def __init__(
        self, box_size: int, channels: int, size: int, levels: int, n_frequencies: int, spread: float = 0.18
    ) -> None:
        super().__init__()
        if not (channels or n_frequencies):
            raise ValueError("planes or Fourier features are needed, or both")
        self.planes = TriplaneFeatures(box_size, channels, size, levels) if channels else None
        # positions x pixels from the centre are phases 2 pi q.x
        scale = 2 * math.pi * spread * box_size
        self.waves = FourierFeatures(n_frequencies, scale) if n_frequencies else None
        self.size = sum(part.size for part in (self.planes, self.waves) if part is not None)

    def forward(self, q: Tensor) -> Tensor:  # (b, P, 3) -> (b, P, size)
        """Features at q, cycles per pixel."""
        found = [part(q) for part in (self.planes, self.waves) if part is not None]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


class BasisField(nn.Module):
    """M complex basis values at frequencies: features, ``layers`` hidden ReLU layers, a linear read-out.

    Args:
        features: module (b, P, 3) -> (b, P, features.size).
        rank: M. width: of the hidden layers. layers: their number, at least 1.
    """

    def __init__(self, features: nn.Module, rank: int, width: int = 256, layers: int = 3) -> None:
        super().__init__()
        self.features, self.rank, self.width = features, rank, width
        sizes = [features.size] + [width] * layers
        self.hidden_layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes[:-1], sizes[1:], strict=True))
        for layer in self.hidden_layers:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        # (re / im, M, width + 1): the last column is the bias
        self.readout = nn.Parameter(torch.randn(2, rank, width + 1) / math.sqrt(width + 1))

    def hidden(self, q: Tensor) -> Tensor:  # (b, P, 3) in the half space -> (b, P, width + 1)
        """The last hidden layer and a column of ones, in the precision of autocast."""
        x = self.features(q)
        b, P = x.shape[:2]
        dtype = autocast_dtype(x)
        x = x.reshape(1, b * P, -1).to(dtype)
        for layer in self.hidden_layers:
            x = relu_layer(x, layer.weight[None].to(dtype), layer.bias.to(dtype))
        return F.pad(x.view(b, P, self.width), (0, 1), value=1.0)

    def parts(self, q: Tensor) -> Tensor:  # (b, P, 3) -> (b, P, 2, M)
        """Real and imaginary part of the basis at q, float32, all of it: for tests and small problems."""
        sign = half_space(q)
        h = self.hidden(q * sign[..., None]).to(self.readout.dtype)
        values = torch.einsum("bpw,cmw->bpcm", h, self.readout)
        return values * torch.stack([torch.ones_like(sign), sign], dim=-1)[..., None]

    def forward(self, q: Tensor) -> Tensor:  # (..., 3) -> (..., M) complex
        """The basis at any frequencies, cycles per pixel."""
        parts = self.parts(q.reshape(1, -1, 3))[0]
        return torch.complex(parts[:, 0], parts[:, 1]).view(*q.shape[:-1], self.rank)

    def slices(self, h: Tensor, sign: Tensor, codes: Tensor) -> Tensor:
        """Slices of one or more codes per image, (b, P, J, 2) real and imaginary, float32.

        h: (b, P, width + 1) of `hidden`. sign: (b, P) of `half_space`. codes: (b, J, M).
        """
        mixed = torch.einsum("bjm,cmw->bwjc", codes, self.readout).flatten(2)  # (b, width + 1, 2 J)
        values = (h.to(mixed.dtype) @ mixed).unflatten(2, (-1, 2))
        return values * torch.stack([torch.ones_like(sign), sign], dim=-1)[:, :, None]

    @torch.no_grad()
    def gram(self, h: Tensor, sign: Tensor, weight: Tensor, x: Tensor) -> Gram:
        """G, h, n of kernels.assignment for the basis times weight (b, P) and data x (b, P) complex; no gradient.

        By way of the hidden layer or of the basis itself, whichever takes fewer products.
        """
        b, P, W = h.shape
        data = torch.stack([x.real, x.imag * sign], dim=-1)  # the sign goes to the data: (b, P, 2)
        direct = 2 * self.rank * (W + self.rank) < W * W
        flat = self.readout.flatten(0, 1)  # (2 M, width + 1)
        square = x.real.new_zeros(b, self.rank if direct else W, self.rank if direct else W)
        cross = x.real.new_zeros(b, 2 * self.rank if direct else W, 2)
        step = max(1, CHUNK_VALUES // (b * W))
        for begin in range(0, P, step):
            at = slice(begin, begin + step)
            piece = h[:, at].to(weight.dtype) * weight[:, at, None]
            if direct:
                piece = piece @ flat.T
            across = piece.transpose(1, 2)
            cross.baddbmm_(across, data[:, at])
            if direct:  # real and imaginary rows below each other
                piece = piece.unflatten(2, (2, self.rank)).flatten(1, 2)
                across = piece.transpose(1, 2)
            square.baddbmm_(across, piece)
        real, imag = self.readout
        if direct:
            found = cross[:, : self.rank, 0] + cross[:, self.rank :, 1]
        else:
            found = cross[..., 0] @ real.T + cross[..., 1] @ imag.T
            square = real @ square @ real.T + imag @ square @ imag.T
        return Gram(2 * square, 2 * found, 2 * x.abs().square().sum(1))

    def rescale(self, factor: Tensor | float) -> None:
        """Multiply all channels but the first by a factor, in place; the gauge of the codes' offsets."""
        with torch.no_grad():
            self.readout[:, 1:].mul_(factor)
