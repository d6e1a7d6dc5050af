"""Are the particles white or dark? Asked of the images themselves."""

from __future__ import annotations

import numpy as np

from cryosuite.data.crop import fourier_crop
from cryosuite.data.noise import radius_map, shell_map
from cryosuite.data.particles import ParticleSet

SAMPLE = 2000  # images looked at
WORK_BOX = 64  # pixels: the answer lies at low resolution
SURE = 4.0  # standard errors
LIMIT_A = 40.0  # without a CTF nothing finer than this is looked at


def contrast_score(particles: ParticleSet, diameter: float | None = None, sample: int = SAMPLE) -> float:
    """How many standard errors the particles are whiter than their surroundings (negative: darker).

    Each image is compared with the projection of a ball of ``diameter`` Angstrom (default: half the box) at its centre,
    at frequencies below the first zero of its CTF, where white particles stay white; the noise is whitened. Images that
    are not finite are left out. 0.0 when there are fewer than two.
    """
    rows = np.unique(np.linspace(0, len(particles) - 1, min(sample, len(particles))).astype(np.int64))
    size = min(WORK_BOX, particles.box_size)
    step = max(1, (16 << 20) // (4 * particles.box_size**2))
    products, powers = [], []
    for begin in range(0, len(rows), step):
        product, power = _compare(particles, rows[begin : begin + step], size, diameter)
        products.append(product)
        powers.append(power)
    product, power = np.concatenate(products), np.concatenate(powers)
    good = np.isfinite(product).all(axis=1) & np.isfinite(power).all(axis=1)
    if good.sum() < 2:
        return 0.0
    mean_power = power[good].mean(axis=0)
    score = (product[good] / np.maximum(mean_power, 1e-30)).sum(axis=1)
    error = score.std(ddof=1) / np.sqrt(len(score))
    return as_normal(float(score.mean() / error), len(score)) if error > 0 else 0.0


def as_normal(t: float, n: int) -> float:
    """Student's t of n values as the equally unlikely number of standard errors: a handful of images proves little."""
    from scipy.special import ndtri, stdtr

    if n > 200:
        return t
    return float(np.sign(t) * -ndtri(max(stdtr(n - 1, -abs(t)), 1e-300)))


def _compare(
    particles: ParticleSet, rows: np.ndarray, size: int, diameter: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Per image and shell 1 .. size/2: correlation with CTF x ball, and mean power, both (b, size//2) float64."""
    import scipy.fft

    images = read_boxes(particles, rows, size)
    pixel_size = particles.pixel_size[rows] * box_of(particles, rows) / size
    with np.errstate(invalid="ignore"):  # infinite pixels: the caller leaves such images out
        images = images - images.mean(axis=(1, 2), keepdims=True)
    coefficients = scipy.fft.rfft2(np.fft.ifftshift(images, axes=(1, 2)), axes=(1, 2))
    if particles.shift is not None:
        coefficients = coefficients * _centre(particles.shift[rows], size)
    half_box = 0.25 * size * float(np.median(pixel_size))
    ball = _ball(size, (half_box if diameter is None else diameter / 2) / float(np.median(pixel_size)))
    template = scipy.fft.rfft2(np.fft.ifftshift(ball - ball.mean()))
    shell, weight = shell_map(size)
    frequency = shell[None] / (size * pixel_size[:, None, None])  # 1/A
    product = (coefficients * template.conj()).real * weight * _low_ctf(particles, rows, frequency)
    power = (np.square(coefficients.real) + np.square(coefficients.imag)) * weight
    points = np.bincount(shell.ravel(), weight.ravel())[1 : size // 2 + 1]
    return _by_shell(product, shell, size), _by_shell(power, shell, size) / points


def _by_shell(values: np.ndarray, shell: np.ndarray, size: int) -> np.ndarray:
    flat, index = values.reshape(len(values), -1), shell.ravel()
    return np.stack([np.bincount(index, row, minlength=size)[1 : size // 2 + 1] for row in flat])


def _centre(shift: np.ndarray, size: int) -> np.ndarray:
    """exp(-2 pi i k.t) (b, size, size//2 + 1), which moves the content by +t."""
    ky, kx = np.fft.fftfreq(size) * size, np.arange(size // 2 + 1)
    phase = shift[:, 1, None, None] * ky[None, :, None] + shift[:, 0, None, None] * kx[None, None, :]
    return np.exp(-2j * np.pi * phase)


def _ball(size: int, radius: float) -> np.ndarray:
    """Projection of a ball of a radius in pixels."""
    return np.sqrt(np.clip(1 - np.square(radius_map(size) / max(radius, 1.5)), 0, None))


def _low_ctf(particles: ParticleSet, rows: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """The CTF up to its first zero and 0 beyond, defocus and amplitude contrast only (the rest is nil at low s)."""
    if particles.ctf is None:
        return (frequency < 1 / LIMIT_A).astype(np.float64)
    _, _, u, v, _, kv, _, contrast, phase = (column[:, None, None] for column in particles.ctf[rows].astype(float).T)
    volts = kv * 1e3
    wavelength = 12.2639 / np.sqrt(volts + 0.97845e-6 * volts**2)
    chi = np.pi * wavelength * 0.5 * (u + v) * frequency**2 + np.deg2rad(phase) + np.arcsin(contrast)
    return np.where((chi > np.pi) | (chi < 0), 0.0, np.sin(chi))


def box_of(particles: ParticleSet, rows: np.ndarray) -> np.ndarray:
    """Box size of each row (b,)."""
    return np.full(len(rows), particles.box_size) if particles.box_sizes is None else particles.box_sizes[rows]


def read_boxes(particles: ParticleSet, rows: np.ndarray, size: int) -> np.ndarray:
    """Images of the rows, sign applied, Fourier-cropped from whatever box they have to (b, size, size) float32."""
    if particles.box_sizes is None:
        return fourier_crop(particles.read(rows), size)
    images = np.empty((len(rows), size, size), np.float32)
    boxes = particles.box_sizes[rows]
    for box in np.unique(boxes):
        chosen = np.flatnonzero(boxes == box)
        images[chosen] = fourier_crop(particles.read(rows[chosen]), size)
    return images
