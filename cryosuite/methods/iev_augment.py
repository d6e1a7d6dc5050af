"""Augmentations of particle images, batched, on the device of the images; each is an option of its own.

Images are normalised (mean 0, sd about 1 over the set). Every function takes (b, s, s) and gives (b, s, s); all
randomness comes from torch's global generators, whose state lies in the checkpoint. ``rotate``, ``shift`` and ``crop``
are one resampling, so that an image is interpolated once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cryosuite.kernels import chance

SHIFT = 0.05  # of the box, at most
CROP = (0.6, 1.0)  # share of the area that is kept
BLUR = (0.1, 2.0)  # sd in pixels of a 224 pixel image
BLUR_SHARE = 0.5  # of the images
NOISE = (0.0, 0.5)  # sd of what is added
CONTRAST = (0.8, 1.2)
# what a simulated pair may still be given: its angles, shifts, CTF and noise were drawn when it was made
AFTER_SIMULATION = frozenset(("flip", "blur", "contrast", "sign"))


def augment(images: Tensor, names: frozenset[str]) -> Tensor:
    """One random view of each image: (b, s, s) -> (b, s, s), by the augmentations in ``names``."""
    if "flip" in names:
        images = flip(images)
    if names & {"rotate", "shift", "crop"}:
        images = resample(images, "rotate" in names, "shift" in names, "crop" in names)
    if names & {"blur", "defocus"}:
        images = filter_bands(images, "blur" in names, "defocus" in names)
    if "noise" in names:
        images = band_noise(images)
    if "contrast" in names:
        images = images * _uniform(images, *CONTRAST)[:, None, None]
    if "sign" in names:
        images = images * torch.where(_uniform(images, 0, 1) < 0.5, -1.0, 1.0)[:, None, None].to(images.dtype)
    return images


def flip(images: Tensor) -> Tensor:
    """Half of the images mirrored in x. A mirrored projection is one of the other hand of the molecule."""
    return torch.where((_uniform(images, 0, 1) < 0.5)[:, None, None], images.flip(2), images)


def resample(images: Tensor, rotate: bool, shift: bool, crop: bool) -> Tensor:
    """Turned by any angle, moved by up to 5 % of the box, .6 to 1 of the area enlarged; edges are mirrored."""
    b = len(images)
    angle = _uniform(images, 0, 2 * math.pi) if rotate else images.new_zeros(b)
    scale = _uniform(images, *CROP).sqrt() if crop else images.new_ones(b)
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    room = (2 * SHIFT if shift else 0.0) + (1 - scale if crop else images.new_zeros(b))
    offset = (2 * chance.rand(b, 2, device=images.device, dtype=images.dtype) - 1) * room[:, None]
    matrix = torch.stack(
        [torch.stack([cosine, -sine, offset[:, 0]], 1), torch.stack([sine, cosine, offset[:, 1]], 1)], 1
    )
    # half precision would move pixels by a third of their width
    with torch.autocast(images.device.type, enabled=False):
        grid = F.affine_grid(matrix, [b, 1, *images.shape[1:]], align_corners=False)
    return F.grid_sample(images[:, None], grid, padding_mode="reflection", align_corners=False)[:, 0]


def filter_bands(images: Tensor, blur: bool, defocus: bool) -> Tensor:
    """In Fourier space: a Gaussian blur of half of the images, and a smooth gain such as another defocus would make.

    The gain is 1 + a cos(pi f^2 s2 + phase), |a| <= .4, with f in cycles per pixel and one to six oscillations to the
    edge; the mean is kept.
    """
    b, size = len(images), images.shape[-1]
    kx = torch.fft.rfftfreq(size, device=images.device)
    ky = torch.fft.fftfreq(size, device=images.device)
    f2 = (ky[:, None] ** 2 + kx[None] ** 2)[None]
    gain = torch.ones(1, 1, 1, device=images.device)
    if blur:
        sd = _uniform(images, *BLUR) * (size / 224) * (_uniform(images, 0, 1) < BLUR_SHARE)
        gain = gain * torch.exp(-2 * (math.pi * sd[:, None, None]) ** 2 * f2)
    if defocus:
        depth, turns = _uniform(images, -0.4, 0.4), _uniform(images, 1.0, 6.0)
        phase = _uniform(images, 0, 2 * math.pi)
        wave = torch.cos(2 * math.pi * turns[:, None, None] * 4 * f2 + phase[:, None, None])
        gain = gain * (1 + depth[:, None, None] * wave)
    gain = torch.where(f2 == 0, torch.ones_like(gain), gain).expand(b, -1, -1)
    return torch.fft.irfft2(torch.fft.rfft2(images.float()) * gain, s=(size, size)).to(images.dtype)


def band_noise(images: Tensor) -> Tensor:
    """White noise up to a random radius of Fourier space added, of sd up to half that of the images."""
    size = images.shape[-1]
    kx = torch.fft.rfftfreq(size, device=images.device)
    ky = torch.fft.fftfreq(size, device=images.device)
    radius = (ky[:, None] ** 2 + kx[None] ** 2).sqrt()[None]
    edge = _uniform(images, 0.1, 0.5)[:, None, None]
    white = chance.randn(*images.shape, device=images.device)
    kept = torch.sigmoid((edge - radius) * size)
    noise = torch.fft.irfft2(torch.fft.rfft2(white) * kept, s=(size, size))
    noise = noise / noise.std(dim=(1, 2), keepdim=True).clamp(min=1e-6)
    return images + (noise * _uniform(images, *NOISE)[:, None, None]).to(images.dtype)


def circled(images: Tensor, mask: Tensor, outside: float) -> Tensor:
    """Images with everything outside the circle ``mask`` (s, s) bool set to the value that grey 0 has."""
    return torch.where(mask, images, images.new_tensor(outside))


def _uniform(images: Tensor, low: float, high: float) -> Tensor:
    """(b,) uniform numbers where the images are."""
    return low + (high - low) * chance.rand(len(images), device=images.device)
