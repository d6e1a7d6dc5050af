"""Building blocks of coordinate networks with the CPU in mind: product, Fourier features, layer norm with residual.

In float32 on a CPU the products run in oneDNN, which uses the widest instructions of any processor (torch's own choice,
MKL, does so on Intel's only: half the speed on others), and the element loops are those of `layers_cpu`. Everything
else (other devices, float64, mixed precision, no numba) is plain torch, equal to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import layers_cpu

__all__ = ["product", "fourier_features", "norm_relu"]

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
MANY = 64  # rows, and columns of the result are at least 8: below that oneDNN's set-up costs more than it saves


def _plain_float(*tensors: Tensor | None) -> bool:
    """float32 on a CPU outside autocast."""
    return not torch.is_autocast_enabled("cpu") and all(
        t is None or (t.device.type == "cpu" and t.dtype == torch.float32) for t in tensors
    )


def _times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # (n, i), (o, i), (o,) -> (n, o)
    return _ONEDNN(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _times(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        d_x = _times(grad, weight.T) if ctx.needs_input_grad[0] else None
        d_weight = _times(grad.T, x.T) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, grad.sum(0) if ctx.needs_input_grad[2] else None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # (..., i), (o, i), (o,) -> (..., o)
    """x W^T + b, as ``torch.nn.functional.linear``, float32 products in oneDNN on a CPU."""
    if _ONEDNN is None or not _plain_float(x, weight, bias) or x.numel() < MANY * x.shape[-1] or len(weight) < 8:
        return F.linear(x, weight, bias)
    # oneDNN falls back to a loop a thousand times slower for cut-out matrices
    rows, weight = x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous()
    return _Product.apply(rows, weight, bias).unflatten(0, x.shape[:-1])


class _Features(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, frequencies: Tensor) -> Tensor:
        out = q.new_empty(len(q), 2 * frequencies.shape[1])
        layers_cpu.sincos(q.numpy(), frequencies.numpy(), out.numpy())
        ctx.save_for_backward(out, frequencies)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        out, frequencies = ctx.saved_tensors
        (sine, cosine), (d_sine, d_cosine) = out.chunk(2, 1), grad.chunk(2, 1)
        return (d_sine * cosine - d_cosine * sine) @ frequencies.T, None


def fourier_features(q: Tensor, frequencies: Tensor) -> Tensor:  # (..., 3), (3, m) -> (..., 2m)
    """[sin(q f), cos(q f)] in the precision of the frequencies, which get no gradient; phases are one product."""
    with torch.autocast(q.device.type, enabled=False):
        q = q.to(frequencies.dtype)
        if not _plain_float(q, frequencies) or not layers_cpu.available():
            phase = q @ frequencies
            return torch.cat([phase.sin(), phase.cos()], dim=-1)
        rows = q.reshape(-1, 3).contiguous()
        return _Features.apply(rows, frequencies.detach().contiguous()).unflatten(0, q.shape[:-1])


class _NormRelu(torch.autograd.Function):
    """Keeps x, the result and two numbers per row."""

    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor | None, gain: Tensor, offset: Tensor, eps: float) -> Tensor:
        out, stats = torch.empty_like(x), x.new_empty(len(x), 2)
        _norm_relu_into(out, stats, x, residual, gain, offset, eps)
        ctx.save_for_backward(x, stats, gain, out)
        ctx.residual = residual is not None
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, None]:
        x, stats, gain, out = ctx.saved_tensors
        d_x, d_residual = torch.empty_like(x), torch.empty_like(x)
        d_gain, d_offset = torch.zeros_like(gain), torch.zeros_like(gain)
        arrays = (grad.contiguous(), out, x, stats, gain, d_x, d_residual, d_gain, d_offset)
        layers_cpu.norm_relu_backward(*(a.numpy() for a in arrays))
        return d_x, d_residual if ctx.residual else None, d_gain, d_offset, None


def _norm_relu_into(
    out: Tensor, stats: Tensor, x: Tensor, residual: Tensor | None, gain: Tensor, offset: Tensor, eps: float
) -> None:
    other = x[:0] if residual is None else residual
    arrays = [a.detach().numpy() for a in (x, other, gain, offset)]
    layers_cpu.norm_relu(*arrays, eps, out.numpy(), stats.numpy())


def norm_relu(
    x: Tensor,  # (..., w); written over where no gradient is asked for
    residual: Tensor | None,  # (..., w)
    gain: Tensor,  # (w,)
    offset: Tensor,  # (w,)
    eps: float = 1e-5,
) -> Tensor:  # (..., w)
    """relu(LN(x) + residual), the layer norm in float32 or better; the result has the type of x."""
    if not _plain_float(x, residual, gain, offset) or not layers_cpu.available():
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            out = F.layer_norm(x.to(wide), x.shape[-1:], gain.to(wide), offset.to(wide), eps).to(x.dtype)
            return torch.relu(out if residual is None else out + residual)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    other = None if residual is None else residual.reshape(rows.shape).contiguous()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, gain, offset)):
        return _NormRelu.apply(rows, other, gain, offset, eps).reshape(x.shape)
    _norm_relu_into(rows, rows.new_empty(len(rows), 2), rows, other, gain, offset, eps)
    return rows.reshape(x.shape)
