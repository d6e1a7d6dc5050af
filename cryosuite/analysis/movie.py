"""Films without ChimeraX: volumes blended into one another, drawn, written as GIF (Pillow) and, with ffmpeg, MP4."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np

from cryosuite.analysis.mesh import VIEW, picture, resample, surface, turned
from cryosuite.analysis.palette import hex_to_rgb, rgb_to_hex
from cryosuite.analysis.render import common_zoom, on_white
from cryosuite.analysis.turntable import INK, labelled, scale_bar
from cryosuite.analysis.volumes import VolumeFile
from cryosuite.console import Progress
from cryosuite.errors import FileError, InputError, notice
from cryosuite.formats.atomic import atomic_path
from cryosuite.formats.mrc import read_map

BLEND = 4  # pictures from one volume to the next
RATE = 12  # pictures per second
TRACK = (214, 219, 224)


def path_frames(
    files: Sequence[VolumeFile],
    pixels: int = 360,
    blend: int = BLEND,
    loop: bool = False,
    spin: float = 0.0,
    progress: Progress | None = None,
) -> Iterator[np.ndarray]:
    """Pictures (pixels, pixels, 3) uint8 of a walk along volumes, densities blended linearly between two of them.

    Args:
        files: written volumes in order, of one box size; drawn at the level of the first, in their own colours.
        blend: pictures from one volume to the next, the first of them the volume itself.
        loop: the last volume leads back to the first. spin: degrees turned about the vertical during the walk.
        progress: advanced by one per picture.
    """
    zoom = common_zoom([file.reach for file in files])
    total = frame_count(len(files), blend, loop)
    held: dict[int, tuple[np.ndarray, float]] = {}
    for number in range(total):
        left, part = divmod(number, blend)
        pair = (left, (left + 1) % len(files))
        held = {i: held[i] if i in held else _read(files[i]) for i in (pair if part else pair[:1])}
        share = part / blend
        volume, width = held[left]
        if part:
            volume = (1 - share) * volume + share * held[pair[1]][0]
        colour = _mixed(files[left].colour, files[pair[1]].colour, share)
        turn = turned(VIEW, spin * number / max(total - 1, 1))
        shown = on_white(picture(surface(volume, files[0].level), colour, pixels, turn, zoom))
        shown = scale_bar([shown], width / zoom)[0]
        yield _with_track(shown, number / max(total - 1, 1), files[pair[round(share)]].number)
        if progress is not None:
            progress.advance()


def frame_count(volumes: int, blend: int = BLEND, loop: bool = False) -> int:
    """Pictures of a walk along so many volumes."""
    return volumes * blend if loop and volumes > 1 else (volumes - 1) * blend + 1


def _read(file: VolumeFile) -> tuple[np.ndarray, float]:
    """The volume as it is drawn, and the width of its box in A."""
    written = read_map(file.path)
    return resample(written.data), float(written.pixel_size) * written.data.shape[0]


def _mixed(first: str, second: str, share: float) -> str:
    return rgb_to_hex((1 - share) * hex_to_rgb(first) + share * hex_to_rgb(second))


def _with_track(shown: np.ndarray, done: float, number: int) -> np.ndarray:
    """The picture with a line below that says how far the walk is, and the number of the nearest volume above it."""
    size, edge = shown.shape[0], max(shown.shape[0] // 32, 2)
    left, right, low = size // 2, size - edge, size - edge
    shown = labelled(shown, f"vol {number}", (right, low - max(size // 90, 2) - 2), "rs")
    row = slice(low - max(size // 90, 2), low)
    shown[row, left:right] = TRACK
    shown[row, left : left + int(round(done * (right - left)))] = INK
    return shown


def write_movies(
    gif: Path, mp4: Path, frames: Iterable[np.ndarray], to_and_fro: bool, rate: float = RATE
) -> list[Path]:
    """Write a GIF and, where ffmpeg can, an MP4; a notice says why not. Returns what was written.

    Pictures wait in a nameless file beside the GIF, not in memory.

    Args:
        to_and_fro: play backwards after the end, so that the film has no jump.
    """
    with tempfile.TemporaryFile(dir=gif.parent) as file:
        kept = _Kept(file, frames)
        if not kept.count:
            return []
        order = [*range(kept.count), *(range(kept.count - 2, 0, -1) if to_and_fro else ())]
        write_gif(gif, map(kept.picture, order), rate)
        written = [gif]
        mp4.unlink(missing_ok=True)  # of an earlier film
        program = ffmpeg()
        if program is None:
            notice(f"no MP4: ffmpeg is not installed (pip install imageio-ffmpeg). The film is in {gif.name}.")
        else:
            try:
                write_mp4(mp4, map(kept.picture, order), rate, program)
                written.append(mp4)
            except FileError:
                raise
            except InputError as error:  # many an ffmpeg comes without x264
                notice(f"no MP4: {error}. The film is in {gif.name}.")
    return written


class _Kept:
    """Pictures (h, w, 3) uint8 of one size in a file, to be looked at in any order."""

    def __init__(self, file: IO[bytes], pictures: Iterable[np.ndarray]) -> None:
        self.file, self.count, self.shape = file, 0, (0, 0, 3)
        for one in pictures:
            file.write(np.ascontiguousarray(one).data)
            self.count, self.shape = self.count + 1, one.shape

    def picture(self, number: int) -> np.ndarray:
        """One of them."""
        size = int(np.prod(self.shape))
        self.file.seek(number * size)
        return np.frombuffer(self.file.read(size), np.uint8).reshape(self.shape)


def write_gif(path: Path, pictures: Iterable[np.ndarray], rate: float = RATE) -> None:
    """An endless GIF of pictures (h, w, 3) uint8, each with the 255 colours that suit it best.

    They are taken one at a time; Pillow holds a byte per pixel of each until it writes.
    """
    from PIL import Image

    few = (
        Image.fromarray(p).quantize(255, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE) for p in pictures
    )
    with atomic_path(path, suffix=".gif") as temporary:
        next(few).save(temporary, format="GIF", save_all=True, append_images=few, duration=round(1000 / rate), loop=0)


def ffmpeg() -> str | None:
    """The ffmpeg program: of imageio-ffmpeg, or on the PATH; None where there is none."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
    except ImportError:
        return shutil.which("ffmpeg")
    try:
        return get_ffmpeg_exe()
    except RuntimeError:
        return shutil.which("ffmpeg")


def write_mp4(path: Path, pictures: Iterable[np.ndarray], rate: float, program: str) -> None:
    """An MP4 (H.264, plays everywhere) of pictures (h, w, 3) uint8, cut to even sides; taken one at a time.

    Raises:
        InputError: ffmpeg failed; the message is its last line.
    """
    pictures = iter(pictures)
    first = next(pictures)
    height, width = (side - side % 2 for side in first.shape[:2])
    with atomic_path(path, suffix=".mp4") as temporary:
        command = [
            program, "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}",
            "-r", f"{rate:g}", "-i", "-", "-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "20",
            "-movflags", "+faststart", "-f", "mp4", os.fspath(temporary),
        ]  # fmt: skip
        with tempfile.TemporaryFile() as said:
            status = _feed(command, (picture[:height, :width] for picture in chain([first], pictures)), said)
            said.seek(0)
            last = said.read().decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
        if status:
            raise InputError(f"{path}: {program} could not write the film: {last[0]}")


def _feed(command: Sequence[str], pictures: Iterable[np.ndarray], said: IO[bytes]) -> int:
    """Run a program with pictures on its input, one at a time, and its messages in a file; its exit status."""
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said)
    try:
        with running.stdin as pipe:
            for picture in pictures:
                pipe.write(np.ascontiguousarray(picture).data)
    except BrokenPipeError:  # it gave up: its status and messages say why
        pass
    except BaseException:
        running.kill()
        running.wait()
        raise
    return running.wait()
