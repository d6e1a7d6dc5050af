"""A file with all particles of a set as eight-bit images, made once and mapped into memory.

Beside the images (N, s, s) lies a small JSON file that says what they are of and how many are done: an interrupted
cache is completed, one of other particles or another preparation is made anew.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cryosuite.console import Progress
from cryosuite.data.encoder_read import read_encoder_images, stored_sign
from cryosuite.data.loader import read_ahead
from cryosuite.errors import InputError, notice
from cryosuite.formats.atomic import require_space, write_error, write_text
from cryosuite.formats.checks import name_rows

if TYPE_CHECKING:
    from cryosuite.data.particles import ParticleSet

FORMAT = 1
CHUNK_BYTES = 8 << 20  # of float32 images read at once
SAVE_SECONDS = 3.0  # between notes of how far the work is
STALE_SECONDS = 600.0  # other processes wait this long for a sign of life of the one that writes
CHECKED = 16  # images compared with their particles before an old cache is believed


class EncoderCache:
    """All particles of a set as images for an encoder, (N, s, s) uint8.

    Args:
        particles: the set.
        size: pixels per side.
        prep: "ief" or "robust"; the contrast follows (see ``encoder_images``).
        path: the file, made or completed here and mapped read-only; None keeps the images in memory (N s^2 bytes).
        circle: zero outside the circle.
        progress: show a progress display.

    Of several processes (torch.distributed) the first writes the file and the others wait for it.

    Attributes:
        images: (N, s, s) uint8. bad: (N,) bool, images with pixels that are not finite; they are 0 everywhere.

    Raises InputError for a full disk or a file that cannot be written.
    """

    def __init__(
        self,
        particles: ParticleSet,
        size: int,
        prep: str = "ief",
        path: str | os.PathLike | None = None,
        circle: bool = True,
        progress: bool = True,
    ) -> None:
        self.particles, self.size, self.prep, self.circle = particles, size, prep, circle
        self.path = None if path is None else Path(path)
        self.bad = np.zeros(len(particles), bool)
        if self.path is None:
            self.images = np.empty((len(particles), size, size), np.uint8)
            self._make(0, progress, self._keep)
        elif _rank() == 0:
            self._complete(progress)
        else:
            self._await()
        if self.bad.any():
            notice(
                f"{particles.path or 'the particle set'}: {name_rows(np.flatnonzero(self.bad), 'image')} (0-based) "
                "hold NaN or infinite pixels: the encoder sees empty images"
            )

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, index: Tensor | np.ndarray) -> Tensor:
        """Images (b, s, s) uint8 of the rows, in memory of their own."""
        rows = index.cpu().numpy() if isinstance(index, Tensor) else np.asarray(index)
        return torch.from_numpy(np.ascontiguousarray(self.images[rows]))

    @property
    def record(self) -> Path:
        """The JSON file beside the images."""
        return self.path.with_name(self.path.name + ".json")

    def _key(self) -> dict[str, Any]:
        """What the images are of, as far as it can be told without reading them."""
        particles = self.particles
        return {
            "format": FORMAT,
            "n": len(particles),
            "size": self.size,
            "prep": self.prep,
            "circle": self.circle,
            "index": zlib.crc32(np.ascontiguousarray(particles.index, np.int64).tobytes()),
            "sign": zlib.crc32(stored_sign(particles).tobytes()) if self.prep == "ief" else 0,
        }

    def _found(self) -> tuple[int, str]:
        """How many images an earlier process left here that may be believed, and why not all that it says."""
        try:
            said = json.loads(self.record.read_text())
            done, bad = int(said["done"]), np.asarray(said["bad"], np.int64).reshape(-1)
            key = {name: said.get(name) for name in self._key()}
            present = self.path.stat().st_size
        except FileNotFoundError:
            return 0, ""
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return 0, "cannot be read"
        if key != self._key():
            return 0, "is of other particles or another preparation"
        if not 0 <= done <= len(self.particles) or present < done * self.size**2:
            return 0, "is shorter than its record says"
        if len(bad) and not 0 <= bad.min() <= bad.max() < done:
            return 0, "cannot be read"
        if done and not self._believable(done):
            return 0, "holds other images than these particles"
        self.bad[:] = False
        self.bad[bad] = True
        return done, ""

    def _believable(self, done: int) -> bool:
        """Do some of the first ``done`` images equal what their particles give now?"""
        rows = np.unique(np.linspace(0, done - 1, CHECKED).astype(np.int64))
        kept = np.memmap(self.path, np.uint8, "r", shape=(done, self.size, self.size))[rows]
        fresh, _ = read_encoder_images(self.particles, rows, self.size, self.prep, self.circle)
        return int(np.abs(kept.astype(np.int16) - fresh).max(initial=0)) <= 1  # a level: other processors round anew

    def _complete(self, progress: bool) -> None:
        """Write what is missing of the file, then map it."""
        count, needed = len(self.particles), len(self.particles) * self.size**2
        done, why = self._found()
        if why:
            notice(f"{self.path}: this cache of images {why}: it is made anew")
        if done < count or not self.path.is_file() or self.path.stat().st_size != needed:
            self._write(done, needed, progress)
        self._map()

    def _write(self, done: int, needed: int, progress: bool) -> None:
        try:
            if done == 0:
                self.record.unlink(missing_ok=True)
                self.path.unlink(missing_ok=True)
            require_space(self.path, needed - done * self.size**2)
            with open(self.path, "r+b" if done else "wb") as file:
                file.truncate(done * self.size**2)
                file.seek(0, os.SEEK_END)
                self._note(done)
                saved = time.monotonic()

                def keep(begin: int, images: np.ndarray) -> None:
                    nonlocal saved
                    file.write(images.data)
                    if time.monotonic() - saved > SAVE_SECONDS:
                        _flush(file)
                        self._note(begin + len(images))
                        saved = time.monotonic()

                self._make(done, progress, keep)
                _flush(file)
            self._note(len(self.particles))
        except OSError as error:
            raise write_error(self.path, error, needed) from None

    def _make(self, done: int, progress: bool, keep: Any) -> None:
        """Prepare the images from row ``done`` on and hand them to ``keep(first row, images)``."""
        particles, count = self.particles, len(self.particles)
        step = max(1, CHUNK_BYTES // (4 * particles.box_size**2))
        parts = (np.arange(begin, min(begin + step, count)) for begin in range(done, count, step))
        made = ((part, *read_encoder_images(particles, part, self.size, self.prep, self.circle)) for part in parts)
        shown = Progress(count, "prepare images", done=done) if progress and done < count else nullcontext()
        with shown as bar:
            for rows, images, finite in read_ahead(made, 2):
                self.bad[rows] = ~finite
                keep(int(rows[0]), images)
                if bar is not None:
                    bar.advance(len(rows))

    def _keep(self, begin: int, images: np.ndarray) -> None:
        self.images[begin : begin + len(images)] = images

    def _note(self, done: int) -> None:
        """Record that the first ``done`` images are on disk."""
        said = self._key() | {"done": done, "bad": np.flatnonzero(self.bad[:done]).tolist()}
        write_text(self.record, json.dumps(said) + "\n")

    def _await(self) -> None:
        """Wait until the first process has completed the file."""
        last, seen = None, time.monotonic()
        while True:
            try:
                now = self.record.stat().st_mtime_ns
            except OSError:
                now = None
            if now != last:
                last, seen = now, time.monotonic()
                if self._found()[0] == len(self.particles):
                    return self._map()
            if time.monotonic() - seen > STALE_SECONDS:
                raise InputError(
                    f"{self.path}: the process that writes it has not moved for {STALE_SECONDS / 60:.0f} minutes. "
                    "Do all processes see the same folder?"
                )
            time.sleep(0.2)

    def _map(self) -> None:
        shape = (len(self.particles), self.size, self.size)
        self.images = np.memmap(self.path, np.uint8, "r", shape=shape) if shape[0] else np.empty(shape, np.uint8)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _rank() -> int:
    """The number of this process."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
