"""Volumes at chosen latents: decoded in batches, written as mrc, drawn.

Two passes, so that memory stays flat however many and large the volumes are: the first decodes, writes and measures,
the second reads each file back and draws it at the scale (and, along a path, the level) common to all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryosuite.analysis import render
from cryosuite.console import Progress
from cryosuite.data.workdir import VolumeDir
from cryosuite.errors import InputError
from cryosuite.formats.atomic import atomic_path
from cryosuite.formats.mrc import read_map, write_map

Decode = Callable[[np.ndarray], np.ndarray]  # latents (k, zdim) -> volumes (k, D, D, D) float32

BATCH_VOXELS = 16 * 2**20  # decoded at once: 64 MiB of float32
LOW_PASS_EDGE = 0.1  # raised-cosine fall from 1 to 0, as a fraction of the cutoff frequency


@dataclass(frozen=True)
class VolumeOptions:
    """What is done to a decoded volume before it is written.

    Attributes:
        pixel_size: Angstrom per voxel of the decoded box, or None for the run's own.
        flip: reverse the handedness (z mirrored about the centre voxel, which stays in place).
        invert: multiply by -1. downsample: box size to Fourier-crop to. low_pass: resolution in Angstrom.
        start_index: number of the first file. mass_kda: expected mass, for the contour level.
    """

    pixel_size: float | None = None
    flip: bool = False
    invert: bool = False
    downsample: int | None = None
    low_pass: float | None = None
    start_index: int = 0
    mass_kda: float | None = None


@dataclass(frozen=True)
class VolumeFile:
    """One written volume: its file, the colour and level it is shown with, and how far it reaches (see render)."""

    number: int
    path: Path
    colour: str
    level: float
    reach: float


def flip_hand(volumes: np.ndarray) -> np.ndarray:
    """Mirror (..., D, D, D) in z about voxel D//2."""
    return np.roll(volumes[..., ::-1, :, :], 1, axis=-3)


def low_pass(volumes: np.ndarray, pixel_size: float, resolution: float) -> np.ndarray:
    """Keep frequencies up to 1/``resolution`` (A), with a raised-cosine edge a tenth as wide."""
    size = volumes.shape[-1]
    axis, half = np.fft.fftfreq(size, pixel_size), np.fft.rfftfreq(size, pixel_size)
    frequency = np.sqrt(axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + half[None, None, :] ** 2)
    past = (frequency * resolution - 1.0) / LOW_PASS_EDGE
    keep = 0.5 * (1.0 + np.cos(np.pi * np.clip(past, 0.0, 1.0)))
    axes = (-3, -2, -1)
    return np.fft.irfftn(np.fft.rfftn(volumes, axes=axes) * keep, s=(size,) * 3, axes=axes).astype(np.float32)


def prepare(volumes: np.ndarray, pixel_size: float, options: VolumeOptions) -> tuple[np.ndarray, float]:
    """Apply the options to decoded volumes (k, D, D, D); returns them and the pixel size they now have (A)."""
    size = volumes.shape[-1]
    pixel_size = options.pixel_size or pixel_size
    volumes = np.asarray(volumes, np.float32)
    if options.flip:
        volumes = flip_hand(volumes)
    if options.invert:
        volumes = -volumes
    if options.low_pass is not None:
        volumes = low_pass(volumes, pixel_size, options.low_pass)
    if options.downsample is not None and options.downsample != size:
        import torch

        from cryosuite.kernels.fourier import fourier_crop_volume

        volumes = fourier_crop_volume(torch.from_numpy(np.ascontiguousarray(volumes)), options.downsample).numpy()
        pixel_size = pixel_size * size / options.downsample
    return np.ascontiguousarray(volumes), pixel_size


def check_options(options: VolumeOptions, box_size: int) -> None:
    """InputError when an option cannot be applied to volumes of ``box_size``."""
    size = options.downsample
    if size is not None and (size < 2 or size % 2 or size > box_size):
        raise InputError(f"-d {size}: expected an even box size from 2 to {box_size}, the box of the run.")
    for name, value in (
        ("--Apix", options.pixel_size),
        ("--low-pass", options.low_pass),
        ("--mass-kda", options.mass_kda),
    ):
        if value is not None and not value > 0:
            raise InputError(f"{name} {value}: expected a positive number.")
    if options.start_index < 0:
        raise InputError(f"--vol-start-index {options.start_index}: expected 0 or more.")


def write_volumes(
    z: np.ndarray,  # (k, zdim)
    decode: Decode,
    folder: VolumeDir,
    pixel_size: float,
    options: VolumeOptions,
    colours: Sequence[str],
    box_size: int,
    progress: Progress | None = None,
) -> list[VolumeFile]:
    """Decode volumes at the latents and write them as vol_000.mrc, ... with their latents in z_values.txt."""
    folder.path.mkdir(parents=True, exist_ok=True)
    for old in [*folder.volumes(), *folder.path.glob("vol_[0-9]*.png"), *folder.sharpened()]:
        old.unlink()  # of an earlier analysis with more volumes
    batch = max(1, min(len(z), BATCH_VOXELS // box_size**3))
    files: list[VolumeFile] = []
    for start in range(0, len(z), batch):
        decoded = np.asarray(decode(np.ascontiguousarray(z[start : start + batch], np.float32)))
        volumes, size = prepare(decoded, pixel_size, options)
        for volume in volumes:
            row = len(files)
            path = folder.volume(row + options.start_index)
            write_map(path, volume, size)
            level = render.contour_level(volume, size, options.mass_kda)
            files.append(VolumeFile(row + options.start_index, path, colours[row], level, render.reach(volume, level)))
            if progress is not None:
                progress.advance()
    with atomic_path(folder.z_values) as path:
        np.savetxt(path, z, fmt="%.8g")
    return files


def draw_volumes(
    files: Sequence[VolumeFile], folder: VolumeDir, pixels: int = 256, progress: Progress | None = None
) -> list[np.ndarray]:
    """Draw each written volume to vol_000.png and vol_000_slices.png; returns the surfaces (pixels, pixels, 4) uint8.

    All share one zoom, so that sizes can be compared.
    """
    zoom = render.common_zoom([file.reach for file in files])
    pictures = []
    for file in files:
        volume = read_map(file.path).data
        picture = render.isosurface(volume, file.level, file.colour, pixels=pixels, zoom=zoom)
        save_png(folder.preview(file.number), render.on_white(picture))
        save_png(folder.slices(file.number), render.slices(volume, pixels))
        pictures.append(picture)
        if progress is not None:
            progress.advance()
    return pictures


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write a uint8 picture (h, w), (h, w, 3) or (h, w, 4) as PNG."""
    from matplotlib.image import imsave

    picture = np.repeat(picture[..., None], 3, axis=-1) if picture.ndim == 2 else picture
    with atomic_path(path, suffix=".png") as temporary:
        imsave(temporary, picture, format="png")
