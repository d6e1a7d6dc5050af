"""Fourier crop of many images in numpy: ``kernels.fourier.fourier_crop`` without torch (the tests compare them)."""

from __future__ import annotations

import functools

import numpy as np

MATRIX_UP_TO = 384  # pixels: up to here one matrix product per axis is faster than transforms there and back


@functools.lru_cache(maxsize=16)
def crop_matrix(box_size: int, size: int) -> np.ndarray:
    """(D, d) float32: row vectors of D pixels times it are cropped to d pixels in Fourier space, grey values kept."""
    half = np.fft.rfft(np.eye(box_size), axis=1)[:, : size // 2 + 1]
    return (np.fft.irfft(half, n=size, axis=1) * (size / box_size)).astype(np.float32)


def fourier_crop(images: np.ndarray, size: int) -> np.ndarray:
    """Images (b, D, D) float32 -> (b, size, size) float32, low-pass filtered at the new Nyquist frequency.

    The crop is linear and separable: a product with ``crop_matrix`` from the right and from the left. The mean is
    kept; in the Nyquist row and column the Hermitian part is kept.
    """
    box_size = images.shape[-1]
    if size == box_size:
        return images
    if box_size <= MATRIX_UP_TO:
        matrix = crop_matrix(box_size, size)
        narrow = (images.reshape(-1, box_size) @ matrix).reshape(len(images), box_size, size)
        return np.matmul(matrix.T, narrow)
    import scipy.fft

    for axis in (2, 1):
        half = scipy.fft.rfft(images, axis=axis)
        half = half[:, : size // 2 + 1] if axis == 1 else half[:, :, : size // 2 + 1]
        images = scipy.fft.irfft(half, n=size, axis=axis)
    return images * np.float32((size / box_size) ** 2)
