"""A file with all particles of a set as eight-bit images, made once and mapped into memory.

Beside the images (N, s, s) lies a small JSON file that says what they are of and how many are done: an interrupted
cache is completed, one of other particles or another preparation is made anew.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from cryosuite.console import Progress
from cryosuite.data.encoder_read import read_encoder_images, stored_sign
from cryosuite.data.loader import read_ahead
from cryosuite.data.processes import ALONE, Processes
from cryosuite.errors import InputError, notice
from cryosuite.formats.atomic import require_space, write_error, write_text
from cryosuite.formats.checks import name_rows

if TYPE_CHECKING:
    from cryosuite.data.particles import ParticleSet

FORMAT = 1
CHUNK_BYTES = 8 << 20  # of float32 images read at once
SAVE_SECONDS = 3.0  # between notes of how far the work is
STRETCH = 32  # chunks of each process between two notes, where several share the work
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

    Several processes (torch.distributed) share the preparation of a file, each has neighbouring rows; all of them must
    see the same folder. A mistake of one of them is raised in all.

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
            rows = np.arange(len(particles))
            with self._progress(rows, progress) as bar:
                self._make(rows, self._keep, bar)
        else:
            self.processes = _processes()
            self._complete(progress)
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
        done, bad = self.processes.first_does(self._begin)
        self.bad[:] = False
        self.bad[bad] = True
        if done < len(self.particles):
            self._write(done, progress)
        self._map()

    def _begin(self) -> tuple[int, np.ndarray]:
        """How many images the file has, which is as long as it is going to be from now on, and the broken ones."""
        count, needed = len(self.particles), len(self.particles) * self.size**2
        done, why = self._found()
        if why:
            notice(f"{self.path}: this cache of images {why}: it is made anew")
        if done < count or not self.path.is_file() or self.path.stat().st_size != needed:
            try:
                if done == 0:
                    self.record.unlink(missing_ok=True)
                    self.path.unlink(missing_ok=True)
                require_space(self.path, needed - done * self.size**2)
                with open(self.path, "r+b" if done else "wb") as file:
                    file.truncate(done * self.size**2)
                    file.truncate(needed)
                self._note(done)
            except OSError as error:
                raise write_error(self.path, error, needed) from None
        return done, np.flatnonzero(self.bad[:done])

    def _write(self, done: int, progress: bool) -> None:
        """Write the images from row ``done`` on, stretch by stretch: every process a part of each."""
        everyone, count, alone = self.processes, len(self.particles), self.processes.count == 1
        length = count - done if alone else STRETCH * self._step * everyone.count
        stretches = [np.arange(begin, min(begin + length, count)) for begin in range(done, count, length)]
        mine = [everyone.mine(rows, self._step) for rows in stretches]
        saved, opened = time.monotonic(), []

        def keep(begin: int, images: np.ndarray) -> None:
            nonlocal saved
            opened[0].seek(begin * self.size**2)
            opened[0].write(images.data)
            if alone and time.monotonic() - saved > SAVE_SECONDS:
                _flush(opened[0])
                self._note(begin + len(images))
                saved = time.monotonic()

        def make(rows: np.ndarray) -> np.ndarray:
            try:
                self._make(rows, keep, bar)
                _flush(opened[0])
            except OSError as error:
                raise write_error(self.path, error, count * self.size**2) from None
            return rows[self.bad[rows]]

        with ExitStack() as stack:
            everyone.everyone(lambda: opened.append(stack.enter_context(self._opened())))
            bar = stack.enter_context(self._progress(np.concatenate(mine), progress and everyone.first))
            for rows, own in zip(stretches, mine, strict=True):
                for bad in everyone.everyone(lambda own=own: make(own)):
                    self.bad[bad] = True
                everyone.first_does(lambda last=int(rows[-1]): self._note(last + 1))

    def _opened(self) -> BinaryIO:
        """The file that the first process has made."""
        try:
            return open(self.path, "r+b")
        except FileNotFoundError:
            raise InputError(f"{self.path}: is not there: do all processes see the same folder?") from None

    def _progress(self, rows: np.ndarray, shown: bool) -> AbstractContextManager[Progress | None]:
        return Progress(len(rows), "prepare images") if shown and len(rows) else nullcontext()

    @property
    def _step(self) -> int:
        """Images read at once."""
        return max(1, CHUNK_BYTES // (4 * self.particles.box_size**2))

    def _make(self, rows: np.ndarray, keep: Any, bar: Progress | None) -> None:
        """Prepare the images of neighbouring rows and hand them to ``keep(first row, images)``."""
        step = self._step
        parts = (rows[begin : begin + step] for begin in range(0, len(rows), step))
        made = ((part, *read_encoder_images(self.particles, part, self.size, self.prep, self.circle)) for part in parts)
        for part, images, finite in read_ahead(made, 2):
            self.bad[part] = ~finite
            keep(int(part[0]), images)
            if bar is not None:
                bar.advance(len(part))

    def _keep(self, begin: int, images: np.ndarray) -> None:
        self.images[begin : begin + len(images)] = images

    def _note(self, done: int) -> None:
        """Record that the first ``done`` images are on disk."""
        said = self._key() | {"done": done, "bad": np.flatnonzero(self.bad[:done]).tolist()}
        write_text(self.record, json.dumps(said) + "\n")

    def _map(self) -> None:
        shape = (len(self.particles), self.size, self.size)
        self.images = np.memmap(self.path, np.uint8, "r", shape=shape) if shape[0] else np.empty(shape, np.uint8)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _processes() -> Processes:
    """Those of the process group that there is."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return Processes(distributed.get_rank(), distributed.get_world_size())
    return ALONE
