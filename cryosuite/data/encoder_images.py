"""Particles on their way into an encoder: contrast, eight-bit images, a cache of them on disk, features out.

Contrast. A particle set hands out white particles whatever its files hold. The published encoder (prep "ief") was
trained on images as stored in their files, so for it the sign is put back to that of the SOURCE file, through a work
directory too (its dataset.yaml records the sign of the input). Prep "robust", of our own weights, takes white
particles: features then do not depend on which program wrote the stack.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryosuite.console import Progress
from cryosuite.data.encoder_cache import EncoderCache
from cryosuite.data.encoder_pixels import PREPS, circle_mask, encoder_images
from cryosuite.data.encoder_read import read_encoder_images, stored_sign
from cryosuite.data.loader import read_ahead
from cryosuite.data.processes import ALONE, Processes
from cryosuite.errors import notice
from cryosuite.formats.checks import name_rows
from cryosuite.formats.pickle_rows import PickledRows, RowsPart, RowsWriter
from cryosuite.kernels.memory import Portions

if TYPE_CHECKING:
    from cryosuite.data.particles import ParticleSet
    from cryosuite.nets.ief_weights import LoadedEncoder

__all__ = [
    "PREPS",
    "EncoderCache",
    "circle_mask",
    "encoder_images",
    "features",
    "features_to_file",
    "normalise",
    "read_encoder_images",
    "stored_sign",
]


def normalise(images: Tensor, mean: float, std: float) -> Tensor:
    """Images (b, s, s) uint8 -> (b, 1, s, s) float32 on the same device: (x / 255 - mean) / std."""
    return images.to(torch.float32).div_(255).sub_(mean).div_(std)[:, None]


def features(
    particles: ParticleSet,
    loaded: LoadedEncoder,
    batch: int = 64,
    device: torch.device | str = "cpu",
    progress: bool = True,
    *,
    cache: EncoderCache | None = None,
    circle: bool = True,
    half: bool | None = None,
) -> np.ndarray:
    """Features of all particles, (N, C) float32 in their order, not normalised; memory holds no images but a batch.

    Args:
        particles: any set; images are resized to the encoder's size.
        loaded: the encoder with its preparation; it is moved to ``device`` and left in eval mode.
        cache: take the images from here instead of reading and preparing them.
        circle: hide what lies outside the circle (CryoDECO does, Cryo-IEF itself does not).
        half: bf16; default: on a GPU, not on a CPU.

    Rows of images that are not finite are those of an empty image; a notice names them. Raises ValueError for a cache
    of another size or preparation.
    """
    wanted = (loaded.spec.image_size, loaded.prep, len(particles))
    if cache is not None and (cache.size, cache.prep, len(cache)) != wanted:
        raise ValueError("the cache holds images of another size, preparation or number than the encoder is to see")
    device = torch.device(device)
    out = np.empty((len(particles), loaded.spec.dim), np.float32)
    bad = [np.zeros(0, np.int64)]
    images = _batches(particles, np.arange(len(particles)), loaded, batch, cache, circle, device)
    for rows, values, finite in _encoded(images, len(particles), loaded, device, progress, half):
        out[rows] = values
        bad.append(rows[~finite])
    _name_broken(particles, np.concatenate(bad))
    return out


def features_to_file(
    path: Path,
    particles: ParticleSet,
    loaded: LoadedEncoder,
    batch: int = 64,
    device: torch.device | str = "cpu",
    progress: bool = True,
    *,
    circle: bool = True,
    half: bool | None = None,
    processes: Processes = ALONE,
) -> PickledRows:
    """``features`` into a pickle, each batch as it comes: memory does not grow with the number of particles.

    ``processes`` share the particles and fill one file, which all must see; it appears under its name when it is whole.
    Returns the features on disk. Raises InputError in all processes for a full disk and for images that cannot be read.
    """
    device, shape = torch.device(device), (len(particles), loaded.spec.dim)
    mine = processes.mine(np.arange(len(particles)), batch)
    with ExitStack() as opened:

        def make() -> Path:
            return opened.enter_context(RowsWriter(path, shape)).temporary

        temporary = processes.first_does(make)

        def fill() -> np.ndarray:
            bad = [np.zeros(0, np.int64)]
            images = _batches(particles, mine, loaded, batch, None, circle, device)
            with RowsPart(path, temporary, shape) as part:
                for rows, values, finite in _encoded(images, len(mine), loaded, device, progress, half):
                    part.write(int(rows[0]), values)
                    bad.append(rows[~finite])
            return np.concatenate(bad)

        _name_broken(particles, np.concatenate(processes.everyone(fill)))
        processes.first_does(opened.close)
    return PickledRows(path, shape)


def _encoded(
    batches: Iterator[tuple[np.ndarray, Tensor, np.ndarray]],
    count: int,
    loaded: LoadedEncoder,
    device: torch.device,
    progress: bool,
    half: bool | None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows (b,), neighbours of one another, their features (b, C) float32, and whether their images were finite."""
    encoder, portions = loaded.encoder.to(device).eval(), Portions("images")
    half = device.type == "cuda" if half is None else half
    with Progress(count, "encode") if progress else nullcontext() as shown:
        for rows, images, finite in read_ahead(batches, 2):

            def encoded(some: slice, images: Tensor = images) -> np.ndarray:
                x = normalise(images[some].to(device, non_blocking=True), loaded.mean, loaded.std)
                with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
                    return encoder(x).float().cpu().numpy()

            for some, values in portions.over(encoded, len(rows)):
                yield rows[some], values, finite[some]
            if shown is not None:
                shown.advance(len(rows))


def _name_broken(particles: ParticleSet, rows: np.ndarray) -> None:
    """Tell which images were not finite."""
    if len(rows):
        notice(
            f"{particles.path or 'the particle set'}: {name_rows(rows, 'image')} (0-based) hold NaN or infinite "
            "pixels: their features are those of an empty image"
        )


def _batches(
    particles: ParticleSet,
    mine: np.ndarray,
    loaded: LoadedEncoder,
    batch: int,
    cache: EncoderCache | None,
    circle: bool,
    device: torch.device,
) -> Iterator[tuple[np.ndarray, Tensor, np.ndarray]]:
    """Some of the rows ``mine``, their images (b, s, s) uint8 and whether they are finite, in order."""
    for begin in range(0, len(mine), batch):
        rows = mine[begin : begin + batch]
        if cache is not None:
            images, finite = cache.batch(rows), ~cache.bad[rows]
        else:
            array, finite = read_encoder_images(particles, rows, loaded.spec.image_size, loaded.prep, circle)
            images = torch.from_numpy(array)
        yield rows, images.pin_memory() if device.type == "cuda" else images, finite
