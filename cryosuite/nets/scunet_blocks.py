"""Blocks of the SCUNet for maps: filter-response norm, and the SC block of a convolutional and an attending branch.

Inside the network arrays lie channels last, (b, z, y, x, c), so that 1 x 1 x 1 convolutions, norms and attention are
matrix products without a copy; 3 x 3 x 3 convolutions see the same memory as ``channels_last_3d``. With ``visible``
given, hidden voxels are zero before every convolution, count in no mean and are attended to by nobody: what a visible
voxel becomes is independent of how many hidden ones there are around it.

SCUNet: Zhang et al. 2022, in three dimensions as in EMReady (He et al. 2023). Filter-response norm: Singh and Krishnan
2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cryosuite.kernels import chance
from cryosuite.nets.scunet_windows import WindowAttention, from_windows, normed_linear, to_windows, window_plan

EPS = 1e-6  # of the filter-response norm
WIDE = 16  # voxels side by side in one row of an elementwise product


@dataclass(frozen=True, eq=False)
class Visible:
    """Which tokens of a grid are shown, at one level of the network.

    Attributes:
        tokens: (b, gz, gy, gx) bool.
        side: voxels per edge of one token at this level.
        voxels: (b, z, y, x, 1) bool.
        share: (b, 1) float32, part of the voxels that is shown, above 0.
    """

    tokens: Tensor
    side: int
    voxels: Tensor
    share: Tensor

    @classmethod
    def at(cls, tokens: Tensor, side: int) -> Visible:
        """Spread the tokens (b, gz, gy, gx) over their voxels."""
        voxels = tokens
        for axis in (1, 2, 3):
            voxels = voxels.repeat_interleave(side, axis)
        share = tokens.flatten(1).float().mean(1, keepdim=True).clamp(min=EPS)
        return cls(tokens, side, voxels[..., None], share)

    def zeroed(self, x: Tensor) -> Tensor:  # (b, z, y, x, c)
        """x with hidden voxels at exactly zero."""
        return torch.where(self.voxels, x, torch.zeros((), dtype=x.dtype, device=x.device))


def conv(x: Tensor, layer: nn.Conv3d | nn.ConvTranspose3d) -> Tensor:
    """A convolution on channels-last arrays (b, z, y, x, c)."""
    return layer(x.movedim(-1, 1)).movedim(1, -1).contiguous()


class FilterResponseNorm(nn.Module):
    """y = max(gamma x / sqrt(nu2 + 1e-6) + beta, tau), nu2 the mean over space of x^2 per sample and channel.

    gamma 1, beta 0 and the threshold tau 0 at the start. The mean and its root are float32 whatever x is; x keeps its
    dtype.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        self.tau = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, visible: Visible | None = None) -> Tensor:  # (b, z, y, x, c) -> the same
        if visible is not None:
            x = visible.zeroed(x)
        count = x.shape[1] * x.shape[2] * x.shape[3]
        norm = torch.linalg.vector_norm(x, dim=(1, 2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
        nu2 = norm.square() / count  # (b, c)
        if visible is not None:
            nu2 = nu2 / visible.share
        scale = (self.gamma * torch.rsqrt(nu2 + EPS)).to(x.dtype)
        wide = math.gcd(count, WIDE)  # long rows: 12 channels would fill no register
        scale, beta, tau = (
            v.to(x.dtype).expand(x.shape[0], -1).repeat(1, wide)[:, None] for v in (scale, self.beta, self.tau)
        )
        y = torch.maximum(x.reshape(x.shape[0], -1, wide * x.shape[-1]) * scale + beta, tau).view(x.shape)
        return y if visible is None else visible.zeroed(y)


class Transformer(nn.Module):
    """x + WMSA(LN x), then x + mlp(LN x), inside windows; each branch is dropped for whole samples in training.

    Args:
        dim: h. heads: of the attention. limit: longest edge of a window. shifted: windows shifted by half.
        drop: probability that a sample skips a branch in training (stochastic depth, Huang et al. 2016).
    """

    def __init__(self, dim: int, heads: int, limit: int, shifted: bool, mlp: int = 4, drop: float = 0.0) -> None:
        super().__init__()
        self.limit, self.shifted, self.drop = limit, shifted, drop
        self.attention = WindowAttention(dim, heads, limit)
        self.norm = nn.LayerNorm(dim)
        self.mlp1 = nn.Linear(dim, mlp * dim)
        self.mlp2 = nn.Linear(mlp * dim, dim)

    def forward(self, x: Tensor, visible: Visible | None = None) -> Tensor:  # (b, z, y, x, h) -> the same
        plan = window_plan(tuple(x.shape[1:4]), self.limit, self.shifted, x.device)
        keys = None
        if visible is not None and (any(plan.shift) or any(visible.side % w for w in plan.window)):
            keys = to_windows(visible.voxels, plan).squeeze(-1)
        tokens = to_windows(x, plan)
        tokens = tokens + self._dropped(self.attention(tokens, plan, keys), x.shape[0])
        tokens = tokens + self._dropped(self.wide(tokens), x.shape[0])
        return from_windows(tokens, plan)

    def wide(self, x: Tensor) -> Tensor:  # (..., h) -> (..., h)
        """mlp(LN x): one hidden layer with GELU."""
        return self.mlp2(F.gelu(normed_linear(x, self.norm, self.mlp1.weight, self.mlp1.bias)))

    def _dropped(self, branch: Tensor, samples: int) -> Tensor:
        """Zero the branch (windows * samples, T, h) of some samples and strengthen the others, so the mean is kept."""
        if not self.training or not self.drop:
            return branch
        keep = chance.rand(samples, 1, 1, device=branch.device) >= self.drop
        scale = keep.to(branch.dtype) / (1 - self.drop)
        return (branch.view(-1, samples, *branch.shape[1:]) * scale).view(branch.shape)


class SCBlock(nn.Module):
    """Half of the channels through convolutions, half through a transformer in windows, then both are mixed.

        a, t = split(Conv1 x);  a = a + FRN(Conv3(FRN(Conv3 a)));  t = transformer(t);  out = x + Conv1(cat[a, t])

    Args:
        channels: C, even. head_dim: width of a head; narrower branches have one head. limit: longest edge of a window.
    """

    def __init__(
        self, channels: int, head_dim: int, limit: int, shifted: bool = False, mlp: int = 4, drop: float = 0.0
    ) -> None:
        super().__init__()
        half = self.half = channels // 2
        self.split = nn.Linear(channels, channels)
        self.conv1 = nn.Conv3d(half, half, 3, padding=1, bias=False)
        self.norm1 = FilterResponseNorm(half)
        self.conv2 = nn.Conv3d(half, half, 3, padding=1, bias=False)
        self.norm2 = FilterResponseNorm(half)
        self.transformer = Transformer(half, head_count(half, head_dim), limit, shifted, mlp, drop)
        self.mix = nn.Linear(channels, channels)

    def forward(self, x: Tensor, visible: Visible | None = None) -> Tensor:  # (b, z, y, x, C) -> the same
        (wa, wt), (ba, bt) = self.split.weight.split(self.half), self.split.bias.split(self.half)
        a, t = F.linear(x, wa, ba), F.linear(x, wt, bt)  # two products: no halves to copy apart
        if visible is not None:
            a = visible.zeroed(a)
        a = a + self.norm2(conv(self.norm1(conv(a, self.conv1), visible), self.conv2), visible)
        t = self.transformer(t, visible)
        ma, mt = self.mix.weight.split(self.half, 1)
        out = x + F.linear(a, ma, self.mix.bias) + F.linear(t, mt)
        return out if visible is None else visible.zeroed(out)


def head_count(dim: int, head_dim: int) -> int:
    """Heads of a branch: as many of ``head_dim`` as fit, at least one, a divisor of the width."""
    return next(n for n in range(max(1, dim // head_dim), 0, -1) if dim % n == 0)
