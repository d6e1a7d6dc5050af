"""A simulated particle set on disk: a work directory with its ground truth.

Two passes with flat memory: the clean images are made once (and give the signal's variance), then noise is added.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryosuite.console import Progress
from cryosuite.data.claim import claim, finished
from cryosuite.data.workdir import WorkDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.stacks import StackReader, StackWriter
from cryosuite.simulate.extras import Extras
from cryosuite.simulate.images import Optics, Renderer
from cryosuite.simulate.imaging import Particles, SimulateOptions, draw_particles, stage_rng
from cryosuite.simulate.noise import NoiseModel
from cryosuite.simulate.states import StateSet
from cryosuite.simulate.truth import write_truth
from cryosuite.simulate.write import write_metadata

SOMETIMES = ("clean.mrcs", "truth_poses.pkl", "truth_ctf.pkl")  # files that only some options write


@dataclass
class Signal:
    """What the clean images hold: (N, 2) sums over the pixels of each and of its square, before the crop and at D."""

    render: np.ndarray
    size: np.ndarray


def _variance(sums: np.ndarray, pixels: int, scale: np.ndarray | float = 1.0) -> float:
    """Variance over all pixels of images with these (sum, sum of squares), each multiplied by ``scale`` first."""
    if not len(sums):
        return 0.0
    scale = np.broadcast_to(scale, len(sums))
    mean, square = (sums[:, 0] * scale).mean() / pixels, (sums[:, 1] * scale**2).mean() / pixels
    return float(square - mean**2)


def _make_clean(path: Path, renderer: Renderer, particles: Particles, options: SimulateOptions) -> Signal:
    """First pass: write the clean images (D, in units of atomic number per pixel) and measure their variance."""
    n, size = len(particles), options.box_size
    at_render, at_size = np.zeros((n, 2)), np.zeros((n, 2))
    step = renderer.batch_size()
    with (
        StackWriter(path, n, size, options.pixel_size) as stack,
        Progress(n, "clean images") as progress,
    ):
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            spectra = renderer.spectra(*particles.batch(rows, renderer.device))
            spectra *= renderer.contrast(particles.contrast(rows, renderer.device))
            images = renderer.to_images(spectra)
            at_render[rows] = renderer.power(spectra).cpu().numpy()
            wide = images.double()
            at_size[rows] = torch.stack([wide.sum((1, 2)), wide.pow(2).sum((1, 2))], 1).cpu().numpy()
            stack.write(images.cpu().numpy())
            progress.advance(rows.stop - rows.start)
    return Signal(at_render, at_size)


def _scales(signal: Signal, label: np.ndarray, states: int, noise: NoiseModel, options: SimulateOptions) -> np.ndarray:
    """What the clean images of each state are multiplied with so that the noise at D has unit variance: (K,)."""
    at_size = options.noise_at == "D"
    sums, box = (signal.size, options.box_size) if at_size else (signal.render, options.optics.render_box)
    variance = np.full(states, _variance(sums, box**2))  # all images: the first of a sorted set are of few states
    if options.noise_scope != "global":
        for k in np.unique(label):  # a state without images keeps the common scale for its map
            variance[k] = _variance(sums[label == k], box**2)
    sigma2 = variance / options.snr  # noise variance in the box of noise_at, for images as they come
    noise_at_size = sigma2 if at_size else sigma2 * noise.variance_at_size()
    return 1.0 / np.sqrt(np.maximum(noise_at_size, 1e-30))


def _add_noise(
    work: WorkDir, clean: Path, extras: Extras, noise: NoiseModel, scale: np.ndarray, options: SimulateOptions
) -> None:
    """Second pass: particles = scale x clean + noise of unit sd (+ neighbours, ice)."""
    renderer, particles = extras.renderer, extras.particles
    rng = stage_rng(options.seed, "noise")
    factor = 1.0 / np.sqrt(noise.variance_at_size())
    dtype = np.float16 if options.float16 else np.float32
    n, step = len(particles), renderer.batch_size()
    with (
        StackReader(clean) as reader,
        StackWriter(work.particles, n, options.box_size, options.pixel_size, dtype) as stack,
        Progress(n, "noise") as progress,
    ):
        for start in range(0, n, step):
            rows = np.arange(start, min(start + step, n))
            images = torch.from_numpy(reader.read(rows)).to(renderer.device)
            images = images + extras.neighbours(rows)
            images *= torch.from_numpy(scale[particles.label[rows]]).float().to(renderer.device)[:, None, None]
            images += renderer.to_images(noise.draw(len(rows), rng)) * factor
            images += extras.ice(rows)
            stack.write(images.cpu().numpy())
            progress.advance(len(rows))


def simulate(
    states: StateSet, options: SimulateOptions, out: Path | str, command: str = "", overwrite: bool = False
) -> dict[str, Any]:
    """Make a particle set with its ground truth in the folder ``out``.

    Args:
        states: what to image (see recipes.py).
        options: how to image it.
        out: folder, made when absent; it becomes a work directory that all commands take.
        command: what the user typed, for dataset.yaml.
        overwrite: replace what is in the folder under the names of a particle set.

    Returns:
        The contents of dataset.yaml.

    Raises:
        InputError: impossible options, a folder with files that would be replaced, a full disk.
    """
    options.check()
    work = WorkDir(Path(out))
    _make_folder(work, overwrite)
    particles = draw_particles(states, options)
    renderer = Renderer(states.states, options.optics, options.device)
    _warn_large(states, options.optics)
    noise = NoiseModel(options.optics, options.coloured, renderer.device)
    clean = work.path / ("clean.mrcs" if options.keep_clean else ".clean.mrcs")
    try:
        signal = _make_clean(clean, renderer, particles, options)
        scale = _scales(signal, particles.label, len(states), noise, options)
        extras = Extras(renderer, particles, options, stage_rng)
        _add_noise(work, clean, extras, noise, scale, options)
    finally:
        if not options.keep_clean:
            with contextlib.suppress(OSError):
                clean.unlink(missing_ok=True)
    number = np.bincount(particles.label, minlength=len(states))
    pixels = options.box_size**2  # the noise at D has unit variance: the signal's variance is the SNR
    pooled = _variance(signal.size, pixels, scale[particles.label])
    effective = [_variance(signal.size[particles.label == k], pixels, scale[k]) for k in range(len(states))]
    truth = write_truth(work, states, options.optics, scale)
    record = {
        "kind": "simulated",
        "version": _version(),
        "command": command,
        "recipe": states.recipe,
        "seed": options.seed,
        "n_particles": len(particles),
        "n_states": len(states),
        "box_size": options.box_size,
        "pixel_size": options.pixel_size,
        "sign": 1,
        "sign_from": "simulate",
        "normalised": True,
        "dtype": "float16" if options.float16 else "float32",
        "optics_groups": 1,
        "snr_nominal": options.snr,
        "snr_effective": round(pooled, 6),
        "snr_effective_per_state": [round(float(v), 6) for v in effective],
        "images_per_state": number.tolist(),
        "image_scale": [float(v) for v in scale] if options.noise_scope != "global" else float(scale[0]),
        "noise_sd": 1.0,
        "grey_values": "images = CTF x projection of the volume + noise of unit sd; particles are white",
        "simulation": {**asdict(options), "render_box": options.optics.render_box,
                       "resolution": options.optics.resolution},
        "states": states.details,
        "truth": truth,
    }  # fmt: skip
    write_metadata(work, particles, noise.shells(), options, record)
    finished(work.path)
    return record


def _make_folder(work: WorkDir, overwrite: bool) -> None:
    """Make the output folder; of an earlier simulation remove what says that it is complete, and what may not be
    written again: maps, clean images, true poses."""
    if work.exists() and work.read_dataset().get("kind") != "simulated":
        raise InputError(f"{work.path}: holds a particle set that was not simulated; choose another folder (-o).")
    if work.exists() and not overwrite:
        raise InputError(f"{work.path}: holds a simulated set already: add --overwrite, or choose another folder (-o).")
    names = [*work.names(), *SOMETIMES, "volumes/vol_*.mrc"]
    claim(work.path, work.dataset, names, overwrite, " or add --overwrite")
    work.dataset.unlink(missing_ok=True)  # written last: its presence says the folder is complete
    for old in [*work.volume(0).parent.glob("vol_*.mrc"), *(work.path / name for name in SOMETIMES)]:
        old.unlink(missing_ok=True)


def _warn_large(states: StateSet, optics: Optics) -> None:
    """Say which structures do not fit the box."""
    large = [s for s in states.states if s.radius > optics.field_of_view / 2]
    if large:
        worst = max(large, key=lambda s: s.radius)
        notice(
            f"{len(large)} of {len(states)} structures reach out of the box of {optics.field_of_view:.0f} A (the "
            f"largest, {worst.name}, {2 * worst.radius:.0f} A): they wrap around its edges. Use a larger --Apix or -D."
        )


def _version() -> str:
    from cryosuite import __version__

    return __version__
