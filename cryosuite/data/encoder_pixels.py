"""Particle images as an encoder of the Cryo-IEF family takes them: one size, eight bits, a circle.

The steps of Cryo-IEF's own preparation, each checked against its output: smaller images are enlarged by a cubic spline,
larger ones cropped in Hartley space, then the grey values of each image are spread over 0 .. 255 and truncated.
``robust`` is the same after clipping to the 0.1 and 99.9 percentiles, so that a hot pixel does not dim the particle.
``standard`` (of our own small encoder) spreads four standard deviations either side of the image's mean instead: the
background then has one grey whatever the noise, where the other two darken it the better a particle stands out.
"""

from __future__ import annotations

import functools

import numpy as np

PREPS = ("ief", "robust", "standard")
STANDARD_RANGE = 4.0  # standard deviations either side of the mean that 0 .. 255 stand for, prep "standard"
CLIP_PERCENT = 0.1  # of the pixels at either end, prep "robust"
CIRCLE = 0.85  # of the half width
CHUNK = 8  # images handled at once


def encoder_images(images: np.ndarray, size: int, prep: str = "ief", circle: bool = True) -> np.ndarray:
    """Images (b, D, D) float -> (b, size, size) uint8.

    Args:
        images: grey values in whatever contrast the encoder is to see; no scale or offset matters.
        size: pixels per side of the encoder's images.
        prep: "ief" as the published encoder, "robust" or "standard".
        circle: set pixels outside the circle of radius 0.85 of the half width to 0 (CryoDECO).

    A constant image has no grey range: it is cast as it is (values are held to 0 .. 255). An image with NaN or infinite
    pixels becomes 0 everywhere; ``finite_images`` tells which. Raises ValueError for an unknown prep.
    """
    if prep not in PREPS:
        raise ValueError(f"prep must be one of {', '.join(PREPS)}, not {prep}")
    images = np.asarray(images, np.float32)
    eight = np.empty((len(images), size, size), np.uint8)
    for begin in range(0, len(images), CHUNK):  # few at a time stay in the processor's cache
        part = images[begin : begin + CHUNK]
        finite = finite_images(part)
        if not finite.all():
            part = np.where(finite[:, None, None], part, 0)
        eight[begin : begin + CHUNK] = _to_uint8(resize(part, size), prep)
        flat = np.ptp(part, axis=(1, 2)) == 0  # asked before the spline, which rounds
        if flat.any():
            eight[begin : begin + CHUNK][flat] = np.clip(part[flat, :1, :1], 0, 255).astype(np.uint8)
    if circle:
        eight *= circle_mask(size)
    return eight


def finite_images(images: np.ndarray) -> np.ndarray:
    """(b,) bool: images whose pixels are all numbers, and none so large (1e30) that arithmetic would overflow."""
    return (np.abs(images) < 1e30).all(axis=(1, 2))  # NaN compares false


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Images (b, D, D) -> (b, size, size) float32: cubic spline if D < size, Hartley crop if D > size.

    A Hartley crop is in the grey values of the unnormalised transforms, divided by size^2 (the published form): its
    factor (D / size)^2 vanishes in the eight bits.
    """
    images = np.asarray(images, np.float32)
    box = images.shape[-1]
    if box < size:
        matrix = spline_matrix(box, size)
        wide = (images.reshape(-1, box) @ matrix.T).reshape(-1, box, size)
        return np.matmul(matrix, wide)
    return images if box == size else _hartley_crop(images, size)


@functools.lru_cache(maxsize=8)
def spline_matrix(box: int, size: int) -> np.ndarray:
    """(size, box) float32: the cubic spline zoom of one axis, as scipy.ndimage.zoom(order=3) does it.

    Zooming is linear and separable, so it is done once on unit vectors. Output o reads input o (box - 1) / (size - 1).
    """
    from scipy import ndimage

    return ndimage.zoom(np.eye(box), (size / box, 1.0), order=3).astype(np.float32)


def _hartley_crop(images: np.ndarray, size: int) -> np.ndarray:
    """The central size x size points of the centred Hartley transform, back in real space.

    But for its Nyquist row and column this is a Fourier crop, made with transforms of real images. The origin at pixel
    D // 2 gives a factor (-1)^(kx + ky) on the way there and the same on the way back: neither is applied.
    """
    import scipy.fft

    half, box = size // 2, images.shape[-1]
    full = scipy.fft.rfft2(images, axes=(1, 2))  # (b, D, D // 2 + 1)
    crop = full[:, np.r_[0:half, box - half : box], : half + 1]  # rows ky = 0 .. half - 1, -half .. -1
    crop[:, half], crop[:, :, half] = _nyquist(full, size)
    return scipy.fft.irfft2(crop, s=(size, size), axes=(1, 2))


def _nyquist(full: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Fourier coefficients of a Hartley crop in its row ky = -size/2 and its column kx = -size/2, where -k is outside.

    A Hartley value H(k) = Re F(k) - Im F(k) stands for F(k) = (H(k) + H(-k)) / 2 - i (H(k) - H(-k)) / 2; in the crop
    -k means the point of the crop that it is modulo ``size``.
    """
    half = size // 2
    low, high = full[:, -half, : half + 1], full[:, half, : half + 1]
    here, there = low.real - low.imag, high.real + high.imag  # H(-half, kx) and H(-half, -kx)
    row = (here + there) / 2 - 0.5j * (here - there)
    ky = np.r_[0:half, -half:0]  # of the crop's rows
    opposite = full[:, -ky, half]  # F(-ky, half), the conjugate of F(ky, -half)
    here = opposite.real + opposite.imag  # H(ky, -half)
    there = here[:, -np.arange(size) % size]
    return row, (here + there) / 2 - 0.5j * (here - there)


def _to_uint8(images: np.ndarray, prep: str) -> np.ndarray:
    """(b, s, s) float32 -> uint8: (x - min) / (max - min) x 255 of each image, truncated."""
    if prep == "standard":
        mean, half = images.mean(axis=(1, 2), keepdims=True), STANDARD_RANGE * images.std(axis=(1, 2), keepdims=True)
        low, high = mean - half, mean + half
    elif prep == "robust":
        low, high = _percentiles(images)
    else:
        low, high = images.min(axis=(1, 2), keepdims=True), images.max(axis=(1, 2), keepdims=True)
    scaled = images - low
    scaled /= np.where(high > low, high - low, 1)
    scaled *= 255
    if prep != "ief":
        np.clip(scaled, 0, 255, out=scaled)
    return scaled.astype(np.uint8)


def _percentiles(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values (b, 1, 1) below and above which 0.1 % of the pixels of each image lie."""
    flat = images.reshape(len(images), -1)
    cut = int(flat.shape[1] * CLIP_PERCENT / 100)
    ends = np.partition(flat, (cut, flat.shape[1] - 1 - cut), axis=1)
    return ends[:, cut, None, None], ends[:, flat.shape[1] - 1 - cut, None, None]


@functools.lru_cache(maxsize=8)
def circle_mask(size: int) -> np.ndarray:
    """(size, size) uint8, 1 within int(0.85 (size - 1) / 2) pixels of the centre (size - 1) / 2: 94 of 224 pixels."""
    axis = np.arange(size) - (size - 1) / 2
    radius = int((size - 1) / 2 * CIRCLE)
    return (np.square(axis)[:, None] + np.square(axis) <= radius**2).astype(np.uint8)
