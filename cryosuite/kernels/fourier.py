"""Centred Fourier transforms and the half disc: the set of coefficients that training and reconstruction work on.

Conventions: arrays are `[..., y, x]` or `[..., z, y, x]`, the box size D is even, the origin is voxel D//2 on every
axis in real and in Fourier space, forward transforms are unnormalised. A coefficient at integer frequency (kx, ky) is
`F(k) = sum_x f(x) exp(-2 pi i k.x / D)` with x counted from voxel D//2. The transform of a real image is Hermitian,
so the half disc (one of each pair k, -k inside a radius) holds all there is: a loss over it equals one over the image.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "HalfDisc",
    "half_disc",
    "fft2c",
    "ifft2c",
    "fft3c",
    "ifft3c",
    "real_inverse",
    "to_half_disc",
    "from_half_disc",
    "fourier_crop",
    "fourier_crop_volume",
    "resize_axis",
    "hartley",
    "phase_shift",
    "window_mask",
]


@dataclass(frozen=True, eq=False)
class HalfDisc:
    """Integer frequencies 0 < |k| <= r_max of a D-box, one of each Friedel pair, sorted by radius.

    A smaller radius is a prefix, so frequency marching is slicing. Points of equal radius follow (kx, ky) in
    ascending order, a fixed order on every device.
    """

    box_size: int
    r_max: int
    xy: Tensor  # (P, 2) int64: kx, ky with kx > 0, or kx == 0 and ky > 0
    radius: Tensor  # (P,) float32, |k| in Fourier pixels
    shell: Tensor  # (P,) int64, round(|k|)
    squared_radius: Tensor = field(repr=False)  # (P,) int64 on the CPU, for counting without a device round trip

    def __len__(self) -> int:
        return self.xy.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.xy.device

    # cached tensors are made outside inference mode: one made inside could never take part in a backward pass
    @functools.cached_property
    @torch.inference_mode(False)
    def frequency(self) -> Tensor:
        """(P, 2) float32, cycles per pixel, (x, y)."""
        return self.frequency_as(torch.float32)

    def frequency_as(self, dtype: torch.dtype) -> Tensor:
        """(P, 2) cycles per pixel in the given precision."""
        return self.xy.to(dtype) / self.box_size

    @functools.cached_property
    @torch.inference_mode(False)
    def rfft_index(self) -> Tensor:
        """(P,) int64: place of each point in a flattened `rfft2` of a D-box (row ky mod D, column kx)."""
        rows = torch.remainder(self.xy[:, 1], self.box_size)
        return rows * (self.box_size // 2 + 1) + self.xy[:, 0]

    @functools.cached_property
    @torch.inference_mode(False)
    def sign(self) -> Tensor:
        """(P,) float32: (-1)^(kx + ky), which moves the origin from the corner to voxel D//2."""
        return (1 - 2 * torch.remainder(self.xy.sum(1), 2)).to(torch.float32)

    def count(self, r: float) -> int:
        """Number of points with |k| <= r; the first `count(r)` points of the disc are these."""
        return int(torch.searchsorted(self.squared_radius, float(r) ** 2 + 1e-6, right=True))


def half_disc(box_size: int, r_max: int | None = None, device: torch.device | str = "cpu") -> HalfDisc:
    """The half disc of a box, cached: P = 1604, 6426, 25716 points at D = 64, 128, 256.

    Args:
        box_size: even D.
        r_max: largest radius in Fourier pixels, at most D//2 (the default). At D//2 the two Nyquist points
            (D/2, 0) and (0, D/2) are included; +D/2 and -D/2 are the same coefficient there.

    Raises:
        ValueError: odd box, or a radius outside 1 .. D//2.
    """
    if box_size < 2 or box_size % 2:
        raise ValueError(f"the box size must be even, not {box_size}")
    r_max = box_size // 2 if r_max is None else int(r_max)
    if not 1 <= r_max <= box_size // 2:
        raise ValueError(f"the radius must lie between 1 and {box_size // 2} in a box of {box_size}, not {r_max}")
    return _half_disc(box_size, r_max, torch.device(device))


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _half_disc(box_size: int, r_max: int, device: torch.device) -> HalfDisc:
    kx, ky = torch.meshgrid(torch.arange(0, r_max + 1), torch.arange(-r_max, r_max + 1), indexing="ij")
    kx, ky = kx.reshape(-1), ky.reshape(-1)
    squared = kx * kx + ky * ky
    keep = (squared <= r_max * r_max) & ((kx > 0) | (ky > 0))
    kx, ky, squared = kx[keep], ky[keep], squared[keep]
    order = torch.argsort(squared, stable=True)
    xy, squared = torch.stack([kx, ky], 1)[order], squared[order]
    radius = squared.to(torch.float64).sqrt()
    return HalfDisc(
        box_size, r_max, xy.to(device), radius.float().to(device), radius.round().long().to(device), squared
    )


def fft2c(images: Tensor) -> Tensor:
    """Centred, unnormalised 2-D transform of (..., D, D): complex (..., D, D) with DC at [D//2, D//2]."""
    return _centred(torch.fft.fft2, images, (-2, -1))


def ifft2c(coeffs: Tensor) -> Tensor:
    """Inverse of `fft2c` (complex; take `.real` for a Hermitian input)."""
    return _centred(torch.fft.ifft2, coeffs, (-2, -1))


def fft3c(volumes: Tensor) -> Tensor:
    """Centred, unnormalised 3-D transform of (..., D, D, D): complex, DC at [D//2, D//2, D//2]."""
    return _centred(torch.fft.fftn, volumes, (-3, -2, -1))


def ifft3c(coeffs: Tensor) -> Tensor:
    """Inverse of `fft3c` (complex; take `.real` for a Hermitian input)."""
    return _centred(torch.fft.ifftn, coeffs, (-3, -2, -1))


def _centred(transform, values: Tensor, dim: tuple[int, ...]) -> Tensor:
    return torch.fft.fftshift(transform(torch.fft.ifftshift(values, dim=dim), dim=dim), dim=dim)


def real_inverse(
    half: Tensor,  # (..., [z,] y, x//2 + 1) complex
    size: tuple[int, ...],  # of the real grid: two or three axes
) -> Tensor:  # (..., *size) real
    """Inverse of `rfftn` over the last axes, the same on every device where the input is not quite a real transform.

    A crop, a shift or an astigmatic CTF leaves columns 0 and Nyquist that are not Hermitian: their Hermitian part
    counts (numpy's rule). cuFFT supposes that they are Hermitian and gives something else.
    """
    if half.device.type == "cpu":
        return torch.fft.irfftn(half, s=size, dim=tuple(range(-len(size), 0)))
    return _axis_by_axis(half, size)


def _axis_by_axis(half: Tensor, size: tuple[int, ...]) -> Tensor:
    across = torch.fft.ifftn(half, dim=tuple(range(-len(size), -1)))
    return torch.fft.irfft(_real_ends(across, size[-1]), n=size[-1])


def _real_ends(half: Tensor, n: int, dim: int = -1) -> Tensor:
    """The imaginary parts at 0 and, for even n, at Nyquist set to zero along an axis of a half transform, in place."""
    parts = torch.view_as_real(half)
    dim = dim % half.ndim
    for end in (0, n // 2) if n % 2 == 0 else (0,):
        parts.select(dim, end)[..., 1] = 0
    return half


def to_half_disc(
    images: Tensor,  # (..., D, D) real
    disc: HalfDisc,
) -> Tensor:  # (..., P) complex
    """Coefficients of real images on the half disc: one `rfft2` and one gather."""
    _check_box(images, disc)
    half = torch.fft.rfft2(images).flatten(-2)
    return half[..., disc.rfft_index] * disc.sign.to(images.dtype)


def from_half_disc(
    coeffs: Tensor,  # (..., P) complex
    disc: HalfDisc,
) -> Tensor:  # (..., D, D) real
    """Real images whose transform has these values on the half disc (and conjugates at -k) and zero elsewhere.

    The inverse of `to_half_disc` on images that are band-limited to the disc and have zero mean.
    """
    D = disc.box_size
    values = coeffs * disc.sign.to(coeffs.real.dtype)
    half = coeffs.new_zeros((*coeffs.shape[:-1], D * (D // 2 + 1)))
    mirrored, source = _zero_column_mirror(disc)
    half = half.index_copy(-1, mirrored, values[..., source].conj().resolve_conj())
    half = half.index_copy(-1, disc.rfft_index, values)
    return real_inverse(half.unflatten(-1, (D, D // 2 + 1)), (D, D))


def _zero_column_mirror(disc: HalfDisc) -> tuple[Tensor, Tensor]:
    """Where the mates (0, -ky) of the points (0, ky) lie in an rfft2, and which points they mirror."""
    source = torch.nonzero(disc.xy[:, 0] == 0).squeeze(1)
    rows = torch.remainder(-disc.xy[source, 1], disc.box_size)
    return rows * (disc.box_size // 2 + 1), source


def fourier_crop(
    images: Tensor,  # (..., D, D) real
    size: int,
) -> Tensor:  # (..., size, size) real
    """Downsample by cropping the transform; grey values (the mean) are kept.

    cryoDRGN's `downsample` multiplies images by (size/D)^-2 of ours; below Nyquist the two agree otherwise.
    At the new Nyquist frequency the Hermitian part of the crop is kept.
    """
    _check_crop(images.shape[-1], size)
    return _crop_last(_crop_last(images, size).transpose(-1, -2), size).transpose(-1, -2).contiguous()


def fourier_crop_volume(
    volume: Tensor,  # (..., D, D, D) real
    size: int,
) -> Tensor:  # (..., size, size, size) real
    """Downsample a volume by cropping its transform; grey values are kept."""
    _check_crop(volume.shape[-1], size)
    for _ in range(3):
        volume = _crop_last(volume, size).movedim(-1, -3)
    return volume.contiguous()


def _crop_last(values: Tensor, size: int) -> Tensor:
    """Fourier crop along the last axis, the origin going from D//2 to size//2; the mean is kept."""
    D = values.shape[-1]
    if size == D:
        return values
    half = torch.fft.rfft(values, dim=-1)[..., : size // 2 + 1]
    # the origin moves from D/2 to size/2: both are the phase (-1)^k, so nothing is left to do
    return torch.fft.irfft(_real_ends(half, size), n=size, dim=-1) * (size / D)


def resize_axis(
    values: Tensor,  # (..., n, ...) real
    size: int,
    dim: int = -1,
) -> Tensor:  # (..., size, ...) real
    """Resample one axis of any length, even or odd, by cropping or padding its transform; grey values are kept.

    Sample 0 stays where it is and the axis covers the same (periodic) length. The pair of coefficients at a Nyquist
    frequency is summed or split, as sampling does: enlarging and going back gives the same values.
    """
    n = values.shape[dim]
    if n == size:
        return values
    common = min(n, size)
    half = torch.fft.rfft(values, dim=dim).narrow(dim, 0, common // 2 + 1)
    if common % 2 == 0:
        half.select(dim, common // 2).mul_(2.0 if size < n else 0.5)
    return torch.fft.irfft(_real_ends(half, size, dim) if size <= n else half, n=size, dim=dim) * (size / n)


def _check_crop(box_size: int, size: int) -> None:
    if size < 2 or size % 2 or size > box_size:
        raise ValueError(f"cannot crop a box of {box_size} to {size}: an even size up to {box_size} is needed")


def _check_box(images: Tensor, disc: HalfDisc) -> None:
    if images.shape[-1] != disc.box_size or images.shape[-2] != disc.box_size:
        raise ValueError(f"images of {tuple(images.shape[-2:])} do not fit a half disc of box {disc.box_size}")


def hartley(images: Tensor) -> Tensor:
    """Centred, unnormalised Hartley transform Re F - Im F of real (..., D, D)."""
    coeffs = fft2c(images)
    return coeffs.real - coeffs.imag


def phase_shift(
    coeffs: Tensor,  # (b, P) complex
    disc: HalfDisc,
    shift: Tensor,  # (b, 2) tx, ty as a fraction of the box
) -> Tensor:  # (b, P) complex
    """Move the content by +t: F(k) exp(-2 pi i (kx tx + ky ty)). With t of a pose this centres the particle."""
    cycles = shift @ disc.xy.to(shift.dtype).T
    angle = (-2 * torch.pi) * cycles
    return coeffs * torch.complex(torch.cos(angle), torch.sin(angle)).to(coeffs.dtype)


def window_mask(
    box_size: int,
    inner: float = 0.85,
    outer: float = 0.99,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # (D, D)
    """Soft circular window: 1 inside `inner`, falling linearly to 0 at `outer`, in units of half the box."""
    axis = torch.arange(-(box_size // 2), box_size - box_size // 2, device=device, dtype=dtype) / (box_size // 2)
    radius = torch.sqrt(axis[:, None] ** 2 + axis[None, :] ** 2)
    return F.relu((outer - radius) / (outer - inner)).clamp(max=1)
