"""Windowed attention on 3-D grids: where the windows lie, who may attend to whom, and the attention itself.

Tokens (b, z, y, x, h) are gathered into windows by one index, shift and padding included, and put back by its inverse.
Windows are sorted into groups with the same mask (with a cyclic shift: the inner windows, and those at each border), so
that a mask is one (T, T) matrix per group and never one per window. Masks and indices are computed once per shape.

Shifted windows: Liu et al., Swin transformer, 2021; relative position bias: the same, in three dimensions.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Plan", "window_plan", "WindowAttention", "gather_rows"]

CPU_SCORES = 1 << 19  # attention weights held at once on a CPU: stays inside the caches
ALIGN = 8  # head widths that matrix units like are multiples of this
SPECTRAL = 64  # width up to which a norm by singular values costs nothing beside the attention
MOST = 1 << 15  # windows in one call: kernels for accelerators count them in 16 bits
SAFE = 60.0  # scores below this neither overflow nor vanish when they are not shifted

Size = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Plan:
    """How a grid of tokens is cut into windows; equal for all networks with the same sizes.

    Attributes:
        grid, padded: tokens z, y, x, and after padding at the far ends.
        window, shift: of one window, and by how much the windows are shifted (cyclically).
        order: (windows * T,) int64, which token of the padded grid stands at each place of the windows.
        inverse: the place of each token of the padded grid.
        groups: number of windows with the same mask, and that mask (T, T), True where a token may attend to another.
    """

    grid: Size
    padded: Size
    window: Size
    shift: Size
    order: Tensor
    inverse: Tensor
    groups: tuple[tuple[int, Tensor | None], ...]

    @property
    def tokens(self) -> int:
        """Tokens of one window, T."""
        return math.prod(self.window)

    @property
    def windows(self) -> int:
        """Windows of one grid."""
        return math.prod(self.padded) // self.tokens


def _axis(n: int, limit: int, shifted: bool) -> tuple[int, int, int, list[tuple[int, int, tuple[int, ...]]]]:
    """Window, padded length, shift, and the runs (first, end, region of every token) of equal windows of one axis."""
    count = math.ceil(n / limit)
    window = math.ceil(n / count)
    padded = count * window
    shift = window // 2 if shifted and count > 1 else 0
    regions = []
    for place in range(padded):
        token = (place + shift) % padded
        wrapped = place >= padded - shift
        regions.append(-1 if token >= n else int(wrapped))
    rows = [tuple(regions[i * window : (i + 1) * window]) for i in range(count)]
    runs, first = [], 0
    for row, same in itertools.groupby(rows):
        end = first + len(list(same))
        runs.append((first, end, row))
        first = end
    return window, padded, shift, runs


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def window_plan(grid: Size, limit: int, shifted: bool, device: torch.device) -> Plan:
    """The plan for a grid: windows of at most ``limit`` tokens per axis, all of one size, shifted by half or not.

    Axes that ``limit`` does not divide get smaller windows, or padding that nobody attends to. An axis with one window
    is not shifted.
    """
    axes = [_axis(n, limit, shifted) for n in grid]
    window, padded, shift = (tuple(axis[i] for axis in axes) for i in range(3))
    where = torch.arange(math.prod(padded)).view(padded).roll([-s for s in shift], (0, 1, 2))
    order, groups = [], []
    for runs in itertools.product(*(axis[3] for axis in axes)):
        box = where[tuple(slice(a * w, e * w) for (a, e, _), w in zip(runs, window, strict=True))]
        counts = [e - a for a, e, _ in runs]
        shape = [n for pair in zip(counts, window, strict=True) for n in pair]
        order.append(box.reshape(shape).permute(0, 2, 4, 1, 3, 5).reshape(-1))
        groups.append((math.prod(counts), _mask([torch.tensor(row) for _, _, row in runs]).to(device)))
    flat = torch.cat(order)
    inverse = torch.empty_like(flat)
    inverse[flat] = torch.arange(len(flat))
    groups = [(count, None if bool(mask.all()) else mask) for count, mask in groups]
    return Plan(grid, padded, window, shift, flat.to(device), inverse.to(device), tuple(groups))


def _mask(regions: list[Tensor]) -> Tensor:
    """(T, T) True where two tokens lie in the same region on all three axes and the second is no padding; or itself."""
    z, y, x = torch.meshgrid(*regions, indexing="ij")
    flat = torch.stack([axis.reshape(-1) for axis in (z, y, x)], 1)
    same = (flat[:, None] == flat[None]).all(-1) & (flat >= 0).all(-1)[None]
    return same | torch.eye(len(flat), dtype=torch.bool)


@functools.lru_cache(maxsize=24)
@torch.inference_mode(False)
def _batched(plan: Plan, batch: int) -> tuple[Tensor, Tensor]:
    """Rows of a flattened batch in the order (window, sample, token), and the way back, int32."""
    n = len(plan.order)
    start = torch.arange(batch, device=plan.order.device) * n
    order = plan.order.view(plan.windows, 1, plan.tokens) + start.view(1, batch, 1)
    place, within = plan.inverse // plan.tokens, plan.inverse % plan.tokens
    sample = torch.arange(batch, device=plan.order.device).view(batch, 1)
    inverse = (place * batch + sample) * plan.tokens + within
    return order.reshape(-1).int(), inverse.reshape(-1).int()


class _Gather(torch.autograd.Function):
    """Rows in another order; the gradient goes back by the inverse order, without the atomic additions of torch's."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Gather.apply(grad.contiguous(), inverse, order), None, None


def gather_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # (n, h) -> (n, h)
    """x[order] for a permutation and its inverse."""
    return _Gather.apply(x, order, inverse)


def to_windows(x: Tensor, plan: Plan) -> Tensor:  # (b, z, y, x, h) -> (windows * b, T, h), samples inside windows
    """Tokens into windows, padded with zeros where the plan pads."""
    b, h = x.shape[0], x.shape[-1]
    if plan.padded != plan.grid:
        z, y, w = (p - n for p, n in zip(plan.padded, plan.grid, strict=True))
        x = F.pad(x, (0, 0, 0, w, 0, y, 0, z))
    return gather_rows(x.reshape(-1, h), *_batched(plan, b)).view(-1, plan.tokens, h)


def from_windows(tokens: Tensor, plan: Plan) -> Tensor:  # (windows * b, T, h) -> (b, z, y, x, h)
    """The inverse of ``to_windows``."""
    h, b = tokens.shape[-1], tokens.shape[0] // plan.windows
    order, inverse = _batched(plan, b)
    x = gather_rows(tokens.reshape(-1, h), inverse, order).view(b, *plan.padded, h)
    if plan.padded != plan.grid:
        z, y, w = plan.grid
        x = x[:, :z, :y, :w].contiguous()
    return x


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def relative_index(window: Size, limit: int, device: torch.device) -> Tensor:
    """(T * T,) int64: row of the bias table for each pair (asking, asked) of a window; offsets z, y, x, z slowest."""
    axes = torch.meshgrid(*(torch.arange(w) for w in window), indexing="ij")
    place = torch.stack([axis.reshape(-1) for axis in axes], 1)
    offset = place[:, None] - place[None] + limit - 1
    side = 2 * limit - 1
    return ((offset[..., 0] * side + offset[..., 1]) * side + offset[..., 2]).reshape(-1).to(device)


def normed_linear(x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> Tensor:  # (..., h) -> (..., m)
    """Linear(norm(x)) with the norm as matrix products, whose scale and shift go into the weight (m, h) and bias (m,).

    On rows of 12 to 96 numbers that is several times as fast as a kernel made for long ones. Keeps the dtype under
    autocast; the sums are float32 inside the products either way.
    """
    h = x.shape[-1]
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    with torch.autocast(x.device.type, enabled=False):
        mean = torch.full((h, h), 1 / h, dtype=dtype, device=x.device)
        centred = F.linear(x.to(dtype), torch.eye(h, dtype=dtype, device=x.device) - mean)
        centred = centred * torch.rsqrt(F.linear(centred * centred, mean) + norm.eps)
        bias = bias + weight @ norm.bias
        return F.linear(centred, (weight * norm.weight).to(dtype), bias.to(dtype))


class WindowAttention(nn.Module):
    """Layer norm, then multi-head attention inside windows with a learnt bias per relative position, qkv with bias.

    Args:
        dim: h, width of a token.
        heads: number of heads; divides ``dim``.
        limit: longest edge of a window; the table holds (2 limit - 1)^3 offsets per head.
    """

    def __init__(self, dim: int, heads: int, limit: int) -> None:
        super().__init__()
        self.heads, self.limit = heads, limit
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative = nn.Parameter(torch.empty((2 * limit - 1) ** 3, heads))
        nn.init.trunc_normal_(self.relative, std=0.02)
        self.register_buffer("_one", torch.tensor([dim // heads]), persistent=False)

    def bias(self, window: Size) -> Tensor:  # (heads, T, T)
        """What is added to the scores of each pair of tokens."""
        index = relative_index(window, self.limit, self.relative.device)
        t = math.prod(window)
        return self.relative.index_select(0, index).view(t, t, self.heads).permute(2, 0, 1).contiguous()

    def forward(
        self,
        tokens: Tensor,  # (windows * b, T, h), as ``to_windows`` orders them
        plan: Plan,
        visible: Tensor | None = None,  # (windows * b, T) bool: whom the others may attend to
    ) -> Tensor:  # (windows * b, T, h)
        n, t, h = tokens.shape
        width = h // self.heads
        q, k, v = self._queries(tokens, -width % ALIGN)
        bias = self.bias(plan.window)
        bound = self._largest_score(bias) if q.device.type == "cpu" else None
        parts, start = [], 0
        for count, mask in plan.groups:
            rows = slice(start, start + count * (n // plan.windows))
            start = rows.stop
            added = bias[None] if mask is None else bias.masked_fill(~mask, -math.inf)[None]
            if visible is not None:
                keys = visible[rows, None, :] | torch.eye(t, dtype=torch.bool, device=q.device)
                added = added.masked_fill(~keys[:, None], -math.inf)
            part = (q[rows], k[rows], v[rows], added, width)
            parts.append(_attend(*part) if bound is None else _attend_cpu(*part, bound < SAFE))
        out = (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(2)
        return F.linear(out, self.proj.weight, self.proj.bias)

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    def _largest_score(self, bias: Tensor) -> float:
        """A bound on the magnitude of all scores, whatever the tokens: after the norm they are at most sqrt(h) long."""
        h = self.norm.normalized_shape[0]
        weight = self.qkv.weight * self.norm.weight
        offset = self.qkv.bias + self.qkv.weight @ self.norm.bias
        q, k, _ = torch.cat([weight, offset[:, None]], 1).float().view(3, self.heads, h // self.heads, h + 1)
        form = q.transpose(1, 2) @ k  # a score is a bilinear form of (token, 1)
        largest = torch.linalg.matrix_norm(form, 2 if h <= SPECTRAL else "fro").max()
        return float(largest * (h + 1) * (h // self.heads) ** -0.5 + bias.abs().max())

    def _queries(self, tokens: Tensor, wide: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (n, heads, T, d + wide); what is added holds zeros, in the values a one first."""
        n, t, h = tokens.shape
        weight, offset = self.qkv.weight, self.qkv.bias
        if wide:  # a width that matrix units take; the ones sum up the weights of a row on the way
            weight = F.pad(weight.view(3, self.heads, -1, h), (0, 0, 0, wide)).view(-1, h)
            offset = F.pad(offset.view(3, self.heads, -1), (0, wide))
            offset = torch.cat([offset[:2], offset[2:].index_fill(2, self._one, 1.0)]).view(-1)
        qkv = normed_linear(tokens, self.norm, weight, offset)
        return qkv.view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, width: int) -> Tensor:
    """Attention of (n, heads, T, d) with a bias (n or 1, heads, T, T) -> (n, T, heads, width)."""
    if len(q) > MOST:
        biases = bias.split(MOST) if len(bias) > 1 else itertools.repeat(bias)
        parts = zip(q.split(MOST), k.split(MOST), v.split(MOST), biases, strict=False)
        return torch.cat([_attend(*part, width) for part in parts])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=width**-0.5)
    return out[..., :width].transpose(1, 2)


def _attend_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, width: int, safe: bool) -> Tensor:
    """The same, some windows at a time, as products and powers of two: two to three times as fast as torch's own.

    safe: no power can overflow or vanish, so that the largest score of each row need not be found and subtracted.
    """
    n, heads, t, d = q.shape
    few = max(1, CPU_SCORES // (heads * t * t))
    unit = math.log2(math.e) if safe else 1.0
    added, scale = (bias * unit).to(q.dtype), unit * width**-0.5
    out = []
    with torch.autocast("cpu", enabled=False):
        for start in range(0, n, few):
            rows = slice(start, start + few)
            part = [x[rows].reshape(-1, t, d) for x in (q, k, v)]
            plus = added[rows] if added.shape[0] > 1 else added.expand(len(q[rows]), -1, -1, -1)
            scores = torch.baddbmm(plus.reshape(-1, t, t), part[0], part[1].transpose(1, 2), alpha=scale)
            weights = torch.exp2(scores) if safe else torch.softmax(scores, -1)
            mixed = torch.bmm(weights, part[2])
            if safe:
                total = mixed[..., width : width + 1] if d > width else weights.sum(-1, keepdim=True)
                mixed = mixed[..., :width] / total
            out.append(mixed[..., :width].reshape(-1, heads, t, width).transpose(1, 2))
    return out[0] if len(out) == 1 else torch.cat(out)
