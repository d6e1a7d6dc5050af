"""The Fourier planar map of a view: from a rotation to the map, and back by Kabsch's algorithm.

A view of rotation R samples the volume's transform on a plane. Its planar map says where: X(k) = k R for the grid
k = (kx, ky, 0) of an image, kx the column and ky the row counted from pixel D//2, Nyquist = 1 (CryoFastAR, arXiv
2506.05864). Rows times R is how CONVENTIONS define a rotation, so the rotation of a map IS the house's R: no transpose,
no flip. In the frame of a reference view 0, X_i = k R_i R_0^T (``relative``). Seen in a mirror (volume flipped in z),
R becomes J R J and X becomes X J, J = diag(1, 1, -1).

A map is linear, so each patch of an image needs three vectors only: its value c at the patch's centre and its
derivatives a (along x) and b (along y), X = c + u a + v b with (u, v) the distance from the centre in the units of k,
2/D per pixel. For the map of R, a and b are the first two rows of R and c = kx a + ky b.

Everything is batched over leading dimensions, stays on its device, and is computed in the precision it comes in also
under autocast: a product of rotations in bfloat16 is off by degrees.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

__all__ = [
    "precise",
    "patch_grid",
    "pixel_grid",
    "token_map",
    "dense_map",
    "map_error",
    "best_rotation",
    "local_mean",
    "kabsch_tokens",
    "kabsch_dense",
    "mirror",
    "relative",
    "released_grid",
    "released_pose",
]

SQUARINGS = 24  # tells eigenvalues apart that differ by 1e-6 of the largest
CENTRINGS = 2  # a window about the best of a grid is up to half a step off
FLAT = 1e-9  # of the scale of a problem: turns about an axis that the map says less about get no larger gradient


def precise(function: Callable[..., T]) -> Callable[..., T]:
    """Run a function with autocast off on the device of its first argument, a tensor."""

    @functools.wraps(function)
    def run(first: Tensor, *args: Any, **kwargs: Any) -> T:
        kind = first.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return function(first, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(first, *args, **kwargs)

    return run


def pixel_grid(
    size: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:  # (D, D, 3)
    """k of every pixel, [row, column] -> (kx, ky, 0); pixel D//2 is the origin, Nyquist (D/2 pixels) = 1."""
    return _plane(_axis(size, 1, device, dtype))


def patch_grid(
    size: int, patch: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:  # (T, 3)
    """k at the centres of the patches (half a pixel off a pixel when the patch is even), row-major, T = (D / patch)^2.

    Raises ValueError when the patch does not divide the size.
    """
    return _plane(_axis(size, patch, device, dtype)).flatten(0, 1)


def _axis(size: int, patch: int, device: torch.device | str | None, dtype: torch.dtype) -> Tensor:
    if patch < 1 or size % patch or size % 2:
        raise ValueError(f"an even image size that is a multiple of the patch is needed, not {size} and {patch}")
    centre = torch.arange(size // patch, device=device, dtype=torch.float64) * patch + (patch - 1) / 2
    return ((centre - size // 2) * (2 / size)).to(dtype)


def _plane(axis: Tensor) -> Tensor:  # (n,) -> (n, n, 3)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y, torch.zeros_like(x)], -1)


@precise
def token_map(
    rotation: Tensor,  # (..., 3, 3)
    size: int,
    patch: int,
) -> tuple[Tensor, Tensor, Tensor]:  # c, a, b each (..., T, 3)
    """The planar map of a rotation, patch by patch. a and b are views of the rotation: do not write to them."""
    grid = patch_grid(size, patch, rotation.device, rotation.dtype)
    a, b = (rotation[..., i, None, :].expand(*rotation.shape[:-2], len(grid), 3) for i in (0, 1))
    return grid @ rotation, a, b


def dense_map(
    c: Tensor,  # (..., T, 3)
    a: Tensor,  # (..., T, 3)
    b: Tensor,  # (..., T, 3)
    size: int,
    patch: int,
) -> Tensor:  # (..., D, D, 3)
    """The value of a patch-wise map at every pixel."""
    inside = ((torch.arange(patch, device=c.device, dtype=torch.float64) - (patch - 1) / 2) * (2 / size)).to(c.dtype)
    n = size // patch
    c, a, b = (part.unflatten(-2, (n, n))[..., :, None, :, None, :] for part in (c, a, b))
    x = c + inside[:, None] * a + inside[:, None, None, None] * b  # (..., n, patch, n, patch, 3)
    return x.flatten(-5, -4).flatten(-3, -2)


def _spread(size: int, patch: int) -> float:
    """Mean square of u over a patch, in the units of k."""
    return (patch * patch - 1) / 12 * (2 / size) ** 2


def map_error(
    found: tuple[Tensor, Tensor, Tensor],  # c, a, b each (..., T, 3)
    wanted: tuple[Tensor, Tensor, Tensor],
    size: int,
    patch: int,
) -> Tensor:  # (..., T)
    """Mean over the pixels of each patch of |X - X'|^2, without making the pixels."""
    dc, da, db = ((one - other).square().sum(-1) for one, other in zip(found, wanted, strict=True))
    return dc + _spread(size, patch) * (da + db)


@precise
def kabsch_tokens(
    c: Tensor,  # (..., T, 3)
    a: Tensor,  # (..., T, 3)
    b: Tensor,  # (..., T, 3)
    conf: Tensor | None,  # (..., T), weights of the patches
    size: int,
    patch: int,
) -> Tensor:  # (..., 3, 3)
    """The rotation whose map is nearest, by weighted least squares over all pixels: ``kabsch_dense`` of the same map.

    With sum over a patch of k^T X = P^2 [g^T c + s2 (ex^T a + ey^T b)], g the patch's centre, the pixels need not be
    made. Determinant +1 always; a map that says nothing (zeros) gives the identity. Differentiable.
    """
    grid = patch_grid(size, patch, c.device, c.dtype)
    weight = conf[..., None] if conf is not None else torch.ones_like(c[..., :1])
    H = (grid * weight).transpose(-1, -2) @ c
    flat = _spread(size, patch) * torch.stack([(weight * a).sum(-2), (weight * b).sum(-2)], -2)
    return best_rotation(torch.cat([H[..., :2, :] + flat, H[..., 2:, :]], -2))


@precise
def kabsch_dense(
    x: Tensor,  # (..., D, D, 3)
    conf: Tensor | None = None,  # (..., D, D)
) -> Tensor:  # (..., 3, 3)
    """The rotation R that minimises sum conf |k R - X(k)|^2 over the pixels (Kabsch 1976); the origin stays fixed."""
    grid = pixel_grid(x.shape[-2], x.device, x.dtype)
    return best_rotation(_moments(grid, x, conf))


def _moments(grid: Tensor, x: Tensor, conf: Tensor | None) -> Tensor:  # (D, D, 3), (..., D, D, 3) -> (..., 3, 3)
    weighted = grid if conf is None else grid * conf[..., None]
    return weighted.flatten(-3, -2).transpose(-1, -2) @ x.flatten(-3, -2)


@precise
def best_rotation(
    H: Tensor,  # (..., 3, 3)
) -> Tensor:  # (..., 3, 3)
    """The rotation R (determinant +1) with the largest trace(R^T H): U diag(1, 1, det UV^T) V^T of H = U S V^T.

    Found as the leading eigenvector of Davenport's 4 x 4 matrix (a quaternion: the determinant cannot be -1), by
    squaring the matrix. No decomposition, hence no check on the host and no gradient that blows up where singular
    values are equal, which they are for every exact planar map. Its gradient treats R as the optimum it is. H = 0 gives
    the identity, H that is not finite NaN.
    """
    return _BestRotation.apply(H)


@precise
def local_mean(
    scores: Tensor,  # (..., G) logits over rotations
    rotations: Tensor,  # (G, 3, 3)
    near_deg: float = 20.0,
) -> tuple[Tensor, Tensor]:  # (..., 3, 3), (...)
    """The mean rotation about the best of many, finer than their spacing, and the probability that lies near it.

    Chordal mean (Hartley et al. 2013), weighted by the softmax of all scores, of the rotations within ``near_deg``
    first of the one with the largest score, then of that mean, CENTRINGS times; the second number is the sum of their
    weights.
    """
    flat = rotations.flatten(-2)
    chance = scores.softmax(-1)
    centre = rotations[scores.argmax(-1)]
    for _ in range(1 + CENTRINGS):
        near = centre.flatten(-2) @ flat.T >= 1 + 2 * math.cos(math.radians(near_deg))
        weight = chance * near
        centre = best_rotation((weight @ flat).unflatten(-1, (3, 3)))
    return centre, weight.sum(-1)


class _BestRotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, H: Tensor) -> Tensor:
        R = _quaternion_rotation(_leading(_davenport(H.double())))
        ctx.save_for_backward(H, R)
        return R.to(H.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        H, R = ctx.saved_tensors
        # the optimum turns by R [w], w = A^-1 axial(R^T dH), A = tr(S) - S, S = R^T H symmetric at the optimum
        S = R.transpose(-1, -2) @ H.double()
        S = (S + S.transpose(-1, -2)) / 2
        trace = S.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        eye = torch.eye(3, dtype=S.dtype, device=S.device)
        scale = H.double().flatten(-2).norm(dim=-1)[..., None, None]
        A = trace * eye - S + (FLAT * scale + torch.finfo(torch.float32).tiny) * eye
        g = _axial(R.transpose(-1, -2) @ grad.double())
        w = (_inverse(A) @ g[..., None]).squeeze(-1)
        return (R @ _cross(w)).to(grad.dtype)


def _davenport(H: Tensor) -> Tensor:  # (..., 3, 3) -> (..., 4, 4)
    """K with q^T K q = trace(R(q)^T H) for unit quaternions q = (w, x, y, z) (Horn 1987)."""
    trace = H.diagonal(dim1=-2, dim2=-1).sum(-1)
    v = _axial(H)
    eye = torch.eye(3, dtype=H.dtype, device=H.device)
    block = H + H.transpose(-1, -2) - trace[..., None, None] * eye
    top = torch.cat([trace[..., None], v], -1)
    return torch.cat([top[..., None, :], torch.cat([v[..., None], block], -1)], -2)


def _leading(K: Tensor) -> Tensor:  # (..., 4, 4) symmetric -> (..., 4)
    """A unit vector of the largest eigenvalue, by repeated squaring of K made positive; K = 0 gives (1, 0, 0, 0)."""
    eye = torch.eye(4, dtype=K.dtype, device=K.device)
    size = K.flatten(-2).norm(dim=-1)[..., None, None]
    first = torch.zeros_like(K)
    first[..., 0, 0] = 1
    P = torch.where(size > 0, K / torch.where(size > 0, size, 1) + eye, first)
    for _ in range(SQUARINGS):
        P = P @ P
        P = P / P.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    best = P.diagonal(dim1=-2, dim2=-1).argmax(-1)
    column = torch.gather(P, -1, best[..., None, None].expand(*best.shape, 4, 1)).squeeze(-1)
    return column / column.norm(dim=-1, keepdim=True)


def _quaternion_rotation(q: Tensor) -> Tensor:  # (..., 4) unit -> (..., 3, 3)
    w, v = q[..., 0, None, None], q[..., 1:]
    eye = torch.eye(3, dtype=q.dtype, device=q.device)
    outer = v[..., :, None] * v[..., None, :]
    return (2 * w * w - 1) * eye + 2 * outer + 2 * w * _cross(v)


def _axial(M: Tensor) -> Tensor:  # (..., 3, 3) -> (..., 3)
    """v with <M, [w]> = v . w for the cross matrix [w] of any w."""
    return torch.stack([M[..., 2, 1] - M[..., 1, 2], M[..., 0, 2] - M[..., 2, 0], M[..., 1, 0] - M[..., 0, 1]], -1)


def _cross(v: Tensor) -> Tensor:  # (..., 3) -> (..., 3, 3) with M @ p = v x p
    x, y, z = v.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))


def _inverse(A: Tensor) -> Tensor:  # (..., 3, 3) -> (..., 3, 3)
    """Inverse of 3 x 3 matrices by cofactors."""
    x, y, z = A.unbind(-2)
    columns = torch.stack(
        [torch.linalg.cross(y, z), torch.linalg.cross(z, x), torch.linalg.cross(x, y)], -1
    )  # the adjugate
    return columns / (x * columns[..., 0]).sum(-1)[..., None, None]


def mirror(rotation: Tensor) -> Tensor:  # (..., 3, 3)
    """J R J, J = diag(1, 1, -1): the view of the volume flipped in z that shows the same image."""
    sign = rotation.new_tensor([[1, 1, -1], [1, 1, -1], [-1, -1, 1]])
    return rotation * sign


@precise
def relative(rotation: Tensor) -> Tensor:  # (..., n, 3, 3)
    """R_i R_0^T: the views of a set in the frame of the first, which itself gets the identity."""
    return rotation @ rotation[..., :1, :, :].transpose(-1, -2)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def released_grid(
    size: int = 128, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:  # (D, D, 3)
    """X0 of the released network: linspace(-1, 1, D), first component along columns; it has no sample at the origin.

    Cached and shared: do not write to it.
    """
    return _plane(torch.linspace(-1, 1, size, device=device, dtype=torch.float64).to(dtype))


@precise
def released_pose(
    x: Tensor,  # (..., D, D, 3) planar maps X0 R + h of the released network
    conf: Tensor | None = None,  # (..., D, D)
    weighted: bool = False,
) -> tuple[Tensor, Tensor]:  # (..., 3, 3), (..., 2)
    """Rotations and shifts (fraction of the box) from the released network's maps, as its authors export them.

    R = J kabsch(X0 -> X) J, t = mean X, (tx, ty) = (-t[1], -t[0]): the map's first component runs along columns, the
    shift's label along rows. The release fits without weights; ``weighted`` uses the confidence, as the paper does.
    Raises ValueError when ``weighted`` has no confidence.
    """
    if weighted and conf is None:
        raise ValueError("a weighted pose needs the confidence")
    grid = released_grid(x.shape[-2], x.device, x.dtype)
    weight = conf if weighted else torch.ones_like(x[..., 0])
    share = (weight / weight.sum((-1, -2), keepdim=True))[..., None]
    mean, centre = (share * x).sum((-2, -3)), (share * grid).sum((-2, -3))
    R = best_rotation(_moments(grid - centre[..., None, None, :], x - mean[..., None, None, :], share[..., 0]))
    t = mean - (centre[..., None, :] @ R).squeeze(-2)
    return mirror(R), torch.stack([-t[..., 1], -t[..., 0]], -1)
