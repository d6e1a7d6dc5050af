"""Pictures of a report as data URIs, small and compressed: particles of a cluster, turning volumes, central planes."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryosuite.analysis import render
from cryosuite.analysis.turntable import strip, turntable
from cryosuite.data.particles import ParticleSet
from cryosuite.errors import InputError
from cryosuite.formats.atomic import atomic_path
from cryosuite.formats.mrc import read_map

FRAMES, FRAME = 24, 200  # of a turning volume: pictures of one turn, pixels on a side
FEWER_FRAMES = 12  # above MANY volumes, so that the file stays small
MANY = 40
SLICE = 180  # pixels on a side of a central plane
LONGEST_FILM = 2_500_000  # bytes of a GIF that is put into the page
TILE = 84  # pixels on a side of a particle
SHOWN = 12  # particles of each kind
DESCRIPTION = 0x010E  # of a picture, in EXIF
FOR_THE_EYE = 25.0  # A: finer detail of a single particle is noise


@dataclass(frozen=True)
class Picture:
    """A picture of the page: its data URI, and how many frames lie side by side in it."""

    uri: str
    frames: int = 1


def webp(picture: np.ndarray, quality: int = 82, note: str = "") -> bytes:
    """A uint8 picture (h, w) or (h, w, 3) as WebP; PNG where a side is longer than WebP allows (16,383).

    ``note``: kept in the file as the description of the picture.
    """
    from PIL import Image

    out = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(picture))
    about = Image.Exif()
    if note:
        about[DESCRIPTION] = note
    if max(picture.shape[:2]) > 16_383:
        image.save(out, "PNG", optimize=True, exif=about)
    else:
        image.save(out, "WEBP", quality=quality, method=4, exif=about)
    return out.getvalue()


def data_uri(data: bytes) -> str:
    """The bytes of a PNG, GIF or WebP file as a data URI."""
    kind = {b"\x89PNG": "png", b"GIF8": "gif"}.get(data[:4], "webp")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def turning(
    path: Path,
    kept: Path,
    level: float | None,
    colour: str,
    pixel_size: float,
    zoom: float | None,
    frames: int = FRAMES,
) -> Picture:
    """A volume that turns, as a strip of frames; drawn once and kept, with the date of the file it shows and, in words,
    how it is shown.

    Args:
        path: of the volume. kept: where the strip lies. level: None: chosen from the map. pixel_size: A.
    """
    date = path.stat().st_mtime_ns  # another file, older or newer, has another one
    drawn_as = f"{frames} frames, level {level}, {colour}, {pixel_size} A, zoom {zoom}"
    if not (kept.is_file() and kept.stat().st_mtime_ns == date and _description(kept) == drawn_as):
        volume = read_map(path).data
        level = render.contour_level(volume, pixel_size) if level is None else level
        drawn = strip(turntable(volume, level, colour, pixel_size, frames, FRAME, zoom=zoom))
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(kept) as temporary:
            temporary.write_bytes(webp(drawn, note=drawn_as))
        os.utime(kept, ns=(date, date))
    return Picture(data_uri(kept.read_bytes()), frames)


def _description(path: Path) -> str:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return str(image.getexif().get(DESCRIPTION, ""))
    except OSError:
        return ""


def central_planes(path: Path) -> Picture:
    """The three central planes of a volume side by side."""
    return Picture(data_uri(webp(render.slices(read_map(path).data, SLICE), 80)))


def still(path: Path, width: int = 1400) -> Picture:
    """A PNG of the analysis, at most ``width`` pixels wide; of a film (GIF) all, or its first picture if it is long."""
    from PIL import Image

    if path.suffix == ".gif" and path.stat().st_size <= LONGEST_FILM:
        return Picture(data_uri(path.read_bytes()))
    with Image.open(path) as image:
        image = image.convert("RGB")
        if image.width > width:
            image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)
        return Picture(data_uri(webp(np.asarray(image), 85)))


def typical_and_odd(z: np.ndarray, labels: np.ndarray, count: int, shown: int = SHOWN) -> list[tuple[list, list]]:
    """Rows nearest to and farthest from the mean latent of each of ``count`` clusters, nearest and farthest first.

    A small cluster is shared out: no particle is in both lists.
    """
    found = []
    for label in range(count):
        rows = np.flatnonzero(labels == label)
        if not len(rows):
            found.append(([], []))
            continue
        points = z[rows].astype(np.float64)
        order = rows[np.argsort(np.square(points - points.mean(axis=0)).sum(axis=1), kind="stable")]
        odd = min(shown, len(order) // 2)
        near = order[: min(shown, len(order) - odd)]
        found.append((near.tolist(), order[::-1][:odd].tolist()))
    return found


def montage(particles: ParticleSet, rows: Sequence[int], columns: int = 6) -> Picture:
    """Particles as tiles in reading order, centred by their shifts, low-passed for the eye, each in its own greys.

    Raises:
        InputError, OSError: images that cannot be read.
    """
    chosen = np.asarray(rows, np.int64)
    images = particles.read(chosen)
    shift = np.zeros((len(chosen), 2)) if particles.shift is None else particles.shift[chosen]
    tiles = for_the_eye(images, np.nan_to_num(shift), np.asarray(particles.pixel_size[chosen], np.float64))
    gap = 2
    lines = -(-len(tiles) // columns)
    sheet = np.full((lines * (TILE + gap) - gap, columns * (TILE + gap) - gap), 255, np.uint8)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        y, x = row * (TILE + gap), column * (TILE + gap)
        sheet[y : y + TILE, x : x + TILE] = tile
    return Picture(data_uri(webp(sheet, 75)))


def for_the_eye(
    images: np.ndarray,  # (n, D, D)
    shift: np.ndarray,  # (n, 2) fraction of the box
    pixel_size: np.ndarray,  # (n,) A
) -> list[np.ndarray]:
    """Tiles (TILE, TILE) uint8: centred, times a Gaussian that is 1/2 at 1/25 A in Fourier space, grey 1 to 99 %."""
    from PIL import Image

    size = images.shape[-1]
    ky, kx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    tiles = []
    for image, (tx, ty), pixel in zip(np.nan_to_num(images), shift, pixel_size, strict=True):
        keep = np.exp(-np.log(2) * (kx**2 + ky**2) * (FOR_THE_EYE / pixel) ** 2)
        move = np.exp(-2j * np.pi * size * (kx * tx + ky * ty))
        smooth = np.fft.irfft2(np.fft.rfft2(image) * keep * move, s=(size, size))
        low, high = np.percentile(smooth, [1, 99])
        grey = np.clip((smooth - low) / max(high - low, 1e-12), 0, 1)
        tile = Image.fromarray(np.round(255 * grey).astype(np.uint8))
        tiles.append(np.asarray(tile.resize((TILE, TILE), Image.Resampling.BICUBIC)))
    return tiles


def montages(particles: ParticleSet | None, lists: Sequence[tuple[list, list]]) -> tuple[list[list[str]], str]:
    """Data URIs of the typical and the odd particles of each cluster ("" for none), and why they are missing."""
    if particles is None:
        return [["", ""] for _ in lists], "the particle images are not known"
    found = []
    for pair in lists:
        try:
            found.append([montage(particles, rows).uri if rows else "" for rows in pair])
        except (InputError, OSError) as error:
            return [["", ""] for _ in lists], str(error)
    return found, ""
