"""The streaming pipeline behind ``cryosuite preprocess``: any particle set -> a work directory.

A chunk of images is read, Fourier-cropped, normalised and written while the next ones are read by other threads; the
noise spectrum is gathered on the way. Memory does not grow with the number of particles (but for about 200 bytes of
bookkeeping each), and torch is not loaded.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from cryosuite import console
from cryosuite.data.contrast import SURE, box_of, contrast_score, read_boxes
from cryosuite.data.noise import DEFAULT_RADIUS, NoiseEstimator, radius_map
from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.data.work_files import write_work_files
from cryosuite.data.workdir import WorkDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.mrc import StackPart, StackWriter
from cryosuite.ranks import local_count

CHUNK_BYTES = 16 << 20  # of float32 images before the crop
NOISE_IMAGES = 20000  # enough for 0.1 % per shell; more would only cost time
LARGE = 1e15  # grey values beyond it, or below its inverse, are scaled before their squares overflow or vanish
LISTED = 10_000  # images left out that dataset.yaml names: it must stay shorter than `read_yaml` takes
SAME_FIELD = 1e-4  # relative difference of box x pixel size up to which boxes can be brought to one


@dataclass(frozen=True)
class PreprocessOptions:
    """How images are prepared.

    box_size: D to crop to in Fourier space (None: keep). diameter: of the particle in Angstrom; what lies outside is
    background (None: 75 % of the box, RELION's default). dtype: "float32" or "float16". threads: 0 for all.
    """

    box_size: int | None = None
    diameter: float | None = None
    dtype: str = "float32"
    threads: int = 0


@dataclass(frozen=True)
class Prepared:
    """What came out: the folder, the number of images, and rows (from 0) that were left out or are constant."""

    work: WorkDir
    written: int
    excluded: np.ndarray
    constant: np.ndarray
    sign: int
    sign_from: str


@dataclass
class _Found:
    """What was met on the way: rows that were left out or are constant, and the noise of some, in their order."""

    excluded: list[np.ndarray] = field(default_factory=list)
    constant: list[np.ndarray] = field(default_factory=list)
    noise: list[list] = field(default_factory=list)
    part: StackPart | None = None


def preprocess(
    particles: ParticleSet, out: Path, options: PreprocessOptions, command: str = "", processes: Processes = ALONE
) -> Prepared | None:
    """Write a work directory: images of one box, mean 0 and sd 1 outside the particle, particles white.

    Images that hold NaN or infinity are left out, with a notice that lists them; constant images stay, with a notice.
    dataset.yaml is written last: a folder without it is not a particle set. ``processes`` share the images, each
    writes its own into the one stack; the files are those of one process, and all but the first return None. Raises
    InputError for boxes that cannot be brought to one, an odd or larger box, a particle that fills the box, or a full
    disk.
    """
    work = WorkDir(out)
    size, pixel_size = target(particles, options.box_size)
    radius = background_radius(size, pixel_size, options.diameter)
    _require_other_folder(particles, work)
    sign, sign_from = processes.each(lambda: decide_sign(particles, options.diameter))
    flip = sign * particles.sign < 0
    work.path.mkdir(parents=True, exist_ok=True)
    noise = NoiseEstimator(size, particles.n_groups)
    stack = partial(StackWriter, work.particles, len(particles), size, float(np.median(pixel_size)), _dtype(options))
    prepare = partial(_prepare, particles, size, radius, flip, options, noise)
    found = _alone(work, particles, stack(), prepare) if processes.count == 1 else _shared(
        work, particles, stack, prepare, processes
    )  # fmt: skip
    if not processes.first:
        return None
    bad, constant = (np.concatenate([np.zeros(0, np.int64), *parts]) for parts in (found.excluded, found.constant))
    for measured in found.noise:
        noise.take(measured)
    kept = np.setdiff1d(np.arange(len(particles)), bad)
    spectrum = noise.spectrum() if found.noise else None  # of a large set only a sample is asked
    record = {
        "command": command,
        "sign": -sign if particles.dataset.get("sign") == -1 else sign,  # of the first source of all
        "sign_from": sign_from,
        "normalised": True,
        "dtype": options.dtype,
        "background_radius_pixels": float(radius),
        "particle_diameter": options.diameter,
        "n_excluded": len(bad),
        "excluded": particles.index[bad[:LISTED]].tolist(),
    }
    particles = particles if len(bad) == 0 else particles.subset(kept)
    write_work_files(work, particles, size, pixel_size[kept], spectrum, record)
    return Prepared(work, len(kept), bad, constant, sign, sign_from)


def _alone(
    work: WorkDir, particles: ParticleSet, writer: StackWriter, prepare: Callable[[StackWriter, np.ndarray], _Found]
) -> _Found:
    """The stack, written by this process."""
    with writer:
        found = prepare(writer, np.arange(len(particles)))
        _finish(work, particles, found, writer)
    return found


def _shared(
    work: WorkDir,
    particles: ParticleSet,
    stack: Callable[[], StackWriter],
    prepare: Callable[[StackWriter, np.ndarray], _Found],
    processes: Processes,
) -> _Found:
    """The stack, written by several processes, each from the place of its first image on; the first tidies up."""
    rows = processes.mine(np.arange(len(particles)), _chunk(particles))
    with contextlib.ExitStack() as opened:
        writer = stack()

        def make() -> str:
            opened.enter_context(writer)
            writer.allocate()
            return str(writer.temporary)

        temporary = processes.first_does(make)

        def fill() -> _Found:
            first = int(rows[0]) if len(rows) else 0
            part = StackPart(work.particles, temporary, first, len(rows), writer.box_size, writer.dtype)
            with part:
                found = prepare(part, rows)
            found.part = part
            return found

        parts = processes.everyone(fill)
        found = _Found(*(sum((getattr(one, name) for one in parts), []) for name in ("excluded", "constant", "noise")))
        if processes.first:
            writer.put_together([one.part for one in parts])
            _finish(work, particles, found, writer)
    return found


def _prepare(
    particles: ParticleSet, size: int, radius: float, flip: bool, options: PreprocessOptions, noise: NoiseEstimator,
    writer: StackWriter, rows: np.ndarray,
) -> _Found:  # fmt: skip
    """Write the images of some neighbouring rows."""
    every = max(1, len(particles) // NOISE_IMAGES)
    found = _Found()
    with console.Progress(len(rows), "preprocess") as progress:
        for part, images, flat in _stream(particles, rows, size, radius, flip, options.threads):
            good = np.isfinite(images).all(axis=(1, 2))
            found.excluded.append(part[~good])
            found.constant.append(part[flat & good])
            sampled = good & ~flat & (part % every == 0)
            if sampled.any():
                found.noise.append(noise.measured(images[sampled], particles.optics_group[part[sampled]], radius))
            writer.write(images if good.all() else images[good], particles.index[part[good]])
            progress.advance(len(part))
    return found


def _finish(work: WorkDir, particles: ParticleSet, found: _Found, writer: StackWriter) -> None:
    """Say what was wrong with images, before the stack takes its place."""
    _report(particles, np.concatenate(found.excluded), np.concatenate(found.constant))
    if writer.written == 0:
        raise InputError(f"{particles.path}: no image without NaN or infinity: nothing to write")
    writer.count = writer.written  # the images left out are not in the header
    work.dataset.unlink(missing_ok=True)  # only now: until here a set that was in the folder is whole


def target(particles: ParticleSet, wanted: int | None) -> tuple[int, np.ndarray]:
    """The box to crop to and the pixel size (N,) A that each image will have there.

    Raises InputError for an odd box, one larger than the images, and for images of several boxes that span different
    lengths: cropped to one box they would be magnified differently.
    """
    boxes = box_of(particles, np.arange(len(particles)))
    smallest = int(boxes.min())
    size = smallest if wanted is None else wanted
    if size % 2 or size < 2:
        raise InputError(f"-D {size}: the box size must be even")
    if size > smallest:
        raise InputError(
            f"-D {size}: larger than the images of {particles.path} ({smallest} pixels); images are only cropped"
        )
    field = boxes * particles.pixel_size.astype(np.float64)
    if particles.box_sizes is not None and field.max() / field.min() - 1 > SAME_FIELD:
        low, high = int(field.argmin()), int(field.argmax())
        raise InputError(
            f"{particles.path}: box {boxes[low]} at {particles.pixel_size[low]:.4g} A spans {field[low]:.5g} A, box "
            f"{boxes[high]} at {particles.pixel_size[high]:.4g} A spans {field[high]:.5g} A: cropping cannot bring "
            "them to one box and one pixel size. Extract the particles again with boxes of the same length in Angstrom."
        )
    return size, field / size


def background_radius(size: int, pixel_size: np.ndarray, diameter: float | None) -> float:
    """Radius in pixels outside which an image is background."""
    if diameter is None:
        return DEFAULT_RADIUS * size
    radius = diameter / 2 / float(np.median(pixel_size))
    if not 1 <= radius < size / 2:
        span = size * float(np.median(pixel_size))
        raise InputError(
            f"--particle-diameter {diameter:g}: must be smaller than the box, which is {span:.4g} A wide, or no "
            "background is left"
        )
    return radius


def decide_sign(particles: ParticleSet, diameter: float | None) -> tuple[int, str]:
    """The factor that makes the stored images white, and who says so; a notice when the images had to be asked."""
    score = contrast_score(particles, diameter)
    found = particles.sign * (1 if score > 0 else -1)
    looks = "white" if found > 0 else "dark"
    stated = "white" if particles.sign > 0 else "dark"
    if particles.sign_from != "assumed":
        if abs(score) > SURE and found != particles.sign:
            who = "you say" if particles.sign_from == "option" else f"{particles.sign_from} says"
            notice(
                f"{particles.path}: {who} that particles are {stated} in the stack, but the images look {looks} "
                f"(by {abs(score):.1f} standard errors); {stated} is used. Check a reconstruction; --invert and "
                "--uninvert overrule."
            )
        return particles.sign, particles.sign_from
    if abs(score) < SURE:
        notice(
            f"{particles.path}: nothing says whether particles are white or dark, and the images do not tell (score "
            f"{score:.1f}): {stated} is assumed, as RELION writes them. Use --invert if they are dark."
        )
        return particles.sign, "assumed"
    done = "kept as they are" if found > 0 else "multiplied by -1"
    notice(
        f"{particles.path}: particles are {looks} in the stack (found from the images, by {abs(score):.1f} standard "
        f"errors): images are {done}."
    )
    return found, "data"


def normalise(images: np.ndarray, outside: np.ndarray, flip: bool = False) -> np.ndarray:
    """Bring images (b, D, D) in place to mean 0 and sd 1 where ``outside`` (D, D) is True; flip the sign if asked.

    Returns (b,) bool: images without any variation there, which are only brought to mean 0.
    """
    pixels = images.reshape(len(images), -1)
    weight = (outside.ravel() / outside.sum()).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        size = np.abs(pixels).max(axis=1)
        extreme = np.isfinite(size) & (size > 0) & ((size > LARGE) | (size < 1 / LARGE))
        if extreme.any():
            pixels[extreme] /= size[extreme, None]
            size[extreme] = 1.0
        pixels -= (pixels @ weight)[:, None]
        sd = np.sqrt(np.square(pixels) @ weight)
        flat = ~(sd > 1e-6 * size) & np.isfinite(sd)
        pixels *= ((-1.0 if flip else 1.0) / np.where(flat, 1.0, sd))[:, None].astype(np.float32)
    return flat


def _chunk(particles: ParticleSet) -> int:
    """Images handled at a time."""
    return max(1, CHUNK_BYTES // (4 * particles.box_size**2))


def _stream(
    particles: ParticleSet, rows: np.ndarray, size: int, radius: float, flip: bool, threads: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Chunks in order: rows (b,), prepared images (b, size, size), which are constant (b,); made by several threads."""
    from threadpoolctl import threadpool_limits

    outside = radius_map(size) > radius
    step = _chunk(particles)

    def prepare(begin: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        part = rows[begin : begin + step]
        images = read_boxes(particles, part, size)
        return part, images, normalise(images, outside, flip)

    workers = threads or max(1, _processors() // local_count())
    with threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future] = deque()
        for begin in range(0, len(rows), step):
            ahead.append(pool.submit(prepare, begin))
            if len(ahead) > workers + 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _processors() -> int:
    """Processors this process may use; macOS cannot say and counts all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _dtype(options: PreprocessOptions) -> type:
    if options.dtype not in ("float32", "float16"):
        raise InputError(f"--dtype {options.dtype}: expected float32 or float16")
    return np.float16 if options.dtype == "float16" else np.float32


def _report(particles: ParticleSet, bad: np.ndarray, constant: np.ndarray) -> None:
    """Notices about images that were left out or hold nothing."""
    found = (bad, "NaN or infinite pixels", "left out"), (constant, "no variation outside the particle", "kept")
    for rows, problem, done in found:
        if len(rows):
            names = ", ".join(map(str, particles.index[rows[:20]])) + (" ..." if len(rows) > 20 else "")
            many = "s" if len(rows) > 1 else ""
            names = names if len(rows) != 2 else names.replace(", ", " and ")
            notice(f"{particles.path}: image{many} {names} (0-based): {problem}; {done} ({len(rows)} in all).")


def outputs(work: WorkDir) -> tuple[Path, ...]:
    """The files that ``preprocess`` writes or deletes in a folder."""
    return work.particles, work.star, work.poses, work.ctf, work.rows, work.noise, work.dataset


def _require_other_folder(particles: ParticleSet, work: WorkDir) -> None:
    """InputError when a file that the particles come from would be written over."""
    sources = [particles.path, particles.source, particles.poses_from, particles.ctf_from, *particles.passthrough]
    read = {Path(path).resolve() for path in (*getattr(particles.images, "files", ()), *sources) if path is not None}
    lost = [path for path in outputs(work) if path.exists() and path.resolve() in read]
    if lost:
        raise InputError(
            f"{work.path}: preprocess would write over {lost[0].name}, which it reads from: choose another folder "
            "with -o"
        )
