"""Backprojection: the map that a set of particles with known poses and CTF shows, and its two half maps.

For every particle i the centred, shift-corrected coefficients X_i on the half disc are inserted at their slice of a 2x
padded half volume (`kernels.slices`):

    B(q) = sum_i w_i C_i X_i / sigma^2,    W(q) = sum_i w_i C_i^2 / sigma^2,    V = F^-1[ B / (W + lambda mean_r W) ]

with the positive-at-low-s CTF C, the noise power sigma^2(r) of the particle's optics group (1 where unknown) and a
regulariser relative to the shell mean of W (BENCHMARKS, sections 5 and 6), or 1/signal from the half maps' FSC.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from cryosuite.console import Progress
from cryosuite.data.broken import Broken
from cryosuite.data.loader import read_ahead
from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.errors import InputError
from cryosuite.kernels import fourier, shells, slices
from cryosuite.kernels.aberrations import magnified_rotation
from cryosuite.kernels.ctf import CtfParams, odd_phase
from cryosuite.kernels.ctf import ctf as evaluate_ctf
from cryosuite.reconstruct.solve import PASSES, REGULARISER, solve, tau_from_fsc

POINTS_PER_CHUNK = 1 << 17  # coefficients handled at once: fits a processor cache, hides call overhead
MEMORY_LIMIT = 4 << 30  # bytes of accumulators held at a time; more classes are done in several groups
SAME_PIXEL_SIZE = 1e-4  # relative difference below which pixel sizes count as equal


@dataclass
class Reconstruction:
    """A map with what is needed to judge it.

    Attributes:
        map: (D, D, D) float32, density positive.
        half_a, half_b: maps of the two half sets, or None.
        fsc: (D/2,) FSC of the half maps without mask, shells 1 .. D/2, or None.
        pixel_size: Angstrom per voxel.
        count: particles used; count_a, count_b in the halves.
    """

    map: torch.Tensor
    pixel_size: float
    count: int
    half_a: torch.Tensor | None = None
    half_b: torch.Tensor | None = None
    fsc: torch.Tensor | None = None
    count_a: int = 0
    count_b: int = 0

    @property
    def box_size(self) -> int:
        """D."""
        return self.map.shape[-1]

    def flipped(self) -> Reconstruction:
        """The other hand: z reversed, centre voxel D//2 kept in place."""
        maps = {name: flip_hand(getattr(self, name)) for name in ("map", "half_a", "half_b")}
        return Reconstruction(**{**self.__dict__, **maps})


def flip_hand(volume: torch.Tensor | None) -> torch.Tensor | None:
    """Reverse z of (D, D, D) about voxel D//2."""
    return None if volume is None else torch.roll(volume.flip(0), 1, 0)


def reconstruct(
    particles: ParticleSet,
    rows: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    halves: bool = True,
    regularise: float | str = REGULARISER,
    passes: int = PASSES,
    r_max: int | None = None,
    progress: str | None = None,
    map_box: int | None = None,
    processes: Processes = ALONE,
) -> Reconstruction | None:
    """Backproject particles into one map, in one pass over the stack.

    Args:
        particles: with rotations; shifts, CTF and noise are used where the set has them.
        rows: (n,) rows of the set, default all.
        weights: (N,) weight per row of the set, default 1.
        halves: also make the half maps and their FSC; the two half sets never share an image.
        regularise: fraction of the shell mean of W added to W, or "fsc": 1/signal as the half maps' FSC tells.
        passes: of `solve` beyond the plain division.
        r_max: largest radius used, Fourier pixels, default D/2.
        progress: label of a progress display, None for silence.
        map_box: box of the map when smaller than that of the particles (a Fourier crop); even.
        processes: that share the images; all but the first get None.

    Raises:
        InputError: no rotations, or no particles.
    """
    labels = np.full(len(particles), -1, np.int64)
    labels[slice(None) if rows is None else rows] = 0
    how = (halves, regularise, passes, r_max, progress, map_box, processes)
    return reconstruct_classes(particles, labels, weights, *how).get(0)


def reconstruct_classes(
    particles: ParticleSet,
    labels: np.ndarray,
    weights: np.ndarray | None = None,
    halves: bool = True,
    regularise: float | str = REGULARISER,
    passes: int = PASSES,
    r_max: int | None = None,
    progress: str | None = None,
    map_box: int | None = None,
    processes: Processes = ALONE,
) -> dict[int, Reconstruction]:
    """Backproject every class into its own map; each image is read once, whatever the number of classes.

    Args:
        labels: (N,) class of each row of the set; rows with a negative label are left out.
        processes: that share the images; all of them call this with the same arguments.
        Others as `reconstruct`.

    Returns:
        class -> Reconstruction, classes without particles absent; nothing but in the first process.
    """
    labels = np.asarray(labels)
    if len(labels) != len(particles):
        raise InputError(f"{len(labels)} class labels for {len(particles)} particles: one per particle is needed")
    check_regulariser(regularise, halves)
    labels = np.asarray(labels).astype(np.int64)  # doubled below: small types would overflow
    classes = np.unique(labels[labels >= 0])
    if not len(classes):
        raise InputError("no particles are left to reconstruct from: check --ind, --first and the chosen class")
    half = particles.half_sets() if halves else np.zeros(len(particles), np.int8)
    accumulator = Accumulator(particles, weights, r_max, map_box, processes)
    bytes_per_class = (2 if halves else 1) * 12 * accumulator.map_box**3 * 4
    group = max(1, MEMORY_LIMIT // bytes_per_class)
    found: dict[int, Reconstruction] = {}
    total = len(processes.mine(np.flatnonzero(labels >= 0)))
    with Progress(total, progress or "") if progress and processes.first else _Silent() as bar:
        for start in range(0, len(classes), group):
            part = classes[start : start + group]
            key = np.where(np.isin(labels, part), 2 * labels + half, -1)
            sums = accumulator.run(key, bar)
            for label in part if processes.first else ():
                pair = [sums.get(2 * int(label) + h) for h in (0, 1)]
                own = (labels == label) & ~accumulator.broken.rows
                counts = [int((own & (half == h)).sum()) for h in (0, 1)]
                found[int(label)] = accumulator.finish(pair, counts, halves, regularise, passes)
    return found


def check_regulariser(regularise: float | str, halves: bool) -> None:
    """InputError unless a positive number, or "fsc" with half maps."""
    if isinstance(regularise, str):
        if regularise != "fsc" or not halves:
            raise InputError(f"regulariser {regularise!r}: give a positive number, or fsc (which needs half maps)")
    elif not regularise > 0:
        raise InputError(f"regulariser {regularise}: a positive number is needed, 0.1 is usual")


class _Silent:
    """A progress display that shows nothing."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Nothing."""


class Accumulator:
    """Streams particles of one set into accumulators, one per key."""

    def __init__(
        self,
        particles: ParticleSet,
        weights: np.ndarray | None = None,
        r_max: int | None = None,
        map_box: int | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        if particles.rotation is None:
            raise InputError(f"{particles.path or 'the particle set'}: has no rotations; give poses with --poses")
        self.particles = particles
        self.weights = None if weights is None else torch.as_tensor(np.asarray(weights, np.float32))
        self.pixel_size = common_pixel_size(particles.pixel_size)
        # a smaller map is the same coefficients in a smaller box
        self.map_box = map_box or particles.box_size
        r_max = min(r_max or particles.box_size // 2, self.map_box // 2)
        self.disc = fourier.half_disc(particles.box_size, r_max)
        self.map_disc = fourier.half_disc(self.map_box, r_max)
        self.crop_scale = (self.map_box / particles.box_size) ** 3  # keeps grey values
        self.precision = inverse_noise(particles, self.disc)
        self.broken = Broken(particles)

    def run(self, key: np.ndarray, bar: Progress | _Silent | None = None) -> dict[int, slices.Accumulator]:
        """Accumulate the rows with key >= 0, each into the accumulator of its key; returns key -> accumulator.

        The processes share the rows; only what the first one returns is complete.
        """
        rows = self.processes.mine(np.nonzero(key >= 0)[0])
        sums = self.processes.each(lambda: self._own_sums(rows, key, bar))
        self.broken.share(self.processes)
        if self.processes.count > 1:
            for one in np.unique(key[key >= 0]).tolist():
                if one not in sums:
                    sums[one] = slices.new_accumulator(self.map_box)
                self.processes.add_up(sums[one].data)
        return sums

    def _own_sums(
        self, rows: np.ndarray, key: np.ndarray, bar: Progress | _Silent | None
    ) -> dict[int, slices.Accumulator]:
        """The sums of this process's rows."""
        step = max(1, POINTS_PER_CHUNK // len(self.disc))
        sums: dict[int, slices.Accumulator] = {}
        # reading, coefficients and the insertion into each half run in threads of their own, always in stack order,
        # so that the result does not depend on timing; torch's own threads only get in their way
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(2) as pool:
                for part, coefficients in read_ahead(self.prepared(rows, step), 2):
                    own = key[part]
                    for one in np.unique(own).tolist():
                        if one not in sums:
                            sums[one] = slices.new_accumulator(self.map_box)
                    for task in [pool.submit(self._insert_half, half, own, coefficients, sums) for half in (0, 1)]:
                        task.result()
                    if bar is not None:
                        bar.advance(len(part))
        finally:
            torch.set_num_threads(threads)
        return sums

    def _insert_half(self, half: int, own: np.ndarray, coefficients: tuple, sums: dict) -> None:
        """Insert those rows of a chunk whose key belongs to one half set."""
        for one in np.unique(own[own % 2 == half]).tolist():
            pick = torch.from_numpy(np.nonzero(own == one)[0])
            chosen = coefficients if len(pick) == len(own) else [value[pick] for value in coefficients]
            slices.insert_slices(sums[one], *chosen, self.map_disc)

    def prepared(self, rows: np.ndarray, step: int) -> Iterator[tuple[np.ndarray, tuple]]:
        """Chunks of rows with what they add (see `coefficients`), read and computed ahead of time."""
        torch.set_num_threads(1)  # of the thread this generator runs in
        for part, images in read_ahead(self._chunks(rows, step), 2):
            yield part, self.coefficients(part, images)

    def _chunks(self, rows: np.ndarray, step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            yield part, self.particles.read(part)

    def coefficients(self, rows: np.ndarray, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a chunk of particles adds: (b, P) complex values C X / sigma^2, (b, P) weights C^2 / sigma^2, and
        the (b, 3, 3) matrices that take its half disc into the volume."""
        particles, disc = self.particles, self.disc
        bad = torch.from_numpy(self.broken.find(rows, images))
        if bool(bad.any()):
            images[bad.numpy()] = 0
        X = fourier.to_half_disc(torch.from_numpy(images), disc)
        if self.crop_scale != 1:
            X = X * self.crop_scale
        if particles.shift is not None:
            X = fourier.phase_shift(X, disc, torch.from_numpy(particles.shift[rows]))
        weights = self.precision[torch.from_numpy(particles.optics_group[rows]).long()] * ~bad[:, None]
        if self.weights is not None:
            weights = weights * self.weights[rows][:, None]
        params = particles.ctf_params(rows)
        if params is None:
            return X * weights, weights, self.matrices(rows, params)
        odd = odd_phase(disc.frequency, params)
        if odd is not None:
            X = X * odd
        C = evaluate_ctf(disc.frequency, params)
        # premultiplied images hold C X already
        factor = weights if particles.ctf_premultiplied else weights * C
        return X * factor, weights * C.square(), self.matrices(rows, params)

    def matrices(self, rows: np.ndarray, params: CtfParams | None) -> torch.Tensor:
        """Rotations (b, 3, 3), with the magnification of the row folded in: a point k of an image with another pixel
        size, or with anisotropic magnification M, belongs at (M k, 0) R times the ratio of pixel sizes."""
        rotation = torch.from_numpy(self.particles.rotation[rows])
        matrix = getattr(params, "mag_matrix", None)
        if matrix is not None:
            rotation = magnified_rotation(rotation, matrix.to(rotation))
        ratio = self.pixel_size / self.particles.pixel_size[rows]
        if np.abs(ratio - 1).max() > SAME_PIXEL_SIZE:
            rotation = rotation * torch.from_numpy(np.ascontiguousarray(ratio, np.float32))[:, None, None]
        return rotation

    def finish(
        self, pair: list, counts: list[int], halves: bool, regularise: float | str = REGULARISER, passes: int = PASSES
    ) -> Reconstruction:
        """Maps from the accumulators of the two half sets (either may be None when it is empty)."""
        present = [acc for acc in pair if acc is not None]
        base = REGULARISER if isinstance(regularise, str) else regularise
        maps = [solve(acc, base, passes) for acc in pair] if halves and len(present) == 2 else [None, None]
        fsc = None if maps[0] is None else shells.fsc(*maps)
        if regularise == "fsc" and fsc is not None:
            base = tau_from_fsc(fsc)
        joint = solve(present[0] if len(present) == 1 else present[0] + present[1], base, passes)
        pixel_size = self.pixel_size * self.particles.box_size / self.map_box
        return Reconstruction(joint, pixel_size, sum(counts), *maps, fsc, *counts)


def inverse_noise(particles: ParticleSet, disc: fourier.HalfDisc) -> torch.Tensor:
    """(G, P) 1/sigma^2 of every point of the half disc per optics group, scaled to mean 1; ones without a spectrum."""
    groups = particles.n_groups
    if particles.noise is None:
        return torch.ones(groups, len(disc))
    noise = torch.from_numpy(np.asarray(particles.noise, np.float32))
    if not bool((noise[:, 1:] > 0).all()):
        return torch.ones(groups, len(disc))
    precision = 1.0 / noise[:, disc.shell.clamp(max=noise.shape[1] - 1)]
    return precision / precision.mean()


def common_pixel_size(pixel_size: np.ndarray) -> float:
    """The pixel size (A) most rows have: that of the map."""
    values, counts = np.unique(np.asarray(pixel_size, np.float32), return_counts=True)
    return float(values[counts.argmax()])
